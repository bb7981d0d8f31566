"""Made-up run records with chosen figures, for tables and plots."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from experiments.files import save_tensors
from experiments.running.run import RECORD_VERSION, run_of_record, trace_of

RECORD: dict[str, Any] = {
    "version": RECORD_VERSION,
    "config": {"name": "made-up", "stages": {"prune": {}}},
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
    "seconds": 1.0,
    "loading": 0.1,
}


def record(variant: str = "base", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A record; changes are by keys, with two underscores between a table and its key."""
    content = copy.deepcopy(RECORD)
    content.update(variant=variant, seed=seed)
    for dotted, value in changes.items():
        *tables, key = dotted.split("__")
        table = content
        for name in tables:
            table = table[name]
        assert key in table, dotted
        table[key] = value
    return content


def save(folder: Path, content: dict[str, Any]) -> Path:
    """A record's file in a folder of its own, named as a run would name it."""
    path = folder / f"{content['variant']}-seed{content['seed']}" / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def save_trace(record_path: Path, content: dict[str, Any], trace: dict[str, Any]) -> None:
    """A run's trace beside its record."""
    save_tensors(record_path.with_name("trace.pt"), trace, trace_of(run_of_record(content)))
