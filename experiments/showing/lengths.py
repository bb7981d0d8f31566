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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import as_before
from ..errors import RunError
from ..files import save_text
from ..record import ORDER, Record, Variant
from .grid import Table
from .kept import as_lines, read
from .pairs import Difference, difference
from .sections import NAMES, Summary, summary

KEPT = Path(__file__).parents[1] / "results" / "lengths.jsonl"
BUDGETS = KEPT.with_name("budgets.jsonl")
HEADER = (
    "steps",
    "learning rate",
    "variant",
    "decay, steps",
    "decay, %",
    "top-1, %",
    "to base, points",
    "pairs",
    "networks",
)
OF_RELEASES = ("to chance, points", "released")


def keep(records: Sequence[Record], path: Path = KEPT, *, chosen: bool = True) -> None:
    """Add records to the kept ones, in a fixed order; a run that is there is replaced.

    Args:
        records: of ``base`` and ``sp``, on validation images; or, unless ``chosen``, of any
            variant, and on test images.
        path: the file, with one record per line.
        chosen: whether a length is chosen by them.

    Raises:
        RunError: before anything is written; a record is not of such a run, or the file is damaged.
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
    runs = {(r.config_hash, r.variant, r.seed): r for r in [*there, *records]}
    ordered = sorted(runs.values(), key=lambda r: (_order(r), r.variant, r.seed))
    save_text(path, as_lines(ordered))


@dataclass(frozen=True)
class Row:
    """One fine-tuning and decay.

    Attributes:
        allowed: training steps of the stage ``prune``, the decay's among them.
        learning_rate: of the stage ``prune``.
        variant: of the runs.
        steps: of the decay, ``None`` for base.
        final: accuracy over the seeds, in percent.
        seeds: in order.
        difference: to the base of the same fine-tuning over the seeds that both have, in points;
            ``None`` without any.
        to_chance: the same, to releasing as many by chance; ``None`` but for ``sr``, and without.
        released: structures; ``None`` for variants that release none.
    """

    allowed: int
    learning_rate: float
    variant: Variant
    steps: int | None
    final: Summary
    seeds: list[int]
    difference: Difference | None
    to_chance: Difference | None = None
    released: Summary | None = None

    @property
    def share(self) -> float | None:
        """The decay's steps as a share of all; ``None`` for base."""
        return None if self.steps is None else self.steps / self.allowed


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per fine-tuning, decay and variant, base before the decays."""
    cells: dict[str, dict[tuple[int, Variant], list[Record]]] = {}
    for record in sorted(records, key=_order):
        steps = 0 if record.variant == "base" else record.settings.smooth.steps
        tried = cells.setdefault(_fine_tuning(record), {})
        tried.setdefault((steps, record.variant), []).append(record)
    listed = []
    for tried in cells.values():
        base = _finals(tried.get((0, "base"), []))
        for steps, variant in sorted(tried, key=lambda of: (of[0], ORDER.index(of[1]))):
            members = tried[steps, variant]
            final = _finals(members)
            start = {r.seed: r.network for r in members}
            chance = _finals(tried.get((steps, "random"), []) if variant == "sr" else [])
            released = summary([r.structures.released for r in members])
            listed.append(
                Row(
                    members[0].steps.total,
                    members[0].settings.stages["prune"].learning_rate,
                    variant,
                    steps or None,
                    summary(list(final.values())),
                    sorted(final),
                    None if variant == "base" else difference(final, base, start),
                    difference(final, chance, start),
                    None if variant in ("base", "sp") else released,
                )
            )
    return listed


def table(records: Sequence[Record]) -> Table:
    """The table of :func:`rows`, with columns of releases where there are any."""
    lines, found = [], rows(records)
    releasing = any(row.released for row in found)
    for row in found:
        versus, share = row.difference, row.share
        chance, released = row.to_chance, row.released
        of_releases = [chance.interval if chance else "-", released.text(1) if released else "-"]
        lines.append(
            [
                f"{row.allowed:,}",
                f"{row.learning_rate:g}",
                NAMES[row.variant],
                "-" if row.steps is None else f"{row.steps:,}",
                "-" if share is None else f"{100 * share:.0f}",
                row.final.text(2),
                versus.interval if versus else "-",
                str(versus.pairs if versus else len(row.seeds)),
                str(versus.networks) if versus else "-",
                *(of_releases if releasing else []),
            ]
        )
    return Table((*HEADER, *(OF_RELEASES if releasing else ())), lines)


def _fine_tuning(record: Record) -> str:
    """All that a run depends on but its seed and its decay, as text."""
    whole = as_before(record.config)  # a later release's may stand beside an earlier one's
    config = {k: v for k, v in whole.items() if k not in ("name", "smooth", "curve")}
    return json.dumps(config, sort_keys=True)


def _order(record: Record) -> tuple[Any, ...]:
    stage = record.settings.stages["prune"]
    return stage.epochs, -stage.learning_rate, record.settings.smooth.steps


def _finals(records: Sequence[Record]) -> dict[int, float]:
    """By seed; base was run once per fine-tuning and seed, under whichever decay's name."""
    return {r.seed: r.accuracy.final for r in records}
