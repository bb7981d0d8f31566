"""How long a decay should take: tables of runs that differ in it, and in the steps they have.

``python -m experiments lengths RUNS...`` adds records of runs on validation images, by which a
length is chosen, to the kept ones in ``experiments/results/lengths.jsonl`` and prints their table.
``python -m experiments budgets RUNS...`` does the same with runs on test images, which say what a
decay is worth with so many steps, in ``experiments/results/budgets.jsonl``. Their configurations
are in the records alone: each is one of ``experiments/configs`` with another stage ``prune`` and
another ``[smooth]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpm_core import SmoothPruning

from ..errors import RunError
from ..files import save_text
from ..record import ORDER, Record, Variant
from .grid import Table
from .kept import as_lines, read
from .pairs import Difference, difference
from .sections import (
    DIFFERENCES,
    NAMES,
    Answers,
    Summary,
    Versus,
    gains,
    settings_but,
    started_apart,
    summary,
)

KEPT = Path(__file__).parents[1] / "results" / "lengths.jsonl"
BUDGETS = KEPT.with_name("budgets.jsonl")
OTHERS: dict[Variant, tuple[Variant, ...]] = {
    "sp": ("base",),
    "sr": ("base", "random", "sp"),
    "random": ("base", "sp"),
    "least-resistant": ("base", "sp"),
}
"""What is subtracted from each variant."""
HEADER = (
    "steps",
    "learning rate",
    "variant",
    "decay, steps",
    "decay, %",
    "at removal (BN re-estimated), %",
    "top-1, %",
    "to base, points",
    "pairs",
    "networks",
)
OF_SHAPES = ("shape",)
OF_RELEASES = ("to chance, points", "released")
OF_MACHINES = ("machine",)


def keep(records: Sequence[Record], path: Path = KEPT, *, chosen: bool = True) -> None:
    """Add records to the kept ones, in a fixed order; a run that is there is replaced.

    The same run on another machine is another run: its dense network was trained there.

    Args:
        records: of ``base`` and ``sp``, on validation images; or, unless ``chosen``, of any
            variant, and on test images.
        path: the file, with one record per line.
        chosen: whether a length is chosen by them.

    Raises:
        RunError: before anything is written; a record is not of such a run, those of one seed and
            machine started from different dense networks, or the file is damaged.
    """
    there = read([path]) if path.exists() else []
    for record in records:
        name = f"{record.name}, {record.variant}, seed {record.seed}"
        if chosen and record.variant not in ("base", "sp"):
            raise RunError(f"{name} is neither base nor sp; the decay's length is chosen by those")
        if "prune" not in record.settings.stages:
            raise RunError(f"{name} has no stage 'prune', whose steps are compared here")
        if chosen and record.settings.data.validation is None:
            raise RunError(f"{name} is measured on test images; choose with --validation")
        if not chosen and record.settings.data.validation is not None:
            raise RunError(f"{name} is measured on validation images; `lengths` takes those")
    runs = {(r.config_hash, r.variant, r.seed, r.device): r for r in [*there, *records]}
    for cell in _cells(list(runs.values())).values():
        if apart := started_apart(cell):
            raise RunError(
                f"of the records to keep in {path}, {apart}, so they are no pair; carry out all "
                "runs of that seed beside one another"
            )
    ordered = sorted(runs.values(), key=lambda r: (_order(r), r.seed))
    save_text(path, as_lines(ordered))


@dataclass(frozen=True)
class Row:
    """One fine-tuning and decay.

    Attributes:
        recipe: all that the runs depend on but their seed, decay and number of steps, as text.
        allowed: training steps of the stage ``prune``, the decay's among them.
        learning_rate: of the stage ``prune``.
        variant: of the runs.
        decay: its steps and shape, ``None`` for base.
        device: the machine that the runs were made on.
        at_removal, at_removal_reestimated, final: accuracies over the seeds, in percent.
        seeds: in order.
        networks: the dense network that each seed's run started from.
        differences: of the final accuracy to that of others with the same fine-tuning on the same
            machine, over the seeds that both have, in points: to base, and of variants that
            release to ``sp`` and of ``sr`` to ``random`` with the same decay. Those without a
            common seed are left out.
        released: structures; ``None`` for variants that release none.
    """

    recipe: str
    allowed: int
    learning_rate: float
    variant: Variant
    decay: SmoothPruning | None
    device: str
    at_removal: Summary
    at_removal_reestimated: Summary
    final: Summary
    seeds: list[int]
    networks: Mapping[int, int]
    differences: Mapping[Variant, Difference]
    released: Summary | None = None

    @property
    def difference(self) -> Difference | None:
        """To base."""
        return self.differences.get("base")

    @property
    def share(self) -> float | None:
        """The decay's steps as a share of all; ``None`` for base."""
        return None if self.decay is None else self.decay.steps / self.allowed


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per fine-tuning, machine, decay and variant, base before the decays."""
    listed = []
    for (_, device), cell in _cells(sorted(records, key=_order)).items():
        tried: dict[tuple[SmoothPruning | None, Variant], list[Record]] = {}
        for record in cell:
            tried.setdefault((_decay(record), record.variant), []).append(record)
        for (decay, variant), members in tried.items():
            final = _finals(members)
            start = {r.seed: r.network for r in members}
            differences = {}
            for other in OTHERS.get(variant, ()):
                finals = _finals(tried.get((None if other == "base" else decay, other), []))
                if (versus := difference(final, finals, start)) is not None:
                    differences[other] = versus
            listed.append(
                Row(
                    _recipe(members[0]),
                    members[0].steps.total,
                    members[0].settings.stages["prune"].learning_rate,
                    variant,
                    decay,
                    device,
                    summary([r.accuracy.at_removal for r in members]),
                    summary([r.accuracy.at_removal_reestimated for r in members]),
                    summary(list(final.values())),
                    sorted(final),
                    start,
                    differences,
                    summary([r.structures.released for r in members])
                    if variant not in ("base", "sp")
                    else None,
                )
            )
    return listed


def table(records: Sequence[Record]) -> Table:
    """The table of :func:`rows`, with columns of what differs: shapes, releases, machines."""
    lines, found = [], rows(records)
    shaped = len({row.decay.shape for row in found if row.decay}) > 1
    releasing = any(row.released for row in found)
    elsewhere = len({row.device for row in found}) > 1
    for row in found:
        versus, decay, share = row.difference, row.decay, row.share
        chance, released = row.differences.get("random"), row.released
        of_releases = [chance.interval if chance else "-", released.text(1) if released else "-"]
        lines.append(
            [
                f"{row.allowed:,}",
                f"{row.learning_rate:g}",
                NAMES[row.variant],
                "-" if decay is None else f"{decay.steps:,}",
                "-" if share is None else f"{100 * share:.0f}",
                *(["-" if decay is None else decay.shape] if shaped else []),
                f"{row.at_removal.mean:.1f} ({row.at_removal_reestimated.mean:.1f})",
                row.final.text(2),
                versus.interval if versus else "-",
                str(versus.pairs if versus else len(row.seeds)),
                str(versus.networks) if versus else "-",
                *(of_releases if releasing else []),
                *([row.device] if elsewhere else []),
            ]
        )
    at = HEADER.index("decay, %") + 1
    header = (
        *(*HEADER[:at], *(OF_SHAPES if shaped else ()), *HEADER[at:]),
        *(OF_RELEASES if releasing else ()),
        *(OF_MACHINES if elsewhere else ()),
    )
    return Table(header, lines)


@dataclass(frozen=True)
class Decays:
    """Decays of the same share of several numbers of steps, on one machine.

    Attributes:
        recipe, device, learning_rate: as of each :class:`Row`.
        shape: of the decays.
        percent: of the steps, rounded.
    """

    recipe: str
    device: str
    learning_rate: float
    shape: str
    percent: int


@dataclass(frozen=True)
class OverSteps:
    """What such decays are worth.

    Attributes:
        versus: a variant, and what is subtracted from it.
        allowed: the numbers of steps, in order.
        difference: over all pairs, those of one dense network as one; in points.
    """

    versus: Versus
    allowed: list[int]
    difference: Difference

    def line(self, of: Decays, *, with_device: bool) -> str:
        """As text, for a list of them."""
        one, other = (NAMES[variant] for variant in self.versus)
        steps = [f"{steps:,}" for steps in self.allowed]
        return (
            f"{one} minus {other}, {of.shape} decays of {of.percent}% of {', '.join(steps[:-1])} "
            f"and {steps[-1]} steps, learning rate {of.learning_rate:g}"
            f"{f', {of.device}' * with_device}: {self.difference.interval}, "
            f"{self.difference.counted}"
        )


def markdown(records: Sequence[Record]) -> str:
    """The table, and what decays of one share are worth over all numbers of steps."""
    found = rows(records)
    apart = len({row.device for row in found}) > 1
    lines = [
        f"- {one.line(decays, with_device=apart)}"
        for decays, told in over_steps(found).items()
        for one in told
    ]
    return "\n\n".join([table(records).markdown(), *(["\n".join(lines)] if lines else [])])


def over_steps(found: Sequence[Row]) -> dict[Decays, list[OverSteps]]:
    """What decays of the same share of the steps are worth, over all numbers of steps.

    All their pairs count, those of one dense network as one: see :func:`.pairs.difference`. What
    was run with one number of steps alone is left out.
    """
    alike: dict[Decays, dict[Variant, list[Row]]] = {}
    for row in found:
        if row.decay is not None and row.share is not None:
            percent = round(100 * row.share)
            kind = Decays(row.recipe, row.device, row.learning_rate, row.decay.shape, percent)
            alike.setdefault(kind, {}).setdefault(row.variant, []).append(row)
    worth: dict[Decays, list[OverSteps]] = {}
    for kind, by_variant in alike.items():
        for variant, members in by_variant.items():
            for other in OTHERS[variant]:
                told = [(r, r.differences[other]) for r in members if other in r.differences]
                allowed = sorted({row.allowed for row, _ in told})
                whole = _together(told)
                if len(allowed) > 1 and whole is not None:
                    one = OverSteps((variant, other), allowed, whole)
                    worth.setdefault(kind, []).append(one)
    return worth


def _together(told: Sequence[tuple[Row, Difference]]) -> Difference | None:
    """The differences of several rows as one, all pairs of a dense network together."""
    pairs = [
        (value, row.networks[seed])
        for row, d in told
        for seed, value in zip(d.seeds, d.values, strict=True)
    ]
    return difference(
        {i: value for i, (value, _) in enumerate(pairs)},
        dict.fromkeys(range(len(pairs)), 0.0),
        {i: network for i, (_, network) in enumerate(pairs)},
    )


def answers(records: Sequence[Record]) -> dict[str, Answers]:
    """What decays over several numbers of steps say to what a reader asks of a cell.

    Those of the lowest learning rate first, where a decay is worth most. Decays that were run as
    ``sp`` alone are left out: they were tried for their length.
    """
    first = {(_recipe(r), r.device): r for r in reversed(records)}
    named: dict[str, Answers] = {}
    worth = sorted(over_steps(rows(records)).items(), key=lambda item: item[0].learning_rate)
    for decays, told in worth:
        differences = {one.versus: one.difference for one in told}
        found = {versus: differences[versus] for versus in DIFFERENCES if versus in differences}
        if not any(variant == "sr" for variant, _ in found):
            continue
        record = first[decays.recipe, decays.device]
        allowed = sorted({steps for one in told for steps in one.allowed})
        name = (
            f"{record.framework}-{record.model}, {allowed[0]:,} to {allowed[-1]:,} steps at "
            f"{decays.learning_rate:g}"
        )
        if name in named:
            name += f", {decays.shape}, {decays.percent}%, {decays.device}"
        named[name] = Answers(found, gains([record]))
    return named


def _cells(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records that differ in seed and decay alone, by their fine-tuning and machine."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cells.setdefault((_fine_tuning(record), record.device), []).append(record)
    return cells


def _decay(record: Record) -> SmoothPruning | None:
    """None for base, which was run once per fine-tuning and seed, under whichever decay's name."""
    return None if record.variant == "base" else record.settings.smooth


def _fine_tuning(record: Record) -> str:
    """All that a run depends on but its seed and its decay, as text."""
    return json.dumps(settings_but(record, "name", "smooth", "curve"), sort_keys=True)


def _recipe(record: Record) -> str:
    """The same without the length of the fine-tuning."""
    config = json.loads(_fine_tuning(record))
    stage = config["stages"]["prune"]
    config["stages"]["prune"] = {
        k: v for k, v in stage.items() if k not in ("epochs", "milestones")
    }
    return json.dumps(config, sort_keys=True)


def _order(record: Record) -> tuple[Any, ...]:
    """By fine-tuning and machine; base before the decays, and lines before other shapes."""
    stage, decay = record.settings.stages["prune"], _decay(record)
    ranked = (0, 0) if decay is None else (1 + (decay.shape != "linear"), decay.steps)
    return stage.epochs, -stage.learning_rate, record.device, ranked, ORDER.index(record.variant)


def _finals(records: Sequence[Record]) -> dict[int, float]:
    """By seed."""
    return {r.seed: r.accuracy.final for r in records}
