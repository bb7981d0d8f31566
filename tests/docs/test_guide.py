"""The guide tells the truth: its code is the shipped adapter's, and what it shows happens."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs"
GUIDE = (FOLDER / "write-an-adapter.md").read_text(encoding="utf-8")
SHIPPED = (ROOT / "adapters" / "torch_prune.py").read_text(encoding="utf-8")
CONFIG = ROOT / "experiments" / "configs" / "torch-prune-digits.toml"


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"no block of {language}"
    return found


def lines(text: str) -> list[str]:
    """All but the empty ones: a guide may break code where the file has no empty line."""
    return [line for line in text.splitlines() if line.strip()]


def difference(guide: str, file: str) -> str | None:
    """The first line in which a guide's code, block after block, is not the file."""
    shown, there = lines("".join(blocks(guide, "python"))), lines(file)
    for number, line in enumerate(there):
        if number >= len(shown):
            return f"not in the guide: {line}"
        if shown[number] != line:
            return f"in the guide {shown[number]!r}, in the file {line!r}"
    return f"not in the file: {shown[len(there)]}" if len(shown) > len(there) else None


def test_the_guides_code_is_the_shipped_file_all_of_it_in_order():
    assert difference(GUIDE, SHIPPED) is None


@pytest.mark.parametrize("number", range(len(blocks(GUIDE, "python"))))
def test_a_block_that_drifts_is_noticed(number):
    block = blocks(GUIDE, "python")[number]
    first = lines(block)[0]
    whole = f"```python\n{block}```\n"
    assert whole in GUIDE
    assert difference(GUIDE.replace(whole, ""), SHIPPED) is not None
    assert difference(GUIDE.replace(whole, whole * 2), SHIPPED) is not None
    assert difference(GUIDE.replace(whole, whole.replace(first, first + "  # new")), SHIPPED)
    assert difference(GUIDE, SHIPPED.replace(block.strip("\n"), "")) is not None


def test_what_it_shows_of_upstream_happens():
    session = "\n".join(blocks(GUIDE, "pycon"))
    parsed = doctest.DocTestParser().get_doctest(session, {}, "guide", None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    result = runner.run(parsed, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted > 10


def test_its_configuration_is_the_shipped_one():
    assert CONFIG.read_text(encoding="utf-8").strip() in [b.strip() for b in blocks(GUIDE, "toml")]


def test_the_lines_it_adds_elsewhere_are_there():
    places = ("adapters/registry.py", "tests/support/frameworks.py")
    for block, place in zip(blocks(GUIDE, "py"), places, strict=True):
        assert block in (ROOT / place).read_text(encoding="utf-8"), place


def test_every_trap_it_refers_to_is_told():
    told = [int(n) for n in re.findall(r"\*\*Trap (\d+):", GUIDE)]
    assert told == list(range(1, len(told) + 1))
    prose = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    for first, last in re.findall(r"\btraps? (\d+)(?: (?:and|to) (\d+))?", prose):
        assert {int(n) for n in (first, last) if n} <= set(told)


def test_the_files_and_commands_it_names_are_there():
    for path in re.findall(r"\]\((?!https?:)([^)]+)\)", GUIDE):
        assert (FOLDER / path).exists(), path
    targets = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in (line for block in blocks(GUIDE, "sh") for line in lines(block)):
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^ +{words[1]} ", targets, re.MULTILINE), command
        else:
            assert words[:2] == ["python", "-m"]
            for word in (w for w in words if "/" in w):
                assert (ROOT / word).exists(), command
