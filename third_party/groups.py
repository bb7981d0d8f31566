"""An upstream's group in plain terms: index tables, the same for every upstream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .errors import AdapterError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


Plan = list[tuple[str, list[int]]]
"""What is removed, in order: (root layer's name, its output channels as they are at its turn)."""


class UnsupportedLayerError(AdapterError):
    """A layer's channels cannot be set to zero in a way that equals removing them."""


@dataclass
class Share:
    """One parameter's part in a group: positions along ``dim`` for each structure."""

    name: str
    parameter: Tensor
    dim: int
    batch_norm: bool
    index: list[list[int]]


@dataclass
class UpstreamGroup:
    """One group of an upstream: DepGraph's dependency group, OTOv2's zero-invariant groups.

    Attributes:
        root: the name of the layer that the group is named after.
        members: by structure, the root's output channels that make it up, in ascending order. None
            of them can be removed without the others: two halves that are multiplied, say, or the
            channels in the same place of every part of a grouped convolution.
        heads: whether a structure is an attention head, and the root the layer of its values.
        shares: parameters whose output positions belong to the structures.
        owners: (module, dim, index): modules whose output carries the structures.
    """

    root: str
    members: list[list[int]]
    heads: bool = False
    shares: list[Share] = field(default_factory=list)
    owners: list[tuple[nn.Module, int, list[list[int]]]] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """The root's number of output channels."""
        return sum(map(len, self.members))

    @property
    def structures(self) -> int:
        """How many structures the group has."""
        return len(self.members)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have a part in the structures, in order."""
        return list(dict.fromkeys(s.name.rpartition(".")[0] for s in self.shares))

    def structure_of(self) -> dict[int, int]:
        """The structure that each of the root's channels belongs to."""
        return {c: k for k, channels in enumerate(self.members) for c in channels}

    def channels_of(self, structures: Iterable[int]) -> list[int]:
        """The root's channels that make up some structures, sorted."""
        return sorted(c for k in structures for c in self.members[k])

    def structures_of(self, channels: Sequence[int]) -> list[int]:
        """The structures that some of the root's channels make up, sorted.

        Raises:
            UnsupportedLayerError: they are not whole structures, or no channels of the root.
        """
        if len(set(channels)) != len(channels) or not all(0 <= c < self.channels for c in channels):
            raise UnsupportedLayerError(
                f"{self.root!r} has channels 0 to {self.channels - 1}; {list(channels)[:8]} "
                "reaches outside, or names one twice"
            )
        of = self.structure_of()
        structures = sorted({of[c] for c in channels})
        missing = sorted(set(self.channels_of(structures)) - set(channels))
        if missing:
            raise UnsupportedLayerError(
                f"{sorted(channels)[:8]} of {self.root!r} are not whole structures: they go "
                f"together with others, and their removal takes {missing[:8]} of the layer along. "
                "Give whole structures (a structure group's `index` lists their channels)"
            )
        return structures


def structures_in(channels: int, size: int) -> int:
    """The fewest structures of ``size`` channels each that have a multiple of some ``channels``."""
    return channels // math.gcd(channels, size)


def named(root: str, why: str) -> str:
    """The message of a refusal: which group, why, and the remedy."""
    return f"the group of {root!r} {why}. Name {root!r} in `ignored` to leave it unpruned"
