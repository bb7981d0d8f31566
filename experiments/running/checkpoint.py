"""Checkpoints: all that a run needs to go on in the same bits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dpm_core.errors import first_line

from ..errors import RunError
from ..files import FileError, load_tensors, save_tensors
from .machine import device_name
from .request import CHECKPOINT, Request
from .training import Loop, Progress

VERSION = 6
ANEW = "delete it to start anew"  # not --force: a comparison resumes, and knows none


def save(
    request: Request, part: str, loop: Loop, *, name: str = CHECKPOINT, dense: str | None = None
) -> None:
    """Write a checkpoint; ``dense`` names the dense model that the framework started from."""
    if not request.ranks.first:
        return
    assert loop.optimizer is not None
    save_tensors(
        request.folder / name,
        {
            "version": VERSION,
            "run": _identity(request),
            "images": loop.images.digest(),
            "threads": torch.get_num_threads(),
            "made_with": _computed_with(request),
            "dense": dense,
            "part": part,
            "progress": asdict(loop.progress),
            "model": loop.model.state_dict(),
            "masked": loop.masked.state_dict() if loop.masked is not None else None,
            "masked_removed": None if loop.masked_removed is None else list(loop.masked_removed),
            "optimizer": loop.optimizer.state_dict(),
            "adapter": loop.adapter.state_dict() if loop.adapter is not None else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        {"kind": "checkpoint"},
    )


def _computed_with(request: Request) -> dict[str, str]:
    return {"torch": str(torch.__version__), "device": device_name(request.device)}


def go_on_alike(request: Request, saved: Mapping[str, Any]) -> None:
    """Set what rounding depends on as in a checkpoint, and print what cannot be set."""
    lines = []
    if saved["threads"] != torch.get_num_threads():  # sums are split among threads
        torch.set_num_threads(saved["threads"])
        lines.append(f"going on with --threads {saved['threads']}, as the run was started")
    for name, now in _computed_with(request).items():
        if (before := saved["made_with"][name]) != now:
            started = f"the run was started with {name} {before!r}"
            lines.append(f"{started}: with {now!r} bits may differ")
    if request.ranks.first:
        for line in lines:
            tqdm.write(line, sys.stderr)


def restore(loop: Loop, saved: Mapping[str, Any]) -> None:
    """Bring a loop to the point where :func:`save` saved it."""
    loop.progress = Progress(**saved["progress"])
    adapter = loop.adapter
    if adapter is not None:
        adapter.load_state_dict(saved["adapter"])
        loop.lay_out()
    loop.model.load_state_dict(saved["model"])
    loop.optimizer = loop.new_optimizer()
    loop.optimizer.load_state_dict(saved["optimizer"])
    if adapter is not None:
        adapter.attach(loop.optimizer, loop.next_loss)
    torch.set_rng_state(saved["random"].cpu())
    if saved["random_cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in saved["random_cuda"]])


def load(path: Path, request: Request) -> Mapping[str, Any] | None:
    """The checkpoint to go on from, if there is one and it is this run's."""
    if not path.exists():
        return None
    if not request.resume:
        raise RunError(f"a stopped run is in {path.parent}; --resume goes on, --force starts anew")
    try:
        saved: Mapping[str, Any] = load_tensors(path, {"kind": "checkpoint"}, request.device)
        identity, version = saved["run"], saved["version"]
    except (FileError, KeyError, TypeError) as cause:
        raise RunError(f"{path} cannot be read ({first_line(cause)}); {ANEW}") from cause
    if version != VERSION:
        raise RunError(f"{path} was written by another release; {ANEW}")
    if identity != _identity(request):
        raise RunError(f"{path} is of another run ({identity}, here {_identity(request)}); {ANEW}")
    return saved


def _identity(request: Request) -> dict[str, Any]:
    return {
        "config": request.config.hash(),
        "variant": request.variant,
        "seed": request.seed,
        "device": request.device.type,
        "processes": request.ranks.count,
    }
