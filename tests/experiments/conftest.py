"""Runs of the tiny configuration, carried out once for all tests that only look at them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from experiments.record import VARIANTS
from experiments.running.run import run
from tests.support import tiny


@dataclass
class TinyRuns:
    """Finished runs of all variants, seed 0. Tests read them, and change nothing.

    Attributes:
        out: the folder they share.
        paths: of the records, by variant.
        dense_times: when the dense model's file was last written, as each run ended.
    """

    out: Path
    paths: dict[str, Path]
    dense_times: list[int]

    def record(self, variant: str) -> dict[str, Any]:
        return json.loads(self.paths[variant].read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    # Shared by the processes of a parallel test run: the first that needs them carries them out.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, done = shared / "tiny-runs", shared / "tiny-runs.json"
    with FileLock(shared / "tiny-runs.lock"), tiny.one_thread():
        if not done.exists():
            times = []
            for variant in VARIANTS:
                run(tiny.request(out, variant))
                (dense,) = (out / "dense").iterdir()
                times.append(dense.stat().st_mtime_ns)
            done.write_text(json.dumps(times), encoding="utf-8")
    paths = {v: tiny.request(out, v).folder / "record.json" for v in VARIANTS}
    return TinyRuns(out, paths, json.loads(done.read_text(encoding="utf-8")))


@pytest.fixture
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture
def miniature(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.miniature(monkeypatch)
