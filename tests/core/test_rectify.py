"""Self-Rectifying's criteria as pure functions of the evidence, and its settings."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_core import (
    ConfigurationError,
    Criterion,
    Evidence,
    Hearing,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    Trajectory,
)
from dpm_core.rectify import strongest
from tests.support import oracle
from tests.support.snapshot import says

# Values on a coarse grid, so that a score is either equal to a threshold or far from it.
signed = st.integers(-40, 40).map(lambda i: i / 8)
positive = st.integers(1, 40).map(lambda i: i / 8)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[int], Tensor]:
    """Structures' groups, every group with at least one, and the groups' limits."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    group = draw(st.permutations([g for g, size in enumerate(sizes) for _ in range(size)]))
    limits = [draw(st.integers(0, size)) for size in sizes]
    return list(group), torch.tensor(limits)


def many(draw: st.DrawFn, values: st.SearchStrategy[float], count: int) -> list[float]:
    return draw(st.lists(values, min_size=count, max_size=count))


def typical(group: list[int], resistance: Tensor) -> Tensor:
    """Mean |resistance| of each structure's group, where nothing has decayed before these."""
    sizes = [abs(r) for r in resistance.tolist()]
    members = {g: [r for h, r in zip(group, sizes, strict=True) if h == g] for g in group}
    means = [math.fsum(members[g]) / len(members[g]) for g in group]
    return torch.tensor(means, dtype=torch.float64)


@st.composite
def evidences(draw: st.DrawFn) -> tuple[Evidence, Tensor]:
    group, limits = draw(cohorts())
    count = len(group)
    gradient = torch.tensor(many(draw, positive, count), dtype=torch.float64)
    # |R_k| is never above ||g_k|| L_init.
    cosine = torch.tensor(many(draw, signed, count), dtype=torch.float64) / 5
    derivative = torch.tensor(many(draw, signed, count), dtype=torch.float64)
    spread = torch.tensor(many(draw, positive, count), dtype=torch.float64)
    evidence = Evidence(
        torch.tensor(group),
        cosine * gradient,
        gradient,
        typical(group, cosine * gradient),
        derivative,
        derivative.square() + spread,
    )
    return evidence, limits


def everybody(
    *resistance: float, group: list[int] | None = None, gradient: float = 1.0
) -> Evidence:
    count = len(resistance)
    return Evidence(
        torch.tensor(group or [0] * count),
        torch.tensor(resistance, dtype=torch.float64),
        torch.full((count,), gradient, dtype=torch.float64),
        typical(group or [0] * count, torch.tensor(resistance, dtype=torch.float64)),
    )


def chosen(criterion: Criterion, evidence: Evidence, *limits: int, step: int = 0) -> list[int]:
    found = criterion.choose(evidence, torch.tensor(limits), step)
    assert found.dtype == torch.bool
    assert found.shape == evidence.group.shape
    return found.nonzero().flatten().tolist()


CRITERIA = [
    Trajectory(),
    Trajectory(rate=-1, length=-100),
    Hearing(),
    Hearing(threshold=-1),
    RandomRelease(),
    RandomRelease(Hearing(threshold=-1)),
    LeastResistant(Trajectory(rate=-1, length=-100)),
]

# ---------------------------------------------------------------------- strongest


@given(cohorts(), st.data())
def test_strongest_takes_the_best_of_each_group(
    cohort: tuple[list[int], Tensor], data: st.DataObject
) -> None:
    group, limits = cohort
    # Distinct scores: what happens among equals is another test's affair.
    score = data.draw(st.permutations([float(i) for i in range(len(group))]))
    candidates = data.draw(st.lists(st.booleans(), min_size=len(group), max_size=len(group)))
    found = strongest(
        torch.tensor(score, dtype=torch.float64),
        torch.tensor(candidates),
        torch.tensor(group),
        limits,
    )
    expected: set[int] = set()
    for g, limit in enumerate(limits.tolist()):
        mine = {k: score[k] for k in range(len(group)) if group[k] == g and candidates[k]}
        expected |= oracle.strongest(mine, limit)
    assert set(found.nonzero().flatten().tolist()) == expected


def test_strongest_fills_the_limit_among_equals() -> None:
    found = strongest(
        torch.zeros(5, dtype=torch.float64),
        torch.tensor([False, True, True, True, True]),
        torch.zeros(5, dtype=torch.int64),
        torch.tensor([3]),
    )
    assert int(found.sum()) == 3
    assert not found[0]


def test_a_candidate_outranks_one_that_is_not_however_low_its_score() -> None:
    found = strongest(
        torch.tensor([5.0, -1e300], dtype=torch.float64),
        torch.tensor([False, True]),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([1]),
    )
    assert found.tolist() == [False, True]


# ---------------------------------------------------------------------- every criterion


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@settings(max_examples=25)
@given(found=evidences(), step=st.integers(0, 10_000))
def test_no_criterion_exceeds_its_limits(
    criterion: Criterion, found: tuple[Evidence, Tensor], step: int
) -> None:
    evidence, limits = found
    released = criterion.choose(evidence, limits, step)
    counts = torch.bincount(evidence.group[released], minlength=limits.numel())
    assert bool((counts <= limits).all())


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@settings(max_examples=25)
@given(found=evidences(), step=st.integers(0, 10_000))
def test_a_criterion_changes_nothing_of_its_evidence_and_repeats_itself(
    criterion: Criterion, found: tuple[Evidence, Tensor], step: int
) -> None:
    evidence, limits = found
    before = {name: t.clone() for name, t in vars(evidence).items() if t is not None}
    state = torch.get_rng_state()
    first = criterion.choose(evidence, limits, step)
    assert torch.equal(first, criterion.choose(evidence, limits, step))
    assert len(before) == 6
    assert all(torch.equal(t, getattr(evidence, name)) for name, t in before.items())
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------- trajectory


@settings(max_examples=70)
@given(
    cohorts(),
    st.integers(1, 4),
    st.sampled_from([-1.0, -0.013, 0.051, 0.31]),
    st.sampled_from([-1.7, 0.3131, 1.0301, 1.5103]),
    st.data(),
)
def test_trajectory_releases_what_the_oracle_releases(
    cohort: tuple[list[int], Tensor],
    steps: int,
    t_rate: float,
    t_len: float,
    data: st.DataObject,
) -> None:
    group, limits = cohort
    cases: dict[int, tuple[list[float], list[float], float]] = {}
    for k in range(len(group)):
        # An offset per structure keeps scores apart, so that nothing hangs on rounding.
        r = [data.draw(signed) + 1e-3 * k for _ in range(steps)]
        g = [abs(v) + data.draw(positive) for v in r]
        cases[k] = (r, g, 0.5)
    resistance = torch.tensor([math.fsum(r) for r, _, _ in cases.values()], dtype=torch.float64)
    evidence = Evidence(
        torch.tensor(group),
        resistance,
        torch.tensor([math.fsum(g) * i for _, g, i in cases.values()], dtype=torch.float64),
        typical(group, resistance),
    )
    expected: set[int] = set()
    for g, limit in enumerate(limits.tolist()):
        mine = {k: case for k, case in cases.items() if group[k] == g}
        expected |= oracle.trajectory(mine, t_rate, t_len, limit)
    assert set(chosen(Trajectory(t_rate, t_len), evidence, *limits.tolist())) == expected


def test_trajectory_releases_the_strongest_not_the_first() -> None:
    evidence = everybody(2.0, 0.1, 0.1, 3.0, 0.1, 0.1, gradient=4.0)
    assert chosen(Trajectory(), evidence, 1) == [3]
    assert chosen(Trajectory(), evidence, 2) == [0, 3]


def test_trajectory_needs_the_direction_as_well_as_the_strength() -> None:
    evidence = Evidence(
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([1.0, 0.1, 0.1], dtype=torch.float64),
        torch.tensor([50.0, 1.0, 1.0], dtype=torch.float64),
        torch.full((3,), 0.4, dtype=torch.float64),
    )
    assert chosen(Trajectory(rate=0.05, length=1.5), evidence, 3) == []
    assert chosen(Trajectory(rate=0.01, length=1.5), evidence, 3) == [0]


def test_trajectory_needs_the_strength_as_well_as_the_direction() -> None:
    evidence = everybody(0.9, 0.9, 0.9)
    assert chosen(Trajectory(rate=0.05, length=1.5), evidence, 3) == []
    assert chosen(Trajectory(rate=0.05, length=0.5), evidence, 3) == [0, 1, 2]


def test_a_structure_at_a_threshold_does_not_exceed_it() -> None:
    evidence = everybody(1.0, -1.0, gradient=2.0)
    assert chosen(Trajectory(rate=0.5, length=0.9), evidence, 1) == []
    assert chosen(Trajectory(rate=0.4, length=1.0), evidence, 1) == []
    assert chosen(Trajectory(rate=0.4, length=0.9), evidence, 1) == [0]


def test_trajectory_is_free_of_the_scale_of_the_loss() -> None:
    small = everybody(2e-9, 1e-10, 1e-10, gradient=4e-9)
    large = everybody(2e9, 1e8, 1e8, gradient=4e9)
    assert chosen(Trajectory(), small, 1) == chosen(Trajectory(), large, 1) == [0]


def test_trajectory_compares_within_a_group_only() -> None:
    # Beside the loud group everyone in the quiet one would look weak.
    evidence = everybody(0.02, 0.001, 0.001, 90.0, 80.0, 85.0, group=[0, 0, 0, 1, 1, 1])
    assert chosen(Trajectory(rate=0.01), evidence, 3, 3) == [0]


def test_trajectory_releases_nobody_where_no_gradient_was_seen() -> None:
    assert chosen(Trajectory(), everybody(0.0, 0.0, gradient=0.0), 2) == []


# ---------------------------------------------------------------------- hearing


@settings(max_examples=60)
@given(st.lists(st.lists(signed, min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_hearing_score_is_the_oracles(samples: list[list[float]]) -> None:
    derivatives = torch.tensor(samples, dtype=torch.float64)
    count = len(samples)
    evidence = Evidence(
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
        derivatives.mean(1),
        derivatives.square().mean(1),
    )
    expected = [oracle.hearing_score(row) for row in samples]
    assert Hearing().score(evidence).tolist() == pytest.approx(expected, abs=1e-12)


def heard(derivative: list[float], fisher: list[float]) -> Evidence:
    none = torch.zeros(len(derivative), dtype=torch.float64)
    return Evidence(
        torch.zeros(len(derivative), dtype=torch.int64),
        none,
        none,
        none,
        torch.tensor(derivative, dtype=torch.float64),
        torch.tensor(fisher, dtype=torch.float64),
    )


def test_hearing_releases_those_whose_return_lowers_the_loss_most() -> None:
    evidence = heard([-0.1, 0.9, -0.8, -0.5, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert chosen(Hearing(), evidence, 1) == [2]
    assert chosen(Hearing(), evidence, 2) == [2, 3]
    # A score of 0.1 is at the threshold, and those of 0 and -0.9 are below it.
    assert chosen(Hearing(), evidence, 5) == [2, 3]


def test_hearing_weighs_the_mean_against_the_spread() -> None:
    assert chosen(Hearing(), heard([-1.0, -0.5], [100.0, 0.3]), 1) == [1]


# ---------------------------------------------------------------------- controls


@settings(max_examples=60)
@given(
    evidences(),
    st.sampled_from([Trajectory(-1, 0.2), Hearing(threshold=-0.2)]),
    st.integers(0, 2**40),
)
def test_controls_release_as_many_of_each_group_as_their_criterion(
    found: tuple[Evidence, Tensor], like: Criterion, step: int
) -> None:
    evidence, limits = found
    wanted = Counter(evidence.group[like.choose(evidence, limits, step)].tolist())
    for control in (RandomRelease(like), RandomRelease(like, seed=7), LeastResistant(like)):
        released = evidence.group[control.choose(evidence, limits, step)].tolist()
        assert Counter(released) == wanted


def test_random_release_depends_on_seed_and_step_and_on_nothing_else() -> None:
    evidence = everybody(*[1.0] * 40, gradient=1.0)
    like = Trajectory(rate=-1, length=-1)

    def draw(seed: int, step: int) -> list[int]:
        torch.manual_seed(seed + step)  # the global generator plays no part
        return chosen(RandomRelease(like, seed), evidence, 10, step=step)

    with torch.random.fork_rng(devices=[]):
        assert draw(0, 5) == draw(0, 5)
        different = {tuple(draw(seed, step)) for seed in range(4) for step in range(4)}
    assert len(different) == 16


def test_random_release_gives_everyone_the_same_chance() -> None:
    evidence = everybody(*[1.0] * 5)
    like = Trajectory(rate=-1, length=-1)
    draws = Counter(
        k for step in range(1000) for k in chosen(RandomRelease(like), evidence, 1, step=step)
    )
    # 200 each; seven standard deviations are 89.
    assert all(abs(draws[k] - 200) < 89 for k in range(5))


def test_random_release_draws_structures_that_its_criterion_would_not_release() -> None:
    evidence = everybody(9.0, *[0.1] * 9, gradient=10.0)
    first = {chosen(RandomRelease(), evidence, 1, step=s)[0] for s in range(100)}
    assert first == set(range(10))


def test_least_resistant_releases_the_opposite_end() -> None:
    evidence = everybody(3.0, -2.0, 0.1, -1.0, 0.0, gradient=4.0)
    assert chosen(LeastResistant(Trajectory(-1, -9)), evidence, 2) == [1, 3]


def test_least_resistant_goes_by_the_hearing_where_there_was_one() -> None:
    evidence = heard([-0.9, 0.2, 0.8], [1.0, 1.0, 1.0])
    assert chosen(LeastResistant(Hearing()), evidence, 1) == [2]


@pytest.mark.parametrize("control", [RandomRelease, LeastResistant])
def test_controls_keep_the_schedule_and_the_cost_of_their_criterion(
    control: type[RandomRelease] | type[LeastResistant],
) -> None:
    like = Hearing(batches=7, gate=0.01)
    copy = control(like)
    assert (copy.at, copy.batches, copy.gate) == (like.at, 7, 0.01)
    assert (control().at, control().batches) == (Trajectory().at, 0)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("share", [None, 0.75, 0.76, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999999])
@pytest.mark.parametrize("criterion", [Trajectory(), Hearing(), RandomRelease(Hearing())])
def test_the_decision_falls_after_three_quarters_and_before_the_end(
    share: float | None, criterion: Criterion
) -> None:
    policy = SelfRectifying(criterion, at=share)
    wanted = Fraction(str(criterion.at if share is None else share))
    for steps in range(4, 201):
        step = policy.decision_step(steps)
        assert math.ceil(Fraction(3, 4) * steps) <= step <= steps - 1
        assert step == min(math.ceil(wanted * steps), steps - 1)


@given(st.integers(4, 200), st.floats(0.75, 1, exclude_max=True))
def test_any_share_and_length_keep_the_decision_in_range(steps: int, share: float) -> None:
    step = SelfRectifying(at=share).decision_step(steps)
    assert math.ceil(Fraction(3, 4) * steps) <= step <= steps - 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_decay_too_short_for_a_decision_is_refused(steps: int) -> None:
    with says(ConfigurationError, "at least 4", str(steps), "SmoothPruning.steps"):
        SelfRectifying().decision_step(steps)


class Early(Criterion):
    """Somebody's own, which would decide before there is evidence."""

    at = 0.5

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        return torch.zeros_like(evidence.group, dtype=torch.bool)


def test_a_criterion_that_decides_too_early_is_refused() -> None:
    with says(ConfigurationError, "0.5", "[0.75, 1)"):
        SelfRectifying(Early())


WRONG = [
    (lambda: Trajectory(rate=1.1), "Trajectory.rate", "-1 to 1"),
    (lambda: Trajectory(rate=-1.1), "Trajectory.rate", "-1 to 1"),
    (lambda: Trajectory(rate=math.nan), "Trajectory.rate", "-1 to 1"),
    (lambda: Trajectory(length=math.inf), "Trajectory.length", "finite"),
    (lambda: Trajectory(length=math.nan), "Trajectory.length", "finite"),
    (lambda: Hearing(batches=0), "Hearing.batches", "at least 1"),
    (lambda: Hearing(batches=2.0), "Hearing.batches", "at least 1"),
    (lambda: Hearing(batches=True), "Hearing.batches", "at least 1"),
    (lambda: Hearing(threshold=1.5), "Hearing.threshold", "-1 to 1"),
    (lambda: Hearing(threshold=math.nan), "Hearing.threshold", "-1 to 1"),
    (lambda: Hearing(gate=0.0), "Hearing.gate", "above 0"),
    (lambda: Hearing(gate=1.5), "Hearing.gate", "at most 1"),
    (lambda: Hearing(gate=math.nan), "Hearing.gate", "above 0"),
    (lambda: SelfRectifying("trajectory"), "SelfRectifying.criterion", "Trajectory()"),
    (lambda: SelfRectifying(Trajectory), "SelfRectifying.criterion", "Trajectory()"),
    (lambda: SelfRectifying(at=0.7), "SelfRectifying.at", "[0.75, 1)"),
    (lambda: SelfRectifying(at=1.0), "SelfRectifying.at", "[0.75, 1)"),
    (lambda: SelfRectifying(at=math.nan), "SelfRectifying.at", "[0.75, 1)"),
    (lambda: SelfRectifying(max_share=0.0), "SelfRectifying.max_share", "above 0"),
    (lambda: SelfRectifying(max_share=1.1), "SelfRectifying.max_share", "at most 1"),
    (lambda: SelfRectifying(max_share=math.nan), "SelfRectifying.max_share", "at most 1"),
    (lambda: SelfRectifying(restore="all"), "SelfRectifying.restore", "'keep' or 'effect'"),
    (lambda: SelfRectifying(waves=0), "SelfRectifying.waves", "at least 1"),
    (lambda: SelfRectifying(waves=1.0), "SelfRectifying.waves", "at least 1"),
    (lambda: SelfRectifying(waves=True), "SelfRectifying.waves", "at least 1"),
]


@pytest.mark.parametrize(("make", "culprit", "remedy"), WRONG)
def test_every_setting_out_of_range_is_refused(make, culprit: str, remedy: str) -> None:
    with says(ConfigurationError, culprit, remedy):
        make()
