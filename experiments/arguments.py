"""What commands are given: counts, seeds, folders and devices, each checked by itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dpm_core.errors import first_line

from .errors import RunError
from .names import LAST_SEED, shown

STOPPED = 130
"""The exit status of what was asked to stop."""
MOST = 10**9
"""The largest count that is taken."""
MOST_THREADS, MOST_SEEDS = 1024, 1000


def count(text: str, most: int = MOST) -> int:
    """A whole number of at least 1."""
    if not _whole(text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no count; give 1 to {most}")
    return int(text)


def threads(text: str) -> int:
    """As many as a machine may run at once."""
    return count(text, MOST_THREADS)


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    if not _whole(text) or int(text) > LAST_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no seed; give 0 to {LAST_SEED}")
    return int(text)


def seeds(text: str) -> list[int]:
    """``0-4`` or ``0,2,5`` as a list."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _whole(first) or (dash and not _whole(last)):
            raise argparse.ArgumentTypeError(
                f"{shown(text)!r} is no list of seeds; give 0-4 or 0,2,5"
            )
        start, end = seed(first), seed(last if dash else first)
        if end < start:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} runs backwards; give 0-4 or 0,2,5")
        if len(numbers) + end - start >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(
                f"{shown(text)!r} is more than {MOST_SEEDS} seeds; give fewer at a time"
            )
        numbers += range(start, end + 1)
    return sorted(set(numbers))


def _whole(text: str) -> bool:
    """Whether text is a whole number of a length that any number here may have."""
    return text.isascii() and text.isdigit() and len(text) < 20


def pause(text: str) -> float:
    """Seconds, 0 or more; ``inf`` for never."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} are no seconds; give 0 or more")
    return seconds


def folder(text: str) -> Path:
    """A path that is not empty: an empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a folder's")
    return Path(text)


def device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.ones(1, device=chosen).add(1).item()  # a device that can compute
    except Exception as cause:  # every kind of device has errors of its own
        why = f"there is no device {name!r} ({first_line(cause)}); give auto, cpu or cuda"
        raise RunError(why) from cause
    return chosen
