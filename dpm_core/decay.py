"""Smooth Pruning (SP): the norm a decaying structure is set to, as a pure schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from .errors import ConfigurationError

Number = TypeVar("Number", float, Tensor)
Shape = Literal["linear", "cosine"]


def target_norm(initial: Number, step: Number | int, steps: int, shape: Shape = "linear") -> Number:
    """Norm after decay step ``step`` of ``steps``.

    ``"linear"``: ``initial * (1 - step / steps)``. Source: arXiv 2406.03879, section on smooth
    pruning (L_target of L_init, n and N). ``"cosine"`` begins and ends gently and is steepest in
    the middle: ``initial * (1 + cos(pi step / steps)) / 2`` (ours).

    Args:
        initial: L_init, the structure's norm when its decay started. A float, or a tensor of any
            shape.
        step: n, the decay step, 0 to ``steps``. 0 gives ``initial``, ``steps`` gives exactly zero.
        steps: N, the length of the decay in optimizer steps.
        shape: of the way from ``initial`` to zero.

    Returns:
        The target norm, of the type and shape of ``initial``.
    """
    if shape == "cosine":  # a sine of what is left, squared: exactly 1 at the start, 0 at the end
        if isinstance(step, Tensor):
            return initial * torch.sin((steps - step.double()) / steps * (math.pi / 2)) ** 2
        return initial * math.sin((steps - step) / steps * (math.pi / 2)) ** 2
    if isinstance(step, Tensor):
        step = step.double()  # whole numbers would divide in float32
    return initial * ((steps - step) / steps)


@dataclass(frozen=True, repr=False)
class SmoothPruning:
    """How long a decay takes, and on which way.

    Attributes:
        steps: N, optimizer steps from the start of a decay to zero. 1 zeroes in one step, as
            one-step pruning does. The default of 20 is ours. 5 to 15% of the training steps that
            remain is a good length, and a high learning rate a good time.
        shape: the way from the norm at the start to zero, see :func:`target_norm`. ``"linear"`` is
            the paper's.

    Raises:
        ConfigurationError: ``steps`` is not an integer of at least 1, or ``shape`` is unknown.
    """

    steps: int = 20
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigurationError(
                f"SmoothPruning.steps is {self.steps!r}; give an integer of at least 1 "
                "(the number of optimizer steps a decay takes)"
            )
        if self.shape not in get_args(Shape):
            raise ConfigurationError(
                f"SmoothPruning.shape is {self.shape!r}; give one of {', '.join(get_args(Shape))}"
            )

    def norm(self, initial: Tensor, step: Tensor) -> Tensor:
        """:func:`target_norm` of this length and shape."""
        return target_norm(initial, step, self.steps, self.shape)

    def __repr__(self) -> str:
        """The settings; states are compared by it, and those of 0.2.0 know no shape."""
        shape = "" if self.shape == "linear" else f", shape={self.shape!r}"
        return f"SmoothPruning(steps={self.steps}{shape})"
