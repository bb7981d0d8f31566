"""Paired statistics against SciPy's t-test, against simulation, and by their symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.showing.pairs import Difference, detectable, difference

values = st.floats(0, 100)
pairs = st.dictionaries(st.integers(0, 99), st.tuples(values, values), min_size=2, max_size=30)


def split(by_seed):
    return {s: a for s, (a, _) in by_seed.items()}, {s: b for s, (_, b) in by_seed.items()}


@pytest.mark.parametrize("n", [2, 3, 5, 25, 90])
def test_the_interval_is_that_of_the_paired_t_test(n):
    draw = np.random.default_rng(n)
    one, other = draw.normal(90, 1, n), draw.normal(89.7, 1, n)
    result = difference(dict(enumerate(one.tolist())), dict(enumerate(other.tolist())))
    interval = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert result.pairs == result.networks == n
    assert result.mean == pytest.approx((one - other).mean())
    assert result.deviation == pytest.approx((one - other).std(ddof=1))
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert result.detectable == detectable(n, result.deviation)


def test_known_numbers():
    result = difference({1: 3.0, 2: 4.0, 3: 8.0}, {1: 2.0, 2: 2.0, 3: 5.0})
    assert (result.pairs, result.mean, result.deviation) == (3, 2.0, 1.0)
    # Tables of Student's t with 2 degrees of freedom: 4.3027 at 97.5%, 1.0607 at 80%.
    assert result.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert result.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert result.detectable == pytest.approx((4.3027 + 1.0607) / math.sqrt(3), abs=1e-4)


def test_seeds_that_only_one_of_them_has_are_left_out_in_any_order():
    one, other = {3: 1.0, 0: 5.0, 7: 9.0}, {0: 4.0, 1: 90.0, 3: 2.0}
    assert difference(one, other) == difference({0: 5.0, 3: 1.0}, {0: 4.0, 3: 2.0})


def test_without_a_common_seed_there_is_no_difference():
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert difference({}, {}) is None


def test_one_pair_has_a_mean_and_nothing_else():
    assert difference({4: 90.5}, {4: 90.0}) == Difference(
        1, 1, 0.5, None, None, None, None, [4], [0.5]
    )


def test_pairs_that_all_differ_by_as_much_have_no_spread():
    result = difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert result == Difference(2, 2, 1.0, 0.0, 1.0, 1.0, 0.0, [0, 1], [1.0, 1.0])


@given(pairs)
def test_exchanging_the_two_changes_the_sign(by_seed):
    one, other = split(by_seed)
    there, back = difference(one, other), difference(other, one)
    assert there.mean == -back.mean
    assert (there.low, there.high) == (-back.high, -back.low)
    assert (there.deviation, there.detectable) == (back.deviation, back.detectable)


@given(pairs, st.floats(-10, 10))
def test_a_shift_of_one_moves_the_interval_and_nothing_else(by_seed, shift):
    one, other = split(by_seed)
    plain, moved = difference(one, other), difference({s: v + shift for s, v in one.items()}, other)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name) + shift, abs=1e-8)
    for name in ("deviation", "detectable"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), abs=1e-8)


@given(pairs)
def test_the_mean_lies_in_its_interval_and_what_is_detectable_exceeds_half_of_it(by_seed):
    result = difference(*split(by_seed))
    assert result.low <= result.mean <= result.high
    assert result.detectable >= (result.high - result.low) / 2 - 1e-12


# ---------------------------------------------------------------------- shared dense networks


@given(st.data(), pairs)
def test_the_interval_is_that_of_a_t_test_on_the_means_of_the_networks(data, by_seed):
    one, other = split(by_seed)
    start = {seed: data.draw(st.integers(0, 4), label="network") for seed in by_seed}
    result = difference(one, other, start)
    groups = [[one[s] - other[s] for s in by_seed if start[s] == n] for n in range(5)]
    means = [np.mean(g) for g in groups if g]
    assert (result.pairs, result.networks) == (len(by_seed), len(means))
    assert result.mean == pytest.approx(np.mean(means), abs=1e-9)
    if len(means) == 1:
        assert result.deviation is result.low is result.high is result.detectable is None
        return
    reach = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
    assert (result.low, result.high) == pytest.approx(
        (np.mean(means) - reach, np.mean(means) + reach), abs=1e-9
    )
    assert result.deviation == pytest.approx(np.std(means, ddof=1), abs=1e-9)
    assert result.detectable == detectable(len(means), result.deviation)


@given(pairs)
def test_a_network_for_every_pair_is_the_paired_t_test_whatever_they_are_called(by_seed):
    one, other = split(by_seed)
    assert difference(one, other, {seed: -seed for seed in by_seed}) == difference(one, other)


def test_known_numbers_of_shared_networks():
    one = {0: 1.0, 1: 4.0, 2: 5.0, 3: 3.0, 4: 9.0}  # seed 4 is no pair
    result = difference(one, dict.fromkeys(range(4), 0.0), {0: 7, 1: 8, 2: 8, 3: 7})
    assert (result.pairs, result.networks, result.mean) == (4, 2, 3.25)  # means of 2.0 and 4.5
    assert result.deviation == pytest.approx(2.5 / math.sqrt(2))
    # Student's t with 1 degree of freedom: 12.706 at 97.5%.
    assert result.high - result.mean == pytest.approx(12.7062 * 1.25, abs=1e-3)


@pytest.mark.parametrize("between", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 2, 2, 2, 2, 2), (3, 2, 1), (3, 3, 2, 2, 1, 1)])
def test_simulated_intervals_hold_the_true_difference_19_times_in_20(sizes, between):
    draw, times = np.random.default_rng(0), 2_000
    start = dict(enumerate(np.repeat(range(len(sizes)), sizes).tolist()))
    inside = naive = 0
    for _ in range(times):
        shared = draw.normal(0, between, len(sizes))
        one = {s: 0.3 + shared[n] + draw.normal() for s, n in start.items()}
        other = dict.fromkeys(start, 0.0)
        result, blind = difference(one, other, start), difference(one, other)
        inside += result.low <= 0.3 <= result.high
        naive += blind.low <= 0.3 <= blind.high
    # Four standard errors of the simulation; unequal networks cost at most a point.
    within = 4 * math.sqrt(0.95 * 0.05 / times) + (0.01 if len(set(sizes)) > 1 else 0)
    assert inside / times == pytest.approx(0.95, abs=within)
    if between == 5:
        assert naive / times < 0.88, "what is corrected has to matter"


# ---------------------------------------------------------------------- power


@pytest.mark.parametrize(
    ("n", "within"), [(2, 0.07), (3, 0.035), (4, 0.017), (10, 0.002), (25, 0.001), (90, 0.001)]
)
def test_the_detectable_effect_is_found_with_a_power_of_80_percent(n, within):
    effect, spread = detectable(n, 1.7), 1.7
    centre = effect / spread * math.sqrt(n)
    power = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, centre)
    assert power == pytest.approx(0.8, abs=within)


@pytest.mark.parametrize("n", [5, 25])
def test_simulated_comparisons_find_it_four_times_in_five(n):
    draws = np.random.default_rng(0).normal(detectable(n, 0.8), 0.8, (20_000, n))
    detected = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert detected.mean() == pytest.approx(0.8, abs=0.015)


@given(st.integers(2, 200), st.floats(0.01, 10))
def test_more_pairs_find_less_and_twice_the_spread_hides_twice_as_much(n, spread):
    assert detectable(n + 1, spread) < detectable(n, spread)
    assert detectable(n, 2 * spread) == pytest.approx(2 * detectable(n, spread))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_have_no_detectable_effect(n):
    with pytest.raises(ValueError, match=f"{n} networks have no t-test; it takes 2"):
        detectable(n, 1.0)
