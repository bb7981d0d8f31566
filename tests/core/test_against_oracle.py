"""Whole trainings with Smooth Pruning and Self-Rectifying, predicted step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpm_core import (
    Criterion,
    DecayPruning,
    Event,
    Evidence,
    SelfRectifying,
    SmoothPruning,
    Trajectory,
)
from dpm_core.decay import Shape
from tests.support import oracle
from tests.support.toys import OPTIMIZERS, TOYS, make
from tests.support.twins import Twin, assert_active_as_plain, norm

STEPS, LENGTH = 30, 9
DECISION = 7  # ceil(0.75 * 9)
PHASES = ["ACTIVE", "DECAYING", "PRUNED"]


def replicas(toy, rectify: SelfRectifying, shape: Shape = "linear") -> list[oracle.Replica]:
    criterion = rectify.criterion
    assert isinstance(criterion, Trajectory)
    return [
        oracle.Replica(
            oracle.shares_of(group),
            LENGTH,
            DECISION,
            criterion.rate,
            criterion.length,
            rectify.max_share,
            rectify.restore,
            rectify.waves,
            shape,
        )
        for group in toy.groups
    ]


def smallest(toy, dpm: DecayPruning, group: int, count: int) -> list[int]:
    """A framework's refill: the available structures of the smallest norm."""
    free = dpm.available(toy.groups[group].name).nonzero().flatten().tolist()
    return sorted(free, key=lambda k: norm(toy, group, k))[:count]


@pytest.mark.parametrize("restore", ["keep", "effect"])
@pytest.mark.parametrize(
    ("optimizer_name", "shape"),
    [("nesterov", "linear"), ("adamw", "linear"), ("nesterov", "cosine")],
)
@pytest.mark.parametrize("name", TOYS)
def test_the_oracle_predicts_a_training(
    name: str, optimizer_name: str, shape: Shape, restore: str
) -> None:
    toy = make(name, torch.float64, seed=1)
    # Thresholds low enough for every training to have releases.
    rectify = SelfRectifying(
        Trajectory(rate=-0.9, length=-1.05), max_share=0.5, restore=restore, waves=2
    )
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH, shape), rectify).attach(optimizer)
    predictions = replicas(toy, rectify, shape)
    plain = Twin(name, optimizer_name, torch.float64)

    def decay(group: int, structures: list[int], wave: int) -> None:
        dpm.decay({toy.groups[group].name: structures}, wave=wave)
        predictions[group].decay(structures, wave)

    for step in range(STEPS):
        for i, group in enumerate(toy.groups):
            if step in (1, 4):
                decay(i, smallest(toy, dpm, i, group.size // 2 if step == 1 else 1), 0)
        toy.backward(optimizer, step)
        for replica in predictions:
            replica.before_step()
        twin = plain.step(toy, optimizer)
        seen = len(dpm.events)
        optimizer.step()

        released: list[Event] = [e for e in dpm.events[seen:] if e.kind == "release"]
        assert {(e.group, k) for e in released for k in e.structures} == {
            (group.name, k)
            for group, replica in zip(toy.groups, predictions, strict=True)
            for k in replica.released
        }
        for group, star, replica in zip(toy.groups, twin.groups, predictions, strict=True):
            stars = [s.parameter for s in star.slices]
            for k, expected in replica.after_step(stars).items():
                found = oracle.values(replica.shares, k)
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)
            phases = [PHASES[p] for p in dpm.phases(group.name).tolist()]
            assert phases == [c.phase for c in replica.cases]
            sums = dpm.state_dict()["groups"][group.name]
            for k, case in enumerate(replica.cases):
                bound = math.fsum(case.gradients) * case.initial
                assert float(sums["gradient"][k]) == pytest.approx(bound, rel=1e-9)
                total = math.fsum(case.resistances)
                assert float(sums["resistance"][k]) == pytest.approx(total, abs=1e-9 * bound)
            free = [c.phase == "ACTIVE" and not c.immune for c in replica.cases]
            assert dpm.available(group.name).tolist() == free
        if restore == "keep":
            assert_active_as_plain(toy, twin, dpm)
        for event in released:
            i = [g.name for g in toy.groups].index(event.group)
            for k, left in zip(event.structures, event.norms, strict=True):
                # Before the step of the decision 6 of 9 decay steps were done.
                (expected,) = oracle.smooth([1.0], predictions[i].cases[k].initial, 6, 9, shape)
                assert left == pytest.approx(expected, rel=1e-9)
            refill = smallest(toy, dpm, i, len(event.structures))
            decay(i, refill, event.wave + 1)

    assert any(e.kind == "release" for e in dpm.events)
    assert all(c.phase != "DECAYING" for r in predictions for c in r.cases)


@pytest.mark.parametrize(
    ("rectify", "some"),
    [
        (SelfRectifying(Trajectory(rate=0.0, length=0.5), max_share=0.5), True),
        (SelfRectifying(Trajectory(rate=0.999, length=0.0), max_share=0.5), False),
        (SelfRectifying(Trajectory(rate=-1, length=1e6), max_share=0.5), False),
        (SelfRectifying(Trajectory(rate=0.0, length=0.5), max_share=0.01), False),
    ],
)
def test_each_setting_can_stop_every_release(rectify: SelfRectifying, some: bool) -> None:
    """So that no threshold is read from the wrong place."""
    toy = make("conv", torch.float64, seed=1)
    optimizer = OPTIMIZERS["nesterov"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH), rectify).attach(optimizer)
    dpm.decay({"conv1": [0, 1, 2, 3], "conv2": [0, 1, 2]})
    for step in range(LENGTH):
        toy.train_step(optimizer, step)
    assert any(e.kind == "release" for e in dpm.events) == some


class Witness(Criterion):
    """Somebody's own criterion, which takes the last of each group that may lose one."""

    def __init__(self) -> None:
        self.seen: list[tuple[Evidence, list[int], int]] = []

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        self.seen.append((evidence, limits.tolist(), step))
        group = evidence.group.tolist()
        last = [g not in group[i + 1 :] for i, g in enumerate(group)]
        return torch.tensor(last) & (limits[evidence.group] > 0)


def test_a_criterion_of_ones_own_is_shown_its_cohort_and_obeyed() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["nesterov"](toy.model.parameters())
    witness = Witness()
    rectify = SelfRectifying(witness, max_share=0.4)
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH), rectify).attach(optimizer)
    for step in range(14):
        if step == 2:
            dpm.decay({"conv2": [3, 0, 2], "conv1": [1, 5]})
        if step == 4:
            dpm.decay({"conv2": [4]})
        toy.train_step(optimizer, step)
    first, second = witness.seen
    evidence, limits, step = first
    # Decision 7 of the decay that began at step 2: eight steps have been taken before it.
    assert step == 8
    assert evidence.group.tolist() == [0, 0, 1, 1, 1]
    assert limits == [0, 1]
    assert bool((evidence.resistance.abs() <= evidence.gradient).all())
    assert evidence.derivative is None
    assert evidence.fisher is None
    assert (second[0].group.tolist(), second[1], second[2]) == ([0], [0], 10)
    released = [(e.group, e.structures) for e in dpm.events if e.kind == "release"]
    assert released == [("conv2", (3,))]
