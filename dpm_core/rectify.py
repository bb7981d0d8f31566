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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

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
            ``None`` where no hearing was held.
        fisher: (C,) mean over samples of that derivative's square, or ``None``.
    """

    group: Tensor
    resistance: Tensor
    gradient: Tensor
    typical: Tensor
    derivative: Tensor | None = None
    fisher: Tensor | None = None


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
    ranked = torch.where(candidates, score, -math.inf)
    by_score = ranked.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    counts = torch.bincount(group, minlength=limits.numel())
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(group)
    rank[order] = torch.arange(group.numel()) - starts[group[order]]
    return candidates & (rank < limits[group])


class Criterion(ABC):
    """One way to choose which structures are released: a pure function of the evidence."""

    at: float = 0.75
    """When the decision falls unless :class:`SelfRectifying` says otherwise, as a share of N."""
    batches: int = 0
    """How many batches the decision's hearing runs; 0 for none."""
    gate: float = 1e-3
    """What a hearing sets the gates of decaying structures to."""

    @abstractmethod
    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        """Choose the structures to release.

        Args:
            evidence: of C structures whose decision falls together.
            limits: (G,) int64, how many may be released of each group.
            step: the count of optimizer steps so far; for what needs a seed.

        Returns:
            (C,) bool, never more than the limits.
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
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ConfigurationError(
                f"Hearing.batches is {self.batches!r}; give an integer of at least 1"
            )
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
        score = torch.rand(evidence.group.numel(), generator=draw, dtype=torch.float64)
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
        heard = evidence.derivative
        resistance = evidence.resistance if heard is None else -heard
        everyone = torch.ones_like(resistance, dtype=torch.bool)
        return strongest(-resistance, everyone, evidence.group, counts)


def _copy_schedule(control: RandomRelease | LeastResistant) -> None:
    for setting in ("at", "batches", "gate"):
        object.__setattr__(control, setting, getattr(control.like, setting))


def _counts(like: Criterion, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
    chosen = like.choose(evidence, limits, step)
    return torch.bincount(evidence.group[chosen], minlength=limits.numel())


@dataclass(frozen=True)
class SelfRectifying:
    """When a decision may be taken back, and how.

    Attributes:
        criterion: chooses the structures to release.
        at: when the decision falls, as a share of N in [0.75, 1); ``None`` takes the criterion's.
            It never falls at n = N, where a zero structure has an exactly zero gradient.
        max_share: at most this share of the structures of a group whose decision has fallen so
            far is released, rounded down. The default of 0.15 is ours.
        restore: what becomes of a released structure's norm. ``"keep"``: it stays where the decay
            left it. ``"effect"``: its BatchNorm part (all of it, where there is none) returns to
            its norm at the start of the decay; restoring the whole vector's norm would overshoot.
        waves: how many waves of decays are heard. 1: structures that are decayed in place of
            released ones are not heard again, so a decay of all takes less than 2 N steps.

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
        if self.at is not None and not 0.75 <= self.at < 1:
            raise ConfigurationError(
                f"SelfRectifying.at is {self.at!r}; the decision falls in [0.75, 1) of the decay"
            )
        if not 0.75 <= self.criterion.at < 1:
            raise ConfigurationError(
                f"{type(self.criterion).__name__}.at is {self.criterion.at!r}; the decision falls "
                "in [0.75, 1) of the decay"
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
        """The decay step, ceil(0.75 N) to N - 1, whose gradients are the last to be weighed.

        Args:
            steps: N.

        Raises:
            ConfigurationError: N is below 4, where no step lies in that range.
        """
        if steps < 4:
            raise ConfigurationError(
                f"Self-Rectifying needs a decay of at least 4 steps, not {steps}: its decision "
                "falls after three quarters of the decay and before its end. Lengthen "
                "SmoothPruning.steps, or leave rectify out"
            )
        return min(
            math.ceil((self.criterion.at if self.at is None else self.at) * steps), steps - 1
        )
