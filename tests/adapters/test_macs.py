"""What a selection by MACs removes does not depend on how quickly it is worked out."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_core.adapters.base import AdapterError, count_macs
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.macs import MacsLeft
from dpm_core.third_party import running
from dpm_core.third_party.groups import Plan
from dpm_core.third_party.pruner import _Wholes
from experiments.inputs import models
from tests.support.networks import draw


def counted_anew(run: DepGraph, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plain way: a forward pass after each step, and all groups walked and ranked in each."""
    assert run.options.speed_up is not None
    model = running.copied(run.model)
    goal = count_macs(model, run.example) / run.options.speed_up
    with monkeypatch.context() as patch:
        patch.setattr(_Wholes, "during_run", lambda *_: nullcontext())
        plan = run._new_pruner(model).run(lambda: count_macs(model, run.example) <= goal, str)
    if count_macs(model, run.example) > goal:
        raise AdapterError("not reached")
    return plan


def assert_selects_the_same(run: DepGraph, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Returns whether something was selected."""
    try:
        expected = counted_anew(run, monkeypatch)
    except AdapterError:
        with pytest.raises(AdapterError, match="was not reached"):
            run._selected()
        return False
    assert run._selected() == expected
    return bool(expected)


def quick(model: nn.Module, example: Any, **options: Any) -> DepGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DepGraph(model, example, DepGraphOptions(**options, skip_unsupported=True))


def test_drawn_networks_lose_what_they_lose_when_counted_anew(monkeypatch):
    selected = 0
    for seed in range(24):
        drawn = draw(seed)
        importance = ("magnitude", "random", "lamp")[seed % 3]
        speed_up = (1.2, 1.5, 2.0, 3.0)[seed % 4]
        try:
            run = quick(
                drawn.model, drawn.example, speed_up=speed_up, importance=importance, steps=12
            )
        except AdapterError:
            continue
        try:
            selected += assert_selects_the_same(run, monkeypatch)
        except Exception as fault:
            fault.add_note(f"network {seed}:\n{drawn.model}")
            raise
    assert selected >= 5


LARGE = {
    "resnet56": 2.11,
    "vgg16-bn": 4.0,
    "mobilenet_v2": 1.5,
    "resnext50_32x4d": 1.2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_lose_what_they_lose_when_counted_anew(name, monkeypatch):
    torch.manual_seed(0)
    if name in models.MODELS:
        model = models.build(name, 3, 10, seed=0)
    else:
        model = getattr(pytest.importorskip("torchvision").models, name)(num_classes=5)
    options = DepGraphOptions(speed_up=LARGE[name], steps=40)
    assert assert_selects_the_same(DepGraph(model, torch.randn(2, 3, 32, 32), options), monkeypatch)


# ---------------------------------------------------------------------- where sizes mislead


class Narrowing(nn.Module):
    """Channels go one by one; the second layer has channels as rows of its input, if ``rows``."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 20, 3), nn.Linear(6, 30)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x if self.rows else x.mean(1))

    def lose_one(self) -> None:
        self.conv.weight = nn.Parameter(self.conv.weight[1:].detach().clone())
        self.conv.bias = nn.Parameter(self.conv.bias[1:].detach().clone())


IMAGES = torch.randn(1, 3, 8, 8)
STEPS = 19


def stopped_at(goal: float, rows: bool, **settings: bool) -> tuple[int, MacsLeft]:
    model = Narrowing(rows)
    macs, step = MacsLeft(model, IMAGES, goal, **settings), 0
    while not macs.reached() and step < STEPS:
        model.lose_one()
        step += 1
    return step, macs


@pytest.mark.parametrize("rows", [False, True])
def test_the_first_step_at_the_goal_is_found_or_known_to_be_missed(rows):
    model, counts = Narrowing(rows), []
    for _ in range(STEPS + 1):
        counts.append(count_macs(model, IMAGES))
        model.lose_one()
    missed = 0
    for goal in [*counts, *(c - 0.5 for c in counts)]:
        right = next((i for i, c in enumerate(counts) if c <= goal), STEPS)
        step, macs = stopped_at(goal, rows)
        if macs.missed():
            missed += 1
            step, macs = stopped_at(goal, rows, by_sizes=False)
            assert not macs.missed()
        assert (step, macs.left) == (right, counts[right])
    assert (missed > 0) == rows


def test_few_steps_are_counted_by_a_pass(monkeypatch):
    passes, probe = [], running.probe

    def noted(*given: Any, **settings: Any) -> Any:
        passes.append(1)
        return probe(*given, **settings)

    monkeypatch.setattr(running, "probe", noted)
    stopped_at(0, rows=False)
    assert len(passes) == 1 + 5  # before the first step; after 1, 2, 4, 8, 16
