"""Outputs of two passes are the same to rounding, or they are not, whatever else is in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.adapters.depgraph import structure_groups
from dpm_core.third_party import comparing, dependency, running, trial, trial_values
from dpm_core.third_party.groups import UnsupportedLayerError

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
SOME = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LARGEST = torch.finfo(torch.float32).min


class Net(nn.Module):
    """Two convolutions and two linear layers; what lies between them is given, and what is last."""

    def __init__(self, between: Any, last: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.f, self.o = nn.Linear(5 * 4, 6), nn.Linear(6, 4)
        self.between, self.last = between, last

    def forward(self, x: Tensor) -> Any:
        x = self.between(self, F.relu(self.b(F.relu(self.a(x)))))
        return self.last(self.o(F.relu(self.f(x))))


def masked(y: Tensor, by: float) -> Tensor:
    return y.masked_fill(torch.tensor([False, True, False, True]), by)


def beside(y: Tensor, constant: float) -> Tensor:
    return torch.cat([y, torch.full((len(y), 1), constant).to(y)], 1)


def added(y: Tensor, constant: float) -> Tensor:
    return y + torch.tensor([0.0, constant, 0.0, 0.0]).to(y)


class Columns(nn.Module):
    """A layer's outputs, each times a number of its own, and one more added."""

    def __init__(self, layer: nn.Module, scales: Tensor, constants: Tensor) -> None:
        super().__init__()
        self.layer, self.scales, self.constants = layer, scales, constants

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scales.to(x) + self.constants.to(x)


LAST = {
    "filled": masked,
    "added to a column": added,
    "added": lambda y, c: y + c,
    "beside": beside,
    "in another output": lambda y, c: (y, torch.tensor([c])),
    "with what varies as much": lambda y, c: torch.cat([y, y[:, :2] * c], 1),
    "added and taken away": lambda y, c: torch.cat([y, (y + c) - c], 1),
    "infinite": lambda y, c: masked(added(y, c), -torch.inf),
}
CONSTANTS = [1.0, -1e4, 5e8, -1e9, 1.76e9, 1e11]
BETWEEN = {
    "same": lambda m, x: x.flatten(1),
    "other columns": lambda m, x: x.flip(1).flatten(1),
    "more than zeros": lambda m, x: torch.sigmoid(x).flatten(1),
}


def draw_last(data: Any) -> Any:
    name = data.draw(st.sampled_from(sorted(LAST)), "last")
    constants = [*CONSTANTS, LARGEST] if name in ("filled", "beside") else CONSTANTS
    constant = data.draw(st.sampled_from(constants), "constant")
    return lambda y: LAST[name](y, constant)


@SOME
@given(st.data())
def test_no_constant_in_the_outputs_hides_a_difference_or_is_one(data):
    last = draw_last(data)
    between = data.draw(st.sampled_from(sorted(BETWEEN)), "between")
    model = Net(BETWEEN[between], last)
    if between == "same":
        assert {g.name for g in structure_groups(model, IMAGES)} == {"a", "b", "f"}
    else:
        with pytest.raises(UnsupportedLayerError, match="'b' gives different outputs"):
            structure_groups(model, IMAGES)
        assert {g.name for g in structure_groups(model, IMAGES, ("b",))} == {"a", "f"}


@SOME
@given(st.data())
def test_no_constant_in_the_outputs_hides_a_difference_at_the_removal(data):
    model, channels = Net(BETWEEN["same"], draw_last(data)), [1, 4]
    zeros = data.draw(st.booleans(), "zeros")
    if zeros:
        dependency.set_to_zero(model, IMAGES, [("b", channels)])
        dependency.remove(model, IMAGES, [("b", channels)])
        assert model.b.out_channels == 3
    else:
        with pytest.raises(
            dependency.RemovalError, match=r"changes the outputs by \de[+-]0[0-4] of"
        ):
            dependency.remove(model, IMAGES, [("b", channels)])


@SOME
@given(st.integers(0, 9999), st.booleans())
def test_outputs_that_a_relu_holds_at_zero_are_no_reason(seed, pooled):
    """They may vary where channels are zero, and then be rounded."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 3)]
    last = [nn.ReLU(), nn.AdaptiveAvgPool2d(1)] if pooled else [nn.ReLU()]
    model = nn.Sequential(*layers, *last, nn.Flatten())
    assert {g.name for g in structure_groups(model, IMAGES)} == {"0", "2"}


TAILS = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda y: y.softmax(1),
    "gelu": F.gelu,
    "silu": F.silu,
    "bell": lambda y: torch.exp(-y * y),
    "exponential": torch.exp,
}


@pytest.mark.parametrize("tail", TAILS)
@SOME
@given(st.sampled_from([1.0, 3.0, 10.0, 30.0]), st.sampled_from(["same", "other columns"]))
def test_outputs_that_are_next_to_nothing_until_channels_are_zero_are_no_reason(
    tail, gain, between
):
    """In a tail, as most of a softmax's outputs are, rounding does less than elsewhere."""
    model = Net(BETWEEN[between], lambda y: TAILS[tail](gain * y))
    if between == "same":
        assert {g.name for g in structure_groups(model, IMAGES)} == {"a", "b", "f"}
    else:
        with pytest.raises(UnsupportedLayerError, match="gives different outputs"):
            structure_groups(model, IMAGES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@SOME
@given(st.data())
def test_a_difference_is_seen_in_each_element_by_itself(dtype, data):
    """What depends on parameters is of a drawn size in each column, and so is what is constant."""
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9999), "seed"))
    scales = 10.0 ** torch.randint(-6, 7, (12,), generator=draw)
    most = 1e-4 / torch.finfo(dtype).eps
    constants = scales * most * 10.0 ** -torch.randint(9, (12,), generator=draw)
    constants = torch.where(torch.rand(12, generator=draw) < 0.5, 0.0, constants)
    weight, x = (torch.randn(n, 7, generator=draw).to(dtype) for n in (12, 3))

    model = Columns(nn.Linear(7, 12), scales, constants).to(dtype)
    model.layer.weight.data = weight
    dense = running.outputs(model, x)
    measured = comparing.rounding(model, x, dense)
    order = torch.randperm(7, generator=draw)
    model.layer.weight.data = weight[:, order]
    regrouped = running.outputs(model, x[:, order])
    assert comparing.unlike(dense, regrouped, measured, doubts=False) is None

    wrong, column = dense.values[0].clone(), data.draw(st.integers(0, 11), "column")
    wrong[1, column] += 0.1 * scales[column]
    other = running.Outputs([wrong], dense.draws, dense.eps)
    why = comparing.unlike(dense, other, measured, doubts=False)
    assert why is not None
    assert "changes the outputs" in why


# ---------------------------------------------------------------------- random draws in training


def path(x: Tensor, share: float) -> Tensor:
    """Stochastic depth: whole samples are dropped."""
    return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - share).div(1 - share)


def layer_drop(x: Tensor, share: float) -> Tensor:
    return x if torch.rand(()) < share else F.relu(x)


DRAWS = {
    "dropout": lambda x, p: F.dropout(x, p),
    "of channels": lambda x, p: F.dropout2d(x, p),
    "alpha": lambda x, p: F.alpha_dropout(x, p),
    "fused": lambda x, p: torch.native_dropout(x, p, True)[0],
    "of samples": path,
    "of layers": layer_drop,
    "uniform noise": lambda x, p: x * (1 + p * torch.empty_like(x).uniform_(-1, 1)),
    "normal noise": lambda x, p: x + p * torch.randn_like(x),
    "a choice": lambda x, p: x * F.gumbel_softmax(x.new_zeros(2), tau=1 + p)[0],
    "a matrix's": lambda x, p: F.scaled_dot_product_attention(x, x, x, dropout_p=p),
}
ONLY_IN_TRAINING = {
    "nothing": lambda x: x,
    "scaled positions": lambda x: torch.cat([x[:, :2] * 2, x[:, 2:]], 1),
    "more than zeros": lambda x: x - 0.1,
}


class Training(nn.Module):
    """A layer, and what happens to its outputs in training alone."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        for part in self.parts if self.training else ():
            x = part(x)
        return self.o(F.relu(self.b(x)).mean((2, 3)))


@SOME
@given(st.data())
def test_no_random_draw_hides_a_difference_in_training(data):
    share = data.draw(st.sampled_from([0.05, 0.2, 0.5]), "share")
    names = data.draw(st.lists(st.sampled_from(sorted(DRAWS)), min_size=1, max_size=2), "draws")
    drawing = [lambda x, f=DRAWS[n]: f(x, share) for n in names]
    what = data.draw(st.sampled_from(sorted(ONLY_IN_TRAINING)), "what")
    model, plan = Training(*drawing, ONLY_IN_TRAINING[what]), [("a", [0, 3])]
    dependency.set_to_zero(model, IMAGES, plan)
    if what == "nothing":
        assert {g.name for g in structure_groups(model, IMAGES)} == {"a", "b"}
        dependency.remove(model, IMAGES, plan)
        return
    with pytest.raises(UnsupportedLayerError, match=r"'a' gives different .* in training mode"):
        structure_groups(model, IMAGES)
    with pytest.raises(dependency.RemovalError, match="in training mode"):
        dependency.remove(model, IMAGES, plan)


def test_draws_that_have_no_mean_are_said_to_keep_training_mode_from_comparison():
    def shuffled(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x))]

    said: list[str] = []
    model = Training(shuffled, ONLY_IN_TRAINING["scaled positions"])
    trial.exact_groups(model, IMAGES, progress=said.append)
    assert any("not compared in training mode" in line for line in said)


def test_a_pass_that_draws_until_it_likes_the_numbers_comes_to_an_end():
    def picky(x: Tensor) -> Tensor:
        while torch.rand(()) < 0.9:
            pass
        return x

    found = running.outputs(Training(picky), IMAGES, training=True)
    assert found.draws


def test_an_attention_without_dropout_draws_nothing():
    def attend(p: float) -> list[torch.Size]:
        part = Training(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=p))
        watched = running.Watched()
        with torch.no_grad():
            running.probe(part, IMAGES, training=True, watched=watched)
        return watched.draws

    assert not attend(0.0)
    assert attend(0.1)


# ---------------------------------------------------------------------- little to compare


def test_outputs_that_rounding_drowns_are_no_proof():
    model = Net(BETWEEN["other columns"], lambda y: y + 1e18)
    with pytest.raises(UnsupportedLayerError, match=r"cannot be checked: what .* is lost in round"):
        structure_groups(model, IMAGES)


def test_a_network_that_bears_no_other_parameters_is_compared_by_its_size():
    """Every parameter is as it was, to its last digits, or the network refuses to run."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    before = [p.clone() for p in model.parameters()]

    def strict(*_: Any) -> None:
        assert all(map(torch.equal, model.parameters(), before))

    model.register_forward_pre_hook(strict)
    x = torch.randn(6, 5).double()
    found = running.outputs(model, x)
    (measured,) = comparing.rounding(model, x, found)
    assert torch.equal(measured.varies, found.values[0].abs())
    assert bool((measured.allowed >= measured.moved).all())
    assert comparing.unlike(found, found, [measured], doubts=True) is None


# ---------------------------------------------------------------------- values and what is kept


def symmetric(p: Tensor) -> Tensor:
    assert torch.allclose(p, p.T)
    return torch.linalg.eigh(p).eigenvectors


def shares(p: Tensor) -> Tensor:
    assert torch.allclose(p.sum(0), torch.ones(3).to(p))
    return p


def positive(p: Tensor) -> Tensor:
    assert bool((p >= 0).all())
    return p


DEMANDS = {
    "positive definite": torch.linalg.cholesky,
    "not negative": positive,
    "a root": torch.sqrt,
    "a scale": lambda p: torch.distributions.Normal(0.0, p + 1e-3).variance,
    "symmetric": symmetric,
    "shares": shares,
}


class Demanding(nn.Module):
    """A parameter of which not all values will do."""

    def __init__(self, demands: Any, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.p = nn.Parameter(torch.eye(3))
        self.norm = nn.BatchNorm1d(8)
        self.demands, self.between = demands, between

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.between(F.relu(self.norm(self.a(x)))))
        for demand in self.demands:
            p = demand(self.p)
        return self.o(F.relu(y)) @ p


@SOME
@given(st.data())
def test_a_network_that_refuses_drawn_values_is_tried_out_with_its_own(data):
    names = data.draw(st.lists(st.sampled_from(sorted(DEMANDS)), min_size=1), "demands")
    right = data.draw(st.booleans(), "right")
    model = Demanding([DEMANDS[n] for n in names], (lambda x: x) if right else torch.sigmoid)
    example, plan = torch.randn(5, 6), [("a", [0, 3])]
    assert running.outputs(model, example).values[0].isfinite().all()
    if right:
        assert {g.name for g in structure_groups(model, example)} == {"a", "b"}
        dependency.cut(model, example, plan)
        assert model.a.out_features == 6
        return
    with pytest.raises(UnsupportedLayerError, match="'a' gives different outputs"):
        structure_groups(model, example)


def test_drawn_values_stay_wherever_the_network_bears_them():
    model = Demanding([DEMANDS["symmetric"]], torch.relu)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trial_values.draw_values(model, torch.randn(5, 6))
    near = {n for n, p in model.named_parameters() if (p - before[n]).abs().max() <= 0.011}
    assert near == {"p"}


def test_what_is_wrong_with_the_network_itself_is_said_to_be_its_own():
    def broken(_: Tensor) -> Tensor:
        raise ValueError("no such table")

    with pytest.raises(
        trial_values.OwnError, match=r"own forward pass.*\(ValueError: no such table\)"
    ):
        trial_values.draw_values(Demanding([broken], torch.relu), torch.randn(5, 6))


class Keeping(nn.Module):
    """Something is kept from one call for the next one."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kept: Tensor | None = None
        self.register_buffer("number", torch.zeros(()))
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.b(self.keep(self, F.relu(self.a(x))))))


def features(m: Keeping, x: Tensor) -> Tensor:
    last, m.kept = m.kept, x.detach()
    return x if last is None else x + 0.5 * last[: len(x)]


def in_training(m: Keeping, x: Tensor) -> Tensor:
    return features(m, x) if m.training else x


def mean(m: Keeping, x: Tensor) -> Tensor:
    last = x.detach().mean(0) if m.kept is None else m.kept
    m.kept = 0.9 * last + 0.1 * x.detach().mean(0)
    return x - m.kept


def table(m: Keeping, x: Tensor) -> Tensor:
    if m.kept is None:
        m.kept = torch.arange(x.shape[1]).to(x) + 1
    return x * m.kept


def centre(m: Keeping, x: Tensor) -> Tensor:
    if m.training:
        m.number.mul_(0.5).add_(0.5 * x.detach().mean())
    return x - m.number


def shown(m: Keeping, x: Tensor) -> Tensor:
    m.kept = x
    return x


def counted(m: Keeping, x: Tensor) -> Tensor:
    m.number.add_(1)
    return x * (1 + 1 / m.number)


KEPT = {
    **dict.fromkeys((features, in_training, mean, table), "'a' cannot be removed .*keeps 'kept'"),
    centre: "'a' gives different outputs",
    **dict.fromkeys((shown, counted)),
}


@pytest.mark.parametrize("keep", KEPT, ids=lambda f: f.__name__)
def test_what_is_kept_between_calls_is_there_when_a_removal_is_tried_out(keep):
    model, example = Keeping(keep), torch.randn(4, 6)
    if KEPT[keep] is None:
        assert {g.name for g in structure_groups(model, example)} == {"a", "b"}
    else:
        with pytest.raises(UnsupportedLayerError, match=KEPT[keep]):
            structure_groups(model, example)
    assert model.kept is None
    assert not model.number
