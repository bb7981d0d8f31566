"""What records say, as numbers: which may be compared, means and spreads over seeds, and pairs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import as_before
from ..config.rectify import DEFAULT
from ..errors import RunError
from ..record import CONTROLS, ORDER, Record, Variant
from . import published
from .pairs import Difference, difference

NAMES: dict[Variant, str] = {
    "base": "base",
    "sp": "+SP",
    "sr": "+SR",
    "random": "random release",
    "least-resistant": "least resistant",
}
"""What tables and plots call the variants."""
Versus = tuple[Variant, Variant]
"""A variant, and what is subtracted from it."""
DIFFERENCES: tuple[Versus, ...] = (
    ("sp", "base"),
    ("sr", "base"),
    ("sr", "random"),
)
"""What a reader asks of a cell: is smoothing worth it, is rectifying, does the choice matter?"""


@dataclass(frozen=True)
class Summary:
    """Mean and spread: the standard deviation of a sample, ``None`` for a single value."""

    mean: float
    spread: float | None

    def text(self, digits: int) -> str:
        """``mean ± spread``."""
        text = f"{self.mean:.{digits}f}"
        return text if self.spread is None else f"{text} ± {self.spread:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One variant of a section; summaries are over its seeds.

    Attributes:
        variant: which.
        seeds: in order.
        at_removal, at_removal_reestimated, final: accuracies, in percent.
        macs, parameters: what is left, in percent.
        released, decayed: structures.
        difference: the final accuracy minus that of ``base`` over the seeds they share, in points;
            ``None`` without any.
        published: the counterpart's accuracy, in percent.
    """

    variant: Variant
    seeds: list[int]
    at_removal: Summary
    at_removal_reestimated: Summary
    final: Summary
    macs: Summary
    parameters: Summary
    released: Summary
    decayed: Summary
    difference: Difference | None
    published: float | None


@dataclass(frozen=True)
class Answers:
    """What one cell says to :data:`DIFFERENCES`.

    Attributes:
        differences: of final accuracy, in points; only those that have pairs.
        published: what is published for the framework, by variant: its accuracy minus that of the
            framework alone, in points.
        silent: pairs whose ``sr`` released nothing, and so is ``sp``; they are not among the
            differences.
    """

    differences: Mapping[Versus, Difference]
    published: Mapping[Variant, float]
    silent: Collection[Versus] = ()


# ---------------------------------------------------------------------- sections


def sections(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records that may be compared with one another, by what they share.

    Those of many networks, and whose runs trained most, come first: they have most to tell.

    Raises:
        RunError: records of one experiment differ in configuration, in images or in the layers of
            the dense network, so a table would mix them; those of one seed started from different
            weights; or there are several of one variant and seed, and pairs would be ambiguous.
    """
    by_title: dict[str, list[Record]] = {}
    for record in records:
        title = f"{heading(record)} ({record.name})"
        if record.processes > 1:
            title += f", {record.processes} processes"
        by_title.setdefault(title, []).append(record)
    for title, members in by_title.items():
        if len({m.config_hash for m in members}) > 1:
            raise RunError(
                f"the records of {title} come from different configurations; delete the old runs, "
                "or keep them in another --out"
            )
        if len(by_images := first_of_images(members)) > 1:
            each = "; ".join(f"{digest}: {runs}" for digest, runs in by_images.items())
            raise RunError(
                f"the records of {title} are of different images under one name ({each}); give "
                "those of one kind, or carry the others out anew"
            )
        layers = _layers(members[0])
        for member in members:
            if _layers(member) != layers:
                raise RunError(
                    f"the records of {title} are of different networks: {member.variant}, seed "
                    f"{member.seed}, has other layers than the first; run it anew"
                )
        if apart := started_apart(members):
            raise RunError(
                f"among the records of {title}, {apart}, so they are no pair; give only those that "
                "share a dense network, or carry one of them out anew beside the other"
            )
        runs = Counter((m.variant, m.seed) for m in members)
        (variant, seed), times = runs.most_common(1)[0]
        if times > 1:
            raise RunError(
                f"{title} has {times} records of {variant}, seed {seed}; give only one of them"
            )
    return sorted(by_title.items(), key=lambda section: -_weight(section[1]))


def settings_but(record: Record, *left_out: str) -> dict[str, Any]:
    """A run's configuration, as any release would write it, without some of its keys."""
    config = as_before(record.config)  # a later release's may stand beside an earlier one's
    return {key: value for key, value in config.items() if key not in left_out}


def heading(record: Record) -> str:
    """Framework, network and images."""
    return f"{record.framework}, {record.model}, {record.data}"


def _layers(record: Record) -> dict[str, int]:
    return {name: width.dense for name, width in record.channels.items()}


def _weight(members: Sequence[Record]) -> int:
    """How much a section tells (ours): its networks, times the MACs that training one takes.

    Up to the size of a batch, and with the dense model's training.
    """
    one, networks = members[0], len({m.network for m in members})
    return networks * one.macs.dense * (one.steps.total + one.steps.dense)


def first_of_images(records: Sequence[Record]) -> dict[str, str]:
    """The first run on each kind of images; records of earlier releases do not name theirs."""
    first_runs: dict[str, str] = {}
    for record in records:
        if record.images is not None:
            first_runs.setdefault(record.images, f"{record.variant}, seed {record.seed}")
    return first_runs


def started_apart(records: Sequence[Record]) -> str | None:
    """Names two runs of one seed that started from different weights; ``None`` without any.

    One seed has two dense networks where each was trained on a machine of its own: rounding
    differs, and grows. Records of earlier releases do not name theirs.
    """
    first_runs: dict[int, Record] = {}
    for record in records:
        if record.start is not None:
            first = first_runs.setdefault(record.seed, record)
            if first.start != record.start:
                names = f"{first.variant} and {record.variant} of seed {record.seed}"
                return f"{names} started from different weights"
    return None


def short_names(sections: Sequence[tuple[str, list[Record]]]) -> dict[str, list[Record]]:
    """Sections by their experiments' names, with what else tells two of one name apart.

    A criterion that is not the default stands behind the name: there +SR is not the method's.
    """
    times = Counter(members[0].name for _, members in sections)
    named = {}
    for title, members in sections:
        name = members[0].name
        criterion = members[0].settings.rectify.root.get("criterion", DEFAULT)
        kind = "" if criterion == DEFAULT else f" ({criterion})"
        named[f"{name if times[name] == 1 else title}{kind}"] = members
    return named


def answers(sections: Sequence[tuple[str, list[Record]]]) -> dict[str, Answers]:
    """Of those sections that have any, by :func:`short_names`."""
    found = {}
    for name, members in short_names(sections).items():
        told = {pair: d for pair in DIFFERENCES if (d := minus(members, *pair)) is not None}
        releases = any(m.structures.released for m in members if m.variant == "sr")
        silent = () if releases else [pair for pair in told if pair[0] == "sr"]
        if told:
            kept = {pair: d for pair, d in told.items() if pair not in silent}
            found[name] = Answers(kept, gains(members), silent)
    return found


def by_variant(
    members: Sequence[Record], variants: Sequence[Variant] = ORDER
) -> dict[Variant, list[Record]]:
    """Records by variant, in the order of tables; only variants that have any."""
    grouped = {v: [r for r in members if r.variant == v] for v in variants}
    return {v: runs for v, runs in grouped.items() if runs}


# ---------------------------------------------------------------------- figures


def summary(values: Sequence[float]) -> Summary:
    """Mean and spread of one or more values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread)


def dense(members: Sequence[Record]) -> list[float]:
    """Accuracies of a section's dense networks, each once, by seed."""
    by_network = {m.network: a for m in members if (a := m.accuracy.dense) is not None}
    return [by_network[seed] for seed in sorted(by_network)]


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per variant of a section."""
    table, start = [], benchmark(records)
    for variant, runs in by_variant(records).items():

        def over(value: Callable[[Record], float], runs: list[Record] = runs) -> Summary:
            return summary([value(r) for r in runs])

        table.append(
            Row(
                variant,
                seeds=sorted(r.seed for r in runs),
                at_removal=over(lambda r: r.accuracy.at_removal),
                at_removal_reestimated=over(lambda r: r.accuracy.at_removal_reestimated),
                final=over(lambda r: r.accuracy.final),
                macs=over(lambda r: r.macs.left),
                parameters=over(lambda r: r.parameters.left),
                released=over(lambda r: r.structures.released),
                decayed=over(lambda r: r.structures.decayed),
                difference=None if variant == "base" else minus(records, variant, "base"),
                published=None if start is None else start.top1(*counterpart(records), variant),
            )
        )
    return table


def contrasts(records: Sequence[Record]) -> list[tuple[Variant, Difference]]:
    """Final accuracy of ``sr`` minus that of its controls and of ``sp``, where there are pairs.

    Returns:
        What is subtracted, and the difference, in points.
    """
    others: tuple[Variant, ...] = (*CONTROLS, "sp")
    return [(other, d) for other in others if (d := minus(records, "sr", other)) is not None]


def minus(records: Sequence[Record], one: Variant, other: Variant) -> Difference | None:
    """Final accuracy of one variant minus another's over a section's pairs, in points."""

    def finals(variant: Variant) -> dict[int, float]:
        return {r.seed: r.accuracy.final for r in records if r.variant == variant}

    return difference(finals(one), finals(other), {r.seed: r.network for r in records})


def gains(records: Sequence[Record]) -> dict[Variant, float]:
    """What is published for the counterparts of some variants, minus that of base, in points."""
    figures = benchmark(records)
    if figures is None:
        return {}
    top1 = {variant: figures.top1(*counterpart(records), variant) for variant in ORDER}
    start = top1.pop("base")
    return {v: round(t - start, 2) for v, t in top1.items() if t is not None and start is not None}


def counterpart(records: Sequence[Record]) -> tuple[str, bool]:
    """What tells a section's counterpart among what is published: see :mod:`.published`."""
    return records[0].framework, "sparse" in records[0].settings.stages


def benchmark(records: Sequence[Record]) -> published.Benchmark | None:
    """The published table that a section's figures can stand beside."""
    options = records[0].settings.options
    own = ("round_to", "isomorphic", "max_pruning_ratio")
    if options.get("importance", "magnitude") != "magnitude" or any(key in options for key in own):
        return None  # the published figures are of upstream's ranking, and of widths as they fall
    return published.load().benchmark(*counterpart(records))
