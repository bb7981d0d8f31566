"""Files of records: finding, reading and keeping them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import RunError
from ..files import save_text
from ..names import one_line
from ..record import ORDER, Record, RecordError, RecordVersionError
from .sections import first_of_images, sections, started_apart

Run = tuple[Path, Record]
"""A record with the file that it was read from."""


def files(paths: Iterable[Path]) -> list[Path]:
    """Record files below some folders; files stand for themselves.

    A run's own file, ``*record.json``, holds one record; a file of kept ones, ``*.jsonl``, one a
    line.
    """
    listed: list[Path] = []
    for path in paths:
        if path.suffix in (".json", ".jsonl") and not path.is_dir():
            listed.append(path)
        else:
            listed += sorted([*path.rglob("*record.json"), *path.rglob("*.jsonl")])
    return listed


def located(paths: Iterable[Path]) -> list[Run]:
    """What :func:`read` reads, each record with its file."""
    runs = []
    for file in files(paths):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise _refused(str(file), one_line(str(cause))) from cause
        if file.suffix == ".jsonl":
            lines = text.rstrip("\n").split("\n")
            places = [f"{file}, line {number}," for number in range(1, len(lines) + 1)]
        else:
            lines, places = [text], [str(file)]
        runs += [(file, _record(line, at)) for line, at in zip(lines, places, strict=True)]
    if not runs:
        raise RunError("no records were found; make some first: make demo, or make bench-depgraph")
    return runs


def read(paths: Iterable[Path]) -> list[Record]:
    """Records below some folders, or in files, in the order of their paths and lines.

    Raises:
        RunError: there are none, or one is damaged or of another version.
    """
    return [record for _, record in located(paths)]


def _record(text: str, place: str) -> Record:
    try:
        return Record.from_json(text)
    except RecordVersionError as cause:
        raise RunError(f"{place} {cause}") from cause
    except RecordError as cause:
        raise _refused(place, str(cause)) from cause


def _refused(place: str, reason: str) -> RunError:
    return RunError(f"{place} is no record ({reason}); take it away, or run anew")


def keep(records: Sequence[Record], folder: Path) -> list[Path]:
    """Add records to the kept ones: ``NAME.jsonl`` per configuration, by variant and seed.

    A kept record of the same variant and seed is replaced.

    Args:
        records: as :func:`read` returns them.
        folder: of the kept records.

    Returns:
        The files written, by name.

    Raises:
        RunError: before any file is written. Records of one name come from different
            configurations, those of one seed from different dense networks, or a file is damaged.
    """
    sections(records)
    texts = {}
    for name in sorted({r.name for r in records}):
        path = folder / f"{name}.jsonl"
        members = [r for r in records if r.name == name]
        kept = read([path]) if path.exists() else []
        origins = {(r.config_hash, r.data, r.processes) for r in kept + members}
        if len(origins) > 1 or len(first_of_images(kept + members)) > 1:
            raise RunError(
                f"records to keep in {path} come from different configurations or data, or from "
                "different numbers of processes; delete that file to start anew, or give the new "
                "configuration another name"
            )
        by_run = {(r.variant, r.seed): r for r in kept + members}
        if apart := started_apart(list(by_run.values())):
            raise RunError(
                f"of the records to keep in {path}, {apart}, so they are no pair; carry out all "
                "variants of that seed beside one another, and keep them together"
            )
        ordered = sorted(by_run.values(), key=lambda r: (ORDER.index(r.variant), r.seed))
        texts[path] = as_lines(ordered)
    for path, text in texts.items():
        save_text(path, text)
    return list(texts)


def as_lines(records: Iterable[Record]) -> str:
    """The text of a file of kept records."""
    return "".join(f"{record.line()}\n" for record in records)
