"""The tables of sections: mean and spread over seeds, and what pairs of runs say."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..record import Record, Variant
from .grid import Table, text
from .pairs import Difference, difference
from .sections import (
    DIFFERENCES,
    NAMES,
    Answers,
    Row,
    Versus,
    benchmark,
    by_variant,
    contrasts,
    dense,
    gains,
    rows,
    sections,
    settings_but,
    started_apart,
)

EFFECT, ENOUGH = 0.3, 25
"""The effect that is looked for, in points, and the pairs that it takes at the least, with a dense
network each."""
NOT_OF_BASE = ("name", "smooth", "rectify", "curve")
"""What base does not depend on, among the keys of a configuration."""
FEW = 6
"""So many pairs are listed one by one."""
HEADER = (
    "variant",
    "FLOPs, %",
    "params, %",
    "top-1, %",
    "to base, points",
    "detectable, points",
    "at removal, %",
    "BN re-estimated, %",
    "released",
    "paper",
    "pairs",
)


@dataclass(frozen=True)
class Compared:
    """What is said of one section: a table, further comparisons of its pairs, and a caution."""

    table: Table
    contrasts: Sequence[str]
    caution: str | None

    def markdown(self) -> str:
        """With the table's caption as a paragraph."""
        parts = [self.table.markdown()]
        if self.contrasts:
            parts.append("\n".join(f"- {line}" for line in self.contrasts))
        return "\n\n".join([*parts, *([self.caution] if self.caution else [])])

    def html(self) -> str:
        """The same for a page."""
        parts = [self.table.html()]
        if self.contrasts:
            items = "".join(f"<li>{text(line)}</li>" for line in self.contrasts)
            parts.append(f"<ul>{items}</ul>")
        return "\n".join([*parts, *([f"<p>{text(self.caution)}</p>"] if self.caution else [])])


def markdown(records: Sequence[Record]) -> str:
    """All sections as Markdown."""
    return "\n\n".join(compared(title, members).markdown() for title, members in sections(records))


def compared(title: str, members: Sequence[Record]) -> Compared:
    """What there is to say of one section.

    Args:
        title: the section's.
        members: its records.
    """
    table, published, gained = rows(members), benchmark(members), gains(members)
    header = [*HEADER]
    if published is not None:
        header[header.index("paper")] = f"paper ({published.network}, {published.data}), %"
    differences = contrasts(members)
    return Compared(
        Table(header, [_cells(row, gained) for row in table], f"{title}; {_training(members)}"),
        [_contrast(other, versus) for other, versus in differences]
        + [
            f"{NAMES[row.variant]} minus base by seed: {row.difference.by_seed}"
            for row in table
            if row.difference and 1 < row.difference.pairs <= FEW
        ],
        _caution([r.difference for r in table if r.difference] + [d for _, d in differences]),
    )


def differences(answers: Mapping[str, Answers]) -> Table:
    """What a reader asks of every cell, a line for each: the text to the picture of them.

    Args:
        answers: of each cell, under a short name, in their order.
    """
    lines = []
    for name, cell in answers.items():
        most = max(cell.differences.values(), key=lambda d: d.pairs, default=None)
        texts = []
        for one, other in DIFFERENCES:
            versus = cell.differences.get((one, other))
            if versus is None or most is None:
                texts.append("released nothing" if (one, other) in cell.silent else "-")
                continue
            gained = cell.published.get(one) if other == "base" else None
            paper = "" if gained is None else f" ({gained:+g})"
            fewer = f", {versus.counted}" if versus.pairs < most.pairs else ""
            texts.append(f"{versus.interval}{paper}{fewer}")
        lines.append([name, *texts, most.counted if most else "-"])
    header = ["experiment", *(f"{NAMES[one]} minus {NAMES[other]}" for one, other in DIFFERENCES)]
    caption = (
        "Final accuracy in points, with 95% intervals where there are several networks; in "
        "parentheses what is published for the framework, from single runs on other networks."
    )
    return Table([*header, "pairs"], lines, caption)


def across(members: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """A section against another that starts from the same networks, where one needs the other.

    Where a section is base alone, a control that is a configuration of its own: that against every
    variant of the other. Where it has no base: every variant against the base of one that differs
    in its rectifier alone. Nothing where pairs are none.
    """
    mine, theirs = by_variant(members), by_variant(others)
    if "base" in mine:
        pairs: list[Versus] = [("base", other) for other in theirs] if len(mine) == 1 else []
    else:
        whole, twin = (settings_but(of[0], *NOT_OF_BASE) for of in (members, others))
        pairs = [(one, "base") for one in mine] if "base" in theirs and whole == twin else []
    lines = []
    for one, other in pairs:
        if started_apart([*mine[one], *theirs[other]]):
            continue
        ours, against = (
            {r.seed: r.accuracy.final for r in of} for of in (mine[one], theirs[other])
        )
        versus = difference(ours, against, {r.seed: r.network for r in theirs[other]})
        if versus is not None:
            what = f"{NAMES[one]} minus {NAMES[other]} of {others[0].name}"
            lines.append(f"{what}: {versus.interval} points, {versus.counted}")
    return lines


def _training(members: Sequence[Record]) -> str:
    steps, accuracies = members[0].steps, dense(members)
    if not accuracies:
        return f"from scratch, {steps.total:,} steps"
    accuracy, start = statistics.fmean(accuracies), "dense"
    if len(accuracies) < len({m.seed for m in members}):
        start = f"{len(accuracies)} dense network{'s' if len(accuracies) > 1 else ''} at"
    return f"{start} {accuracy:.2f}% after {steps.dense:,} steps, then {steps.total:,} steps"


def _cells(row: Row, gained: Mapping[Variant, float]) -> list[str]:
    """A row's cells; ``gained`` is what is published above the framework alone."""
    released, decayed = row.released.mean, row.decayed.mean
    seeds, versus = len(row.seeds), row.difference
    pairs = seeds if row.variant == "base" else versus.pairs if versus else 0
    return [
        NAMES[row.variant],
        f"{row.macs.mean:.1f}",
        f"{row.parameters.mean:.1f}",
        row.final.text(2),
        versus.interval if versus else "-",
        "-" if versus is None or versus.detectable is None else f"{versus.detectable:.2f}",
        row.at_removal.text(1),
        row.at_removal_reestimated.text(1),
        f"{released:.1f} of {decayed:.0f}" if decayed else "-",
        _paper(row, gained),
        str(pairs) if pairs == seeds else f"{pairs} of {seeds}",
    ]


def _paper(row: Row, gained: Mapping[Variant, float]) -> str:
    top1 = row.published
    if top1 is None:
        return "-"
    return f"{top1:g} ({gained[row.variant]:+g})" if row.variant in gained else f"{top1:g}"


def _contrast(other: Variant, versus: Difference) -> str:
    line = f"{NAMES['sr']} minus {NAMES[other]}: {versus.interval} points, {versus.counted}"
    return line if versus.detectable is None else f"{line}, {versus.detectable:.2f} detectable"


def _caution(differences: Sequence[Difference]) -> str | None:
    """A sentence where the pairs of a section are too few to speak about a small effect."""
    if not differences:
        return None
    fewest = min(differences, key=lambda d: (d.networks, d.pairs))
    sizes = [d.detectable for d in differences if d.detectable is not None]
    if fewest.networks >= ENOUGH and max(sizes) <= EFFECT:
        return None
    if fewest.pairs == 1:
        return f"One pair is too few to speak about {EFFECT} points."
    sentence = f"{fewest.counted} are too few to speak about {EFFECT} points"
    if fewest.networks == 1:
        return f"{sentence}: what another network would do, they do not tell."
    spread = "pairs" if fewest.networks == fewest.pairs else "networks"
    return f"{sentence} (detectable, by the spread of the {spread}: {max(sizes):.2f} points)."
