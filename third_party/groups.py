"""An upstream's group in plain terms: index tables, the same for every upstream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class UnsupportedLayerError(ValueError):
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
        channels: the root's number of output channels.
        repeats: how many of the root's channels make up a structure.
        consecutive: which those are. False: structure k is made of the channels k,
            k + channels / repeats, and so on, as in a grouped convolution; True: of ``repeats`` in
            a row, as an attention head is.
        shares: parameters whose output positions belong to the structures.
        owners: (module, dim, index): modules whose output carries the structures.
    """

    root: str
    channels: int
    repeats: int = 1
    consecutive: bool = False
    shares: list[Share] = field(default_factory=list)
    owners: list[tuple[nn.Module, int, list[list[int]]]] = field(default_factory=list)

    @property
    def structures(self) -> int:
        """How many structures the group holds."""
        return self.channels // self.repeats

    def structure_of(self, channel: int) -> int:
        """The structure that one of the root's channels belongs to."""
        return channel // self.repeats if self.consecutive else channel % self.structures

    def channels_of(self, structures: Sequence[int]) -> list[int]:
        """The root's channels that make up some structures, sorted."""
        step, stride = (self.repeats, 1) if self.consecutive else (1, self.structures)
        return sorted(k * step + r * stride for k in structures for r in range(self.repeats))

    def structures_of(self, channels: Sequence[int]) -> list[int]:
        """The structures that some of the root's channels make up, sorted."""
        found = sorted({self.structure_of(c) for c in channels})
        if self.channels_of(found) != sorted(channels):
            raise UnsupportedLayerError(
                f"upstream removes channels of {self.root!r} that are not whole structures"
            )
        return found
