"""The parts that layers' parameters have in the structures of a group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from . import heads, norms, running
from .groups import Share, UnsupportedLayerError, UpstreamGroup
from .maps import Meeting
from .walk import joined


def customised(built: Any, module: nn.Module) -> bool:
    """Whether a pruner of the user's own takes channels from a layer that is not known here."""
    return type(module) in built.CUSTOMIZED_PRUNERS and not isinstance(module, _KNOWN)


_KNOWN = (
    _ConvNd,
    nn.Linear,
    nn.Embedding,
    _BatchNorm,
    _InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.RNNBase,
)


def probed(built: Any, node: Any, index: list[list[int]], name: str) -> list[Share]:
    """The parts in a group of a layer's parameters, read off what its own pruner takes of copies.

    Each element of a copy's parameters is its own position. The binary digits of a channel's number
    say in which trials it goes; so a few trials tell which rows go with which channel.

    Raises:
        UnsupportedLayerError: a channel takes something else than whole rows along one dimension.
    """
    layer, own = node.module, dict(node.module.named_parameters())
    number = {p: i + 1 for i, p in enumerate(sorted(p for places in index for p in places))}
    codes = {
        n: [torch.zeros(size, dtype=torch.int64, device="cpu") for size in p.shape]
        for n, p in own.items()
    }
    for bit in range(len(number).bit_length()):
        trial = running.copied(layer)
        for parameter in trial.parameters():
            parameter.grad = None
            parameter.data = (
                torch.arange(parameter.numel(), device="cpu").view(parameter.shape).double()
            )
        handler = built.get_pruner_of_module(layer).prune_out_channels
        handler.__self__.pruning_dim = node.pruning_dim
        handler(trial, [p for p, code in number.items() if code >> bit & 1])
        for what, parameter in trial.named_parameters():
            left = positions(f"{name}.{what}", parameter.detach().long(), own[what].shape)
            for code, kept in zip(codes[what], left, strict=True):
                taken = torch.ones_like(code)
                taken[kept] = 0
                code += taken << bit
    shares = []
    for what, by_dim in codes.items():
        touched = [dim for dim, code in enumerate(by_dim) if bool(code.any())]
        if not touched:
            continue
        if len(touched) > 1:
            raise UnsupportedLayerError(
                f"involves {name!r}, of whose {what!r} a channel takes rows and columns at once"
            )
        rows: dict[int, list[int]] = {}
        for row, code in enumerate(by_dim[touched[0]].tolist()):
            rows.setdefault(code, []).append(row)
        taken_by = [[r for p in places for r in rows.get(number[p], [])] for places in index]
        if len({len(t) for t in taken_by}) > 1 or not set(rows) <= {0, *number.values()}:
            raise uneven(repr(f"{name}.{what}"))
        shares.append(
            share_of(f"{name}.{what}", own[what], touched[0], False, list(map(sorted, taken_by)))
        )
    return shares


def positions(name: str, codes: Tensor, shape: torch.Size) -> list[Tensor]:
    """What is left of a tensor along each dimension, of which each element was its own position.

    Raises:
        UnsupportedLayerError: that is not whole rows and columns.
    """
    if codes.dim() == len(shape) and codes.numel():
        strides = [shape[d + 1 :].numel() for d in range(len(shape))]
        index = []
        for d, stride in enumerate(strides):
            line = codes.movedim(d, 0).reshape(codes.shape[d], -1)[:, 0]
            index.append(line // stride % shape[d])
        expected = torch.zeros((), dtype=torch.int64, device="cpu")
        for here, stride in zip(index, strides, strict=True):
            expected = expected[..., None] + here * stride
        if torch.equal(expected, codes):
            return index
    raise UnsupportedLayerError(
        f"what the removal leaves of {name!r}, {tuple(codes.shape)} of {tuple(shape)}, is nothing, "
        "or is not whole rows and columns of it; leave the channels out of the plan that lead there"
    )


def width(layer: Any) -> int:
    """How many output channels a layer has that a group can be named after."""
    if isinstance(layer, heads.conv1d()):
        return int(layer.nf)
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def depthwise(module: nn.Module) -> bool:
    """Whether each output channel of a convolution is a part of it."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels


def by_structure(
    meetings: Iterable[Meeting], of: Tensor, structures: int, layer: str
) -> list[list[int]]:
    """A layer's positions by structure, equally many for each, in ascending order.

    Raises:
        UnsupportedLayerError: structures have unequal numbers of positions.
    """
    places, channels = joined(meetings)
    size = int(places.max()) + 1
    pairs = (of[channels] * size + places).unique()  # by structure, then by position
    counts = (pairs // size).bincount(minlength=structures)
    if bool((counts != counts[0]).any()):
        raise uneven(repr(layer))
    return (pairs % size).view(structures, -1).tolist()  # type: ignore[no-any-return]


def uneven(layer: str) -> UnsupportedLayerError:
    """The refusal of structures of several kinds."""
    return UnsupportedLayerError(
        f"gives its structures unequal shares of {layer}, as where one half of a split is added to "
        "something and the other is not"
    )


def share_of(name: str, parameter: Tensor, dim: int, norm: bool, index: list[list[int]]) -> Share:
    """One parameter's part in a group, after a check that the parameter has the positions."""
    if not parameter.is_floating_point():
        raise UnsupportedLayerError(
            f"holds {name!r}, which is {parameter.dtype}: only real numbers decay"
        )
    last = max(map(max, index))
    if last >= parameter.shape[dim]:
        raise UnsupportedLayerError(
            f"reaches position {last} of {name!r}, which has {parameter.shape[dim]}: torch-pruning "
            "takes its channels for others on their way"
        )
    return Share(name, parameter, dim, norm, index)


def add(table: UpstreamGroup, share: Share) -> None:
    """Add a share to a group; a parameter that two layers share is added once."""
    for other in table.shares:
        if other.parameter is share.parameter:
            if (other.dim, other.index) == (share.dim, share.index):
                return
            raise UnsupportedLayerError(
                f"holds one parameter as {other.name!r} and as {share.name!r}, of which a "
                "structure has different parts"
            )
    table.shares.append(share)


def kind_of(built: Any, module: nn.Module, name: str) -> tuple[dict[str, int], bool] | None:
    """By attribute the dimension of the output positions; and whether the layer is a norm.

    ``None`` where nothing has to be zero for the output to be zero.

    Raises:
        UnsupportedLayerError: a channel of zeros does not equal a removed one in this layer.
    """
    if isinstance(module, _ConvTransposeNd):
        if module.groups == 1:
            return {"weight": 1, "bias": 0}, False
        if depthwise(module) and module.groups == module.in_channels:
            return {"weight": 0, "bias": 0}, False
        why = "whose parts torch-pruning cannot take channels from"
    elif isinstance(module, (_ConvNd, nn.Linear)):
        return {"weight": 0, "bias": 0}, False
    elif isinstance(module, heads.conv1d()):
        return {"weight": 1, "bias": 0}, False
    elif isinstance(module, nn.Embedding):
        return {"weight": 1}, False
    elif norms.needs_telling(module) and not norms.is_told(module, built):
        raise UnsupportedLayerError(
            f"involves {name!r} ({type(module).__name__}), of which torch-pruning by itself takes "
            "no channels, as it has no bias, or tracks statistics"
        )
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        if module.affine:
            return {"weight": 0, "bias": 0}, True
        if not module.track_running_stats:
            return None
        why = "which has no weight and bias, so it shifts zeros by its running mean"
    elif norms.loses_whole_groups(module, built) and module.num_groups > 1:
        return ({"weight": 0, "bias": 0}, True) if module.affine else None
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        why = "whose mean and variance are over several channels, those of zeros among them"
    elif isinstance(module, nn.PReLU) or not any(True for _ in module.parameters()):
        return None  # zero in, zero out
    else:
        why = "whose output channels cannot be set to zero one by one"
    raise UnsupportedLayerError(
        f"involves {name!r} ({type(module).__name__}), {why}: a channel of zeros does not equal a "
        "removed one"
    )
