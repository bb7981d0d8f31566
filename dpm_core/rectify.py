"""Self-Rectifying (SR): which decaying structures are released.

The paper (arXiv 2406.03879, section on self-rectifying) releases a structure whose gradients
exceed two thresholds, T_rate and T_len. Its exact formulas are not available to us: what stands
here is our reading, and where a constant is ours the docstring says so.

For one structure and decay step k let x be its parameters, g the gradient of the loss by x, and

    R_k = L_init <-g_k, x_k> / ||x_k||,

minus the derivative of the loss by the decay factor. Positive R means that training resists.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .decay import SmoothPruning
from .errors import ConfigurationError


@dataclass(frozen=True)
class Evidence:
    """What is known of C structures when their decision falls. All tensors on the host, float64.

    Attributes:
        group: (C,) int64, the number of each structure's group.
        resistance: (C,) sum of R_k over the decay steps so far, in units of the loss.
        gradient: (C,) sum of ||g_k|| L_init over the same steps, the bound of ``resistance``.
        typical: (C,) mean ``|resistance|``, over as many steps, of all structures of the group that
            have decayed so far.
        derivative: (C,) mean over samples of the loss's derivative by the structure's gate, or
            ``None`` where no hearing was run.
        fisher: (C,) mean over samples of that derivative's square, or ``None``.
        worth: (C,) :meth:`DecayPruning.worth <dpm_core.DecayPruning.worth>` of the structures, for
            a criterion that exchanges, or ``None``.
        free_worth: (G, M) the worth of the structures of each group that could be decayed in place
            of released ones, in ascending order and filled up with infinity, or ``None``.
    """

    group: Tensor
    resistance: Tensor
    gradient: Tensor
    typical: Tensor
    derivative: Tensor | None = None
    fisher: Tensor | None = None
    worth: Tensor | None = None
    free_worth: Tensor | None = None


def ranks(score: Tensor, candidates: Tensor, group: Tensor, groups: int) -> Tensor:
    """Each structure's place in its group, from the highest score on, candidates before others.

    Args:
        score: (C,) float.
        candidates: (C,) bool.
        group: (C,) int64, 0 to ``groups`` - 1.
        groups: G.

    Returns:
        (C,) int64, 0 for the first of each group.
    """
    by_score = torch.where(candidates, score, -math.inf).argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    counts = torch.bincount(group, minlength=groups)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(group)
    rank[order] = torch.arange(group.numel(), device="cpu") - starts[group[order]]
    return rank


def strongest(score: Tensor, candidates: Tensor, group: Tensor, limits: Tensor) -> Tensor:
    """Of each group, the candidates with the highest scores, up to the group's limit.

    Args:
        score: (C,) float; higher goes first.
        candidates: (C,) bool; others are never chosen.
        group: (C,) int64, 0 to G - 1.
        limits: (G,) int64, how many may be chosen of each group.

    Returns:
        (C,) bool, the chosen ones.
    """
    rank = ranks(score, candidates, group, limits.numel())
    return candidates & (rank < limits[group])


class Criterion(ABC):
    """One way to choose which structures are released: a pure function of the evidence."""

    at: float = 0.75
    """When the decision falls unless :class:`SelfRectifying` says otherwise, as a share of N."""
    earliest: float = 0.75
    """When it may fall at the earliest."""
    batches: int = 0
    """How many batches the decision's hearing runs; 0 for none."""
    gate: float = 1e-3
    """What a hearing sets the gates of decaying structures to."""
    exchanges: bool = False
    """Whether the hearing chooses what is decayed in place of released structures, too."""

    @abstractmethod
    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """Choose the structures to release.

        Args:
            evidence: of C structures whose decision falls together.
            limits: (G,) int64, how many may be released of each group.
            step: the count of optimizer steps so far; for what needs a seed.

        Returns:
            (C,) bool, never more than the limits. Anything else stops the step with a
            ConfigurationError, before it has changed anything.
        """


@dataclass(frozen=True)
class Trajectory(Criterion):
    """Our reading of the paper's two criteria: the gradients seen while the structure decays.

    C_rate, the direction: sum R_k / sum(||g_k|| L_init), a gradient-weighted mean cosine in
    [-1, 1]. C_len, the strength: the structure's mean R over the mean ``|mean R|`` of the
    structures of its group that have decayed so far (itself among them), so that the loss's scale
    cancels. Both must exceed their thresholds; the strongest C_len goes first. Costs nothing beyond
    the step.

    Attributes:
        rate: T_rate. The default of 0.05 is ours.
        length: T_len. The default of 1.5 is ours.
    """

    rate: float = 0.05
    length: float = 1.5

    def __post_init__(self) -> None:
        if not -1 <= self.rate <= 1:
            raise ConfigurationError(
                f"Trajectory.rate is {self.rate!r}; it bounds a cosine: give -1 to 1"
            )
        if not math.isfinite(self.length):
            raise ConfigurationError(f"Trajectory.length is {self.length!r}; give a finite number")

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """See :meth:`Criterion.choose`."""
        tiny = torch.finfo(torch.float64).tiny
        rate = evidence.resistance / evidence.gradient.clamp_min(tiny)
        length = evidence.resistance / evidence.typical.clamp_min(tiny)
        resists = (rate > self.rate) & (length > self.length)
        return strongest(length, resists, evidence.group, limits)


@dataclass(frozen=True)
class Hearing(Criterion):
    """Ours, not the paper's: a late look at what each structure would do if it came back.

    Once, without updating anything, every decaying structure is gated to nearly zero and a few
    batches are run. With the per-sample derivative d of the loss by the structure's gate, the
    score is -mean(d) / sqrt(mean(d^2)), in [-1, 1]; times the square root of the number of samples
    it is close to a t statistic. Needs ``model`` and ``loss`` at
    :meth:`~dpm_core.DecayPruning.attach`, and owners in every group. Its batches count as
    training steps wherever variants are compared.

    Attributes:
        batches: how many batches are run. 4 to 8 are enough; the default is ours.
        threshold: a score at or below it never releases. The default is ours.
        gate: what the gate is set to. Not exactly zero, where a ReLU passes no derivative.
    """

    batches: int = 4
    threshold: float = 0.1
    gate: float = 1e-3
    at: float = field(default=0.9, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_batches(self)
        if not -1 <= self.threshold <= 1:
            raise ConfigurationError(
                f"Hearing.threshold is {self.threshold!r}; scores lie in -1 to 1"
            )
        if not 0 < self.gate <= 1:
            raise ConfigurationError(f"Hearing.gate is {self.gate!r}; give above 0, at most 1")

    def score(self, evidence: Evidence) -> Tensor:
        """-mean / root of mean square of the gate's derivative, (C,), in [-1, 1]."""
        assert evidence.derivative is not None
        assert evidence.fisher is not None
        tiny = torch.finfo(torch.float64).tiny
        return -evidence.derivative / evidence.fisher.clamp_min(tiny).sqrt()

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """See :meth:`Criterion.choose`."""
        score = self.score(evidence)
        return strongest(score, score > self.threshold, evidence.group, limits)


@dataclass(frozen=True)
class Exchange(Criterion):
    """Ours, not the paper's: a second opinion on the ranking, before anything is lost.

    In the first step of the decay, without gating or updating anything, a few batches are run, and
    the per-sample derivative d of the loss by a gate of one on each structure is read, of those
    that decay as of those that stay. To second order, with the mean of d^2 for the curvature, a
    structure is worth mean(d^2) / 2 - mean(d): so much higher would the loss be without it (optimal
    brain damage and its Fisher form, applied to gates). In each group, the decaying structure that
    is worth most is compared with the one that is worth least of those that stay, the next with the
    next, and where the decaying one is worth more, it is released and the other one decays.

    It pays where the framework's ranking is poor, and not where it is good: see RESULTS.md. Needs
    ``model`` and ``loss`` at :meth:`~dpm_core.DecayPruning.attach`, owners in every group, and a
    ``refill`` there, or a loop that decays the cheapest by :meth:`~dpm_core.DecayPruning.worth`.
    With :attr:`SelfRectifying.max_share` at its default it may change little; 0.9 is what was
    tried. Its batches count as training steps wherever variants are compared.

    Attributes:
        batches: how many batches are run. The default is ours.
    """

    batches: int = 4
    at: float = field(default=0.0, init=False, repr=False)
    earliest: float = field(default=0.0, init=False, repr=False)
    gate: float = field(default=1.0, init=False, repr=False)
    exchanges: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_batches(self)

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """See :meth:`Criterion.choose`."""
        assert evidence.worth is not None
        assert evidence.free_worth is not None
        everyone = torch.ones_like(evidence.worth, dtype=torch.bool)
        # The n-th from above is compared with the n-th from below. Both lists are sorted, so the
        # pairs that gain are the first ones.
        rank = ranks(evidence.worth, everyone, evidence.group, limits.numel())
        rank_or_last = rank.clamp(max=evidence.free_worth.shape[1] - 1)
        instead = evidence.free_worth[evidence.group, rank_or_last]
        return (rank < limits[evidence.group]) & (evidence.worth > instead)


@dataclass(frozen=True)
class RandomRelease(Criterion):
    """Control: releases as many as another criterion would, drawn at random.

    Attributes:
        like: the criterion whose number and schedule are copied.
        seed: of the draw. Together with the step it fixes the draw, so a resumed run repeats it.
    """

    like: Criterion = field(default_factory=Trajectory)
    seed: int = 0

    def __post_init__(self) -> None:
        _copy_schedule(self)

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """See :meth:`Criterion.choose`."""
        counts = _counts(self.like, evidence, limits, step)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        score = torch.rand(
            evidence.group.numel(), generator=draw, dtype=torch.float64, device="cpu"
        )
        return strongest(score, torch.ones_like(score, dtype=torch.bool), evidence.group, counts)


@dataclass(frozen=True)
class LeastResistant(Criterion):
    """Control: releases as many as another criterion would, those that resist least.

    Attributes:
        like: the criterion whose number, schedule and evidence are copied.
    """

    like: Criterion = field(default_factory=Trajectory)

    def __post_init__(self) -> None:
        _copy_schedule(self)

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """See :meth:`Criterion.choose`."""
        counts = _counts(self.like, evidence, limits, step)
        resistance = evidence.resistance
        if evidence.worth is not None:
            resistance = evidence.worth
        elif evidence.derivative is not None:
            resistance = -evidence.derivative
        everyone = torch.ones_like(resistance, dtype=torch.bool)
        return strongest(-resistance, everyone, evidence.group, counts)


def require_settings(smooth: object, rectify: object) -> None:
    """Refuse what is given in place of a SmoothPruning and a SelfRectifying.

    Raises:
        ConfigurationError: naming the argument, and what it takes.
    """
    if isinstance(smooth, SelfRectifying) or isinstance(rectify, SmoothPruning):
        raise ConfigurationError(
            "smooth and rectify have changed places; give a SmoothPruning first, or both by name"
        )
    if not isinstance(smooth, SmoothPruning | None):
        steps = smooth if type(smooth) is int and smooth > 0 else 20
        raise ConfigurationError(f"smooth is {smooth!r}; give SmoothPruning({steps}), or None")
    if not isinstance(rectify, SelfRectifying | None):
        criterion = f"{type(rectify).__name__}(...)" if isinstance(rectify, Criterion) else ""
        raise ConfigurationError(
            f"rectify is {rectify!r}; give SelfRectifying({criterion}), or None"
        )


def _require_batches(criterion: Hearing | Exchange) -> None:
    batches = criterion.batches
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ConfigurationError(
            f"{type(criterion).__name__}.batches is {batches!r}; give an integer of at least 1"
        )


def _copy_schedule(control: RandomRelease | LeastResistant) -> None:
    if not isinstance(control.like, Criterion):
        raise ConfigurationError(
            f"{type(control).__name__}.like is {control.like!r}; give a Criterion, such as "
            "Trajectory() or Hearing()"
        )
    for setting in ("at", "earliest", "batches", "gate", "exchanges"):
        object.__setattr__(control, setting, getattr(control.like, setting))


def require_choice(
    criterion: Criterion,
    chosen: object,
    group: Tensor,
    limits: Tensor,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Refuse what a criterion must not choose.

    Args:
        criterion: whose choice it is.
        chosen: what it returned.
        group: (C,) int64, the number of each structure's group.
        limits: (G,) int64, how many may be released of each group.
        names: of the groups, for the message.

    Returns:
        ``chosen``, (C,) bool on the host.

    Raises:
        ConfigurationError: it is no bool tensor of one entry per structure, or releases more of a
            group than its limit.
    """
    kind = type(criterion).__name__
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != group.shape:
        given = type(chosen).__name__
        if isinstance(chosen, Tensor):
            given = f"{chosen.dtype} of shape {tuple(chosen.shape)}"
        raise ConfigurationError(
            f"{kind}.choose returned {given}; return a torch.bool tensor of shape "
            f"{tuple(group.shape)}, True for each structure to release"
        )
    chosen = chosen.detach().cpu()
    counts = torch.bincount(group[chosen], minlength=limits.numel())
    for i in (counts > limits).nonzero().flatten().tolist():
        name = f"group {names[i]!r}" if names is not None else f"group number {i}"
        raise ConfigurationError(
            f"{kind}.choose releases {int(counts[i])} structures of {name}, where at most "
            f"{int(limits[i])} may be released; keep to its limits (SelfRectifying.max_share, and "
            "as many as others can replace)"
        )
    return chosen


def _counts(like: Criterion, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
    chosen = like.choose(evidence, limits.clone(), step)
    chosen = require_choice(like, chosen, evidence.group, limits)
    return torch.bincount(evidence.group[chosen], minlength=limits.numel())


@dataclass(frozen=True)
class SelfRectifying:
    """When a decision may be taken back, and how.

    Attributes:
        criterion: chooses the structures to release.
        at: when the decision falls, as a share of N, from the criterion's ``earliest`` (0.75, or 0
            for :class:`Exchange`) to below 1; ``None`` takes the criterion's. It never falls at
            n = N, where a zero structure has an exactly zero gradient.
        max_share: at most this share of the structures of a group whose decision has fallen so
            far is released, rounded down. The default of 0.15 is ours.
        restore: what becomes of a released structure's norm. ``"keep"``: it stays where the decay
            left it. ``"effect"``: its BatchNorm part (all of it, where there is none) returns to
            its norm at the start of the decay; restoring the whole vector's norm would overshoot.
        waves: in how many waves of decays structures may be released. 1: those that decay in place
            of released ones are not released, so that all of it takes less than 2 N steps.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    criterion: Criterion = field(default_factory=Trajectory)
    at: float | None = None
    max_share: float = 0.15
    restore: Literal["keep", "effect"] = "effect"
    waves: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, Criterion):
            raise ConfigurationError(
                f"SelfRectifying.criterion is {self.criterion!r}; give a Criterion, such as "
                "Trajectory() or Hearing()"
            )
        kind, earliest = type(self.criterion).__name__, self.criterion.earliest
        for name, at in (("SelfRectifying", self.at), (kind, self.criterion.at)):
            if at is not None and not earliest <= at < 1:
                raise ConfigurationError(
                    f"{name}.at is {at!r}; a decision by {kind} falls in [{earliest:g}, 1) of the "
                    "decay"
                )
        if not 0 < self.max_share <= 1:
            raise ConfigurationError(
                f"SelfRectifying.max_share is {self.max_share!r}; give above 0, at most 1"
            )
        if self.restore not in ("keep", "effect"):
            raise ConfigurationError(
                f"SelfRectifying.restore is {self.restore!r}; give 'keep' or 'effect'"
            )
        if isinstance(self.waves, bool) or not isinstance(self.waves, int) or self.waves < 1:
            raise ConfigurationError(
                f"SelfRectifying.waves is {self.waves!r}; give an integer of at least 1"
            )

    def decision_step(self, steps: int) -> int:
        """The decay step, 1 to N - 1, whose gradients are the last to be weighed.

        By the criteria of the paper and by :class:`Hearing` it is ceil(0.75 N) or later.

        Args:
            steps: N.

        Raises:
            ConfigurationError: N is so small that no step lies in that range: below 4, or below 2
                for :class:`Exchange`.
        """
        earliest = self.criterion.earliest
        least = max(2, math.ceil(1 / (1 - earliest)))
        if steps < least:
            raise ConfigurationError(
                f"Self-Rectifying needs a decay of at least {least} steps, not {steps}: its "
                f"decision falls from {earliest:g} of the decay on and before its end. Lengthen "
                "SmoothPruning.steps, or leave rectify out"
            )
        at = self.criterion.at if self.at is None else self.at
        return max(1, min(math.ceil(at * steps), steps - 1))
