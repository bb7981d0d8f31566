"""One run of each variant: the record, the model on disk, what is shared, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dpm_core.adapters.base import AdapterError, count_macs, count_parameters
from dpm_core.adapters.saved import DamagedError, read, save_pruned
from experiments.__main__ import STOPPED, main
from experiments.errors import RunError
from experiments.files import load_tensors, save_tensors
from experiments.inputs import data
from experiments.inputs.images import Images
from experiments.record import MODEL, VARIANTS, Record
from experiments.record import VERSION as RECORD_VERSION
from experiments.running import run as run_module
from experiments.running import training
from experiments.running.rebuild import load_model
from experiments.running.request import CHECKPOINT, Request
from experiments.running.run import run
from experiments.running.training import Loop, Stopped, accuracy, laid_out, outputs
from experiments.showing import kept, table
from tests.support import rounding, tiny
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = (int, float)
FIELDS = {
    "version": int,
    "config": dict,
    "config_hash": str,
    "framework": str,
    "model": str,
    "data": str,
    "images": str,
    "variant": str,
    "seed": int,
    "dense_seed": int,
    "start": str,
    "versions": {"decay-pruning": str, "python": str, "torch": str, "torch-pruning": str},
    "revision": (str, type(None)),
    "device": str,
    "threads": int,
    "processes": int,
    "accuracy": {
        "dense": float,
        "at_removal": float,
        "at_removal_reestimated": float,
        "final": float,
    },
    "macs": {"dense": int, "pruned": int},
    "parameters": {"dense": int, "pruned": int},
    "structures": {"decayed": int, "released": int, "refilled": int, "pruned": int},
    "output_difference": (float, type(None)),
    "channels": dict,
    "releases": list,
    "curve": list,
    "steps": {
        "total": int,
        "decision": int,
        "zero": int,
        "removal": int,
        "heard": int,
        "dense": int,
    },
    "latency": {"batch": int, "dense": float, "pruned": float},
    "speeds": list,
    "seconds": float,
    "loading": float,
    "sha256": str,
}


def fields_of(variant):
    """A record's fields. In ``base`` structures are never at zero, so there is no masked model."""
    masked = {} if variant == "base" else {"masked": float}
    return {**FIELDS, "latency": {**FIELDS["latency"], **masked}}


def assert_fields(record, fields, where="record"):
    assert record.keys() == fields.keys(), where
    for key, kind in fields.items():
        if isinstance(kind, dict):
            assert_fields(record[key], kind, f"{where}.{key}")
        else:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            assert type(record[key]) in kinds, f"{where}.{key}"


def digits() -> Images:
    return data.load("digits", Path("unused"), train=360)


# ---------------------------------------------------------------------- the record


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_record_has_all_its_fields(tiny_runs, variant):
    record = tiny_runs.record(variant)
    assert_fields(record, fields_of(variant))
    assert (record["variant"], record["seed"], record["version"]) == (variant, 0, RECORD_VERSION)
    assert (record["framework"], record["model"]) == ("depgraph", "vgg-digits")
    assert (record["data"], record["threads"]) == ("digits, 360 training images", 1)
    assert record["versions"]["torch-pruning"] == "1.6.1"
    assert record["seconds"] > 0
    assert record["speeds"] == [{"engine": "torch", **record["latency"]}]
    assert 0 < record["loading"] < 1
    assert sum(n for _, _, n in record["releases"]) == record["structures"]["released"]
    assert all(0 <= value <= 100 for value in record["accuracy"].values())
    names = ["features.0", "features.3", "features.7", "features.10", "features.14", "features.17"]
    assert list(record["channels"]) == [*names, "classifier"]
    assert record["channels"]["classifier"] == [10, 10]
    assert [v[0] for v in record["channels"].values()] == [32, 32, 64, 64, 128, 128, 10]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_record_names_and_holds_its_whole_configuration(tiny_runs, variant):
    record, config = tiny_runs.record(variant), tiny.config()
    assert record["config"] == config.model_dump(mode="json")
    assert record["config_hash"] == config.hash()


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_of_the_model_on_disk(tiny_runs, variant):
    record, images = tiny_runs.record(variant), digits()
    model, _ = load_model(tiny_runs.paths[variant].parent / MODEL)
    example = images.normalize(images.test[:2])
    assert record["macs"]["pruned"] == count_macs(model, example)
    assert record["parameters"]["pruned"] == count_parameters(model)
    assert record["accuracy"]["final"] == accuracy(laid_out(model), images)
    widths = {n: m.weight.shape[0] for n, m in model.named_modules() if n in record["channels"]}
    assert {n: kept for n, (_, kept) in record["channels"].items()} == widths
    removed = [whole - kept for whole, kept in record["channels"].values()]
    assert record["structures"]["pruned"] == sum(removed) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_figures_are_those_of_the_shared_dense_model(tiny_runs, variant):
    record, images = tiny_runs.record(variant), digits()
    request = tiny.request(tiny_runs.out, variant)
    dense = run_module._build(request, images.channels, images.classes)
    (file,) = (tiny_runs.out / "dense").iterdir()
    dense.load_state_dict(torch.load(file, weights_only=True))
    assert record["accuracy"]["dense"] == accuracy(laid_out(dense), images)
    example = images.normalize(images.test[:2])
    assert record["macs"]["dense"] == count_macs(dense, example)
    assert record["parameters"]["dense"] == count_parameters(dense)
    assert record["accuracy"]["dense"] > 30, "the dense model learnt nothing: weak tests"


def test_variants_end_at_equal_macs_parameters_and_steps(tiny_runs):
    records = [tiny_runs.record(v) for v in VARIANTS]
    for keys in (("macs", "pruned"), ("macs", "dense"), ("steps", "total"), ("steps", "decision")):
        assert len({r[keys[0]][keys[1]] for r in records}) == 1, keys
    assert records[0]["accuracy"]["dense"] == records[1]["accuracy"]["dense"]
    assert records[0]["accuracy"]["dense"] == records[2]["accuracy"]["dense"]
    for record in records:
        assert record["macs"]["pruned"] <= record["macs"]["dense"] / 2
        assert record["steps"]["total"] == 2 * (360 // 36)
        assert record["channels"] == records[0]["channels"]


def test_structures_decayed_released_and_refilled_add_up(tiny_runs):
    base, sp, sr = (tiny_runs.record(v)["structures"] for v in VARIANTS)
    assert (base["decayed"], base["released"], base["refilled"]) == (0, 0, 0)
    assert sp["decayed"] == sp["pruned"] == base["pruned"] > 0
    assert (sp["released"], sp["refilled"]) == (0, 0)
    assert sr["decayed"] == sr["pruned"] == base["pruned"]
    assert sr["released"] == sr["refilled"] > 0


def test_the_removal_comes_with_the_decision_or_after_the_decay(tiny_runs):
    steps = {v: tiny_runs.record(v)["steps"] for v in VARIANTS}
    assert [steps[v]["decision"] for v in VARIANTS] == [0, 0, 0]
    # 5 steps of decay; after a release in step 4, 5 steps of decay of the replacements.
    assert [steps[v]["removal"] for v in VARIANTS] == [0, 5, 9]
    assert [steps[v]["zero"] for v in VARIANTS] == [0, 5, 9]
    assert [steps[v]["heard"] for v in VARIANTS] == [0, 0, 0]


def test_the_smaller_model_gives_the_zeroed_ones_outputs(tiny_runs):
    assert tiny_runs.record("base")["output_difference"] is None
    for variant in ("sp", "sr"):
        images = digits()
        model, _ = load_model(tiny_runs.paths[variant].parent / MODEL)
        limit = rounding.of_outputs(model, images.normalize(images.test[:64]))
        off = tiny_runs.record(variant)["output_difference"]
        assert 0 <= off <= rounding.TIMES * limit


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_curve_runs_from_the_decision_to_its_end(tiny_runs, variant):
    record = tiny_runs.record(variant)
    curve = [(step, value) for step, value in record["curve"]]
    removal = record["steps"]["removal"]
    steps = [step for step, _ in curve]
    assert steps == sorted([0, 5, 10, 15, 20] + ([removal] if removal != 5 else []))
    assert all(0 <= value <= 100 for _, value in curve)
    # Of two values at one step the latter is the removal's.
    assert dict(curve)[removal] == record["accuracy"]["at_removal"]
    assert curve[0] == (0, record["accuracy"]["dense"])
    assert curve[-1] == (20, record["accuracy"]["final"])


def test_the_trace_follows_the_norms_to_zero(tiny_runs):
    for variant in ("sp", "sr"):
        saved = torch.load(tiny_runs.paths[variant].parent / "trace.pt", weights_only=True)
        removal = tiny_runs.record(variant)["steps"]["removal"]
        assert [step for step, _ in saved["trace"]] == list(range(1, removal + 1))
        first = [e for e in saved["events"] if e["kind"] == "decay" and e["wave"] == 0]
        released = {
            (e["group"], k)
            for e in saved["events"]
            if e["kind"] == "release"
            for k in e["structures"]
        }
        norms = dict(saved["trace"])
        checked = 0
        for event in first:
            for k, initial in zip(event["structures"], event["norms"], strict=True):
                if (event["group"], k) in released:
                    assert norms[removal][event["group"]][k] > 0
                    continue
                for step in range(1, 6):
                    norm = norms[step][event["group"]][k]
                    assert norm == pytest.approx(initial * (1 - step / 5), rel=1e-4, abs=1e-12)
                checked += 1
        assert checked > 10
        assert bool(released) == (variant == "sr")
    base = torch.load(tiny_runs.paths["base"].parent / "trace.pt", weights_only=True)
    assert base == {"trace": [], "events": []}


def test_a_run_leaves_no_checkpoint_and_nothing_temporary(tiny_runs):
    for variant in VARIANTS:
        files = {p.name for p in tiny_runs.paths[variant].parent.iterdir()}
        assert files == {"record.json", MODEL, "trace.pt"}
    everything = [p.name for p in tiny_runs.out.rglob("*")]
    assert not [name for name in everything if name.endswith(".tmp")]


def test_the_dense_model_is_trained_once_and_read_by_the_other_variants(tiny_runs):
    assert len(tiny_runs.dense_times) == 3
    assert len(set(tiny_runs.dense_times)) == 1


# ---------------------------------------------------------------------- miniature runs


@pytest.fixture
def loops(monkeypatch) -> list[Loop]:
    """The training loops of runs, as they are created."""
    started: list[Loop] = []

    def note(**settings):
        started.append(Loop(**settings))
        return started[-1]

    monkeypatch.setattr(run_module, "Loop", note)
    return started


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("miniature")
def test_the_model_on_disk_gives_the_outputs_of_the_one_trained(tmp_path, loops, variant):
    record = run(tiny.request(tmp_path, variant, MINIATURE))
    dense, trained = loops
    assert dense.adapter is None
    images = tiny.few_digits()
    probe = images.normalize(images.test)
    model, _ = load_model(record.parent / MODEL)
    assert not model.training
    # In one layout, which no file keeps.
    assert torch.equal(outputs(laid_out(model), probe), outputs(laid_out(trained.model), probe))
    state = trained.model.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.usefixtures("miniature")
def test_what_is_there_is_refused_kept_or_thrown_away_as_asked(tmp_path, loops):
    request = tiny.request(tmp_path, "sp", MINIATURE)
    record = run(request)
    written = record.stat().st_mtime_ns
    assert len(loops) == 2

    with pytest.raises(RunError, match="--force"):
        run(request)
    resuming = tiny.request(tmp_path, "sp", MINIATURE, resume=True)
    assert run(resuming) == record
    assert record.stat().st_mtime_ns == written
    assert len(loops) == 2, "a refused or finished run trained"

    first = tiny.results(record)
    assert run(tiny.request(tmp_path, "sp", MINIATURE, force=True)) == record
    assert record.stat().st_mtime_ns > written
    assert len(loops) == 3, "the dense model is shared, also with the next run"
    assert tiny.difference(first, tiny.results(record)) is None


@pytest.mark.usefixtures("miniature")
def test_a_record_of_another_configuration_is_refused_and_kept(tmp_path):
    record = run(tiny.request(tmp_path, "base", MINIATURE))
    content = record.read_bytes()
    changed = {**MINIATURE, "smooth.steps": 6}
    # The remedy names no --force to those who resume, as a comparison does.
    for resume, remedy in ((False, "--force runs anew"), (True, r"delete \S+base-seed0")):
        with pytest.raises(RunError, match=rf"another configuration.*{remedy}.*--out"):
            run(tiny.request(tmp_path, "base", changed, resume=resume))
    assert record.read_bytes() == content
    run(tiny.request(tmp_path, "base", changed, force=True))
    assert record.read_bytes() != content


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"], ids=repr)
def test_a_damaged_record_is_refused_with_the_remedy(tmp_path, content):
    request = tiny.request(tmp_path, "base", MINIATURE, resume=True)
    request.folder.mkdir(parents=True)
    (request.folder / "record.json").write_bytes(content)
    with pytest.raises(RunError, match=r"cannot be read.*delete \S+base-seed0"):
        run(request)
    with pytest.raises(RunError, match=r"cannot be read.*--force"):
        run(replace(request, resume=False))


@pytest.mark.parametrize("variant", ["base", "sr"])
@pytest.mark.usefixtures("miniature")
def test_the_same_run_twice_ends_in_the_same_bits(tmp_path, variant):
    first = run(tiny.request(tmp_path / "a", variant, MINIATURE))
    torch.randn(5)  # whatever the random state was
    second = run(tiny.request(tmp_path / "b", variant, MINIATURE))
    tiny.assert_same_bits(first, second)


OTHERS = {
    "another decay": {"smooth.steps": 6},
    "another framework": {"framework": "otov2", "options": {"target_group_sparsity": 0.2}},
}


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("other", OTHERS)
def test_configurations_share_a_dense_model_that_is_trained_once(tmp_path, loops, other):
    stages = {"prune": MINIATURE["stages"]["prune"]}
    common = {**MINIATURE, "stages": stages}
    first = run(tiny.request(tmp_path, "sp", common))
    (dense,) = (tmp_path / "dense").iterdir()
    written = dense.stat().st_mtime_ns
    second = run(tiny.request(tmp_path, "sp", {**common, "name": "other", **OTHERS[other]}))
    assert [loop.adapter is None for loop in loops] == [True, False, False]
    assert list((tmp_path / "dense").iterdir()) == [dense]
    assert dense.stat().st_mtime_ns == written
    figures = [json.loads(path.read_text())["accuracy"]["dense"] for path in (first, second)]
    assert figures[0] == figures[1]
    assert first != second


@pytest.mark.usefixtures("miniature")
def test_seeds_share_as_many_dense_models_as_the_configuration_says(tmp_path, loops):
    own = json.loads(run(tiny.request(tmp_path / "own", "base", MINIATURE, seed=1)).read_text())
    loops.clear()
    records, finals = [], []
    for seed in (1, 3, 4):
        path = run(tiny.request(tmp_path, "base", {**MINIATURE, "dense.seeds": 2}, seed=seed))
        records.append(json.loads(path.read_text()))
        finals.append(read(path.parent / MODEL).tensors["classifier.bias"])
    assert [r["seed"] for r in records] == [1, 3, 4]
    assert [r["dense_seed"] for r in records] == [1, 1, 0]
    assert [(loop.adapter is None, loop.seed) for loop in loops] == [
        *((True, 1), (False, 1), (False, 3), (True, 0), (False, 4))
    ]
    assert records[0]["accuracy"]["dense"] == records[1]["accuracy"]["dense"]
    starts = [r["start"] for r in (own, *records)]
    assert starts[0] == starts[1] == starts[2] != starts[3]
    assert not torch.equal(finals[0], finals[1]), "the pairs' own seeds order the images"
    # A seed gives the same network in every run.
    names = [sorted(p.name for p in (tmp_path / n / "dense").iterdir()) for n in ("own", "")]
    assert names[0][0] in names[1]
    of_seed = [
        torch.load(tmp_path / n / "dense" / names[0][0], weights_only=True) for n in ("own", "")
    ]
    assert all(torch.equal(v, of_seed[1][k]) for k, v in of_seed[0].items())
    assert own["accuracy"] == records[0]["accuracy"]


@pytest.mark.usefixtures("miniature")
def test_other_test_images_leave_the_dense_model_as_it_is(tmp_path, loops, monkeypatch):
    run(tiny.request(tmp_path, "base", MINIATURE))
    images = tiny.few_digits(test=60)
    monkeypatch.setattr(run_module.data, "load", lambda *_, **__: images)
    run(tiny.request(tmp_path, "base", {**MINIATURE, "data.validation": 60}))
    assert [loop.adapter is None for loop in loops] == [True, False, False]
    images = tiny.few_digits(train=159)
    run(tiny.request(tmp_path, "base", {**MINIATURE, "data.validation": 61}))
    assert [loop.adapter is None for loop in loops][3:] == [True, False]


@pytest.mark.usefixtures("miniature")
def test_seeds_end_in_different_models(tmp_path):
    states = []
    for seed in (0, 1):
        record = run(tiny.request(tmp_path, "sp", MINIATURE, seed=seed))
        states.append(read(record.parent / MODEL).tensors)
    assert not torch.equal(states[0]["classifier.bias"], states[1]["classifier.bias"])
    assert len(list((tmp_path / "dense").iterdir())) == 2


@pytest.mark.usefixtures("miniature")
def test_variants_read_the_same_batches_in_the_same_steps(tmp_path, monkeypatch):
    read: dict[str, list[tuple[int, int, int]]] = {}
    mixed: dict[str, list[tuple[float, int, int, int]]] = {}
    batch, mixing = Images.batch, training.mixing
    for variant in VARIANTS:
        seen, drawn = read.setdefault(variant, []), mixed.setdefault(variant, [])

        def note(images, size, position, seed, seen=seen):
            seen.append((size, position, seed))
            return batch(images, size, position, seed)

        def note_mixing(*args, drawn=drawn):
            drawn.append(args)
            return mixing(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Images, "batch", note)
            patch.setattr(training, "mixing", note_mixing)
            run(tiny.request(tmp_path / variant, variant, MINIATURE))
    assert read["base"] == read["sp"] == read["sr"]
    # Each batch is mixed by draws of its own, the same ones in all variants.
    assert mixed["base"] == mixed["sp"] == mixed["sr"] == [(0.0, *at) for at in read["base"]]
    assert len(read["base"]) == len(set(read["base"])) == 4 + 8 + 16
    # Another seed shares no batch with it.
    monkeypatch.setattr(Images, "batch", lambda *args: (other.add(args[1:]), batch(*args))[1])
    other: set[tuple[int, int, int]] = set()
    run(tiny.request(tmp_path, "base", MINIATURE, seed=1))
    assert len(other) == 4 + 8 + 16
    assert not other & set(read["base"])


@pytest.mark.usefixtures("miniature")
def test_the_curve_ends_where_the_settings_say(tmp_path):
    changes = {**MINIATURE, "curve": {"every": 3, "until": 8}}
    record = json.loads(run(tiny.request(tmp_path, "sp", changes)).read_text())
    # The decision falls at the beginning of the stage, the removal 5 steps later.
    assert [step for step, _ in record["curve"]] == [0, 3, 5, 6]


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("variant", ["sp", "sr"])
@pytest.mark.parametrize(("steps", "points", "apart"), [(10, 3, 3), (7, 3, 2), (5, 40, 1)])
def test_the_trace_of_a_long_decay_is_thinned_and_holds_every_events_step(
    tmp_path, monkeypatch, variant, steps, points, apart
):
    monkeypatch.setattr(training, "POINTS", points)
    stages = {name: dict(stage) for name, stage in MINIATURE["stages"].items()}
    stages["prune"]["epochs"] = 6
    changes = {**MINIATURE, "stages": stages, "smooth.steps": steps}
    record = run(tiny.request(tmp_path, variant, changes))
    saved = torch.load(record.parent / "trace.pt", weights_only=True)
    traced = [step for step, _ in saved["trace"]]
    events = {e["step"] for e in saved["events"]}
    assert len(events) == (2 if variant == "sp" else 4)
    at = json.loads(record.read_text())["steps"]
    decay = at["removal"] - at["decision"]
    # Nothing but the events was thinned: the start, at 0, is in the events themselves.
    assert traced == sorted((events - {0}) | set(range(apart, decay + 1, apart)))
    assert sum(step <= steps for step in traced) >= min(points, steps)


# ---------------------------------------------------------------------- from scratch

SCRATCH = {**MINIATURE, "dense": tiny.GONE}
"""A framework that trains once, from untrained to pruned."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("miniature")
def test_without_dense_training_a_run_starts_untrained(tmp_path, loops, variant):
    path = run(tiny.request(tmp_path, variant, SCRATCH))
    record = json.loads(path.read_text())
    untrained = {
        "accuracy": {**FIELDS["accuracy"], "dense": type(None)},
        "dense_seed": type(None),
    }
    assert_fields(record, {**fields_of(variant), **untrained})
    (loop,) = loops
    assert loop.progress.total == record["steps"]["total"] == 8 + 16
    assert not (tmp_path / "dense").exists()
    # The untrained network's size is what the pruned one's is compared with.
    untrained = run_module._build(tiny.request(tmp_path, variant, SCRATCH), 1, 10)
    assert record["parameters"]["dense"] == count_parameters(untrained)
    assert record["parameters"]["pruned"] < record["parameters"]["dense"]
    title, *_ = table.markdown(kept.read([path])).splitlines()
    assert title == "depgraph, miniature, digits (miniature); from scratch, 24 steps"


@pytest.mark.usefixtures("miniature")
def test_variants_without_dense_training_start_from_the_same_weights(tmp_path, monkeypatch):
    starts = []
    begin = training.Loop.run

    def note(loop):
        starts.append({k: v.clone() for k, v in loop.model.state_dict().items()})
        begin(loop)

    monkeypatch.setattr(training.Loop, "run", note)
    runs = [(variant, 0) for variant in VARIANTS] + [("base", 1)]
    records = [
        Record.from_json(run(tiny.request(tmp_path, variant, SCRATCH, seed=seed)).read_text())
        for variant, seed in runs
    ]
    assert [r.start == records[0].start for r in records] == [True, True, True, False]
    assert tiny.difference(starts[0], starts[1]) is None
    assert tiny.difference(starts[0], starts[2]) is None
    assert tiny.difference(starts[0], starts[3]) is not None


HEARING = {
    **MINIATURE,
    "rectify": {"criterion": "hearing", "threshold": -1.0, "batches": 2, "max_share": 0.3},
}


@pytest.mark.usefixtures("miniature")
def test_what_a_hearing_reads_counts_as_training_steps(tmp_path):
    records = [
        json.loads(run(tiny.request(tmp_path, v, HEARING)).read_text()) for v in ("sp", "sr")
    ]
    assert [r["steps"]["heard"] for r in records] == [0, 2]
    assert records[0]["steps"]["total"] == records[1]["steps"]["total"] == 24
    assert records[1]["structures"]["released"] > 0


RANKED = {**MINIATURE, "options": {"speed_up": 1.5, "steps": 8, "round_to": 2, "batches": 3}}


@pytest.mark.parametrize("importance", ["taylor", "hessian", "fpgm", "lamp", "bn-scale"])
@pytest.mark.usefixtures("miniature")
def test_upstreams_rankings_are_settings_and_all_variants_end_alike(tmp_path, importance):
    changes = {**RANKED, "options": {**RANKED["options"], "importance": importance}}
    records = [json.loads(run(tiny.request(tmp_path, v, changes)).read_text()) for v in VARIANTS]
    reads = 3 if importance in ("taylor", "hessian") else 0
    assert [r["steps"]["heard"] for r in records] == [reads] * 3
    assert [r["steps"]["total"] for r in records] == [24] * 3
    assert [r["steps"]["decision"] for r in records] == [8] * 3
    assert records[0]["channels"] == records[1]["channels"] == records[2]["channels"]
    assert all(now % 2 == 0 for _, now in records[0]["channels"].values())
    assert records[0]["macs"]["pruned"] <= records[0]["macs"]["dense"] / 1.5
    assert records[2]["structures"]["released"] > 0


@pytest.mark.parametrize("by_seed", [False, True])
@pytest.mark.usefixtures("miniature")
def test_what_a_framework_draws_is_alike_or_by_seed(tmp_path, by_seed):
    changes = {**SCRATCH, "options.importance": "random", "draw_by_seed": by_seed}
    drawn = []
    for seed in (0, 1):
        path = run(tiny.request(tmp_path, "base", changes, seed=seed))
        drawn.append(list(read(path.parent / MODEL).removal))
    assert (drawn[0] != drawn[1]) == by_seed


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture
def stopped(tmp_path, miniature) -> Request:
    """A run of sp that was stopped in its decay, and is now to go on."""
    request = tiny.request(tmp_path, "sp", MINIATURE)
    with tiny.asked_when(lambda step: step == 4 + 8 + 2), pytest.raises(Stopped):
        run(request)
    assert (request.folder / "checkpoint.pt").exists()
    return tiny.request(tmp_path, "sp", MINIATURE, resume=True)


def test_a_stopped_run_is_not_overwritten_unless_forced(stopped):
    with pytest.raises(RunError, match=r"stopped run.*--resume goes on.*--force starts anew"):
        run(tiny.request(stopped.out, "sp", MINIATURE))
    assert (stopped.folder / "checkpoint.pt").exists()


def test_force_starts_a_stopped_run_anew(stopped, loops):
    run(tiny.request(stopped.out, "sp", MINIATURE, force=True))
    (loop,) = loops
    assert loop.progress.total == 24
    assert not (stopped.folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "change",
    [{"smooth.steps": 6}, {"stages.prune.learning_rate": 0.04}, {"rectify.max_share": 0.2}],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_remedy(stopped, change):
    other = tiny.request(stopped.out, "sp", {**MINIATURE, **flat(change)}, resume=True)
    assert other.folder == stopped.folder
    before = (stopped.folder / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError, match=r"checkpoint\.pt is of another run.*delete it"):
        run(other)
    assert (stopped.folder / "checkpoint.pt").read_bytes() == before
    run(stopped)


def flat(change):
    """MINIATURE replaces the stages whole, so a change inside is made there."""
    (key, value), *_ = change.items()
    if not key.startswith("stages."):
        return change
    _, stage, setting = key.split(".")
    stages = {name: dict(table) for name, table in MINIATURE["stages"].items()}
    stages[stage][setting] = value
    return {"stages": stages}


@pytest.mark.parametrize("other", [("sr", 0), ("sp", 1)], ids=["variant", "seed"])
def test_a_checkpoint_moved_from_another_run_is_refused(stopped, other):
    variant, seed = other
    request = tiny.request(stopped.out, variant, MINIATURE, resume=True, seed=seed)
    request.folder.mkdir(parents=True)
    (stopped.folder / "checkpoint.pt").rename(request.folder / "checkpoint.pt")
    with pytest.raises(RunError, match=r"of another run.*delete it to start anew"):
        run(request)


@pytest.mark.parametrize("version", [-1, 99])
def test_a_checkpoint_of_another_release_is_refused_with_the_remedy(stopped, version):
    path = stopped.folder / CHECKPOINT
    saved = load_tensors(path, {"kind": "checkpoint"})
    save_tensors(path, {**saved, "version": version}, {"kind": "checkpoint"})
    with pytest.raises(RunError, match=r"written by another release; delete it to start anew"):
        run(stopped)


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "flipped", "unsealed", "foreign", "other tensors", "code"]
)
def test_a_damaged_checkpoint_is_refused_with_the_remedy(stopped, damage):
    path, of = stopped.folder / CHECKPOINT, {"kind": "checkpoint"}
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    contents = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "flipped": bytes(flipped),
        "foreign": b"not a checkpoint at all",
    }
    if damage == "other tensors":
        save_tensors(path, {"weight": torch.zeros(3)}, of)
    elif damage == "code":  # with a sound checksum, which anybody can compute
        save_tensors(path, {"version": print}, of)
    elif damage == "unsealed":
        torch.save(load_tensors(path, of), path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(
        RunError, match=r"(?s)checkpoint\.pt cannot be read.*delete it to start anew"
    ) as caught:
        run(stopped)
    # PyTorch's own advice is to load it without weights_only.
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (stopped.folder / "record.json").exists()
    path.write_bytes(content)
    run(stopped)


def test_resuming_what_was_never_started_starts_it(tmp_path, miniature):
    assert run(tiny.request(tmp_path, "base", MINIATURE, resume=True)).exists()


# ---------------------------------------------------------------------- models on disk


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "no facts"])
def test_a_damaged_model_file_is_refused_by_name(tiny_runs, tmp_path, damage):
    path = tmp_path / MODEL
    whole = tiny_runs.paths["sp"].parent / MODEL
    content = whole.read_bytes()
    if damage == "no facts":
        save_pruned(path, load_model(whole)[0], read(whole).removal)
    elif damage != "missing":
        contents = {"empty": b"", "cut": content[:-1000], "foreign": b"hello"}
        path.write_bytes(contents[damage])
    error = RunError if damage in ("missing", "no facts") else DamagedError
    with pytest.raises(error, match=r"model\.safetensors") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_dense_model_is_refused_by_name(tmp_path, miniature):
    record = run(tiny.request(tmp_path, "base", MINIATURE))
    (dense,) = (tmp_path / "dense").iterdir()
    dense.write_bytes(dense.read_bytes()[:100])
    with pytest.raises(RunError) as caught:
        run(tiny.request(tmp_path, "sp", MINIATURE))
    assert str(dense) in str(caught.value)
    assert record.exists()


# ---------------------------------------------------------------------- refusals


@pytest.mark.usefixtures("miniature")
def test_training_that_ends_before_the_removal_is_due_is_refused_before_any_work(tmp_path):
    request = tiny.request(tmp_path / "out", "sr", {**MINIATURE, "smooth.steps": 12})
    with pytest.raises(AdapterError, match=r"takes up to 21 steps.*training has 16"):
        run(request)
    assert not request.out.exists()
    # The decay alone fits.
    assert run(tiny.request(tmp_path / "out", "sp", {**MINIATURE, "smooth.steps": 12})).exists()


@pytest.mark.usefixtures("miniature")
def test_folders_of_data_keep_runs_apart(tmp_path):
    request = tiny.request(tmp_path, "sp", {"data.name": "folder:/data/pets v2"})
    assert request.folder == tmp_path / "tiny" / "folder--data-pets-v2" / "sp-seed0"


def test_image_folders_of_one_name_do_not_share_a_dense_model(tmp_path):
    """Else a run would prune, in silence, a model that was trained on other images."""
    small = {
        "model": "vgg-digits",
        "data.size": 8,
        "data.train": tiny.GONE,
        "dense.batch": 4,
        "stages.prune.batch": 4,
        "stages.prune.epochs": 4,
        "options.speed_up": 1.2,
    }
    out = tmp_path / "out"
    for parent, colour in (("a", 10), ("b", 200)):
        for split in ("train", "test"):
            for c in range(2):
                folder = tmp_path / parent / "pets" / split / f"class{c}"
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.new("L", (8, 8), colour + 20 * c + i).save(folder / f"{i}.png")
        name = f"folder:{tmp_path / parent / 'pets'}"
        run(tiny.request(out, "base", {**small, "data.name": name}))
    assert len(list((out / "dense").iterdir())) == 2


# ---------------------------------------------------------------------- the command line


@pytest.mark.usefixtures("miniature")
def test_the_command_line_prints_the_record_and_says_how_to_go_on(tmp_path, capsys):
    path, out = tiny.write(tmp_path / "c.toml", MINIATURE), tmp_path / "out"
    command = ["run", str(path), "--variant", "sr", "--seed", "0", "--out", str(out)]
    command += ["--device", "cpu"]
    with tiny.asked_when(lambda step: step == 14):
        assert main(command) == STOPPED == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--resume goes on" in printed.err

    assert main(command) == 2
    assert "--resume goes on, --force starts anew" in capsys.readouterr().err

    assert main([*command, "--resume"]) == 0
    record = out / "miniature" / "digits" / "sr-seed0" / "record.json"
    assert capsys.readouterr().out == f"{record}\n"
    assert record.exists()

    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
