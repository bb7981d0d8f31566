"""Every file that is read again is what was written, and belongs where it lies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpm_core.adapters.saved import SavedModelError, read
from experiments.__main__ import main
from experiments.errors import RunError
from experiments.files import vouched
from experiments.record import MODEL
from experiments.running import run as run_module
from experiments.running.compare import compare
from experiments.running.finished import finished
from experiments.running.jobs import Job
from experiments.running.rebuild import load_model
from experiments.running.request import CHECKPOINT
from experiments.running.run import run
from experiments.running.training import DivergedError, Stopped
from experiments.showing import kept, norms, sections, table
from tests.support import records, tiny
from tests.support.damage import damaged
from tests.support.records import of, record, save
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """A stopped run of sp beside a finished one of sr, in a folder to be copied."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, tiny.one_thread():
        tiny.miniature(patch)
        run(tiny.request(out, "sr", MINIATURE))
        with tiny.asked_when(lambda step: step == 8 + 2), pytest.raises(Stopped):
            run(tiny.request(out, "sp", MINIATURE))
    return out


def carried_out(out: Path, variant: str) -> None:
    run(tiny.request(out, variant, MINIATURE, resume=True))


def listed(out: Path) -> None:
    kept.read([out])


def drawn(out: Path) -> None:
    runs = kept.located([out])
    norms.find_norms(runs, [r for _, r in runs])


def rebuilt(out: Path) -> None:
    load_model(tiny.request(out, "sr", MINIATURE).folder / MODEL)


# By kind: which file, and what reads it.
KINDS = {
    "dense model": ("dense/*.pt", lambda out: carried_out(out, "base")),
    "checkpoint": (f"**/sp-seed0/{CHECKPOINT}", lambda out: carried_out(out, "sp")),
    "trace": ("**/trace.pt", drawn),
    "model": (f"**/{MODEL}", rebuilt),
    "record": ("**/record.json", listed),
    "record of a finished run": ("**/record.json", lambda out: carried_out(out, "sr")),
}


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_of_any_kind_is_refused_in_one_line(
    finished_runs, tmp_path_factory, kind, data
):
    pattern, use = KINDS[kind]
    out = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(finished_runs, out)
    (path,) = out.glob(pattern)
    content = path.read_bytes()
    bad = damaged(data, content)
    if kind.startswith("record"):  # its layout does not count
        try:
            if json.loads(bad) == json.loads(content):
                return
        except ValueError:
            pass
    path.write_bytes(bad)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises((RunError, SavedModelError)) as caught:
        use(out)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert "weights_only" not in message
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("name", ["record.json", MODEL, "trace.pt"])
@pytest.mark.parametrize("other", [("sp", 0), ("sr", 1)], ids=["variant", "seed"])
def test_files_of_two_runs_in_each_others_place_are_refused(finished_runs, tmp_path, name, other):
    shutil.copytree(finished_runs, tmp_path / "out")
    one = tiny.request(tmp_path / "out", "sr", MINIATURE, resume=True)
    two = replace(one, variant=other[0], seed=other[1])
    carried_out(one.out, "sp")
    run(two)
    paths = one.folder / name, two.folder / name
    contents = [p.read_bytes() for p in paths]
    for path, other_content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(other_content)
    for request in (one, two):
        if name == "trace.pt":
            with pytest.raises(RunError, match=r"trace\.pt holds no norms .*it is of .*delete it"):
                drawn(request.folder)
        else:
            with pytest.raises(RunError, match=f"{name} is of .*back where"):
                run(request)
    assert [p.read_bytes() for p in paths] == contents[::-1]


def test_a_kept_record_that_was_changed_is_refused_by_its_line(tiny_runs, tmp_path):
    (path,) = kept.keep(kept.read(list(tiny_runs.paths.values())), tmp_path)
    text = path.read_text()
    final = json.loads(text.splitlines()[1])["accuracy"]["final"]
    lines = text.splitlines()
    lines[1] = lines[1].replace(f'"final":{final}', f'"final":{final + 1}')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"line 2, is no record \(its checksum"):
        kept.read([path])


@pytest.mark.parametrize("lost", ["sha256", "images"])
def test_a_record_cannot_lose_its_checksum(tiny_runs, tmp_path, lost):
    content = tiny_runs.record("sp")
    del content[lost]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="its checksum is another one"):
        kept.read([path])


# ---------------------------------------------------------------------- the model of a run


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("what", ["gone", "empty", "cut"])
def test_a_run_whose_model_is_gone_or_damaged_is_not_finished(finished_runs, tmp_path, what):
    shutil.copytree(finished_runs, tmp_path / "out")
    request = tiny.request(tmp_path / "out", "sr", MINIATURE)
    path = request.folder / MODEL
    content, before = path.read_bytes(), tiny.results(request.folder / "record.json")
    assert finished(request)
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if what == "empty" else content[:-1])
    assert not finished(request)
    kept = (request.folder / "record.json").read_bytes()
    with pytest.raises(RunError, match=rf"{MODEL} is gone or damaged; --resume makes both anew"):
        run(request)
    assert (request.folder / "record.json").read_bytes() == kept
    run(replace(request, resume=True))
    assert path.read_bytes() == content  # what is equal has equal bytes
    assert tiny.difference(tiny.results(request.folder / "record.json"), before) is None


@pytest.mark.usefixtures("miniature")
def test_a_model_and_a_trace_say_which_run_they_are_of(finished_runs):
    request = tiny.request(finished_runs, "sr", MINIATURE)
    content = json.loads((request.folder / "record.json").read_text())
    assert content["images"] == tiny.few_digits().digest()
    expected = {"config_hash": request.config.hash(), "variant": "sr", "seed": 0}
    assert read(request.folder / MODEL).facts["run"] == {**expected, "images": content["images"]}


# ---------------------------------------------------------------------- images


@pytest.fixture
def exchanged(miniature, monkeypatch):
    """Put other images under the same name."""

    def exchange(change: int) -> None:
        images = tiny.few_digits()
        images = replace(images, train=images.train.clone())
        images.train[0, 0, 0, 0] += change
        monkeypatch.setattr(run_module.data, "load", lambda name, root, **settings: images)

    return exchange


def test_a_run_does_not_go_on_with_other_images(tmp_path, exchanged):
    request = tiny.request(tmp_path, "sp", MINIATURE, resume=True)
    for step in (2, 2 + 8):  # in dense training, and in the framework's
        with tiny.asked_when(lambda now, step=step: now == step), pytest.raises(Stopped):
            run(request)
        content = (request.folder / CHECKPOINT).read_bytes()
        exchanged(1)
        with pytest.raises(RunError, match=r"started on images that are no longer.*put them back"):
            run(request)
        assert (request.folder / CHECKPOINT).read_bytes() == content
        exchanged(0)
    whole = run(tiny.request(tmp_path / "whole", "sp", MINIATURE))
    tiny.assert_same_bits(run(request), whole)


def test_a_run_on_other_images_is_refused_beside_others_before_any_work(tmp_path, exchanged):
    run(tiny.request(tmp_path, "base", MINIATURE))
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    exchanged(1)
    with pytest.raises(RunError, match=r"base-seed0.*is of other images.*both would be in one"):
        run(tiny.request(tmp_path, "sp", MINIATURE))
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    run(tiny.request(tmp_path / "another", "sp", MINIATURE))
    with pytest.raises(RunError, match="different images under one name") as caught:
        table.markdown(kept.read([tmp_path]))
    assert [v for v in ("base", "sp") if f"{v}, seed 0" not in str(caught.value)] == []
    kept.keep(kept.read([tmp_path / "miniature"]), tmp_path / "kept")
    with pytest.raises(RunError, match="different configurations or data"):
        kept.keep(kept.read([tmp_path / "another"]), tmp_path / "kept")


def test_records_of_earlier_releases_are_read_beside_new_ones(tmp_path):
    old, new = record("base", 0), of(vouched(records.content("sp", 0, images="0123456789abcdef")))
    for one in (old, new):
        save(tmp_path, one)
    assert len(sections.rows(kept.read([tmp_path]))) == 2
    assert len(kept.keep(kept.read([tmp_path]), tmp_path / "kept")) == 1
    assert kept.read([tmp_path / "kept"]) == [old, new]


# ---------------------------------------------------------------------- training that diverges


@pytest.mark.usefixtures("miniature")
@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
@pytest.mark.parametrize("stage", ["dense", "sparse", "prune"])
def test_a_run_that_diverges_leaves_no_record(tmp_path, stage, variant):
    changes = {"name": "wild", **{k: v for k, v in MINIATURE.items() if k != "name"}}
    if stage == "dense":
        changes["dense.learning_rate"] = 1e9
    else:
        stages = {name: dict(table) for name, table in MINIATURE["stages"].items()}
        stages[stage] |= {"learning_rate": 1e9, "optimizer": "sgd"}
        changes["stages"] = stages
    request = tiny.request(tmp_path, variant, changes, save_every=0)
    with pytest.raises(
        DivergedError, match=rf"step \d+ of stage '{stage}'.*learning_rate \(1e\+09\)"
    ):
        run(request)
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob(MODEL))
    assert any((tmp_path / "dense").glob("*.pt")) == (stage != "dense")


@pytest.mark.usefixtures("miniature")
def test_the_command_line_says_that_training_diverged(tmp_path, capsys):
    path = tiny.write(tmp_path / "c.toml", {**MINIATURE, "dense.learning_rate": 1e9})
    command = ["run", str(path), "--variant", "sp", "--seed", "0", "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: training diverged: by step ")
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("miniature")
def test_a_comparison_refuses_a_damaged_record_before_it_starts(finished_runs, tmp_path):
    shutil.copytree(finished_runs, tmp_path / "out")
    request = tiny.request(tmp_path / "out", "sr", MINIATURE)
    (request.folder / "record.json").write_text('{"config_hash": "?"}')
    with pytest.raises(RunError, match=r"record\.json cannot be read"):
        compare([Job(tiny.PATH, request)])
