"""torch.nn.utils.prune: ``ln_structured``, the structured pruning that comes with PyTorch.

Upstream masks rows of one layer's weight. What becomes of its masks is ours: layers whose channels
are tied are ranked as one, and a masked structure goes whole, with its bias and BatchNorm. It goes
at once, or, with smoothing, when it has decayed.
docs/write-an-adapter.md builds this file step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dpm_core import Slice, StructureGroup
from dpm_core.third_party.groups import structures_in

from .base import Adapter, AdapterError, Structures, width_unit
from .depgraph import structure_groups


@dataclass(frozen=True)
class TorchPruneOptions:
    """Settings of the framework.

    Attributes:
        amount: upstream's ``amount``: share of its channels that every group of layers loses,
            rounded as upstream rounds it.
        n: upstream's ``n``: the order of the norm that ranks the channels.
        ignored: names of layers that are left as they are, besides those that make the output.
        round_to: groups that lose channels keep the next lower multiple of so many (ours).
    """

    amount: float
    n: float = 2.0
    ignored: tuple[str, ...] = ()
    round_to: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise AdapterError(f"amount is {self.amount}; give a share above 0, below 1")
        if not self.n > 0:
            raise AdapterError(f"n is {self.n}; give the order of a norm, above 0")
        width_unit(self.round_to)


class TorchPrune(Adapter):
    """See the module."""

    Options: ClassVar[type] = TorchPruneOptions
    options: TorchPruneOptions

    def groups(self) -> list[StructureGroup]:
        """Those of DepGraph."""
        return structure_groups(
            self.model,
            self.example,
            self.options.ignored,
            tried=self.checked,
            progress=self.progress,
        )

    def selection(self) -> Structures:
        """The structures of each group that upstream masks, and those that round its width."""
        o = self.options
        chosen: Structures = {}
        for name, group in self.grouped().items():
            free = torch.ones(group.size, device="cpu").bool()
            gone = masked(group, o.amount, o.n, free)
            unit = structures_in(width_unit(o.round_to), len(self.channels(name, [0])))
            count = group.size - (group.size - len(gone)) // unit * unit
            if len(gone) not in (0, count):
                gone = masked(group, count, o.n, free)
            chosen[name] = gone
        return chosen

    def choose(self, group: str, count: int, free: Tensor) -> Tensor:
        """What upstream masks next in the same group."""
        return masked(self.grouped()[group], count, self.options.n, free)

    def check(self) -> None:
        """Refuse too short a training, odd layers, and an amount that takes all or nothing."""
        self.check_length()
        groups, amount = self.grouped(), self.options.amount
        if not groups:
            raise AdapterError("no group of layers is left to prune; shorten `ignored`")
        for name, group in groups.items():
            self.check_trainable(name, ((s.name, s.parameter) for s in group.slices))
        chosen = self.selection()
        for name, group in groups.items():
            if len(chosen[name]) == group.size:
                raise AdapterError(
                    f"amount {amount} is impossible: rounding takes all {group.size} channels of "
                    f"{name!r}. Lower amount or round_to, or name the layer in `ignored`"
                )
        if not any(len(structures) for structures in chosen.values()):
            raise AdapterError(
                f"amount {amount} takes nothing: upstream rounds it to no channel of any layer. "
                "Raise amount"
            )
        super().check()


def masked(group: StructureGroup, amount: float, n: float, free: Tensor) -> Tensor:
    """The structures of a group that ``ln_structured`` masks, lowest numbers first.

    Args:
        group: its layers' weights are ranked side by side, as one weight; that is ours.
        amount: share of the free structures (float), or how many (int).
        n: the order of the norm.
        free: which structures may be masked, (K,) bool; the others count as masked before.
    """
    weights = [s for s in group.slices if s.parameter.dim() > 1]  # no bias, no BatchNorm
    rows = torch.cat([rows_of(s) for s in weights], dim=1)
    stand_in = nn.Module()
    stand_in.register_parameter("weight", nn.Parameter(rows))
    before = free.to(rows.device)[:, None].expand_as(rows)
    prune.custom_from_mask(stand_in, "weight", before)
    prune.ln_structured(stand_in, "weight", amount, n, dim=0)
    gone = (stand_in.get_buffer("weight_mask") == 0).all(dim=1).cpu()
    return (gone & free).nonzero()[:, 0]


def rows_of(weight: Slice) -> Tensor:
    """Each structure's share of a weight as one row, (K, elements)."""
    by_position = weight.parameter.detach().movedim(weight.dim, 0)
    return by_position[weight.index.flatten()].reshape(len(weight.index), -1)
