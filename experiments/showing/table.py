"""Tables from run records: mean and spread over seeds, and what pairs of runs say."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RunError
from ..files import save_text
from ..names import Name, Seed, Text, one_line
from ..running.run import CONTROLS, RECORD_VERSION, VARIANTS, Variant, sound
from . import published
from .pairs import Difference, difference

Record = dict[str, Any]
ORDER: tuple[Variant, ...] = VARIANTS + CONTROLS
NAMES: dict[str, str] = {
    "base": "base",
    "sp": "+SP",
    "sr": "+SR",
    "random": "random release",
    "least-resistant": "least resistant",
}
EFFECT, ENOUGH = 0.3, 25
"""The effect that is looked for, in points, and the pairs that it takes at the least, with a dense
network each."""


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# Beyond these bounds sums overflow, and pictures are too large to be drawn.
Number = Annotated[int, Field(ge=0, le=10**15)]
Whole = Annotated[int, Field(ge=1, le=10**15)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Duration = Annotated[float, Field(gt=0, le=1e15)]
Percent = Annotated[float, Field(ge=0, le=100)]
Width = Annotated[int, Field(ge=0, le=10**9)]
MOST_LAYERS = 1000


class _Data(_Table):
    validation: Number | None = None


class _Config(_Table):
    name: Name
    data: _Data | None = None
    stages: dict[str, Any] = {}
    options: dict[str, Any] = {}


class _Accuracy(_Table):
    dense: Percent | None
    at_removal: Percent
    at_removal_reestimated: Percent
    final: Percent


class _Size(_Table):
    dense: Whole
    pruned: Number


class _Structures(_Table):
    decayed: Number
    released: Number
    refilled: Number
    pruned: Number


class _Steps(_Table):
    total: Number
    decision: Number
    zero: Number
    removal: Number
    heard: Number
    dense: Number


class _Latency(_Table):
    batch: Whole
    dense: Duration
    masked: Duration | None = None
    pruned: Duration


class _Shape(_Table):
    """What tables, plots and results read of a record."""

    config: _Config
    config_hash: Text
    framework: Text
    model: Text
    data: Text
    variant: Variant
    seed: Seed
    versions: dict[Text, Text]
    revision: Text | None
    device: Text
    threads: Whole
    accuracy: _Accuracy
    macs: _Size
    parameters: _Size
    structures: _Structures
    channels: Annotated[
        dict[Text, tuple[Width, Width]], Field(min_length=1, max_length=MOST_LAYERS)
    ]
    releases: Annotated[list[tuple[Number, Text, Number]], Field(max_length=10**6)]
    curve: Annotated[list[tuple[Number, Percent]], Field(min_length=1, max_length=10**6)]
    steps: _Steps
    latency: _Latency
    seconds: Amount
    loading: Amount
    processes: Whole = 1  # older records do not say it, and had one
    dense_seed: Seed | None = None  # older records do not say it: every seed had its own network
    images: Text | None = None  # names the images; not in records of earlier releases

    @model_validator(mode="after")
    def _drawable(self) -> _Shape:
        if len({group for _, group, _ in self.releases}) > MOST_LAYERS:
            raise ValueError(f"releases: more than {MOST_LAYERS} groups")
        return self


# ---------------------------------------------------------------------- reading and keeping


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


def located(paths: Iterable[Path]) -> list[tuple[Path, Record]]:
    """What :func:`read` reads, each record with its file."""
    runs = []
    for file in files(paths):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise _refused(str(file), str(cause)) from cause
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
        record: Record = json.loads(text, parse_float=_finite, parse_constant=_finite)
        version = record["version"]
        if version == RECORD_VERSION:
            _Shape.model_validate_json(text)
            if not sound(record):
                raise ValueError("its checksum is another one: it was changed")
    except ValidationError as cause:
        first = cause.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise _refused(place, f"{key}: {first['msg']}" if key else first["msg"]) from cause
    except KeyError as cause:
        raise _refused(place, f"it has no {cause}") from cause
    except RecursionError as cause:
        raise _refused(place, "it is nested too deeply") from cause
    except (ValueError, TypeError) as cause:
        raise _refused(place, str(cause)) from cause
    if version != RECORD_VERSION:
        raise RunError(f"{place} has version {version!r}, this release reads {RECORD_VERSION}")
    return record


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def _refused(place: str, reason: str) -> RunError:
    return RunError(f"{place} is no record ({one_line(reason)}); take it away, or run anew")


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
            configurations, or a file is damaged.
    """
    sections(records)
    texts = {}
    for name in sorted({r["config"]["name"] for r in records}):
        path = folder / f"{name}.jsonl"
        members = [r for r in records if r["config"]["name"] == name]
        kept = read([path]) if path.exists() else []
        origins = {(r["config_hash"], r["data"], processes(r)) for r in kept + members}
        if len(origins) > 1 or len(_images(kept + members)) > 1:
            raise RunError(
                f"records to keep in {path} come from different configurations or data, or from "
                "different numbers of processes; delete that file to start anew, or give the new "
                "configuration another name"
            )
        by_run = {(r["variant"], r["seed"]): r for r in kept + members}
        ordered = sorted(by_run.values(), key=lambda r: (ORDER.index(r["variant"]), r["seed"]))
        compact = (json.dumps(r, separators=(",", ":"), allow_nan=False) for r in ordered)
        texts[path] = "".join(f"{line}\n" for line in compact)
    for path, text in texts.items():
        save_text(path, text)
    return list(texts)


# ---------------------------------------------------------------------- figures


def sections(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records that may be compared with one another, by what they share.

    Those whose runs trained most come first: they have most to tell.

    Raises:
        RunError: records of one experiment differ in configuration, in images or in the layers of
            the dense network, so a table would mix them; or there are several of one variant and
            seed, and pairs would be ambiguous.
    """
    by_title: dict[str, list[Record]] = {}
    for record in records:
        title = f"{record['framework']}, {record['model']}, {record['data']}"
        title += f" ({record['config']['name']})"
        if processes(record) > 1:
            title += f", {processes(record)} processes"
        by_title.setdefault(title, []).append(record)
    for title, members in by_title.items():
        if len({m["config_hash"] for m in members}) > 1:
            raise RunError(
                f"the records of {title} come from different configurations; delete the old runs, "
                "or keep them in another --out"
            )
        if len(by_images := _images(members)) > 1:
            each = "; ".join(f"{digest}: {runs}" for digest, runs in by_images.items())
            raise RunError(
                f"the records of {title} are of different images under one name ({each}); give "
                "those of one kind, or carry the others out anew"
            )
        layers = {name: width for name, (width, _) in members[0]["channels"].items()}
        for member in members:
            if {name: width for name, (width, _) in member["channels"].items()} != layers:
                raise RunError(
                    f"the records of {title} are of different networks: {member['variant']}, seed "
                    f"{member['seed']}, has other layers than the first; run it anew"
                )
        runs = Counter((m["variant"], m["seed"]) for m in members)
        (variant, seed), times = runs.most_common(1)[0]
        if times > 1:
            raise RunError(
                f"{title} has {times} records of {variant}, seed {seed}; give only one of them"
            )
    return sorted(by_title.items(), key=lambda section: -_work(section[1][0]))


def short_names(sections: Sequence[tuple[str, list[Record]]]) -> dict[str, list[Record]]:
    """Sections by their experiments' names, with what else tells two of one name apart."""
    times = Counter(members[0]["config"]["name"] for _, members in sections)
    named = {}
    for title, members in sections:
        name = members[0]["config"]["name"]
        named[name if times[name] == 1 else title] = members
    return named


def _work(record: Record) -> int:
    """MACs of all of a run's training, its dense model's included, up to the size of a batch."""
    return int(record["macs"]["dense"] * (record["steps"]["total"] + record["steps"]["dense"]))


def _images(records: Sequence[Record]) -> dict[str, str]:
    """The first run on each kind of images; records of earlier releases do not name theirs."""
    first_runs: dict[str, str] = {}
    for record in records:
        if (digest := record.get("images")) is not None:
            first_runs.setdefault(digest, f"{record['variant']}, seed {record['seed']}")
    return first_runs


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and spread: the standard deviation of a sample, ``None`` for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread}


def figure(values: dict[str, float | None], digits: int) -> str:
    """A :func:`summary` as text: ``mean ± spread``."""
    mean, spread = values["mean"], values["spread"]
    text = f"{mean:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def dense(members: Sequence[Record]) -> list[float]:
    """Accuracies of a section's dense networks, each once, by seed."""
    by_network = {network(m): d for m in members if (d := m["accuracy"]["dense"]) is not None}
    return [by_network[seed] for seed in sorted(by_network)]


def network(record: Record) -> int:
    """The seed of the dense network that a record started from, or of its initial weights."""
    seed = record.get("dense_seed")  # None without dense training; older records do not say it
    return int(record["seed"] if seed is None else seed)


def processes(record: Record) -> int:
    """How many processes a run had; older records do not say it, and had one."""
    return int(record.get("processes", 1))


def left(record: Record, what: str) -> float:
    """What is left of a record's ``macs`` or ``parameters``, in percent of the dense network's."""
    return float(100 * record[what]["pruned"] / record[what]["dense"])


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per variant of a section, as numbers.

    Means and standard deviations are over all seeds of the variant; the deviation is that of a
    sample, ``None`` for a single seed. ``difference`` is the final accuracy minus that of ``base``
    over the seeds they share, in points (the fields of :class:`~.pairs.Difference`);
    ``None`` without any. ``published`` is the counterpart's accuracy, in percent.
    """
    table, benchmark = [], _benchmark(records)
    for variant in ORDER:
        runs = [r for r in records if r["variant"] == variant]
        if not runs:
            continue
        row: dict[str, Any] = {"variant": variant, "seeds": sorted(r["seed"] for r in runs)}
        columns = {
            "at_removal": [r["accuracy"]["at_removal"] for r in runs],
            "at_removal_reestimated": [r["accuracy"]["at_removal_reestimated"] for r in runs],
            "final": [r["accuracy"]["final"] for r in runs],
            "macs": [left(r, "macs") for r in runs],
            "parameters": [left(r, "parameters") for r in runs],
            "released": [r["structures"]["released"] for r in runs],
            "decayed": [r["structures"]["decayed"] for r in runs],
        }
        for name, values in columns.items():
            row[name] = summary(values)
        versus = None if variant == "base" else minus(records, variant, "base")
        row["difference"] = versus and asdict(versus)
        row["published"] = benchmark and benchmark.top1(*_counterpart(records), variant)
        table.append(row)
    return table


def contrasts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Final accuracy of ``sr`` minus that of its controls and of ``sp``, where there are pairs.

    The fields are those of :class:`~.pairs.Difference`, in points, and ``minus``.
    """
    others: tuple[Variant, ...] = (*CONTROLS, "sp")
    differences = {other: minus(records, "sr", other) for other in others}
    return [{"minus": other, **asdict(d)} for other, d in differences.items() if d is not None]


def minus(records: Sequence[Record], one: Variant, other: Variant) -> Difference | None:
    """Final accuracy of one variant minus another's over a section's pairs, in points."""

    def finals(variant: Variant) -> dict[int, float]:
        return {r["seed"]: r["accuracy"]["final"] for r in records if r["variant"] == variant}

    return difference(finals(one), finals(other), {r["seed"]: network(r) for r in records})


def _counterpart(records: Sequence[Record]) -> tuple[str, bool]:
    return records[0]["framework"], "sparse" in records[0]["config"].get("stages", {})


def _benchmark(records: Sequence[Record]) -> published.Benchmark | None:
    options = records[0]["config"].get("options", {})
    own = ("round_to", "isomorphic", "max_pruning_ratio")
    if options.get("importance", "magnitude") != "magnitude" or any(key in options for key in own):
        return None  # the published figures are of upstream's ranking, and of widths as they fall
    return published.load().benchmark(*_counterpart(records))


# ---------------------------------------------------------------------- Markdown


HEADER = (
    "variant",
    "FLOPs, %",
    "params, %",
    "top-1, %",
    "to base, points",
    "detectable, points",
    "at removal, %",
    "BN re-estimated, %",
    "released",
    "paper",
    "pairs",
)


def markdown(records: Sequence[Record]) -> str:
    """All sections as Markdown: a title, a table, and further comparisons of its pairs."""
    parts = []
    for title, members in sections(records):
        parts.append(f"{title}; {_training(members)}")
        table = rows(members)
        benchmark = _benchmark(members)
        header = [*HEADER]
        if benchmark is not None:
            at = header.index("paper")
            header[at] = f"paper ({benchmark.network}, {benchmark.data}), %"
        start = None if benchmark is None else benchmark.top1(*_counterpart(members), "base")
        parts.append(grid([header, *(_cells(row, start) for row in table)]))
        compared = contrasts(members)
        if compared:
            parts.append("\n".join(_contrast(d) for d in compared))
        if note := _small([*(row["difference"] for row in table if row["difference"]), *compared]):
            parts.append(note)
    return "\n\n".join(parts)


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first line is its header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [lines[0], ["-" * w for w in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in text
    )


def _training(members: Sequence[Record]) -> str:
    steps, accuracies = members[0]["steps"], dense(members)
    if not accuracies:
        return f"from scratch, {steps['total']:,} steps"
    accuracy, start = statistics.fmean(accuracies), "dense"
    if len(accuracies) < len({m["seed"] for m in members}):
        start = f"{len(accuracies)} dense network{'s' if len(accuracies) > 1 else ''} at"
    return f"{start} {accuracy:.2f}% after {steps['dense']:,} steps, then {steps['total']:,} steps"


def _cells(row: dict[str, Any], start: float | None) -> list[str]:
    """A row's cells; ``start`` is the accuracy that is published for the framework alone."""
    released, decayed = row["released"]["mean"], row["decayed"]["mean"]
    seeds, versus = len(row["seeds"]), row["difference"]
    pairs = seeds if row["variant"] == "base" else versus["pairs"] if versus else 0
    return [
        NAMES[row["variant"]],
        f"{row['macs']['mean']:.1f}",
        f"{row['parameters']['mean']:.1f}",
        figure(row["final"], 2),
        interval(versus) if versus else "-",
        _points(versus["detectable"]) if versus else "-",
        figure(row["at_removal"], 1),
        figure(row["at_removal_reestimated"], 1),
        f"{released:.1f} of {decayed:.0f}" if decayed else "-",
        _paper(row, start),
        str(pairs) if pairs == seeds else f"{pairs} of {seeds}",
    ]


def _paper(row: dict[str, Any], start: float | None) -> str:
    top1 = row["published"]
    if top1 is None:
        return "-"
    if start is None or row["variant"] == "base":
        return f"{top1:g}"
    return f"{top1:g} ({round(top1 - start, 2):+g})"


def _contrast(versus: dict[str, Any]) -> str:
    text = f"- {NAMES['sr']} minus {NAMES[versus['minus']]}: {interval(versus)} points"
    text += f", {_counted(versus)}"
    if versus["detectable"] is not None:
        text += f", {versus['detectable']:.2f} detectable"
    return text


def _small(differences: Sequence[dict[str, Any]]) -> str | None:
    """A sentence where the pairs of a section are too few to speak about a small effect."""
    if not differences:
        return None
    fewest = min(differences, key=lambda d: (d["networks"], d["pairs"]))
    sizes = [d["detectable"] for d in differences if d["detectable"] is not None]
    if fewest["networks"] >= ENOUGH and max(sizes) <= EFFECT:
        return None
    if fewest["pairs"] == 1:
        return f"One pair is too few to speak about {EFFECT} points."
    text = f"{_counted(fewest)} are too few to speak about {EFFECT} points"
    if fewest["networks"] == 1:
        return f"{text}: what another network would do, they do not tell."
    spread = "pairs" if fewest["networks"] == fewest["pairs"] else "networks"
    return f"{text} (detectable, by the spread of the {spread}: {max(sizes):.2f} points)."


def _counted(versus: dict[str, Any]) -> str:
    """The pairs of a :class:`~.pairs.Difference`, and their networks if shared."""
    pairs, networks = versus["pairs"], versus["networks"]
    text = f"{pairs} pair{'s' if pairs != 1 else ''}"
    if networks == pairs:
        return text
    return f"{text} of {networks} network{'s' if networks != 1 else ''}"


def interval(versus: dict[str, Any]) -> str:
    """A :class:`~.pairs.Difference`, as a dictionary: its mean and 95% interval."""
    mean, low, high = versus["mean"], versus["low"], versus["high"]
    return _signed(mean) if low is None else f"{_signed(mean)} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # adding 0 leaves no negative zero


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
