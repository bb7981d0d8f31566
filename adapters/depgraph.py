"""DepGraph (torch-pruning): GroupNormPruner, with and without sparse learning.

``base`` is upstream's own pruning of the model. For ``sp`` and ``sr`` upstream prunes a copy, to
the same target; what it removed there decays in the real model and is removed at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_core import DecayPruning, Phase, StructureGroup
from third_party import dependency
from third_party.groups import UnsupportedLayerError, UpstreamGroup

from .base import Adapter, AdapterError, Context, Loss, Plan, State, count_macs, structure_group


@dataclass(frozen=True)
class DepGraphOptions:
    """Settings of the framework. Exactly one of ``speed_up`` and ``ratio`` is the target.

    Attributes:
        speed_up: MACs of the dense over MACs of the pruned model, at least.
        ratio: share of channels to remove, in one upstream step.
        steps: upstream's ``iterative_steps`` towards a speed-up.
        global_pruning: rank all groups against one another, rather than each by itself.
        normalizer: upstream's ``normalizer`` of the group magnitude. ``None``: ``max`` with sparse
            learning, ``mean`` without, as upstream's own recipes have it.
        reg: upstream's ``reg``, the strength of sparse learning.
        ignored: names of layers that are left as they are, besides those that make the output.
        skip_unsupported: leave all groups as they are in which a channel of zeros does not equal a
            removed one, such as a transformer's embedding, instead of refusing the model.
    """

    speed_up: float | None = None
    ratio: float | None = None
    steps: int = 400
    global_pruning: bool = True
    normalizer: str | None = None
    reg: float = 5e-4
    ignored: tuple[str, ...] = ()
    skip_unsupported: bool = False

    def __post_init__(self) -> None:
        if (self.speed_up is None) == (self.ratio is None):
            raise AdapterError("give exactly one target: speed_up (of MACs) or ratio (of channels)")
        if self.speed_up is not None and not self.speed_up > 1:
            raise AdapterError(f"speed_up is {self.speed_up}; give above 1 (2.0 halves the MACs)")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise AdapterError(f"ratio is {self.ratio}; give above 0, below 1")
        if self.steps < 1 or self.reg < 0:
            raise AdapterError("give steps of at least 1 and reg of at least 0")


class DepGraph(Adapter):
    """See the module.

    Attributes:
        skipped: the root layers of groups that ``skip_unsupported`` leaves as they are, and why.
    """

    Options: ClassVar[type] = DepGraphOptions
    stages: ClassVar[Mapping[str, bool]] = {"sparse": False, "prune": True}

    def __init__(self, context: Context, options: DepGraphOptions) -> None:
        super().__init__(context, options)
        self.check_ignored(options.ignored)
        try:
            last = dependency.output_layers(context.model, context.example)
        except dependency.TraceError as cause:
            raise AdapterError(str(cause)) from cause
        self._ignored = sorted({*options.ignored, *last})
        self._stage = ""
        self._pruner: Any = None
        self._groups: dict[str, UpstreamGroup] = {}
        self.skipped: dict[str, str] = {}
        if options.skip_unsupported:
            self.skipped = dependency.unsupported(self._new_pruner(context.model))
            self._ignored = sorted({*self._ignored, *self.skipped})

    # ------------------------------------------------------------------ the target

    def _new_pruner(self, model: nn.Module) -> Any:
        o = self.options
        return dependency.pruner(
            model,
            self.context.example,
            ratio=1.0 if o.ratio is None else o.ratio,
            steps=o.steps if o.ratio is None else 1,
            global_pruning=o.global_pruning,
            normalizer=o.normalizer or ("max" if "sparse" in self.context.stages else "mean"),
            reg=o.reg,
            ignored=self._ignored,
        )

    def _prune(self, model: nn.Module) -> Plan:
        """Upstream's own pruning of ``model``, to the target."""
        made, example = self._new_pruner(model), self.context.example
        goal = None if self.options.ratio else count_macs(model, example) / self.options.speed_up

        def reached() -> bool:
            return goal is not None and count_macs(model, example) <= goal

        def progress() -> None:
            self.context.progress(f"selecting {made.current_step}/{made.iterative_steps}")

        plan = dependency.run(made, reached, progress)
        if goal is not None and not reached():
            raise AdapterError(
                f"speed_up {self.options.speed_up} was not reached: {count_macs(model, example)} "
                f"MACs are left, {goal:.0f} wanted; lower speed_up or raise steps"
            )
        return plan

    def check(self) -> None:
        """Refuse too short a stage, odd layers, and a speed-up beyond one channel per group."""
        self.check_length()
        model = copy.deepcopy(self.context.model)
        try:
            groups = dependency.groups(self._new_pruner(model))
        except UnsupportedLayerError as cause:
            raise AdapterError(
                f"{cause}, or set `skip_unsupported` to leave out all groups of that kind"
            ) from cause
        if not groups:
            raise AdapterError("no group of layers is left to prune; shorten `ignored`")
        if self.options.speed_up is not None:
            dense = count_macs(model, self.context.example)
            most = [(g.root, g.channels_of(range(1, g.structures))) for g in groups]
            dependency.remove(model, self.context.example, [p for p in most if p[1]])
            limit = dense / count_macs(model, self.context.example)
            if self.options.speed_up > limit:
                raise AdapterError(
                    f"speed_up {self.options.speed_up} is impossible: with one channel left in "
                    f"every group it is {limit:.1f}. Lower speed_up"
                )

    # ------------------------------------------------------------------ the run

    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Sparse learning starts, or the decision falls; after the removal there is no more."""
        self._stage = stage
        if self.removed is not None:
            return
        if stage == "sparse":
            self._pruner = self._new_pruner(self.context.model)
            return
        self.decided = True
        if self.context.variant == "base":
            return
        plan = self._prune(copy.deepcopy(self.context.model))
        dpm = self._attach(optimizer, loss)
        dpm.decay({root: self._groups[root].structures_of(c) for root, c in plan})

    def _attach(self, optimizer: Optimizer, loss: Loss) -> DecayPruning:
        self._pruner = self._new_pruner(self.context.model)
        self._groups = {g.root: g for g in dependency.groups(self._pruner)}
        return self.attach_core(map(structure_group, self._groups.values()), optimizer, loss)

    def before_step(self, step: int) -> None:
        """Upstream's regularizer is brought up to date once an epoch."""
        if (
            self._stage == "sparse"
            and step
            and step % self.context.stages[self._stage].steps_per_epoch == 0
        ):
            self._pruner.update_regularizer()

    def after_backward(self) -> None:
        """Upstream's regularizer, while sparse learning lasts."""
        if self._stage == "sparse":
            self._pruner.regularize(self.context.model)

    def after_step(self) -> None:
        """Decay upstream's next-ranked structures of the same group for released ones."""
        for event in self.new_events():
            if event.kind != "release":
                continue
            assert self.dpm is not None
            score = dependency.importance(self._pruner, self._groups[event.group])
            score[~self.dpm.available(event.group)] = torch.inf
            lowest = score.argsort(stable=True)[: len(event.structures)]
            self.dpm.decay({event.group: lowest}, wave=event.wave + 1)

    def remove(self) -> None:
        """Upstream removes: by its own ranking in ``base``, what is zero in ``sp`` and ``sr``."""
        if self.dpm is None:
            groups = dependency.groups(self._new_pruner(self.context.model))
            self._groups = {g.root: g for g in groups}
            self.removed = self._prune(self.context.model)
        else:
            gone = {r: (self.dpm.phases(r) == Phase.PRUNED).nonzero()[:, 0] for r in self._groups}
            plan = [(r, self._groups[r].channels_of(k.tolist())) for r, k in gone.items()]
            self.dpm.detach()
            self.removed = [(root, channels) for root, channels in plan if channels]
            self.shrink(self.context.model, self.context.example, self.removed)
        self.pruned = sum(len(self._groups[r].structures_of(c)) for r, c in self.removed)
        self._pruner = None

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """With the stage, which upstream's regularizer depends on."""
        return {**super().state_dict(), "stage": self._stage}

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up where :meth:`state_dict` was called."""
        self._stage = state["stage"]
        if self.removed is None and stage == "sparse":
            self._pruner = self._new_pruner(self.context.model)
        elif state["dpm"] is not None:
            self._attach(optimizer, loss)
        super().load_state_dict(state, stage, optimizer, loss)


def structure_groups(
    model: nn.Module,
    example: Tensor,
    ignored: tuple[str, ...] = (),
    *,
    skip_unsupported: bool = False,
) -> list[StructureGroup]:
    """Every structure group of a model, for use of the core without this adapter.

    Args:
        model: stays in its mode.
        example: an input batch on the model's device.
        ignored: names of layers to leave out, besides those that make the output.
        skip_unsupported: leave out, too, the groups whose channels cannot be decayed.

    Raises:
        UnsupportedLayerError: naming a layer whose channels cannot be decayed.
    """

    def pruner(left: set[str]) -> Any:
        return dependency.pruner(
            model,
            example,
            ratio=0.5,
            steps=1,
            global_pruning=True,
            normalizer="mean",
            reg=0.0,
            ignored=sorted(left),
        )

    left = {*ignored, *dependency.output_layers(model, example)}
    made = pruner(left)
    if skip_unsupported:
        made = pruner({*left, *dependency.unsupported(made)})
    return [structure_group(g) for g in dependency.groups(made)]
