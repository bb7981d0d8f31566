"""How layers that normalise lose channels, where torch-pruning 1.6.1 takes wrong ones, or none.

- A GroupNorm loses channels of any group and keeps its number of groups (``GroupNormPruner`` of
  ``function``), so that none is normalised as before. Here it loses whole groups.
- The running statistics of an InstanceNorm stay as many as they were (``InstanceNormPruner``).
- A BatchNorm or an InstanceNorm with a weight and no bias loses nothing (``BatchnormPruner``).

A pruner that a user has constructed has read its graph before, and is not told of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .groups import UnsupportedLayerError
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)


class _Channels(tp.BasePruningFunc):  # type: ignore[misc]
    """Takes channels from a BatchNorm or an InstanceNorm, whatever it has of each."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        keep = [i for i in range(layer.num_features) if i not in gone]
        layer.num_features = len(keep)
        self._take(layer, keep)
        for name in ("running_mean", "running_var"):
            statistics = getattr(layer, name)
            if statistics is not None:
                setattr(layer, name, statistics[keep])
        return layer  # type: ignore[no-any-return]

    prune_in_channels = prune_out_channels

    def _take(self, layer: Any, keep: list[int]) -> None:
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                setattr(layer, name, self._prune_parameter_and_grad(parameter, keep, 0))

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.num_features)

    get_in_channels = get_out_channels


class _WholeGroups(_Channels):
    """Takes channels from a GroupNorm: whole groups, as each group is normalised by itself."""

    def prune_out_channels(self, layer: nn.GroupNorm, idxs: Sequence[int]) -> nn.Module:
        size, gone = layer.num_channels // layer.num_groups, set(idxs)
        if len(gone) != size * len({i // size for i in gone}):
            raise UnsupportedLayerError("a GroupNorm can only lose all channels of a group")
        keep = [i for i in range(layer.num_channels) if i not in gone]
        layer.num_channels, layer.num_groups = len(keep), len(keep) // size
        self._take(layer, keep)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.GroupNorm) -> int:
        return layer.num_channels

    get_in_channels = get_out_channels


def of(model: nn.Module) -> dict[type[nn.Module], Any]:
    """What takes channels from a model's layers, for upstream's graph to be told of.

    BatchNorms are upstream's own where they have a bias: its importances know them by that.
    """
    told: dict[type[nn.Module], Any] = {}
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            told[type(layer)] = _WholeGroups()
        elif isinstance(layer, _InstanceNorm) or needs_telling(layer):
            told[type(layer)] = _Channels()
    return told


def needs_telling(layer: nn.Module) -> bool:
    """Whether upstream by itself takes no channels from a BatchNorm or an InstanceNorm."""
    if not isinstance(layer, (_BatchNorm, _InstanceNorm)):
        return False
    tracked = isinstance(layer, _InstanceNorm) and layer.track_running_stats
    return tracked or (layer.affine and layer.bias is None)


def is_told(layer: nn.Module, built: Any) -> bool:
    """Whether a graph was told of a layer by :func:`of`."""
    return isinstance(built.CUSTOMIZED_PRUNERS.get(type(layer)), _Channels)


def loses_whole_groups(layer: nn.Module, built: Any) -> TypeGuard[nn.GroupNorm]:
    """Whether a layer is a GroupNorm, and the graph was told of it by :func:`of`."""
    return isinstance(layer, nn.GroupNorm) and is_told(layer, built)


def together(layer: nn.Module, built: Any) -> int:
    """How many channels, side by side, a layer can only lose together."""
    if loses_whole_groups(layer, built):
        return layer.num_channels // layer.num_groups
    return 1
