"""One page of all results: tables and figures in a single HTML file that needs no other."""

from __future__ import annotations

import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from ..files import save_text
from ..record import ORDER, Record, Speed, Variant
from . import figures, lengths
from .figures import COLOURS
from .grid import Table, text
from .kept import Run
from .norms import LINES, find_norms
from .page import DARK, SIZE, STYLE, Page, palette
from .sections import (
    NAMES,
    Answers,
    answers,
    by_variant,
    dense,
    heading,
    sections,
    short_names,
    summary,
)
from .table import compared

TEMPLATE = Path(__file__).with_name("report.html")

VARIANT_NOTES: dict[Variant, str] = {
    "base": "the framework alone: structures are removed in one step.",
    "sp": "Smooth Pruning: their norm decays to zero over some steps, while training goes on.",
    "sr": "Smooth Pruning and Self-Rectifying: structures that resist are released, and others "
    "decay in their place.",
    "random": "a control: as +SR, but the structures that are released are drawn by chance.",
    "least-resistant": "a control: as +SR, but those that resist least are released.",
}

ENGINES = {"torch": "PyTorch", "onnxruntime": "onnxruntime"}


def report(runs: Sequence[Run], out: Path, budgets: Sequence[Record] = ()) -> Path:
    """Write the page.

    Args:
        runs: each record with the file it was read from, as of :func:`.kept.located`;
            norms are looked for beside it.
        out: the page.
        budgets: runs of decays over several numbers of steps, as :func:`.lengths.keep` keeps
            them; the overview tells what they are worth.

    Returns:
        Its path.

    Raises:
        RunError: records of one experiment differ in configuration, or kept norms are damaged.
    """
    records = [record for _, record in runs]
    with mpl.rc_context(STYLE):
        page = Page()
        found = sections(records)
        parts = [
            _section(page, f"s{i}", title, members, runs)
            for i, (title, members) in enumerate(found, start=1)
        ]
        content = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            light=palette({light: light for light in DARK}),
            dark=palette(DARK),
            runs=f"{len(records)} runs" if len(records) != 1 else "1 run",
            links=_links(found),
            overview=_overview(page, found, lengths.answers(budgets)),
            legend=_legend(records),
            sections="\n".join(parts),
        )
    save_text(out, content)
    return out


def _figure(values: Sequence[float], digits: int) -> str:
    return summary(values).text(digits)


def _links(found: Sequence[tuple[str, list[Record]]]) -> str:
    links = ['<li><a href="#overview">Overview</a></li>']
    links.append('<li><a href="#how">How to read this</a></li>')
    for i, name in enumerate(short_names(found), start=1):
        links.append(f'<li><a href="#s{i}">{text(name)}</a></li>')
    return "\n".join(links)


def _legend(records: Sequence[Record]) -> str:
    return "\n".join(
        f'<dt><span class="chip" style="background:var(--c-{COLOURS[v][1:]})"></span>'
        f"{text(NAMES[v])}</dt><dd>{text(VARIANT_NOTES[v])}</dd>"
        for v in by_variant(records)
    )


def _overview(
    page: Page, found: Sequence[tuple[str, list[Record]]], of_steps: Mapping[str, Answers]
) -> str:
    variants = [v for v in ORDER if any(m.variant == v for _, ms in found for m in ms)]
    body = []
    by_data: dict[str, dict[str, list[Record]]] = {}
    for _, members in found:
        first, grouped = members[0], by_variant(members)
        name = first.name
        before = dense(members)
        body.append(
            [
                name,
                _figure(before, 2) if before else "-",
                *(
                    _figure([m.accuracy.final for m in grouped[v]], 2) if v in grouped else "-"
                    for v in variants
                ),
                f"{statistics.fmean(m.macs.left for m in members):.1f}",
            ]
        )
        by_data.setdefault(first.data, {})[name] = members
    header = ["experiment", "dense", *(NAMES[v] for v in variants)]
    parts = []
    if differences := _differences(page, {**of_steps, **answers(found)}):
        parts += ['<div class="figures">', differences, "</div>"]
    parts.append(Table([*header, "MACs left, %"], body, "Final accuracy, % (mean ± spread)").html())
    drawn = []
    for data, named in by_data.items():
        points = [
            f"{name}, {NAMES[v]}: {_figure([r.accuracy.final for r in runs], 2)}% at "
            f"{_figure([r.macs.left for r in runs], 1)}% of MACs"
            for name, members in named.items()
            for v, runs in by_variant(members).items()
        ]
        drawn.append(
            page.figure(
                figures.draw_tradeoff(named, (SIZE[0], 4.2)),
                f"Accuracy against MACs, {data}",
                "A shape per experiment, a colour per variant, bars for the spread over seeds. "
                "Markers of one experiment are set slightly apart sideways, so that none hides "
                "another. Hollow: the dense network, where there is one.",
                f"Scatter plot of final accuracy against MACs left. {'; '.join(points)}.",
            )
        )
    return "\n".join([*parts, '<div class="figures">', *drawn, "</div>"])


def _differences(page: Page, asked: Mapping[str, Answers]) -> str:
    said = [
        f"{name}, {NAMES[one]} minus {NAMES[other]}: {found.interval}"
        for name, cell in asked.items()
        for (one, other), found in cell.differences.items()
    ]
    if not said:
        return ""
    return page.figure(
        figures.draw_differences(asked, (9, 1 + 0.5 * len(asked))),
        "What it is worth",
        "Differences over pairs with their 95% intervals; those over several numbers of steps come "
        "first, then the most training. "
        "Hollow: pairs of one dense network, which have no interval. A line that reaches the edge "
        "goes on.",
        f"Differences of final accuracy, in points. {'; '.join(said)}.",
    )


def _section(
    page: Page,
    name: str,
    title: str,
    members: list[Record],
    runs: Sequence[Run],
) -> str:
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">',
        f'<h2 id="{name}-title">{text(heading(members[0]))}</h2>',
        _facts(members),
        compared(title, members).html(),
        '<div class="figures">',
        _accuracy(page, members),
        *_norms(page, members, runs),
        *_releases(page, members),
        _latency(page, members),
        _channels(page, members),
        "</div>",
        "<h3>Speed</h3>",
        _speed(members),
        _engines(members),
        "<h3>Channels per layer</h3>",
        _channel_table(members),
        "</section>",
    ]
    return "\n".join(parts)


def _facts(members: Sequence[Record]) -> str:
    first = members[0]
    facts = [f"configuration {first.name}"]
    if apart := first.settings.data.validation:
        facts.append(f"measured on {apart} training images set apart, not on the test images")
    facts.append(f"trained on {_listed(m.device for m in members)}")
    facts += [f"{upstream} {version}" for upstream, version in first.versions.items()]
    facts.append(f"revision {_listed((m.revision or 'unknown')[:12] for m in members)}")
    return f'<p class="quiet">{text("; ".join(facts))}</p>'


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values))


def _ends(members: Sequence[Record], value: Callable[[Record], float], digits: int) -> str:
    return "; ".join(
        f"{NAMES[v]} {_figure([value(r) for r in runs], digits)}"
        for v, runs in by_variant(members).items()
    )


def _accuracy(page: Page, members: Sequence[Record]) -> str:
    at_removal = _ends(members, lambda r: r.accuracy.at_removal, 1)
    final = _ends(members, lambda r: r.accuracy.final, 2)
    return page.figure(
        figures.draw_accuracy(members, size=SIZE),
        "Accuracy around removal",
        "Faint: single seeds; strong: their mean. Dotted: where all that is to go is gone, on "
        "average. Steps count from the framework's decision, where decays start.",
        f"Line chart of test accuracy over training steps. At removal, %: {at_removal}. "
        f"Final, %: {final}.",
    )


def _norms(page: Page, members: Sequence[Record], runs: Sequence[Run]) -> list[str]:
    samples = find_norms(runs, members)
    drawn = []
    for variant, sample in samples.items():
        counts = ", ".join(f"{n} {kind}" for kind, n in sample.counts.items())
        drawn.append(
            page.figure(
                figures.draw_norms({variant: sample}, size=SIZE, top=figures.highest(samples)),
                f"Norms of decaying structures, {NAMES[variant]}, seed {sample.seed}",
                "Each line is the norm of one structure, from the start of its decay; the legend "
                f"counts all of a kind, of which at most {LINES} are drawn."
                + (" Triangles: releases." if sample.releases else ""),
                f"Line chart of structures' norms over optimizer steps, {NAMES[variant]}: "
                f"{counts}.",
            )
        )
    return drawn


def _releases(page: Page, members: Sequence[Record]) -> list[str]:
    mine = [m for m in members if m.variant in figures.RELEASING]
    if not any(m.releases for m in mine):
        return []
    compared = " and ".join(
        [NAMES["sr"]] * any(m.variant == "sr" for m in mine)
        + ["its controls"] * any(m.variant != "sr" for m in mine)
    )
    totals = _ends(mine, lambda r: sum(release.structures for release in r.releases), 1)
    names, heights = figures.releases_by_group(members)
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{NAMES[v]} {heights[v][i]:.1f}" for v in heights)
        for i, name in enumerate(names)
    )
    return [
        page.figure(
            figures.draw_releases(members, size=SIZE),
            "Releases over time",
            f"Structures that {compared} released so far. Faint: single seeds; strong: their mean. "
            "A control releases as many on the same schedule, so its line may lie on that of +SR.",
            f"Step chart of structures released. In all, per run: {totals}.",
        ),
        page.figure(
            figures.draw_releases_by_group(members, size=SIZE),
            "Releases per layer",
            f"Structures that {compared} released in each structure group: mean over seeds.",
            f"Bar chart of structures released per run and structure group. {shown}.",
        ),
    ]


def _channels(page: Page, members: Sequence[Record]) -> str:
    kept = _ends(members, lambda r: sum(width.kept for width in r.channels.values()), 0)
    whole = sum(width.dense for width in members[0].channels.values())
    return page.figure(
        figures.draw_channels(members, size=SIZE),
        "Channels per layer",
        "Output channels of each layer before (pale) and after pruning (coloured): mean over "
        "seeds. The figures are in the table below.",
        f"Bar chart of output channels per layer. All layers together: dense {whole}; {kept}.",
    )


def _channel_table(members: Sequence[Record]) -> str:
    grouped = by_variant(members)
    body = [
        [
            layer,
            str(whole),
            *(
                f"{statistics.fmean(r.channels[layer].kept for r in runs):.1f}"
                for runs in grouped.values()
            ),
        ]
        for layer, (whole, _) in members[0].channels.items()
    ]
    content = Table(
        ["layer", "dense", *(NAMES[v] for v in grouped)],
        body,
        "Output channels per layer, before and after pruning (mean over seeds)",
    ).html()
    return f"<details>\n<summary>All layers as a table</summary>\n{content}\n</details>"


def _measured(members: Sequence[Record]) -> str:
    """Under which circumstances latency was measured."""
    return _listed(
        f"batch {m.latency.batch}, {m.threads} CPU thread{'s' * (m.threads != 1)}, {m.device}"
        for m in members
    )


def _latency(page: Page, members: Sequence[Record]) -> str:
    looks = {
        "dense": "Pale: dense. ",
        "masked": "Hatched: masked, the model right before the removal, with its structures at "
        "zero. ",
        "pruned": "Coloured: pruned. ",
    }
    there = [kind for kind in figures.MODELS if figures.latencies(members, kind)]
    shown = (
        f"{kind.capitalize()}: "
        + "; ".join(
            f"{NAMES[v]} {_figure(values, 2)}"
            for v, runs in by_variant(members).items()
            if (values := figures.latencies(runs, kind))
        )
        for kind in there
    )
    return page.figure(
        figures.draw_latency(members, size=SIZE),
        f"Latency, {', '.join(there[:-1])} and {there[-1]}" if there[1:] else "Latency, pruned",
        "".join(looks[kind] for kind in there)
        + "Median time of a forward pass, measured side by side in each run: "
        f"{_measured(members)}. Mean and spread over seeds.{_dropped(members)}",
        f"Bar chart of milliseconds per forward pass. {'. '.join(shown)}.",
    )


def _dropped(members: Sequence[Record]) -> str:
    """Why some dense latencies are not shown."""
    if all(r.speeds is not None for r in members):
        return ""
    return (
        " The dense latency of runs of earlier releases is left out: it was measured in the slower "
        "of two layouts."
    )


def _speed(members: Sequence[Record]) -> str:
    def faster(runs: Sequence[Record]) -> list[float]:
        return [ms / r.latency.pruned for r in runs if (ms := r.milliseconds("dense")) is not None]

    def shown(values: Sequence[float]) -> str:
        return _figure(values, 2) if values else "-"

    body = [
        [
            NAMES[v],
            *(shown(figures.latencies(runs, kind)) for kind in figures.MODELS),
            shown(faster(runs)),
            _figure([100 * r.loading for r in runs], 1),
            str(len(runs)),
        ]
        for v, runs in by_variant(members).items()
    ]
    header = [
        "variant",
        "dense, ms",
        "masked, ms",
        "pruned, ms",
        "times faster",
        "loading, % of step time",
        "seeds",
    ]
    caption = (
        f"Time of a forward pass: {_measured(members)}. Masked: the model right before the "
        "removal, with its structures at zero. Loading: making batches in training."
        f"{_dropped(members)}"
    )
    return Table(header, body, caption).html()


def _engines(members: Sequence[Record]) -> str:
    """What of the MACs' promise arrives, by engine and batch, of the runs that measured it."""
    body = []
    for v, runs in by_variant([m for m in members if m.speeds]).items():
        grouped: dict[tuple[str, int], list[tuple[Record, Speed]]] = {}
        for run in runs:
            for one in run.speeds or []:
                grouped.setdefault((one.engine, one.batch), []).append((run, one))
        for (engine, batch), timed in grouped.items():
            masked = [one.masked for _, one in timed if one.masked is not None]
            body.append(
                [
                    NAMES[v],
                    f"{ENGINES[engine]}, {batch}",
                    _figure([100 * run.kept_promise(one) for run, one in timed], 0),
                    _figure([one.gain for _, one in timed], 2),
                    _figure([run.macs.dense / run.macs.pruned for run, _ in timed], 2),
                    _figure([one.dense for _, one in timed], 2),
                    _figure(masked, 2) if masked else "-",
                    _figure([one.pruned for _, one in timed], 2),
                ]
            )
    if not body:
        return ""
    # A narrow screen shows the first ones, and scrolls to the others.
    header = ["variant", "engine, batch", "share kept, %", "times faster", "times fewer MACs"]
    header += ["dense, ms", "masked, ms", "pruned, ms"]
    caption = (
        "What is kept of the MACs' promise: how many times faster the pruned model is than the "
        "dense one, as a share of how many times fewer MACs it has. Widths that are multiples of "
        "eight (round_to = 8) are faster on many processors."
    )
    return Table(header, body, caption).html()
