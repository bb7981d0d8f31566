"""Comparisons: which processes are started, in which order, and what happens if one fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dpm_core.adapters.saved import save_pruned
from experiments.__main__ import STOPPED, main
from experiments.config import Config
from experiments.errors import RunError
from experiments.record import MODEL
from experiments.running import compare as compare_module
from experiments.running.compare import compare
from experiments.running.jobs import Job
from experiments.running.request import Request
from experiments.running.stopping import ASKING
from tests.support import forked, tiny
from tests.support.records import record


@dataclass
class Started:
    """A process that was not started: its command, and its state as the test sets it."""

    command: list[str]
    ends_after: int
    code: int = 0
    terminated: bool = False
    waited: bool = False

    def option(self, name: str) -> str:
        return self.command[self.command.index(f"--{name}") + 1]

    @property
    def path(self) -> str:
        """The configuration's file."""
        return self.command[self.command.index("run") + 1]

    @property
    def name(self) -> str:
        return f"{self.option('variant')} {self.option('seed')}"


@dataclass
class Machine:
    """Stands in for processes and time.

    Attributes:
        configs: of the runs, by the path of their file.
        durations: ticks that a run takes, by name; 1 for others.
        codes: exit codes, by name; 0 for others.
        log: what a run prints.
    """

    configs: dict[str, Config] = field(default_factory=lambda: {str(tiny.PATH): tiny.config()})
    durations: dict[str, int] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    log: str = ""
    started: list[Started] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)
    ticks: int = 0

    def popen(self, command, stdin, stdout, stderr, start_new_session):
        assert (stdin, stderr) == (subprocess.PIPE, subprocess.STDOUT)
        assert "--until-eof" in command
        # Else an interrupt on the terminal would reach a run twice, and end it unsaved.
        assert start_new_session
        process = Started(command, 0)
        process.ends_after = self.ticks + self.durations.get(process.name, 1)
        process.code = self.codes.get(process.name, 0)
        stdout.write(self.log.encode())
        process.stdin = io.BytesIO()
        process.poll = lambda: self.poll(process)
        process.terminate = lambda: setattr(process, "terminated", True)
        process.wait = lambda: setattr(process, "waited", True)
        self.started.append(process)
        return process

    def poll(self, process):
        if self.ticks < process.ends_after:
            return None
        if process.code == 0:
            self.finish(process)
        return process.code

    def finish(self, process):
        variant, seed = process.option("variant"), int(process.option("seed"))
        config = self.configs[process.path]
        folder = Request(config, variant, seed, out=Path(process.option("out"))).folder
        one = record(variant, seed, config={"name": config.name}, config_hash=config.hash())
        one.save(folder / "record.json")
        save_pruned(folder / MODEL, torch.nn.Linear(1, 1), [])

    def sleep(self, seconds):
        alive = [p for p in self.started if self.ticks < p.ends_after and not p.terminated]
        self.at_once.append(len(alive))
        self.ticks += 1
        if self.ticks > 100:
            raise AssertionError("waits forever")


@pytest.fixture
def machine(monkeypatch) -> Machine:
    pretended = Machine()
    monkeypatch.setattr(compare_module.subprocess, "Popen", pretended.popen)
    monkeypatch.setattr(compare_module.time, "sleep", pretended.sleep)
    return pretended


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Comparisons install signal handlers; these tests restore the old ones."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def jobs(out: Path, variants=("base", "sp", "sr"), seeds=(0, 1)) -> list[Job]:
    return [Job(tiny.PATH, tiny.request(out, v, seed=s)) for s in seeds for v in variants]


def records_of(wanted: list[Job]) -> list[Path]:
    return [job.request.folder / "record.json" for job in wanted]


def names(started) -> list[str]:
    return [process.name for process in started]


def test_every_run_is_carried_out_and_its_record_returned_in_order(tmp_path, machine):
    wanted = jobs(tmp_path)
    records = compare(wanted, at_once=2)
    assert records == records_of(wanted)
    runs = sorted(f"{j.request.variant} {j.request.seed}" for j in wanted)
    assert sorted(names(machine.started)) == runs


def test_a_seeds_dense_model_is_there_before_the_others_start(tmp_path, machine, monkeypatch):
    machine.durations = {"base 0": 5, "base 1": 3}
    begins, ends = begins_and_ends(machine, monkeypatch)
    compare(jobs(tmp_path), at_once=4)
    assert names(machine.started)[:2] == ["base 0", "base 1"]
    for name in ("sp 0", "sr 0", "sp 1", "sr 1"):
        assert begins[f"tiny {name}"] >= ends[f"tiny base {name[-1]}"]


def test_seeds_that_share_a_dense_model_wait_for_the_first_of_them(tmp_path, machine, monkeypatch):
    sharing = {"name": "sharing", "dense.seeds": 2}
    path = tiny.write(tmp_path / "sharing.toml", sharing)
    machine.configs[str(path)] = tiny.config(sharing)
    machine.durations = {"base 0": 5, "base 1": 9}
    begins, ends = begins_and_ends(machine, monkeypatch)
    compare(
        [Job(path, tiny.request(tmp_path, "base", sharing, seed=s)) for s in range(5)], at_once=9
    )
    assert names(machine.started) == ["base 0", "base 1", "base 2", "base 4", "base 3"]
    for seed, first in ((2, 0), (4, 0), (3, 1)):
        assert begins[f"sharing base {seed}"] >= ends[f"sharing base {first}"]


def test_no_core_waits_for_another_seeds_dense_model(tmp_path, machine, monkeypatch):
    machine.durations = {"base 0": 3, "base 1": 20}
    begins, ends = begins_and_ends(machine, monkeypatch)
    compare(jobs(tmp_path), at_once=2)
    assert ends["tiny sp 0"] < ends["tiny sr 0"] < ends["tiny base 1"] <= begins["tiny sp 1"]
    assert max(machine.at_once) == 2


# ---------------------------------------------------------------------- several configurations

LONGER = {"name": "longer", "smooth.steps": 6}
SCRATCH = {"name": "scratch", "dense": tiny.GONE}
OTHER_DENSE = {"name": "other-dense", "dense.epochs": 2}


def files(tmp_path, machine, *changes) -> list[str]:
    """Changed tiny configurations as files; the first is the tiny one itself."""
    paths = [str(tiny.PATH)]
    for change in changes:
        path = str(tiny.write(tmp_path / f"{change['name']}.toml", change))
        machine.configs[path] = tiny.config(change)
        paths.append(path)
    return paths


def label(process) -> str:
    return f"{Path(process.path).stem} {process.name}"


def begins_and_ends(machine, monkeypatch) -> tuple[dict[str, int], dict[str, int]]:
    """Ticks at which runs begin and end, by file, variant and seed; filled as they run."""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    finish, popen = machine.finish, machine.popen
    machine.finish = lambda process: (ends.update({label(process): machine.ticks}), finish(process))

    def start(command, **settings):
        process = popen(command, **settings)
        begins[label(process)] = machine.ticks
        return process

    monkeypatch.setattr(compare_module.subprocess, "Popen", start)
    return begins, ends


def compared(tmp_path, monkeypatch, paths, *more) -> int:
    """The exit code of a comparison of several files, without its plots."""
    monkeypatch.setattr("experiments.__main__._plots", lambda *args: None)
    name, _, *rest = command(tmp_path, *more)
    return main([name, *paths, *rest])


def test_configurations_share_a_dense_model_that_one_run_trains(
    tmp_path, machine, monkeypatch, capsys
):
    paths = files(tmp_path, machine, LONGER)
    machine.durations = {"base 0": 4, "base 1": 2}
    begins, ends = begins_and_ends(machine, monkeypatch)
    more = ["--seeds", "0-1", "--variants", "base,sp", "--jobs", "8"]
    assert compared(tmp_path, monkeypatch, paths, *more) == 0
    # One run of each seed trains; all others, of both configurations, wait for it.
    assert [label(p) for p in machine.started[:2]] == ["tiny base 0", "tiny base 1"]
    assert len(begins) == 8
    for name, tick in begins.items():
        leader = f"tiny base {name[-1]}"
        assert name == leader or tick >= ends[leader], name
    titles = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("depgraph, ")]
    assert [title.split("(")[1].split(")")[0] for title in titles] == ["tiny", "longer"]


def test_configurations_of_different_dense_models_train_each_their_own(
    tmp_path, machine, monkeypatch
):
    paths = files(tmp_path, machine, OTHER_DENSE, SCRATCH)
    begins, ends = begins_and_ends(machine, monkeypatch)
    machine.durations = {"base 0": 3}
    assert compared(tmp_path, monkeypatch, paths, "--seeds", "0", "--jobs", "8") == 0
    assert [label(p) for p in machine.started[:2]] == ["tiny base 0", "other-dense base 0"]
    for name in ("tiny sp 0", "tiny sr 0", "other-dense sp 0", "other-dense sr 0"):
        assert begins[name] >= ends[f"{name.split()[0]} base 0"]
    assert {n for n in begins if n.startswith("scratch")} == {
        f"scratch {v} 0" for v in ("base", "sp", "sr")
    }


def test_without_dense_models_no_run_waits_for_another(tmp_path, machine, monkeypatch):
    paths = files(tmp_path, machine, SCRATCH)
    begins, _ = begins_and_ends(machine, monkeypatch)
    machine.durations = {"base 0": 9}
    assert compared(tmp_path, monkeypatch, paths[1:], "--seeds", "0", "--jobs", "8") == 0
    assert begins == {f"scratch {v} 0": 0 for v in ("base", "sp", "sr")}


def test_a_configuration_given_twice_is_run_once(tmp_path, machine, monkeypatch):
    assert compared(tmp_path, monkeypatch, [str(tiny.PATH)] * 2, "--seeds", "0", "--jobs", "8") == 0
    assert sorted(names(machine.started)) == ["base 0", "sp 0", "sr 0"]


def test_two_configurations_of_one_name_are_refused_before_any_run(
    tmp_path, machine, monkeypatch, capsys
):
    paths = files(tmp_path, machine, {**LONGER, "name": "tiny"})
    assert len(set(paths)) == 2
    assert compared(tmp_path, monkeypatch, paths, "--seeds", "0") == 2
    message = capsys.readouterr().err
    assert all(path in message for path in paths)
    assert "'tiny'" in message
    assert machine.started == []


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_no_more_runs_at_once_than_asked(tmp_path, machine, at_once):
    machine.durations = {"sp 0": 4, "sr 0": 2, "sr 1": 3}
    compare(jobs(tmp_path, seeds=(0, 1, 2)), at_once=at_once)
    assert max(machine.at_once) == at_once
    assert len(machine.started) == 9


def test_by_default_there_is_a_run_per_core_and_on_a_gpu_one(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    compare(jobs(tmp_path / "a", seeds=(0, 1, 2)))
    assert max(machine.at_once) == 3
    machine.at_once.clear()
    device = torch.device("cuda", 0)
    requests = [tiny.request(tmp_path / "b", "sp", seed=s, device=device) for s in range(3)]
    compare([Job(tiny.PATH, request) for request in requests])
    assert max(machine.at_once) == 1
    assert {p.option("device") for p in machine.started[-3:]} == {"cuda:0"}


def test_cores_are_shared_out_among_the_runs(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    compare(jobs(tmp_path / "a", seeds=(0,)), at_once=3)
    compare(jobs(tmp_path / "b", seeds=(0,)), at_once=20)
    assert [p.option("threads") for p in machine.started] == ["2"] * 3 + ["1"] * 3


def test_a_run_is_started_with_all_that_it_needs(tmp_path, machine):
    wanted = tiny.request(tmp_path / "out", "sr", seed=7, save_every=4.5)
    compare([Job(tiny.PATH, wanted, "digits")], at_once=1)
    (process,) = machine.started
    command = [sys.executable, "-m", "experiments", "run", str(tiny.PATH)]
    assert process.command[: len(command)] == command
    assert "--resume" in process.command
    options = {
        "variant": "sr",
        "seed": "7",
        "out": str(tmp_path / "out"),
        "data-root": str(wanted.data_root),
        "device": "cpu",
        "save-every": "4.5",
        "data": "digits",
    }
    assert {name: process.option(name) for name in options} == options


def test_without_an_override_the_runs_get_none(tmp_path, machine):
    compare(jobs(tmp_path, seeds=(0,)), at_once=1)
    assert all("--data" not in p.command for p in machine.started)


def test_what_is_finished_is_not_run_again(tmp_path, machine):
    wanted = jobs(tmp_path)
    compare(wanted[:4], at_once=2)
    machine.started.clear()
    assert compare(wanted, at_once=2) == records_of(wanted)
    # Seed 1's first variant is there, with its dense model.
    assert sorted(names(machine.started)) == ["sp 1", "sr 1"]
    machine.started.clear()
    compare(wanted, at_once=2)
    assert machine.started == []


def test_a_failing_run_is_named_and_its_output_quoted_and_the_others_are_stopped(tmp_path, machine):
    machine.codes = {"sp 0": 3}
    machine.durations = {"sp 0": 2, "sr 0": 50, "sp 1": 50}
    machine.log = "\n".join(f"line {i}" for i in range(40)) + "\nerror: no disk is left\n"
    with pytest.raises(RunError, match=r"^tiny, sp, seed 0 ended with code 3") as caught:
        compare(jobs(tmp_path), at_once=3)
    message = str(caught.value)
    assert "error: no disk is left" in message
    assert "line 39" in message
    assert "line 3\n" not in message
    others = [p for p in machine.started if p.name in ("sr 0", "sp 1")]
    assert len(others) == 2
    assert all(p.terminated and p.waited for p in others)
    assert "sr 1" not in names(machine.started)
    # Finished ones are kept.
    assert (tmp_path / "tiny" / "digits" / "base-seed0" / "record.json").exists()


def test_an_interrupt_lets_every_run_save_itself(tmp_path, machine, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(jobs(tmp_path), at_once=2)
    assert len(machine.started) == 2
    assert all(p.terminated and p.waited for p in machine.started)


def command(tmp_path, *more) -> list[str]:
    return [
        "compare",
        str(tiny.PATH),
        "--out",
        str(tmp_path / "out"),
        "--data-root",
        str(tmp_path / "data"),
        "--device",
        "cpu",
        *more,
    ]


@pytest.mark.parametrize("number", ASKING)
def test_an_interrupted_comparison_says_how_to_go_on(
    tmp_path, machine, monkeypatch, capsys, number
):
    monkeypatch.setattr(compare_module.time, "sleep", lambda seconds: signal.raise_signal(number))
    # A process started in the background ignores some of them, and this would never end.
    usual = {number: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {kind: signal.signal(kind, handler) for kind, handler in usual.items()}
    try:
        code = main(command(tmp_path))
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("the interrupt went through, with a traceback")
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert code == STOPPED
    assert "the same command" in capsys.readouterr().err
    assert machine.started
    assert all(p.terminated and p.waited for p in machine.started)


def test_a_run_asked_for_twice_is_started_once(tmp_path, machine, monkeypatch):
    monkeypatch.setattr("experiments.__main__._plots", lambda *args: None)
    more = ["--seeds", "0,0-1", "--variants", "sp,base,sp", "--jobs", "4"]
    assert main(command(tmp_path, *more)) == 0
    assert sorted(names(machine.started)) == ["base 0", "base 1", "sp 0", "sp 1"]


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_jobs_are_refused_instead_of_waiting_forever(tmp_path, machine, capsys, count):
    try:
        code = main(command(tmp_path, f"--jobs={count}"))
    except SystemExit as ended:  # by the parser
        code = ended.code
    assert code == 2
    assert "jobs" in capsys.readouterr().err
    assert machine.started == []


def test_a_record_of_another_configuration_is_refused_before_any_run(tmp_path, machine, capsys):
    other = tiny.request(tmp_path / "out", "sr", {"smooth.steps": 6}, seed=1)
    other.folder.mkdir(parents=True)
    record("sr", 1, config_hash=other.config.hash()).save(other.folder / "record.json")
    assert main(command(tmp_path, "--seeds", "0-1")) == 2
    assert "another configuration" in capsys.readouterr().err
    assert machine.started == []


# ---------------------------------------------------------------------- real processes


def experiments(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forked.python(), "-m", "experiments", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tiny.ROOT,
        check=False,
    )


@pytest.mark.slow
def test_a_comparison_ends_in_records_a_table_and_plots_and_is_not_done_twice(tmp_path, capsys):
    arguments = command(tmp_path, "--seeds", "0-1", "--variants", "base,sr")
    done = experiments(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = tmp_path / "out"
    records = sorted(out.rglob("record.json"))
    assert [p.parent.name for p in records] == [
        f"{v}-seed{s}" for v in ("base", "sr") for s in (0, 1)
    ]
    assert len(list((out / "dense").iterdir())) == 2

    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["base", "+SR"]
    assert all(row.split("|")[-2].strip() == "2" for row in rows[2:])
    pictures = [Path(line) for line in lines if line.endswith(".png")]
    assert [p.name for p in pictures] == [
        f"tiny-digits--360-training-images-{what}.png" for what in ("accuracy", "channels", "norms")
    ]
    assert all(p.exists() and p.parent == out / "plots" for p in pictures)
    assert lines[-1] == str(out / "table.json")
    (section,) = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in section["rows"]] == ["base", "sr"]
    finals = {
        v: [json.loads(p.read_text())["accuracy"]["final"] for p in records if v in p.parent.name]
        for v in ("base", "sr")
    }
    for row in section["rows"]:
        assert row["seeds"] == [0, 1]
        assert row["final"]["mean"] == pytest.approx(sum(finals[row["variant"]]) / 2)

    times = [p.stat().st_mtime_ns for p in records]
    assert main(arguments) == 0
    assert [p.stat().st_mtime_ns for p in records] == times
    again = capsys.readouterr().out.splitlines()
    assert again == [line for line in lines if not line.startswith("finished")]


@pytest.mark.slow
def test_a_failing_comparison_quotes_the_runs_own_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked.python())
    missing = tmp_path / "no images here"
    more = ["--seeds", "3", "--variants", "sp", "--data", f"folder:{missing}"]
    assert main(command(tmp_path, *more)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: tiny, sp, seed 3 ended with code 2:\n")
    assert f"error: {missing} needs the folders train and test" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_a_configuration_that_is_wrong_ends_the_process_with_2(tmp_path):
    path = tiny.write(tmp_path / "c.toml", {"smooth.steps": 0})
    done = experiments("run", str(path), "--variant", "sp", "--seed", "0", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}: smooth.steps is 0; give an integer of at least 1")
    assert [p.name for p in tmp_path.iterdir()] == ["c.toml"]
