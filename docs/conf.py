"""Sphinx: `make docs` builds this folder, the tutorials and the docstrings into docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path

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
html_theme = "furo"
html_title = f"Decay pruning {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the tutorials
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Links of the README and the guide lead into the repository, where those files are read first.
suppress_warnings = ["myst.xref_missing"]
