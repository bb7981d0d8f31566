"""How long a decay should take: a table of runs on validation images that differ in it alone.

``python -m experiments lengths RUNS...`` adds their records to the kept ones in
``experiments/results/lengths.jsonl`` and prints the table. Their configurations are in the records
alone: each is one of ``experiments/configs`` with another stage ``prune`` and another ``[smooth]``.
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
from ..record import Record
from .grid import Table
from .kept import as_lines, read
from .pairs import Difference, difference
from .sections import Summary, summary

KEPT = Path(__file__).parents[1] / "results" / "lengths.jsonl"
HEADER = (
    "epochs",
    "learning rate",
    "decay, steps",
    "decay, %",
    "top-1, %",
    "to base, points",
    "pairs",
    "networks",
)


def keep(records: Sequence[Record], path: Path = KEPT) -> None:
    """Add records to the kept ones, in a fixed order; a run that is there is replaced.

    Args:
        records: of ``base`` and ``sp``, on validation images.
        path: the file, with one record per line.

    Raises:
        RunError: before anything is written; a record is not of such a run, or the file is damaged.
    """
    there = read([path]) if path.exists() else []
    for record in records:
        name = f"{record.name}, {record.variant}, seed {record.seed}"
        if record.variant not in ("base", "sp"):
            raise RunError(f"{name} is neither base nor sp; the decay's length is chosen by those")
        if record.settings.data.validation is None:
            raise RunError(f"{name} is measured on test images; choose with --validation")
    runs = {(r.config_hash, r.variant, r.seed): r for r in [*there, *records]}
    ordered = sorted(runs.values(), key=lambda r: (_order(r), r.variant, r.seed))
    save_text(path, as_lines(ordered))


@dataclass(frozen=True)
class Row:
    """One fine-tuning and decay.

    Attributes:
        epochs, learning_rate: of the stage ``prune``.
        steps: of the decay, ``None`` for base.
        share: ``steps`` as a share of the fine-tuning's.
        final: accuracy over the seeds, in percent.
        seeds: in order.
        difference: to the base of the same fine-tuning over the seeds that both have, in points;
            ``None`` without any.
    """

    epochs: int
    learning_rate: float
    steps: int | None
    share: float | None
    final: Summary
    seeds: list[int]
    difference: Difference | None


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per fine-tuning and decay, base before the decays."""
    cells: dict[str, dict[int | None, list[Record]]] = {}
    for record in sorted(records, key=_order):
        steps = None if record.variant == "base" else record.settings.smooth.steps
        cells.setdefault(_fine_tuning(record), {}).setdefault(steps, []).append(record)
    listed = []
    for tried in cells.values():
        base = _finals(tried.get(None, []))
        for steps in sorted(tried, key=lambda s: s or 0):
            members, final = tried[steps], _finals(tried[steps])
            stage = members[0].settings.stages["prune"]
            start = {r.seed: r.network for r in members}
            listed.append(
                Row(
                    stage.epochs,
                    stage.learning_rate,
                    steps,
                    None if steps is None else steps / members[0].steps.total,
                    summary(list(final.values())),
                    sorted(final),
                    None if steps is None else difference(final, base, start),
                )
            )
    return listed


def table(records: Sequence[Record]) -> Table:
    """The table of :func:`rows`."""
    lines = []
    for row in rows(records):
        versus = row.difference
        lines.append(
            [
                str(row.epochs),
                f"{row.learning_rate:g}",
                "-" if row.steps is None else f"{row.steps:,}",
                "-" if row.share is None else f"{100 * row.share:.0f}",
                row.final.text(2),
                versus.interval if versus else "-",
                str(versus.pairs if versus else len(row.seeds)),
                str(versus.networks) if versus else "-",
            ]
        )
    return Table(HEADER, lines)


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
