"""Comparisons on a Dask cluster: a scheduler and workers in processes of their own, on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.record import MODEL, RECORD, TRACE
from tests.support import forked, tiny

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


def until(true: Callable[[], object], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class Cluster:
    """A scheduler and its workers, each with a folder named as it is."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.file = place / "scheduler.json"
        words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        self._start("scheduler", *words, "--scheduler-file", str(self.file))
        until(self.file.exists)
        self.address = json.loads(self.file.read_text())["address"]

    def add(self, name: str) -> None:
        """A worker for one run at a time."""
        words = [
            self.address,
            "--nthreads",
            "1",
            "--no-nanny",
            "--memory-limit",
            "0",
            "--name",
            name,
        ]
        self._start("worker", *words, "--local-directory", str(self.place / name), called=name)

    def _start(self, kind: str, *words: str, called: str = "") -> None:
        # Neither log nor dashboard; where tests share a machine, connecting may take a while.
        environment = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "120s"}
        self.processes[called or kind] = subprocess.Popen(
            [forked.python(), "-m", f"distributed.cli.dask_{kind}", *words],
            cwd=tiny.ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(self.place / f"{called or kind}.log").open("wb"),
        )

    def at_work(self, name: str) -> bool:
        return any((self.place / name).rglob("run-*/run.log"))

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()


@contextmanager
def cluster(place: Path) -> Iterator[Cluster]:
    place.mkdir()
    there = Cluster(place)
    try:
        yield there
    finally:
        for name in reversed(there.processes):  # a worker that loses its scheduler looks for it
            process = there.processes[name]
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                there.kill(name)


def command(config: Path, out: Path, *more: str) -> list[str]:
    words = ["compare", str(config), "--variants", "base,sp", "--seeds", "0", "--device", "cpu"]
    return [*words, "--out", str(out), *more]


def of_table(printed: str) -> list[str]:
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if "; dense " in line)
    return lines[first : 1 + max(i for i, line in enumerate(lines) if line.startswith("|"))]


def same_in_all_but_time(here: Path, there: Path) -> None:
    folders = sorted(path.parent.relative_to(here) for path in here.rglob(RECORD))
    assert folders == sorted(path.parent.relative_to(there) for path in there.rglob(RECORD))
    assert len(folders) == 2
    for folder in folders:
        one, other = (json.loads((root / folder / RECORD).read_text()) for root in (here, there))
        for timed in ("seconds", "loading", "latency", "speeds", "sha256"):
            one.pop(timed)
            other.pop(timed)
        assert one == other
        assert (here / folder / MODEL).read_bytes() == (there / folder / MODEL).read_bytes()
        assert (here / folder / TRACE).exists()
    assert {p.name for p in (here / "dense").iterdir()} == {
        p.name for p in (there / "dense").iterdir()
    }


def test_a_cluster_gives_the_table_of_one_machine_though_a_worker_dies(tmp_path, capsys):
    config = tiny.write(tmp_path / "tiny.toml")
    assert main([*command(config, tmp_path / "here"), "--jobs", "1", "--threads", "1"]) == 0
    expected = of_table(capsys.readouterr().out)
    with cluster(tmp_path / "cluster") as there:
        there.add("a")
        there.add("b")
        words = command(config, tmp_path / "there", "--scheduler", there.address)
        process = subprocess.Popen(
            [forked.python(), "-m", "experiments", *words], cwd=tiny.ROOT, stdout=subprocess.PIPE
        )
        until(lambda: there.at_work("a") or there.at_work("b"))
        # Its folder is locked, so that a second comparison does not do its runs as well.
        assert main(words) == 2
        assert "is at work in" in capsys.readouterr().err
        there.kill("a" if there.at_work("a") else "b")
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        assert of_table(printed.decode()) == expected
    same_in_all_but_time(tmp_path / "here", tmp_path / "there")
    assert not list((tmp_path / "there").rglob(".lock"))


def test_a_run_that_fails_on_a_worker_is_quoted_and_nothing_is_kept(tmp_path, capsys):
    config = tiny.write(
        tmp_path / "tiny.toml", {"options.speed_up": 1e6, "options.ratio": tiny.GONE}
    )
    with cluster(tmp_path / "cluster") as there:
        there.add("a")
        assert main(command(config, tmp_path / "runs", "--scheduler", there.address)) == 2
    error = capsys.readouterr().err
    assert "ended with code 2" in error
    assert "speed_up" in error
    assert not list((tmp_path / "runs").rglob(RECORD))


def test_no_scheduler_is_named_with_the_address(tmp_path, capsys, monkeypatch):
    from experiments.running import cluster as module

    monkeypatch.setattr(module, "PATIENCE", 1.0)
    config = tiny.write(tmp_path / "tiny.toml")
    for address in ("tcp://127.0.0.1:1", "nonsense"):
        assert main(command(config, tmp_path / "runs", "--scheduler", address)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"no Dask scheduler answers at {address!r}" in line
