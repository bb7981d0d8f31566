"""How long a decay should take: a table of runs on validation images that differ in it alone.

``python -m experiments.showing.lengths RUNS...`` adds their records to the kept ones in
``experiments/results/lengths.jsonl`` and prints the table. Their configurations are in the records
alone: each is one of ``experiments/configs`` with another stage ``prune`` and another ``[smooth]``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import as_before
from ..errors import RunError
from ..files import save_text
from .pairs import difference
from .table import Record, figure, grid, interval, network, read, summary

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
        name = f"{record['config']['name']}, {record['variant']}, seed {record['seed']}"
        if record["variant"] not in ("base", "sp"):
            raise RunError(f"{name} is neither base nor sp; the decay's length is chosen by those")
        if record["config"]["data"]["validation"] is None:
            raise RunError(f"{name} is measured on test images; choose with --validation")
    runs = {(r["config_hash"], r["variant"], r["seed"]): r for r in [*there, *records]}
    ordered = sorted(runs.values(), key=lambda r: (_order(r), r["variant"], r["seed"]))
    lines = [json.dumps(r, separators=(",", ":"), allow_nan=False) for r in ordered]
    save_text(path, "".join(f"{line}\n" for line in lines))


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per fine-tuning and decay, as numbers, base before the decays.

    ``steps`` of the decay and its ``share`` of the fine-tuning's steps, ``None`` for base;
    ``final``, a :func:`~.table.summary` over seeds; ``difference`` to the base of the
    same fine-tuning over the seeds that both have, the fields of
    :class:`~experiments.showing.pairs.Difference`, or ``None`` without any.
    """
    cells: dict[str, dict[Any, list[Record]]] = {}
    for record in sorted(records, key=_order):
        steps = None if record["variant"] == "base" else record["config"]["smooth"]["steps"]
        cells.setdefault(_fine_tuning(record), {}).setdefault(steps, []).append(record)
    listed = []
    for tried in cells.values():
        base = _finals(tried.get(None, []))
        for steps in sorted(tried, key=lambda s: s or 0):
            members, final = tried[steps], _finals(tried[steps])
            stage = members[0]["config"]["stages"]["prune"]
            start = {r["seed"]: network(r) for r in members}
            versus = None if steps is None else difference(final, base, start)
            listed.append(
                {
                    "epochs": stage["epochs"],
                    "learning_rate": stage["learning_rate"],
                    "steps": steps,
                    "share": None if steps is None else steps / members[0]["steps"]["total"],
                    "final": summary(list(final.values())),
                    "seeds": sorted(final),
                    "difference": versus and asdict(versus),
                }
            )
    return listed


def markdown(records: Sequence[Record]) -> str:
    """The table of :func:`rows`."""
    lines: list[Sequence[str]] = [HEADER]
    for row in rows(records):
        decay, versus = row["steps"], row["difference"]
        lines.append(
            [
                str(row["epochs"]),
                f"{row['learning_rate']:g}",
                "-" if decay is None else f"{decay:,}",
                "-" if decay is None else f"{100 * row['share']:.0f}",
                figure(row["final"], 2),
                interval(versus) if versus else "-",
                str(versus["pairs"] if versus else len(row["seeds"])),
                str(versus["networks"]) if versus else "-",
            ]
        )
    return grid(lines)


def _fine_tuning(record: Record) -> str:
    """All that a run depends on but its seed and its decay, as text."""
    whole = as_before(
        record["config"]
    )  # a later release's record may stand beside an earlier one's
    config = {k: v for k, v in whole.items() if k not in ("name", "smooth", "curve")}
    return json.dumps(config, sort_keys=True)


def _order(record: Record) -> tuple[Any, ...]:
    stage = record["config"]["stages"]["prune"]
    return stage["epochs"], -stage["learning_rate"], record["config"]["smooth"]["steps"]


def _finals(records: Sequence[Record]) -> dict[int, float]:
    """By seed; base was run once per fine-tuning and seed, under whichever decay's name."""
    return {r["seed"]: r["accuracy"]["final"] for r in records}


def main(arguments: list[str] | None = None) -> int:
    """Take runs into the kept ones and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.showing.lengths", description=__doc__
    )
    parser.add_argument("paths", type=Path, nargs="*", help="records or folders; none to render")
    parser.add_argument("--out", type=Path, default=KEPT, help="the kept records")
    args = parser.parse_args(arguments)
    try:
        if args.paths:
            keep(read(args.paths), args.out)
        print(markdown(read([args.out])))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
