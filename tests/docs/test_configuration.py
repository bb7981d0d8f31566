"""The reference of configurations: every key is on it, and its example is one."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.depgraph import DepGraphOptions
from experiments.config import CRITERIA, Compute, Config, Curve, Data, Dense, Stage, Timing, load
from experiments.inputs.models import MODELS

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
KEYS = {
    key
    for kind in (Config, Data, Stage, Dense, Curve, Compute, Timing)
    for key in kind.model_fields
} | {
    f.name
    for kind in (DepGraphOptions, SmoothPruning, SelfRectifying, *CRITERIA.values())
    for f in fields(kind)
    if f.init
}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_is_described(key):
    in_example = re.search(rf"^{key} = ", PAGE, re.MULTILINE)
    assert f"`{key}`" in PAGE or f"`[{key}]`" in PAGE or f"[{key}." in PAGE or in_example


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_named(name):
    assert f'`"{name}"`' in PAGE


@pytest.fixture
def examples():
    """The whole configuration, and another table for it."""
    return re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_example_is_a_configuration(tmp_path, examples):
    path = tmp_path / "c.toml"
    path.write_text(examples[0])
    config = load(path)
    assert config.network.code == "timm"
    assert config.data.augmentation == "resized-crop"
    assert config.build_options().reads == 10


def test_the_example_starts_from_a_checkpoint_with_another_table(tmp_path, examples):
    whole, dense = examples
    changed = re.sub(r"^\[dense\]\n.*?\n\n", f"{dense}\n", whole, flags=re.DOTALL | re.MULTILINE)
    path = tmp_path / "c.toml"
    path.write_text(changed)
    config = load(path)
    assert config.dense == Dense(checkpoint="vit-pets.safetensors")
    assert config.stages["prune"].epochs == 30
