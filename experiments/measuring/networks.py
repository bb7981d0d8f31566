"""The networks of torchvision and timm that :mod:`experiments.measuring.breadth` measures."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dpm_core.third_party.upstreams import require

from ..errors import RunError
from ..inputs import networks as inputs

CLASSES = 10
TIMM = "timm:"
"""What the names of timm's networks begin with."""
FAMILIES = Path(__file__).with_name("families.txt")
"""The smallest network of every family (module) of timm, a name on each line."""
SIZES = (64, 56, 96, 112, 128, 160, 192, 224, 240, 256, 288, 336, 384, 448, 512)
"""Heights and widths of images that are tried in turn, the cheap first."""


@dataclass(frozen=True)
class Candidate:
    """A network as it is measured.

    Attributes:
        name: torchvision's, or timm's with ``timm:`` before it.
        size: height and width of its images.
        build: builds it, dense.
    """

    name: str
    size: int
    build: Callable[[], nn.Module]


def networks() -> list[str]:
    """Names of torchvision's classification networks, and of the smallest of timm's families."""
    of_torchvision = torchvision.models.list_models(module=torchvision.models)
    of_timm = FAMILIES.read_text(encoding="utf-8").split()
    return sorted([*of_torchvision, *(f"{TIMM}{name}" for name in of_timm)])


def network(name: str) -> Candidate:
    """A network by its name, for the smallest images that it sensibly takes.

    Args:
        name: one of torchvision's, or any of timm's with ``timm:`` before it.

    Raises:
        RunError: torchvision has none of that name, or timm's takes no images that were tried.
        NetworkError: timm has none of that name, or is not installed.
    """
    return _of_timm(name) if name.startswith(TIMM) else _of_torchvision(name)


def size_of(name: str) -> int:
    """Number of a network's parameters for 1000 classes, without its weights.

    Raises:
        RunError, NetworkError: as :func:`network`.
    """
    if name.startswith(TIMM):
        return sum(p.numel() for p in _on_meta(name, 1000).parameters())
    _require_torchvision(name)
    weights = next(iter(torchvision.models.get_model_weights(name)))
    return int(weights.meta["num_params"])


def versions(name: str) -> dict[str, str]:
    """The versions of the packages that a network's figures depend on."""
    package = "timm" if name.startswith(TIMM) else "torchvision"
    found = {"torch": torch.__version__, package: importlib.metadata.version(package)}
    return found | {"torch-pruning": require("torch-pruning")}


# ---------------------------------------------------------------------- torchvision


def _require_torchvision(name: str) -> None:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise RunError(f"torchvision has no classification network {name!r}")


def _of_torchvision(name: str) -> Candidate:
    _require_torchvision(name)
    size, settings = 64, {}
    if name.startswith("vit"):
        size = 56 if name.endswith("14") else 64
        settings = {"image_size": size}
    elif name.startswith("maxvit"):
        size = 224  # its windows divide no smaller images
    elif name in ("googlenet", "inception_v3"):
        # Heads that only training uses are outside the graph, which is that of evaluation.
        size = 96
        settings = {"aux_logits": False, "init_weights": False}
    return Candidate(
        name,
        size,
        lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings),
    )


# ---------------------------------------------------------------------- timm


def _on_meta(name: str, classes: int, **settings: Any) -> nn.Module:
    """A network without values."""
    with torch.device("meta"):
        return inputs.Network(name, settings).build(3, classes)


def _of_timm(name: str) -> Candidate:
    inputs.Network(name).find()
    tried = [(size, settings) for size in SIZES for settings in ({"img_size": size}, {})]
    few: list[tuple[int, dict[str, int]]] = []
    for size, settings in tried:
        enough = _runs(name, size, settings)
        if enough:
            break
        if enough is not None:
            few.append((size, settings))
    else:
        if not few:
            raise RunError(f"no size of images was found that {name!r} takes")
        size, settings = few[0]
    whole = inputs.Network(name, settings)
    return Candidate(name, size, lambda: whole.build(3, CLASSES, seed=0))


def _runs(name: str, size: int, settings: Mapping[str, Any]) -> bool | None:
    """Whether a network has four positions or more at its end on images of a size.

    With fewer, attention has nothing to choose from, and a norm little to take a mean over.
    ``None``: it does not run.
    """
    try:
        model: Any = _on_meta(name, CLASSES, **settings).eval()
        with torch.no_grad(), torch.device("meta"):
            images = torch.empty(2, 3, size, size)
            features = model.forward_features(images)
            model(images)
    except Exception:  # whatever says that it does not
        return None
    last = features[-1] if isinstance(features, tuple | list) else features
    return bool(last[0].numel() >= 4 * model.num_features or last.dim() == 2)
