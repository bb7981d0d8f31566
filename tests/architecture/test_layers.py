"""The house's rules: who imports whom, what lies at the top, what is written in one place."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dpm_core
from dpm_core.adapters.registry import ADAPTERS
from dpm_core.third_party.upstreams import PINS

ROOT = Path(__file__).parents[2]
# Folders, and what they are imported as.
ROOMS = {
    "dpm_core": "dpm_core",
    "adapters": "dpm_core.adapters",
    "third_party": "dpm_core.third_party",
    "experiments": "experiments",
}
MAY_IMPORT = {
    "dpm_core": set(),
    "third_party": {"dpm_core"},
    "adapters": {"dpm_core", "third_party"},
    "experiments": {"adapters", "dpm_core", "third_party"},
}
FOLDERS = {*ROOMS, "tests", "tutorials"}


def imports(file: Path) -> set[str]:
    """Whole names of all that a file imports anywhere, relative imports included."""
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    package = [*ROOMS.get(folder, folder).split("."), *rest][:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = [*above, *([node.module] if node.module else [])]
            found |= {".".join([*origin, alias.name]) for alias in node.names}
    return found


def room(name: str) -> str:
    """The folder of the repository that a name is in, or the top-level package of another one."""
    top, *inside = name.split(".")
    return inside[0] if top == "dpm_core" and inside and inside[0] in FOLDERS else top


def rooms(file: Path) -> set[str]:
    return {room(name) for name in imports(file)}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_go_one_way(folder):
    for file in files(folder):
        above = (rooms(file) & FOLDERS) - MAY_IMPORT[folder] - {folder}
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_imports_within_the_experiments_go_one_way():
    """What all share lies at the top; a folder knows those before it in this order."""
    order = ("inputs", "config", "running", "showing", "measuring")
    assert {p.parent.name for p in (ROOT / "experiments").glob("*/__init__.py")} == set(order)
    for number, folder in enumerate(order):
        for file in files(f"experiments/{folder}"):
            names = {name.split(".")[1] for name in imports(file) if room(name) == "experiments"}
            assert not names & set(order[number + 1 :]), f"{file.relative_to(ROOT)}: {names}"


def test_a_room_is_known_by_every_way_to_import_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "adapters" / "new.py"
    file.parent.mkdir()
    for line, expected in {
        "import dpm_core.third_party.graph": "third_party",
        "import dpm_core.third_party as t": "third_party",
        "from dpm_core import third_party": "third_party",
        "from dpm_core.third_party import graph": "third_party",
        "from .. import third_party": "third_party",
        "from ..third_party.graph import read": "third_party",
        "from dpm_core import Slice": "dpm_core",
        "from ..groups import Slice": "dpm_core",
        "from .base import Adapter": "adapters",
        "from . import base": "adapters",
        "import dpm_core.experiments.run": "experiments",
        "from tests.support import tiny": "tests",
        "import torch.nn": "torch",
    }.items():
        file.write_text(f"def f():\n    {line}\n", encoding="utf-8")
        assert rooms(file) == {expected}, line


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("adapters", "dpm_core.adapters"),
        ("third_party", "dpm_core.third_party"),
        ("dpm_core.experiments", "experiments"),
    ],
)
def test_a_folder_is_imported_by_one_name(name, right):
    """By a second name all its classes would be others than by the first."""
    for module in (name, f"{name}.base"):
        with pytest.raises(ImportError, match=f"^import {right}, not {name}$"):
            importlib.import_module(module)
    assert not [m for m in sys.modules if f"{m}.".startswith(f"{name}.")]
    assert importlib.import_module(right).__file__ == str(
        ROOT / right.split(".")[-1] / "__init__.py"
    )


def test_no_file_is_loaded_twice():
    paths = [getattr(m, "__file__", None) for n, m in sys.modules.items() if n != "__main__"]
    ours = [p for p in paths if p and p.startswith(tuple(f"{ROOT / f}{os.sep}" for f in FOLDERS))]
    assert str(ROOT / "adapters" / "base.py") in ours
    assert len(ours) == len(set(ours))


def test_third_party_knows_of_the_core_no_more_than_its_errors():
    for file in files("third_party"):
        ours = {name for name in imports(file) if room(name) == "dpm_core"}
        assert all(name.startswith("dpm_core.errors.") for name in ours), f"{file.name}: {ours}"


def test_the_core_imports_torch_and_the_standard_library_only():
    for file in files("dpm_core"):
        foreign = rooms(file) - set(sys.stdlib_module_names) - {"torch", "dpm_core"}
        assert not foreign, f"{file.name} imports {foreign}"


def test_the_core_loads_nothing_above_it_and_the_registry_loads_no_framework():
    above = [name for name in ROOMS.values() if name != "dpm_core"]
    above += ["torchvision", "sklearn", "pydantic"]
    upstreams = ["torch_pruning", "only_train_once"]
    code = (
        "import sys, dpm_core\n"
        f"print([m for m in {above + upstreams} if m in sys.modules])\n"
        "import dpm_core.adapters.registry\n"
        f"print([m for m in {upstreams} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["[]", "[]", ""]


def test_upstream_packages_are_touched_in_third_party_alone():
    for folder in ("dpm_core", "adapters", "experiments"):
        for file in files(folder):
            assert not rooms(file) & {"torch_pruning", "only_train_once"}, file


def test_the_top_level_is_what_it_is_said_to_be():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in listed}
    said = {*ROOMS, "tests", "Makefile", "pyproject.toml"}
    usual = {
        "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".gitignore",
        ".ci", "constraints.txt", "RESULTS.md", "docs", "tutorials",
    }  # fmt: skip
    assert top == said | usual


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert metadata.version("decay-pruning") == dpm_core.__version__


@pytest.mark.parametrize("package", PINS)
def test_the_installed_upstream_is_the_pinned_one(package):
    pin = PINS[package]
    assert metadata.version(package) == pin["version"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert f"{package}=={pin['version']}" in extras[pin["extra"]]
    assert pin["adapters"]
    assert set(pin["adapters"]) <= set(ADAPTERS)
    assert pin["licence"]
    assert pin["source"]
    assert package in (ROOT / "third_party" / "NOTICES.md").read_text(encoding="utf-8")


def test_constraints_hold_versions_and_nothing_else():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, sign, version = line.partition("==")
        assert name
        assert sign
        assert version[0].isdigit(), line
        assert "@" not in line
        assert "/" not in line
