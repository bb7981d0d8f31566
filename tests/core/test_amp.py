"""Gradient scalers, gradients from several batches, and clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from dpm_core import DecayPruning, Phase, SelfRectifying, SmoothPruning, Trajectory
from tests.support.snapshot import same_bits
from tests.support.toys import Toy, make

STEPS = 9
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.02, fused=True),
}
by_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def start(
    name: str, toy_name: str = "conv", dtype: torch.dtype = torch.float32
) -> tuple[Toy, Optimizer, DecayPruning]:
    toy = make(toy_name, dtype, seed=1)
    optimizer = OPTIMIZERS[name](toy.model.parameters())
    # Thresholds at which some resist and some do not.
    rectify = SelfRectifying(Trajectory(rate=0.0, length=0.5), max_share=0.5)
    dpm = DecayPruning(toy.groups, SmoothPruning(STEPS), rectify).attach(optimizer)
    return toy, optimizer, dpm


def most(toy: Toy) -> dict[str, list[int]]:
    return {g.name: list(range((2 * g.size + 2) // 3)) for g in toy.groups}


def scaled_step(
    toy: Toy, optimizer: Optimizer, scaler: GradScaler, step: int, *, half: bool = False
) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = toy.loss(step)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def everything(toy: Toy, dpm: DecayPruning) -> tuple[list[torch.Tensor], Any]:
    return [p.detach().clone() for p in toy.model.parameters()], copy.deepcopy(dpm.state_dict())


def assert_unchanged(before: Any, after: Any) -> None:
    assert all(same_bits(a, b) for a, b in zip(before[0], after[0], strict=True))
    old, new = before[1], after[1]
    assert old["clock"] == new["clock"]
    assert old["events"] == new["events"]
    for group, part in old["groups"].items():
        assert all(torch.equal(v, new["groups"][group][k]) for k, v in part.items())


@by_optimizer
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_the_scaler_skips_decays_nothing_and_is_not_counted(
    name: str, bad: float
) -> None:
    toy, optimizer, dpm = start(name)
    scaler = GradScaler("cpu", init_scale=1024.0)
    # Idle, decaying, at the decision, and with everything done. Not the very first: PyTorch's
    # fused SGD would leave its momentum uninitialised.
    skipped = {1, 4, 9, 10, 15}
    for step in range(18):
        if step == 2:
            dpm.decay(most(toy))
        if step in skipped:
            before = everything(toy, dpm)
            optimizer.zero_grad()
            scaler.scale(toy.loss(step)).backward()
            next(toy.model.parameters()).grad.view(-1)[0] = bad
            scaler.step(optimizer)
            scaler.update()
            assert_unchanged(before, everything(toy, dpm))
        else:
            scaled_step(toy, optimizer, scaler, step)
    assert scaler.get_scale() == 1024.0 / 2 ** len(skipped)
    assert dpm.clock == 18 - len(skipped)
    assert dpm.count(Phase.DECAYING) == 0
    assert {e.step for e in dpm.events if e.kind == "prune"} == {1 + STEPS}


@by_optimizer
@pytest.mark.parametrize("growth", [2000, 2], ids=["one-scale", "growing-scale"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_releases_do_not_depend_on_the_scale_of_the_loss(
    name: str, growth: int, half: bool
) -> None:
    """Scales are powers of two: they change no bit but those of the exponent."""
    toy, optimizer, dpm = start(name)
    plain, plain_optimizer, expected = start(name)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=growth)
    for step in range(1 + STEPS):
        if step == 1:
            dpm.decay(most(toy))
            expected.decay(most(plain))
        scaled_step(toy, optimizer, scaler, step, half=half)
        scaled_step(plain, plain_optimizer, GradScaler("cpu", enabled=False), step, half=half)
    assert [(e.step, e.kind, e.group, e.structures) for e in dpm.events] == [
        (e.step, e.kind, e.group, e.structures) for e in expected.events
    ]
    assert any(e.kind == "release" for e in dpm.events)
    mine, theirs = dpm.state_dict()["groups"], expected.state_dict()["groups"]
    for group, part in theirs.items():
        for sums in ("resistance", "gradient"):
            torch.testing.assert_close(mine[group][sums], part[sums], rtol=1e-5, atol=1e-7)
    for p, q in zip(toy.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@by_optimizer
def test_gradients_unscaled_for_clipping_are_not_unscaled_twice(name: str) -> None:
    toy, optimizer, dpm = start(name)
    plain, plain_optimizer, expected = start(name)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    for step in range(1 + STEPS):
        if step == 1:
            dpm.decay(most(toy))
            expected.decay(most(plain))
        optimizer.zero_grad()
        scaler.scale(toy.loss(step)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(toy.model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        plain.backward(plain_optimizer, step)
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        plain_optimizer.step()
    assert [(e.kind, e.structures) for e in dpm.events] == [
        (e.kind, e.structures) for e in expected.events
    ]
    mine, theirs = dpm.state_dict()["groups"], expected.state_dict()["groups"]
    for group, part in theirs.items():
        torch.testing.assert_close(mine[group]["gradient"], part["gradient"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("toy_name", ["flatten", "shared"])  # a BatchNorm sees batches by itself
def test_gradients_gathered_from_small_batches_are_one_large_batch(
    toy_name: str, clip: float | None
) -> None:
    toy, optimizer, dpm = start("sgd", toy_name, torch.float64)
    whole, whole_optimizer, expected = start("sgd", toy_name, torch.float64)
    for step in range(1 + STEPS):
        if step == 1:
            dpm.decay(most(toy))
            expected.decay(most(whole))
        optimizer.zero_grad()
        for images, labels in zip(*(part.chunk(3) for part in toy.batch(step)), strict=True):
            (nn.functional.cross_entropy(toy.model(images), labels) / 3).backward()
        whole.backward(whole_optimizer, step)
        if clip is not None:
            for model in (toy.model, whole.model):
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        whole_optimizer.step()
    assert dpm.clock == expected.clock == 1 + STEPS
    assert [(e.step, e.kind, e.structures) for e in dpm.events] == [
        (e.step, e.kind, e.structures) for e in expected.events
    ]
    for p, q in zip(toy.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
