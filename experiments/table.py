"""Tables from run records: mean and spread over seeds, one row per variant."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from adapters.base import Variant

from .run import RECORD_VERSION, VARIANTS, RunError

Record = dict[str, Any]


class _Config(BaseModel):
    name: str


class _Accuracy(BaseModel):
    dense: float | None
    at_removal: float
    at_removal_reestimated: float
    final: float


class _Size(BaseModel):
    dense: int
    pruned: int


class _Structures(BaseModel):
    decayed: int
    released: int
    refilled: int
    pruned: int


class _Steps(BaseModel):
    total: int
    decision: int
    zero: int
    removal: int
    heard: int


class _Shape(BaseModel):
    """What tables and plots read of a record."""

    config: _Config
    config_hash: str
    framework: str
    model: str
    data: str
    variant: Variant
    seed: int
    accuracy: _Accuracy
    macs: _Size
    parameters: _Size
    structures: _Structures
    channels: dict[str, tuple[int, int]]
    curve: list[tuple[int, float]]
    steps: _Steps


def files(paths: Iterable[Path]) -> list[Path]:
    """Record files below some folders; files stand for themselves."""
    found: list[Path] = []
    for path in paths:
        if path.suffix == ".json":
            found.append(path)
        else:
            found += sorted(path.rglob("*record.json"))
    return found


def read(paths: Iterable[Path]) -> list[Record]:
    """Records below some folders, or files, in the order of their paths.

    Raises:
        RunError: there are none, or one is damaged or of another version.
    """
    records = []
    for file in files(paths):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            version = record["version"]
            if version == RECORD_VERSION:
                _Shape.model_validate(record)
        except (OSError, ValueError, KeyError, TypeError) as cause:
            reason = " ".join(str(cause).split())
            raise RunError(f"{file} is no record ({reason})") from cause
        if version != RECORD_VERSION:
            raise RunError(f"{file} has version {version}, this release reads {RECORD_VERSION}")
        records.append(record)
    if not records:
        raise RunError("no records were found; make some first: make demo, or make bench-depgraph")
    return records


def sections(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records that may be compared with one another, by what they share.

    Raises:
        RunError: records of one experiment differ in configuration, so a table would mix them.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        title = f"{record['framework']}, {record['model']}, {record['data']}"
        title += f" ({record['config']['name']})"
        found.setdefault(title, []).append(record)
    for title, members in found.items():
        if len({m["config_hash"] for m in members}) > 1:
            raise RunError(
                f"the records of {title} come from different configurations; delete the old runs, "
                "or keep them in another --out"
            )
    return list(found.items())


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per variant: means and standard deviations over seeds, as numbers.

    The spread is the standard deviation of a sample, ``None`` for a single seed.
    """
    table = []
    for variant in VARIANTS:
        runs = [r for r in records if r["variant"] == variant]
        if not runs:
            continue
        row: dict[str, Any] = {"variant": variant, "seeds": sorted(r["seed"] for r in runs)}
        columns = {
            "at_removal": [r["accuracy"]["at_removal"] for r in runs],
            "at_removal_reestimated": [r["accuracy"]["at_removal_reestimated"] for r in runs],
            "final": [r["accuracy"]["final"] for r in runs],
            "macs": [100 * r["macs"]["pruned"] / r["macs"]["dense"] for r in runs],
            "parameters": [
                100 * r["parameters"]["pruned"] / r["parameters"]["dense"] for r in runs
            ],
            "released": [r["structures"]["released"] for r in runs],
            "decayed": [r["structures"]["decayed"] for r in runs],
        }
        for name, values in columns.items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[name] = {"mean": statistics.fmean(values), "spread": spread}
        table.append(row)
    return table


HEADER = (
    "variant",
    "at removal, %",
    "BN re-estimated, %",
    "final, %",
    "MACs, %",
    "parameters, %",
    "released",
    "seeds",
)


def markdown(records: Sequence[Record]) -> str:
    """All sections as Markdown tables: accuracy on the test images, mean and spread over seeds."""
    parts = []
    for title, members in sections(records):
        table = rows(members)
        lines = [[*HEADER]]
        for row in table:
            released, decayed = row["released"]["mean"], row["decayed"]["mean"]
            lines.append(
                [
                    {"base": "base", "sp": "+SP", "sr": "+SR"}[row["variant"]],
                    _figure(row["at_removal"], 1),
                    _figure(row["at_removal_reestimated"], 1),
                    _figure(row["final"], 2),
                    f"{row['macs']['mean']:.1f}",
                    f"{row['parameters']['mean']:.1f}",
                    f"{released:.1f} of {decayed:.0f}" if decayed else "-",
                    str(len(row["seeds"])),
                ]
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
        text = [_row(lines[0], widths), _row(["-" * w for w in widths], widths)]
        text += [_row(line, widths) for line in lines[1:]]
        dense = {m["seed"]: d for m in members if (d := m["accuracy"]["dense"]) is not None}
        start = f"dense {statistics.fmean(dense.values()):.2f}%" if dense else "from scratch"
        parts.append(f"{title}; {start}\n\n" + "\n".join(text))
    return "\n\n".join(parts)


def _figure(value: dict[str, float | None], digits: int) -> str:
    mean, spread = value["mean"], value["spread"]
    text = f"{mean:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
