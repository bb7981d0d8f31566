"""Smooth Pruning's schedule, as a pure function."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpm_core import ConfigurationError, SmoothPruning, target_norm
from tests.support.snapshot import says

lengths = st.floats(1e-6, 1e6)
steps = st.integers(1, 400)


@given(lengths, steps)
def test_step_zero_gives_the_initial_norm(initial: float, n: int) -> None:
    assert target_norm(initial, 0, n) == initial


@given(lengths, steps)
def test_the_last_step_gives_exactly_zero(initial: float, n: int) -> None:
    assert target_norm(initial, n, n) == 0


@given(lengths, steps.flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_step_gives_the_formula(initial: float, step: tuple[int, int]) -> None:
    n, total = step
    exact = Fraction(initial) * (1 - Fraction(n, total))
    assert target_norm(initial, n, total) == pytest.approx(float(exact), rel=1e-14)


@given(lengths, st.integers(2, 400))
def test_the_norm_falls_with_every_step(initial: float, total: int) -> None:
    run = [target_norm(initial, n, total) for n in range(total + 1)]
    assert all(later < earlier for earlier, later in pairwise(run))


@given(st.lists(lengths, min_size=1, max_size=5), steps, st.data())
def test_a_tensor_gives_what_its_numbers_give(
    initial: list[float], total: int, data: st.DataObject
) -> None:
    n = [data.draw(st.integers(0, total)) for _ in initial]
    found = target_norm(torch.tensor(initial, dtype=torch.float64), torch.tensor(n), total)
    assert found.dtype == torch.float64
    expected = [target_norm(v, k, total) for v, k in zip(initial, n, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("wrong", [0, -3, 2.0, "20", None, True])
def test_a_length_that_is_no_count_of_steps_is_refused(wrong: object) -> None:
    with says(ConfigurationError, "SmoothPruning.steps", repr(wrong), "at least 1"):
        SmoothPruning(steps=wrong)  # type: ignore[arg-type]


def test_the_default_length_is_twenty() -> None:
    assert SmoothPruning().steps == 20
