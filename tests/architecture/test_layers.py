"""The house's rules: who imports whom, what lies at the top, what is written in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dpm_core
from adapters.registry import ADAPTERS
from third_party.upstreams import PINS

ROOT = Path(__file__).parents[2]
ROOMS = ("dpm_core", "adapters", "third_party", "experiments")
MAY_IMPORT = {
    "dpm_core": set(),
    "third_party": set(),
    "adapters": {"dpm_core", "third_party"},
    "experiments": {"adapters", "dpm_core", "third_party"},
}


def imports(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, with its own room for relative imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.level == 0 else file.parent.name)
    return found


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    for file in files(room):
        above = (imports(file) & {*ROOMS, "tests"}) - MAY_IMPORT[room] - {room}
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_the_core_imports_torch_and_the_standard_library_only():
    for file in files("dpm_core"):
        foreign = imports(file) - set(sys.stdlib_module_names) - {"torch", "dpm_core"}
        assert not foreign, f"{file.name} imports {foreign}"


def test_the_core_loads_nothing_above_it_and_the_registry_loads_no_framework():
    above = ["adapters", "experiments", "third_party", "torchvision", "sklearn", "pydantic"]
    upstreams = ["torch_pruning", "only_train_once"]
    code = (
        "import sys, dpm_core\n"
        f"print([m for m in {above + upstreams} if m in sys.modules])\n"
        "import adapters.registry\n"
        f"print([m for m in {upstreams} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["[]", "[]", ""]


def test_upstream_packages_are_touched_in_third_party_alone():
    for room in ("dpm_core", "adapters", "experiments"):
        for file in files(room):
            assert not imports(file) & {"torch_pruning", "only_train_once"}, file


def test_the_top_level_is_what_it_is_said_to_be():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in listed}
    rooms = {*ROOMS, "tests", "Makefile", "pyproject.toml"}
    usual = {
        "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", ".gitignore",
        ".ci", "constraints.txt", "RESULTS.md", "docs", "tutorials",
    }  # fmt: skip
    assert top == rooms | usual


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
