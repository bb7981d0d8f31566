"""Weights that somebody has trained before, from a file that is not ours."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_core import DecayPruningError

WRAPPED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights, beside an optimizer's state and the like."""
BEFORE = ("module.", "_orig_mod.")
"""What DistributedDataParallel and ``torch.compile`` put before every name."""
SHOWN = 3


class CheckpointError(DecayPruningError, ValueError):
    """A checkpoint cannot be read, or is of another network. The message names what differs."""


@cache
def digest(path: Path) -> str:
    """The SHA-256 of a file, 16 hex digits; read once in a process.

    Raises:
        CheckpointError: it cannot be read.
    """
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
    except OSError as cause:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({cause.strerror})") from cause
    return sha.hexdigest()[:16]


def weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, on the host.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote of a ``state_dict``; that one may lie
            under ``state_dict``, ``model_state_dict`` or ``model``, and all its names may begin
            with ``module.`` or ``_orig_mod.``. No code in it runs (``weights_only``).

    Raises:
        CheckpointError: it cannot be read, or holds no ``state_dict``.
    """
    digest(path)  # the same words for a file that is not there
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        # PyTorch's own message advises to load it all the same, which would run its code.
        raise CheckpointError(
            f"the checkpoint {path} holds more than tensors and plain values, which could be code, "
            "and was not loaded; save the model's state_dict() alone"
        ) from cause
    except Exception as cause:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({type(cause).__name__}); give a .safetensors "
            "file, or a state_dict that torch.save wrote"
        ) from cause
    for key in WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"the checkpoint {path} holds no state_dict; save the model's")
    if wrong := [str(k) for k, v in content.items() if not isinstance(v, Tensor)]:
        raise CheckpointError(
            f"the checkpoint {path} is no state_dict: {_some(wrong)} is no tensor; save the model's"
        )
    named = {str(name): tensor for name, tensor in content.items()}
    while prefix := next((b for b in BEFORE if all(n.startswith(b) for n in named)), None):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def start_from(model: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights into a model, all of them, after checking all of them.

    Raises:
        CheckpointError: naming what is missing, unknown or of another shape. Nothing is loaded.
    """
    given, own = weights(path), model.state_dict()
    faults = []
    if missing := [name for name in own if name not in given]:
        faults.append(f"it lacks {_some(missing)}")
    if unknown := [name for name in given if name not in own]:
        faults.append(f"it has {_some(unknown)}, which the model has not")
    shapes = [
        f"{name} is {list(given[name].shape)}, in the model {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if shapes:
        faults.append(_some(shapes, "; "))
    if faults:
        raise CheckpointError(
            f"the checkpoint {path} does not fit this model ({'; '.join(faults)}); give its own"
        )
    infinite = [n for n, t in given.items() if t.is_floating_point() and not t.isfinite().all()]
    if infinite:
        raise CheckpointError(f"the checkpoint {path} is not finite in {_some(infinite)}")
    model.load_state_dict(given)


def _some(names: list[str], between: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *more])
