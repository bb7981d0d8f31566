"""Networks of other people: how they are named, built, hashed and rebuilt, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_core.adapters.saved import read, save_pruned
from experiments.__main__ import main
from experiments.config import ConfigError, load
from experiments.errors import RunError
from experiments.inputs import models
from experiments.inputs.networks import Network, NetworkError, require_logits
from experiments.names import folder_of
from experiments.record import MODEL
from experiments.running import machine
from experiments.running import run as run_module
from experiments.running.rebuild import load_model
from experiments.running.request import Request
from experiments.running.run import run
from experiments.showing import kept, report, results
from tests.support import tiny
from tests.support.tiny import GONE, MINIATURE

SMALL = """
from torch import nn

def small(num_classes, in_channels=3, width=8, norm=True):
    layers = [nn.Conv2d(in_channels, width, 3, padding=1)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(width, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, num_classes))

class Net(nn.Module):
    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.layers = small(num_classes, in_chans)
    def forward(self, x):
        return self.layers(x)

def fixed():
    return small(10, 1)

def odd(num_classes, what):
    if what == "none":
        return None
    if what == "class":
        return Net
    if what == "lazy":
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
    if what == "raises":
        raise KeyError("no such part")
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = small(num_classes, 1)
        def forward(self, x):
            out = self.small(x)
            if what == "in training":
                return (out, out) if self.training else out
            return {"pair": (out, out), "maps": out[:, :, None], "sum": out.sum(1)}[what]
    return Odd()

number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file of networks in the current folder, ``nets/small.py``."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nets" / "small.py"
    path.parent.mkdir()
    path.write_text(SMALL)
    return path


class FakeTimm(types.ModuleType):
    """What of timm is called."""

    def __init__(self):
        super().__init__("timm")
        self.asked = []

    def list_models(self):
        return ["tiny_vit", "tiny_net"]

    def is_model(self, name):
        return name.partition(".")[0] in self.list_models()

    def create_model(self, model_name, **settings):
        self.asked.append((model_name, settings))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, settings["num_classes"]))


@pytest.fixture
def timm(monkeypatch) -> FakeTimm:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm())
    return sys.modules["timm"]


# ---------------------------------------------------------------------- building


def test_a_built_in_name_builds_what_it_always_did():
    built, expected = (
        Network("vgg-digits").build(1, 10, 3),
        models.build("vgg-digits", 1, 10, 3),
    )
    for one, other in zip(built.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_torchvisions_functions_are_called_by_module_and_name():
    network = Network("torchvision.models:resnet18", {"zero_init_residual": True})
    built = network.build(3, 7, seed=0)
    assert type(built) is torchvision.models.ResNet
    assert built.fc.out_features == 7
    assert not built.layer1[0].bn2.weight.any()
    require_logits(network, built, torch.randn(2, 3, 32, 32), 7)


def test_timms_networks_are_built_by_timm(timm):
    network = Network("timm:tiny_vit.some_weights", {"img_size": 32})
    built = network.build(1, 10)
    settings = {"num_classes": 10, "in_chans": 1, "img_size": 32}
    assert timm.asked == [("tiny_vit.some_weights", settings)]
    require_logits(network, built, torch.randn(2, 1, 8, 8), 10)
    with pytest.raises(NetworkError, match=r"timm has no network 'tiny_vat'; .*tiny_vit"):
        Network("timm:tiny_vat").find()


def test_a_network_of_timm_itself():
    pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "depth": 2}
    network = Network("timm:vit_tiny_patch16_224", options)
    built = network.build(1, 10, seed=0)
    assert (built.patch_embed.proj.in_channels, len(built.blocks)) == (1, 2)
    require_logits(network, built, torch.randn(2, 1, 32, 32), 10)


def test_files_and_classes_are_taken_too(file):
    built = Network("nets/small.py:small", {"width": 5}).build(1, 4)
    assert (built[0].in_channels, built[0].out_channels, built[-1].out_features) == (1, 5, 4)
    whole = Network(f"{file}:Net").build(2, 6)
    assert (whole.layers[0].in_channels, whole.layers[-1].out_features) == (2, 6)
    assert Network("nets/small.py:fixed").build(1, 10)[-1].out_features == 10


def test_modules_of_ones_own_are_imported(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parents[1]))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    assert Network("nets.small:small").build(1, 4)[-1].out_features == 4
    monkeypatch.delitem(sys.modules, "nets.small")


# What a function's signature takes, and what it is called with for 2 channels and 5 classes.
CALLED = {
    "num_classes": {"num_classes": 5},
    "in_channels": {"in_channels": 2},
    "in_chans, num_classes": {"in_chans": 2, "num_classes": 5},
    "*, num_classes, in_channels": {"in_channels": 2, "num_classes": 5},
    "": {},
    "classes=3": {},
    "**kwargs": {"num_classes": 5},
    "in_channels, **kwargs": {"in_channels": 2, "num_classes": 5},
    "a, num_classes": {"num_classes": 5, "a": 1},
    "num_classes, **kwargs": {"num_classes": 5, "a": 1},
    "num_classes=7": {"num_classes": 9},
}


@pytest.mark.parametrize("signature", CALLED)
def test_a_function_gets_what_its_signature_takes(signature, tmp_path):
    given = CALLED[signature]
    path = tmp_path / "f.py"
    path.write_text(
        "from torch import nn\nasked = []\n"
        f"def f({signature}):\n    asked.append(dict(locals()))\n    return nn.Linear(1, 1)\n"
    )
    own = {"a": 1} if "a" in given else {"num_classes": 9} if given.get("num_classes") == 9 else {}
    network = Network(f"{path}:f", own)
    network.build(2, 5)
    (asked,) = network.find().__globals__["asked"]
    asked.pop("classes", None)
    asked |= asked.pop("kwargs", {})
    assert asked == given


def test_a_seed_decides_the_weights_and_leaves_all_random_states_alone(tmp_path):
    path = tmp_path / "drawn.py"
    path.write_text(
        "import random, numpy, torch\n"
        "def f():\n"
        "    model = torch.nn.Linear(4, 4)\n"
        "    with torch.no_grad():\n"
        "        model.bias[0], model.bias[1] = random.random(), numpy.random.rand()\n"
        "    return model\n"
    )
    network = Network(f"{path}:f")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    built = [network.build(1, 4, seed).state_dict() for seed in (0, 0, 1)]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert all(torch.equal(built[0][k], built[1][k]) for k in built[0])
    assert all((built[0][k] != built[2][k]).any() for k in built[0])
    assert (built[0]["bias"][:2] != built[2]["bias"][:2]).all()


# ---------------------------------------------------------------------- what is refused

NAMES = {
    "vgg": ["unknown model 'vgg'", "vgg16-bn", "FILE.py:FUNCTION"],
    "": ["model", "visible"],
    "torchvision.models": ["unknown model"],
    "torchvision.models:": ["unknown model"],
    ":resnet18": ["unknown model"],
    "torchvision.models:resnet18.fc": ["unknown model"],
    "torchvision.models:resnet18()": ["unknown model"],
    "some/folder:net": ["unknown model"],
    "os;os:system": ["unknown model"],
    "timm:": ["no name of timm's"],
    "timm:hf_hub:some/thing": ["unknown model"],
    "timm:a/b": ["no name of timm's"],
    "net.py:a-b": ["unknown model"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_no_known_form_is_refused_in_the_configuration(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        load(tiny.write(tmp_path / "c.toml", {"model": name}))
    assert [w for w in NAMES[name] if w not in str(caught.value)] == []


OPTIONS = {
    "options of a built-in network": ({"model_options": {"width": 3}}, "vgg-digits is built in"),
    "no keyword": (
        {"model": "torchvision.models:vgg11", "model_options": {"a-b": 3}},
        "'a-b' can be no keyword",
    ),
    "a hash of no file": ({"model_sha256": "0" * 64}, "it names none"),
    "no hash": ({"model": "nets/small.py:small", "model_sha256": "f" * 63}, "model_sha256"),
    "another file's hash": (
        {"model": "nets/small.py:small", "model_sha256": "f" * 64},
        "nets/small.py has another one",
    ),
    "no such file": ({"model": "nets/large.py:small"}, "cannot be read.*No such file"),
    "a folder": ({"model": "nets.py:small"}, "cannot be read"),
    "nobody's home": ({"model": "~nobody-at-all/n.py:f"}, "give the whole path"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_goes_with_no_network_is_refused_in_the_configuration(file, tmp_path, case):
    changes, words = OPTIONS[case]
    (tmp_path / "nets.py").mkdir()
    with pytest.raises(ConfigError, match=words):
        load(tiny.write(tmp_path / "c.toml", changes))


# Refused by the run, before images are read: its network, its options, and what the error says.
BEFORE = {
    "no such module": ("no_such_package.nets:f", {}, ["no_such_package.nets", "install it"]),
    "a module that fails": ("broken:f", {}, ["broken cannot be imported", "ZeroDivisionError"]),
    "a module that exits": ("leaving:f", {}, ["leaving cannot be imported", "SystemExit"]),
    "a file that fails": ("nets/broken.py:f", {}, ["cannot be imported", "correct the file"]),
    "a file that is no Python": ("nets/text.py:f", {}, ["SyntaxError"]),
    "no such function": (
        "torchvision.models:resnet19",
        {},
        ["'resnet19' is not there", "resnet18"],
    ),
    "no such function in a file": ("nets/small.py:smal", {}, ["'smal' is not there", "small"]),
    "no function": ("nets/small.py:number", {}, ["'number' is no function"]),
    "an unknown argument": (
        "nets/small.py:small",
        {"depth": 3},
        ["unexpected keyword argument 'depth'", "width=8", "model_options"],
    ),
    "a missing argument": ("nets/small.py:odd", {}, ["missing a required argument: 'what'"]),
}
# Refused by the run once it knows the images, before any work.
THEN = {
    "a call that fails": ("odd", {"what": "raises"}, ["cannot be built", "KeyError"]),
    "no network": ("odd", {"what": "none"}, ["gives a NoneType", "torch.nn.Module"]),
    "a class of networks": ("odd", {"what": "class"}, ["gives the class", "torch.nn.Module"]),
    "no shape": ("odd", {"what": "lazy"}, ["'1.weight' has no shape yet"]),
    "a wrong type": ("small", {"width": "x"}, ["cannot be built with", "width='x'"]),
    "two outputs": ("odd", {"what": "pair"}, ["gives a tuple", "logits"]),
    "two outputs in training": ("odd", {"what": "in training"}, ["tuple in training", "aux_"]),
    "maps": ("odd", {"what": "maps"}, ["(2, 10, 1)", "(2, 10) is needed"]),
    "a sum": ("odd", {"what": "sum"}, ["gives (2,)", "(2, 10) is needed"]),
    "other classes": ("small", {"num_classes": 7}, ["gives (2, 7)", "images of 10 classes"]),
    "other channels": ("small", {"in_channels": 3}, ["cannot take images of 1x8x8"]),
}


@pytest.fixture
def broken(file, monkeypatch) -> None:
    """More files, of which none can be imported."""
    monkeypatch.syspath_prepend(str(file.parents[1]))
    (file.parents[1] / "broken.py").write_text("1 / 0")
    (file.parents[1] / "leaving.py").write_text("raise SystemExit(3)")
    (file.parent / "broken.py").write_text("1 / 0")
    (file.parent / "text.py").write_text("this is not\nPython")


@pytest.mark.parametrize("case", BEFORE)
@pytest.mark.usefixtures("one_thread", "broken")
def test_what_cannot_be_imported_or_called_is_refused_before_images_are_read(
    tmp_path, monkeypatch, capsys, case
):
    name, options, words = BEFORE[case]
    monkeypatch.setattr(run_module.data, "load", lambda *_, **__: pytest.fail("images were read"))
    refused(tmp_path, capsys, name, options, words)


@pytest.mark.parametrize("case", THEN)
@pytest.mark.usefixtures("one_thread", "file", "miniature")
def test_what_is_no_network_for_the_images_is_refused_before_any_work(tmp_path, capsys, case):
    function, options, words = THEN[case]
    refused(tmp_path, capsys, f"nets/small.py:{function}", options, words)


def refused(tmp_path, capsys, name, options, words):
    path, out = tmp_path / "c.toml", tmp_path / "out"
    tiny.write(path, {**MINIATURE, "model": name, "model_options": options})
    command = ["run", str(path), "--variant", "sp", "--seed", "0", "--out", str(out)]
    assert main([*command, "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert [w for w in words if w not in printed.err] == []
    assert not out.exists()


# ---------------------------------------------------------------------- hashes and names


def test_kept_records_have_the_hashes_of_their_configurations():
    """Also where releases since have added keys."""
    there = {r.config_hash: r.settings for r in kept.read([results.RECORDS])}
    assert len(there) >= 11
    for hashed, said in there.items():
        assert said.hash() == hashed
        path = results.ROOT / "experiments" / "configs" / f"{said.name}.toml"
        assert load(path).hash() == hashed


# As the releases before this module hashed them.
DENSE_HASHES = {
    "depgraph-digits": "0ef30b4b509057e5",
    "depgraph-resnet20": "49e9c37f88bfc278",
    "depgraph-vgg-slim": "25b91da5855b928a",
    "depgraph-vgg16-quarter": "21ea72d76f62a4ed",
    "gate-decorator-cifar10": "86f98436641115d4",
    "otov2-digits": "9db5c5e9f1dd77b3",
}


@pytest.mark.parametrize("name", DENSE_HASHES)
def test_dense_models_keep_their_hashes(name):
    path = results.ROOT / "experiments" / "configs" / f"{name}.toml"
    assert load(path).dense_hash("x") == DENSE_HASHES[name]


def hashes(path: Path, changes) -> tuple[str, str]:
    config = load(tiny.write(path, changes))
    return config.hash(), config.dense_hash("images")


def test_hashes_change_with_options_and_with_a_files_content(file, tmp_path):
    path = tmp_path / "c.toml"
    named = {"model": "nets/small.py:small"}
    plain = hashes(path, named)
    assert hashes(path, named) == plain
    assert hashes(path, {**named, "model_options": {}}) == plain
    seen = [plain, hashes(path, {**named, "model_options": {"width": 9}})]
    seen += [hashes(path, {"model": "nets/small.py:Net"}), hashes(path, {})]
    file.write_text(f"{SMALL}\n# changed\n")
    seen.append(hashes(path, named))
    for one in zip(*seen, strict=True):
        assert len(set(one)) == len(seen)
    pinned = {**named, "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert hashes(path, pinned) == seen[-1]


def test_a_file_that_changes_under_a_run_is_refused(file, tmp_path):
    network = load(tiny.write(tmp_path / "c.toml", {"model": "nets/small.py:small"})).network
    network.build(1, 10)
    file.write_text(f"{SMALL}\n# changed\n")
    with pytest.raises(NetworkError, match=r"small\.py is another file than this network"):
        network.build(1, 10)


@given(st.text(min_size=1, max_size=300))
@settings(max_examples=50)
def test_no_name_of_a_network_leads_out_of_the_runs_folder(text):
    for name in (f"{text}.py:f", f"timm:{text}", text):
        inside = Path("dense", folder_of(name)).resolve().relative_to(Path("dense").resolve())
        assert len(inside.parts) == 1
        assert len(f"{folder_of(name)}-{'0' * 16}-seed{2**31}.pt".encode()) < 255


# ---------------------------------------------------------------------- a run, and its files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of a network of a file, by the command line: their folder, with the file in it."""
    here = tmp_path_factory.mktemp("finished")
    (here / "nets").mkdir()
    (here / "nets" / "small.py").write_text(SMALL)
    changes = {
        **MINIATURE,
        "model": "nets/small.py:small",
        "model_options": {"width": 10},
        "options": {"speed_up": 1.5, "steps": 8},
    }
    with pytest.MonkeyPatch.context() as patch, tiny.one_thread():
        patch.chdir(here)
        tiny.miniature(patch)
        tiny.write(here / "c.toml", changes)
        for variant in ("base", "sp", "sr"):
            command = ["run", "c.toml", "--variant", variant, "--seed", "0", "--device", "cpu"]
            assert main(command) == 0
    return here


@pytest.fixture
def beside(finished, monkeypatch) -> Path:
    """Where the runs of :func:`finished` were started; gives a run's folder."""
    monkeypatch.chdir(finished)
    (finished / "nets" / "small.py").write_text(SMALL)
    return Path("runs/miniature/digits/sr-seed0")


def test_record_and_model_say_how_the_network_is_built_again(beside):
    record = json.loads((beside / "record.json").read_text())
    sha256 = hashlib.sha256(SMALL.encode()).hexdigest()
    assert record["model"] == record["config"]["model"] == "nets/small.py:small"
    assert record["config"]["model_options"] == {"width": 10}
    assert record["config"]["model_sha256"] == sha256
    facts = read(beside / MODEL).facts
    named = {k: facts[k] for k in ("model", "model_options", "model_sha256")}
    assert named == {
        "model": "nets/small.py:small",
        "model_options": {"width": 10},
        "model_sha256": sha256,
    }
    assert next(iter(record["channels"])) == "0"
    assert record["channels"]["0"][0] == 10


def test_a_dense_model_is_one_file_in_its_folder_whatever_the_networks_name(beside):
    (dense,) = Path("runs/dense").iterdir()
    assert dense.name.startswith("nets-small.py-small-")
    assert Path("nets/small.py").read_text() == SMALL


def test_a_models_code_is_imported_only_if_that_is_allowed(beside, capsys):
    marker = Path("imported")
    loaded = []
    for allow, imported in (
        (["nets/small.py"], True),
        (["*"], True),
        (["timm"], False),
        ([], False),
    ):
        if not imported:
            with pytest.raises(RunError, match=r"allow=\['nets/small\.py'\].*--allow"):
                load_model(beside / MODEL, allow=allow)
        else:
            loaded.append(load_model(beside / MODEL, allow=allow)[0])
    tensors = read(beside / MODEL).tensors
    for model in loaded:
        assert not model.training
        assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
    # Neither is another file of that name.
    Path("nets/small.py").write_text(f"open('{marker}', 'w')\n{SMALL}")
    for allow in ([], ["nets/small.py"]):
        with pytest.raises(RunError, match=r"--allow|another file than"):
            load_model(beside / MODEL, allow=allow)
    assert not marker.exists()
    Path("nets/small.py").unlink()
    with pytest.raises(RunError, match=r"nets/small\.py cannot be read"):
        load_model(beside / MODEL, allow=["*"])


def test_export_asks_before_it_imports(beside, capsys):
    assert main(["export", str(beside / MODEL)]) == 2
    assert "--allow nets/small.py" in capsys.readouterr().err
    assert main(["export", str(beside / MODEL), "--allow", "nets/small.py"]) == 0
    assert (beside / "model.onnx").exists()


FORGED = {
    "no hash": {"model_sha256": None},
    "no form": {"model": "nets/small.py"},
    "another network": {"model": "torchvision.models:resnet18", "model_sha256": None},
    "other options": {"model_options": {"width": 11}},
    "options of no use": {"model_options": {"depth": 11}},
    "a function of another kind": {
        "model": "os:getcwd", "model_sha256": None, "model_options": {}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_facts_that_do_not_go_with_the_tensors_are_refused(beside, tmp_path, case):
    whole, path = read(beside / MODEL), tmp_path / MODEL
    model, _ = load_model(beside / MODEL, allow=["*"])
    facts = {k: v for k, v in (whole.facts | FORGED[case]).items() if v is not None}
    save_pruned(path, model, whole.removal, facts)
    with pytest.raises(RunError) as caught:
        load_model(path, allow=["*"])
    assert "\n" not in str(caught.value)


def test_tables_plots_and_the_report_take_such_a_name(beside, capsys):
    assert main(["table"]) == 0
    assert "depgraph, nets/small.py:small, digits (miniature)" in capsys.readouterr().out
    assert main(["plots"]) == 0
    drawn = capsys.readouterr().out.split()
    assert drawn
    assert all(Path(p).parent == Path("runs/plots") for p in drawn)
    assert main(["report"]) == 0
    page = Path("runs/report.html").read_text()
    assert "nets/small.py:small" in page
    assert report.__name__


@pytest.mark.usefixtures("one_thread", "miniature", "timm")
def test_a_packages_version_is_in_the_record(tmp_path, monkeypatch):
    """And nothing is said of a package for a network that is built in."""
    changes = {**MINIATURE, "model": "torchvision.models:vgg11"}
    config = load(tiny.write(tmp_path / "c.toml", changes))
    assert machine.versions(config)["torchvision"] == metadata.version("torchvision")
    assert "torchvision" not in machine.versions(tiny.config())


@pytest.mark.usefixtures("one_thread", "miniature")
def test_a_configuration_without_dense_training_takes_such_a_network(file, tmp_path):
    changes = {**MINIATURE, "model": f"{file}:Net", "dense": GONE, "options.speed_up": 1.3}
    config = load(tiny.write(tmp_path / "c.toml", changes))
    record = run(Request(config, "sp", 0, out=tmp_path / "out"))
    assert json.loads(record.read_text())["accuracy"]["dense"] is None
    load_model(record.parent / MODEL, allow=[str(file)])


@pytest.mark.usefixtures("one_thread", "miniature")
def test_what_a_network_draws_in_training_is_the_runs_own(tmp_path):
    """Whatever ran before it in the process, and wherever it was stopped."""
    path = tmp_path / "dropping.py"
    path.write_text(
        "from torch import nn\n"
        "def f(num_classes):\n"
        "    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 8, 3)]\n"
        "    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes))\n"
    )
    changes = {**MINIATURE, "model": f"{path}:f"}
    config = load(tiny.write(tmp_path / "c.toml", changes))

    def request(out: str, variant: str = "sr", seed: int = 0) -> Request:
        return Request(config, variant, seed, out=tmp_path / out)

    torch.manual_seed(1)
    whole = run(request("whole"))
    torch.manual_seed(2)
    run(request("other", "base"))  # the dense model is read by the next one
    tiny.assert_same_bits(whole, run(request("other")))
    stopped = tiny.run_with_stops(request("stopped"), [2, 4 + 3, 4 + 8 + 4])
    tiny.assert_same_bits(whole, stopped)
    other = read(run(request("seed", seed=1)).parent / MODEL).tensors
    assert any(
        (v != other[k]).any()
        for k, v in read(whole.parent / MODEL).tensors.items()
        if v.shape == other[k].shape
    )
