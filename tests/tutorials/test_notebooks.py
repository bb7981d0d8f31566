"""The notebooks are what the scripts make, and the scripts read as tutorials should."""

from __future__ import annotations

import ast
import json

import nbformat
import pytest

from tutorials import make_notebooks
from tutorials.make_notebooks import FOLDER, SCRIPTS, ScriptError, cells, notebook


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_notebook_is_what_its_script_makes(script):
    there = script.with_suffix(".ipynb").read_bytes().decode()
    assert there == notebook(script.read_text(encoding="utf-8")), (
        "run python tutorials/make_notebooks.py"
    )
    nbformat.validate(json.loads(there))


def test_every_tutorial_is_listed_and_no_notebook_is_left_over():
    helpers = {"__init__", "make_notebooks", "shared"}
    assert {p.stem for p in FOLDER.glob("*.py")} - helpers == {p.stem for p in SCRIPTS}
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {p.stem for p in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_cells_are_all_of_the_script(script):
    text = script.read_text(encoding="utf-8")
    code = "\n".join(body for kind, body in cells(text) if kind == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))
    prose = [line for kind, body in cells(text) if kind == "markdown" for line in body.split("\n")]
    for line in prose:
        assert f"# {line}".rstrip() in text
    headings = [line for line in prose if line.startswith("#")]
    assert headings[0].startswith("# ")
    assert all(line.startswith("## ") for line in headings[1:])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_reads_in_ten_minutes(script):
    """At 240 words of prose, or 30 lines of code, a minute."""
    text = script.read_text(encoding="utf-8")
    words = sum(len(body.split()) for kind, body in cells(text) if kind == "markdown")
    lines = sum(
        1 for kind, body in cells(text) if kind == "code" for line in body.split("\n") if line
    )
    assert words / 240 + lines / 30 < 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_names_its_own_file_and_files_that_are_there(script):
    text = script.read_text(encoding="utf-8")
    assert f"`python tutorials/{script.name}`" in text
    for word in text.split("`")[1::2]:
        if word.endswith(".py") and " " not in word:
            assert (FOLDER / word).exists(), word


def test_a_small_script():
    script = "# %% [markdown]\n# # Title\n#\n# A line.\n\n# %%\nx = 1\n\n\n# %%\nprint(x)\n"
    expected = [("markdown", "# Title\n\nA line."), ("code", "x = 1"), ("code", "print(x)")]
    assert cells(script) == expected
    made = json.loads(notebook(script))
    assert [(c["cell_type"], "".join(c["source"])) for c in made["cells"]] == expected
    assert [c["id"] for c in made["cells"]] == ["cell-1", "cell-2", "cell-3"]
    assert all(c["outputs"] == [] for c in made["cells"] if c["cell_type"] == "code")
    assert notebook(script) == notebook(script)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("x = 1\n", "line 1"),
        ("# %% [raw]\nx = 1\n", "line 1"),
        ("# %%\nx = 1\n# %%title\n", "line 3"),
        ("# %% [markdown]\n# A line.\nx = 1\n", "line 3"),
        ("# %% [markdown]\n#A line.\n", "line 2"),
        ("# %%\n\n# %%\nx = 1\n", "empty"),
    ],
)
def test_what_is_no_percent_format_is_refused(script, said):
    with pytest.raises(ScriptError, match=said):
        cells(script)


def test_main_writes_them_all(tmp_path, monkeypatch, capsys):
    scripts = [tmp_path / "one.py", tmp_path / "two.py"]
    for script in scripts:
        script.write_text(f"# %%\nname = {script.stem!r}\n", encoding="utf-8")
    monkeypatch.setattr(make_notebooks, "SCRIPTS", scripts)
    make_notebooks.main()
    made = [script.with_suffix(".ipynb") for script in scripts]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    for path in made:
        assert f"name = '{path.stem}'" in path.read_text(encoding="utf-8")
