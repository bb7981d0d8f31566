"""mypy with the names that are imported: ``python .ci/typecheck.py``.

The folders ``adapters`` and ``third_party`` are imported as ``dpm_core.adapters`` and
``dpm_core.third_party``. mypy names a module after the place of its file and has no setting for
another name, so it is told here. Its settings are in pyproject.toml; its options can be given, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mypy.build import build
from mypy.errors import CompileError
from mypy.main import process_options
from mypy.modulefinder import BuildSource

INSIDE = ("adapters", "third_party")


def named(source: BuildSource) -> BuildSource:
    """A file by the name that it is imported by."""
    if source.module.split(".")[0] not in INSIDE:
        return source
    return BuildSource(source.path, f"dpm_core.{source.module}", source.text, source.base_dir)


def main() -> int:
    """Check all files, and print what is wrong as mypy does."""
    os.chdir(Path(__file__).parents[1])
    sources, options = process_options(sys.argv[1:])
    try:
        lines = build([named(source) for source in sources], options).errors
    except CompileError as error:  # mypy cannot go on, as after a syntax error
        lines = error.messages
    errors = sum(": error: " in line for line in lines)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.write(f"{errors or 'no'} errors of type in {len(sources)} files\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
