"""Folders that cannot take a run, locks, leftovers, and how errors of files are reported."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpm_core import DecayPruningError
from dpm_core.adapters import saved
from dpm_core.adapters.saved import save_pruned
from experiments import places
from experiments.__main__ import count, folder, main, pause, seed, seeds
from experiments.config import ConfigError
from experiments.errors import RunError, carried_out, reported
from experiments.files import save_text
from experiments.inputs.images import DataError
from experiments.names import LAST_SEED
from experiments.places import BusyError, alone_in, busy, clean, explained
from experiments.record import MODEL, RECORD
from experiments.running import rebuild
from experiments.running import run as run_module
from experiments.running.finished import FORCED, finished
from experiments.running.rebuild import load_model
from experiments.running.request import CHECKPOINT
from experiments.running.run import run
from experiments.running.training import DivergedError, Stopped
from tests.support import forked, tiny
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# ---------------------------------------------------------------------- locks


def test_a_folder_is_locked_by_one_process_at_a_time_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "PATIENCE", 0.1)
    place = tmp_path / "a" / "b"
    assert not busy(place)
    with alone_in(place):
        assert busy(place)
        with pytest.raises(BusyError, match=rf"{os.getpid()}.*{place}"), alone_in(place):
            pytest.fail("it is held already")
        assert busy(place)
    assert names(tmp_path) == []
    with alone_in(place):
        save_text(place / "x.json", "{}")
    assert names(place) == ["x.json"]
    assert not busy(place)


def test_a_folder_that_was_there_stays_also_when_it_is_empty(tmp_path):
    place = tmp_path / "a"
    place.mkdir()
    with alone_in(place / "b"):
        pass
    assert names(tmp_path) == ["a"]
    assert names(place) == []


@pytest.mark.parametrize("ended", [True, False], ids=["killed", "alive"])
def test_a_lock_ends_with_the_process_that_holds_it(tmp_path, monkeypatch, ended):
    code = (
        "import sys, time; from pathlib import Path; from experiments.places import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tiny.ROOT, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        if ended:
            other.kill()
            other.wait()
            assert names(tmp_path) == [places.LOCK]
            with alone_in(tmp_path):
                pass
            assert names(tmp_path) == []
        else:
            monkeypatch.setattr(places, "PATIENCE", 0.1)
            with pytest.raises(BusyError, match=str(other.pid)), alone_in(tmp_path):
                pass
            assert names(tmp_path) == [places.LOCK]
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_where_there_are_no_locks_work_goes_on_and_nothing_is_cleaned_up(tmp_path, monkeypatch):
    left = tmp_path / ".record.json.abcdefgh.tmp"
    left.touch()

    def none(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(saved.fcntl, "flock", none)
    with alone_in(tmp_path), alone_in(tmp_path):
        save_text(tmp_path / "x.json", "{}")
    assert names(tmp_path) == [left.name, "x.json"]
    monkeypatch.setattr(saved, "fcntl", None)
    clean(tmp_path)
    save_text(tmp_path / "x.json", "{}")
    assert names(tmp_path) == [left.name, "x.json"]


# ---------------------------------------------------------------------- leftovers


def test_what_nobody_writes_any_more_is_removed_and_all_else_stays(tmp_path):
    dead = [".record.json.abcd_123.tmp", ".a-0-seed1.pt.zzzzzzzz.tmp", ".x-norms.png.aaaaaaaa.tmp"]
    others = [
        ".notes.abcdefgh.tmp",
        "record.json.abcdefgh.tmp",
        ".record.json.tmp",
        ".a.json.abc.tmp",
    ]
    for name in [*dead, *others]:
        (tmp_path / name).touch()
    (tmp_path / "target").touch()
    (tmp_path / ".table.json.abcdefgh.tmp").symlink_to(tmp_path / "target")

    def fill(file):
        (mine,) = {p.name for p in tmp_path.iterdir()} - {*dead, *others, "target"} - links
        clean(tmp_path)
        assert set(names(tmp_path)) == {mine, "target", *others, *links}
        file.write(b"whole")

    links = {".table.json.abcdefgh.tmp"}
    saved.write(tmp_path / "record.json", fill)
    assert set(names(tmp_path)) == {"record.json", "target", *others, *links}
    assert (tmp_path / "record.json").read_bytes() == b"whole"
    clean(tmp_path / "none")


def test_a_file_that_is_cleaned_away_before_it_is_claimed_is_begun_anew(tmp_path, monkeypatch):
    claim, first = saved.claim, []

    def late(handle, sure=False):
        if not first:
            first.append(handle)
            clean(tmp_path)
        return claim(handle, sure)

    monkeypatch.setattr(saved, "claim", late)
    save_text(tmp_path / "record.json", "whole")
    assert names(tmp_path) == ["record.json"]
    assert (tmp_path / "record.json").read_text() == "whole"


# ---------------------------------------------------------------------- errors of the file system


@given(
    st.sampled_from(sorted(errno.errorcode)),
    st.one_of(st.none(), st.text(max_size=20), st.binary(max_size=20), st.integers(0, 9)),
)
def test_any_error_of_the_file_system_is_reported_in_one_line(number, path):
    line = reported(OSError(number, os.strerror(number), path))
    assert line
    assert line.isprintable()
    assert os.strerror(number) in line


def test_a_temporary_file_is_called_what_it_was_to_become():
    error = OSError(errno.EROFS, "Read-only file system", "/a/.record.json.abcdefgh.tmp")
    assert explained(error).startswith("/a/record.json: Read-only file system; give a folder")


def test_an_error_that_pytorch_hides_is_that_of_the_file(tmp_path, monkeypatch):
    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            pass

    with pytest.raises(OSError, match="No space left") as caught:
        saved.write(tmp_path / "x.pt", lambda file: torch.save({"a": torch.zeros(9)}, Full()))
    assert caught.value.filename == str(tmp_path / "x.pt")
    assert names(tmp_path) == []


def test_bugs_keep_their_tracebacks_and_known_errors_do_not(capsys):
    for error in (ValueError("a"), KeyError("b"), RuntimeError("c"), AssertionError()):
        assert reported(error) is None
        with pytest.raises(type(error)):
            carried_out(lambda error=error: (_ for _ in ()).throw(error))
    for kind in (ConfigError, DataError, RunError, DivergedError, BusyError, DecayPruningError):
        assert reported(kind("one\ntwo\x1b")) == "one two\\x1b"
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("can't allocate memory"),
    ):
        assert "memory" in reported(error)
    assert carried_out(lambda: 7) == 7
    assert carried_out(lambda: (_ for _ in ()).throw(RunError("no")), lambda: " on rank 3") == 2
    assert capsys.readouterr().err == "error on rank 3: no\n"


def command(out: Path, *more: str) -> list[str]:
    start = ["run", str(tiny.PATH), "--variant", "base", "--seed", "0", "--device", "cpu"]
    return [*start, "--out", str(out), "--data-root", str(out / "data"), *more]


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def untrained(monkeypatch):
    """No training loop may run: refusals have to come before it."""

    def fail(loop):
        pytest.fail("it trained")

    monkeypatch.setattr(run_module.Loop, "run", fail)


def in_the_way(out: Path) -> dict[str, Path]:
    own = out / "tiny" / "digits" / "base-seed0"
    names = (RECORD, CHECKPOINT, MODEL, "trace.pt", places.LOCK)
    return {name: own / name for name in names}


@pytest.mark.parametrize("force", [(), ("--force",), ("--resume",)], ids=["", "force", "resume"])
@pytest.mark.parametrize("name", in_the_way(Path()))
@pytest.mark.usefixtures("untrained")
def test_a_folder_in_a_files_place_is_named_before_any_training(tmp_path, capsys, name, force):
    path = in_the_way(tmp_path)[name]
    path.mkdir(parents=True)
    (path / "precious").touch()
    taken_for_a_stopped_run = name == CHECKPOINT and not force
    named = path.parent if taken_for_a_stopped_run else path
    assert str(named) in refused(capsys, *command(tmp_path, *force))
    assert (path / "precious").exists()


@pytest.mark.parametrize("at", ["", "tiny", "tiny/digits", "tiny/digits/base-seed0", "dense"])
@pytest.mark.usefixtures("untrained")
def test_a_file_in_a_folders_place_is_named_before_any_training(tmp_path, capsys, at):
    out = tmp_path / "out"
    path = out / at
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    assert str(path) in refused(capsys, *command(out))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("free", [0, 10_000])
@pytest.mark.usefixtures("untrained")
def test_a_full_disk_is_named_before_any_training(tmp_path, capsys, monkeypatch, free):
    usage = places.shutil._ntuple_diskusage(10**6, 10**6 - free, free)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: usage)
    line = refused(capsys, *command(tmp_path / "out"))
    assert "MB are needed" in line
    assert "free some space" in line
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.usefixtures("untrained")
def test_a_folder_that_takes_no_file_is_named_before_any_training(
    tmp_path, capsys, monkeypatch, number
):
    def refuse(*args, **settings):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(places.tempfile, "TemporaryFile", refuse)
    line = refused(capsys, *command(tmp_path / "out"))
    assert os.strerror(number) in line
    assert str(tmp_path / "out") in line


@pytest.mark.parametrize("command", ["table", "plots", "report"])
def test_a_folder_for_pages_that_is_a_file_is_named(tmp_path, tiny_runs, capsys, command):
    out = tmp_path / "out"
    out.write_text("precious")
    assert str(out) in refused(capsys, command, str(tiny_runs.out), "--out", str(out))
    assert out.read_text() == "precious"


def test_a_path_that_is_too_long_is_refused_in_one_line(tmp_path, capsys):
    refused(capsys, *command(tmp_path / ("x" * 300)))
    refused(capsys, *command(tmp_path / "/".join(["x" * 200] * 30)))


def test_a_current_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; import experiments.__main__ as m; os.rmdir(os.getcwd())\n"
        "sys.exit(m.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [forked.python(), "-c", code, *command(Path("out"))],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_gone_ends_a_command_quietly(tmp_path, tiny_runs):
    arguments = ["table", str(tiny_runs.out), "--out", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [forked.python(), "-m", "experiments", *arguments],
        cwd=tiny.ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


# ---------------------------------------------------------------------- what is asked for


@given(st.one_of(st.text(max_size=30), st.integers().map(str), st.floats().map(str)))
def test_what_is_no_number_of_its_kind_is_refused_by_the_parser(text):
    import argparse

    for kind, low, high in ((count, 1, 10**9), (seed, 0, LAST_SEED), (pause, 0, float("inf"))):
        try:
            number = kind(text)
        except argparse.ArgumentTypeError:
            continue
        assert low <= number <= high
    try:
        many = seeds(text)
    except argparse.ArgumentTypeError:
        return
    assert many == sorted(set(many))
    assert 1 <= len(many) <= 1000


@pytest.mark.parametrize("text", ["0-999999999", "0-1000", "5-4", "", "-", "1-", "²", "9" * 5000])
def test_too_many_seeds_are_refused_at_once(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tiny.PATH), f"--seeds={text}"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("number", [-1, 10**30, 2 * 10**13])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, number):
    with pytest.raises(RunError, match=str(number)):
        run(tiny.request(tmp_path / "out", "random", seed=number))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["meta", "hpu", "cuda:-1", "cuda:99", "", "cpu:x", "fpga"])
def test_a_device_that_cannot_compute_is_refused(tmp_path, capsys, name):
    start = [*command(tmp_path / "out"), f"--device={name}"]
    assert "there is no device" in refused(capsys, *start)


def test_an_empty_path_is_refused(capsys):
    for option in ("--out=", "--data-root="):
        with pytest.raises(SystemExit):
            main([*command(Path("unused")), option])
        assert "empty" in capsys.readouterr().err
    assert folder("a") == Path("a")


# ---------------------------------------------------------------------- starting anew


IMPOSSIBLE = {
    "an impossible target": {"options.speed_up": 1e6},
    "a batch beyond the data": {"stages.prune.batch": 5000},
    "a dense batch beyond the data": {"dense.batch": 5000},
    "more images than there are": {"data.train": 99999},
    "no such layer": {"options.ignored": ["none"]},
    "too short a stage": {"smooth.steps": 1000},
    "a network too deep": {"model": "vgg16-bn"},
    "no such folder": {"data.name": "folder:/nowhere/at/all"},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.usefixtures("untrained")
def test_force_keeps_what_is_there_where_the_new_run_is_impossible(tmp_path, capsys, case):
    path = tiny.write(tmp_path / "c.toml", IMPOSSIBLE[case])
    kinds = ["digits", "folder--nowhere-at-all"]
    for kind in kinds:
        own = tmp_path / "out" / "tiny" / kind / "sr-seed0"
        own.mkdir(parents=True)
        (own / RECORD).write_text("precious")
        (own / CHECKPOINT).write_text("precious, too")
    start = ["run", str(path), "--variant", "sr", "--seed", "0", "--device", "cpu", "--force"]
    refused(capsys, *start, "--out", str(tmp_path / "out"), "--data-root", str(tmp_path / "data"))
    for kind in kinds:
        own = tmp_path / "out" / "tiny" / kind / "sr-seed0"
        assert {p.name: p.read_text() for p in own.iterdir()} == {
            RECORD: "precious",
            CHECKPOINT: "precious, too",
        }


@pytest.mark.parametrize("step", [2, 9, 20])
@pytest.mark.usefixtures("miniature")
def test_a_record_stays_until_a_forced_run_is_complete_which_goes_on_where_it_stopped(
    tmp_path, step
):
    wanted = tiny.request(tmp_path, "sp", MINIATURE, save_every=0)
    record = run(wanted)
    first, content = tiny.results(record), record.read_bytes()
    forced, resumed = replace(wanted, force=True), replace(wanted, resume=True)
    # What stops it comes in dense training, too: that is done already, and its steps are skipped.
    dense = next((tmp_path / "dense").iterdir())
    dense.unlink()
    with tiny.asked_when(lambda n: n == step), pytest.raises(Stopped):
        run(forced)
    assert record.read_bytes() == content
    assert not finished(resumed)
    with tiny.asked_when(lambda n: n == 2), pytest.raises(Stopped):
        run(resumed)
    assert record.read_bytes() == content
    assert run(resumed) == record
    assert record.read_bytes() != content
    assert finished(resumed)
    assert names(record.parent) == sorted([MODEL, RECORD, "trace.pt"])
    assert tiny.difference(first, tiny.results(record)) is None


@pytest.mark.usefixtures("miniature")
def test_a_forced_run_of_another_configuration_replaces_only_in_the_end(tmp_path):
    record = run(tiny.request(tmp_path, "sp", MINIATURE))
    content = record.read_bytes()
    other = tiny.request(tmp_path, "sp", {**MINIATURE, "smooth.steps": 6}, save_every=0)
    with tiny.asked_when(lambda n: n == 5), pytest.raises(Stopped):
        run(replace(other, force=True))
    assert record.read_bytes() == content
    # The other configuration's run goes on; that of the record is finished, and what is saved
    # beside it is not its own.
    assert not finished(replace(other, resume=True))
    assert finished(tiny.request(tmp_path, "sp", MINIATURE, resume=True))
    assert run(replace(other, resume=True)) == record
    assert json.loads(record.read_text())["config"]["smooth"]["steps"] == 6
    assert not (record.parent / FORCED).exists()


@pytest.mark.usefixtures("miniature")
def test_a_run_that_another_process_carries_out_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "PATIENCE", 0.1)
    wanted = tiny.request(tmp_path, "sp", MINIATURE)
    with alone_in(wanted.folder):
        for asked in (wanted, replace(wanted, resume=True), replace(wanted, force=True)):
            with pytest.raises(BusyError, match=str(wanted.folder)):
                run(asked)
        assert names(wanted.folder) == [places.LOCK]
    run(wanted)


# ---------------------------------------------------------------------- a model's facts

FACTS = {"model": "vgg-digits", "in_channels": 1, "classes": 10, "image_size": 8}
ODD = [10**12, 10**30, 10**6, -1, 0, 11, 2, 1.5, "a", None, ["a"], {}, True, "vgg16-bn", "../x"]


@pytest.mark.parametrize("key", [*FACTS, "all", "none"])
def test_facts_that_do_not_go_with_a_models_tensors_are_refused_before_it_is_built(
    tmp_path, monkeypatch, capsys, key
):
    from experiments.inputs import models

    network, path = models.build("vgg-digits", 1, 10), tmp_path / "m.safetensors"
    save_pruned(path, network, [], FACTS)
    assert load_model(path)[1].shape == (4, 1, 8, 8)
    tried = [{}, None, []] if key == "all" else [{k: v for k, v in FACTS.items() if k != "model"}]
    if key in FACTS:
        tried = [{**FACTS, key: value} for value in ODD]
        if key == "image_size":  # no tensor shows it
            tried = [f for f in tried if f[key] not in (11, 2) or f[key] is True]
    build = models.build

    def built(name, channels, classes, seed=None):
        assert torch.empty(()).is_meta or classes <= 11
        return build(name, channels, classes, seed)

    monkeypatch.setattr(models, "build", built)
    read = saved.read(path)
    for facts in tried:
        monkeypatch.setattr(rebuild, "read", lambda _, facts=facts: replace(read, facts=facts))
        line = refused(capsys, "export", str(path))
        assert str(path) in line
    assert names(tmp_path) == ["m.safetensors"]


# ---------------------------------------------------------------------- processes


def status(pid: int) -> dict[str, str]:
    """What the system says of a process; nothing where it is gone, even while it is asked."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def alive(pid: int) -> bool:
    return status(pid).get("State", "Z")[0] != "Z"


def listens(pid: int) -> bool:
    """Whether a run trains: from then on it takes a termination as a request."""
    return bool(int(status(pid).get("SigCgt", "0"), 16) >> (signal.SIGTERM - 1) & 1)


def children(out: Path) -> list[int]:
    """Runs of a comparison, by their locks: each says which process holds it."""
    return [int(text) for path in out.rglob(places.LOCK) if (text := path.read_text().strip())]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("kind", ["SIGHUP", "SIGKILL"])
def test_a_comparisons_runs_end_and_save_themselves_with_it_whatever_ends_it(tmp_path, kind):
    out = tmp_path / "out"
    path = tiny.write(tmp_path / "c.toml", {"dense.epochs": 500})
    arguments = ["compare", str(path), "--variants", "base", "--seeds", "0-1", "--jobs", "2"]
    arguments += ["--out", str(out), "--data-root", str(tmp_path / "data"), "--device", "cpu"]
    process = subprocess.Popen(
        [forked.python(), "-m", "experiments", *arguments],
        cwd=tiny.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # The tests may run where it is ignored, as under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    runs: list[int] = []
    try:
        until = time.monotonic() + 200
        while len(runs) < 2:
            assert time.monotonic() < until, "no runs"
            time.sleep(0.1)
            runs = children(out)
        if kind == "SIGHUP":  # no second one begins meanwhile
            again = subprocess.run(
                [forked.python(), "-m", "experiments", *arguments],
                cwd=tiny.ROOT,
                capture_output=True,
                text=True,
            )
            assert again.returncode == 2
            assert "another process is at work" in again.stderr
            assert "--force" not in again.stderr
            assert children(out) == runs
        while not all(map(listens, runs)):
            assert time.monotonic() < until, "no training"
            time.sleep(0.1)
        process.send_signal(getattr(signal, kind))
        process.wait(timeout=100)
        while any(map(alive, runs)):
            assert time.monotonic() < until, "runs go on"
            time.sleep(0.1)
        assert len(list(out.rglob("checkpoint*.pt")) + list(out.rglob("*-checkpoint.pt"))) >= 2
        assert not list(out.rglob(places.LOCK))
        assert not list(out.rglob("*.tmp"))
    finally:
        process.kill()
        process.wait()
        for pid in runs:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_an_end_of_standard_input_asks_a_run_to_stop(tmp_path, monkeypatch):
    from experiments import __main__ as command_line

    reader, writer = os.pipe()
    asked = []
    monkeypatch.setattr(command_line.os, "read", lambda _, size: os.readv(reader, [bytearray(9)]))
    monkeypatch.setattr(command_line.os, "kill", lambda pid, kind: asked.append((pid, kind)))
    command_line.stop_at_eof()
    os.write(writer, b"not yet")
    time.sleep(0.1)
    assert asked == []
    os.close(writer)
    until = time.monotonic() + 10
    while not asked and time.monotonic() < until:
        time.sleep(0.01)
    assert asked == [(os.getpid(), signal.SIGTERM)]
    os.close(reader)
