"""Smooth Pruning's schedule, as a pure function."""

from __future__ import annotations

import math
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


@given(lengths, steps)
def test_a_cosine_begins_with_the_initial_norm_and_ends_with_exactly_zero(
    initial: float, n: int
) -> None:
    assert target_norm(initial, 0, n, "cosine") == initial
    ends = torch.tensor([initial, initial], dtype=torch.float64), torch.tensor([0, n])
    assert target_norm(*ends, n, "cosine").tolist() == [initial, 0]
    assert target_norm(initial, n, n, "cosine") == 0


@given(lengths, st.integers(2, 400))
def test_a_cosine_is_the_formula_and_falls(initial: float, total: int) -> None:
    run = [target_norm(initial, n, total, "cosine") for n in range(total + 1)]
    exact = [initial * (1 + math.cos(math.pi * n / total)) / 2 for n in range(total + 1)]
    assert run == pytest.approx(exact, rel=1e-9, abs=1e-14 * initial)
    assert all(later < earlier for earlier, later in pairwise(run))
    several = torch.full((total + 1,), initial, dtype=torch.float64), torch.arange(total + 1)
    assert target_norm(*several, total, "cosine").tolist() == pytest.approx(run, rel=1e-14)


def test_an_unknown_shape_is_refused() -> None:
    with says(ConfigurationError, "SmoothPruning.shape", "'square'", "linear, cosine"):
        SmoothPruning(20, shape="square")  # type: ignore[arg-type]


def test_a_linear_decay_names_itself_as_before_there_were_shapes() -> None:
    assert repr(SmoothPruning(7)) == "SmoothPruning(steps=7)"
    assert repr(SmoothPruning(7, "cosine")) == "SmoothPruning(steps=7, shape='cosine')"


@pytest.mark.parametrize("wrong", [0, -3, 2.0, "20", None, True])
def test_a_length_that_is_no_count_of_steps_is_refused(wrong: object) -> None:
    with says(ConfigurationError, "SmoothPruning.steps", repr(wrong), "at least 1"):
        SmoothPruning(steps=wrong)  # type: ignore[arg-type]


def test_the_default_length_is_twenty() -> None:
    assert SmoothPruning().steps == 20
