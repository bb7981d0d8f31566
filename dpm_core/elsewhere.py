"""Weights that are kept beside those that are trained: averages, and copies of a model.

Slices know tensors and not names, so the model that the groups were made from names them, and the
same names are looked up in the other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .errors import GroupError
from .groups import StructureGroup, _require_plain_storage

WRAPPERS = ("module.", "_orig_mod.")
"""What AveragedModel, DistributedDataParallel and torch.compile put before a model's names."""


def counterparts(
    groups: Iterable[StructureGroup],
    other: nn.Module | Mapping[str, Tensor],
    model: nn.Module | None,
) -> dict[int, Tensor]:
    """The tensor in ``other`` that stands for each slice's parameter, by the parameter's ``id``.

    Args:
        groups: whose slices are looked up.
        other: a model, or tensors by name, as a ``state_dict`` has them.
        model: gives the parameters their names; ``None`` where ``other`` holds them itself.

    Raises:
        GroupError: a parameter is not in ``model``, or has no counterpart of its shape that can be
            written to.
    """
    theirs = _named(other)
    ours = theirs if model is None else _named(model)
    names = {id(tensor): name for name, tensor in ours.items()}
    tensors: dict[int, Tensor] = {}
    for group in groups:
        for s in group.slices:
            here = f"{s.name!r} of group {group.name!r}"
            name = names.get(id(s.parameter))
            if name is None and model is None:
                raise GroupError(
                    f"{here} is not among the weights given; for a copy say whose names to go by: "
                    "zero_in(copy, model), with the model that the groups were made from"
                )
            if name is None:
                raise GroupError(
                    f"{here} is no parameter of the model given; give the model that the groups "
                    "were made from"
                )
            tensor = theirs.get(name)
            if tensor is None:
                raise GroupError(
                    f"{here} is called {name!r} in the model, and the other one has no such weight "
                    f"(it has {_some(theirs)}); give a copy of the same model"
                )
            if not isinstance(tensor, Tensor) or tensor.shape != s.parameter.shape:
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise GroupError(
                    f"{here} has shape {tuple(s.parameter.shape)}, and {name!r} of the other one "
                    f"{shape}; give a copy of the same model, from before any removal"
                )
            _require_plain_storage(tensor, name)
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise GroupError(
                    f"{name!r} of the other one was made in inference mode and cannot be written "
                    "to; give a clone of it"
                )
            tensors[id(s.parameter)] = tensor
    if len({t.data_ptr() for t in tensors.values()}) < len(tensors):
        raise GroupError(
            "two weights of the other one are tied that are not in the model the groups were made "
            "from, so zeros of one would be written into another; give a copy of the same model"
        )
    return tensors


@torch.no_grad()
def write_zeros(group: StructureGroup, structures: Tensor, into: Mapping[int, Tensor]) -> None:
    """Set some structures of a group to exactly zero in what :func:`counterparts` gave."""
    for s in group.slices:
        tensor = into[id(s.parameter)]
        rows = s.index[structures.to(s.index.device)].reshape(-1)
        tensor.index_fill_(s.dim, rows.to(tensor.device), 0)


def _named(of: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, without what wrappers put before it."""
    tensors: dict[str, Tensor] = {}
    if isinstance(of, nn.Module):
        tensors.update(of.named_parameters(remove_duplicate=False))
    elif isinstance(of, Mapping):
        tensors.update(of)
    else:
        raise GroupError(
            f"{type(of).__name__} is neither a model nor tensors by name; give a module, or a "
            "mapping such as its state_dict()"
        )
    by_name: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = str(name)
        while short.startswith(WRAPPERS):
            short = short[short.index(".") + 1 :]
        by_name[short] = tensor
    # A model that has layers of these very names of its own keeps them.
    return by_name if len(by_name) == len(tensors) else tensors


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = [repr(name) for name in tensors]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
