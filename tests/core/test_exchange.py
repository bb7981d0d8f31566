"""An exchange against every sample run alone, and against the pairs taken one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_core import (
    ConfigurationError,
    DecayPruning,
    Evidence,
    Exchange,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    SmoothPruning,
)
from tests.core.test_hearing import one_by_one
from tests.support.snapshot import says
from tests.support.toys import OPTIMIZERS, Toy, make


def evidence(worth: list[float], group: list[int], prices: list[list[float]]) -> Evidence:
    """What an exchange looks at: prices by group, in any order."""
    none = torch.zeros(len(worth), dtype=torch.float64)
    width = max(map(len, prices))
    rows = [sorted(p) + [math.inf] * (width - len(p)) for p in prices]
    return Evidence(
        torch.tensor(group),
        none,
        none,
        none,
        worth=torch.tensor(worth, dtype=torch.float64),
        free_worth=torch.tensor(rows, dtype=torch.float64),
    )


def pairs_that_pay(worth: list[float], prices: list[float], most: int) -> set[int]:
    """The most precious against the cheapest, the next against the next, while it pays."""
    found: set[int] = set()
    by_worth = sorted(range(len(worth)), key=lambda k: -worth[k])
    for k, price in zip(by_worth[:most], sorted(prices), strict=False):
        if worth[k] <= price:
            break
        found.add(k)
    return found


@settings(max_examples=80)
@given(st.data())
def test_the_exchange_makes_the_pairs_that_pay(data: st.DataObject) -> None:
    cohorts, prices, limits = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        values = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6, unique=True)
        cohorts.append(data.draw(values))
        prices.append(data.draw(values))
        limits.append(data.draw(st.integers(0, len(prices[-1]))))
    worth = [w for cohort in cohorts for w in cohort]
    group = [g for g, cohort in enumerate(cohorts) for _ in cohort]
    found = Exchange().choose(evidence(worth, group, prices), torch.tensor(limits), 0)
    expected, start = set(), 0
    for cohort, price, limit in zip(cohorts, prices, limits, strict=True):
        expected |= {start + k for k in pairs_that_pay(cohort, price, limit)}
        start += len(cohort)
    assert set(found.nonzero().flatten().tolist()) == expected


def test_controls_of_an_exchange_release_as_many_on_its_schedule() -> None:
    heard = evidence([0.9, 0.1, 0.5, -0.2], [0, 0, 0, 0], [[0.3, 0.2, 0.0]])
    limits = torch.tensor([3])
    assert Exchange().choose(heard, limits, 0).tolist() == [True, False, True, False]
    for control in (RandomRelease(Exchange(batches=3)), LeastResistant(Exchange(batches=3))):
        assert (control.at, control.batches, control.gate, control.exchanges) == (0, 3, 1, True)
        assert int(control.choose(heard, limits, 0).sum()) == 2
    assert LeastResistant(Exchange()).choose(heard, limits, 0).tolist() == [
        False,
        True,
        False,
        True,
    ]
    draws = {
        tuple(RandomRelease(Exchange()).choose(heard, limits, step).tolist()) for step in range(60)
    }
    assert len(draws) == 6


def decayed(criterion: Any, max_share: float = 0.9) -> tuple[DecayPruning, Toy, list[Any]]:
    """One step of a decay of singles 0 and 1 and a pair, and every sample's derivatives before."""
    toy = make("shared", torch.float64, seed=5)
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    batches = iter(range(100, 200))
    dpm = DecayPruning(toy.groups, SmoothPruning(10), SelfRectifying(criterion, None, max_share))
    dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(next(batches)))
    dpm.decay({"singles": [0, 1], "pairs": [0]})
    toy.backward(optimizer, 0)
    everyone = [torch.arange(g.size) for g in toy.groups]
    rows = one_by_one(toy, everyone, [toy.batch(100), toy.batch(101)], 1.0)
    optimizer.step()
    return dpm, toy, rows


def test_worth_is_the_second_order_of_every_samples_gate() -> None:
    # Without BatchNorm samples do not see one another in training mode either.
    dpm, toy, rows = decayed(Exchange(batches=2))
    assert dpm.heard == 2
    expected = [sum(d * d for d in r) / len(r) / 2 - sum(r) / len(r) for r in rows]
    found = [w for g in toy.groups for w in dpm.worth(g.name).tolist()]
    assert found == pytest.approx(expected, rel=1e-9)
    assert min(abs(w) for w in expected) > 0


def test_the_exchange_falls_in_the_first_step_and_leaves_the_released_whole() -> None:
    dpm, toy, _ = decayed(Exchange(batches=2))
    worth = dpm.worth("singles")
    assert worth is not None
    # Of two at most one, and it is worth more than what stays, or the test shows nothing.
    assert float(worth[:2].max()) > float(worth[2:].min())
    release = [e for e in dpm.events if e.kind == "release"]
    assert [(e.step, e.group, e.structures) for e in release] == [
        (1, "singles", (int(worth[:2].argmax()),))
    ]
    # It gets its norm at the start of the decay, whatever the step made of it.
    kept = release[0].structures[0]
    start = next(e for e in dpm.events if e.kind == "decay" and e.group == "singles")
    norm = float(next(g for g in toy.groups if g.name == "singles").norms()[kept])
    assert norm == pytest.approx(start.norms[start.structures.index(kept)], rel=1e-12)


def test_nothing_is_exchanged_where_nothing_would_be_gained() -> None:
    """Those that are worth least by an exchange's own count decay already."""
    first, toy, _ = decayed(Exchange(batches=2))
    cheapest = {}
    for group in toy.groups:
        worth = first.worth(group.name)
        assert worth is not None
        cheapest[group.name] = worth.argsort()[: group.size // 2].tolist()
    again = make("shared", torch.float64, seed=5)
    optimizer = OPTIMIZERS["sgd"](again.model.parameters())
    batches = iter(range(100, 200))
    dpm = DecayPruning(again.groups, SmoothPruning(10), SelfRectifying(Exchange(2), None, 0.9))
    dpm.attach(optimizer, model=again.model, loss=lambda: again.loss(next(batches)))
    dpm.decay(cheapest)
    again.backward(optimizer, 0)
    optimizer.step()
    assert dpm.heard == 2
    assert [e.kind for e in dpm.events] == ["decay"] * len(cheapest)


def test_other_criteria_tell_no_worth() -> None:
    assert decayed(Exchange(2))[0].worth("singles") is not None
    for criterion in (None, RandomRelease()):
        toy = make("shared", torch.float64)
        rectify = None if criterion is None else SelfRectifying(criterion)
        assert DecayPruning(toy.groups, SmoothPruning(10), rectify).worth("singles") is None


@pytest.mark.parametrize("at", [-0.1, 1.0, math.nan])
def test_an_exchange_may_fall_anywhere_before_the_end(at: float) -> None:
    assert SelfRectifying(Exchange()).decision_step(20) == 1
    assert SelfRectifying(Exchange(), at=0.5).decision_step(20) == 10
    with says(ConfigurationError, "SelfRectifying.at", "[0, 1)"):
        SelfRectifying(Exchange(), at=at)


def test_an_exchange_needs_a_step_before_the_end_and_no_more() -> None:
    assert SelfRectifying(Exchange()).decision_step(2) == 1
    with says(ConfigurationError, "at least 2 steps", "not 1", "SmoothPruning.steps"):
        SelfRectifying(Exchange()).decision_step(1)


@pytest.mark.parametrize("batches", [0, 1.5, True])
def test_an_exchange_hears_whole_batches(batches: Any) -> None:
    with says(ConfigurationError, "Exchange.batches", "at least 1"):
        Exchange(batches)
