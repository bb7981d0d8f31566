"""What a slice and a group refuse, and what they accept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpm_core import DecayPruning, GroupError, Owner, Slice, StructureGroup
from tests.support.snapshot import says

ROWS = torch.arange(3)


class Sharded(Tensor):
    """Looks like DTensor: it knows where its pieces lie."""

    placements = ("Shard(0)",)


class ShardedOld(Tensor):
    """Looks like ShardedTensor."""

    def local_shards(self) -> list[Tensor]:
        return []


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3, 2)))


SHARDED = ("sharded", "FSDP", "prune before")
KINDS = {
    "sharded": (lambda: torch.ones(3, 2).as_subclass(Sharded), SHARDED),
    "sharded as of old": (
        lambda: torch.ones(3, 2).as_subclass(ShardedOld),
        ("sharded", "FSDP", "prune before"),
    ),
    "meta": (lambda: torch.ones(3, 2, device="meta"), ("meta device", "holds its values")),
    "sparse": (lambda: torch.ones(3, 2).to_sparse(), ("sparse", "dense parameter")),
    "csr": (lambda: torch.ones(3, 2).to_sparse_csr(), ("sparse", "dense parameter")),
    "integer": (lambda: torch.ones(3, 2, dtype=torch.int32), ("int32", "floating-point")),
    "bool": (lambda: torch.ones(3, 2, dtype=torch.bool), ("bool", "floating-point")),
    "complex": (lambda: torch.ones(3, 2, dtype=torch.complex64), ("complex64", "real")),
    "expanded": (lambda: torch.ones(1, 2).expand(3, 2), ("expanded", "clone()")),
    "no dimension": (lambda: torch.tensor(1.0), ("shape ()", "no structures")),
    "empty": (lambda: torch.ones(0, 2), ("shape (0, 2)", "no structures")),
    "no tensor": (lambda: [[1.0]] * 3, ("list", "not a tensor")),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_cannot_decay_in_place_is_refused(kind: str) -> None:
    make, words = KINDS[kind]
    parameter = make()
    with says(GroupError, "'layer.weight'", *words):
        Slice(parameter, ROWS, name="layer.weight")


INDICES = {
    "float": (torch.arange(3.0), ("float32", "integer positions")),
    "mask": (torch.ones(3, dtype=torch.bool), ("bool", "not a mask")),
    "complex": (torch.ones(3, dtype=torch.complex64), ("complex64", "integer positions")),
    "three dimensions": (torch.arange(2).view(2, 1, 1), ("(2, 1, 1)", "(K,) or (K, m)")),
    "no dimension": (torch.tensor(1), ("shape ()", "(K,) or (K, m)")),
    "empty": (torch.empty(0, dtype=torch.int64), ("(0,)", "at least one structure")),
    "no positions": (torch.empty(2, 0, dtype=torch.int64), ("(2, 0)", "at least one")),
    "too high": (torch.tensor([0, 3]), ("3", "positions 0 to 2")),
    "negative": (torch.tensor([-1, 0]), ("-1", "positions 0 to 2")),
    "twice in two": (torch.tensor([1, 1]), ("listed twice", "one structure")),
    "twice in one": (torch.tensor([[1, 1]]), ("listed twice", "one structure")),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_does_not_fit_is_refused(kind: str) -> None:
    index, words = INDICES[kind]
    with says(GroupError, "'layer.weight'", *words):
        Slice(weight(), index, name="layer.weight")


@pytest.mark.parametrize("dim", [-1, 2])
def test_a_dimension_that_the_parameter_does_not_have_is_refused(dim: int) -> None:
    with says(GroupError, "'layer.weight'", f"dim {dim}", "(3, 2)", "0 to 1"):
        Slice(weight(), torch.arange(2), dim, name="layer.weight")


@pytest.mark.parametrize(("dim", "each"), [(0, 2), (0, 0), (0, -1), (1, 3), (2, 1), (-1, 1)])
def test_a_whole_dimension_that_does_not_split_is_refused(dim: int, each: int) -> None:
    with says(GroupError, "'layer.weight'", f"dim {dim}", f"of {each}"):
        Slice.whole(weight(), dim, per_structure=each, name="layer.weight")


def test_a_whole_dimension_is_split_into_runs() -> None:
    assert Slice.whole(weight(6, 2), per_structure=3).index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Slice.whole(weight(2, 3), 1).index.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0], dtype=torch.uint8)])
def test_any_integers_will_do_for_an_index(index: object) -> None:
    found = Slice(weight(), index).index  # type: ignore[arg-type]
    assert found.tolist() == [[2], [0]]
    assert found.dtype == torch.int64


def test_a_slice_keeps_the_very_parameter() -> None:
    p = weight()
    assert Slice(p, ROWS).parameter is p


# ---------------------------------------------------------------------- groups


def test_a_group_without_slices_is_refused() -> None:
    with says(GroupError, "'g'", "no slices", "at least one"):
        StructureGroup("g", [])


def test_slices_of_different_numbers_of_structures_are_refused() -> None:
    slices = [Slice(weight(), ROWS, name="a"), Slice(weight(), ROWS[:2], name="b")]
    with says(GroupError, "'g'", "'a': 3", "'b': 2", "one index row per structure"):
        StructureGroup("g", slices)


def test_slices_of_different_numbers_of_structures_are_refused_without_names_too() -> None:
    with says(GroupError, "'g'", "number of structures"):
        StructureGroup("g", [Slice(weight(), ROWS), Slice(weight(), ROWS[:2])])


def test_an_owner_of_another_number_of_structures_is_refused() -> None:
    with says(GroupError, "'g'", "owner", "one index row per structure"):
        StructureGroup("g", [Slice(weight(), ROWS)], [Owner(nn.ReLU(), torch.arange(2))])


@pytest.mark.parametrize("index", [torch.ones(3, dtype=torch.bool), torch.tensor([0.0, 1.0, 2.0])])
def test_an_owners_index_that_is_a_mask_or_a_float_is_refused(index: Tensor) -> None:
    with says(GroupError, str(index.dtype)):
        Owner(nn.ReLU(), index)


def test_the_effect_is_batch_norms_part_or_all_where_there_is_none() -> None:
    plain, norm = Slice(weight(), ROWS), Slice(weight(3), ROWS, batch_norm=True)
    assert StructureGroup("g", [plain, norm]).effect_slices == (norm,)
    other = Slice(weight(), ROWS)
    assert StructureGroup("g", [plain, other]).effect_slices == (plain, other)


def test_a_group_tells_its_name_and_its_slices() -> None:
    assert repr(StructureGroup("g", [Slice(weight(), ROWS, name="a")])) == (
        "StructureGroup('g', 3 structures, slices: a)"
    )


# ---------------------------------------------------------------------- overlaps


def test_slices_of_one_group_that_share_elements_are_refused() -> None:
    p = weight(4, 2)
    first, second = Slice(p, [0, 1], name="first"), Slice(p, [2, 1], name="second")
    with says(GroupError, "'first'", "'second'", "'g'", "position 1", "one decay only"):
        StructureGroup("g", [first, second])


def test_a_parameter_sliced_along_two_dimensions_is_refused() -> None:
    p = weight(4, 4)
    slices = [Slice(p, [0, 1], 0, name="rows"), Slice(p, [2, 3], 1, name="columns")]
    with says(GroupError, "'rows'", "'columns'", "dim 0", "dim 1", "along one"):
        StructureGroup("g", slices)


def test_groups_that_share_elements_are_refused() -> None:
    p = weight(4, 2)
    groups = [StructureGroup(n, [Slice(p, i, name="p")]) for n, i in (("a", [0, 3]), ("b", [3, 1]))]
    with says(GroupError, "'a'", "'b'", "position 3", "one decay only"):
        DecayPruning(groups)


def test_the_third_of_three_overlapping_groups_is_found_too() -> None:
    p = weight(4, 2)
    groups = [StructureGroup(str(i), [Slice(p, [i % 2], name="p")]) for i in range(3)]
    with says(GroupError, "'0'", "'2'"):
        DecayPruning([groups[0], groups[1], groups[2]])


def test_groups_that_slice_a_parameter_along_two_dimensions_are_refused() -> None:
    p = weight(4, 4)
    groups = [StructureGroup("a", [Slice(p, [0], 0)]), StructureGroup("b", [Slice(p, [1], 1)])]
    with says(GroupError, "'a'", "'b'", "along one"):
        DecayPruning(groups)


def test_groups_may_share_a_parameter_without_sharing_elements() -> None:
    p = weight(4, 2)
    groups = [StructureGroup(n, [Slice(p, i)]) for n, i in (("a", [0, 3]), ("b", [2, 1]))]
    assert list(DecayPruning(groups).groups) == ["a", "b"]


@pytest.mark.parametrize("tie", [lambda p: p.data, lambda p: p.data[1:], lambda p: p.data.T])
def test_parameters_that_share_storage_are_refused(tie) -> None:
    p = weight(3, 3)
    slices = [Slice(p, [0, 1], name="p"), Slice(nn.Parameter(tie(p)), [0, 1], name="tied")]
    with says(GroupError, "'p'", "'tied'", "shares storage", "Give tied parameters as one"):
        StructureGroup("g", slices)


# ---------------------------------------------------------------------- sets of groups


def test_no_groups_are_refused() -> None:
    with says(GroupError, "no structure groups"):
        DecayPruning([])


def test_two_groups_of_one_name_are_refused() -> None:
    groups = [StructureGroup(n, [Slice(weight(), ROWS)]) for n in ("a", "same", "same")]
    with says(GroupError, "['same']", "twice"):
        DecayPruning(groups)


def test_groups_on_two_devices_are_refused(cuda: torch.device) -> None:
    far = nn.Parameter(torch.ones(3, 2, device=cuda))
    groups = [StructureGroup("a", [Slice(weight(), ROWS)]), StructureGroup("b", [Slice(far, ROWS)])]
    with says(GroupError, "cpu", "cuda", "one DecayPruning per device"):
        DecayPruning(groups)
