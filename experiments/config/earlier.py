"""Keys that earlier releases did not know, so that hashes of what they could say stay theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATER: tuple[tuple[str, str, Any], ...] = (
    ("dense", "seeds", None),
    ("dense", "checkpoint", None),
    ("smooth", "shape", "linear"),
    ("", "model_options", {}),
    ("", "model_sha256", None),
    ("", "draw_by_seed", False),
    ("data", "augmentation", "shift"),
    ("rectify", "gate", None),
    ("", "latency", {"batches": [1, 128], "onnxruntime": True}),
)
"""Keys that earlier releases did not know: their table, and the value that they have unless given.

Hashes go without those that have it, so that they are the earlier releases'."""


def as_before(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's plain values without the keys of :data:`LATER` that say nothing new."""
    left = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for name, key, default in LATER:
        table = left.get(name) if name else left
        if table and key in table and table[key] == default:
            del table[key]
    return left
