"""Atomic writing: a file is the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write through a temporary file beside the target, flushed to disk before it takes its name.

    Args:
        path: the target; missing folders are made.
        fill: writes the content to an open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # Temporary files are private; this one takes the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_json(path: Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write(path, lambda file: file.write(text.encode()))


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors and plain values, atomically; read with ``torch.load(weights_only=True)``."""
    write(path, lambda file: torch.save(content, file))
