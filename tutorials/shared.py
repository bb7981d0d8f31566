"""What the tutorials draw, so that each can be about its own matter."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from dpm_core import DecayPruning, Event

COLOURS = {"decayed to zero": "#9aa5b1", "released": "#d55e00", "decayed in their place": "#0072b2"}
LINES = 40
"""Lines drawn of each kind; more would hide one another."""

Norms = dict[str, dict[int, float]]
"""Norm of every structure that has ever decayed, by group and number."""


def norms_now(dpm: DecayPruning) -> tuple[int, Norms]:
    """The core's clock, and the norms at this moment of all structures that have ever decayed."""
    found: Norms = {}
    for event in dpm.events:
        if event.kind == "decay":
            norms = dpm.groups[event.group].norms().tolist()
            found.setdefault(event.group, {}).update({k: norms[k] for k in event.structures})
    return dpm.clock, found


def draw_norms(trace: Sequence[tuple[int, Norms]], events: Sequence[Event]) -> Figure:
    """One line for each structure that decayed; a triangle where Self-Rectifying released one.

    Args:
        trace: norms at several times, as :func:`norms_now` gives them.
        events: the core's.
    """
    started: dict[tuple[str, int], Event] = {}
    released: dict[tuple[str, int], int] = {}
    for event in events:
        for k in event.structures:
            if event.kind == "decay":
                started[event.group, k] = event
            elif event.kind == "release":
                released[event.group, k] = event.step
    kinds: dict[str, list[tuple[str, int]]] = {kind: [] for kind in COLOURS}
    for key, event in started.items():
        kind = "decayed in their place" if event.wave else "decayed to zero"
        kinds["released" if key in released else kind].append(key)

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, keys in kinds.items():
        for i, (group, k) in enumerate(keys[:: max(1, len(keys) // LINES)]):
            event = started[group, k]
            line = {event.step: event.norms[event.structures.index(k)]}
            line |= {t: norms[group][k] for t, norms in trace if t > event.step and group in norms}
            label = f"{kind} ({len(keys)})" if i == 0 else None
            axis.plot(line.keys(), line.values(), color=COLOURS[kind], linewidth=0.9, label=label)
            if (at := released.get((group, k))) in line:
                axis.plot(at, line[at], "v", color=COLOURS[kind])
    axis.set(xlabel="optimizer steps since the core was attached", ylabel="norm of a structure")
    axis.set_ylim(bottom=0)
    figure.legend(frameon=False, loc="outside upper left", ncols=len(COLOURS))
    return figure


def draw_channels(dense: nn.Module, small: nn.Module) -> Figure:
    """Output channels of every convolution, before and after."""
    layers = [name for name, m in dense.named_modules() if isinstance(m, nn.Conv2d)]
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for model, colour, label in ((dense, "#d9d9d9", "dense"), (small, "#d55e00", "pruned")):
        widths = [model.get_submodule(name).weight.shape[0] for name in layers]
        axis.bar(layers, widths, color=colour, label=label)
    axis.set_ylabel("output channels")
    axis.legend(frameon=False)
    return figure
