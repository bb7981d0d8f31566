"""TOML configurations, checked whole before any work: names, types, ranges, targets."""

from .earlier import as_before
from .reading import ConfigError, load
from .rectify import CRITERIA, Control, Rectify
from .tables import LARGEST_IMAGE, Compute, Curve, Data, Dense, Stage, Timing
from .whole import Config, Settings

__all__ = [
    "CRITERIA",
    "LARGEST_IMAGE",
    "Compute",
    "Config",
    "ConfigError",
    "Control",
    "Curve",
    "Data",
    "Dense",
    "Rectify",
    "Settings",
    "Stage",
    "Timing",
    "as_before",
    "load",
]
