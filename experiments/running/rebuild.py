"""A run's pruned model, rebuilt from its file alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from dpm_core.adapters.saved import Saved, SavedModelError, read

from ..config import LARGEST_IMAGE
from ..errors import RunError
from ..inputs.networks import Network, NetworkError


class _Facts(BaseModel):
    """What the file of a run's model says about it, to build it again."""

    model_config = ConfigDict(strict=True)

    model: str
    model_options: dict[str, Any] = {}
    model_sha256: str | None = None
    in_channels: Annotated[int, Field(ge=1)]
    classes: Annotated[int, Field(ge=1)]
    image_size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]


def load_model(path: Path, *, allow: Collection[str] = ()) -> tuple[nn.Module, torch.Tensor]:
    """The pruned model of a run, rebuilt from its file alone, in eval mode.

    A network that is not built in is built by code that the file only names. That runs with your
    rights, so it is not imported unless it is allowed here.

    Args:
        path: a run's ``model.safetensors``.
        allow: modules and files that may be imported, as they stand before the colon in ``model``;
            ``["*"]`` allows any.

    Returns:
        The model, and an example of what it takes: random images, (4, C, H, W).

    Raises:
        RunError: the file cannot be read, or is no model of a run; or its network is not allowed
            to be imported, or is no longer the one that it was.
        DamagedError, VersionError: see :func:`dpm_core.adapters.saved.read`.
    """
    try:
        saved = read(path)
    except OSError as cause:
        raise RunError(f"{path} cannot be read ({cause.strerror})") from cause
    try:
        facts = _Facts.model_validate(saved.facts)
        network = Network(facts.model, facts.model_options, facts.model_sha256)
        model = _dense(network, facts, saved, allow)
        shape = (4, facts.in_channels, facts.image_size, facts.image_size)
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return saved.load_into(model, example).eval(), example
    except SavedModelError as cause:
        raise RunError(f"{path} is no model of a run: {cause}") from cause
    except NetworkError as cause:
        raise RunError(f"{path} cannot be rebuilt: {cause}") from cause
    except ValidationError as cause:
        first = cause.errors()[0]
        key = ".".join(map(str, first["loc"])) or "all"
        raise RunError(f"{path} is no model of a run: its facts, {key}: {first['msg']}") from cause


def _dense(network: Network, facts: _Facts, saved: Saved, allow: Collection[str]) -> nn.Module:
    """The dense network, once it is known that the saved tensors can be of it."""
    network.check()
    network.require_allowed(allow)
    network.require_hash()
    sizes = facts.in_channels, facts.classes
    if network.code is not None:  # its code is trusted, and need not run without memory
        model = network.build(*sizes)
        _check(network, model, saved)
        return model
    try:
        with torch.device("meta"):
            outline = network.build(*sizes)
    except (RuntimeError, OverflowError, TypeError) as cause:
        raise SavedModelError("its facts ask for a larger model than there can be") from cause
    _check(network, outline, saved)
    return network.build(*sizes)


def _check(network: Network, model: nn.Module, saved: Saved) -> None:
    """Refuse a network that the file's tensors cannot be of.

    Raises:
        SavedModelError: with what differs.
    """
    dense, gone = model.state_dict(), sum(len(channels) for _, channels in saved.removal)
    if dense.keys() != saved.tensors.keys():
        raise SavedModelError(
            f"its tensors are not those of a {network.name}; save the model anew"
            + ("" if network.code is None else ", or install the version that it was built with")
        )
    for name in sorted(dense):
        small, whole = saved.tensors[name].shape, dense[name].shape
        pairs = zip(small, whole, strict=False)
        if len(small) != len(whole) or any(not s <= w <= s + gone for s, w in pairs):
            raise SavedModelError(
                f"{name!r} has shape {tuple(small)}, and what was removed does not make it that "
                f"from {tuple(whole)}, as the file's facts have it; save the model anew"
            )
