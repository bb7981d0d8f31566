"""Gate-Decorator, written independently from the paper's description.

You et al., *Gate Decorator: Global Filter Pruning Method for Accelerating Deep Convolutional
Neural Networks*, NeurIPS 2019, arXiv 1909.08174. Every BatchNorm gets a gate per channel; training
alternates between ticks, in which the gates are scored and the lowest are masked, and tocks, in
which everything trains under a penalty on the gates.

:class:`GateDecorator` joins the parts; each of them can be used alone, too.
"""

from .costs import CostModel, Counted
from .decorator import GateDecorator
from .gates import (
    GatedBatchNorm,
    GateError,
    add_sparsity_gradient,
    decorate,
    freeze,
    gated,
    undecorate,
    unfreeze,
)
from .groups import GateGroup, GateTable, melt, tied_gates
from .schedule import TickTock, Turn, learning_rate, triangle, turn_at
from .selection import GateScores, protected, select

__all__ = [
    "CostModel",
    "Counted",
    "GateDecorator",
    "GateError",
    "GateGroup",
    "GateScores",
    "GateTable",
    "GatedBatchNorm",
    "TickTock",
    "Turn",
    "add_sparsity_gradient",
    "decorate",
    "freeze",
    "gated",
    "learning_rate",
    "melt",
    "protected",
    "select",
    "tied_gates",
    "triangle",
    "turn_at",
    "undecorate",
    "unfreeze",
]
