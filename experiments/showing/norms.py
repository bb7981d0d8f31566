"""Norms of decaying structures: some trajectories of a run, small enough to be kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, ValidationError, model_validator

from dpm_core.errors import kind_and_line

from ..errors import RunError
from ..files import FileError, load_tensors, save_text
from ..names import Seed, Text, one_line
from ..record import RECORD, TRACE, Number, Part, Record, Variant, trace_of
from ..refusals import described
from .kept import Run
from .sections import sections

LINES = 20
"""Norm trajectories sampled per kind; more would hide one another."""
POINTS = 25
"""Points sampled per trajectory."""
Kind = Literal["decayed to zero", "released", "decayed in their place"]
"""What becomes of a structure that starts to decay."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Norm(NamedTuple):
    """A structure's norm at an optimizer step since the core was attached."""

    step: Number
    norm: Annotated[int | float, Field(ge=0, le=1e30)]


Line = Annotated[list[Norm], Field(min_length=1, max_length=10 * POINTS)]


class Sample(Part):
    """Some norm trajectories of a run.

    Attributes:
        variant, seed: the run's.
        counts: all structures by kind.
        lines: at most :data:`LINES` trajectories of each kind, of at most :data:`POINTS` points.
        releases: a point for every release of a trajectory in ``lines``.
    """

    variant: Variant
    seed: Seed
    counts: dict[Kind, Number]
    lines: dict[Kind, Annotated[list[Line], Field(max_length=LINES)]]
    releases: Annotated[list[Norm], Field(max_length=10 * LINES * POINTS)]

    @model_validator(mode="after")
    def _counted(self) -> Sample:
        if self.lines.keys() - self.counts.keys():
            raise ValueError("lines of a kind that is not counted")
        return self


class Entry(Part):
    """One run's sample in a file of kept ones."""

    config_hash: Text
    sample: Sample


def sample_norms(saved: Mapping[str, Any], seed: int, variant: Variant) -> Sample:
    """Some norm trajectories of a run.

    Args:
        saved: the content of a run's ``trace.pt``.
        seed: the run's.
        variant: the run's.

    Raises:
        ValidationError: the content is not what a run saves; it shows in other ways, too.
    """
    started: dict[tuple[str, int], Norm] = {}
    released: dict[tuple[str, int], int] = {}
    refilled: set[tuple[str, int]] = set()
    for event in saved["events"]:
        for k, norm in zip(event["structures"], event["norms"], strict=True):
            key = (event["group"], k)
            if event["kind"] == "decay":
                started[key] = Norm(event["step"], norm)
                released.pop(key, None)  # it was released before, and decays again
                (refilled.add if event["wave"] else refilled.discard)(key)
            elif event["kind"] == "release":
                released[key] = event["step"]
    keys: dict[Kind, list[tuple[str, int]]] = {kind: [] for kind in KINDS}
    for key in started:
        kind: Kind = "decayed to zero"
        if key in released:
            kind = "released"
        elif key in refilled:
            kind = "decayed in their place"
        keys[kind].append(key)
    lines: dict[Kind, list[list[Norm]]] = {}
    marks: list[Norm] = []
    for kind, of_kind in keys.items():
        if not of_kind:
            continue
        lines[kind] = []
        for key in of_kind[:: -(-len(of_kind) // LINES)]:
            group, k = key
            line = [started[key]]
            line += [
                Norm(step, groups[group][k])
                for step, groups in saved["trace"]
                if step > line[0].step and k in groups.get(group, {})
            ]
            at = [i for i, (step, _) in enumerate(line) if step == released.get(key)]
            lines[kind].append(_rounded(_thinned(line, at)))
            marks += _rounded([line[i] for i in at])
    counts = {kind: len(keys[kind]) for kind in lines}
    return Sample(variant=variant, seed=seed, counts=counts, lines=lines, releases=marks)


def _thinned(line: list[Norm], keep: Iterable[int]) -> list[Norm]:
    """Some points of a line: its ends, those to keep, and where straight pieces miss it most."""
    chosen = sorted({0, len(line) - 1, *keep})
    tolerance = 0.002 * max(abs(norm) for _, norm in line)
    while len(chosen) < POINTS:
        worst, place = tolerance, None
        for i, j in pairwise(chosen):
            (x, y), (end, last) = line[i], line[j]
            for n in range(i + 1, j):
                off = abs(line[n].norm - (y + (last - y) * (line[n].step - x) / (end - x)))
                if off > worst:
                    worst, place = off, n
        if place is None:
            break
        chosen = sorted([*chosen, place])
    return [line[i] for i in chosen]


def _rounded(line: Iterable[Norm]) -> list[Norm]:
    return [Norm(step, float(f"{norm:.4g}")) for step, norm in line]


def find_norms(runs: Sequence[Run], members: Sequence[Record]) -> dict[Variant, Sample]:
    """Sampled norms of a section's first +SP and +SR runs, from their traces or as they were kept.

    Args:
        runs: each record with the path it was read from. Beside it may lie the run's ``trace.pt``,
            or, written by :func:`keep_norms`, ``<configuration's name>-norms.json``.
        members: the section's records, out of ``runs``.

    Raises:
        RunError: a trace or a kept file is damaged.
    """
    paths = {id(record): path for path, record in runs}
    samples: dict[Variant, Sample] = {}
    variants: tuple[Variant, ...] = ("sp", "sr")
    for variant in variants:
        for record in sorted((r for r in members if r.variant == variant), key=lambda r: r.seed):
            path = paths[id(record)]
            trace = path.with_name(TRACE)
            kept = path.with_name(f"{record.name}-norms.json")
            if path.name == RECORD and trace.exists():
                samples[variant] = _sampled(trace, record)
            elif kept.exists() and (sample := _kept(kept, record)) is not None:
                samples[variant] = sample
            if variant in samples:
                break
    return samples


def _sampled(trace: Path, record: Record) -> Sample:
    try:
        saved = load_tensors(trace, trace_of(record.run))
        return sample_norms(saved, record.seed, record.variant)
    except Exception as cause:  # damage shows in many ways
        raise RunError(
            f"{trace} holds no norms of a run ({_reason(cause)}); delete it to go without them"
        ) from cause


def _kept(path: Path, record: Record) -> Sample | None:
    """A run's sample in a file of kept ones, if it is there."""
    try:
        for plain in json.loads(path.read_text(encoding="utf-8"))["norms"]:
            entry = Entry.model_validate_json(json.dumps(plain))
            of = (entry.config_hash, entry.sample.variant, entry.sample.seed)
            if of == (record.config_hash, record.variant, record.seed):
                return entry.sample
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise RunError(
            f"{path} holds no norms ({_reason(cause)}); delete it, and keep the runs anew"
        ) from cause
    return None


def _reason(cause: Exception) -> str:
    """What is wrong with a file, without the advice that PyTorch and pydantic add."""
    if isinstance(cause, ValidationError):
        return described(cause)[0]
    if isinstance(cause, FileError):
        return one_line(str(cause))
    return one_line(kind_and_line(cause))


def keep_norms(runs: Sequence[Run], path: Path) -> Path | None:
    """Write the sampled norms of some runs into a file to be kept beside their records.

    Args:
        runs: each record with the path it was read from; ``trace.pt`` is looked for beside it.
        path: the file, for :func:`find_norms` ``<configuration's name>-norms.json``.

    Returns:
        The path, or ``None`` where no run has a trace: then no file is written.
    """
    entries = [
        json.dumps(Entry(config_hash=members[0].config_hash, sample=sample).model_dump())
        for _, members in sections([record for _, record in runs])
        for sample in find_norms(runs, members).values()
    ]
    if not entries:
        return None
    save_text(path, '{"norms": [\n' + ",\n".join(entries) + "\n]}\n")
    return path
