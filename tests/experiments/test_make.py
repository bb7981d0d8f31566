"""The Makefile: a benchmark for every framework, on digits or by the framework's recipe."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from dpm_core.adapters.registry import ADAPTERS
from experiments.config import load
from tests.support.tiny import ROOT


def planned(*words: str) -> list[str]:
    """The command that make would run, as words."""
    # Under make these would let an inner make print its folders.
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "-n", *words, "PY=python", "SETUP="],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout.replace("\\\n", " "))


def configurations(words: list[str]) -> list[str]:
    return [word for word in words if word.endswith(".toml")]


@pytest.mark.parametrize("framework", ADAPTERS)
def test_a_benchmark_is_of_its_framework_whatever_the_data(framework):
    for data in ((), ("DATA=digits",), ("DATA=cifar10",), ("DATA=folder:/pets",)):
        words = planned(f"bench-{framework}", "VARIANT=sr", "SEED=4", *data)
        (path,) = configurations(words)
        config = load(ROOT / path)
        assert config.framework == framework
        recipe = f"experiments/configs/{framework}-cifar10.toml"
        wanted = data not in ((), ("DATA=digits",)) and (ROOT / recipe).exists()
        assert path == (recipe if wanted else f"experiments/configs/{framework}-digits.toml")
        assert words[:4] == ["python", "-m", "experiments", "run"]
        assert words[words.index("--variant") + 1] == "sr"
        assert words[words.index("--seed") + 1] == "4"
        assert "--resume" in words
        assert ("--data" in words) == bool(data)
        if data:
            assert words[words.index("--data") + 1] == data[0].removeprefix("DATA=")


@pytest.mark.parametrize("framework", ADAPTERS)
def test_a_benchmark_runs_in_as_many_processes_as_asked(framework):
    alone = planned(f"bench-{framework}", "SEED=4")
    assert planned(f"bench-{framework}", "SEED=4", "NPROC=1") == alone
    words = planned(f"bench-{framework}", "SEED=4", "NPROC=3")
    at = words.index("experiments")
    launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    assert words[: at + 1] == [*launcher, "-m", "experiments"]
    assert words[at:] == alone[alone.index("experiments") :]


@pytest.mark.parametrize("framework", ADAPTERS)
def test_a_configuration_that_is_given_is_the_one_that_is_run(framework):
    words = planned(f"bench-{framework}", "CONFIG=mine.toml", "DATA=cifar10")
    assert configurations(words) == ["mine.toml"]


def test_the_demo_compares_every_framework_on_digits():
    words = planned("demo", "SEEDS=0-4")
    assert words[:4] == ["python", "-m", "experiments", "compare"]
    configs = [load(ROOT / path) for path in configurations(words)]
    assert sorted(c.framework for c in configs) == sorted(ADAPTERS)
    assert {c.data.name for c in configs} == {"digits"}
    assert words[words.index("--seeds") + 1] == "0-4"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ((), "depgraph-digits"),
        (("FRAMEWORK=otov2", "DATA=digits"), "otov2-digits"),
        (("FRAMEWORK=depgraph-sparse", "DATA=cifar10"), "depgraph-sparse-vgg-slim"),
        (("FRAMEWORK=gate-decorator", "DATA=folder:/my pets (2)"), "gate-decorator-vgg-slim"),
    ],
)
def test_a_comparison_is_of_its_framework_with_the_controls(words, path):
    command = planned("compare", "SEEDS=0-4", *words)
    (config,) = configurations(command)
    assert config == f"experiments/configs/{path}.toml"
    assert (ROOT / config).exists()
    assert command[command.index("--variants") + 1] == "base,sp,sr,random,least-resistant"
    assert command[command.index("--seeds") + 1] == "0-4"
    data = [word.removeprefix("DATA=") for word in words if word.startswith("DATA=")]
    assert [command[command.index("--data") + 1]] == data if data else "--data" not in command


def test_the_table_of_networks_takes_its_own_options():
    words = planned("table-models", "FLAGS=--networks resnet18")
    assert words == ["python", "-m", "experiments", "breadth", "--networks", "resnet18"]


def test_tables_show_the_kept_records_where_nothing_has_run(tmp_path):
    for target in ("table", "report"):
        assert "experiments/records" in planned(target, f"OUT={tmp_path / 'none'}")
        assert "experiments/records" in planned(target, f"OUT={tmp_path}")
    (tmp_path / "record.json").touch()
    for target in ("table", "report"):
        assert "experiments/records" not in planned(target, f"OUT={tmp_path}")
        assert str(tmp_path) in planned(target, f"OUT={tmp_path}")
