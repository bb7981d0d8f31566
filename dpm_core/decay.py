"""Smooth Pruning (SP): the norm a decaying structure is set to, as a pure schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from .errors import ConfigurationError

Number = TypeVar("Number", float, Tensor)


def target_norm(initial: Number, step: Number | int, steps: int) -> Number:
    """Norm after decay step ``step`` of ``steps``: ``initial * (1 - step / steps)``.

    Source: arXiv 2406.03879, section on smooth pruning (L_target of L_init, n and N).

    Args:
        initial: L_init, the structure's norm when its decay started. A float, or a tensor of any
            shape.
        step: n, the decay step, 0 to ``steps``. 0 gives ``initial``, ``steps`` gives exactly zero.
        steps: N, the length of the decay in optimizer steps.

    Returns:
        The target norm, of the type and shape of ``initial``.
    """
    if isinstance(step, Tensor):
        step = step.double()  # whole numbers would divide in float32
    return initial * ((steps - step) / steps)


@dataclass(frozen=True)
class SmoothPruning:
    """How long a decay takes.

    Attributes:
        steps: N, optimizer steps from the start of a decay to zero. 1 zeroes in one step, as
            one-step pruning does. The default of 20 is ours. 5 to 15% of the training steps that
            remain is a good length, and a high learning rate a good time.

    Raises:
        ConfigurationError: ``steps`` is not an integer of at least 1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigurationError(
                f"SmoothPruning.steps is {self.steps!r}; give an integer of at least 1 "
                "(the number of optimizer steps a decay takes)"
            )
