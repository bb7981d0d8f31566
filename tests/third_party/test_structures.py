"""Which channels go together, what is refused and why, and how a removal is checked.

Each network is a situation that users of pruning tools report. Expected is either that a structure
is all that its removal takes, or a refusal that names the layer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune

from dpm_core.adapters.base import count_macs
from dpm_core.adapters.depgraph import (
    DepGraph,
    DepGraphOptions,
    LeftUnprunedWarning,
    structure_groups,
)
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import dependency, graph, groups, running, trial, walk
from dpm_core.third_party.groups import UnsupportedLayerError
from dpm_core.third_party.rewriting import Rewritten

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Layers by name, and a forward pass that is given."""

    def __init__(self, run: Any, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(*sizes: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(*sizes, 3, padding=1, **settings)


def sizes(model: nn.Module, example: Any, **settings: Any) -> dict[str, int]:
    return {g.name: g.size for g in structure_groups(model, example, **settings)}


def assert_exact(model: nn.Module, example: Any, seed: int = 0) -> int:
    """Drawn structures are the same at zero and removed. Returns how many channels were removed."""
    draw, model = torch.Generator().manual_seed(seed), model.double().eval()
    example = running.map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)
    plan = []
    with torch.no_grad():
        for group in structure_groups(model, example):
            keep = int(torch.randint(1, group.size, (), generator=draw))
            chosen = torch.randperm(group.size, generator=draw)[keep:]
            for s in group.slices:
                s.parameter.index_fill_(s.dim, s.index[chosen].flatten(), 0)
            root = next(s for s in group.slices if s.name == f"{group.name}.weight")
            plan.append((group.name, sorted(root.index[chosen].flatten().tolist())))
        before = running.tensors(running.call(model, example))
        dependency.remove(model, example, plan)
        after = running.tensors(running.call(model, example))
    assert before
    for one, other in zip(before, after, strict=True):
        one, other = one.double(), other.double()  # masks, too
        assert (one - other).abs().max() <= 1e-10 * one.abs().max()
    return sum(len(channels) for _, channels in plan)


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


def norm_between(norm: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.o(F.relu(m.n(m.a(x)))), a=conv(3, 8), n=norm, o=nn.Conv2d(8, 3, 1))


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


# ---------------------------------------------------------------------- the trial


def flipped(first: Any = lambda x: x, last: Any = lambda y: y) -> nn.Module:
    """Channels in another order, which upstream does not follow."""

    def run(m: Any, x: Tensor) -> Tensor:
        return last(m.f(F.relu(m.a(first(x))).flip(1).flatten(1)))

    return Net(run, a=conv(3, 6), f=nn.Linear(6 * 64, 8))


REFUSED = {
    "floats": (flipped(), IMAGES),
    "bytes": (
        flipped(lambda x: x.float() / 255),
        torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8),
    ),
    "an infinite output": (
        flipped(last=lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1)),
        IMAGES,
    ),
    "draws": (flipped(last=lambda y: y + torch.randn_like(y)), IMAGES),
    "half precision": (flipped().bfloat16(), IMAGES.bfloat16()),
    "an example of zeros": (flipped(), torch.zeros(2, 3, 8, 8)),
    "a LocalResponseNorm": (norm_between(nn.LocalResponseNorm(3)), IMAGES),
    "softmax over channels": (norm_between(nn.Softmax(1)), IMAGES),
    "a sigmoid": (norm_between(nn.Sigmoid()), IMAGES),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_trial_is_not_fooled(name):
    model, example = REFUSED[name]
    with pytest.raises(UnsupportedLayerError, match="group of 'a' gives different outputs"):
        structure_groups(model, example)


class RootMean(nn.Module):
    """Divides by the root of the mean square of all channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(1, True) + 1e-5).sqrt()


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.o(F.relu(m.a(x)).flip(1).flatten(1))


CAUSES = {
    "a layer": (norm_between(nn.Sigmoid()), r"'n' \(Sigmoid\) answers zeros with more than zeros"),
    "a function": (
        Net(lambda m, x: m.o(m.a(x).sigmoid()), a=conv(3, 6), o=conv(6, 3)),
        r"something before 'o' \(Conv2d\) answers zeros",
    ),
    "in a part": (
        Net(
            lambda m, x: m.o(m.b(x)),
            b=Net(lambda m, x: m.p(m.a(x).cos()), a=conv(3, 6), p=conv(6, 6)),
            o=conv(6, 3),
        ),
        r"in the forward pass of 'b' \(Net\), something before 'b\.p' \(Conv2d\) answers zeros",
    ),
    "a mean": (norm_between(RootMean()), r"what 'n' \(RootMean\) makes of a channel depends on"),
    "other columns": (
        Net(flattened, a=conv(3, 6), o=nn.Linear(6 * 64, 8)),
        r"the graph takes other columns out of 'o' \(Linear\)",
    ),
    "a number of its own": (
        Net(
            lambda m, x: m.o(m.b(x)),
            b=Net(lambda m, x: m.a(x).reshape(-1, 6, 8, 8), a=conv(3, 6)),
            o=conv(6, 3),
        ),
        r"'b' \(Net\) cannot go on without them",
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_refusal_names_the_first_place_at_which_the_outputs_part(name):
    model, why = CAUSES[name]
    with pytest.raises(UnsupportedLayerError, match=why):
        structure_groups(model, IMAGES)


@pytest.mark.parametrize("eps", [0.1, 1e-4])
def test_a_small_mistake_is_seen_as_well_as_a_large_one(eps):
    model = Net(lambda m, x: m.o(m.a(x) + eps * m.a(x).mean(1, True)), a=conv(3, 8), o=conv(8, 3))
    with pytest.raises(UnsupportedLayerError, match="its removal changes the outputs"):
        structure_groups(model, IMAGES)


def test_a_forward_pass_that_draws_gets_the_same_draws_each_time():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(F.relu(m.a(x + 0.1 * torch.randn_like(x)))) * torch.rand(3, 1, 1)

    state = torch.get_rng_state()
    model = Net(run, a=conv(3, 8), o=conv(8, 3))
    torch.set_rng_state(state)
    assert sizes(model, IMAGES) == {"a": 8}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_of_the_channels_shape_is_named():
    model = Net(lambda m, x: m.o(m.a(x) + torch.randn_like(m.a(x))), a=conv(3, 8), o=conv(8, 3))
    with pytest.raises(UnsupportedLayerError, match="draws random numbers by its channels"):
        structure_groups(model, IMAGES)


def test_subsets_take_unequal_shares_of_halves_and_thirds():
    draw = torch.Generator().manual_seed(0)
    for count in range(2, 40):
        for subset in trial._SUBSETS:
            chosen = subset(count, draw)
            assert 0 < len(set(chosen)) == len(chosen) < count
            assert set(chosen) <= set(range(count))
    for count in (8, 12, 16, 64):
        for parts in (2, 3, 4):
            uneven = 0
            for subset in trial._SUBSETS:
                in_part = [k * parts // count for k in subset(count, draw)]
                uneven += len({in_part.count(p) for p in range(parts)}) > 1
            assert uneven >= 2


def test_culprits_are_searched_by_halving():
    """One of 16 layers is at fault: it takes a few passes to find out which, not 16."""

    def run(m: Any, x: Tensor) -> Tensor:
        for i, layer in enumerate(m.layers):
            x = layer(x)
            x = torch.sigmoid(x) if i == 11 else torch.relu(x)
        return m.o(x)

    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(16))
    model, example = Net(run, layers=layers, o=nn.Linear(6, 3)), torch.randn(3, 6)
    groups, tried = graph.read(model, example).groups, []
    assert len(groups) == 16
    assert set(trial.inexact(model, example, groups, tried.append)) == {"layers.11"}
    assert len(tried) <= 1 + 2 * 4 + 1


def test_nothing_hangs():
    """Keys and values that several queries share: upstream's walk over the channels never ends.

    Here the numbers of heads are written into the forward pass, so that none can go.
    """

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = (
            layer(x).view(b, n, 2, 4).transpose(1, 2)[:, :, None].expand(b, 2, 2, n, 4)
            for layer in (m.k, m.v)
        )
        y = F.scaled_dot_product_attention(q, k.reshape(b, 4, n, 4), v.reshape(b, 4, n, 4))
        return m.h(m.g(F.relu(m.f(x + m.o(y.transpose(1, 2).reshape(b, n, 16))))))

    layers = {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8), "v": nn.Linear(16, 8)}
    layers |= {"o": nn.Linear(16, 16), "f": nn.Linear(16, 12), "g": nn.Linear(12, 16)}
    model = Net(run, h=nn.Linear(16, 3), **layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sizes(model, torch.randn(2, 5, 16), skip_unsupported=True) == {"g": 16, "f": 12}
    (said,) = [str(w.message) for w in caught if w.category is LeftUnprunedWarning]
    assert "group of 'v'" in said
    assert "layers of its heads: v, k, q" in said or "layers of its heads: k, q, v" in said


def in_pieces(parts: list[int], width: int) -> nn.Module:
    """Residual blocks whose sums are taken in two parts each, the first so many channels wide."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for layer, k in zip(m.layers, parts, strict=True):
            y = F.relu(layer(x))
            x = torch.cat([x[:, :k] + y[:, :k], x[:, k:] + y[:, k:]], 1)
        return m.o(x)

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in parts)
    return Net(run, first=nn.Conv2d(3, width, 1), layers=layers, o=nn.Conv2d(width, 3, 1))


def test_a_walk_takes_no_path_twice(monkeypatch):
    """Each block splits what comes along in another place, so that there are ever more parts."""
    parts, width = [1 + 5 * k % 15 for k in range(40)], 16
    model, steps, mapped = in_pieces(parts, width).eval(), [], walk._mapped
    built = graph.build(model, IMAGES)
    monkeypatch.setattr(walk, "_mapped", lambda *of: steps.append(of) or mapped(*of))
    with graph.upstream(model):
        group = graph.whole(built, model.first, range(width))
    assert len(steps) <= width * built.edges
    for layer in (model.first, *model.layers):
        (met,) = (m for (n, f), m in group.met.items() if n.module is layer and "out" in f.__name__)
        assert sorted(zip(*(t.tolist() for t in met), strict=True)) == [
            (k, k) for k in range(width)
        ]


@pytest.mark.parametrize("parts", [[3], [3, 5], [1, 7, 4]])
def test_sums_in_parts_tie_the_channels_that_meet_in_them(parts):
    assert list(sizes(in_pieces(parts, 8), IMAGES).values()) == [8]
    assert_exact(in_pieces(parts, 8), IMAGES)


def test_a_residual_to_some_of_the_channels_ties_no_others():
    """Upstream takes a slice that is concatenated for as wide as what it is taken from."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = m.b(F.relu(m.h(x)))
        return m.o(torch.cat([y[:, :8] + x, y[:, 8:]], 1))

    layers = {"a": conv(3, 8), "h": conv(8, 6), "b": conv(6, 13), "o": conv(13, 3)}
    model = Net(run, **layers)
    with pytest.raises(UnsupportedLayerError, match="'b' gives its structures unequal shares"):
        sizes(model, IMAGES)
    assert sizes(model, IMAGES, ignored=["b"]) == {"h": 6}
    with graph.upstream(model):
        built = graph.build(model, IMAGES)
        group = graph.whole(built, model.b, range(13))
    (met,) = (m for (n, f), m in group.met.items() if n.module is model.a and "out" in f.__name__)
    assert [t.tolist() for t in met] == [list(range(8))] * 2


# ---------------------------------------------------------------------- refusals


WRAPPED = {
    "parametrizations.weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "parametrizations.spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), r"prune\.remove"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", WRAPPED)
def test_weights_that_are_worked_out_are_refused_with_the_remedy(name):
    wrap, remedy = WRAPPED[name]
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedLayerError, match=f"'0'.*{remedy}"):
        structure_groups(model, torch.randn(2, 4))


def test_the_cause_is_named_where_it_is_a_norm_over_channels_and_not_elsewhere():
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(GroupNorm\), whose mean and variance"):
        structure_groups(norm_between(nn.GroupNorm(1, 8)), IMAGES)
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(BatchNorm2d\), which has no weight"):
        structure_groups(norm_between(nn.BatchNorm2d(8, affine=False)), IMAGES)
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(InstanceNorm2d\), which has no weight"):
        structure_groups(norm_between(nn.InstanceNorm2d(8, track_running_stats=True)), IMAGES)
    for other in (nn.Sigmoid(), nn.LocalResponseNorm(3)):
        with pytest.raises(UnsupportedLayerError) as caught:
            structure_groups(norm_between(other), IMAGES)
        assert "mean and variance" not in str(caught.value)


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


def test_unknown_layers_in_ignored_are_refused():
    model = norm_between(nn.ReLU())
    for ignored in (("typo",), (nn.Linear(2, 2),), (3,)):
        with pytest.raises(UnsupportedLayerError, match="no layer of the model"):
            structure_groups(model, IMAGES, ignored)


def test_reading_leaves_the_model_as_it_was():
    model = norm_between(nn.BatchNorm2d(8)).train()
    model.a.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    structure_groups(model, IMAGES)
    assert model.training
    assert model.n.training
    assert not model.a.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------- removals


def bits(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


def grouped() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(F.relu(m.g(F.relu(m.a(x)))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 32, 1), g=conv(32, 32, groups=4), o=nn.Linear(32, 10))


PLANS = {
    "not whole structures": ([("a", [1, 2])], "go together with others.*takes.*along"),
    "beyond the layer": ([("a", [40])], "has channels 0 to 31"),
    "twice the same": ([("a", [1, 1])], "names one twice"),
    "no such layer": ([("b", [1])], "'b' is no convolution or linear layer"),
    "not at zero": ([("a", [0, 8, 16, 24])], "changes the outputs by"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_removal_that_is_refused_leaves_the_model_as_it_was(name):
    plan, message = PLANS[name]
    model = grouped()
    before = bits(model)
    with pytest.raises(UnsupportedLayerError, match=message):
        dependency.remove(model, IMAGES, plan)
    assert_untouched(model, before)
    assert [model.a.out_channels, model.g.in_channels, model.g.groups] == [32, 32, 4]


def test_what_fails_half_way_is_put_back(monkeypatch):
    model = grouped()
    before = bits(model)
    prune_linear = graph.tp.pruner.function.LinearPruner.prune_in_channels

    def fail(self: Any, layer: nn.Module, idxs: Any) -> None:
        prune_linear(self, layer, idxs)
        raise MemoryError("no more")

    plan = [("g", [0, 8, 16, 24])]
    dependency.set_to_zero(model, IMAGES, plan)
    before = bits(model)
    monkeypatch.setattr(graph.tp.pruner.function.LinearPruner, "prune_in_channels", fail)
    with pytest.raises((MemoryError, UnsupportedLayerError), match="no more"):
        dependency.take_out(model, IMAGES, plan)
    assert_untouched(model, before)


def test_frozen_layers_beside_the_removed_ones_stay_frozen():
    model = grouped()
    model.o.requires_grad_(False)
    plan = [("g", [0, 8, 16, 24])]
    dependency.set_to_zero(model, IMAGES, plan)
    dependency.remove(model, IMAGES, plan)
    assert model.o.weight.shape == (10, 28)
    assert not model.o.weight.requires_grad
    assert model.g.weight.requires_grad


def test_weights_that_are_kept_elsewhere_are_noticed_at_the_removal():
    """An averaging optimizer shows other weights in evaluation than those that were zeroed."""
    model, plan = norm_between(nn.ReLU()), [("a", [0, 1])]
    average = copy.deepcopy(model)
    dependency.set_to_zero(model, IMAGES, plan)
    with torch.no_grad():
        for ours, other in zip(average.parameters(), model.parameters(), strict=True):
            ours.lerp_(other, 0.9)
    with pytest.raises(UnsupportedLayerError, match="averaging or schedule-free optimizer"):
        dependency.remove(average, IMAGES, plan)
    dependency.remove(model, IMAGES, plan)


def test_rebuilding_needs_no_zeros_and_refuses_what_is_not_exact():
    model = norm_between(nn.ReLU())
    dependency.cut(model, IMAGES, [("a", [0, 1]), ("a", [0])])
    assert model.a.out_channels == 5
    odd = norm_between(nn.Sigmoid())
    before = bits(odd)
    with pytest.raises(UnsupportedLayerError, match="changes the outputs"):
        dependency.cut(odd, IMAGES, [("a", [0, 1])])
    assert_untouched(odd, before)


# ---------------------------------------------------------------------- what examples do not show


def two_layers(run: Any) -> nn.Module:
    return Net(run, a=conv(3, 8), b=conv(8, 8), o=nn.Linear(8, 5))


def hidden(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    maps = F.relu(m.a(x))
    return maps, m.o(F.relu(m.b(maps)).mean((2, 3)))


OTHER_KINDS = {
    "indices": lambda m, x: (lambda maps, y: (y, maps.argmax(1)))(*hidden(m, x)),
    "arrays": lambda m, x: (lambda maps, y: (y, maps.detach().numpy()))(*hidden(m, x)),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_outputs_that_are_no_floating_tensors_are_compared_as_well(name):
    with pytest.raises(UnsupportedLayerError, match=r"group of 'a'.*changes (an|the shape)"):
        structure_groups(two_layers(OTHER_KINDS[name]), IMAGES)


def test_a_part_that_is_switched_off_is_not_accepted_in_silence():
    def run(m: Any, x: Tensor) -> Tensor:
        maps = F.relu(m.a(x))
        return m.o(maps.mean((2, 3))) + m.alpha * m.f(maps.permute(0, 2, 3, 1).flatten(1))

    model = Net(run, a=conv(3, 6), o=nn.Linear(6, 5), f=nn.Linear(6 * 64, 5))
    model.alpha = 0.0
    with pytest.raises(UnsupportedLayerError, match=r"cannot be checked: 'f'.*changes no output"):
        structure_groups(model, IMAGES)


def test_a_head_that_only_training_runs_is_noticed():
    def run(m: Any, x: Tensor) -> Any:
        maps, y = hidden(m, x)
        return (y, m.aux(maps.mean((2, 3)))) if m.training else y

    model = Net(run, a=conv(3, 8), b=conv(8, 8), o=nn.Linear(8, 5), aux=nn.Linear(8, 5))
    why = r"group of 'a' cannot be removed.*, in training mode: 'aux' \(Linear\) cannot go on"
    with pytest.raises(UnsupportedLayerError, match=why):
        structure_groups(model, IMAGES)
    with pytest.warns(LeftUnprunedWarning, match="'aux' has no part in the outputs"):
        assert sizes(model, IMAGES, ignored=("a",)) == {"b": 8}


WRITING = {
    "relu": lambda x: nn.ReLU(True)(x),
    "a function": F.leaky_relu_,
    "a product": lambda x: x.mul_(1.5),
    "some samples": lambda x: (x[1:].mul_(2.0), x)[1],
    "a reshape": lambda x: x.view(-1, x.shape[-1]).clamp_(-1.0).view_as(x),
}
"""What writes into its argument, in the place of a layer's output or into some of it."""


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (3, 2, 4, 6)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("writes", WRITING)
def test_what_is_written_into_a_layers_output_does_not_hide_the_layer(writes, shape):
    """In a sequence the output of a linear layer is a view, in some releases of PyTorch."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = WRITING[writes](m.b(WRITING[writes](m.a(x))))
        return m.o(x)

    torch.manual_seed(0)
    model = Net(run, a=nn.Linear(6, 9), b=nn.Linear(9, 7), o=nn.Linear(7, 5))
    example = torch.randn(shape)
    assert sizes(model, example) == {"a": 9, "b": 7}
    assert assert_exact(model, example) >= 2


def test_a_layer_whose_output_is_used_behind_its_back_is_named():
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept.detach()

    def run(m: Any, x: Tensor) -> Tensor:
        m.k(x)
        return m.o(m.a(x).relu()) + m.p(m.k.kept.relu())

    made = {"k": Keeping(6, 8), "a": nn.Linear(6, 9), "p": nn.Linear(8, 5), "o": nn.Linear(9, 5)}
    model = Net(run, **made)
    with pytest.warns(LeftUnprunedWarning, match="'k' runs, but autograd's graph does not show"):
        assert sizes(model, torch.randn(3, 6), skip_unsupported=True) == {"a": 9}


def test_inference_mode_is_named_as_what_keeps_channels_from_being_traced():
    model = two_layers(lambda m, x: hidden(m, x)[1])
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedLayerError, match=r"inference_mode.*outside"),
    ):
        structure_groups(model, IMAGES)


def test_a_model_that_answers_alike_never_is_refused_for_that():
    def run(m: Any, x: Tensor) -> Tensor:
        m.calls.append(1)
        return hidden(m, x)[1] * len(m.calls)

    model = two_layers(run)
    model.calls = type("Calls", (list,), {})()  # not a plain list: it is not put back
    with pytest.raises(UnsupportedLayerError, match="not the same from pass to pass"):
        structure_groups(model, IMAGES)


def test_what_a_pass_leaves_in_the_model_does_no_harm_and_is_put_back():
    def run(m: Any, x: Tensor) -> Tensor:
        maps, y = hidden(m, x)
        m.last, m.count = maps, m.count + 1
        m.queue.copy_(m.queue.roll(1)).add_(1)
        return y + torch.rand(5, generator=m.generator)

    model = two_layers(run)
    model.register_buffer("queue", torch.zeros(4))
    model.count, model.generator = 0, torch.Generator().manual_seed(3)
    state = model.generator.get_state()
    model.last = model.a(IMAGES)  # as after a training step, with its history
    assert sizes(model, IMAGES) == {"a": 8, "b": 8}
    count_macs(model, IMAGES)
    plan = [("a", [0, 3])]
    dependency.set_to_zero(model, IMAGES, plan)
    dependency.remove(model, IMAGES, plan)
    assert model.count == 0
    assert torch.equal(model.queue, torch.zeros(4))
    assert torch.equal(model.generator.get_state(), state)
    assert model.a.out_channels == 6


def test_an_example_whose_rows_are_no_samples_is_taken_whole():
    def run(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        nodes = F.relu(m.a(x))
        return m.o(nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]))

    model = Net(run, a=nn.Linear(3, 8), o=nn.Linear(8, 2))
    example = torch.randn(6, 3), torch.tensor([[0, 1, 5, 4], [1, 2, 3, 5]])
    assert sizes(model, example) == {"a": 8}
    assert count_macs(model, example) == 6 * (3 * 8 + 8 * 2)


def test_one_channel_that_gates_all_is_named():
    def run(m: Any, x: Tensor) -> Tensor:
        maps = F.relu(m.a(x))
        return m.o((maps * torch.sigmoid(m.g(maps))).mean((2, 3)))

    model = Net(run, a=conv(3, 16), g=nn.Conv2d(16, 1, 1), o=nn.Linear(16, 5))
    why = "ties 16 channels of 'a' to 1, as where one channel is multiplied with all"
    with pytest.raises(UnsupportedLayerError, match=why):
        structure_groups(model, IMAGES)


@pytest.mark.parametrize("halves", [True, False])
def test_a_gate_that_mixes_positions_is_named_with_its_size(halves):
    def run(m: Any, x: Tensor) -> Tensor:
        u, v = m.a(x).chunk(2, -1) if halves else [m.a(x)] * 2
        return m.o(F.gelu(u) * m.g(v.transpose(1, 2)).transpose(1, 2)).mean(1)

    layers = {"a": nn.Linear(4, 24), "g": nn.Linear(6, 6), "o": nn.Linear(12 if halves else 24, 3)}
    why = (
        "ties 24 channels of 'a' to 6: 'g' has 6 (in|out)puts, not "
        f"{12 if halves else 24}, so what it mixes lies along another axis"
    )
    with pytest.raises(UnsupportedLayerError, match=why):
        structure_groups(Net(run, **layers), torch.randn(2, 6, 4))


def test_parts_of_a_split_that_go_unlike_ways_are_named_with_their_layer():
    def run(m: Any, x: Tensor) -> Tensor:
        g, i, c = m.a(x).split([12, 8, 4], 1)
        return m.o(F.gelu(g) * torch.cat([i, m.d(c)], 1))

    layers = {"a": conv(3, 24), "d": conv(4, 4, groups=4), "o": conv(12, 3)}
    with pytest.raises(
        UnsupportedLayerError, match=r"ties 24 channels of 'a' to 8: .*unequal parts"
    ):
        structure_groups(Net(run, **layers), IMAGES)


def test_one_channel_in_each_part_of_a_layer_is_the_reason_for_one_structure():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 12, groups=6), nn.ReLU(), conv(12, 3))
    options = DepGraphOptions(ratio=0.5, skip_unsupported=True)
    why = r"'0' is one structure: its 6 channels .* 6 parts of '2' \(Conv2d\) has one of its inputs"
    assert re.search(why, DepGraph(model, IMAGES, options).skipped["0"])


def test_layers_without_a_shape_yet_are_refused():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedLayerError, match=r"'0\.weight' has no shape yet"):
        structure_groups(model, torch.randn(2, 4))


def test_what_a_removal_would_refuse_is_refused_by_the_trial_of_any_frameworks_groups():
    model = Net(
        lambda self, x: self.b(torch.relu(self.norm(self.a(x)))),
        a=conv(3, 6),
        norm=nn.BatchNorm2d(6, affine=False),
        b=conv(6, 2),
    )
    own = [[k] for k in range(6)]
    shares = [groups.Share(f"a.{n}", p, 0, False, own) for n, p in model.a.named_parameters()]
    (why,) = trial.inexact(model, IMAGES, [groups.UpstreamGroup("a", own, shares=shares)]).values()
    assert "cannot be removed: involves 'norm'" in why

    model = Net(lambda self, x: self.b(torch.relu(self.a(x))), a=conv(3, 6), b=conv(6, 4, groups=2))
    shares = [groups.Share(f"a.{n}", p, 0, False, own) for n, p in model.a.named_parameters()]
    (why,) = trial.inexact(model, IMAGES, [groups.UpstreamGroup("a", own, shares=shares)]).values()
    assert "cannot be removed in these structures: its channels [0, 3] only go together" in why


class Refined(nn.Module):
    """Layers that run again and again on what they have made, beside inputs that nothing has."""

    def __init__(self, times: int, known: bool) -> None:
        super().__init__()
        self.times, self.known, extra = times, known, 2 if known else 3
        self.first = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU())
        self.gates, self.state = conv(12 + extra, 12), conv(12 + extra, 6)
        self.flow = nn.Sequential(conv(6, 5), nn.ReLU(), conv(5, 2))

    def forward(self, x: Tensor) -> Any:
        context = self.first(x)
        h, flow = torch.tanh(context), torch.zeros_like(x[:, :2])
        ahead, out = [] if self.known else [x[:, :1]], []
        for _ in range(self.times):
            z, r = torch.sigmoid(self.gates(torch.cat([*ahead, h, context, flow], 1))).chunk(2, 1)
            new = torch.tanh(self.state(torch.cat([*ahead, r * h, context, flow], 1)))
            h = (1 - z) * h + z * new
            flow = flow + self.flow(h)
            out.append(flow)
        return out


@pytest.mark.parametrize("known", [True, False])
def test_a_walk_over_layers_that_run_often_takes_as_long_as_the_graph_is(known, monkeypatch):
    steps, mapped = [], walk._mapped
    monkeypatch.setattr(walk, "_mapped", lambda *of: steps.append(of) or mapped(*of))
    for times in (2, 12):
        model = Refined(times, known).eval()
        built = graph.build(model, IMAGES)
        for layer in (model.gates, model.state, model.first[0]):
            steps.clear()
            with walk.installed(), contextlib.suppress(walk.EndlessWalkError):
                graph.whole(built, layer, range(layer.out_channels))
            assert 0 < len(steps) <= 4 * built.edges


@pytest.mark.parametrize("times", [1, 3])
def test_layers_that_run_often_beside_constants_lose_channels_exactly(times):
    assert assert_exact(Refined(times, True), IMAGES) > 1


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_parts_of_a_concatenation_that_no_layer_has_made_shift_the_others(data):
    """Coordinates, or the input itself, anywhere among parts of drawn widths."""
    widths = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3), "widths")
    place = data.draw(st.integers(0, len(widths)), "place")
    flat = data.draw(st.booleans(), "flat")

    def run(m: Any, x: Tensor) -> Tensor:
        made = [torch.relu(layer(x)) for layer in m.parts]
        parts = [*made[:place], x, *made[place:]]
        return m.o(torch.relu(m.f(torch.cat(parts, -1 if flat else 1))))

    layer = nn.Linear if flat else conv
    parts = nn.ModuleList(layer(3, w) for w in widths)
    model = Net(run, parts=parts, f=layer(sum(widths) + 3, 4), o=layer(4, 2))
    example = IMAGES.movedim(1, -1).flatten(1, 2) if flat else IMAGES
    found = sizes(model, example)
    assert found == {f"parts.{k}": w for k, w in enumerate(widths)} | {"f": 4}
    assert assert_exact(model, example) >= len(widths)


def test_a_part_of_a_split_goes_back_to_its_own_place():
    def run(m: Any, x: Tensor) -> Tensor:
        one, other = m.a(x).split([4, 2], 1)
        return m.o(torch.relu(m.f(torch.cat([other, one], 1)) + m.b(x)))

    model = Net(run, a=conv(3, 6), f=nn.Conv2d(6, 6, 1, groups=6), b=conv(3, 6), o=conv(6, 2))
    built = graph.build(model, IMAGES)
    with walk.installed():
        met = graph.whole(built, model.b, range(6)).met
    (there,) = (
        pairs for (n, f), pairs in met.items() if n.module is model.a and "out" in f.__name__
    )
    places = dict(zip(*(t.tolist() for t in there), strict=True))
    assert places == {4: 0, 5: 1, 0: 2, 1: 3, 2: 4, 3: 5}


CUTS = {
    "the end": lambda x: x[:, :, :-2],
    "every other": lambda x: x[..., ::2],
    "narrowed": lambda x: x.narrow(-1, 1, 5),
    "twice": lambda x: x[..., 1:][..., :-1],
}


@pytest.mark.parametrize("name", CUTS)
def test_slices_along_time_leave_the_channels_alone(name):
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.relu(m.b(CUTS[name](torch.relu(m.a(x))))).mean(-1))

    model = Net(run, a=nn.Conv1d(3, 9, 3, padding=2), b=nn.Conv1d(9, 7, 3), o=nn.Linear(7, 3))
    example = torch.randn(4, 3, 12)
    assert sizes(model, example) == {"a": 9, "b": 7}
    assert assert_exact(model, example) > 1
