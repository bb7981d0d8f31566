"""Make the notebooks from the scripts beside this file: ``python tutorials/make_notebooks.py``.

A script in percent format is split at its ``# %%`` lines. The same script always makes the same
notebook, to the byte: cells are numbered, and no outputs are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent
SCRIPTS = tuple(
    FOLDER / f"{name}.py"
    for name in (
        "core_in_your_own_loop",
        "depgraph",
        "own_pruner",
        "otov2",
        "gate_decorator",
        "in_lightning",
        "in_the_trainer",
    )
)
CODE, MARKDOWN = "# %%", "# %% [markdown]"


class ScriptError(ValueError):
    """A script is not in the percent format. The message says where."""


def cells(script: str) -> list[tuple[str, str]]:
    """A script's cells in order: (``"code"`` or ``"markdown"``, the text).

    Raises:
        ScriptError: it does not begin with a cell, has an empty one or one of another kind, or a
            markdown cell has a line that is no comment.
    """
    found: list[tuple[str, list[str]]] = []
    for number, line in enumerate(script.splitlines(), 1):
        if line in (CODE, MARKDOWN):
            found.append(("markdown" if line == MARKDOWN else "code", []))
        elif line.startswith(CODE) or not found:
            raise ScriptError(f"line {number}, {line!r}: write {CODE!r} or {MARKDOWN!r} here")
        elif found[-1][0] == "code" or not line:
            found[-1][1].append(line)
        elif line == "#" or line.startswith("# "):
            found[-1][1].append(line[2:])
        else:
            raise ScriptError(f"line {number}, {line!r}: in a markdown cell, begin with '# '")
    made = [(kind, "\n".join(lines).strip("\n")) for kind, lines in found]
    for kind, text in made:
        if not text:
            raise ScriptError(f"a {kind} cell is empty; delete it")
    return made


def notebook(script: str) -> str:
    """The notebook of a script, as the text of its file."""
    made = []
    for number, (kind, text) in enumerate(cells(script), 1):
        new = new_markdown_cell if kind == "markdown" else new_code_cell
        made.append(new(text, id=f"cell-{number}"))
    whole = new_notebook(
        cells=made,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    whole.nbformat, whole.nbformat_minor = 4, 5
    nbformat.validate(whole)
    return nbformat.writes(whole, version=nbformat.NO_CONVERT) + "\n"


def main() -> None:
    """Write all notebooks, and print their paths."""
    for script in SCRIPTS:
        path = script.with_suffix(".ipynb")
        text = notebook(script.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8", newline="\n")
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
