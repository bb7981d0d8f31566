"""``make clean`` removes what the project has written, and nothing else, whatever it is given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import clean
from tests.support.tiny import ROOT

RUN = "depgraph-digits/digits/sp-seed0"
OURS = [
    f"{RUN}/record.json",
    f"{RUN}/model.safetensors",
    f"{RUN}/trace.pt",
    f"{RUN}/run.log",
    f"{RUN}/.lock",
    f"{RUN}/.checkpoint.pt.abc_4567.tmp",
    "depgraph-digits/digits/least-resistant-seed12/checkpoint.pt",
    "dense/vgg-digits-0123456789abcdef-seed0.pt",
    "dense/.vgg-digits-0123456789abcdef-seed0.pt.abcdefgh.tmp",
    "plots/depgraph-digits-digits-norms.png",
    "table.json",
    "report.html",
    "overhead/overhead.json",
]
OTHERS = [
    "thesis.tex",
    "record.json",
    "a/record.json",
    f"{RUN}/notes.txt",
    f"{RUN}/deeper/record.json",
    "depgraph-digits/digits/photos-seed0/record.json",
    "dense/weights.pt",
    "plots/holiday.png",
    "plots/deeper/a-norms.png",
    "report.html.bak",
    ".report.html.tmp",
]


def fill(folder: Path, paths) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def files_in(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()
    )


@pytest.fixture
def project(tmp_path) -> Path:
    """What ``make clean`` needs of the project, in a folder of its own."""
    root = tmp_path / "the project"
    (root / "experiments").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / "experiments" / "clean.py", root / "experiments")
    fill(root, ["README.md", "data/digits.pt", "build/x", "experiments/__pycache__/x.pyc"])
    return root


def make_clean(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "clean", f"PYTHON={sys.executable}", *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "name", ["runs", "my runs", "it's", 'a "b"', "*", "-rf", "a;touch b", "a&b", "x,y", "#1", "ä~"]
)
def test_a_folder_of_runs_goes_and_its_neighbours_stay(project, name):
    fill(project / name, OURS)
    beside = [n for n in ("my", "runs2", "it", "b", "precious") if n != name]
    for neighbour in beside:
        fill(project / neighbour, ["precious.txt", *OURS])
    done = make_clean(project, f"OUT={name}")
    assert done.returncode == 0, done.stderr
    assert not (project / name).exists()
    for neighbour in beside:
        assert files_in(project / neighbour) == sorted(["precious.txt", *OURS])
    assert files_in(project) == sorted(
        [f"{n}/{p}" for n in beside for p in ["precious.txt", *OURS]]
        + ["Makefile", "README.md", "data/digits.pt", "experiments/clean.py"]
    )


@pytest.mark.parametrize("out", [".", "..", "/", "/tmp", "~", "data", "README.md", "none"])
def test_what_is_no_folder_of_runs_stays(project, out):
    fill(project.parent, ["report.html", "table.json", "plots/a-norms.png"])
    place = Path(os.path.join(project, out))
    before = files_in(project.parent), sorted(p.name for p in place.iterdir()) if out == "/" else []
    done = make_clean(project, f"OUT={out}")
    assert done.returncode == 0, done.stderr
    gone = {"the project/build/x", "the project/experiments/__pycache__/x.pyc"}
    assert files_in(project.parent) == [p for p in before[0] if p not in gone]
    if out == "/":
        assert sorted(p.name for p in place.iterdir()) == before[1]


@pytest.mark.parametrize(
    "words", [["OUT="], ["OUT= "], ["VENV="], ["VENV=a b"], ["VENV=*"], ["OUT=a\nb"]], ids=repr
)
def test_what_names_no_folder_is_refused_and_removes_nothing(project, words):
    fill(project / "runs", OURS)
    before = files_in(project)
    done = make_clean(project, *words)
    assert done.returncode == 2
    assert words[0].partition("=")[0] in done.stderr
    assert files_in(project) == before


def test_of_a_folder_of_runs_what_is_not_the_projects_stays_and_is_named(project):
    fill(project / "runs", OURS + OTHERS)
    (project / "elsewhere").mkdir()
    fill(project / "elsewhere", ["precious"])
    os.symlink(project / "elsewhere", project / "runs" / "dense" / "link")
    os.symlink(project / "elsewhere", project / "runs" / "depgraph-digits" / "link")
    done = make_clean(project)
    links = ["dense/link", "depgraph-digits/link"]
    assert files_in(project / "runs") == sorted(OTHERS + links)
    assert (project / "elsewhere" / "precious").exists()
    assert "runs stays" in done.stdout
    assert done.stdout.count("\n") == 2


def test_an_environment_goes_only_where_setup_has_made_it(project):
    own, foreign, linked = project / ".venv", project / "foreign", project / "linked"
    fill(own, ["pyvenv.cfg", "lib/x.py"])
    fill(foreign, ["pyvenv.cfg", "lib/x.py"])
    fill(project / "target", ["pyvenv.cfg", ".installed"])
    os.symlink(project / "target", linked)
    for venv in (".venv", "foreign", "linked", "data", "/"):
        assert make_clean(project, f"VENV={venv}").returncode == 0
    assert not own.exists()
    assert not linked.is_symlink()
    assert files_in(foreign) == ["lib/x.py", "pyvenv.cfg"]
    assert files_in(project / "target") == [".installed", "pyvenv.cfg"]
    assert (project / "data" / "digits.pt").exists()
    (foreign / ".installed").touch()
    assert make_clean(project, "VENV=foreign").returncode == 0
    assert not foreign.exists()


PARTS = st.sampled_from(
    ["a", "dense", "plots", "sp-seed0", "overhead", "record.json", "table.json", ".lock", "x y", ""]
)


@given(st.lists(PARTS, min_size=1, max_size=6).map("/".join))
def test_a_file_is_taken_for_the_projects_only_where_it_puts_such_files(path):
    parts = path.split("/")
    if len(parts) == 1:
        assert clean.ours(path) == (path == "table.json")
    elif clean.ours(path):
        assert len(parts) == 4
        assert parts[2] == "sp-seed0"
        assert parts[3] in ("record.json", ".lock")


def test_every_file_of_a_run_is_known(tiny_runs):
    assert all(clean.ours(p) for p in files_in(tiny_runs.out))
