"""Sphinx: `make docs` builds this folder, the tutorials and the docstrings into docs/_build."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import dpm_core  # noqa: E402

project = "Decay pruning"
author = "The decay-pruning authors"
version = release = dpm_core.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"Decay pruning {release}"
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the tutorials
napoleon_use_ivar = True  # attributes are documented by their class alone
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Links of the README and the guide lead into the repository, where those files are read first.
suppress_warnings = ["myst.xref_missing"]


def mathml(display: str) -> Callable[[HTML5Translator, nodes.Node], None]:
    """Formulas as MathML, which browsers show by themselves: the usual renderer needs a network."""

    def visit(translator: HTML5Translator, node: nodes.Node) -> None:
        formula = convert(node.astext(), display=display)
        if display == "block":  # with room for what reaches below the line, or it can be scrolled
            formula = f'<div style="padding: 0.3em 0">{formula}</div>'
        translator.body.append(formula)
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> None:
    """Known to Sphinx by this name."""
    app.add_html_math_renderer("mathml", (mathml("inline"), None), (mathml("block"), None))
