"""What the tutorials draw, by the project's own plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from matplotlib.figure import Figure
from torch import nn

from dpm_core import Event
from experiments.running.training import Norms
from experiments.showing import figures
from experiments.showing.norms import sample_norms


def draw_norms(trace: Sequence[Norms], events: Sequence[Event]) -> Figure:
    """One line for each structure that decayed; a triangle where Self-Rectifying released one.

    Args:
        trace: norms at several times, as :func:`experiments.running.training.norms_now` gives them.
        events: the core's.
    """
    run = {"trace": trace, "events": [asdict(event) for event in events]}
    return figures.draw_norms({"sr": sample_norms(run, 0, "sr")}, size=(7, 4))


def draw_channels(dense: nn.Module, small: nn.Module) -> Figure:
    """Output channels of every convolution, before and after."""
    before = {n: len(m.weight) for n, m in dense.named_modules() if isinstance(m, nn.Conv2d)}
    after = [len(small.get_submodule(name).weight) for name in before]
    return figures.draw_widths(before, {"sr": after}, size=(7, 3))
