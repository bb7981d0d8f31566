"""The method once more, slowly: float64, plain loops over structures and over their elements.

Shares no code with dpm_core. A *share* is what the core calls a slice: a tensor, the dimension
that is counted along, and the positions of each structure, as lists of Python integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """One parameter's part in K structures; ``positions[k]`` belong to structure k."""

    parameter: Tensor
    dim: int
    positions: list[list[int]]
    batch_norm: bool = False

    def places(self, k: int) -> Iterator[tuple[int, ...]]:
        """Coordinates of the elements of structure k."""
        others = [range(n) for d, n in enumerate(self.parameter.shape) if d != self.dim]
        for position in self.positions[k]:
            for rest in itertools.product(*others):
                yield (*rest[: self.dim], position, *rest[self.dim :])


def shares_of(group: Any) -> list[Share]:
    """The shares of a structure group, read off its public attributes."""
    return [
        Share(s.parameter, s.dim, [[int(i) for i in row] for row in s.index.tolist()], s.batch_norm)
        for s in group.slices
    ]


def values(shares: Sequence[Share], k: int, tensors: Sequence[Tensor | None] = ()) -> list[float]:
    """Structure k as one flat list: of the parameters, or of ``tensors`` in their place."""
    flat = []
    for share, tensor in zip(shares, tensors or [s.parameter for s in shares], strict=True):
        nested = None if tensor is None else tensor.detach().to(torch.float64).tolist()
        for place in share.places(k):
            value = nested
            for coordinate in place if nested is not None else ():
                value = value[coordinate]
            flat.append(0.0 if value is None else value)
    return flat


def length(vector: Sequence[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in vector))


def inner(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def resistance(initial: float, x: Sequence[float], gradient: Sequence[float]) -> float:
    """R_k = L_init <-g_k, x_k> / ||x_k||."""
    size = length(x)
    return -initial * inner(gradient, x) / size if size else 0.0


def smooth(
    star: Sequence[float], initial: float, n: int, steps: int, shape: str = "linear"
) -> list[float]:
    """x after decay step n of ``steps``, from the x* that the optimizer gave."""
    if n == steps:
        return [0.0 for _ in star]
    size = length(star)
    left = (1 + math.cos(math.pi * n / steps)) / 2 if shape == "cosine" else (steps - n) / steps
    target = initial * left
    return [v * target / size if size else 0.0 for v in star]


def cap(max_share: float, decided: int, released: int, spare: int) -> int:
    """How many may be released now: a share of all decided so far, and each needs a spare one."""
    return max(min(int(Fraction(str(max_share)) * decided) - released, spare), 0)


def rate(resistances: Sequence[float], gradients: Sequence[float], initial: float) -> float:
    """C_rate, the direction: sum R_k / sum(||g_k|| L_init)."""
    bound = math.fsum(g * initial for g in gradients)
    return math.fsum(resistances) / bound if bound else 0.0


def strength(mine: Sequence[float], cohort: Sequence[Sequence[float]]) -> float:
    """C_len: the mean R over the mean |mean R| of all that have decayed, this one among them."""
    typical = math.fsum(abs(math.fsum(r) / len(r)) for r in cohort) / len(cohort)
    return math.fsum(mine) / len(mine) / typical if typical else 0.0


def strongest(scores: dict[int, float], most: int) -> set[int]:
    """The ``most`` structures with the highest scores."""
    return set(sorted(scores, key=lambda k: -scores[k])[: max(most, 0)])


def trajectory(
    cohort: dict[int, tuple[list[float], list[float], float]],
    t_rate: float,
    t_len: float,
    most: int,
    before: Sequence[list[float]] = (),
) -> set[int]:
    """Which of a group's cohort, by number (R_k of each step, ||g_k||, L_init), are released.

    ``before``: R_k of each step of the group's other structures that have decayed.
    """
    everyone = [r for r, _, _ in cohort.values()] + [*before]
    lengths = {k: strength(r, everyone) for k, (r, _, _) in cohort.items()}
    resisting = {
        k: lengths[k]
        for k, (r, g, initial) in cohort.items()
        if rate(r, g, initial) > t_rate and lengths[k] > t_len
    }
    return strongest(resisting, most)


def hearing_score(derivatives: Sequence[float]) -> float:
    """R / sqrt(F) from the derivative of each sample's loss by the structure's gate."""
    count = len(derivatives)
    mean = math.fsum(derivatives) / count
    square = math.fsum(d * d for d in derivatives) / count
    return -mean / math.sqrt(square) if square else 0.0


@dataclass
class Case:
    """What the replica knows of one structure."""

    phase: str = "ACTIVE"
    n: int = 0
    initial: float = 0.0
    effect: float = 0.0
    wave: int = 0
    immune: bool = False
    decided: bool = False
    resistances: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)


@dataclass
class Replica:
    """Follows one structure group through training: from gradients and x* it predicts the rest.

    Trajectory is the only criterion it knows.
    """

    shares: list[Share]
    steps: int
    decision: int
    t_rate: float
    t_len: float
    max_share: float
    restore: str
    waves: int = 1
    shape: str = "linear"
    cases: list[Case] = field(default_factory=list)
    released: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cases = [Case() for _ in self.shares[0].positions]

    @property
    def effect_shares(self) -> list[Share]:
        return [s for s in self.shares if s.batch_norm] or self.shares

    def decay(self, structures: Sequence[int], wave: int = 0) -> None:
        for k in structures:
            initial = length(values(self.shares, k))
            effect = length(values(self.effect_shares, k))
            phase = "DECAYING" if initial > 0 else "PRUNED"
            self.cases[k] = Case(phase, 0, initial, effect, wave)

    def before_step(self) -> None:
        """Look at parameters and gradients as they are before the optimizer's step."""
        decaying = {k: c for k, c in enumerate(self.cases) if c.phase == "DECAYING"}
        gradients = [s.parameter.grad for s in self.shares]
        for k, case in decaying.items():
            gradient = values(self.shares, k, gradients)
            case.n += 1
            case.resistances.append(resistance(case.initial, values(self.shares, k), gradient))
            case.gradients.append(length(gradient))
        cohort = {
            k: (c.resistances, c.gradients, c.initial)
            for k, c in decaying.items()
            if c.n == self.decision and c.wave < self.waves
        }
        for k in cohort:
            self.cases[k].decided = True
        spare = sum(c.phase == "ACTIVE" and not c.immune for c in self.cases)
        decided, released = sum(c.decided for c in self.cases), sum(c.immune for c in self.cases)
        most = cap(self.max_share, decided, released, spare)
        before = [c.resistances for k, c in enumerate(self.cases) if c.resistances]
        before = [r for r in before if not any(r is mine for mine, _, _ in cohort.values())]
        self.released = trajectory(cohort, self.t_rate, self.t_len, most, before)

    def after_step(self, stars: Sequence[Tensor]) -> dict[int, list[float]]:
        """From x*, one tensor per share: what every structure that is not ACTIVE must be now.

        Structures that are released in this step are among them.
        """
        expected = {}
        for k, case in enumerate(self.cases):
            star = values(self.shares, k, stars)
            if k in self.released:
                case.phase, case.immune, case.n = "ACTIVE", True, 0
                expected[k] = self._restored(k, case, star, stars)
            elif case.phase == "DECAYING":
                expected[k] = smooth(star, case.initial, case.n, self.steps, self.shape)
                if case.n == self.steps:
                    case.phase, case.n = "PRUNED", 0
            elif case.phase == "PRUNED":
                expected[k] = [0.0 for _ in star]
        return expected

    def _restored(
        self, k: int, case: Case, star: list[float], stars: Sequence[Tensor]
    ) -> list[float]:
        if self.restore == "keep":
            return star
        part = [i for i, s in enumerate(self.shares) if s in self.effect_shares]
        size = length(values([self.shares[i] for i in part], k, [stars[i] for i in part]))
        factor = case.effect / size if size else 1.0
        out = []
        for i, share in enumerate(self.shares):
            one = values([share], k, [stars[i]])
            out += [v * factor for v in one] if i in part else one
        return out
