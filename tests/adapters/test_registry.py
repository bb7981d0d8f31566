"""The registry: adapters from here by name, and from installed packages by an entry point."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import dpm_core.adapters
from dpm_core.adapters.base import Adapter, AdapterError
from dpm_core.adapters.registry import ADAPTERS, GROUP, load
from tests.docs.test_guide import GUIDE, blocks
from tests.support import forked, tiny
from tests.support.tiny import GONE, ROOT

SHIPPED = (Path(dpm_core.adapters.__file__).parent / "torch_prune.py").read_text(encoding="utf-8")


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Lay a package of one module into a folder on the path, as an installer would."""

    def lay(package: str, entries: dict[str, str], code: str = "") -> None:
        folder = tmp_path / package
        information = folder / f"{package}-0.1.dist-info"
        information.mkdir(parents=True)
        (folder / f"{package}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        (information / "METADATA").write_text(metadata_of(package, "0.1"), encoding="utf-8")
        (information / "entry_points.txt").write_text(points(entries), encoding="utf-8")
        monkeypatch.syspath_prepend(folder)

    before = set(sys.modules)
    yield lay
    for name in set(sys.modules) - before:
        if name.startswith("offered"):
            del sys.modules[name]


def metadata_of(name: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def points(entries: dict[str, str]) -> str:
    return f"[{GROUP}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())


# ---------------------------------------------------------------------- from here


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_name_gives_the_class_that_it_names(name):
    module, attribute = ADAPTERS[name].split(":")
    found = load(name)
    assert (found.__module__, found.__name__) == (module, attribute)
    assert issubclass(found, Adapter)


def test_an_unknown_name_is_refused_naming_those_there_are(offer):
    offer("offered_one", {"zebra": "offered_one:Zebra"}, "raise RuntimeError")
    with pytest.raises(AdapterError) as caught:
        load("depgraf")
    assert "'depgraf'" in str(caught.value)
    assert str(caught.value).endswith(", ".join([*ADAPTERS, "zebra"]))
    assert "offered_one" not in sys.modules


# ---------------------------------------------------------------------- from a package

GOOD = """
    from dpm_core.adapters.torch_prune import TorchPrune

    class Mine(TorchPrune):
        pass
"""
BAD = {
    "missing module": ("offered.missing:Mine", GOOD, "ModuleNotFoundError"),
    "missing attribute": ("offered:Yours", GOOD, "AttributeError.*Yours"),
    "missing upstream": ("offered:Mine", "import no_such_upstream", "no_such_upstream"),
    "broken module": ("offered:Mine", "class Mine(:", "SyntaxError"),
    "failing module": ("offered:Mine", "raise RuntimeError('no licence')", "no licence"),
    "an exit": ("offered:Mine", "raise SystemExit(0)", "SystemExit"),
    "options of another kind": (
        "offered:Mine",
        GOOD + "        Options = dict\n",
        "no dataclass",
    ),
    "an instance as options": (
        "offered:Mine",
        GOOD + "        Options = TorchPrune.Options(0.5)\n",
        "no dataclass",
    ),
    "a method for a property": (
        "offered:Mine",
        GOOD + "        def due(self):\n            return False\n",
        r"due\(\).*@property",
    ),
    "no class": ("offered", GOOD, "derived from dpm_core.adapters.base.Adapter"),
    "another class": (
        "offered:Mine",
        "class Mine: pass",
        "derived from dpm_core.adapters.base.Adapter",
    ),
    "an instance": ("offered:Mine", "Mine = 3", "derived from dpm_core.adapters.base.Adapter"),
    "the protocol itself": (
        "offered:Mine",
        "from dpm_core.adapters.base import Adapter as Mine",
        "does not define Options, check, groups, selection",
    ),
}


def test_an_entry_point_gives_the_class_that_it_names(offer):
    offer("offered", {"mine": "offered:Mine"}, GOOD)
    assert load("mine") is sys.modules["offered"].Mine


@pytest.mark.parametrize("kind", BAD)
def test_one_that_cannot_be_used_is_refused_naming_its_package(offer, kind):
    target, code, said = BAD[kind]
    offer("offered", {"mine": target}, code)
    with pytest.raises(AdapterError, match=rf"'mine' \({target}\).* package offered 0\.1.*{said}"):
        load("mine")
    # And it is in nobody else's way.
    assert load("torch-prune").__name__ == "TorchPrune"


def test_a_built_in_name_is_refused_and_the_other_ones_work(offer):
    offer("offered", {"depgraph": "offered:Mine"}, GOOD)
    with pytest.raises(AdapterError, match=r"'depgraph' is offered more than once.*offered 0\.1"):
        load("depgraph")
    assert "offered" not in sys.modules
    assert load("torch-prune").__name__ == "TorchPrune"


def test_a_name_that_two_packages_offer_is_refused_naming_both(offer):
    offer("offered_one", {"mine": "offered_one:Mine"}, GOOD)
    offer("offered_two", {"mine": "offered_two:Mine", "other": "offered_two:Mine"}, GOOD)
    with pytest.raises(AdapterError, match=r"more than once: .*offered_one 0\.1, .*offered_two"):
        load("mine")
    assert load("other").__name__ == "Mine"


# ---------------------------------------------------------------------- really installed


def wheel(folder: Path, project: dict, module: str) -> Path:
    """What a build of the guide's package would give, without a build tool."""
    name, version = project["name"].replace("-", "_"), project["version"]
    information = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "",
        f"{name}/adapter.py": module,
        f"{information}/METADATA": metadata_of(project["name"], version),
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/entry_points.txt": points(project["entry-points"][GROUP]),
    }
    record = io.StringIO()
    csv.writer(record).writerows([path, "", ""] for path in [*files, f"{information}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**files, f"{information}/RECORD": record.getvalue()}.items():
            archive.writestr(inside, text)
    return path


@pytest.mark.slow
def test_the_guides_package_is_installed_and_a_configuration_runs_it(tmp_path):
    """The shipped file moves to a package of its own as the guide says, and runs in a process."""
    project = next(tomllib.loads(b) for b in blocks(GUIDE, "toml") if "[project]" in b)["project"]
    moved = SHIPPED.replace("from .", "from dpm_core.adapters.")
    assert len(set(moved.splitlines()) - set(SHIPPED.splitlines())) == 2
    made, site = wheel(tmp_path, project, moved), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(made)], check=True)
    assert (site / "my_pruning" / "adapter.py").exists()

    changes = {
        "name": "outside",
        "framework": "my-pruning",
        "dense": GONE,
        "options": {"amount": 0.5},
        "stages": {"prune": {"epochs": 2, "batch": 36, "learning_rate": 0.02}},
    }
    path, out = tiny.write(tmp_path / "outside.toml", changes), tmp_path / "runs"
    command = [forked.python(), "-m", "experiments", "run", str(path), "--variant", "sr"]
    command += ["--seed", "0", "--out", str(out), "--device", "cpu"]

    def run(python_path: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": python_path},
            capture_output=True,
            text=True,
            check=False,
        )

    without = run("")
    assert without.returncode == 2
    assert "there is no adapter 'my-pruning'" in without.stderr
    assert not out.exists()

    done = run(str(site))
    assert done.returncode == 0, done.stderr
    (file,) = out.rglob("record.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["framework"] == "my-pruning"
    assert record["structures"]["pruned"] == (32 + 32 + 64 + 64 + 128 + 128) // 2
    assert record["structures"]["released"] == record["structures"]["refilled"] > 0
    assert record["channels"]["features.0"] == [32, 16]
