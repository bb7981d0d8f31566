"""Figures of runs: norms, accuracy, channels, releases, latency. Each function draws one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ..record import CONTROLS, ORDER, Record, Timed, Variant
from .lengths import Row
from .norms import Kind, Sample
from .pairs import Difference
from .sections import DIFFERENCES, NAMES, Answers, by_variant, dense, summary

Samples = Mapping[Variant, Sample]
"""Sampled norms by variant."""

RELEASING: tuple[Variant, ...] = ("sr", *CONTROLS)
mpl.rcParams["text.parse_math"] = False  # names are names, dollars and all
# Okabe and Ito's colours, which the colour-blind tell apart; the controls' lines are broken too.
COLOURS: dict[Variant, str] = {
    "base": "#6b6b6b",
    "sp": "#0072b2",
    "sr": "#d55e00",
    "random": "#cc79a7",
    "least-resistant": "#009e73",
}
STYLES: dict[Variant, Any] = {
    "base": "-",
    "sp": "-",
    "sr": "-",
    "random": "--",
    "least-resistant": "-.",
}
PRUNED, RELEASED, REFILLED = "#9aa5b1", "#d55e00", "#0072b2"
KINDS: dict[Kind, str] = {
    "decayed to zero": PRUNED,
    "released": RELEASED,
    "decayed in their place": REFILLED,
}
"""The colour of a structure's trajectory, by what becomes of it."""
DENSE, EDGE = "#d9d9d9", "#ffffff"
MARKERS = "os^DvPX*<>hp"


def draw_norms(
    samples: Samples, title: str = "", size: tuple[float, float] = (5.2, 3.8), top: float = 0.0
) -> Figure:
    """Norms over the optimizer's steps, one panel per variant; releases are marked.

    Args:
        samples: by variant.
        title: above all panels, if any.
        size: of one panel, in inches.
        top: what the norms' axis reaches at least, for figures that are to be compared.
    """
    figure = Figure(figsize=(size[0] * len(samples), size[1]), layout="constrained")
    axes = figure.subplots(1, len(samples), sharey=True, squeeze=False)
    for axis, (variant, sample) in zip(axes[0], samples.items(), strict=True):
        for kind, lines in sample.lines.items():
            for i, line in enumerate(lines):
                axis.plot(
                    *zip(*line, strict=True),
                    color=KINDS[kind],
                    linewidth=0.9,
                    alpha=0.8,
                    label=f"{kind} ({sample.counts[kind]})" if i == 0 else None,
                )
        if sample.releases:
            axis.plot(
                *zip(*sample.releases, strict=True),
                "v",
                color=RELEASED,
                markersize=6,
                markeredgecolor=EDGE,
                linestyle="none",
            )
        if title:
            axis.set_title(f"{NAMES[variant]}, seed {sample.seed}")
        axis.xaxis.set_major_locator(_whole())
        axis.set_xlabel("optimizer steps since the core was attached")
        if title and sample.lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("norm")
    # Only now: it would freeze the top of what is drawn later.
    axes[0][0].set_ylim(bottom=0, top=max(axes[0][0].get_ylim()[1], 1.05 * top))
    if title:
        _head(figure, "Norms of decaying structures", title)
    elif any(sample.lines for sample in samples.values()):
        _legend_above(figure, 2)
    return figure


def _whole() -> MaxNLocator:
    """Ticks at round whole numbers, for steps."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)


def highest(samples: Samples) -> float:
    """The largest norm in some samples."""
    lines = [line for s in samples.values() for of_kind in s.lines.values() for line in of_kind]
    return max((norm for line in lines for _, norm in line), default=0.0)


def draw_accuracy(
    members: Sequence[Record], title: str = "", size: tuple[float, float] = (7, 4)
) -> Figure:
    """Test accuracy over the steps since the decision; one faint line per seed, and the mean."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for variant, runs in by_variant(members).items():
        for record in runs:
            axis.plot(
                *zip(*record.curve, strict=True),
                color=COLOURS[variant],
                alpha=0.25,
                linewidth=0.8,
            )
        _mean_line(axis, variant, runs)
        zero = statistics.fmean(r.steps.zero - r.steps.decision for r in runs)
        axis.axvline(zero, color=COLOURS[variant], linewidth=0.8, linestyle=":")
    axis.xaxis.set_major_locator(_whole())
    dotted = " (dotted: all that goes is gone)" if title else ""
    axis.set_xlabel(f"training steps since the decision{dotted}")
    axis.set_ylabel("test accuracy, %")
    if title:
        axis.legend(frameon=False, loc="lower right")
        _head(figure, "Accuracy around removal", title)
    else:
        _legend_above(figure, 2)
    return figure


def _mean_line(axis: Axes, variant: Variant, runs: Sequence[Record]) -> None:
    by_step: dict[int, list[float]] = {}
    for record in runs:
        # At its removal a run has two values, before and after: the mean keeps both, in order.
        seen: dict[int, int] = {}
        for step, value in record.curve:
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
        linestyle=STYLES[variant],
        label=f"{NAMES[variant]} ({_seeds(runs)})",
    )


def _seeds(runs: Sequence[Record]) -> str:
    return f"{len(runs)} seed" + "s" * (len(runs) != 1)


def draw_channels(
    members: Sequence[Record], title: str = "", size: tuple[float, float] = (6, 4)
) -> Figure:
    """Output channels per layer, dense and kept by each variant (mean over seeds).

    Args:
        members: a section's records.
        title: above the figure, if any.
        size: in inches; the figure is wider where there are many layers.
    """
    whole = {layer: widths.dense for layer, widths in members[0].channels.items()}
    kept = {
        variant: [statistics.fmean(r.channels[layer].kept for r in runs) for layer in whole]
        for variant, runs in by_variant(members).items()
    }
    return draw_widths(whole, kept, title, size)


def draw_widths(
    dense: Mapping[str, int],
    kept: Mapping[Variant, Sequence[float]],
    title: str = "",
    size: tuple[float, float] = (6, 4),
) -> Figure:
    """Output channels per layer.

    Args:
        dense: by layer.
        kept: by variant, in the order of the layers.
        title: as in :func:`draw_channels`.
        size: as in :func:`draw_channels`.
    """
    figure, axis = _layered(list(dense), size)
    axis.bar(range(len(dense)), list(dense.values()), width=0.86, color=DENSE, label="dense")
    _grouped(axis, kept)
    axis.set_ylabel("output channels")
    _titled(figure, axis, "Channels kept per layer", title)
    return figure


def _head(figure: Figure, what: str, title: str) -> None:
    """A title above all, in as many lines as its names take."""
    figure.suptitle(f"{what}\n{title}", fontsize=10, wrap=True)


def _titled(figure: Figure, axis: Axes, what: str, title: str) -> None:
    """A legend, with a title inside of the axes; a page has titles of its own."""
    if title:
        axis.legend(frameon=False)
        _head(figure, what, title)
    else:
        _legend_above(figure)


def _legend_above(figure: Figure, columns: int = 3, of: Axes | None = None) -> None:
    """A legend of all panels, or of one that has what all have."""
    shown = () if of is None else of.get_legend_handles_labels()
    figure.legend(*shown, frameon=False, loc="outside upper left", ncols=columns, columnspacing=1.2)


def _layered(layers: Sequence[str], size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with a place for every layer."""
    width = max(size[0], (0.55 if len(layers) <= 20 else 0.32) * len(layers) + 2)
    figure = Figure(figsize=(width, size[1]), layout="constrained")
    axis = figure.subplots()
    axis.set_xticks(
        range(len(layers)),
        layers,
        rotation=90 if len(layers) > 12 else 30,
        ha="center" if len(layers) > 12 else "right",
        rotation_mode="default" if len(layers) > 12 else "anchor",
        fontsize=8,
    )
    axis.set_xlim(-0.6, len(layers) - 0.4)
    return figure, axis


def _grouped(axis: Axes, heights: Mapping[Variant, Sequence[float]]) -> None:
    """Bars side by side: of each variant one for every place."""
    width = 0.8 / max(1, len(heights))
    for i, (variant, values) in enumerate(heights.items()):
        axis.bar(
            [x + (i - (len(heights) - 1) / 2) * width for x in range(len(values))],
            values,
            width=width,
            color=COLOURS[variant],
            label=NAMES[variant],
        )


def draw_releases(
    members: Sequence[Record], title: str = "", size: tuple[float, float] = (7, 4)
) -> Figure:
    """Structures released so far over the steps since the first decay; +SR and its controls."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    grouped = by_variant(members, RELEASING)
    end = max((r.step for runs in grouped.values() for m in runs for r in m.releases), default=0)
    end += max(1, round(0.1 * end))
    for i, (variant, runs) in enumerate(grouped.items()):
        steps = sorted({0, end, *(s for r in runs for s, _, _ in r.releases)})
        so_far = [[_released(r, until=step) for step in steps] for r in runs]
        for line in so_far:
            axis.step(steps, line, where="post", color=COLOURS[variant], alpha=0.25, linewidth=0.8)
        axis.step(
            steps,
            [statistics.fmean(values) for values in zip(*so_far, strict=True)],
            where="post",
            color=COLOURS[variant],
            linestyle=STYLES[variant],
            linewidth=3 - 0.6 * i,  # the controls follow +SR's schedule: one line on the other
            label=f"{NAMES[variant]} ({_seeds(runs)})",
        )
    axis.xaxis.set_major_locator(_whole())
    axis.set_xlabel("training steps since the first decay")
    axis.set_ylabel("structures released so far")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper left")
    if title:
        _head(figure, "Releases over time", title)
    return figure


def _released(record: Record, until: float = float("inf"), group: str | None = None) -> int:
    return sum(
        count
        for step, name, count in record.releases
        if step <= until and (group is None or name == group)
    )


def releases_by_group(members: Sequence[Record]) -> tuple[list[str], dict[Variant, list[float]]]:
    """Structure groups with releases, in the network's order, and a run's releases in each.

    Returns:
        The groups' names, and by variant the mean over seeds for each of them.
    """
    grouped = by_variant(members, RELEASING)
    released = [r for runs in grouped.values() for m in runs for r in m.releases]
    seen = list(dict.fromkeys(group for _, group, _ in released))
    layers = list(members[0].channels)
    seen.sort(key=lambda name: layers.index(name) if name in layers else len(layers))
    return seen, {
        variant: [statistics.fmean(_released(r, group=name) for r in runs) for name in seen]
        for variant, runs in grouped.items()
    }


def draw_releases_by_group(
    members: Sequence[Record], title: str = "", size: tuple[float, float] = (6, 4)
) -> Figure:
    """Structures released per structure group and run; +SR and its controls."""
    names, heights = releases_by_group(members)
    figure, axis = _layered(names, size)
    _grouped(axis, heights)
    axis.set_ylabel("structures released per run")
    _titled(figure, axis, "Releases per layer", title)
    return figure


MODELS: tuple[Timed, ...] = get_args(Timed)


def latencies(runs: Sequence[Record], of: Timed) -> list[float]:
    """Milliseconds of a model's pass, of the runs whose records have them."""
    return [ms for r in runs if (ms := r.milliseconds(of)) is not None]


def draw_latency(
    members: Sequence[Record], title: str = "", size: tuple[float, float] = (7, 4)
) -> Figure:
    """Milliseconds of a forward pass, side by side; mean and spread.

    Dense, masked (hatched) and pruned, each where all of a variant's records have it.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    grouped = by_variant(members)
    kinds = [kind for kind in MODELS if latencies(members, kind)]
    height = 0.76 / len(kinds)
    for k, kind in enumerate(kinds):
        rows = [
            (i, v, values)
            for i, (v, runs) in enumerate(grouped.items())
            if len(values := latencies(runs, kind)) == len(runs)
        ]
        axis.barh(
            [i + (k - (len(kinds) - 1) / 2) * height for i, _, _ in rows],
            [statistics.fmean(values) for _, _, values in rows],
            height=0.95 * height,
            color=[COLOURS[v] if kind == "pruned" else DENSE for _, v, _ in rows],
            hatch="///" if kind == "masked" else None,
            xerr=[summary(values).spread or 0.0 for _, _, values in rows],
            error_kw={"ecolor": mpl.rcParams["text.color"], "elinewidth": 1, "capsize": 3},
        )
    axis.set_yticks(range(len(grouped)), [NAMES[v] for v in grouped])
    axis.invert_yaxis()
    axis.set_xlabel("ms per forward pass")
    if title:
        _head(figure, "Latency", title)
    return figure


def draw_differences(answers: Mapping[str, Answers], size: tuple[float, float] = (7, 5)) -> Figure:
    """Differences of final accuracy with their 95% intervals, a line per cell and question.

    A hollow marker has no interval: its pairs start from one network. Intervals that reach the
    edge go on beyond it.

    Args:
        answers: of each cell, under a short name, in their order.
        size: in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    shown: list[float] = []
    for row, cell in enumerate(answers.values()):
        for i, (one, other) in enumerate(DIFFERENCES):
            found = cell.differences.get((one, other))
            if found is None:
                continue
            shown.append(abs(found.mean))
            place = row + (i - (len(DIFFERENCES) - 1) / 2) * 0.24
            colour, marker = COLOURS[other if other != "base" else one], MARKERS[i]
            if found.low is not None and found.high is not None:
                axis.plot([found.low, found.high], [place] * 2, color=colour, linewidth=1.5)
            filled: Any = "none" if found.low is None else "full"
            axis.plot(found.mean, place, marker, color=colour, markersize=6, fillstyle=filled)
    reach = max(1.2 * max(shown, default=0.0), 1.0)
    axis.set_xlim(-reach, reach)
    axis.axvline(0, color=DENSE, zorder=0)
    axis.set_yticks(range(len(answers)), list(answers))
    axis.invert_yaxis()
    axis.set_xlabel("difference of final accuracy, points")
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[other if other != "base" else one],
            marker=MARKERS[i],
            label=f"{NAMES[one]} minus {NAMES[other]}",
        )
        for i, (one, other) in enumerate(DIFFERENCES)
    ]
    figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=3)
    return figure


def draw_lengths(rows: Sequence[Row], size: tuple[float, float] = (8, 4)) -> Figure:
    """What a decay gains or costs at the end, by its share of the steps that there are.

    A line per learning rate; number of steps, shape and machine tell several of one rate apart.
    Intervals that reach the edge go on beyond it.

    Args:
        rows: as :func:`.lengths.rows`.
        size: in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[str, ...], list[tuple[float, Difference]]] = {}
    for row in rows:
        if row.decay and row.share and row.difference is not None:
            steps, rate = f"{row.allowed:,} steps", f"learning rate {row.learning_rate:g}"
            share = float(f"{100 * row.share:.2g}")
            line = lines.setdefault((steps, rate, row.decay.shape, row.device), [])
            line.append((share, row.difference))
    shares = sorted({share for line in lines.values() for share, _ in line})
    differ = [len(set(column)) > 1 for column in zip(*lines, strict=True)]
    colours = [*(COLOURS[v] for v in ORDER if v != "base"), "dimgrey"]
    for i, (kind, line) in enumerate(lines.items()):
        colour = colours[i % len(colours)]
        places = [shares.index(share) + (i - (len(lines) - 1) / 2) * 0.1 for share, _ in line]
        _intervals(axis, places, [found for _, found in line], colour)
        label = ", ".join(k for k, apart in zip(kind, differ, strict=True) if apart) or kind[1]
        means = [found.mean for _, found in line]
        marker = MARKERS[i % len(MARKERS)]
        axis.plot(places, means, marker, color=colour, linestyle="-", label=label)
    reach = 1.5 * max((abs(f.mean) for line in lines.values() for _, f in line), default=0.0) + 0.5
    _minus_base(axis, [f"{share:g}%" for share in shares], reach)
    axis.set_xlabel("steps of the decay, of all that there are")
    _legend_above(figure, 1 if differ[-1] else 2)  # a machine's name is long
    return figure


def draw_budgets(rows: Sequence[Row], size: tuple[float, float] = (8, 4)) -> Figure:
    """What a decay gains or costs at the end, by the training steps that there are in all.

    A panel per learning rate and machine, a line per share of the steps that a decay takes, and
    shape. Those of at least half of the steps, which leave few or none after the removal, are
    dotted and hollow. Beyond one point the scale is logarithmic; intervals that reach the edge go
    on beyond it.

    Args:
        rows: as :func:`.lengths.rows`.
        size: in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    panels: dict[tuple[str, str], list[tuple[Row, Difference]]] = {}
    for row in sorted(rows, key=lambda row: (-row.learning_rate, row.device, row.allowed)):
        if row.decay is not None and row.difference is not None and row.share is not None:
            place = f"learning rate {row.learning_rate:g}", row.device
            panels.setdefault(place, []).append((row, row.difference))
    drawn = {_decay_kind(row) for members in panels.values() for row, _ in members}
    ordered = sorted(drawn, key=lambda k: (k[2] >= 50, k[1] != "linear", k[2], ORDER.index(k[0])))
    shaped = len({shape for _, shape, _ in ordered}) > 1
    rates = [rate for rate, _ in panels]
    means = [abs(found.mean) for members in panels.values() for _, found in members]
    reach = 1.5 * max(means, default=0.0) + 1
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if t <= reach]
    axes = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for axis, ((rate, device), members) in zip(axes, panels.items(), strict=False):
        allowed = sorted({row.allowed for row, _ in members})
        there = [kind for kind in ordered if any(_decay_kind(row) == kind for row, _ in members)]
        for i, kind in enumerate(ordered):
            variant, shape, share = kind
            lines = [(row, found) for row, found in members if _decay_kind(row) == kind]
            aside = (sum(k in there for k in ordered[:i]) - (len(there) - 1) / 2) * 0.1
            places = [allowed.index(row.allowed) + aside for row, _ in lines]
            _intervals(axis, places, [found for _, found in lines], COLOURS[variant])
            axis.plot(
                places,
                [found.mean for _, found in lines],
                MARKERS[i % len(MARKERS)],
                color=COLOURS[variant],
                linestyle=":" if share >= 50 else "-",
                fillstyle="none" if share >= 50 else "full",
                label=f"{NAMES[variant]}, {f'{shape} ' * shaped}decay of {share}% of the steps",
            )
        if len(panels) > 1:
            axis.set_title(rate + f",\n{device}" * (rates.count(rate) > 1), fontsize="medium")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([*(-t for t in ticks), 0, *ticks])
        axis.yaxis.set_minor_locator(NullLocator())
        _minus_base(axis, [f"{steps:,}" for steps in allowed], reach)
        axis.label_outer()
    figure.supxlabel("training steps allowed, the decay's among them", fontsize="medium")
    _legend_above(figure, 2, axes[0])
    return figure


def _decay_kind(row: Row) -> tuple[Variant, str, int]:
    """A line of :func:`draw_budgets`: its variant, and the decay's shape and share in percent."""
    return row.variant, "" if row.decay is None else row.decay.shape, round(100 * (row.share or 0))


def _intervals(axis: Axes, places: Sequence[float], of: Sequence[Difference], colour: str) -> None:
    """Upright lines from end to end of those that have an interval."""
    for place, found in zip(places, of, strict=True):
        if found.low is not None and found.high is not None:
            axis.plot([place] * 2, [found.low, found.high], color=colour, linewidth=1.5)


def _minus_base(axis: Axes, names: Sequence[str], reach: float) -> None:
    """Differences to base upwards, up to ``reach`` points, and named places along."""
    axis.axhline(0, color=COLOURS["base"], linewidth=1, zorder=0)
    axis.yaxis.set_major_formatter("{x:+g}")
    axis.set_ylim(-reach, reach)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("final accuracy minus base's, points")


def draw_tradeoff(
    members_by_name: Mapping[str, Sequence[Record]], size: tuple[float, float] = (7, 5)
) -> Figure:
    """Final accuracy against the MACs that are left: a marker per variant, with its spread.

    Args:
        members_by_name: the records of each section, under a short name; each gets a shape.
        size: in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    ink = mpl.rcParams["text.color"]
    handles: list[Line2D] = []
    used: dict[Variant, None] = {}
    for n, (name, members) in enumerate(members_by_name.items()):
        marker = MARKERS[n % len(MARKERS)]
        handles.append(Line2D([], [], color=ink, marker=marker, linestyle="none", label=name))
        grouped = by_variant(members)
        for i, (variant, runs) in enumerate(grouped.items()):
            # Set apart sideways by points, not by data: one variant would hide the other.
            aside = ScaledTranslation(
                (i - (len(grouped) - 1) / 2) * 4 / 72, 0, figure.dpi_scale_trans
            )
            macs = summary([r.macs.left for r in runs])
            final = summary([r.accuracy.final for r in runs])
            place = (macs.mean, final.mean)
            off = (macs.spread or 0.0, final.spread or 0.0)
            # A transform of its own leaves these out of the axes' limits.
            corners = [[m + sign * d for m, d in zip(place, off, strict=True)] for sign in (-1, 1)]
            axis.update_datalim(corners)
            axis.errorbar(
                *place,
                xerr=off[0],
                yerr=off[1],
                fmt=marker,
                color=COLOURS[variant],
                markersize=7,
                markeredgecolor=EDGE,
                markeredgewidth=0.6,
                elinewidth=1,
                capsize=2,
                transform=axis.transData + aside,
            )
            used[variant] = None
        if before := dense(members):
            mean = statistics.fmean(before)
            axis.plot(100, mean, marker, color=ink, fillstyle="none", markersize=8)
    colours = [
        Line2D([], [], color=COLOURS[v], marker="s", linestyle="none", label=NAMES[v])
        for v in ORDER
        if v in used
    ]
    # A column of each kind: long names in both would not fit.
    rows = max(len(colours), len(handles))
    for column in (colours, handles):
        column += [Line2D([], [], linestyle="none", label=" ")] * (rows - len(column))
    axis.autoscale_view()
    axis.set_xlabel("MACs left, % of the dense network (hollow: dense)")
    axis.set_ylabel("final test accuracy, %")
    figure.legend(handles=colours + handles, frameon=False, loc="outside lower left", ncols=2)
    return figure
