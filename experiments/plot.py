"""Plots from runs: norms of decaying structures, accuracy around removal, channels per layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only, whatever the machine has for a screen

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import write
from .run import VARIANTS
from .table import Record, sections

NAMES = {"base": "base", "sp": "+SP", "sr": "+SR"}
COLOURS = {"base": "#6b6b6b", "sp": "#0072b2", "sr": "#d55e00"}
PRUNED, RELEASED, REFILLED = "#9aa5b1", "#d55e00", "#0072b2"
LINES = 60
"""Norm trajectories drawn per kind; more would hide one another."""


def plot(runs: Sequence[tuple[Path, Record]], out: Path) -> list[Path]:
    """Draw all plots of some runs.

    Args:
        runs: each record with the path it was read from; ``trace.pt`` is looked for beside it.
        out: the folder for the pictures.

    Returns:
        The pictures' paths.
    """
    paths = {id(record): path for path, record in runs}
    made = []
    for title, members in sections([record for _, record in runs]):
        name = f"{members[0]['config']['name']}-{_plain(members[0]['data'])}"
        made.append(_save(_accuracy(title, members), out / f"{name}-accuracy.png"))
        made.append(_save(_channels(title, members), out / f"{name}-channels.png"))
        traces = {}
        for variant in ("sp", "sr"):
            for record in sorted(members, key=lambda r: r["seed"]):
                file = paths[id(record)].parent / "trace.pt"
                if record["variant"] == variant and file.exists() and variant not in traces:
                    traces[variant] = (record["seed"], torch.load(file, weights_only=True))
        if traces:
            made.append(_save(_norms(title, traces), out / f"{name}-norms.png"))
    return made


def _plain(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-")


def _save(figure: Figure, path: Path) -> Path:
    write(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)
    return path


def _norms(title: str, traces: dict[str, tuple[int, dict[str, Any]]]) -> Figure:
    """Norms over the optimizer's steps since the decision; releases marked."""
    figure, axes = plt.subplots(
        1,
        len(traces),
        figsize=(5.2 * len(traces), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (variant, (seed, saved)) in zip(axes[0], traces.items(), strict=True):
        initial: dict[tuple[str, int], float] = {}
        started: dict[tuple[str, int], int] = {}
        released: dict[tuple[str, int], int] = {}
        refilled: set[tuple[str, int]] = set()
        for event in saved["events"]:
            for k, norm in zip(event["structures"], event["norms"], strict=True):
                key = (event["group"], k)
                if event["kind"] == "decay":
                    initial[key], started[key] = norm, event["step"]
                    if event["wave"]:
                        refilled.add(key)
                elif event["kind"] == "release":
                    released[key] = event["step"]
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {
            key: [(started[key], norm)] for key, norm in initial.items()
        }
        for step, groups in saved["trace"]:
            for group, norms in groups.items():
                for k, norm in norms.items():
                    if step > started[group, k]:
                        lines[group, k].append((step, norm))
        kinds = {
            "decayed to zero": (
                [k for k in lines if k not in released and k not in refilled],
                PRUNED,
            ),
            "released": ([k for k in lines if k in released], RELEASED),
            "decayed in their place": ([k for k in lines if k in refilled], REFILLED),
        }
        for label, (keys, colour) in kinds.items():
            for i, key in enumerate(keys[:: -(-len(keys) // LINES) or 1]):
                axis.plot(
                    *zip(*lines[key], strict=True),
                    color=colour,
                    linewidth=0.9,
                    alpha=0.8,
                    label=f"{label} ({len(keys)})" if i == 0 else None,
                )
        if released:
            marks = [dict(lines[k]).get(s, None) for k, s in released.items()]
            axis.plot(
                list(released.values()),
                marks,
                "v",
                color=RELEASED,
                markersize=6,
                markeredgecolor="white",
                linestyle="none",
            )
        axis.set_title(f"{NAMES[variant]}, seed {seed}")
        axis.set_xlabel("optimizer steps since the core was attached")
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("norm")
    axes[0][0].set_ylim(bottom=0)  # only now: it would freeze the top of what is drawn later
    figure.suptitle(f"Norms of decaying structures\n{title}", fontsize=10)
    return figure


def _accuracy(title: str, members: Sequence[Record]) -> Figure:
    """Test accuracy over the steps since the decision; one faint line per seed, and the mean."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant in VARIANTS:
        runs = [r for r in members if r["variant"] == variant]
        for record in runs:
            axis.plot(
                *zip(*record["curve"], strict=True),
                color=COLOURS[variant],
                alpha=0.25,
                linewidth=0.8,
            )
        if runs:
            _mean_line(axis, variant, runs)
            zero = statistics.fmean(r["steps"]["zero"] - r["steps"]["decision"] for r in runs)
            axis.axvline(zero, color=COLOURS[variant], linewidth=0.8, linestyle=":")
    axis.set_xlabel("training steps since the decision (dotted: all that goes is gone)")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, loc="lower right")
    axis.set_title(f"Accuracy around removal\n{title}", fontsize=10)
    return figure


def _mean_line(axis: Axes, variant: str, runs: Sequence[Record]) -> None:
    by_step: dict[int, list[float]] = {}
    for record in runs:
        # At its removal a run has two values, before and after: the mean keeps both, in order.
        seen: dict[int, int] = {}
        for step, value in record["curve"]:
            seen[step] = seen.get(step, 0) + 1
            by_step.setdefault(step * 10 + seen[step], []).append(value)
    points = [
        (key // 10, statistics.fmean(v))
        for key, v in sorted(by_step.items())
        if len(v) == len(runs)
    ]
    axis.plot(
        *zip(*points, strict=True),
        color=COLOURS[variant],
        linewidth=2,
        label=f"{NAMES[variant]} ({len(runs)} seeds)",
    )


def _channels(title: str, members: Sequence[Record]) -> Figure:
    """Output channels per layer, dense and kept by each variant (mean over seeds)."""
    layers = list(members[0]["channels"])
    figure, axis = plt.subplots(figsize=(max(6, 0.55 * len(layers) + 2), 4), layout="constrained")
    places = range(len(layers))
    dense = [members[0]["channels"][layer][0] for layer in layers]
    axis.bar(places, dense, width=0.86, color="#e6e6e6", label="dense")
    variants = [v for v in VARIANTS if any(r["variant"] == v for r in members)]
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        runs = [r for r in members if r["variant"] == variant]
        kept = [statistics.fmean(r["channels"][layer][1] for r in runs) for layer in layers]
        offsets = [x + (i - (len(variants) - 1) / 2) * width for x in places]
        axis.bar(offsets, kept, width=width, color=COLOURS[variant], label=NAMES[variant])
    axis.set_xticks(list(places), layers, rotation=90 if len(layers) > 12 else 30, fontsize=8)
    axis.set_ylabel("output channels")
    axis.legend(frameon=False)
    axis.set_title(f"Channels kept per layer\n{title}", fontsize=10)
    return figure
