"""torch.nn.utils.prune: ``ln_structured``, the structured pruning that comes with PyTorch.

Upstream masks rows of one layer's weight. Ours is what becomes of its masks: layers whose channels
are tied are ranked as one, and what is masked goes whole, with its bias and BatchNorm. ``base``
removes it at once; for ``sp`` and ``sr`` it decays and is removed at the end.
docs/write-an-adapter.md builds this file step by step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from dpm_core import Phase, Slice, StructureGroup

from .base import Adapter, AdapterError, Context, Loss, State, refusals
from .depgraph import structure_groups


@dataclass(frozen=True)
class TorchPruneOptions:
    """Settings of the framework.

    Attributes:
        amount: upstream's ``amount``: share of its channels that every group of layers loses,
            rounded as upstream rounds it.
        n: upstream's ``n``: the order of the norm that ranks the channels.
        ignored: names of layers that are left as they are, besides those that make the output.
    """

    amount: float
    n: float = 2.0
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise AdapterError(f"amount is {self.amount}; give a share above 0, below 1")
        if not self.n > 0:
            raise AdapterError(f"n is {self.n}; give the order of a norm, above 0")


class TorchPrune(Adapter):
    """See the module."""

    Options: ClassVar[type] = TorchPruneOptions
    stages: ClassVar[Mapping[str, bool]] = {"prune": True}

    def __init__(self, context: Context, options: TorchPruneOptions) -> None:
        super().__init__(context, options)
        self.check_ignored(options.ignored)

    def _groups(self) -> list[StructureGroup]:
        model, example = self.context.model, self.context.example
        with refusals():
            return structure_groups(
                model,
                example,
                self.options.ignored,
                tried=self.checked,
                progress=self.context.progress,
            )

    def _choice(self, groups: Iterable[StructureGroup]) -> dict[str, Tensor]:
        """The structures of each group that upstream masks."""
        o = self.options
        return {g.name: masked(g, o.amount, o.n, torch.ones(g.size).bool()) for g in groups}

    def check(self) -> None:
        """Refuse too short a stage, odd layers, and an amount that takes all of a layer or none."""
        self.check_length()
        groups, amount = self._groups(), self.options.amount
        if not groups:
            raise AdapterError("no group of layers is left to prune; shorten `ignored`")
        for group in groups:
            self.check_trainable(group.name, ((s.name, s.parameter) for s in group.slices))
        chosen = self._choice(groups)
        for group in groups:
            if len(chosen[group.name]) == group.size:
                raise AdapterError(
                    f"amount {amount} is impossible: upstream rounds it to all {group.size} "
                    f"channels of {group.name!r}. Lower amount, or name the layer in `ignored`"
                )
        if not any(len(structures) for structures in chosen.values()):
            raise AdapterError(
                f"amount {amount} takes nothing: upstream rounds it to no channel of any layer. "
                "Raise amount"
            )
        super().check()

    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """The decision falls; after the removal there is no more."""
        super().begin(stage, optimizer, loss)
        if self.removed is not None:
            return
        self.decided = True
        if self.context.variant == "base":
            return
        dpm = self.attach_core(self._groups(), optimizer, loss)
        dpm.decay(self._choice(dpm.groups.values()))

    def after_step(self) -> None:
        """Decay what upstream masks next in the same group for released structures."""
        for event in self.new_events():
            if event.kind != "release":
                continue
            assert self.dpm is not None
            group, free = self.dpm.groups[event.group], self.dpm.available(event.group)
            instead = masked(group, len(event.structures), self.options.n, free)
            self.dpm.decay({event.group: instead}, wave=event.wave + 1)

    def remove(self) -> None:
        """Remove what upstream masks in ``base``, and what is zero in ``sp`` and ``sr``."""
        if self.dpm is None:
            groups = {g.name: g for g in self._groups()}
            gone = self._choice(groups.values())
        else:
            groups = self.dpm.groups
            phases = {name: self.dpm.phases(name) for name in groups}
            gone = {name: (phase == Phase.PRUNED).nonzero()[:, 0] for name, phase in phases.items()}
        every = [(name, channels(groups[name], structures)) for name, structures in gone.items()]
        plan = [(name, positions) for name, positions in every if positions]
        make_small = self.shrink if self.dpm is not None else self.rebuild
        with refusals():
            make_small(self.context.model, self.context.example, plan)
        if self.dpm is not None:
            self.dpm.detach()
        self.removed = plan
        self.pruned = sum(len(structures) for structures in gone.values())

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up where :meth:`state_dict` was called."""
        if state["dpm"] is not None:
            self.attach_core(self._groups(), optimizer, loss)
        super().load_state_dict(state, stage, optimizer, loss)


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


def channels(group: StructureGroup, structures: Tensor) -> list[int]:
    """Output positions of some structures in the layer that the group is named after."""
    root = next(s for s in group.slices if s.name == f"{group.name}.weight")
    return sorted(root.index.cpu()[structures].flatten().tolist())
