"""Ticks, tocks and learning rates as pure functions of a step (arXiv 1909.08174)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .gates import GateError

LOW, HIGH = 1e-3, 1e-2


@dataclass(frozen=True)
class TickTock:
    """The lengths of a run: one tock, then ever again ``ticks`` ticks and a tock.

    The defaults are the paper's. It goes on until the caller stops it.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch.
        tick_epochs, tock_epochs: their lengths.
        ticks: how many ticks lie between two tocks.
    """

    steps_per_epoch: int
    tick_epochs: int = 1
    tock_epochs: int = 10
    ticks: int = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise GateError(f"{name} is {value}; give at least 1")


@dataclass(frozen=True)
class Turn:
    """The tick or tock that a step lies in.

    Attributes:
        kind: which of the two.
        number: how many of the same kind came before.
        step: steps since it began, from 0.
        length: its steps.
    """

    kind: Literal["tick", "tock"]
    number: int
    step: int
    length: int

    @property
    def first(self) -> bool:
        """Whether it begins here: freeze or unfreeze, and reset the scores."""
        return self.step == 0

    @property
    def last(self) -> bool:
        """Whether this is its last step: after that of a tick comes the selection."""
        return self.step == self.length - 1


def turn_at(step: int, times: TickTock) -> Turn:
    """Which tick or tock a training step lies in.

    Args:
        step: optimizer steps since the first tock began, from 0.
        times: the run's lengths.

    Raises:
        GateError: the step is negative.
    """
    if step < 0:
        raise GateError(f"step is {step}; give at least 0")
    tick = times.tick_epochs * times.steps_per_epoch
    tock = times.tock_epochs * times.steps_per_epoch
    if step < tock:
        return Turn("tock", 0, step, tock)
    rounds, inside = divmod(step - tock, times.ticks * tick + tock)
    if inside < times.ticks * tick:
        return Turn("tick", rounds * times.ticks + inside // tick, inside % tick, tick)
    return Turn("tock", rounds + 1, inside - times.ticks * tick, tock)


def triangle(step: int, length: int, low: float = LOW, high: float = HIGH) -> float:
    """A rate that climbs and falls in a straight line, step by step: tocks and fine-tuning.

    Exactly ``low`` at step 0 and step length - 1; exactly ``high`` in the middle where the length
    is odd, and just below it on the two middle steps where it is even. A single step gets ``low``.

    Raises:
        GateError: the step is not in 0 .. length - 1.
    """
    if not 0 <= step < length:
        raise GateError(f"step is {step}; give 0 to {length - 1}")
    climbed = 2 * min(step, length - 1 - step) / max(1, length - 1)
    return low * (1 - climbed) + high * climbed


def learning_rate(turn: Turn, low: float = LOW, high: float = HIGH) -> float:
    """``low`` throughout a tick, :func:`triangle` over a tock."""
    return low if turn.kind == "tick" else triangle(turn.step, turn.length, low, high)
