"""Optimizers over a removal: the small model trains on as the large one with zeros would."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from dpm_core import SmoothPruning
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.optimizer_state import CarryOver, CarryOverError
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import dependency, shares
from dpm_core.third_party.groups import UnsupportedLayerError
from experiments.inputs.models import build
from tests.support import rounding
from tests.support.frameworks import CASES, Drive
from tests.support.snapshot import refused, same_bits

EXAMPLE = torch.zeros(2, 3, 8, 8)
PLANS = {
    "vgg-digits": [
        ("features.0", [1, 5, 6]),
        ("features.7", list(range(0, 64, 3))),
        ("features.17", list(range(5, 128, 2))),
    ],
    "resnet20": [
        ("conv1", [0, 3, 15]),
        ("layer1.1.conv1", [4]),
        ("layer2.0.conv1", [7, 8]),
        ("layer3.0.conv2", [1, 2, 60]),
    ],
}
LATER = {
    "vgg-digits": [("features.0", [0, 24]), ("features.7", [3, 4, 5])],
    "resnet20": [("conv1", [2]), ("layer3.0.conv2", [0, 55])],
}
# Adam and its like divide by the size of past gradients. Where a gradient is zero but for rounding,
# as those of biases before a BatchNorm are, that multiplies rounding by the rate over epsilon; in
# double precision it stays far below what the tests allow. A weight decay that is added to such a
# gradient feeds it back: near zero, where these biases begin, each step multiplies what rounding
# has made of them by the rate times the decay over epsilon. So epsilon is large there, and this is
# a fifth.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: Adam(p, 2e-3, weight_decay=1e-2, eps=1e-4),
    "amsgrad": lambda p: Adam(p, 2e-3, weight_decay=1e-2, amsgrad=True, eps=1e-4),
    "adamw": lambda p: AdamW(p, 2e-3, weight_decay=0.1),
}
OTHERS: dict[str, Callable[..., Optimizer]] = {
    "rmsprop": lambda p: RMSprop(p, lr=2e-4, momentum=0.9, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, eps=1e-8),
    "adadelta": lambda p: Adadelta(p, lr=0.5),
    "nadam": lambda p: NAdam(p, lr=2e-3, weight_decay=1e-2, eps=1e-4),
}


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range,
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """Losses of some steps, each on a batch of its own."""
    losses = []
    model.train()
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 8, 8, generator=draw, dtype=torch.float64)
        y = torch.randint(10, (8,), generator=draw)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward()
        optimizer.step()
        after()
        losses.append(float(loss.detach()))
    return losses


class Masked:
    """The large model with zeros: what a removal takes away stays, and is kept at zero."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stays = {n: [torch.arange(k) for k in p.shape] for n, p in model.named_parameters()}

    def prune(self, stays: dict[str, list[torch.Tensor]]) -> None:
        """By positions in the model that a removal would have left so far."""
        self.stays = {
            n: [before[now] for before, now in zip(self.stays[n], index, strict=True)]
            for n, index in stays.items()
        }
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        for name, p in self.model.named_parameters():
            gone = torch.ones(len(p), dtype=torch.bool)
            gone[self.stays[name][0]] = False
            p[gone] = 0

    def left(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        for dim, index in enumerate(self.stays[name]):
            tensor = tensor.index_select(dim, index)
        return tensor

    def differences(self, small: nn.Module) -> dict[str, float]:
        """Largest difference of each parameter to the small model's."""
        mine = dict(self.model.named_parameters())
        return {
            n: float((self.left(mine[n], n) - p).detach().abs().max())
            for n, p in small.named_parameters()
        }


def trained(name: str, kind: str, dtype: torch.dtype) -> tuple[nn.Module, Optimizer]:
    """A model after some steps; the same arguments give the same bits."""
    model = build(name, 3, 10, seed=0).to(dtype)
    optimizer = {**OPTIMIZERS, **OTHERS}[kind](model.parameters())
    train(model, optimizer, range(5))
    return model, optimizer


@functools.cache
def what_stays(name: str) -> dict[str, list[torch.Tensor]]:
    """The positions that each plan leaves; they do not depend on weights."""
    return dependency.survivors(build(name, 3, 10, seed=0), EXAMPLE, PLANS[name])


def pruned(
    name: str, kind: str, dtype: torch.dtype
) -> tuple[Masked, Optimizer, nn.Module, Optimizer]:
    """The model with zeros and the small one, each with its optimizer."""
    return copy.deepcopy(_pruned(name, kind, dtype))  # the same for several tests


@functools.cache
def _pruned(
    name: str, kind: str, dtype: torch.dtype
) -> tuple[Masked, Optimizer, nn.Module, Optimizer]:
    large, of_large = trained(name, kind, dtype)
    small, of_small = copy.deepcopy((large, of_large))
    stays = what_stays(name)
    masked = Masked(large)
    masked.prune(stays)
    Masked(small).prune(stays)
    Removal(PLANS[name]).apply(small, EXAMPLE.to(dtype), of_small)
    return masked, of_large, small, of_small


def assert_same(masked: Masked, small: nn.Module) -> None:
    """Both in double precision. In single precision ten steps make anything of rounding."""
    large = masked.model.state_dict()
    kept, left = [], []
    for name, value in small.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            of = name if name in masked.stays else name.rpartition(".")[0] + ".weight"
            kept.append(masked.left(large[name], of).flatten())
            left.append(value.flatten())
    rounding.assert_exact(torch.cat(left), torch.cat(kept), "parameters and statistics")


# ---------------------------------------------------------------------- training goes on


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ten_steps_of_the_small_model_are_those_of_the_one_with_zeros(name, kind):
    masked, of_large, small, of_small = pruned(name, kind, torch.float64)
    anew = copy.deepcopy(small)
    of_anew = OPTIMIZERS[kind](anew.parameters())
    ones = train(masked.model, of_large, range(5, 15), masked.zero)
    others = train(small, of_small, range(5, 15))
    rounding.assert_exact(
        torch.tensor(others, dtype=torch.float64), torch.tensor(ones, dtype=torch.float64), "losses"
    )
    assert_same(masked, small)
    # Without the state it would have been seen.
    train(anew, of_anew, range(5, 15))
    assert max(masked.differences(anew).values()) > 1e-3


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_removal_keeps_every_bit_of_what_stays(name, kind, dtype):
    masked, of_large, small, of_small = pruned(name, kind, dtype)
    large = dict(masked.model.named_parameters())
    for parameter, p in small.named_parameters():
        assert same_bits(p, masked.left(large[parameter], parameter))
        mine, theirs = of_small.state[p], of_large.state[large[parameter]]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            whole = theirs[key].dim() == 0
            assert same_bits(value, theirs[key] if whole else masked.left(theirs[key], parameter))
    train(small, of_small, range(5, 7))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", OTHERS)
def test_optimizers_nobody_has_thought_of_go_on_as_well(name, kind):
    masked, of_large, small, of_small = pruned(name, kind, torch.float64)
    train(masked.model, of_large, range(5, 15), masked.zero)
    train(small, of_small, range(5, 15))
    assert_same(masked, small)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_several_removals_in_one_training(name, kind):
    dtype = torch.float64
    masked, of_large, small, of_small = pruned(name, kind, dtype)
    start = 5
    for plan in (LATER[name], LATER[name], LATER[name]):
        steps = range(start, start + 4)
        train(masked.model, of_large, steps, masked.zero)
        train(small, of_small, steps)
        assert_same(masked, small)
        stays = dependency.survivors(small, EXAMPLE.to(dtype), plan)
        for model in (masked, Masked(small)):  # at zero in the small one, too, before they go
            model.prune(stays)
        Removal(plan).apply(small, EXAMPLE.to(dtype), of_small)
        start += 4
    train(masked.model, of_large, range(start, start + 10), masked.zero)
    train(small, of_small, range(start, start + 10))
    assert_same(masked, small)
    assert len(of_small.state) == len(list(small.parameters()))


SCHEDULERS = {
    "step": lambda o: StepLR(o, 3, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 20),
    "one-cycle": lambda o: OneCycleLR(o, 0.05, total_steps=20),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_and_step_hooks_go_on(kind):
    name, dtype = "vgg-digits", torch.float64
    runs = []
    for small in (False, True):
        model = build(name, 3, 10, seed=0).to(dtype)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = SCHEDULERS[kind](optimizer)
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(model, optimizer, range(5), scheduler.step)
        masked = Masked(model)
        masked.prune(what_stays(name))
        if small:
            Removal(PLANS[name]).apply(model, EXAMPLE.to(dtype), optimizer)
        rates = []

        def after(masked=masked, small=small, scheduler=scheduler, rates=rates) -> None:
            if not small:
                masked.zero()
            scheduler.step()
            rates.append(scheduler.get_last_lr())

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(5, 15), after)
        assert len(calls) == 15
        runs.append((masked, model, rates, scheduler.state_dict()))
    (masked, _, rates, state), (_, small_model, small_rates, small_state) = runs
    assert_same(masked, small_model)
    assert rates == small_rates
    assert len({r for [r] in rates}) > 1
    assert {k: v for k, v in state.items() if k != "anneal_func"} == {
        k: v for k, v in small_state.items() if k != "anneal_func"
    }


def test_parameter_groups_keep_their_settings_and_order():
    model = build("resnet20", 3, 10, seed=0)
    decayed = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    plain = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    extra = nn.Parameter(torch.ones(3))  # not the model's
    optimizer = AdamW(
        [
            {"params": decayed, "lr": 1e-3, "weight_decay": 0.1},
            {"params": [*plain, ("extra", extra)], "lr": 1e-4, "weight_decay": 0.0},
        ]
    )
    (extra.sum() * 2).backward()
    train(model, optimizer, range(2))
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = optimizer.param_groups
    dependency.set_to_zero(model, EXAMPLE, PLANS["resnet20"])
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, optimizer)
    assert optimizer.param_groups is groups
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == before
    now = dict(model.named_parameters())
    assert [id(p) for p in groups[0]["params"]] == [id(now[n]) for n, _ in decayed]
    assert [id(p) for p in groups[1]["params"]] == [*(id(now[n]) for n, _ in plain), id(extra)]
    for p in now.values():
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    # What it saves is for an optimizer of the small model.
    twin = AdamW([{"params": g["params"]} for g in groups])
    twin.load_state_dict(optimizer.state_dict())
    for p in now.values():
        assert torch.equal(twin.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.framework in ("depgraph", "torch-prune")], ids=lambda c: c.name
)
@pytest.mark.parametrize("variant", ["base", "sr"])
def test_a_users_own_optimizer_goes_through_an_adapters_removals_as_the_same_object(case, variant):
    def own(model: nn.Module) -> tuple[Optimizer, OneCycleLR]:
        parts = [[p for p in model.parameters() if (p.dim() > 1) == large] for large in (1, 0)]
        optimizer = AdamW([{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1]}])
        return optimizer, OneCycleLR(optimizer, [5e-3, 1e-3], total_steps=drive.steps)

    def settings(optimizer: Optimizer) -> list[dict[str, object]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    model = case.build()
    drive = Drive(case, case.adapter(model, variant))
    twin, twins_scheduler = own(case.build())
    drive.optimizer, scheduler = own(model)
    shapes, calls = [[len(g["params"]) for g in drive.optimizer.param_groups]], []

    def after(optimizer: Optimizer, *_: object) -> None:
        twin.step()
        assert settings(optimizer) == settings(twin)
        for each in (scheduler, twins_scheduler):
            each.step()
        groups = [g["params"] for g in optimizer.param_groups]
        assert {p for g in groups for p in g} == set(model.parameters())
        shapes.append([len(g) for g in groups])
        assert all(p.dim() > 1 for p in groups[0])
        for p in model.parameters():
            assert optimizer.state[p]["exp_avg"].shape == p.shape
        calls.append({int(s["step"]) for s in optimizer.state.values()})

    drive.optimizer.register_step_post_hook(after)
    optimizer = drive.optimizer
    assert drive.run().adapter.optimizer is optimizer
    assert len(drive.events) == case.removals
    assert calls == [{n} for n in range(1, drive.steps - drive.adapter.heard + 1)]
    assert all(s == shapes[0] for s in shapes)


def test_parameters_without_state_yet_are_replaced_as_well():
    name, dtype = "resnet20", torch.float64
    runs = []
    for small in (False, True):
        model = build(name, 3, 10, seed=0).to(dtype)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for p in model.layer2.parameters():  # not in the first steps
            p.requires_grad_(False)
        train(model, optimizer, range(3))
        for p in model.layer2.parameters():
            p.requires_grad_(True)
        assert len(optimizer.state) < len(list(model.parameters()))
        masked = Masked(model)
        masked.prune(what_stays(name))
        if small:
            Removal(PLANS[name]).apply(model, EXAMPLE.to(dtype), optimizer)
            assert len(optimizer.state) < len(list(model.parameters()))
        train(model, optimizer, range(3, 13), (lambda: None) if small else masked.zero)
        runs.append((masked, model))
    assert_same(runs[0][0], runs[1][1])


def test_a_new_optimizer_has_nothing_to_carry_and_goes_on():
    model = build("vgg-digits", 3, 10, seed=0)
    optimizer = Adam(model.parameters())
    dependency.set_to_zero(model, EXAMPLE, PLANS["vgg-digits"])
    Removal(PLANS["vgg-digits"]).apply(model, EXAMPLE, optimizer)
    assert not optimizer.state
    train(model, optimizer, range(2))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_frozen_parameters_stay_frozen():
    model = build("vgg-digits", 3, 10, seed=0)
    frozen = {"features.0.weight", "features.3.weight", "classifier.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(2))
    dependency.set_to_zero(model, EXAMPLE, PLANS["vgg-digits"])
    Removal(PLANS["vgg-digits"]).apply(model, EXAMPLE, optimizer)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    before = model.get_parameter("features.0.weight").clone()
    train(model, optimizer, range(2, 5))
    assert torch.equal(model.get_parameter("features.0.weight"), before)


def test_states_take_the_layout_of_their_parameters_and_keep_their_type():
    model = build("vgg-digits", 3, 10, seed=0).to(memory_format=torch.channels_last)
    optimizer = Adam(model.parameters())
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
    carried = CarryOver(model, optimizer)
    stays = dependency.survivors(model, EXAMPLE, PLANS["vgg-digits"])
    dependency.take_out(model, EXAMPLE, PLANS["vgg-digits"])
    model.to(memory_format=torch.channels_last)
    carried.finish(stays)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg_sq"].stride() == p.stride()
        assert optimizer.state[p]["exp_avg"].dtype == torch.float64
        assert optimizer.state[p]["step"] == 2


def test_half_precision():
    model = build("vgg-digits", 3, 10, seed=0).to(torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(2))
    before = optimizer.state[model.features[3].weight]["momentum_buffer"]
    kept = [c for c in range(32) if c not in (1, 5, 6)]
    dependency.set_to_zero(model, EXAMPLE.bfloat16(), PLANS["vgg-digits"])
    Removal(PLANS["vgg-digits"]).apply(model, EXAMPLE.bfloat16(), optimizer)
    after = optimizer.state[model.features[3].weight]["momentum_buffer"]
    assert torch.equal(after, before[:, kept])
    train(model, optimizer, range(2, 4))


def test_on_a_gpu(cuda):
    model = build("resnet20", 3, 10, seed=0)
    optimizer = Adam(model.parameters())
    train(model, optimizer, range(2))
    model.to(cuda)
    for state in optimizer.state.values():
        state.update({k: v.to(cuda) for k, v in state.items() if v.dim()})
    host = {n: optimizer.state[p]["exp_avg"].cpu() for n, p in model.named_parameters()}
    stays = dependency.survivors(model, EXAMPLE.to(cuda), PLANS["resnet20"])
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE.to(cuda), optimizer)
    for name, p in model.named_parameters():
        found, expected = optimizer.state[p]["exp_avg"], host[name]
        assert found.device == p.device
        for dim, index in enumerate(stays[name]):
            expected = expected.index_select(dim, index)
        assert torch.equal(found.cpu(), expected)


class Lacking(Optimizer):
    """Means over the last dimension and the one before, which they lack, as of transformers."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                if p.dim() > 1:
                    state["row"] = torch.zeros(p.shape[:-1], dtype=p.dtype)
                    state["col"] = torch.zeros(p.shape[:-2] + p.shape[-1:], dtype=p.dtype)
            state["exp_avg"].lerp_(p.grad, 0.1)
            if p.dim() > 1:
                state["row"].lerp_(p.grad.square().mean(-1), 0.1)
                state["col"].lerp_(p.grad.square().mean(-2), 0.1)
            p.add_(state["exp_avg"], alpha=-1e-3)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Lacking])
def test_factored_states_begin_anew_where_something_is_lost(kind):
    """Adafactor of huggingface/transformers (pull request 7522), pytorch-optimizer and timm."""
    model = build("resnet20", 3, 10, seed=0).double()
    optimizer = kind(model.parameters())
    train(model, optimizer, range(3))
    before = {
        n: (p.shape, {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()})
        for n, p in model.named_parameters()
    }
    kept = dependency.survivors(model, EXAMPLE.double(), PLANS["resnet20"])
    dependency.set_to_zero(model, EXAMPLE.double(), PLANS["resnet20"])
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE.double(), optimizer)
    # Kernels of one position have no mean over it: these states have their shape, and are cut.
    means = {
        n for n, (s, old) in before.items() if any(v.dim() and v.shape != s for v in old.values())
    }
    anew = {n for n in means if model.get_parameter(n).shape != before[n][0]}
    assert 0 < len(anew) < len(means)
    for name, p in model.named_parameters():
        shape, old = before[name]
        if name in anew:
            assert p not in optimizer.state
            continue
        assert optimizer.state[p].keys() == old.keys()
        for key, value in optimizer.state[p].items():
            expected = old[key]
            if expected.shape == shape:
                for dim, index in enumerate(kept[name]):
                    expected = expected.index_select(dim, index)
            assert torch.equal(torch.as_tensor(value), expected)
    # A new optimizer of the parameters that begin anew takes the same first step.
    twin = copy.deepcopy(model)
    fresh = [(n, p) for n, p in twin.named_parameters() if n in anew]
    train(twin, kind([p for _, p in fresh]), range(3, 4))
    train(model, optimizer, range(3, 4))
    for name, p in fresh:
        assert torch.equal(p, model.get_parameter(name))
    assert len(optimizer.state) == len(before)


class Lookahead(Optimizer):
    """Steps one inside, and goes back half the way with every second step; as timm's, unhooked."""

    def __init__(self, inside: Optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = (
            OrderedDict(),
            OrderedDict(),
        )
        self._inside, self._steps = inside, 0
        self.param_groups, self.defaults = inside.param_groups, inside.defaults
        self.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure=None):
        self._inside.step()
        self._steps += 1
        for p in [p for g in self.param_groups for p in g["params"]]:
            slow = self._inside.state[p].setdefault("slow", p.clone())
            if self._steps % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


@pytest.mark.parametrize("name", PLANS)
def test_what_an_optimizer_inside_keeps_goes_on(name):
    """timm's Lookahead (as in xiwenc1/TimeMIL issue 6) has the states in its base optimizer."""
    dtype = torch.float64
    (large, inside), (small, of_small) = (trained(name, "adamw", dtype) for _ in range(2))
    of_large, of_small = Lookahead(inside), Lookahead(of_small)
    for model, optimizer in ((large, of_large), (small, of_small)):
        train(model, optimizer, range(5, 8))
    stays = dependency.survivors(large, EXAMPLE.to(dtype), PLANS[name])
    masked = Masked(large)
    masked.prune(stays)
    Masked(small).prune(stays)
    Removal(PLANS[name]).apply(small, EXAMPLE.to(dtype), of_small)
    assert len(of_small._inside.state) == len(list(small.parameters()))
    train(large, of_large, range(8, 14), masked.zero)
    train(small, of_small, range(8, 14))
    assert_same(masked, small)


# ---------------------------------------------------------------------- what is refused


class Odd(Optimizer):
    """Keeps whatever a test wants."""

    def __init__(self, params, made: Callable[[torch.Tensor], object]) -> None:
        super().__init__(params, {})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = made(p.detach())

    def step(self, closure=None):
        return None


@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.zeros(len(p)) if p.dim() > 1 else p.clone(),  # as of a factored state
        lambda p: torch.zeros(p.numel()) if p.dim() > 1 else p.clone(),
        lambda p: [torch.eye(k) for k in p.shape],  # SOAP, Kron
        lambda p: torch.eye(len(p)),  # of a square matrix as large as itself
        lambda p: {"of": p.clone()},
        lambda p: SimpleNamespace(projection=p.clone()),  # GaLore
    ],
)
def test_states_that_structures_cannot_be_taken_out_of_begin_anew(made):
    model = build("resnet20", 3, 10, seed=0)
    optimizer = Odd(model.parameters(), made)
    before = {n: (p.shape, optimizer.state[p]["odd"]) for n, p in model.named_parameters()}
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, optimizer, cut=True)
    kept = 0
    for name, p in model.named_parameters():
        shape, odd = before[name]
        if p.shape == shape:
            assert optimizer.state[p]["odd"] is odd or torch.equal(optimizer.state[p]["odd"], odd)
            kept += 1
        elif len(shape) > 1:
            assert p not in optimizer.state
    assert 0 < kept < len(before)


class Curved(Optimizer):
    """Shampoo's factors of the curvature, without its roots."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            for d, size in enumerate(p.shape):
                factor = state.setdefault(f"factor_{d}", torch.eye(size, dtype=p.dtype))
                rows = p.grad.movedim(d, 0).flatten(1) if p.dim() > 1 else p.grad[:, None]
                factor.addmm_(rows, rows.T)
                shape = p.grad.movedim(d, 0).shape
                move = torch.linalg.solve(factor, rows).reshape(shape).movedim(0, d)
                p.sub_(move, alpha=1e-2)


def test_factors_of_square_matrices_begin_anew_though_they_have_their_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    optimizer, x = Curved(model.parameters()), torch.randn(4, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    stays = optimizer.state[model[4].bias]
    Removal([("0", [1, 4])]).apply(model, x, optimizer, cut=True)
    assert model[0].weight not in optimizer.state
    assert model[2].weight not in optimizer.state
    assert optimizer.state[model[4].bias] is stays
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["factor_0"].shape == (4, 4)


class Hiding(torch.optim.SGD):
    """Keeps copies of all parameters beside its state, from some step on."""

    def __init__(self, params, since: int, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.left = since
        self._hide()

    def _hide(self) -> None:
        if self.left == 0:
            self.averages = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.left -= 1

    def step(self, closure=None):
        super().step()
        self._hide()


@pytest.mark.parametrize("since", [0, 1, 2])
def test_what_a_removal_would_refuse_is_refused_at_the_start(since):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    run = DepGraph(model, x, DepGraphOptions(ratio=0.5), SmoothPruning(8))
    optimizer = Hiding(model.parameters(), since, lr=0.01)

    def trained_by_it() -> None:
        run.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    with pytest.raises(CarryOverError, match=r"Hiding keeps tensors of its own in \['averages'\]"):
        trained_by_it()
    assert run.clock == since


COUNTS = (
    7,  # SPAM
    torch.tensor([7]),  # MADGRAD
    {"short": 0.5, "long": None},  # EmoNavi
    [torch.tensor(0.5), torch.ones(1, 1)],
)


@pytest.mark.parametrize("value", COUNTS, ids=str)
@pytest.mark.parametrize("place", ["state", "group", "attribute"])
def test_single_values_may_be_kept_anywhere(place, value):
    """D-Adaptation and Prodigy of pytorch_optimizer keep tensors of one element in groups."""

    model, plain = (build("resnet20", 3, 10, seed=0).double() for _ in range(2))
    optimizer, other = (Adam(m.parameters(), lr=1e-3) for m in (model, plain))
    keeping = {"state": optimizer.state, "group": optimizer.param_groups[0]}
    keeping = keeping.get(place, vars(optimizer))
    keeping["count"] = value
    for one, by in ((model, optimizer), (plain, other)):
        train(one, by, range(2))
        Removal(PLANS["resnet20"]).apply(one, EXAMPLE.double(), by, cut=True)
        train(one, by, range(2, 4))
    assert keeping["count"] is value
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


class Marking(Optimizer):
    """Keeps what it needs on the parameters, from the start, as timm's AdaHessian does."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-3})
        for p in self.param_groups[0]["params"]:
            p.mean = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mean = 0.9 * p.mean + p.grad
            p.add_(p.mean, alpha=-1e-3)


@pytest.mark.parametrize("steps", [0, 3])
def test_attributes_of_parameters_go_on_with_what_is_left(steps):
    model, plain = (build("resnet20", 3, 10, seed=0).double() for _ in range(2))
    optimizer, other = Marking(model.parameters()), SGD(plain.parameters(), 1e-3, momentum=0.9)
    marks = {"no_decay": True, "settings": {"lr": [1e-3, None]}, "count": torch.tensor([4])}
    for p in model.parameters():
        vars(p).update(marks, projection=torch.ones(7), owner=optimizer)
    whole = {p: name for name, p in model.named_parameters()}
    for one, by in ((model, optimizer), (plain, other)):
        train(one, by, range(steps))
        Removal(PLANS["resnet20"]).apply(one, EXAMPLE.double(), by, cut=True)
        train(one, by, range(steps, steps + 3))
    smaller = [p for p in model.parameters() if p not in whole]
    assert 0 < len(smaller) < len(whole)
    for p in model.parameters():
        assert all(vars(p)[key] is value for key, value in marks.items())
    assert not any({"projection", "owner"} & vars(p).keys() for p in smaller)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rounding.EXACT, atol=rounding.EXACT)


def test_attributes_go_on_where_no_optimizer_does():
    model = build("resnet20", 3, 10, seed=0)
    for p in model.parameters():
        p.average, p.no_decay = p.detach().clone(), True
    dependency.set_to_zero(model, EXAMPLE, PLANS["resnet20"])
    with torch.no_grad():
        for p in model.parameters():
            p.average.copy_(p)
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE)
    assert all(torch.equal(p.average, p) and p.no_decay for p in model.parameters())


def test_hooks_on_gradients_go_on_in_their_order_until_their_handles_remove_them():
    model = build("resnet20", 3, 10, seed=0)
    whole = set(model.parameters())
    seen: list[tuple[str, str, torch.Size]] = []
    handles, clipping = [], []
    for name, p in model.named_parameters():
        clipping.append(p.register_hook(lambda g: g.clamp(-1e-3, 1e-3)))
        handles += [
            p.register_hook(lambda g, n=name: seen.append(("second", n, g.shape))),
            p.register_post_accumulate_grad_hook(
                lambda q, n=name: seen.append(("after", n, q.grad.shape))
            ),
        ]
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, cut=True)
    Removal(LATER["resnet20"]).apply(model, EXAMPLE, cut=True)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert 0 < sum(p not in whole for p in model.parameters()) < len(whole)

    def largest() -> float:
        model.zero_grad()
        functional.cross_entropy(1e3 * model(EXAMPLE + 1), torch.tensor([0, 1])).backward()
        return max(float(p.grad.abs().max()) for p in model.parameters())

    assert largest() == pytest.approx(1e-3)
    assert len(seen) == 2 * len(shapes)
    for name, shape in shapes.items():
        assert [(k, s) for k, n, s in seen if n == name] == [("second", shape), ("after", shape)]
    for handle in (*handles, *clipping):
        handle.remove()
    assert largest() > 1
    assert len(seen) == 2 * len(shapes)


def test_parameters_that_hooks_train_are_trained_after_a_removal_too():
    """An optimizer that steps as soon as a gradient is there, so that no gradients are kept."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    @torch.no_grad()
    def train(parameter: torch.Tensor) -> None:
        parameter.sub_(parameter.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(train)
    Removal([("0", [1, 2])]).apply(model, torch.randn(3, 4), cut=True)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 4)).square().sum().backward()
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was - p.grad)
        assert p.grad.any()


@pytest.mark.parametrize("inside", [False, True])
def test_tensors_that_a_state_keeps_under_a_name_are_refused(inside):
    """As TRAC does: copies of all parameters, by parameter, under one name."""
    model = build("resnet20", 3, 10, seed=0)
    optimizer = Adam(model.parameters())
    optimizer.state["trac"] = {p: p.detach().clone() for p in model.parameters()}
    given = optimizer
    if inside:
        given = SGD(model.parameters(), 0.1)
        given.inside = optimizer
    with refused(CarryOverError, "state['trac']", model=model):
        Removal(PLANS["resnet20"]).apply(model, EXAMPLE, given)


def test_a_state_that_is_no_mapping_begins_anew_where_something_is_lost():
    model = build("resnet20", 3, 10, seed=0)
    optimizer = SGD(model.parameters(), 0.1)
    before = {}
    for name, p in model.named_parameters():
        optimizer.state[p] = before[name] = torch.randn_like(p)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, optimizer, cut=True)
    kept = [name for name, p in model.named_parameters() if p in optimizer.state]
    assert kept == [name for name, p in model.named_parameters() if p.shape == shapes[name]]
    assert 0 < len(kept) < len(before)
    assert len(optimizer.state) == len(kept)
    assert all(optimizer.state[model.get_parameter(name)] is before[name] for name in kept)


def test_optimizers_in_a_list_are_inside_as_well():
    model = build("resnet20", 3, 10, seed=0)
    both = Lookahead(torch.optim.Adam(model.parameters()))
    inside = both._inside
    both._inside = None
    both.several = {"first": [inside]}
    train(model, inside, range(1))
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, both, cut=True)
    own = set(model.parameters())
    assert own == {p for g in inside.param_groups for p in g["params"]} == set(inside.state)


def test_single_values_are_kept():
    kept = (None, 3, 0.5, True, "warm", torch.tensor(7.0))
    model = build("resnet20", 3, 10, seed=0)
    given = itertools.cycle(kept)  # in each layer several
    optimizer = Odd(model.parameters(), lambda p: next(given))
    dependency.set_to_zero(model, EXAMPLE, PLANS["resnet20"])
    Removal(PLANS["resnet20"]).apply(model, EXAMPLE, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))
    for p, value in zip(model.parameters(), itertools.cycle(kept), strict=False):
        assert optimizer.state[p]["odd"] is value


def test_an_optimizer_that_keeps_parameters_elsewhere_is_refused():
    model = build("resnet20", 3, 10, seed=0)
    optimizer = torch.optim.LBFGS(model.parameters())
    with refused(CarryOverError, "'_params'", model=model, optimizer=optimizer):
        Removal(PLANS["resnet20"]).apply(model, EXAMPLE, optimizer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 5)
        self.third, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.third.weight

    def forward(self, x):
        return self.last(self.third(self.second(self.first(x).relu()).relu()).relu())


def test_a_parameter_of_two_layers_goes_on_as_one_or_is_refused():
    model, example = Tied(), torch.randn(8, 4)
    optimizer = Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(example).square().sum().backward()
        optimizer.step()
    with refused(
        UnsupportedLayerError, "'third.weight'", "'last.weight'", model=model, optimizer=optimizer
    ):
        Removal([("second", [1])]).apply(model, example, optimizer)
    dependency.set_to_zero(model, example, [("first", [0, 2])])
    Removal([("first", [0, 2])]).apply(model, example, optimizer)
    assert model.last.weight is model.third.weight
    assert len(optimizer.state) == len(list(model.parameters()))
    model(example).square().sum().backward()
    optimizer.step()


# ---------------------------------------------------------------------- which positions stay


class Odds(nn.Module):
    """Concatenation, groups, a depthwise and a transposed convolution, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.up, self.act = nn.ConvTranspose2d(10, 6, 2), nn.PReLU(6)
        self.head = nn.Linear(6 * 9, 3)

    def forward(self, x):
        x = self.depthwise(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(self.act(self.up(x)).flatten(1))


def test_positions_are_those_that_upstream_leaves():
    model, example = Odds(), torch.randn(2, 2, 2, 2)
    plan = [("left", [1]), ("right", [0, 5]), ("up", [2])]
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    stays = dependency.survivors(model, example, plan)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    dependency.take_out(model, example, plan)
    for name, p in model.named_parameters():
        expected = values[name]
        for dim, index in enumerate(stays[name]):
            expected = expected.index_select(dim, index)
        assert torch.equal(p, expected), name
    assert stays["depthwise.weight"][0].tolist() == [0, 2, 3, 5, 6, 7, 8]
    assert stays["head.weight"][1].tolist() == [i for i in range(54) if i // 9 != 2]


def test_what_is_no_block_of_rows_and_columns_is_refused():
    shape = torch.Size([3, 4])
    codes = torch.arange(12).view(shape)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3])
    found = shares.positions("p", codes[rows][:, columns], shape)
    assert [i.tolist() for i in found] == [[0, 2], [1, 3]]
    assert shares.positions("p", torch.tensor(0), torch.Size([])) == []
    torn = torch.tensor([[0, 1], [4, 6]])
    for bad in (torn, codes.flatten(), codes[:0]):
        with pytest.raises(UnsupportedLayerError, match="'p'"):
            shares.positions("p", bad, shape)


def test_a_layer_of_which_nothing_would_stay_is_refused_before_anything_changes():
    model, optimizer = trained("vgg-digits", "sgd", torch.float32)
    for cut in (False, True):
        with refused(UnsupportedLayerError, model=model, optimizer=optimizer):
            Removal([("features.3", range(32))]).apply(model, EXAMPLE, optimizer, cut=cut)
