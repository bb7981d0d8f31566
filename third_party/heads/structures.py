"""Whole heads as structures: what of a network goes with each, and their removal."""

from __future__ import annotations

import copy
import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..groups import Plan, Share, UnsupportedLayerError, UpstreamGroup

Table = list[list[int]]
"""Positions by structure, equally many for each, in ascending order."""
Leaf = tuple[str, int]
"""A parameter's or buffer's name, and one of its dimensions."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention, or of several that only go together.

    Attributes:
        root: the name of the layer of the values, after which the group is named.
        parts: what goes with each structure: by (name of a parameter or buffer, dimension) the
            positions.
        inputs: those of ``parts`` that read the heads' outputs: columns of the output layer.
        owners: (name of a layer, positions in its output): the values.
        numbers: (module's name, attribute): whole numbers that shrink in proportion to the heads.
            An attribute may be one of an attribute, as ``config.num_attention_heads``.
    """

    root: str
    parts: dict[Leaf, Table]
    inputs: frozenset[Leaf]
    owners: tuple[tuple[str, Table], ...]
    numbers: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """How many structures there are."""
        return len(self.members)

    @property
    def members(self) -> Table:
        """The root's output channels by structure."""
        return next(t for (name, _), t in self.parts.items() if name == f"{self.root}.weight")

    @property
    def layers(self) -> set[str]:
        """Names of the modules whose outputs are the heads'."""
        return {owner(name) for name, dim in self.parts if (name, dim) not in self.inputs}

    def group(self, model: nn.Module) -> UpstreamGroup:
        """The heads of a model as structures."""
        own = dict(model.named_parameters(remove_duplicate=False))
        shares = [
            Share(name, own[name], dim, False, index)
            for (name, dim), index in self.parts.items()
            if (name, dim) not in self.inputs and name in own
        ]
        layers = [(model.get_submodule(name), table) for name, table in self.owners]
        owners = [(layer, channel_axis(layer), table) for layer, table in layers]
        return UpstreamGroup(self.root, self.members, True, shares, owners)

    def structures_of(self, channels: Sequence[int]) -> list[int]:
        """The structures that some of the root's channels make up.

        Raises:
            UnsupportedLayerError: see :meth:`~.groups.UpstreamGroup.structures_of`.
        """
        return UpstreamGroup(self.root, self.members, True).structures_of(channels)

    def without(self, structures: Iterable[int]) -> Heads:
        """What is left of these heads when some have gone, with positions counted anew."""
        gone = set(structures)

        def left(table: Table, of: Table) -> Table:
            missing = sorted(p for k in gone for p in of[k])
            kept = [positions for k, positions in enumerate(table) if k not in gone]
            return [[p - bisect_left(missing, p) for p in positions] for positions in kept]

        rows = {name: table for (name, _), table in self.parts.items()}
        return replace(
            self,
            parts={leaf: left(table, table) for leaf, table in self.parts.items()},
            owners=tuple((n, left(table, rows[f"{n}.weight"])) for n, table in self.owners),
        )

    def remove(self, model: nn.Module, structures: Iterable[int]) -> None:
        """Take heads out of a model, in place; parameters become new objects.

        Raises:
            UnsupportedLayerError: none would be left.
        """
        gone = set(structures)
        if len(gone) >= self.count:
            raise UnsupportedLayerError(f"the removal leaves no head of {self.root!r}")
        names = all_names(model)
        for (name, dim), table in self.parts.items():
            old = tensor_of(model, name)
            missing = {p for k in gone for p in table[k]}
            keep = [p for p in range(old.shape[dim]) if p not in missing]
            new = _selected(old, dim, torch.tensor(keep, device=old.device))
            for other in names[name]:
                setattr(model.get_submodule(owner(other)), other.rpartition(".")[2], new)
        for layer in {owner(name) for name, _ in self.parts}:
            _renumber(model.get_submodule(layer))
        self.count_without(model, gone)

    def count_without(self, model: nn.Module, structures: Iterable[int]) -> None:
        """Bring a model's own numbers of heads up to date when some have gone."""
        for module, attribute in self.numbers:
            left = self.count - len(set(structures))
            _scale(model.get_submodule(module), attribute, left, self.count)


@dataclass
class Found:
    """The heads of a network.

    Attributes:
        heads: those that can go.
        refused: why others cannot, by the name of the layer of their values, in words that follow
            "the group of ...".
        layers: names of all layers that compute heads, of both kinds.
        hidden: names of layers, of any kind, whose output is a view that something is written into.
            In autograd's graph that stands in their place, unless they give a copy.
    """

    heads: list[Heads] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)

    def of(self, layer: str) -> Heads | None:
        """The heads that a layer computes, in the group of that name."""
        for heads in self.heads:
            if any(name == f"{layer}.weight" for name, dim in heads.parts.keys() - heads.inputs):
                return replace(heads, root=layer)
        return None

    def whole_in(self, plan: Plan) -> Found:
        """Without the heads of which a removal takes a part: upstream may know what that does."""
        parted: set[Leaf] = set()
        for layer, channels in plan:
            heads = self.of(layer)
            try:
                _ = heads and heads.structures_of(channels)
            except UnsupportedLayerError:
                parted |= heads.parts.keys() if heads else set()
        left = [h for h in self.heads if parted.isdisjoint(h.parts.keys() - h.inputs)]
        return replace(self, heads=left)


# ---------------------------------------------------------------------- layers of a known kind


def conv1d() -> tuple[Any, ...]:
    """Transformers' Conv1D, a linear layer with a transposed weight, if anybody has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    kind = getattr(module, "Conv1D", None)
    return () if kind is None else (kind,)


def weight_dims(module: nn.Module) -> tuple[int, int] | None:
    """The dimensions of outputs and inputs in the weight of a layer that mixes its inputs."""
    if isinstance(module, conv1d()):
        return 1, 0
    if isinstance(module, nn.Linear):
        return 0, 1
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return (0, 1) if module.groups == 1 else None
    return None


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a layer's inputs and outputs that holds the channels."""
    return 1 if isinstance(layer, _ConvNd) else -1


def _renumber(module: nn.Module) -> None:
    """Bring a layer's own numbers up to date with its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, conv1d()):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        if module.groups > 1:  # a depthwise convolution
            module.groups = len(weight)
        module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = len(weight)


def owner(name: str) -> str:
    """The name of the module that a parameter or buffer is of."""
    return name.rpartition(".")[0]


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    tensor: Tensor = getattr(model.get_submodule(owner(name)), name.rpartition(".")[2])
    return tensor


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter or buffer all names of the same one."""
    same: dict[int, list[str]] = {}
    for listed in (model.named_parameters, model.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            same.setdefault(id(tensor), []).append(name)
    return {name: names for names in same.values() for name in names}


def _selected(old: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Some positions of a parameter, with its gradient, or of a buffer."""
    value = old.detach().index_select(dim, keep)
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad.index_select(dim, keep)
    return new


def _scale(module: nn.Module, attribute: str, left: int, of: int) -> None:
    holder, _, last = attribute.rpartition(".")
    target: Any = module
    if holder:  # shared by all layers, which may keep unequal numbers of heads
        target = copy.copy(getattr(module, holder))
        setattr(module, holder, target)
    setattr(target, last, getattr(target, last) * left // of)
