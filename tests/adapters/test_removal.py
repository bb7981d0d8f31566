"""A removal is a value: what it accepts, what it equals, what sums of it do, and how it is kept."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import AttachmentError
from dpm_core.adapters.base import AdapterError
from dpm_core.adapters.optimizer_state import CarryOverError
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import DamagedError, load_pruned, read
from dpm_core.third_party import dependency
from dpm_core.third_party.dependency import RemovalError
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support import rounding
from tests.support.frameworks import CLASSES, EXAMPLE, batch, mixed, small_resnet
from tests.support.rounding import exact_outputs, in_double
from tests.support.snapshot import assert_unchanged, difference, objects, refused, snapshot

NAMES = st.sampled_from(["a", "b", "c", "d.0"])
CHANNELS = st.sets(st.integers(0, 40), max_size=4)
REMOVALS = st.builds(Removal, st.lists(st.tuples(NAMES, CHANNELS), max_size=5))
AS: list[Any] = [
    list,
    tuple,
    iter,
    np.array,
    torch.tensor,
    lambda channels: torch.tensor(channels).short(),
    lambda channels: np.array(channels, np.uint8),
    dict.fromkeys,
    reversed,
]
"""Ways to give some channels."""

# ---------------------------------------------------------------------- what it accepts


@given(st.lists(st.tuples(NAMES, CHANNELS.filter(bool)), max_size=5), st.data())
def test_any_kind_of_channels_is_the_same_value(items, data):
    given_ = []
    for name, channels in items:
        shuffled = data.draw(st.permutations(sorted(channels)))
        given_.append((name, data.draw(st.sampled_from(AS))(shuffled)))
    removal = Removal(iter(given_))
    assert list(removal) == [(name, sorted(channels)) for name, channels in items]
    assert len(removal) == len(items)
    assert all(type(c) is int for _, channels in removal for c in channels)


ODD = st.one_of(
    st.integers(max_value=-1),
    st.booleans(),
    st.booleans().map(torch.tensor),
    st.booleans().map(np.bool_),
    st.floats(),
    st.text(),
    st.none(),
    st.fractions().filter(lambda f: f.denominator > 1),
    st.lists(st.integers(0, 9), min_size=2).map(torch.tensor),
)


@given(odd=ODD, channels=CHANNELS, name=NAMES)
def test_odd_channels_are_refused(odd, channels, name):
    with pytest.raises(AdapterError, match="channel"):
        Removal([(name, [*channels, odd])])


@given(st.lists(st.booleans(), min_size=1))
def test_a_mask_is_no_list_of_channels(mask):
    for kind in (list, torch.tensor, np.array):
        with pytest.raises(AdapterError):
            Removal([("a", kind(mask))])


@given(CHANNELS.filter(bool), st.data())
def test_a_channel_twice_is_refused(channels, data):
    twice = [*channels, data.draw(st.sampled_from(sorted(channels)))]
    with pytest.raises(AdapterError, match="once"):
        Removal([("a", twice)])


@pytest.mark.parametrize(
    "items",
    [
        *[None, 3, "ab", ["a"], {"a": [1]}, [("a",)], [("a", [1], [2])]],
        *[[("a", 1)], [("a", None)], [("a", Fraction(1))]],
        *[[(1, [2])], [(None, [2])], [(b"a", [1])], [([], [1])]],
    ],
)
def test_what_is_no_pairs_is_refused(items):
    with pytest.raises(AdapterError, match="name"):
        Removal(items)


# ---------------------------------------------------------------------- what it equals


@given(REMOVALS, REMOVALS)
def test_it_is_a_value(one, other):
    assert (one == other) == (list(one) == list(other))
    for same in (Removal(one), Removal(one.items), copy.deepcopy(one), one + Removal()):
        assert same == one == Removal() + same
        assert hash(same) == hash(one)
    again = pickle.loads(pickle.dumps(one))
    assert again == one == eval(repr(one))
    assert json.loads(json.dumps(list(one))) == [[name, channels] for name, channels in one]
    assert Removal(json.loads(json.dumps(list(one)))) == one
    assert one != list(one)
    assert bool(one) == any(channels for _, channels in one)


def test_nothing_of_it_can_be_changed():
    removal = Removal([("a", [1, 2])])
    before = hash(removal)
    with pytest.raises(AttributeError):
        removal.items = ()
    for _, channels in removal:
        channels.append(3)
    assert list(removal) == [("a", [1, 2])]
    assert hash(removal) == before


# ---------------------------------------------------------------------- sums


def parts(removal: Removal) -> list[dict[str, list[int]]]:
    return [dict(part) for part in dependency.separate(list(removal))]


@given(st.lists(REMOVALS, max_size=4))
def test_a_sum_is_its_removals_one_after_the_other(removals):
    left = right = Removal()
    for removal in removals:
        left += removal
    for removal in reversed(removals):
        right = removal + right
    assert left == right
    assert parts(left) == [part for removal in removals for part in parts(removal)]
    assert all(channels for part in parts(left) for channels in part.values())


def test_only_removals_are_added():
    for other in ([("a", [1])], (), None, 0):
        with pytest.raises(TypeError):
            Removal() + other
        with pytest.raises(TypeError):
            other + Removal()


TIED = {"stem": "s", "outer": "s", "inner": "i", "last": "l", "hidden": "h"}
"""Layers of the small ResNet, and which have their output channels in common."""
SIZES = {"s": 12, "i": 16, "l": 10, "h": 14}
DRAWN = st.dictionaries(
    st.sampled_from(sorted(TIED)), st.sets(st.integers(0, 5), min_size=1, max_size=2), min_size=1
)
"""Of what is left after two such removals there is something left."""


def left(removals: Iterable[dict[str, set[int]]]) -> dict[str, list[int]]:
    """By hand: the channels of the dense network that stay."""
    stay = {group: list(range(size)) for group, size in SIZES.items()}
    for removal in removals:
        for group, now in stay.items():
            gone = set().union(*(cs for layer, cs in removal.items() if TIED[layer] == group))
            stay[group] = [n for place, n in enumerate(now) if place not in gone]
    return stay


def cut(name: str, tensor: Tensor, stay: dict[str, list[int]]) -> Tensor:
    """By hand: what stays of a parameter, its momentum or a statistic of the small ResNet."""
    s, i, last, h = (torch.tensor(stay[group]) for group in "silh")
    flat = (last[:, None] * 36 + torch.arange(36)).flatten()
    layer, _, of = name.partition(".")
    dims: dict[str, list[Tensor | None]] = {
        "stem": [s, None],
        "norm": [s],
        "inner": [i, s],
        "inner_norm": [i],
        "outer": [s, i],
        "outer_norm": [s],
        "last": [last, s],
        "hidden": [h, flat],
        "head": [None, h],
    }
    for dim, index in enumerate(dims[layer][: tensor.dim()]):
        if index is not None and of != "num_batches_tracked":
            tensor = tensor.index_select(dim, index)
    return tensor


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, after a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    images, labels = batch(0)
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@settings(max_examples=12)
@given(first=DRAWN, second=DRAWN)
def test_the_sum_removes_what_one_after_the_other_does(first, second):
    dense = small_resnet()
    of_dense = trained(dense)
    dense_momentum = {n: of_dense.state[p]["momentum_buffer"] for n, p in dense.named_parameters()}
    one, other = Removal(first.items()), Removal(second.items())
    stay = left([first, second])
    expected = {n: cut(n, t, stay) for n, t in dense.state_dict().items()}
    for removals in ([one, other], [one + other]):
        model, optimizer = copy.deepcopy((dense, of_dense))
        for removal in removals:
            removal.apply(model, EXAMPLE, optimizer, cut=True)
        assert difference(expected, dict(model.state_dict())) is None
        for name, parameter in model.named_parameters():
            momentum = optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(momentum, cut(name, dense_momentum[name], stay))
        (group,) = optimizer.param_groups
        assert list(map(id, group["params"])) == list(map(id, model.parameters()))


# ---------------------------------------------------------------------- applied, or refused

MIXED = Removal([("stem", [1, 4, 7, 10]), ("aside", [0]), ("narrow", [2, 5]), ("hidden", [0])])


@pytest.mark.parametrize(
    ("build", "removal"),
    [(small_resnet, Removal([("stem", [0, 3]), ("inner", [2])])), (mixed, MIXED)],
)
def test_what_is_not_zero_goes_only_where_cut_says_so(build, removal):
    model = in_double(build())
    optimizer = trained(model)
    example = EXAMPLE.double()
    with refused(RemovalError, model=model, optimizer=optimizer):
        removal.apply(model, example, optimizer)
    with refused(RemovalError, model=model):
        removal.apply(model, example)
    zeroed = copy.deepcopy(model)
    dependency.set_to_zero(zeroed, example, list(removal))
    small = copy.deepcopy(zeroed)
    removal.apply(small, example)
    removal.apply(model, example, optimizer, cut=True)
    assert difference(dict(small.state_dict()), dict(model.state_dict())) is None
    rounding.assert_exact(exact_outputs(model, example), exact_outputs(zeroed, example))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())
    assert optimizer.state.keys() == set(model.parameters())


WRONG = {
    "no such layer": ("nope", [0]),
    "no layer with channels": ("norm", [0]),
    "the network itself": ("", [0]),
    "a channel too far": ("stem", [0, 12]),
    "a channel much too far": ("stem", [10**30]),
    "all of a layer": ("hidden", range(14)),
    "the outputs": ("head", [CLASSES - 1]),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["no optimizer", "optimizer"])
def test_what_the_model_has_not_is_refused_and_all_is_as_it_was(what, cut, warm):
    """Also in a later one of several removals, when the earlier ones would have succeeded."""
    model = small_resnet()
    optimizer = trained(model) if warm else None
    wrong = Removal([WRONG[what]])
    for removal in (wrong, Removal([("inner", [1])]) + wrong):
        before, same = snapshot(model, optimizer), objects(model, optimizer)
        with pytest.raises(UnsupportedLayerError):
            removal.apply(model, EXAMPLE, optimizer, cut=cut)
        assert_unchanged(before, model, optimizer)
        assert objects(model, optimizer) == same


def test_half_a_structure_is_refused():
    model = mixed()
    for removal in (Removal([("grouped", [0])]), Removal([("grouped", [0, 1])])):
        for cut in (False, True):
            with refused(UnsupportedLayerError, "whole structures", model=model):
                removal.apply(model, EXAMPLE, cut=cut)


@pytest.mark.parametrize("cut", [False, True])
def test_an_optimizer_that_cannot_go_on_is_refused_before_the_model_changes(cut):
    model = small_resnet()
    optimizer = torch.optim.LBFGS(model.parameters())
    with refused(CarryOverError, model=model, optimizer=optimizer):
        Removal([("inner", [1])]).apply(model, EXAMPLE, optimizer, cut=cut)


def test_several_optimizers_and_wrapped_ones_go_on():
    model = small_resnet()
    parts = [list(model.inner.parameters()), list(model.outer.parameters())]
    one, other = (torch.optim.Adam(part) for part in parts)
    for optimizer in (one, other):
        model(EXAMPLE).square().sum().backward()
        optimizer.step()
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=one))
    for wrong in (3, SimpleNamespace(optimizer=None), [wrapped, nn.ReLU()]):
        with refused(AttachmentError, model=model, optimizer=one):
            Removal([("inner", [1])]).apply(model, EXAMPLE, wrong, cut=True)
    Removal([("inner", [1])]).apply(model, EXAMPLE, [wrapped, other], cut=True)
    for optimizer, layer in ((one, model.inner), (other, model.outer)):
        assert optimizer.state.keys() == set(layer.parameters())
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in layer.parameters())


def test_no_removal_changes_nothing():
    model = small_resnet()
    optimizer = trained(model)
    held = list(map(id, model.parameters()))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for cut in (False, True):
        Removal([("inner", [])]).apply(model, EXAMPLE, optimizer, cut=cut)
    assert difference(before, (model.state_dict(), optimizer.state_dict())) is None
    assert list(map(id, model.parameters())) == held


# ---------------------------------------------------------------------- kept in files


@settings(max_examples=12)
@given(first=DRAWN, second=DRAWN)
def test_a_file_gives_back_removal_and_model(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("kept") / "small.safetensors"
    model = small_resnet()
    removal = Removal(first.items()) + Removal(second.items())
    removal.apply(model, EXAMPLE, cut=True)
    removal.save(path, model, {"drawn": True})
    assert Removal.load(path) == removal
    assert Removal.load(str(path)) == removal
    assert read(path).facts == {"drawn": True}
    again = load_pruned(path, small_resnet(1), EXAMPLE)
    assert difference(dict(model.state_dict()), dict(again.state_dict())) is None


def written(path: Path, tensors: dict[str, Tensor], plan: list[Any]) -> None:
    """A file as version 0.1.0 wrote it, without any of the project's code."""
    description = json.dumps({"facts": {"of": "0.1.0"}, "plan": plan, "same": {}}, sort_keys=True)
    hashed = hashlib.sha256(json.dumps(["decay-pruning model", 1, description]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hashed.update(tensor.numpy().tobytes())
    metadata = {
        "format": "decay-pruning model",
        "version": "1",
        "description": description,
        "sha256": hashed.hexdigest(),
    }
    safetensors.torch.save_file(tensors, path, metadata)


def test_files_of_version_0_1_0_are_read(tmp_path):
    removals = [{"stem": {0, 3}, "inner": {1}}, {"inner": {0}, "last": {2}, "stem": {1}}]
    stay, dense = left(removals), small_resnet()
    small = {n: cut(n, t, stay).contiguous() for n, t in dense.state_dict().items()}
    plan = [["stem", [0, 3]], ["inner", [1]], ["inner", [0]], ["last", [2]], ["stem", [1]]]
    written(tmp_path / "m", small, plan)
    found = read(tmp_path / "m")
    assert found.removal == Removal.load(tmp_path / "m") == Removal(plan)
    assert found.facts == {"of": "0.1.0"}
    model = load_pruned(tmp_path / "m", small_resnet(1), EXAMPLE)
    assert difference(small, dict(model.state_dict())) is None
    # It is written as it was then.
    found.removal.save(tmp_path / "again", model, found.facts)
    assert safetensors.torch.load((tmp_path / "again").read_bytes()).keys() == small.keys()
    assert metadata(tmp_path / "again") == metadata(tmp_path / "m")


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def test_a_file_with_an_odd_plan_is_refused(tmp_path):
    for plan in ([["stem", [-1]]], [["stem"]], [["stem", [1.5]]], "stem", [["stem", [1, 1]]]):
        written(tmp_path / "m", dict(small_resnet().state_dict()), plan)
        with pytest.raises(DamagedError):
            Removal.load(tmp_path / "m")


def test_other_things_than_a_model_and_its_example_are_refused():
    model, removal = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        Removal([("0", [1])]),
    )
    for other in (None, nn.Linear, model.state_dict()):
        with pytest.raises(AdapterError, match=r"give an nn\.Module"):
            removal.apply(other, torch.randn(3, 4), cut=True)
    for example in (None, torch.randn(3, 5), torch.zeros(3, 4).long()):
        with pytest.raises(AdapterError, match="cannot be run on the example"):
            removal.apply(model, example, cut=True)
    assert len(model[0].weight) == 8
