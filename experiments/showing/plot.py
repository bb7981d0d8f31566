"""The plots of some runs, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..files import write
from ..names import slug
from .figures import draw_accuracy, draw_channels, draw_norms
from .kept import Run
from .norms import find_norms
from .sections import sections

PICTURES = ("accuracy", "channels", "norms")


def plot(runs: Sequence[Run], out: Path, kinds: Sequence[str] = PICTURES) -> list[Path]:
    """Draw the plots of some runs as pictures.

    Args:
        runs: each record with the path it was read from; norms are looked for beside it.
        out: the folder for the pictures.
        kinds: which of :data:`PICTURES`.

    Returns:
        The pictures' paths.
    """
    pictures: list[Path] = []
    used: set[str] = set()
    for title, members in sections([record for _, record in runs]):
        first = members[0]
        name = f"{first.name}-{slug(first.data)}"
        if first.processes > 1:
            name += f"-{first.processes}processes"
        while name in used:  # titles differ where names do not
            name += "-more"
        used.add(name)
        if "accuracy" in kinds:
            pictures.append(save(draw_accuracy(members, title), out / f"{name}-accuracy.png"))
        if "channels" in kinds:
            pictures.append(save(draw_channels(members, title), out / f"{name}-channels.png"))
        if "norms" in kinds and (samples := find_norms(runs, members)):
            pictures.append(save(draw_norms(samples, title), out / f"{name}-norms.png"))
    return pictures


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG picture."""
    write(path, lambda file: figure.savefig(file, format="png", dpi=130))
    return path
