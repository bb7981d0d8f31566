"""Decay Pruning Method (DPM): smooth, self-rectifying removal of structures.

The framework-agnostic core of the suite. It knows structure groups, phases, a decay schedule and
release criteria, and attaches to any :class:`torch.optim.Optimizer`; it knows no pruning
framework. The method is described in arXiv 2406.03879.
"""

from pathlib import Path

from .decay import SmoothPruning, target_norm
from .errors import (
    AttachmentError,
    ConfigurationError,
    DecayPruningError,
    DisagreementError,
    GradientError,
    GroupError,
    PhaseError,
    StateError,
)
from .events import Event
from .groups import Owner, Slice, StructureGroup
from .phases import Phase
from .pruning import DecayPruning
from .rectify import (
    Criterion,
    Evidence,
    Exchange,
    Hearing,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    Trajectory,
)

__version__ = "0.2.0"

# Installed, `adapters` and `third_party` lie in this folder. In a checkout they stand beside it and
# are looked for there first: an editable install may be that of another checkout.
if not Path(__file__).with_name("adapters").joinpath("__init__.py").is_file():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "AttachmentError",
    "ConfigurationError",
    "Criterion",
    "DecayPruning",
    "DecayPruningError",
    "DisagreementError",
    "Event",
    "Evidence",
    "Exchange",
    "GradientError",
    "GroupError",
    "Hearing",
    "LeastResistant",
    "Owner",
    "Phase",
    "PhaseError",
    "RandomRelease",
    "SelfRectifying",
    "Slice",
    "SmoothPruning",
    "StateError",
    "StructureGroup",
    "Trajectory",
    "target_norm",
]
