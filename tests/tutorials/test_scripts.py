"""The tutorials run, each from its source, and leave what they say."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dpm_core.adapters.base import count_macs
from dpm_core.adapters.saved import read
from experiments.inputs import models
from tests.support import forked
from tutorials.make_notebooks import SCRIPTS, cells

ROOT = Path(__file__).parents[2]
PLOTS = {"norms", "channels", "accuracy"}
LEFT = {
    "core_in_your_own_loop": {"norms", "channels"},
    "in_the_trainer": {"norms"},
}
"""The plots, where it is not all of them."""
EXPORTED = ("depgraph", "otov2", "gate_decorator")
NETWORKS = {*EXPORTED, "core_in_your_own_loop", "in_lightning"}
"""Those that leave a file of the small VGG for digits."""
SAID = {
    "core_in_your_own_loop": [
        r"overflow: stepped False, clock 5, the scale is now 512",
        r"refused: the gradient of structure",
        r"pruned (\d+) of \1, decaying 0",
        r"release: [1-9]",
        r"reloaded, with the same outputs: True",
    ],
    "depgraph": [
        r"base: 3\.\d+ times fewer MACs",
        r"\+SR: 3\.\d+ times fewer MACs",
        r"resumed, with the same weights in the end: True",
        r"release: [1-9]",
        r"reloaded, with the same outputs: True",
        r"ONNX: outputs differ",
        r"torch\.export: outputs differ",
    ],
    "own_pruner": [
        r"removed channels of 6 layers, now \[16, 16, 32, 32, 64, 64\]",
        r"release: [1-9]",
        r"reloaded, with the same outputs: True",
    ],
    "in_lightning": [
        r"pruned: \d\d\.\d%, 2\.\d+ times fewer MACs",
        r"resumed in the decay: (\d+) of \1 steps counted",
        r"reloaded, with the same outputs: True",
    ],
    "in_the_trainer": [
        r"left as it is: vit\.",
        r"release: [1-9]",
        r"resumed, with the same weights in the end: True",
        r"reloaded, with the same outputs: True",
    ],
    "otov2": [
        r"refused: target_group_sparsity 0\.999 is impossible",
        r"release: [1-9]",
        r"reloaded, with the same outputs: True",
        r"ONNX: outputs differ",
    ],
    "gate_decorator": [
        r"\d+ selections: ",
        r"release: [1-9]",
        r"reloaded, with the same outputs: True",
        r"ONNX: outputs differ",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_tutorial_runs_and_leaves_what_it_says(script, tmp_path):
    """Whole, as readers run it; its own assertions check what it claims."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": paths}
    done = subprocess.run(
        [forked.python(), script], cwd=tmp_path, env=settings, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for pattern in SAID[script.stem]:
        assert re.search(pattern, done.stdout), f"{pattern!r} is not in {done.stdout}"

    out = tmp_path / "runs" / "tutorials"
    name = script.stem.replace("_", "-").split("-in-")[0]
    drawn = {p.stem.removeprefix(f"{name}-") for p in out.glob("*.png")}
    assert drawn == LEFT.get(script.stem, PLOTS)
    exported = [f"{name}.onnx"] if script.stem in EXPORTED else []
    assert sorted(p.name for p in out.glob("*.onnx")) == exported
    if script.stem not in NETWORKS:
        return
    example, saved = torch.zeros(2, 1, 8, 8), read(out / f"{name}.safetensors")
    dense = models.build("vgg-digits", in_channels=1, classes=10)
    before = count_macs(dense, example)
    assert count_macs(saved.load_into(dense, example), example) < before / 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_what_it_claims_is_asserted(script):
    """A run proves nothing that the script does not check."""
    code = [body for kind, body in cells(script.read_text(encoding="utf-8")) if kind == "code"]
    assert sum(body.count("assert ") for body in code) >= 4
