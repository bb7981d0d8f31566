"""Atomic writing: a file is the old one or the new one, never half of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adapters.saved import write

__all__ = ["save_json", "save_tensors", "save_text", "write"]


def save_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write(path, lambda file: file.write(text.encode()))


def save_json(path: Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    save_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors and plain values, atomically; read with ``torch.load(weights_only=True)``."""
    write(path, lambda file: torch.save(content, file))
