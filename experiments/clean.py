"""Remove what the project has written: ``python experiments/clean.py --out runs --venv .venv``.

Of a folder of runs and of an environment only what is known to be the project's goes; whatever else
lies there stays, and is named. Needs nothing but Python: the environment may be gone already.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("docs/_build", "docs/tutorials", "docs/jupyter_execute")
CACHES = ("build", "dist", *DOCS, ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")
PACKAGES = ("adapters", "docs", "dpm_core", "experiments", "tests", "third_party", "tutorials")

_RUN = re.compile(r"[^/]+/[^/]+/(base|sp|sr|random|least-resistant)-seed\d+")
_IN_RUN = re.compile(
    r"(record\.json|(dense-)?checkpoint\.pt|model\.(safetensors|onnx|pt2)|trace\.pt|run\.log|\.lock"
    r"|\.forced)"
)
_BESIDE = re.compile(
    r"(dense/[^/]+-[0-9a-f]{16}-seed\d+\.pt|plots/[^/]+-(accuracy|channels|norms)\.png|table\.json"
    r"|report\.html|overhead/overhead\.json)"
)
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


def ours(path: str) -> bool:
    """Whether a file of a folder of runs, by its path in there, is one that the project writes."""
    folder, _, name = path.rpartition("/")
    if written := _TEMPORARY.fullmatch(name):  # left by a process that was killed
        name = written[1]
    if _RUN.fullmatch(folder):
        return _IN_RUN.fullmatch(name) is not None
    return _BESIDE.fullmatch(f"{folder}/{name}".lstrip("/")) is not None


def files(folder: Path, deep: int = 4) -> Iterator[str]:
    """The paths of all files in a folder and below, links to folders among them.

    Args:
        folder: where to look.
        deep: how many levels of folders to enter: a deeper one has no runs in it, and is listed.
    """
    for entry in os.scandir(folder):
        if deep and entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{path}" for path in files(Path(entry.path), deep - 1))
        else:
            yield entry.name


def clean_runs(folder: Path) -> list[str]:
    """Remove all runs from a folder, and the folder itself, if nothing else is in it.

    Args:
        folder: where runs are kept.

    Returns:
        The paths in the folder that stay. All do if there is no run and no dense model among them,
        or if the project or the user's home lies in the folder.
    """
    whole, home = folder.resolve(), Path(os.path.expanduser("~")).resolve()
    if any(whole in (place, *place.parents) for place in (ROOT, home)):
        return os.listdir(folder)
    there = sorted(files(folder))
    mine = [path for path in there if ours(path)]
    # Pages and tables alone may be somebody else's.
    sure = any("/" in path and not path.startswith("plots/") for path in mine)
    if not (sure or whole == ROOT / "runs"):
        return there
    emptied = {folder}
    for path in mine:
        (folder / path).unlink()
        emptied.update(folder / parent for parent in Path(path).parents)
    for place in sorted(emptied, key=lambda p: -len(p.parts)):
        with suppress(OSError):  # something is left in it, or it is a link
            place.rmdir()
    return [path for path in there if path not in set(mine)]


def clean_environment(folder: Path) -> bool:
    """Remove an environment that ``make setup`` has made; returns whether it was one.

    Of a link to one only the link is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return True
    own = folder.resolve() == ROOT / ".venv"
    if not (folder / "pyvenv.cfg").is_file() or not (own or (folder / ".installed").is_file()):
        return False
    shutil.rmtree(folder)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Clean up, and say what stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs", help="a folder of runs")
    parser.add_argument("--venv", default=".venv", help="an environment")
    args = parser.parse_args(arguments)
    try:
        if args.out and os.path.isdir(args.out) and (left := clean_runs(Path(args.out))):
            print(f"{args.out} stays, with what is not the project's: {_some(left)}")
        if args.venv and os.path.lexists(args.venv) and not clean_environment(Path(args.venv)):
            print(f"{args.venv} stays: it is no environment that make setup has made")
        for name in [*CACHES, *(p.name for p in ROOT.glob("*.egg-info"))]:
            shutil.rmtree(ROOT / name, ignore_errors=True)
        for package in PACKAGES:
            for cache in list((ROOT / package).rglob("__pycache__")):
                shutil.rmtree(cache, ignore_errors=True)
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}; nothing more was removed", file=sys.stderr
        )
        return 2
    return 0


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ascii(", ".join(paths[:3]))[1:-1] + more


if __name__ == "__main__":
    sys.exit(main())
