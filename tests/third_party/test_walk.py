"""The walk from layer to layer: it takes no path twice, and no channels for others."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.third_party import graph, maps, tracing, trial, walk
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support.structures import IMAGES, Net, assert_exact, conv, sizes


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
    model, steps, mapped = in_pieces(parts, width).eval(), [], maps.mapped
    built = tracing.build(model, IMAGES)
    monkeypatch.setattr(maps, "mapped", lambda *of: steps.append(of) or mapped(*of))
    with tracing.upstream(model):
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
    with tracing.upstream(model):
        built = tracing.build(model, IMAGES)
        group = graph.whole(built, model.b, range(13))
    (met,) = (m for (n, f), m in group.met.items() if n.module is model.a and "out" in f.__name__)
    assert [t.tolist() for t in met] == [list(range(8))] * 2


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
    steps, mapped = [], maps.mapped
    monkeypatch.setattr(maps, "mapped", lambda *of: steps.append(of) or mapped(*of))
    for times in (2, 12):
        model = Refined(times, known).eval()
        built = tracing.build(model, IMAGES)
        for layer in (model.gates, model.state, model.first[0]):
            steps.clear()
            with walk.installed(), contextlib.suppress(walk.EndlessWalkError):
                graph.whole(built, layer, range(layer.out_channels))
            assert 0 < len(steps) <= 4 * built.edges


class Turned(nn.Module):
    """Attention over tokens whose queries and keys are turned by their places, and hidden units.

    In the graph the biases that are concatenated, and the halves that change places, are channels
    that come round again, further on each time.
    """

    def __init__(self, width: int, heads: int, prefix: int) -> None:
        super().__init__()
        self.heads, self.prefix = heads, prefix
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def turned(self, x: Tensor) -> Tensor:
        left, x = x[:, :, : self.prefix], x[:, :, self.prefix :]
        angles = torch.arange(x.shape[2] * x.shape[3]).view(x.shape[2:]).to(x)
        a, b = x.chunk(2, -1)
        x = x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()
        return torch.cat([left, x], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        n, tokens, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        parts = F.linear(self.norm(x), self.qkv.weight, bias).view(n, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.turned(q), self.turned(k)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(seen)
        return self.head(x + self.down(F.gelu(self.up(x))))


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(0, 3), st.integers(4, 20), st.data()
)
def test_a_walk_that_goes_round_and_further_on_ends_where_no_layer_is(size, heads, prefix, more, d):
    """A bound on steps alone lets it run for minutes, ever slower."""
    width, example = size * heads, torch.randn(2, prefix + more, 3)
    blocks = d.draw(st.integers(1, 2), "blocks")
    parts = [p for _ in range(blocks) for p in (nn.Linear(3, width), Turned(width, heads, prefix))]
    model = nn.Sequential(*parts, nn.Linear(3, 3)).eval()
    built, steps, mapped = tracing.build(model, example), [], maps.mapped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "mapped", lambda *of: steps.append(of) or mapped(*of))
        for layer in (m for m in built.module2node if isinstance(m, nn.Linear)):
            steps.clear()
            with walk.installed(), contextlib.suppress(walk.EndlessWalkError):
                graph.whole(built, layer, range(layer.out_features))
            assert len(steps) <= 8 * built.edges
    hidden = {name for name, _ in model.named_modules() if name.endswith("up")}
    found, _ = trial.exact_groups(model, example, skip_unsupported=True)
    assert {g.root for g in found.groups} >= hidden


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
    built = tracing.build(model, IMAGES)
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
