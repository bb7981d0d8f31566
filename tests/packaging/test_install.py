"""What pip installs has names of its own only, and serves a project that knows no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

from dpm_core.adapters.registry import ADAPTERS
from dpm_core.third_party.upstreams import PINS

ROOT = Path(__file__).parents[2]
# Folders of the repository, and what they are within an installed package.
INSTALLED = {
    "dpm_core": "dpm_core",
    "adapters": "dpm_core/adapters",
    "third_party": "dpm_core/third_party",
}
START, *STARTS = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
)
"""The README's network and batches, and the quick starts that begin with them."""
LAST = [
    "assert model[0].out_channels == 16 and run.removed",
    "assert 10 < model[0].out_channels <= 24 and run.removed",
    "assert module.layer[0].out_features == 32 and callback.run.removed",
    "assert model.bert.encoder.layer[0].intermediate.dense.out_features < 3072 and run.removed",
]
"""What has become of each."""

pytestmark = pytest.mark.slow


def listed() -> list[str]:
    """The repository's files: those that git has, or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({path for path in done.stdout.split("\0") if (ROOT / path).is_file()})


def built(hook: str, checkout: Path, out: Path) -> Path:
    """A wheel as pip would have it built, with this environment's setuptools."""
    there = metadata.version("setuptools")
    assert int(there.split(".")[0]) >= 77, f"setuptools {there} is too old: make setup renews it"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    run([sys.executable, "-c", code], checkout)
    (wheel,) = out.iterdir()
    return wheel


def run(command: list[str | Path], folder: Path) -> str:
    settings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Environment:
    """A new environment that has one wheel of ours, and everything else from this one."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        places = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", places))
        self.python = Path(sysconfig.get_path("scripts", "venv", places)) / "python"
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], folder)
        self.installed = sorted(path.name for path in self.site.iterdir())
        # Folders that a .pth file names are searched last, and .pth files in them are not followed:
        # an editable install of the project in this environment is out of sight.
        there = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (self.site / "shared.pth").write_text("\n".join(there), encoding="utf-8")

    def run(self, code: str, folder: Path) -> str:
        return run([self.python, "-c", code], folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy: a build leaves files behind, and takes in those that an earlier one has left."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in listed():
        if path.endswith((".py", ".toml", ".md", ".typed")) or path == "LICENSE":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return built("build_wheel", checkout, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


def test_the_wheel_has_all_of_three_folders_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    expected = set()
    for path in listed():
        folder, _, rest = path.partition("/")
        if folder in INSTALLED:
            expected.add(f"{INSTALLED[folder]}/{rest}")
    assert {name for name in names if name.split("/")[0] != information} == expected
    assert {f"dpm_core/third_party/{n}" for n in ("upstreams.toml", "NOTICES.md")} < expected
    assert {"dpm_core/py.typed", "dpm_core/third_party/gate_decorator/__init__.py"} < expected


def test_every_extra_of_a_framework_is_offered(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert said["Name"] == project["name"]
    assert set(said.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert {pin["extra"] for pin in PINS.values()} < set(project["optional-dependencies"])
    always = [r for r in said.get_all("Requires-Dist") if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r)[0] for r in always] == ["torch"]


LOADED = """
def loaded(*tops):
    return {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in tops}
"""


def test_the_installed_core_loads_no_framework_and_every_adapter_loads(environment, tmp_path):
    assert [name for name in environment.installed if not name.endswith(".dist-info")] == [
        "dpm_core"
    ]
    code = f"""
import sys
{LOADED}
import dpm_core
assert not loaded("torch_pruning", "only_train_once", "adapters", "third_party")
assert not [n for n in sys.modules if n.startswith(("dpm_core.adapters", "dpm_core.third_party"))]
import dpm_core.adapters.registry as registry
assert not loaded("torch_pruning", "only_train_once")
assert sorted(registry.ADAPTERS) == {sorted(ADAPTERS)}
for name in registry.ADAPTERS:
    assert registry.load(name).__module__.startswith("dpm_core.adapters.")
import dpm_core.third_party.gate_decorator
print(*loaded("dpm_core").values(), sep="\\n")
"""
    files = environment.run(code, tmp_path).splitlines()
    assert len(files) > 20
    assert all(Path(file).is_relative_to(environment.site) for file in files), files


@pytest.mark.parametrize("number", range(len(STARTS)))
def test_the_readmes_quick_starts_run_where_only_the_wheel_is(environment, tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(f"{START}{STARTS[number]}\n{LAST[number]}\n", encoding="utf-8")
    run([environment.python, script], tmp_path)


def test_the_readme_has_four_quick_starts():
    assert len(STARTS) == len(LAST) == 4


def test_a_checkout_runs_its_own_code_whichever_is_installed(checkout, tmp_path):
    """One is installed as editable. Elsewhere that one runs, and in another checkout the other."""
    wheel = built("build_editable", checkout, tmp_path / "dist")
    environment = Environment(tmp_path / "venv", wheel)
    other, empty = tmp_path / "other", tmp_path / "empty"
    for name in (*INSTALLED, "experiments"):
        shutil.copytree(checkout / name, other / name)
    empty.mkdir()
    code = f"""
import importlib, sys
{LOADED}
import dpm_core.adapters.registry, dpm_core.third_party.upstreams
for name in {sorted(set(INSTALLED) - {"dpm_core"})}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        told = str(error)
    assert f"import dpm_core.{{name}}" in told or "No module named" in told, told
files = loaded("dpm_core", "adapters", "third_party").values()
assert len(files) == len(set(files))
print(*files, sep="\\n")
"""
    for folder, owner in ((empty, checkout), (other, other)):
        files = environment.run(code, folder).splitlines()
        assert {Path(file).parent.name for file in files} == set(INSTALLED)
        assert all(Path(file).is_relative_to(owner) for file in files), files
