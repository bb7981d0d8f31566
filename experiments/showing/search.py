"""The search for a rectifier that pays: its runs on validation images, as a table.

A line of ``experiments/results/search.jsonl`` is one run. Rectifiers that did not pass are no
longer in the code, only in these lines.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from ..errors import RunError
from ..names import Seed
from ..record import Number, Part, Percent, Variant
from ..refusals import described
from .grid import Table
from .pairs import difference


class Line(Part):
    """One run."""

    cell: str
    """What was pruned, and how."""
    rectifier: str | None
    """What was tried; ``None`` where none is at work."""
    variant: Variant
    seed: Seed
    final: Percent
    macs: Percent
    """What is left, in percent."""
    released: Number


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
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Line.model_validate_json(line) for line in lines]
    except (OSError, ValueError) as cause:
        reason = described(cause)[0] if isinstance(cause, ValidationError) else str(cause)
        raise RunError(f"{path} holds no runs of the search ({reason})") from cause


def table(lines: Sequence[Line]) -> Table:
    """One row per cell and rectifier: differences in points with their 95% intervals."""
    return Table(HEADER, list(_rows(lines)))


def _rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    runs: dict[tuple[str, str, str | None], list[Line]] = {}
    for line in lines:
        runs.setdefault((line.cell, line.variant, line.rectifier), []).append(line)
    for (cell, variant, rectifier), tried in runs.items():
        if variant != "sr":
            continue
        others = [runs.get((cell, "base", None), []), runs.get((cell, "random", rectifier), [])]
        differences = [difference(_finals(tried), _finals(other)) for other in others]
        cells = [d.interval if d else "-" for d in differences]
        released = statistics.fmean(line.released for line in tried)
        pairs = max((d.pairs for d in differences if d), default=0)
        yield [cell, str(rectifier), f"{released:.0f}", *cells, str(pairs)]


def _finals(lines: Sequence[Line]) -> dict[int, float]:
    return {line.seed: line.final for line in lines}
