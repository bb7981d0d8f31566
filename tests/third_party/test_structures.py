"""Which channels go together, and which are refused.

Each network is a situation that users of pruning tools report. Expected is either that a structure
is all that its removal takes, or a refusal that names the layer.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.adapters.base import count_macs
from dpm_core.adapters.depgraph import LeftUnprunedWarning, structure_groups
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import graph
from dpm_core.third_party.groups import UnsupportedLayerError
from dpm_core.third_party.rewriting import Rewritten
from tests.support.structures import IMAGES, Net, assert_exact, conv, norm_between, sizes

# ---------------------------------------------------------------------- which go together

TOGETHER = {
    "gated halves": (lambda m, x: m.o(torch.mul(*m.a(x).chunk(2, 1))), 16, 8),
    "a sigmoid gate": (
        lambda m, x: m.o((lambda u, v: u * torch.sigmoid(v))(*m.a(x).chunk(2, 1))),
        16,
        8,
    ),
    "a gated linear unit": (lambda m, x: m.o(F.glu(m.a(x), 1)), 16, 8),
    "one by its module": (lambda m, x: m.o(nn.GLU(dim=-3)(m.a(x))), 16, 8),
    "maxout": (lambda m, x: m.o(torch.maximum(*m.a(x).chunk(2, 1))), 16, 8),
    "four parts": (lambda m, x: m.o(sum(m.a(x).chunk(4, 1))), 16, 4),
    "split": (lambda m, x: m.o(torch.add(*m.a(x).split(m.a.out_channels // 2, 1))), 16, 8),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_channels_that_meet_are_one_structure(name):
    run, channels, structures = TOGETHER[name]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(run, a=conv(3, channels), o=nn.Conv2d(structures, 3, 1))

    (group,) = structure_groups(build(), IMAGES)
    assert group.size == structures
    weight = next(s for s in group.slices if s.name == "a.weight")
    each = channels // structures
    assert weight.index.tolist() == [
        [k + structures * part for part in range(each)] for k in range(structures)
    ]
    for seed in range(3):
        assert assert_exact(build(), IMAGES, seed) % each == 0


WEIGHTED = {
    "an element each": lambda w, a, b: w[0] * a + b * w[1],
    "softmax": lambda w, a, b: torch.add(
        *(v * p for v, p in zip(w.softmax(0), (a, b), strict=True))
    ),
    "a share": lambda w, a, b: (w / w.sum())[0].mul(a).add(b),
    "unbind": lambda w, a, b: torch.lerp(a, b, w.sigmoid().unbind()[1]),
    "in place": lambda w, a, b: a.clone().mul_(w[:1]).sub_(b / (1 + w[1].exp())),
    "a sum": lambda w, a, b: (a - b) * w.sum(),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_learnt_weights_of_whole_branches_are_no_channels(name):
    def run(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        return m.o(F.relu(WEIGHTED[name](m.w, m.b(a), m.c(a))))

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {"a": conv(3, 6), "b": conv(6, 8), "c": conv(6, 8), "o": conv(8, 3)}
        return Net(run, **layers, w=nn.Parameter(torch.tensor([0.7, 0.4])))

    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftUnprunedWarning)
        found = sizes(build(), IMAGES, skip_unsupported=True)
    assert found in ({"a": 6, "b": 8}, {"a": 6, "c": 8})
    assert assert_exact(build(), IMAGES) > 0


def test_only_numbers_of_bare_parameters_lose_their_history():
    """A number that layers make leads to them, and the channels that they read."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.o(x * m.s(x.mean((2, 3))).mean() * m.w[0]) + m.v * m.a.weight.norm()

    bare = {"w": nn.Parameter(torch.tensor([0.5, 0.7])), "v": nn.Parameter(torch.ones(3, 1, 1))}
    model = Net(run, a=conv(3, 6), s=nn.Linear(6, 4), o=conv(6, 3), **bare)
    with Rewritten(model) as rewritten:
        traced = model(IMAGES)
    assert torch.equal(traced, model(IMAGES))
    assert len(rewritten.numbers) == 1
    traced.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["w"]


def test_a_block_that_both_halves_share_ties_them():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.cat([m.f(part) for part in F.relu(m.a(x)).chunk(2, 1)], 1))

    model = Net(run, a=conv(3, 16), f=nn.Conv2d(8, 6, 1), o=nn.Conv2d(12, 3, 1))
    assert sizes(model, IMAGES) == {"a": 8, "f": 6}
    assert_exact(model, IMAGES)


def test_a_linear_layer_that_is_viewed_as_maps_loses_whole_maps():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.u(F.relu(m.t(F.relu(m.l(x)).view(-1, m.t.in_channels, 4, 4))))

    up = [nn.ConvTranspose2d(8, 10, 4, 2, 1), nn.ConvTranspose2d(10, 3, 4, 2, 1)]
    model = Net(run, l=nn.Linear(6, 128), t=up[0], u=up[1])
    groups = {g.name: g for g in structure_groups(model, torch.randn(4, 6))}
    assert {n: g.size for n, g in groups.items()} == {"l": 8, "t": 10}
    weight = next(s for s in groups["l"].slices if s.name == "l.weight")
    assert weight.index.tolist() == [list(range(16 * k, 16 * k + 16)) for k in range(8)]
    assert_exact(model, torch.randn(4, 6))


def c2f() -> nn.Module:
    """Chunk, further blocks, and a concatenation of all, as in YOLOv8."""

    def run(m: Any, x: Tensor) -> Tensor:
        parts = list(m.one(F.relu(m.stem(x))).chunk(2, 1))
        for block in m.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return m.head(F.relu(m.two(torch.cat(parts, 1))))

    blocks = nn.ModuleList(nn.Sequential(conv(6, 6), nn.BatchNorm2d(6)) for _ in range(2))
    layers = {"stem": conv(3, 8), "one": nn.Conv2d(8, 12, 1), "two": nn.Conv2d(24, 8, 1)}
    return Net(run, blocks=blocks, head=nn.Conv2d(8, 5, 1), **layers)


def test_what_upstream_cannot_tell_apart_is_refused_by_name_and_the_rest_stays():
    with pytest.raises(UnsupportedLayerError, match=r"group of 'blocks\.1\.0'.*`ignored`"):
        structure_groups(c2f(), IMAGES)
    with pytest.warns(LeftUnprunedWarning, match=r"group of 'blocks\.1\.0'"):
        assert sizes(c2f(), IMAGES, skip_unsupported=True) == {"stem": 8, "two": 8}


@pytest.mark.parametrize("how", ["chunk", "slice"])
def test_halves_that_go_to_the_wrong_branch_are_refused(how):
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        half = x.shape[1] // 2
        u, v = x.chunk(2, 1) if how == "chunk" else (x[:, :half], x[:, half:])
        return m.o(torch.cat([m.p(u), m.q(v)], 1))

    layers = {"a": conv(3, 16), "p": conv(8, 6), "q": nn.Conv2d(8, 6, 1), "o": nn.Conv2d(12, 3, 1)}
    with pytest.raises(
        UnsupportedLayerError, match=r"group of 'a' (cannot be removed|gives different)"
    ):
        structure_groups(Net(run, **layers), IMAGES)


# ---------------------------------------------------------------------- exact, so not refused


def scaled() -> nn.Module:
    scale = nn.Parameter(torch.rand(1, 8, 1, 1))
    return Net(lambda m, x: m.o(m.a(x) * m.g), a=conv(3, 8), g=scale, o=nn.Conv2d(8, 3, 1))


def shifted() -> nn.Module:
    shift = nn.Parameter(torch.rand(8, 1, 1))
    return Net(lambda m, x: m.o(m.a(x) + m.g), a=conv(3, 8), g=shift, o=nn.Conv2d(8, 3, 1))


EXACT = {
    "InstanceNorm": (norm_between(nn.InstanceNorm2d(8, affine=True)), {"n.weight", "n.bias"}),
    "InstanceNorm, bare": (norm_between(nn.InstanceNorm2d(8)), set()),
    "SyncBatchNorm": (norm_between(nn.SyncBatchNorm(8)), {"n.weight", "n.bias"}),
    "a scale": (scaled(), {"g"}),
    "a shift": (shifted(), {"g"}),
    "depthwise up": (
        norm_between(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8)),
        {"n.weight", "n.bias"},
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_not_refused(name):
    model, vectors = EXACT[name]
    (group,) = structure_groups(model, IMAGES)
    assert {s.name for s in group.slices} == {"a.weight", "a.bias"} | vectors
    for seed in range(3):
        assert_exact(copy.deepcopy(model), IMAGES, seed)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"num_layers": 2}])
@pytest.mark.parametrize("read", ["outputs", "state"])
def test_a_convolution_in_front_of_a_recurrent_layer(kind, settings, read):
    def run(m: Any, x: Tensor) -> Tensor:
        out, state = m.r(F.relu(m.a(x)).transpose(1, 2))
        last = state[0] if isinstance(state, tuple) else state
        return m.o(out[:, -1] if read == "outputs" else last[-1])

    wide = 10 if settings.get("bidirectional") and read == "outputs" else 5
    recurrent = kind(8, 5, batch_first=True, **settings)
    model = Net(run, a=nn.Conv1d(3, 8, 3), r=recurrent, o=nn.Linear(wide, 4))
    assert sizes(model, torch.randn(2, 3, 9)) == {"a": 8}
    assert_exact(model, torch.randn(2, 3, 9))
    assert recurrent.input_size < 8
    assert "forward" not in vars(recurrent)


def test_a_detection_head_behind_ignored_layers():
    def run(m: Any, x: Tensor) -> Tensor:
        first = F.relu(m.b(x))
        boxes = []
        for maps in (first, F.relu(m.c(first))):
            y = m.h(F.relu(m.t(maps)))
            n, _, rows, columns = y.shape
            boxes.append(y.view(n, 2, 3, rows, columns).permute(0, 3, 4, 1, 2).reshape(n, -1, 3))
        return torch.cat(boxes, 1)

    model = Net(run, b=conv(3, 8), c=conv(8, 8), t=conv(8, 8), h=conv(8, 6))
    assert sizes(model, IMAGES, ignored=("h",)) == {"t": 8, "c": 8}
    assert sizes(model, IMAGES, ignored=[model.h]) == {"t": 8, "c": 8}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_groupnorm_loses_whole_groups(groups, affine, bias):
    norm = nn.GroupNorm(groups, 8, affine=affine)
    if not bias:
        norm.register_parameter("bias", None)
    assert sizes(norm_between(norm), IMAGES) == {"a": groups}
    assert assert_exact(norm_between(norm), IMAGES) % (8 // groups) == 0
    assert 0 < norm.num_groups < groups
    assert norm.num_channels == norm.num_groups * (8 // groups)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_a_norm_of_single_channels_loses_what_it_has(kind, bias, track):
    norm = kind(8, affine=True, track_running_stats=track)
    if not bias:
        norm.register_parameter("bias", None)
    assert sizes(norm_between(norm), IMAGES) == {"a": 8}
    assert assert_exact(norm_between(norm), IMAGES) > 0
    assert 0 < norm.num_features < 8
    own = {*norm.parameters(), norm.running_mean, norm.running_var} - {None}
    assert len(own) == 1 + bias + 2 * track
    assert {len(t) for t in own} == {norm.num_features}


def test_groups_of_a_groupnorm_tie_what_is_added_to_them_and_are_refused_across_a_seam():
    def added(m, x):
        return m.o(F.relu(m.n(m.a(x)) + m.b(x)))

    layers = {"a": conv(3, 12), "n": nn.GroupNorm(4, 12), "b": conv(3, 12), "o": conv(12, 3)}
    (group,) = structure_groups(Net(added, **layers), IMAGES)
    assert group.size == 4
    model = Net(added, **layers)
    with pytest.raises(UnsupportedLayerError, match=r"\[0\] of 'b' .*takes \[1, 2\] of the layer"):
        Removal([("b", [0])]).apply(model, IMAGES)

    def side_by_side(groups):
        def run(m, x):
            return m.o(F.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))))

        layers = {"a": conv(3, 8), "b": conv(3, 4), "o": conv(12, 3)}
        return Net(run, **layers, n=nn.GroupNorm(groups, 12))

    assert sizes(side_by_side(3), IMAGES) == {"a": 2, "b": 1}
    assert sizes(side_by_side(6), IMAGES) == {"a": 4, "b": 2}
    assert assert_exact(side_by_side(6), IMAGES) % 2 == 0
    with pytest.raises(UnsupportedLayerError, match="unequal shares"):
        sizes(side_by_side(2), IMAGES)


@pytest.mark.parametrize("places", [(1, 2, 4), (2, 2), (3, 1), (4,)])
def test_flattens_side_by_side_are_followed(places):
    """A spatial pyramid."""

    def run(m, x):
        x = F.relu(m.b(F.relu(m.a(x))))
        return m.o(torch.cat([F.adaptive_max_pool2d(x, p).flatten(1) for p in places], 1))

    width = sum(p * p for p in places)
    model = Net(run, a=conv(3, 6), b=conv(6, 8), o=nn.Linear(8 * width, 3))
    assert sizes(model, IMAGES) == {"a": 6, "b": 8}
    assert assert_exact(model, IMAGES) > 0
    assert model.o.in_features == width * model.b.out_channels


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


FLATTENED = {
    "tokens": (nn.Linear, lambda y: y.flatten(1), drawn(4, 5, 6)),
    "permuted maps": (conv, lambda y: y.permute(0, 2, 3, 1).flatten(1), drawn(4, 3, 5, 6)),
    "tokens of maps": (conv, lambda y: y.flatten(2).mT.flatten(1), drawn(4, 3, 5, 6)),
    "maps": (conv, lambda y: y.flatten(1), drawn(4, 3, 8, 8)),
    "tokens and their mean": (
        nn.Linear, lambda y: torch.cat([y.mean(1), y.flatten(1)], 1), drawn(4, 5, 6)
    ),
    "a line": (partial(nn.Conv1d, kernel_size=1), lambda y: y.flatten(1), drawn(4, 6, 5)),
    "a square line": (partial(nn.Conv1d, kernel_size=1), lambda y: y.flatten(1), drawn(4, 6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLATTENED)
def test_flattens_are_followed_wherever_the_channels_are(name):
    of, flat, example = FLATTENED[name]
    layers = {"a": of(example.shape[2 if of is nn.Linear else 1], 7), "b": of(7, 8)}
    width = flat(layers["b"](layers["a"](example))).shape[1]
    model = Net(lambda m, x: m.o(F.relu(flat(m.b(m.a(x))))), **layers, o=nn.Linear(width, 3))
    assert sizes(model, example) == {"a": 7, "b": 8}
    assert assert_exact(model, example) > 0


# ---------------------------------------------------------------------- outputs and inputs


@dataclasses.dataclass
class Out:
    logits: Tensor
    loss: float | None = None


OUTPUTS = {
    "None": lambda z: (z, None),
    "a number": lambda z: (z, 3),
    "a dictionary": lambda z: {"logits": z, "aux": None},
    "a dataclass": lambda z: Out(z),
    "a mask": lambda z: (z, z > 0),
    "deep": lambda z: [{"a": (z, "text")}, Out(z.sum(1), 2.0)],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_be_anything_that_holds_tensors(name):
    def run(m: Any, x: Tensor) -> Any:
        return OUTPUTS[name](m.o(F.relu(m.a(x)).mean((2, 3))))

    model = Net(run, a=conv(3, 8), o=nn.Linear(8, 5))
    assert sizes(model, IMAGES) == {"a": 8}
    assert_exact(model, IMAGES)


def test_inputs_may_be_several_or_by_name():
    def run(m: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        return m.o(F.relu(m.a(x)).mean((2, 3))) - (0 if y is None else y.mean())

    model = Net(run, a=conv(3, 8), o=nn.Linear(8, 5))
    for example in ((IMAGES, IMAGES), [IMAGES, IMAGES], {"x": IMAGES, "y": IMAGES}):
        assert sizes(model, example) == {"a": 8}
        assert count_macs(model, example) == count_macs(model, IMAGES)
        assert_exact(copy.deepcopy(model), example)


def test_an_example_of_one_sample_is_not_taken_apart():
    seen = []

    def run(m: Any, x: Tensor) -> Tensor:
        seen.append(x.dim())
        return m.o(F.relu(m.a(x)).mean((-2, -1)))

    assert sizes(Net(run, a=conv(3, 8), o=nn.Linear(8, 5)), IMAGES[:1]) == {"a": 8}
    assert set(seen) == {4}


@pytest.mark.parametrize("order", ["logits first", "maps first", "a view of the maps"])
def test_a_layer_whose_output_is_returned_and_used_further_is_an_output(order):
    def run(m: Any, x: Tensor) -> Any:
        maps = F.relu(m.a(x))
        logits = m.o(F.relu(m.b(maps)).mean((2, 3)))
        if order == "a view of the maps":
            return logits, maps.flatten(1)
        return (logits, maps) if order == "logits first" else (maps, logits)

    model = Net(run, a=conv(3, 8), b=conv(8, 8), o=nn.Linear(8, 5))
    assert graph.read(model, IMAGES).outputs == ["a", "o"]
    assert sizes(model, IMAGES) == {"b": 8}


def test_a_detached_output_is_refused_for_its_shape():
    def run(m: Any, x: Tensor) -> Any:
        maps = F.relu(m.a(x))
        return m.o(maps.mean((2, 3))), maps.detach()

    with pytest.raises(UnsupportedLayerError, match=r"'a'.*changes the shape of an output"):
        structure_groups(Net(run, a=conv(3, 8), o=nn.Linear(8, 5)), IMAGES)


def test_a_network_of_detached_outputs_alone_is_refused():
    model = Net(lambda m, x: m.o(x).detach(), o=conv(3, 8))
    with pytest.raises(UnsupportedLayerError, match="without detaching"):
        structure_groups(model, IMAGES)
