"""One page of all results: tables and figures in a single HTML file that needs no other."""

from __future__ import annotations

import html
import io
import re
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from ..files import save_text
from . import plot, table
from .plot import COLOURS
from .table import NAMES, ORDER, Record, dense, left, summary

TEMPLATE = Path(__file__).with_name("report.html")

INK, LINE = "#111112", "#b0b0b1"
"""Text and lines are drawn in these; the page puts its own colours in their place."""
DARK = {
    "#6b6b6b": "#a8aeb5",
    "#0072b2": "#4aa3dd",
    "#d55e00": "#f2843a",
    "#cc79a7": "#e09bc2",
    "#009e73": "#2cc297",
    plot.PRUNED: "#7d8894",
    plot.DENSE: "#454c55",
    plot.EDGE: "#1c2026",
}
"""The figures' colours, and what stands for them on a dark page."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same records make the same bytes
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.prop_cycle": cycler(color=[INK]),
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.5,
    "font.size": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
SIZE = (4.6, 3.4)
"""Inches of a figure: text stays readable where it is scaled down to a phone's width."""
VARIANT_NOTES = {
    "base": "the framework alone: structures are removed in one step.",
    "sp": "Smooth Pruning: their norm decays to zero over some steps, while training goes on.",
    "sr": "Smooth Pruning and Self-Rectifying: structures that resist are released, and others "
    "decay in their place.",
    "random": "a control: as +SR, but the structures that are released are drawn by chance.",
    "least-resistant": "a control: as +SR, but those that resist least are released.",
}


def report(runs: Sequence[tuple[Path, Record]], out: Path) -> Path:
    """Write the page.

    Args:
        runs: each record with the file it was read from, as of :func:`.table.located`;
            norms are looked for beside it.
        out: the page.

    Returns:
        Its path.

    Raises:
        RunError: records of one experiment differ in configuration, or kept norms are damaged.
    """
    records = [record for _, record in runs]
    with mpl.rc_context(STYLE):
        page = _Page()
        sections = table.sections(records)
        parts = [
            _section(page, f"s{i}", members, runs)
            for i, (_, members) in enumerate(sections, start=1)
        ]
        content = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            light=_palette({light: light for light in DARK}),
            dark=_palette(DARK),
            runs=f"{len(records)} runs" if len(records) != 1 else "1 run",
            links=_links(sections),
            overview=_overview(page, sections),
            legend=_legend(records),
            sections="\n".join(parts),
        )
    save_text(out, content)
    return out


def _palette(colours: dict[str, str]) -> str:
    return "\n".join(f"  --c-{name[1:]}: {value};" for name, value in colours.items())


# ---------------------------------------------------------------------- pieces of HTML


def _text(content: object) -> str:
    return html.escape(str(content))


def from_markdown(text: str) -> str:
    """Tables, lists and paragraphs of Markdown as HTML.

    A paragraph right before a table is its caption. A table's first column heads its rows; columns
    of figures are set to the right.
    """
    parts: list[str] = []
    paragraph = ""
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.strip().splitlines()
        if lines and all(line.lstrip().startswith("|") for line in lines):
            cells = [
                [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", ln.strip())[1:-1]]
                for ln in lines
            ]
            ruled = len(cells) > 1 and all(re.fullmatch(r":?-+:?", c) for c in cells[1])
            parts.append(_table(cells[0], cells[2:] if ruled else cells[1:], paragraph))
            paragraph = ""
        else:
            parts += [f"<p>{_spans(paragraph)}</p>"] * bool(paragraph)
            paragraph = ""
            if all(line.startswith(("- ", "* ")) for line in lines):
                items = "".join(f"<li>{_spans(line[2:].strip())}</li>" for line in lines)
                parts.append(f"<ul>{items}</ul>")
            else:
                paragraph = " ".join(line.strip().lstrip("#").strip() for line in lines)
    parts += [f"<p>{_spans(paragraph)}</p>"] * bool(paragraph)
    return "\n".join(parts)


def _spans(text: str) -> str:
    """Escaped text, with Markdown's bold, emphasis and code."""
    marked = _text(text)
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*(.+?)\*\*", "b"), (r"\*(.+?)\*", "em")):
        marked = re.sub(pattern, rf"<{tag}>\1</{tag}>", marked)
    return marked


def _table(header: Sequence[str], body: Sequence[Sequence[str]], caption: str = "") -> str:
    columns = range(len(header))
    figures = {
        i for i in columns[1:] if all(i >= len(row) or _is_figure(row[i]) for row in body) and body
    }
    kind = [' class="n"' if i in figures else "" for i in columns]
    head = "".join(f'<th scope="col"{kind[i]}>{_spans(header[i])}</th>' for i in columns)
    rows = []
    for row in body:
        cells = [f'<th scope="row">{_spans(row[0])}</th>']
        cells += [f"<td{kind[i]}>{_spans(row[i])}</td>" for i in columns[1 : len(row)]]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    content = (
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>"
    )
    # Not a <caption>, which would scroll sideways with its table.
    title = f'<p class="quiet">{_spans(caption)}</p>\n' if caption else ""
    return title + _scrolling(content, caption or "Table")


def _is_figure(cell: str) -> bool:
    return re.fullmatch(r"(\W*\d.*)?\W*", cell) is not None


def _scrolling(content: str, label: str) -> str:
    """Content that scrolls sideways within itself where the page is narrower."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">\n'
        f"{content}\n</div>"
    )


class _Page:
    """The figures of a page, which share its ids."""

    def __init__(self) -> None:
        self._count = 0

    def figure(self, drawn: Figure, title: str, caption: str, alt: str) -> str:
        """A figure as inline SVG with its caption.

        Args:
            drawn: the figure.
            title: the caption's first words.
            caption: what is to be seen, as plain text.
            alt: what it shows, for those who do not see it.
        """
        self._count += 1
        name = f"f{self._count}"
        wide = drawn.get_figwidth() > 1.4 * SIZE[0]
        picture = _svg(drawn, name, alt, wide)
        if wide:
            picture = _scrolling(picture, title)
        return (
            f'<figure class="wide">\n{picture}' if wide else f"<figure>\n{picture}"
        ) + f"\n<figcaption><b>{_text(title)}.</b> {_text(caption)}</figcaption>\n</figure>"


def _svg(figure: Figure, name: str, alt: str, wide: bool) -> str:
    """A figure as an SVG element for a page: its own ids, the page's colours and fonts."""
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    width = round(figure.get_figwidth() * 96)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: _colour(match.group()), text)
    (box,) = re.findall(r'viewBox="([^"]+)"', text)[:1]
    # A wide one keeps its size and scrolls; the others shrink with the page.
    size = f"width:{width}px" if wide else f"width:100%;max-width:{round(1.2 * width)}px"
    start = f'<svg viewBox="{box}" style="{size}" role="img" aria-label="{_text(alt)}">'
    return start + text[text.index(">") + 1 :].strip()


def _colour(drawn: str) -> str:
    if drawn == INK:
        return "currentColor"
    if drawn == LINE:
        return "var(--quiet)"
    return f"var(--c-{drawn[1:]})" if drawn in DARK else drawn


# ---------------------------------------------------------------------- parts of the page


def _figure(values: Sequence[float], digits: int) -> str:
    return table.figure(summary(values), digits)


def _links(sections: Sequence[tuple[str, list[Record]]]) -> str:
    links = ['<li><a href="#overview">Overview</a></li>']
    links.append('<li><a href="#how">How to read this</a></li>')
    for i, (_, members) in enumerate(sections, start=1):
        first = members[0]
        links.append(
            f'<li><a href="#s{i}">{_text(first["config"]["name"])}, {_text(first["data"])}</a></li>'
        )
    return "\n".join(links)


def _legend(records: Sequence[Record]) -> str:
    return "\n".join(
        f'<dt><span class="chip" style="background:var(--c-{COLOURS[v][1:]})"></span>'
        f"{_text(NAMES[v])}</dt><dd>{_text(VARIANT_NOTES[v])}</dd>"
        for v in plot.by_variant(records)
    )


def _overview(page: _Page, sections: Sequence[tuple[str, list[Record]]]) -> str:
    variants = [v for v in ORDER if any(m["variant"] == v for _, ms in sections for m in ms)]
    body = []
    by_data: dict[str, dict[str, list[Record]]] = {}
    for _, members in sections:
        first, grouped = members[0], plot.by_variant(members)
        name = first["config"]["name"]
        before = dense(members)
        body.append(
            [
                name,
                _figure(before, 2) if before else "-",
                *(
                    _figure([m["accuracy"]["final"] for m in grouped[v]], 2)
                    if v in grouped
                    else "-"
                    for v in variants
                ),
                f"{statistics.fmean(left(m, 'macs') for m in members):.1f}",
            ]
        )
        by_data.setdefault(first["data"], {})[name] = members
    header = ["experiment", "dense", *(NAMES[v] for v in variants)]
    parts = []
    if differences := _differences(page, sections):
        parts += ['<div class="figures">', differences, "</div>"]
    parts.append(_table([*header, "MACs left, %"], body, "Final accuracy, % (mean ± spread)"))
    figures = []
    for data, named in by_data.items():
        points = [
            f"{name}, {NAMES[v]}: {_figure([r['accuracy']['final'] for r in runs], 2)}% at "
            f"{_figure([left(r, 'macs') for r in runs], 1)}% of MACs"
            for name, members in named.items()
            for v, runs in plot.by_variant(members).items()
        ]
        figures.append(
            page.figure(
                plot.draw_tradeoff(named, (SIZE[0], 4.2)),
                f"Accuracy against MACs, {data}",
                "A shape per experiment, a colour per variant, bars for the spread over seeds. "
                "Markers of one experiment are set slightly apart sideways, so that none hides "
                "another. Hollow: the dense network, where there is one.",
                f"Scatter plot of final accuracy against MACs left. {'; '.join(points)}.",
            )
        )
    return "\n".join([*parts, '<div class="figures">', *figures, "</div>"])


def _differences(page: _Page, sections: Sequence[tuple[str, list[Record]]]) -> str:
    named = table.short_names(sections)
    said = [
        f"{name}, {NAMES[one]} minus {NAMES[other]}: {table.interval(asdict(found))}"
        for name, members in named.items()
        for one, other in plot.DIFFERENCES
        if (found := table.minus(members, one, other)) is not None
    ]
    if not said:
        return ""
    return page.figure(
        plot.draw_differences(named, (9, 1 + 0.5 * len(named))),
        "What it is worth",
        "Differences over pairs with their 95% intervals; the first line is of the most training. "
        "Hollow: pairs of one dense network, which have no interval. A line that reaches the edge "
        "goes on.",
        f"Differences of final accuracy, in points. {'; '.join(said)}.",
    )


def _section(
    page: _Page,
    name: str,
    members: list[Record],
    runs: Sequence[tuple[Path, Record]],
) -> str:
    first = members[0]
    heading = f"{first['framework']}, {first['model']}, {first['data']}"
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title">',
        f'<h2 id="{name}-title">{_text(heading)}</h2>',
        _facts(members),
        from_markdown(table.markdown(members)),
        '<div class="figures">',
        _accuracy(page, members),
        *_norms(page, members, runs),
        *_releases(page, members),
        _latency(page, members),
        _channels(page, members),
        "</div>",
        "<h3>Speed</h3>",
        _speed(members),
        "<h3>Channels per layer</h3>",
        _channel_table(members),
        "</section>",
    ]
    return "\n".join(parts)


def _facts(members: Sequence[Record]) -> str:
    first, config = members[0], members[0]["config"]
    facts = [f"configuration {config['name']}"]
    if apart := (config.get("data") or {}).get("validation"):
        facts.append(f"measured on {apart} training images set apart, not on the test images")
    facts.append(f"trained on {_listed(m['device'] for m in members)}")
    facts += [f"{upstream} {version}" for upstream, version in first["versions"].items()]
    facts.append(f"revision {_listed((m['revision'] or 'unknown')[:12] for m in members)}")
    return f'<p class="quiet">{_text("; ".join(facts))}</p>'


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values))


def _ends(members: Sequence[Record], value: Callable[[Record], float], digits: int) -> str:
    return "; ".join(
        f"{NAMES[v]} {_figure([value(r) for r in runs], digits)}"
        for v, runs in plot.by_variant(members).items()
    )


def _accuracy(page: _Page, members: Sequence[Record]) -> str:
    at_removal = _ends(members, lambda r: r["accuracy"]["at_removal"], 1)
    final = _ends(members, lambda r: r["accuracy"]["final"], 2)
    return page.figure(
        plot.draw_accuracy(members, size=SIZE),
        "Accuracy around removal",
        "Faint: single seeds; strong: their mean. Dotted: where all that is to go is gone, on "
        "average. Steps count from the framework's decision, where decays start.",
        f"Line chart of test accuracy over training steps. At removal, %: {at_removal}. "
        f"Final, %: {final}.",
    )


def _norms(
    page: _Page, members: Sequence[Record], runs: Sequence[tuple[Path, Record]]
) -> list[str]:
    samples = plot.find_norms(runs, members)
    figures = []
    for variant, sample in samples.items():
        counts = ", ".join(f"{n} {kind}" for kind, n in sample["counts"].items())
        figures.append(
            page.figure(
                plot.draw_norms({variant: sample}, size=SIZE, top=plot.highest(samples)),
                f"Norms of decaying structures, {NAMES[variant]}, seed {sample['seed']}",
                "Each line is the norm of one structure, from the start of its decay; the legend "
                f"counts all of a kind, of which at most {plot.LINES} are drawn."
                + (" Triangles: releases." if sample["releases"] else ""),
                f"Line chart of structures' norms over optimizer steps, {NAMES[variant]}: "
                f"{counts}.",
            )
        )
    return figures


def _releases(page: _Page, members: Sequence[Record]) -> list[str]:
    mine = [m for m in members if m["variant"] in plot.RELEASING]
    if not any(m["releases"] for m in mine):
        return []
    compared = " and ".join(
        [NAMES["sr"]] * any(m["variant"] == "sr" for m in mine)
        + ["its controls"] * any(m["variant"] != "sr" for m in mine)
    )
    totals = _ends(mine, lambda r: sum(count for _, _, count in r["releases"]), 1)
    names, heights = plot.releases_by_group(members)
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{NAMES[v]} {heights[v][i]:.1f}" for v in heights)
        for i, name in enumerate(names)
    )
    return [
        page.figure(
            plot.draw_releases(members, size=SIZE),
            "Releases over time",
            f"Structures that {compared} released so far. Faint: single seeds; strong: their mean. "
            "A control releases as many on the same schedule, so its line may lie on that of +SR.",
            f"Step chart of structures released. In all, per run: {totals}.",
        ),
        page.figure(
            plot.draw_releases_by_group(members, size=SIZE),
            "Releases per layer",
            f"Structures that {compared} released in each structure group: mean over seeds.",
            f"Bar chart of structures released per run and structure group. {shown}.",
        ),
    ]


def _channels(page: _Page, members: Sequence[Record]) -> str:
    kept = _ends(members, lambda r: sum(width for _, width in r["channels"].values()), 0)
    whole = sum(width for width, _ in members[0]["channels"].values())
    return page.figure(
        plot.draw_channels(members, size=SIZE),
        "Channels per layer",
        "Output channels of each layer before (pale) and after pruning (coloured): mean over "
        "seeds. The figures are in the table below.",
        f"Bar chart of output channels per layer. All layers together: dense {whole}; {kept}.",
    )


def _channel_table(members: Sequence[Record]) -> str:
    grouped = plot.by_variant(members)
    body = [
        [
            layer,
            str(whole),
            *(
                f"{statistics.fmean(r['channels'][layer][1] for r in runs):.1f}"
                for runs in grouped.values()
            ),
        ]
        for layer, (whole, _) in members[0]["channels"].items()
    ]
    content = _table(
        ["layer", "dense", *(NAMES[v] for v in grouped)],
        body,
        "Output channels per layer, before and after pruning (mean over seeds)",
    )
    return f"<details>\n<summary>All layers as a table</summary>\n{content}\n</details>"


def _measured(members: Sequence[Record]) -> str:
    """Under which circumstances latency was measured."""
    return _listed(
        f"batch {m['latency']['batch']}, {m['threads']} CPU thread{'s' * (m['threads'] != 1)}, "
        f"{m['device']}"
        for m in members
    )


def _latency(page: _Page, members: Sequence[Record]) -> str:
    shown = _ends(members, lambda r: r["latency"]["pruned"], 2)
    before = _figure([r["latency"]["dense"] for r in members], 2)
    masked = [m for m in members if plot.masked_latencies([m])]
    between = f" Masked: {_ends(masked, lambda r: r['latency']['masked'], 2)};" * bool(masked)
    return page.figure(
        plot.draw_latency(members, size=SIZE),
        "Latency, dense, masked and pruned" if masked else "Latency, dense and pruned",
        "Pale: dense; "
        + "hatched: masked, the model right before the removal, with its structures at zero; "
        * bool(masked)
        + "coloured: pruned. Median time of a forward pass, measured side by side in each run: "
        f"{_measured(members)}. Mean and spread over seeds.",
        f"Bar chart of milliseconds per forward pass. Dense {before};{between} pruned: {shown}.",
    )


def _speed(members: Sequence[Record]) -> str:
    body = [
        [
            NAMES[v],
            _figure([r["latency"]["dense"] for r in runs], 2),
            _figure(masked, 2) if (masked := plot.masked_latencies(runs)) else "-",
            _figure([r["latency"]["pruned"] for r in runs], 2),
            _figure([r["latency"]["dense"] / r["latency"]["pruned"] for r in runs], 2),
            _figure([100 * r["loading"] for r in runs], 1),
            str(len(runs)),
        ]
        for v, runs in plot.by_variant(members).items()
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
    )
    return _table(header, body, caption)
