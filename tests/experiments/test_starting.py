"""Starting from weights that somebody else has trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpm_core import DecayPruningError
from dpm_core.adapters.base import count_macs, count_parameters
from experiments.__main__ import main
from experiments.config import Config
from experiments.errors import RunError
from experiments.inputs import models
from experiments.inputs.starting import CheckpointError, start_from, weights
from experiments.record import Record
from experiments.running import run as run_module
from experiments.running.rebuild import load_model
from experiments.running.run import run
from experiments.running.training import accuracy
from tests.support import tiny
from tests.support.tiny import GONE, MINIATURE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tiny.miniature(monkeypatch)
    with tiny.one_thread():
        yield


@pytest.fixture
def trained():
    """The weights of a network that no seed gives."""
    model = models.build("miniature", 1, 10, seed=99)
    return {n: t + 0.01 if t.is_floating_point() else t for n, t in model.state_dict().items()}


def start(path: Path, epochs: int = 0, **more):
    changes = {
        **MINIATURE,
        "dense": {"batch": 40, "checkpoint": str(path)},
        "stages.sparse": GONE,
        **more,
    }
    if epochs:
        changes["dense"] |= {"epochs": epochs, "learning_rate": 0.05}
    return changes


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 7},
        lambda s: {"model": {f"module.{n}": t for n, t in s.items()}},
        lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    ],
    ids=["plain", "under state_dict", "in parallel", "compiled"],
)
def test_weights_are_read_as_scripts_save_them(tmp_path, trained, wrap):
    torch.save(wrap(trained), tmp_path / "w.pt")
    found = weights(tmp_path / "w.pt")
    assert list(found) == list(trained)
    assert all(torch.equal(found[n], trained[n]) for n in trained)


def test_a_run_starts_from_a_checkpoint_as_it_is_whatever_its_seed(tmp_path, trained):
    save_file(trained, tmp_path / "w.safetensors")
    changes = start(tmp_path / "w.safetensors")
    paths = [run(tiny.request(tmp_path, "sp", changes, seed=s)) for s in (0, 1)]
    records = [json.loads(p.read_text()) for p in paths]
    assert [r["dense_seed"] for r in records] == [0, 0], "one network: the pairs depend on it"
    assert [r["steps"]["dense"] for r in records] == [0, 0]
    (dense,) = (tmp_path / "dense").glob("*.pt")
    kept = torch.load(dense, weights_only=True)
    assert all(torch.equal(kept[n], trained[n]) for n in trained)


def test_a_checkpoint_is_trained_further_and_names_the_dense_model(tmp_path, trained):
    torch.save(trained, tmp_path / "w.pt")
    run(tiny.request(tmp_path, "base", start(tmp_path / "w.pt", 1)))
    (first,) = (tmp_path / "dense").glob("*.pt")
    kept = torch.load(first, weights_only=True)
    assert not torch.equal(kept["classifier.weight"], trained["classifier.weight"])
    # Other weights under the same name are another dense model.
    torch.save({n: t * 1.5 for n, t in trained.items()}, tmp_path / "v.pt")
    run(tiny.request(tmp_path, "base", start(tmp_path / "v.pt", 1, name="other")))
    assert len(list((tmp_path / "dense").glob("*.pt"))) == 2


class Code:
    """What no reader of weights may run."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def wrong_ones(tmp_path: Path, trained):
    def save(content, name="w.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    less = {n: t for n, t in trained.items() if n != "classifier.bias"}
    wide = {**trained, "classifier.weight": torch.zeros(10, 17)}
    nan = {**trained, "classifier.bias": trained["classifier.bias"] * float("nan")}
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x08\0\0\0\0\0\0\0{}{}{}{}")
    return {
        "gone": (tmp_path / "gone.pt", "cannot be read", "No such file"),
        "a folder": (tmp_path, "cannot be read", "directory"),
        "damaged": (damaged, "cannot be read", "safetensors"),
        "lacking": (save(less, "less.pt"), "lacks classifier.bias"),
        "more": (save({**trained, "head.weight": torch.zeros(1)}, "more.pt"), "head.weight"),
        "wider": (save(wide, "wide.pt"), "classifier.weight is [10, 17], in the model [10, 16]"),
        "infinite": (save(nan, "nan.pt"), "not finite in classifier.bias"),
        "a list": (save([1, 2], "list.pt"), "no state_dict"),
        "a number in it": (save({**trained, "epoch": 3}, "epoch.pt"), "epoch is no tensor"),
        "code": (save({"a": Code()}, "code.pt"), "could be code"),
    }


def test_what_does_not_fit_is_refused_by_name_before_any_work(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, (path, *parts) in wrong_ones(tmp_path, trained).items():
        out = tmp_path / "runs"
        with pytest.raises(DecayPruningError) as caught:
            run(tiny.request(out, "base", start(path)))
        for part in (str(path), *parts):
            assert part in str(caught.value), what
        assert not list(out.rglob("*.pt")), what
    assert not Path("ran").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A configuration of real images in a folder: three colours, 12 of each to train on."""
    monkeypatch.setattr(run_module.data, "load", tiny.load_data)
    numbers = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = numbers.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return {
        "data": {"name": f"folder:{tmp_path / 'images'}", "size": 32},
        "stages": {"prune": {"epochs": 4, "batch": 12, "learning_rate": 0.01}},
    }


def refused_ahead(file: Path):
    """What is wrong with a configuration of a folder, and the words of its refusal."""
    vit = {"model": "timm:test_vit", "dense": GONE}
    return {
        "another checkpoint": ({}, "classifier.weight is [10, 16], in the model [3, 16]"),
        "no checkpoint": ({"dense.checkpoint": str(file) + "x"}, "cannot be read"),
        "a large batch": ({"stages.prune.batch": 37}, "batches of 37, more than the 36"),
        "few images": ({"data.train": 8}, "batches of 12, more than the 8"),
        "fewer images": ({"data.train": 37}, "36 training images, fewer than the 37"),
        "no such option": ({**vit, "model_options": {"a": 1}}, "cannot be built"),
        "tiny images": ({"dense": GONE, "data.size": 1}, "cannot take images of 3x1x1"),
        "layers that cannot be decayed": (vit, "LayerNorm"),
        "a target out of reach": ({"dense": GONE, "options.speed_up": 1e6}, "speed_up"),
    }


@pytest.mark.parametrize("what", refused_ahead(Path()))
def test_what_cannot_be_run_is_refused_before_images_are_decoded(tmp_path, trained, folder, what):
    file = tmp_path / "w.pt"
    torch.save(trained, file)
    changes, message = refused_ahead(file)[what]
    if "timm" in changes.get("model", ""):
        pytest.importorskip("timm")
    out = tmp_path / "runs"
    with pytest.raises(DecayPruningError, match=re.escape(message)):
        run(tiny.request(out, "sp", start(file, **folder, **changes)))
    assert not list(out.rglob("*.images")), "images were decoded, which may take hours"
    assert not list(out.rglob("*.pt"))


@pytest.mark.parametrize("file", ["w.safetensors", pytest.param("w.pt", marks=pytest.mark.slow)])
def test_a_network_of_timms_is_pruned_from_a_checkpoint_on_a_folder_of_images(
    tmp_path, folder, file, capsys
):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    whole = timm.create_model("test_resnet", num_classes=3).state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(whole, tmp_path / file)
    own = {"model": "timm:test_resnet", "model_options": {"drop_rate": 0.1}}
    # The batch of a dense training that there is not is larger than the folder: nobody minds.
    own |= {"dense": {"checkpoint": str(tmp_path / file)}, "options.steps": GONE, "name": "own"}
    path = tiny.write(tmp_path / "c.toml", {**start(tmp_path / file), **folder, **own})
    out = tmp_path / "runs"
    places = ["--out", str(out), "--data-root", str(tmp_path / "data")]
    assert main(["run", str(path), "--variant", "sp", "--seed", "1", *places]) == 0
    record = Record.from_json(Path(capsys.readouterr().out.strip()).read_text())
    (dense,) = (out / "dense").glob("*.pt")
    kept = torch.load(dense, weights_only=True)
    assert all(torch.equal(kept[name], whole[name]) for name in whole)

    (small,) = out.rglob("model.safetensors")
    with pytest.raises(RunError, match="allow"):
        load_model(small)
    model, example = load_model(small, allow=["timm"])
    assert example.shape == (4, 3, 32, 32)
    images = tiny.load_data(folder["data"]["name"], tmp_path / "data", size=32)
    assert accuracy(model, images) == record.accuracy.final
    assert count_parameters(model) == record.parameters.pruned < record.parameters.dense
    assert count_macs(model, example[:1]) == record.macs.pruned < record.macs.dense / 1.4
    assert record.structures.pruned == record.structures.decayed > 0


def test_a_model_that_is_refused_weights_is_as_it_was(tmp_path, trained):
    torch.save({**trained, "classifier.bias": torch.zeros(3)}, tmp_path / "w.pt")
    model = models.build("miniature", 1, 10, seed=0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        start_from(model, tmp_path / "w.pt")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("dense", "says"),
    [
        ({}, "or a checkpoint to start from"),
        ({"learning_rate": 0.1}, "or a checkpoint to start from"),
        ({"epochs": 2}, "learning_rate"),
        ({"epochs": 2, "checkpoint": "w.pt"}, "learning_rate"),
        ({"checkpoint": ""}, "dense.checkpoint"),
    ],
)
def test_a_dense_model_from_nothing_is_refused(dense, says):
    raw = tiny.raw({"dense": dense})
    with pytest.raises(ValueError, match=says):
        Config.model_validate_json(json.dumps(raw), strict=True)
