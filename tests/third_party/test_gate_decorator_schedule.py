"""Ticks, tocks and learning rates, over all steps of small runs."""

from __future__ import annotations

import itertools

import pytest

from dpm_core.third_party.gate_decorator import (
    GateError,
    TickTock,
    Turn,
    learning_rate,
    triangle,
    turn_at,
)
from tests.support.snapshot import says


@pytest.mark.parametrize(
    "lengths", list(itertools.product((1, 3), (1, 2), (1, 2), (1, 3))), ids=str
)
def test_every_step_of_small_runs(lengths):
    steps, tick, tock, ticks = lengths
    times = TickTock(steps, tick_epochs=tick, tock_epochs=tock, ticks=ticks)
    expected, ticked = [], itertools.count()
    for tocked in range(3):
        expected += [Turn("tock", tocked, s, tock * steps) for s in range(tock * steps)]
        for _ in range(ticks):
            number = next(ticked)
            expected += [Turn("tick", number, s, tick * steps) for s in range(tick * steps)]
    assert [turn_at(s, times) for s in range(len(expected))] == expected
    for turn in expected:
        assert turn.first == (turn.step == 0)
        assert turn.last == (turn.step + 1 == turn.length)


def test_the_papers_lengths():
    times = TickTock(5)
    assert turn_at(0, times) == Turn("tock", 0, 0, 50)
    assert turn_at(49, times) == Turn("tock", 0, 49, 50)
    assert turn_at(50, times) == Turn("tick", 0, 0, 5)
    assert turn_at(99, times) == Turn("tick", 9, 4, 5)
    assert turn_at(100, times) == Turn("tock", 1, 0, 50)
    assert turn_at(150, times) == Turn("tick", 10, 0, 5)


@pytest.mark.parametrize("length", range(1, 14))
def test_every_step_of_the_triangle(length):
    rates = [triangle(s, length) for s in range(length)]
    assert rates[0] == rates[-1] == 1e-3
    assert rates == rates[::-1]
    middle = (length - 1) // 2
    climb = rates[: middle + 1]
    assert climb == sorted(climb)
    slopes = [b - a for a, b in itertools.pairwise(climb)]
    if length > 2:
        assert slopes == pytest.approx([2 * 9e-3 / (length - 1)] * middle)
    if length > 2 and length % 2:
        assert rates[middle] == max(rates) == 1e-2
    elif length > 2:
        assert rates[middle] == rates[middle + 1] == max(rates) < 1e-2
    for step in (-1, length):
        with says(GateError, "step"):
            triangle(step, length)


def test_rates_of_ticks_and_tocks():
    assert [learning_rate(Turn("tick", 0, s, 5)) for s in range(5)] == [1e-3] * 5
    tock = [learning_rate(Turn("tock", 0, s, 5), 1.0, 3.0) for s in range(5)]
    assert tock == [1, 2, 3, 2, 1]


@pytest.mark.parametrize("name", ["steps_per_epoch", "tick_epochs", "tock_epochs", "ticks"])
def test_bad_lengths_are_refused(name):
    with says(GateError, name, "at least 1"):
        TickTock(**({"steps_per_epoch": 3} | {name: 0}))
    with says(GateError, "step", "at least 0"):
        turn_at(-1, TickTock(1))
