"""The vectorised passes over slices, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dpm_core.table
from dpm_core import Slice, StructureGroup
from dpm_core.table import LARGE, SliceTable, zero_
from tests.support import oracle
from tests.support.snapshot import bits, same_bits

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@dataclass
class Case:
    """Groups with a tensor of the shape of each slice's parameter, or None."""

    groups: list[StructureGroup]
    others: list[list[Tensor | None]]

    @property
    def table(self) -> SliceTable:
        return SliceTable([g.slices for g in self.groups])

    @property
    def tolerance(self) -> float:
        """A share in single precision is summed in single precision, whatever lies beside it."""
        return max(TOLERANCE[s.parameter.dtype] for g in self.groups for s in g.slices)


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)) -> Case:
    """Groups of different sizes and widths; slices of one to four dimensions in any order."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    groups, others = [], []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        slices: list[Slice] = []
        tensors: list[Tensor | None] = []
        for _ in range(draw(st.integers(1, 3))):
            each = draw(st.integers(1, 3))
            extent = size * each + draw(st.integers(0, 2))
            shape = draw(st.lists(st.integers(1, 3), max_size=3))
            dim = draw(st.integers(0, len(shape)))
            shape.insert(dim, extent)
            dtype = draw(st.sampled_from(dtypes))
            p = nn.Parameter(torch.randn(shape, generator=random).to(dtype))
            index = torch.randperm(extent, generator=random)[: size * each].view(size, each)
            slices.append(Slice(p, index, dim))
            other = torch.randn(shape, generator=random).to(dtype)
            tensors.append(None if draw(st.booleans()) and draw(st.booleans()) else other)
        groups.append(StructureGroup(f"g{number}", slices))
        others.append(tensors)
    return Case(groups, others)


def norms_by_hand(case: Case, of: str = "parameters") -> list[float]:
    found = []
    for group, tensors in zip(case.groups, case.others, strict=True):
        shares = oracle.shares_of(group)
        given = tensors if of == "others" else ()
        found += [oracle.length(oracle.values(shares, k, given)) for k in range(group.size)]
    return found


def dots_by_hand(case: Case) -> list[float]:
    found = []
    for group, tensors in zip(case.groups, case.others, strict=True):
        shares = oracle.shares_of(group)
        found += [
            oracle.inner(oracle.values(shares, k), oracle.values(shares, k, tensors))
            for k in range(group.size)
        ]
    return found


@settings(max_examples=60)
@given(cases())
def test_square_norms_of_parameters_are_the_oracles(case: Case) -> None:
    table = case.table
    found = table.square_norms(table.parameters())
    expected = [v * v for v in norms_by_hand(case)]
    assert found.shape == (sum(g.size for g in case.groups),)
    assert found.tolist() == pytest.approx(expected, rel=case.tolerance, abs=1e-9)


@settings(max_examples=40)
@given(cases())
def test_square_norms_of_other_tensors_count_none_as_zero(case: Case) -> None:
    table = case.table
    found = table.square_norms(table.order([t for ts in case.others for t in ts]))
    expected = [v * v for v in norms_by_hand(case, "others")]
    assert found.tolist() == pytest.approx(expected, rel=case.tolerance, abs=1e-9)


@settings(max_examples=60)
@given(cases())
def test_dots_are_the_oracles_and_none_counts_as_zero(case: Case) -> None:
    table = case.table
    found = table.dots(table.parameters(), table.order([t for ts in case.others for t in ts]))
    # Terms cancel, so the tolerance goes by what was summed rather than by the sum.
    scale = [a * b for a, b in zip(norms_by_hand(case), norms_by_hand(case, "others"), strict=True)]
    for value, expected, size in zip(found.tolist(), dots_by_hand(case), scale, strict=True):
        assert value == pytest.approx(expected, abs=case.tolerance * size + 1e-12)


@settings(max_examples=100)
@given(cases(), st.data())
def test_norms_and_products_of_some_rows_are_those_of_all(case: Case, data: st.DataObject) -> None:
    """As where parameters are large; in any layout, with anything in the rows beside them."""
    chosen = sorted(data.draw(st.sets(st.integers(0, case.table.size - 1))))
    scales = [
        a * b for a, b in zip(norms_by_hand(case), norms_by_hand(case, "others"), strict=True)
    ]
    squares, dots = [v * v for v in norms_by_hand(case, "others")], dots_by_hand(case)
    first = 0
    for group, tensors in zip(case.groups, case.others, strict=True):
        for share, tensor in zip(oracle.shares_of(group), tensors, strict=True):
            for k in range(group.size):
                for place in share.places(k) if first + k not in chosen else ():
                    share.parameter.data[place] = math.nan
                    if tensor is not None:
                        tensor[place] = math.inf
        first += group.size
    for s in (s for group in case.groups for s in group.slices):
        s.parameter.data = drawn_layout(data, s.parameter.data)
    others = [t if t is None else drawn_layout(data, t) for ts in case.others for t in ts]
    with mock.patch.object(dpm_core.table, "LARGE", 0):
        table = case.table
        diagonals = table.diagonals(torch.tensor(chosen, dtype=torch.int64))
    given = table.order(others)
    found = zip(
        table.square_norms(given, diagonals).tolist(),
        table.dots(table.parameters(), given, diagonals).tolist(),
        strict=True,
    )
    for k, (square, dot) in enumerate(found):
        if k in chosen:
            assert square == pytest.approx(squares[k], rel=case.tolerance, abs=1e-9)
            assert dot == pytest.approx(dots[k], abs=case.tolerance * scales[k] + 1e-12)


def drawn_layout(data: st.DataObject, tensor: Tensor) -> Tensor:
    """The same values with the dimensions in another order in memory."""
    order = data.draw(st.permutations(range(tensor.dim())))
    back = sorted(range(tensor.dim()), key=lambda d: order[d])
    return tensor.permute(order).contiguous().permute(back)


def test_which_parameters_are_read_by_rows() -> None:
    def diagonals(*parameters: tuple[Tensor, int]) -> list[Tensor | None]:
        table = SliceTable([[Slice(p, torch.arange(4), dim) for p, dim in parameters]])
        return table.diagonals(torch.tensor([1, 3]))

    large = torch.zeros(4, LARGE // 4)
    served = diagonals((large, 0), (large.double(), 0))
    assert [d.to_dense().shape for d in served if d is not None] == [(4, 4), (4, 4)]
    assert [d.col_indices().tolist() for d in served if d is not None] == [[1, 3], [1, 3]]
    others = [(large[:, 1:], 0), (large.T.contiguous(), 1), (large.half(), 0), (torch.ones(4), 0)]
    assert diagonals(*others) == [None, None, None]


@settings(max_examples=60)
@given(cases(), st.data())
def test_scale_multiplies_each_structure_and_nothing_else(case: Case, data: st.DataObject) -> None:
    table = case.table
    factors = [data.draw(st.sampled_from([0.0, 0.3, 1.0, -1.7])) for _ in range(table.size)]
    before = [[s.parameter.detach().clone() for s in g.slices] for g in case.groups]
    table.scale_(torch.tensor(factors, dtype=torch.float64))
    left = iter(factors)
    for group, olds in zip(case.groups, before, strict=True):
        mine = [next(left) for _ in range(group.size)]
        for share, old in zip(oracle.shares_of(group), olds, strict=True):
            expected = old.clone()
            for k, factor in enumerate(mine):
                wide = torch.promote_types(old.dtype, table.dtype)
                for place in share.places(k):
                    product = old[place].to(wide) * torch.tensor(factor, dtype=table.dtype)
                    expected[place] = product.to(old.dtype)
            assert same_bits(share.parameter, expected)


@settings(max_examples=60)
@given(cases(), st.data())
def test_scaling_some_rows_gives_the_bits_of_scaling_all(case: Case, data: st.DataObject) -> None:
    """As where parameters are large; in any layout, and whatever is in the rows beside them."""
    chosen = sorted(data.draw(st.sets(st.integers(0, case.table.size - 1))))
    factors = torch.ones(case.table.size)
    factors[chosen] = torch.tensor([data.draw(st.sampled_from([0.3, 1.0, -1.7])) for _ in chosen])
    slices = [s for group in case.groups for s in group.slices]
    for s in slices:
        s.parameter.data = drawn_layout(data, s.parameter.data)
        s.parameter.data[(0,) * s.parameter.dim()] = data.draw(
            st.sampled_from([-0.0, math.nan, math.inf, 1.0])
        )
    before = [s.parameter.data.clone() for s in slices]
    case.table.scale_(factors)
    expected = [s.parameter.data.clone() for s in slices]
    for s, value in zip(slices, before, strict=True):
        s.parameter.data = value
    with mock.patch.object(dpm_core.table, "LARGE", 0):
        table = case.table
        table.scale_(factors, table.diagonals(torch.tensor(chosen, dtype=torch.int64)))
    assert all(same_bits(s.parameter, e) for s, e in zip(slices, expected, strict=True))
    assert all(s.parameter.data_ptr() == v.data_ptr() for s, v in zip(slices, before, strict=True))


@settings(max_examples=60)
@given(cases())
def test_a_factor_of_one_leaves_every_bit(case: Case) -> None:
    for group in case.groups:
        for s in group.slices:
            flat = s.parameter.detach().view(-1)
            flat[0], flat[-1] = -0.0, torch.finfo(flat.dtype).smallest_normal / 4
    before = [bits(s.parameter) for g in case.groups for s in g.slices]
    case.table.scale_(torch.ones(case.table.size))
    after = [bits(s.parameter) for g in case.groups for s in g.slices]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@settings(max_examples=40)
@given(cases(), st.data())
def test_zero_writes_zeros_over_whole_structures_and_nothing_else(
    case: Case, data: st.DataObject
) -> None:
    table = case.table
    gone = sorted(data.draw(st.sets(st.integers(0, table.size - 1))))
    first, expected = 0, []
    for group in case.groups:
        for share in oracle.shares_of(group):
            value = share.parameter.detach().clone()
            for k in range(group.size):
                for place in share.places(k) if first + k in gone else ():
                    share.parameter.data[place] = float("nan")
                    value[place] = 0.0
            expected.append(value)
        first += group.size
    zero_(table.positions(torch.tensor(gone, dtype=torch.int64)))
    found = [s.parameter for g in case.groups for s in g.slices]
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@settings(max_examples=60)
@given(cases())
def test_a_group_gives_what_the_oracle_gives(case: Case) -> None:
    for group, tensors in zip(case.groups, case.others, strict=True):
        alone = Case([group], [tensors])
        assert group.norms().tolist() == pytest.approx(norms_by_hand(alone), rel=alone.tolerance)
        scales = zip(norms_by_hand(alone), norms_by_hand(alone, "others"), strict=True)
        triples = zip(group.dots(tensors).tolist(), dots_by_hand(alone), scales, strict=True)
        for value, expected, (a, b) in triples:
            assert value == pytest.approx(expected, abs=alone.tolerance * a * b + 1e-12)
        before = group.norms()
        group.scale_(torch.full((group.size,), 0.5))
        assert group.norms().tolist() == pytest.approx((before / 2).tolist(), rel=1e-2)


@settings(max_examples=40)
@given(cases(dtypes=[torch.float32]), st.randoms())
def test_the_order_of_groups_changes_no_bit(case: Case, random) -> None:
    """What a resumed run with groups in another order rests on."""
    order = list(range(len(case.groups)))
    random.shuffle(order)
    table = case.table
    mixed = SliceTable([case.groups[i].slices for i in order])
    others = [t for ts in case.others for t in ts]
    shuffled = [t for i in order for t in case.others[i]]
    sizes = [g.size for g in case.groups]

    for straight, moved in (
        (table.square_norms(table.parameters()), mixed.square_norms(mixed.parameters())),
        (
            table.dots(table.parameters(), table.order(others)),
            mixed.dots(mixed.parameters(), mixed.order(shuffled)),
        ),
    ):
        parts = straight.split(sizes)
        assert same_bits(torch.cat([parts[i] for i in order]), moved)


def test_two_groups_may_share_a_parameter() -> None:
    p = nn.Parameter(torch.arange(1.0, 6.0).repeat(2, 1).T.contiguous())
    groups = [
        StructureGroup("a", [Slice(p, torch.tensor([0, 4]), name="p")]),
        StructureGroup("b", [Slice(p, torch.tensor([[1, 3]]), name="p")]),
    ]
    SliceTable([g.slices for g in groups]).scale_(torch.tensor([10.0, 0.5, -1.0]))
    assert p[:, 0].tolist() == [10.0, -2.0, 3.0, -4.0, 2.5]


def test_two_groups_may_share_a_vector_on_a_gpu(cuda: torch.device) -> None:
    """There one kernel takes a list of tensors at once: each may be in it only once."""
    size = 1 << 20
    p = nn.Parameter(torch.ones(size, device=cuda))
    groups = [
        StructureGroup(name, [Slice(p, torch.arange(first, size, 2))])
        for name, first in (("even", 0), ("odd", 1))
    ]
    table = SliceTable([g.slices for g in groups])
    half = torch.full((size // 2,), 0.5, device=cuda)
    for n in range(1, 11):
        table.scale_(torch.cat([half, 2 * half]))
        assert bool((p[::2] == 0.5**n).all())
        assert bool((p[1::2] == 1).all())


def test_a_norm_in_half_precision_is_summed_in_full() -> None:
    """In float16 itself 300 squared is infinite, and in bfloat16 sums stop at 256."""
    for dtype in (torch.float16, torch.bfloat16):
        p = nn.Parameter(torch.full((1, 1000), 300.0, dtype=dtype))
        bias = nn.Parameter(torch.full((1,), 300.0, dtype=dtype))
        rows = torch.tensor([0])
        group = StructureGroup("g", [Slice(p, rows), Slice(bias, rows)])
        assert group.norms().dtype == torch.float32
        assert group.norms().item() == pytest.approx(300 * 1001**0.5, rel=1e-4)
        assert group.dots([p, bias]).item() == pytest.approx(90_000 * 1001, rel=1e-4)


def test_the_gradients_of_a_table_are_those_of_its_parameters_in_its_order() -> None:
    vector, matrix = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 3))
    matrix.grad = torch.full((2, 3), 2.0)
    rows = torch.arange(2)
    table = SliceTable([[Slice(vector, rows), Slice(matrix, rows)]])
    pairs = zip(table.parameters(), table.gradients(), strict=True)
    assert {tuple(p.shape): g is None for p, g in pairs if p is not None} == {
        (2,): True,
        (2, 3): False,
    }
    assert table.dots(table.parameters(), table.gradients()).tolist() == [6.0, 6.0]
