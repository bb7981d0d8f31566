"""What the trial of a removal notices, and how it names the cause."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.adapters.base import count_macs
from dpm_core.adapters.depgraph import (
    DepGraph,
    DepGraphOptions,
    LeftUnprunedWarning,
    structure_groups,
)
from dpm_core.third_party import dependency, graph, groups, trial
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support.structures import IMAGES, Net, assert_exact, conv, norm_between, sizes


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
