"""Promises 1 and 2: the schedule holds at every step, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from dpm_core import DecayPruning, Phase, Slice, SmoothPruning, StructureGroup
from tests.support import oracle
from tests.support.snapshot import same_bits
from tests.support.toys import OPTIMIZERS, TOYS, make
from tests.support.twins import TOLERANCE, Twin, assert_active_as_plain, norm, structure

STEPS = 5  # fractions of five are exact in no format
WARM_UP = 2  # so that momentum is there when the decay starts


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", TOYS)
def test_norms_follow_the_schedule_and_active_structures_get_the_optimizers_bits(
    name: str, optimizer_name: str, dtype: torch.dtype
) -> None:
    toy = make(name, dtype)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(STEPS)).attach(optimizer)
    plain = Twin(name, optimizer_name, dtype)
    # Group i starts i steps late, so that one still decays where another is pruned.
    starts = {g.name: WARM_UP + i for i, g in enumerate(toy.groups)}
    initial: dict[tuple[int, int], float] = {}
    for step in range(WARM_UP + STEPS + len(toy.groups) + 1):
        for i, g in enumerate(toy.groups):
            if step == starts[g.name]:
                initial |= {(i, k): norm(toy, i, k) for k in toy.doomed[g.name]}
                dpm.decay({g.name: toy.doomed[g.name]})
        toy.backward(optimizer, step)
        twin = plain.step(toy, optimizer)
        optimizer.step()

        assert_active_as_plain(toy, twin, dpm)
        for (i, k), start in initial.items():
            n = min(step + 1 - starts[toy.groups[i].name], STEPS)
            expected = oracle.smooth(structure(twin, i, k), start, n, STEPS)
            tolerance = TOLERANCE[dtype]
            assert structure(toy, i, k) == pytest.approx(expected, rel=tolerance, abs=1e-30)
            assert norm(toy, i, k) == pytest.approx(start * (1 - n / STEPS), rel=tolerance)
            phase = Phase.PRUNED if n == STEPS else Phase.DECAYING
            assert dpm.phases(toy.groups[i].name)[k] == phase
    assert dpm.count(Phase.PRUNED) == len(initial)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", TOYS)
def test_a_decay_of_one_step_zeroes_as_one_step_pruning_does(
    name: str, optimizer_name: str
) -> None:
    toy, plain = make(name), make(name)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(1)).attach(optimizer)
    plain_optimizer = OPTIMIZERS[optimizer_name](plain.model.parameters())
    for step in range(5):
        if step == 2:
            dpm.decay(toy.doomed)
        toy.train_step(optimizer, step)
        plain.train_step(plain_optimizer, step)
        if step >= 2:
            for group in plain.groups:
                for share in oracle.shares_of(group):
                    for k in plain.doomed[group.name]:
                        for place in share.places(k):
                            share.parameter.data[place] = 0.0
            assert dpm.count(Phase.PRUNED) == sum(map(len, toy.doomed.values()))
        pairs = zip(toy.model.parameters(), plain.model.parameters(), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)


def test_decays_that_start_at_different_steps_of_one_group_keep_their_own_schedules() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(5)).attach(optimizer)
    started: dict[int, tuple[int, float]] = {}
    for step in range(8):
        if step < 3:
            started[2 * step] = (step, norm(toy, 0, 2 * step))
            dpm.decay({"conv1": [2 * step]})
        toy.train_step(optimizer, step)
        for k, (start, initial) in started.items():
            left = max(0.0, 1 - (step + 1 - start) / 5)
            assert norm(toy, 0, k) == pytest.approx(initial * left, rel=1e-12)


def test_float16_parameters_decay() -> None:
    layer = nn.Linear(3, 4).to(torch.float16)
    groups = [
        StructureGroup("rows", [Slice.whole(layer.weight), Slice.whole(layer.bias, name="bias")])
    ]
    optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    dpm = DecayPruning(groups, SmoothPruning(4)).attach(optimizer)
    initial = groups[0].norms()[1].item()
    dpm.decay({"rows": [1]})
    for n in range(1, 5):
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert groups[0].norms()[1].item() == pytest.approx(initial * (1 - n / 4), rel=2**-11 * 1.1)


def test_slices_of_different_precision_decay_together() -> None:
    """As with BatchNorm kept in float32 behind half-precision layers."""
    weight = nn.Parameter(torch.randn(3, 2, generator=torch.manual_seed(0)).bfloat16())
    scale = nn.Parameter(torch.ones(3))
    group = StructureGroup("rows", [Slice.whole(weight), Slice.whole(scale, batch_norm=True)])
    optimizer = SGD([weight, scale], lr=0.1)
    dpm = DecayPruning([group], SmoothPruning(4)).attach(optimizer)
    initial = group.norms()
    dpm.decay({"rows": [0, 2]})
    for n in range(1, 5):
        optimizer.step()
        expected = initial * torch.tensor([1 - n / 4, 1, 1 - n / 4])
        assert group.norms().tolist() == pytest.approx(expected.tolist(), rel=2**-8)
        assert group.norms()[1] == initial[1]


def test_a_parameter_without_a_gradient_counts_as_one_with_a_gradient_of_zero() -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups, SmoothPruning(4)).attach(optimizer)
    dpm.decay({"conv1": [2]})
    initial = norm(toy, 0, 2)
    for n in range(1, 5):
        toy.backward(optimizer, n)
        if n % 2:
            for p in toy.model.parameters():
                p.grad = None
        else:
            toy.model.bn1.weight.grad = None
        others = [toy.model.conv1.weight[3].detach().clone(), toy.model.bn1.weight[3].item()]
        optimizer.step()
        assert norm(toy, 0, 2) == pytest.approx(initial * (1 - n / 4), rel=1e-12)
        assert toy.model.bn1.weight[3].item() == others[1]
        assert same_bits(toy.model.conv1.weight[3], others[0]) == bool(n % 2)


def test_a_structure_that_the_optimizer_makes_zero_stays_zero() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = SGD([p], lr=1.0)
    dpm = DecayPruning([StructureGroup("rows", [Slice.whole(p)])], SmoothPruning(4))
    dpm.attach(optimizer).decay({"rows": [0]})
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert p.tolist() == [[0, 0], [0, 0]]
    p.grad = None
    for _ in range(3):
        optimizer.step()
    assert p.tolist() == [[0, 0], [0, 0]]
    assert dpm.phases("rows").tolist() == [Phase.PRUNED, Phase.ACTIVE]


def test_events_tell_what_happened_when_and_to_whom() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(optimizer)
    for step in range(2):
        toy.train_step(optimizer, step)
    assert dpm.events == []
    assert dpm.clock == 2
    norms = [norm(toy, 0, 1), norm(toy, 0, 4), norm(toy, 1, 0)]
    dpm.decay({"conv2": [0], "conv1": torch.tensor([4, 1])}, wave=3)
    for step in range(2):
        toy.train_step(optimizer, step)
    found = [(e.step, e.kind, e.group, e.structures, e.wave) for e in dpm.events]
    assert found == [
        (2, "decay", "conv1", (1, 4), 3),
        (2, "decay", "conv2", (0,), 3),
        (4, "prune", "conv1", (1, 4), 3),
        (4, "prune", "conv2", (0,), 3),
    ]
    assert dpm.events[0].norms == pytest.approx(norms[:2], rel=1e-12)
    assert dpm.events[1].norms == pytest.approx(norms[2:], rel=1e-12)
    assert [e.norms for e in dpm.events[2:]] == [(0.0, 0.0), (0.0,)]


def test_a_step_that_is_skipped_decays_nothing() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(4)).attach(optimizer)
    dpm.decay({"conv1": [0]})
    before = norm(toy, 0, 0)
    toy.backward(optimizer, 0)
    assert norm(toy, 0, 0) == before
    assert dpm.clock == 0


class Faulty(Optimizer):
    """Plain gradient descent that breaks down in its first step."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.broken = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.broken:
            raise OSError("no step today")
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.1)


def test_a_step_in_which_the_optimizer_fails_decays_nothing() -> None:
    toy = make("conv", torch.float64)
    optimizer = Faulty(toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(4)).attach(optimizer)
    dpm.decay({"conv1": [0]})
    before = norm(toy, 0, 0)
    toy.backward(optimizer, 0)
    with pytest.raises(OSError, match="no step today"):
        optimizer.step()
    assert norm(toy, 0, 0) == before
    assert dpm.clock == 0
    optimizer.broken = False
    optimizer.step()
    assert norm(toy, 0, 0) == pytest.approx(before * 3 / 4, rel=1e-12)
    assert dpm.clock == 1


def test_the_step_counts_go_on_where_nothing_decays() -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS["adam"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(4)).attach(optimizer)
    twin = make("conv")
    plain = OPTIMIZERS["adam"](twin.model.parameters())
    for step in range(3):
        toy.train_step(optimizer, step)
        twin.train_step(plain, step)
    assert dpm.clock == 3
    pairs = zip(toy.model.parameters(), twin.model.parameters(), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)
