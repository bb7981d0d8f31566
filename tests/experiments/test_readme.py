"""README and docs/comparing.md are right: their commands run, and files and targets exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import load
from experiments.showing import kept, results
from tests.support import forked

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARING = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
TINY = ROOT / "tests" / "support" / "tiny.toml"
OVERHEAD = "--models vgg-digits --image-size 8 --channels 1 --batch 4 --repeats 2"


def blocks(language: str) -> list[str]:
    texts = re.findall(rf"```{language}\n(.*?)```", README + COMPARING, re.DOTALL)
    assert texts
    return texts


def commands() -> list[str]:
    listed = [line for block in blocks("sh") for line in block.strip().splitlines()]
    return list(dict.fromkeys(listed))


def small(words: list[str]) -> list[str]:
    """A command with the interpreter of these tests, on the smallest configuration and one seed."""
    first = next(i for i, word in enumerate(words) if word.endswith(".toml"))
    kept = [word for word in words[1:] if not word.endswith(".toml")]
    assert all((ROOT / word).exists() for word in words if word.endswith(".toml"))
    kept.insert(first - 1, str(TINY))
    if "--seeds" in kept:
        kept[kept.index("--seeds") + 1] = "0"
    return [forked.python(), *kept]


def test_commands_are_made_small_whatever_their_configurations_are():
    one, two = (f"experiments/configs/{name}-digits.toml" for name in ("depgraph", "otov2"))
    for given in (f"{one} {two} --seeds 0-2 --jobs 2", f"--seeds 0-2 {one} --jobs 2"):
        command = small(shlex.split(f"python -m experiments compare {given}"))
        assert command[:4] == [forked.python(), "-m", "experiments", "compare"]
        assert sorted(command[4:]) == sorted([str(TINY), "--seeds", "0", "--jobs", "2"])
        assert command[command.index("--seeds") + 1] == "0"


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """In the README's order, each to the letter but for the configurations and the seeds.

    Those are the smallest that there are. `make test` would start this test again, so make only
    says what it would do.
    """
    settings = {"SETUP": "", "OUT": tmp_path / "runs", "SEEDS": "0"}
    for command in commands():
        words = shlex.split(command)
        # One of them by the interpreter itself.
        interpreter = sys.executable if "table" in words else forked.python()
        flags = {**settings, "CONFIG": TINY, "PY": interpreter}
        if "bench-overhead" in words:
            flags["FLAGS"] = OVERHEAD
        if "test" in words:
            words.append("-n")
        if words[0] == "make":
            # On make's command line they override the Makefile's; CONFIG is not the README's.
            words = [w for w in words if not w.startswith("SEEDS=")]
            words += [
                f"{k}={v}" for k, v in flags.items() if f"{k}=" not in command or k == "SEEDS"
            ]
        else:
            assert words[0] == "python"
            words = small(words)
            words += ["--out", str(tmp_path / "runs")]
        # Under make these would let an inner make print its folders, as its last line.
        outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "FLAGS")  # and our FLAGS are for pytest
        clean = {k: v for k, v in os.environ.items() if k not in outer}
        done = subprocess.run(
            words, cwd=ROOT, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if "-n" not in words and "plots" not in words:
            last = done.stdout.strip().splitlines()[-1]
            assert last.endswith((".json", "report.html")), command
            assert Path(last).exists(), command


def test_the_targets_and_files_it_names_exist():
    targets = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in re.findall(r"\bmake ([a-z0-9-]+)", README):
        assert re.search(rf"^ +{target} ", targets, re.MULTILINE), target
    for path in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_results_are_generated_from_the_kept_records(tmp_path):
    records = results.RECORDS
    shutil.copytree(records, tmp_path / records.relative_to(ROOT))
    shutil.copytree(results.TEXTS, tmp_path / results.TEXTS.relative_to(ROOT))
    written = results.renew(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text("utf-8")
    for path in written:
        assert (ROOT / path.relative_to(tmp_path)).exists(), path


def test_the_kept_records_are_of_the_configurations_that_are_shipped():
    configs = {c.name: c for c in map(load, sorted((ROOT / "experiments/configs").glob("*.toml")))}
    for record in kept.read([results.RECORDS]):
        assert record.config_hash == configs[record.name].hash() == record.settings.hash()


def test_the_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    assert "make test" in commands()


def test_its_differences_are_those_of_the_generated_tables():
    text, results = (
        " ".join(t.split()) for t in (README, (ROOT / "RESULTS.md").read_text("utf-8"))
    )
    ours = results.index("## Reading"), results.index("## Runs")
    tables = results[: ours[0]] + results[ours[1] :]
    found = re.findall(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", text)
    assert len(found) > 10
    for difference in found:
        assert difference in tables, difference
