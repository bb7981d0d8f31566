"""The search for a rectifier that pays: its runs on validation images, as a table.

A line of ``experiments/results/search.jsonl`` is one run: ``cell``, what was pruned and how;
``rectifier``, what was tried, and ``null`` where none is at work; ``variant``, ``seed``, ``final``
(accuracy in %), ``macs`` (share that is left, in %) and ``released``. Rectifiers
that did not pass are no longer in the code, only in these lines.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RunError
from .pairs import difference
from .table import grid, interval

Line = dict[str, Any]
HEADER = (
    "what is pruned",
    "rectifier",
    "released",
    "+SR to base",
    "+SR to random release",
    "pairs",
)


def read(path: Path) -> list[Line]:
    """All lines.

    Raises:
        RunError: the file cannot be read, or a line is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            _ = line["cell"], line["rectifier"], line["variant"], int(line["seed"])
            _ = float(line["final"]), float(line["macs"]), int(line["released"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunError(f"{path} holds no runs of the search ({cause})") from cause
    return lines


def markdown(lines: Sequence[Line]) -> str:
    """One row per cell and rectifier: differences in points with their 95% intervals."""
    return grid([HEADER, *_rows(lines)])


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    runs: dict[tuple[str, str, str | None], list[Line]] = {}
    for line in lines:
        runs.setdefault((line["cell"], line["variant"], line["rectifier"]), []).append(line)
    for (cell, variant, rectifier), tried in runs.items():
        if variant != "sr":
            continue
        others = [runs.get((cell, "base", None), []), runs.get((cell, "random", rectifier), [])]
        differences = [difference(_finals(tried), _finals(other)) for other in others]
        cells = [interval(asdict(d)) if d else "-" for d in differences]
        released = statistics.fmean(line["released"] for line in tried)
        pairs = max((d.pairs for d in differences if d), default=0)
        yield [cell, str(rectifier), f"{released:.0f}", *cells, str(pairs)]


def _finals(lines: Sequence[Line]) -> dict[int, float]:
    return {line["seed"]: line["final"] for line in lines}
