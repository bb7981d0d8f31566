"""The phases of a structure and the one table of moves between them."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Phase(IntEnum):
    """Where a structure stands."""

    ACTIVE = 0
    DECAYING = 1
    PRUNED = 2


class Move(IntEnum):
    """What can happen to a structure."""

    START = 0
    """A decay starts."""
    VANISH = 1
    """A decay was asked for and the structure is zero already: there is nothing to decay."""
    RELEASE = 2
    """Self-Rectifying takes the decision back."""
    FINISH = 3
    """The last decay step is done; the structure is exactly zero from here on."""


TRANSITIONS: dict[tuple[Phase, Move], Phase] = {
    (Phase.ACTIVE, Move.START): Phase.DECAYING,
    (Phase.ACTIVE, Move.VANISH): Phase.PRUNED,
    (Phase.DECAYING, Move.RELEASE): Phase.ACTIVE,
    (Phase.DECAYING, Move.FINISH): Phase.PRUNED,
}
"""Every legal move. A pair that is not here is refused."""

_REFUSED = -1
_TABLE = torch.full((len(Phase), len(Move)), _REFUSED, dtype=torch.int64, device="cpu")
for (_phase, _move), _next in TRANSITIONS.items():
    _TABLE[_phase, _move] = _next


def after(phases: Tensor, move: Move) -> Tensor:
    """Phases after ``move``, elementwise; -1 where the table refuses it.

    Args:
        phases: int64 tensor of any shape, values of :class:`Phase`.
        move: what happens to all of them.
    """
    return _TABLE[phases, int(move)]
