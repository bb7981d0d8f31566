"""What the tutorials draw, by the project's own plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from matplotlib.figure import Figure
from torch import nn

from dpm_core import Event
from experiments.running.training import Norms
from experiments.showing import plot


def draw_norms(trace: Sequence[Norms], events: Sequence[Event]) -> Figure:
    """One line for each structure that decayed; a triangle where Self-Rectifying released one.

    Args:
        trace: norms at several times, as :func:`experiments.running.training.norms_now` gives them.
        events: the core's.
    """
    run = {"trace": trace, "events": [asdict(event) for event in events]}
    return plot.draw_norms({"sr": plot.sample_norms(run, 0, "sr")}, size=(7, 4))


def draw_channels(dense: nn.Module, small: nn.Module) -> Figure:
    """Output channels of every convolution, before and after."""
    widths = {
        name: (len(m.weight), len(small.get_submodule(name).weight))
        for name, m in dense.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    return plot.draw_channels([{"variant": "sr", "channels": widths}], size=(7, 3))
