"""Made-up run records with chosen figures, for tables and plots."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from experiments.files import save_tensors
from experiments.record import RECORD, TRACE, VERSION, Record, trace_of

CONTENT: dict[str, Any] = {
    "version": VERSION,
    "config": {
        "name": "made-up",
        "framework": "depgraph",
        "model": "vgg16-bn",
        "stages": {"prune": {"epochs": 1, "learning_rate": 0.1}},
    },
    "config_hash": "0123456789abcdef",
    "framework": "depgraph",
    "model": "vgg16-bn",
    "data": "CIFAR-10",
    "variant": "base",
    "seed": 0,
    "versions": {},
    "revision": None,
    "device": "none",
    "threads": 1,
    "accuracy": {
        "dense": 90.0,
        "at_removal": 10.0,
        "at_removal_reestimated": 50.0,
        "final": 85.0,
    },
    "macs": {"dense": 1000, "pruned": 250},
    "parameters": {"dense": 500, "pruned": 100},
    "structures": {"decayed": 0, "released": 0, "refilled": 0, "pruned": 30},
    "output_difference": None,
    "channels": {"first": [16, 8], "second": [32, 10], "head": [10, 10]},
    "curve": [[0, 90.0], [0, 10.0], [5, 40.0], [10, 60.0]],
    "steps": {"total": 10, "decision": 0, "zero": 0, "removal": 0, "heard": 0, "dense": 40},
    "releases": [],
    "latency": {"batch": 128, "dense": 2.0, "pruned": 1.0},
    "speeds": [{"engine": "torch", "batch": 128, "dense": 2.0, "pruned": 1.0}],
    "seconds": 1.0,
    "loading": 0.1,
}
STAGE = CONTENT["config"]["stages"]["prune"]
ABSENT = ("dense_seed", "start", "images", "processes", "latency__masked")
"""Keys that records of earlier releases lack, and that changes may bring."""


def content(variant: str = "base", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A record as JSON; changes are by keys, two underscores between a table and its key.

    A ``config`` changes the keys that it has.
    """
    made = copy.deepcopy(CONTENT)
    made.update(variant=variant, seed=seed)
    for dotted, value in changes.items():
        *tables, key = dotted.split("__")
        table = made
        for name in tables:
            table = table[name]
        assert key in table or dotted in ABSENT, dotted
        table[key] = {**table[key], **value} if dotted == "config" else value
    return made


def record(variant: str = "base", seed: int = 0, **changes: Any) -> Record:
    """A record; changes as of :func:`content`."""
    return of(content(variant, seed, **changes))


def of(made: dict[str, Any]) -> Record:
    return Record.from_json(json.dumps(made))


def changed(one: Record, **changes: Any) -> Record:
    """A record with other values at its top, in JSON's."""
    return of({**one.content(), **changes})


def save(folder: Path, one: Record | dict[str, Any]) -> Path:
    """A record's file in a folder of its own, named as a run would name it."""
    made = one.content() if isinstance(one, Record) else one
    path = folder / f"{made['variant']}-seed{made['seed']}" / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def save_trace(record_path: Path, one: Record, trace: dict[str, Any]) -> None:
    """A run's trace beside its record."""
    save_tensors(record_path.with_name(TRACE), trace, trace_of(one.run))
