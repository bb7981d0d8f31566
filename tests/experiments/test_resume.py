"""Promise 7: stopped at any step and resumed, a run ends in the bits of one that was not stopped.

A miniature run has 4 steps of dense training, 8 of sparse learning and 16 of pruning; decisions
fall at its beginning, decays take 5 steps, and releases fall in the fourth. OTOv2's is one training
from scratch, of 32 steps. Iterative pruning, without sparse learning, has a round every 12 steps.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.__main__ import STOPPED
from experiments.errors import RunError
from experiments.files import load_tensors, save_tensors
from experiments.record import MODEL
from experiments.running import run as run_module
from experiments.running import stopping
from experiments.running.run import run
from experiments.running.training import Stopped
from tests.support import forked, tiny
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")

HEARING = {
    **MINIATURE,
    "rectify": {"criterion": "hearing", "threshold": -1.0, "batches": 2, "max_share": 0.3},
}
# Two rounds of decays, which start after steps 20 and 23; a release at 27; zero and removed at 32.
OTOV2 = {
    **MINIATURE,
    "framework": "otov2",
    "dense": tiny.GONE,
    "options": {
        "target_group_sparsity": 0.5,
        "tolerance_group_sparsity": 0.0,
        "start_epoch": 1,
        "epsilon": 0.95,
        "lmbda": 0.8,
    },
    "stages": {
        "prune": {
            "epochs": 8,
            "batch": 40,
            "learning_rate": 0.05,
            "milestones": [5],
            "momentum": 0.0,
            "mixup": 0.2,
        }
    },
}
ROUNDS = {
    **MINIATURE,
    "options.steps": 20,
    "options.speed_up": 3.0,
    "options.rounds": 3,
    "options.round_epochs": 3,
    "rectify.max_share": 0.5,
    "stages": {"prune": {**MINIATURE["stages"]["prune"], "epochs": 9}},
}
WAYS = {
    "base": ("base", MINIATURE),
    "sp": ("sp", MINIATURE),
    "sr": ("sr", MINIATURE),
    "sr by hearing": ("sr", HEARING),
    "sr at random": ("random", MINIATURE),
    "sr in two waves": ("sr", {**MINIATURE, "rectify.waves": 2, "stages.prune.epochs": 5}),
    "from scratch": ("sr", {**MINIATURE, "dense": tiny.GONE}),
    "base in rounds": ("base", ROUNDS),
    "sp in rounds": ("sp", ROUNDS),
    "sr in rounds": ("sr", ROUNDS),
    "otov2": ("sr", OTOV2),
    "otov2 with adam": ("sp", {**OTOV2, "stages.prune.optimizer": "adam"}),
}
DENSE, SPARSE = 4, 8
PRUNE = DENSE + SPARSE


def changes(way: str):
    variant, config = WAYS[way]
    # The stages replace the tiny configuration's whole, so changes inside are made here.
    stages = {name: dict(stage) for name, stage in config["stages"].items()}
    inside = {key: value for key, value in config.items() if key.startswith("stages.")}
    for key, value in inside.items():
        _, stage, setting = key.split(".")
        stages[stage][setting] = value
    return variant, {k: v for k, v in config.items() if k not in inside} | {"stages": stages}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were not stopped, by way; each is carried out when first needed."""
    out = tmp_path_factory.mktemp("whole")
    done: dict[str, Path] = {}

    def of(way: str) -> Path:
        if way not in done:
            variant, config = changes(way)
            done[way] = run(tiny.request(out / way, variant, config))
        return done[way]

    return of


# Which run is stopped, and after which of its steps, counted from the start of dense training.
POINTS = {
    "in dense training": ("sr", DENSE - 2),
    "at the end of dense training": ("sr", DENSE),
    "at the end of an epoch": ("sr", DENSE + 4),
    "at the end of sparse learning": ("sr", PRUNE),
    "after the first step of a decay": ("sp", PRUNE + 1),
    "right before the removal": ("sp", PRUNE + 4),
    "when all is zero and the removal due": ("sp", PRUNE + 5),
    "after the removal": ("sp", PRUNE + 6),
    "right before a release": ("sr", PRUNE + 3),
    "right after a release": ("sr", PRUNE + 4),
    "right before replacements are zero": ("sr", PRUNE + 8),
    "when replacements are zero and the removal due": ("sr", PRUNE + 9),
    "in fine-tuning": ("sr", PRUNE + 13),
    "at the very end": ("sr", PRUNE + 16),
    "from scratch, before the decision": ("from scratch", SPARSE - 1),
    "from scratch, right after a release": ("from scratch", SPARSE + 4),
    "base in rounds, when the second removal is due": ("base in rounds", DENSE + 12),
    "base in rounds, between removals": ("base in rounds", DENSE + 15),
    "sp in rounds, when the first removal is due": ("sp in rounds", DENSE + 5),
    "sp in rounds, between two rounds": ("sp in rounds", DENSE + 8),
    "sp in rounds, in the second decay": ("sp in rounds", DENSE + 14),
    "sr in rounds, right after the second decision": ("sr in rounds", DENSE + 12),
    "sr in rounds, right after the last release": ("sr in rounds", DENSE + 28),
    "sr in rounds, after the last removal": ("sr in rounds", DENSE + 34),
    "otov2, in plain training": ("otov2", 3),
    "otov2, right after it chose what to penalise": ("otov2", 5),
    "otov2, right after the first decays started": ("otov2", 20),
    "otov2, with two rounds decaying": ("otov2", 24),
    "otov2, right before a release": ("otov2", 26),
    "otov2, right after a release": ("otov2", 27),
    "otov2, when all is zero and the removal due": ("otov2", 32),
    "otov2, with momentum and second moments": ("otov2 with adam", 21),
}


@pytest.mark.parametrize("way", dict.fromkeys(way for way, _ in POINTS.values()))
@pytest.mark.usefixtures("miniature")
def test_a_run_stopped_and_resumed_ends_in_the_same_bits(tmp_path, whole, way):
    """One run of each way, stopped at all of its points: each has to be gone on from exactly."""
    variant, config = changes(way)
    stops = [stop for of, stop in POINTS.values() if of == way]
    record = tiny.run_with_stops(tiny.request(tmp_path, variant, config), stops)
    tiny.assert_same_bits(record, whole(way))


def test_the_events_of_otov2_are_where_its_points_are(whole):
    with pytest.MonkeyPatch.context() as patch:
        tiny.miniature(patch)
        record = whole("otov2")
    events = torch.load(record.parent / "trace.pt", weights_only=True)["events"]
    assert {e["step"] for e in events if e["kind"] == "decay" and not e["wave"]} == {20, 23}
    assert {e["step"] for e in events if e["kind"] == "release"} == {27}
    assert {e["step"] for e in events if e["kind"] == "prune"} == {25, 28, 32}
    steps = json.loads(record.read_text())["steps"]
    assert (steps["decision"], steps["zero"], steps["removal"]) == (5, 32, 32)


# A hearing at the fourth step reads two batches, so there are two optimizer steps less.
@pytest.mark.usefixtures("miniature")
def test_a_run_with_a_hearing_resumes_before_and_after_it(tmp_path, whole):
    variant, config = changes("sr by hearing")
    stops = [PRUNE + 3, PRUNE + 4, PRUNE + 12]
    record = tiny.run_with_stops(tiny.request(tmp_path, variant, config), stops)
    tiny.assert_same_bits(record, whole("sr by hearing"))


@given(
    way=st.sampled_from(
        ["base", "sp", "sr", "sr at random", "sr in two waves", "sr in rounds", "otov2"]
    ),
    stops=st.sets(st.integers(1, PRUNE + 16), min_size=1, max_size=4),
)
@settings(max_examples=6)
def test_a_run_stopped_at_any_steps_ends_in_the_same_bits(tmp_path_factory, whole, way, stops):
    with pytest.MonkeyPatch.context() as patch:
        tiny.miniature(patch)
        variant, config = changes(way)
        out = tmp_path_factory.mktemp("stopped")
        record = tiny.run_with_stops(tiny.request(out, variant, config), stops)
        tiny.assert_same_bits(record, whole(way))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sp", "sr in two waves", "sr by hearing"])
@pytest.mark.usefixtures("miniature")
def test_a_run_stopped_after_every_single_step_ends_in_the_same_bits(tmp_path, whole, way):
    variant, config = changes(way)
    steps = PRUNE + 16 + (4 if "two waves" in way else 0) - (2 if "hearing" in way else 0)
    request = tiny.request(tmp_path, variant, config)
    record = tiny.run_with_stops(request, range(1, steps + 1))
    tiny.assert_same_bits(record, whole(way))


def framework_steps(folder: Path) -> int:
    saved = load_tensors(folder / "checkpoint.pt", {"kind": "checkpoint"})
    assert saved["part"] == "framework"
    return saved["progress"]["total"]


@pytest.mark.parametrize("again", [DENSE - 2, DENSE], ids=["stopped again", "stopped at its end"])
@pytest.mark.usefixtures("miniature")
def test_a_dense_model_trained_anew_leaves_the_frameworks_progress(tmp_path, whole, again):
    request = tiny.request(tmp_path, "sr", MINIATURE, resume=True)
    with tiny.asked_when(lambda step: step == PRUNE + 2), pytest.raises(Stopped):
        run(request)
    steps = framework_steps(request.folder)
    assert steps == SPARSE + 2
    before = (request.folder / "checkpoint.pt").read_bytes()
    shutil.rmtree(tmp_path / "dense")
    with tiny.asked_when(lambda step: step == again), pytest.raises(Stopped):
        run(request)
    assert (request.folder / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "dense").iterdir())
    # It goes on where it was, in both: what is left of dense training, and of the framework's.
    with tiny.asked_when(lambda step: step == DENSE - again + 3), pytest.raises(Stopped):
        run(request)
    assert framework_steps(request.folder) == steps + 3
    record = run(request)
    assert sorted(p.name for p in request.folder.iterdir()) == [MODEL, "record.json", "trace.pt"]
    tiny.assert_same_bits(record, whole("sr"))


@pytest.mark.usefixtures("miniature")
def test_another_dense_model_is_refused_on_going_on(tmp_path, whole):
    request = tiny.request(tmp_path, "sp", MINIATURE, resume=True)
    with tiny.asked_when(lambda step: step == PRUNE + 2), pytest.raises(Stopped):
        run(request)
    (path,) = (tmp_path / "dense").iterdir()
    content, of = path.read_bytes(), {"kind": "dense model", "name": path.name}
    other = load_tensors(path, of)
    other["classifier.bias"][0] += 1e-6
    save_tensors(path, other, of)
    with pytest.raises(RunError, match=r"started from another dense model.*put the old one back"):
        run(request)
    path.write_bytes(content)
    tiny.assert_same_bits(run(request), whole("sp"))


@pytest.mark.usefixtures("miniature")
def test_a_run_goes_on_with_the_threads_that_it_was_started_with(tmp_path, whole, capsys):
    request = tiny.request(tmp_path, "sr", MINIATURE, resume=True)
    with tiny.asked_when(lambda step: step == PRUNE + 2), pytest.raises(Stopped):
        run(request)
    torch.set_num_threads(2)  # the fixture puts one back
    record = run(request)
    assert "going on with --threads 1, as the run was started" in capsys.readouterr().err
    assert torch.get_num_threads() == json.loads(record.read_text())["threads"] == 1
    tiny.assert_same_bits(record, whole("sr"))


@pytest.mark.usefixtures("miniature")
def test_another_torch_is_reported_and_the_same_one_is_not(tmp_path, capsys):
    request = tiny.request(tmp_path, "sp", MINIATURE, resume=True)
    for _ in range(2):
        with tiny.asked_when(lambda step: step == 2), pytest.raises(Stopped):
            run(request)
    assert capsys.readouterr().err == ""
    path, of = request.folder / "checkpoint.pt", {"kind": "checkpoint"}
    saved = load_tensors(path, of)
    save_tensors(path, {**saved, "made_with": {**saved["made_with"], "torch": "1.0"}}, of)
    run(request)
    assert "started with torch '1.0'" in capsys.readouterr().err


class Crash(Exception):  # noqa: N818  (none that anything expects)
    pass


@pytest.mark.parametrize("step", [DENSE - 1, DENSE + 3, PRUNE + 7])
@pytest.mark.usefixtures("miniature")
def test_a_crash_loses_no_more_than_the_steps_since_the_checkpoint(tmp_path, whole, step):
    def crash(now):
        if now == step:
            raise Crash
        return False

    variant, config = changes("sr")
    with tiny.asked_when(crash), pytest.raises(Crash):
        run(tiny.request(tmp_path, variant, config, save_every=0))
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    progress = torch.load(checkpoint, weights_only=True)["progress"]
    assert progress["total"] == (step if step < DENSE else step - DENSE) - 1
    record = run(tiny.request(tmp_path, variant, config, resume=True))
    tiny.assert_same_bits(record, whole("sr"))


@pytest.mark.usefixtures("miniature")
def test_a_crash_between_dense_training_and_the_framework_loses_no_dense_model(
    tmp_path, whole, monkeypatch
):
    variant, config = changes("sp")

    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_framework_loop", crash)
        with pytest.raises(Crash):
            run(tiny.request(tmp_path, variant, config, save_every=0))
    (dense,) = (tmp_path / "dense").iterdir()
    written = dense.stat().st_mtime_ns
    record = run(tiny.request(tmp_path, variant, config, resume=True))
    assert dense.stat().st_mtime_ns == written
    tiny.assert_same_bits(record, whole("sp"))


@pytest.mark.usefixtures("miniature")
def test_checkpoints_are_as_far_apart_as_asked(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        run_module.checkpoint, "save", lambda request, part, *more, **named: saved.append(part)
    )
    run(tiny.request(tmp_path / "often", "sp", MINIATURE, save_every=0))
    assert saved == ["dense"] * DENSE + ["framework"] * (SPARSE + 16)
    saved.clear()
    run(tiny.request(tmp_path / "rarely", "sp", MINIATURE, save_every=1e6))
    assert saved == []


@pytest.mark.usefixtures("miniature")
def test_the_seconds_of_all_parts_are_counted_together(tmp_path):
    request = tiny.request(tmp_path, "sp", MINIATURE, resume=True)
    with tiny.asked_when(lambda step: step == DENSE + 4), pytest.raises(Stopped):
        run(request)
    path, of = request.folder / "checkpoint.pt", {"kind": "checkpoint"}
    saved = load_tensors(path, of)
    assert 0 < saved["progress"]["seconds"] < 60
    saved["progress"]["seconds"] += 1000
    save_tensors(path, saved, of)
    record = json.loads(run(request).read_text())
    assert 1000 < record["seconds"] < 1060


def test_a_signal_is_a_request_to_stop_and_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stopping.asked_to_stop() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
            # A second signal is not asked again.
            assert signal.getsignal(number) == signal.SIG_DFL
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# ---------------------------------------------------------------------- processes


WAITS = """
import sys, time
from experiments.__main__ import main
from experiments.running.training import Loop
save, left = Loop._save_or_stop, int(sys.argv[1])
def wait(loop):
    global left
    save(loop)
    left -= 1
    if left == 0:
        print("waits", flush=True)
        while not loop.stop():
            time.sleep(0.01)
Loop._save_or_stop = wait
sys.exit(main(sys.argv[2:]))
"""
"""A run that says when it has come to a step, and does not go on until it is asked to stop."""


def start(out: Path, *more: str, until: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own, which waits after so many steps; 0: it does not."""
    command = [forked.python(), "-c", WAITS, str(until), "run", str(tiny.PATH)]
    command += ["--variant", "sr", "--seed", "0", "--out", str(out), "--device", "cpu"]
    command += ["--threads", "1", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT
    )


@pytest.mark.slow
def test_a_process_that_is_killed_and_then_terminated_ends_in_the_same_bits(tmp_path, tiny_runs):
    folder = tmp_path / "tiny" / "digits" / "sr-seed0"
    record, checkpoint = folder / "record.json", folder / "checkpoint.pt"

    process = start(tmp_path, "--save-every", "0", until=random.Random(2).randint(1, 30))
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.exists()
    assert not record.exists()

    # It goes on, and when asked to stop it saves itself and says so.
    written = checkpoint.stat().st_mtime_ns
    process = start(tmp_path, "--save-every", "1e9", "--resume", until=5)
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    assert checkpoint.stat().st_mtime_ns == written
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert printed == ""
    assert errors.strip() == "stopped; the same command with --resume goes on"
    assert checkpoint.stat().st_mtime_ns > written
    assert not record.exists()

    last = start(tmp_path, "--resume")
    printed, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert printed.strip() == str(record)
    tiny.assert_same_bits(record, tiny_runs.paths["sr"])
