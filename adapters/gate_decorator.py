"""Gate-Decorator: global selection by scored gates, in ticks and tocks.

``base`` masks what a tick selects at once, as the original does. For ``sp`` and ``sr`` the gates
and shifts of the selected structures decay, on through the ticks and tocks that follow, and are
masked when they are zero. Once the MACs are down to the target the gates are melted into a
physically smaller, plain network, which is fine-tuned for what is left of the training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_core import Owner, Phase, Slice, StructureGroup
from third_party import gate_decorator as method
from third_party import graph, running

from .base import Adapter, AdapterError, Context, Loss, State, refusals


@dataclass(frozen=True)
class GateDecoratorOptions:
    """Settings of the framework; defaults are the original's.

    The stage's learning rate is the peak of tocks and of fine-tuning; milestones have no effect.

    Attributes:
        macs: share of the dense model's MACs that is left, at most.
        fraction: share of the gates left that a tick selects: 0.005 for VGG16, 0.002 for ResNet-56.
        eta: strength of the FLOPs term; both recipes have none.
        keep: share of each group that is protected in a selection.
        strength: of the tocks' penalty on gates.
        tick_epochs, tock_epochs: their lengths.
        ticks: how many lie between two tocks.
        low_rate: the learning rate of ticks, and at both ends of tocks and of fine-tuning.
        finetune_epochs: what must be left for fine-tuning; it takes all that is left.
        finetune_momentum: of its optimizer.
        ignored: names of layers whose groups are left as they are.
    """

    macs: float
    fraction: float = 0.005
    eta: float = 0.0
    keep: float = 0.1
    strength: float = 1e-3
    tick_epochs: int = 1
    tock_epochs: int = 10
    ticks: int = 10
    low_rate: float = 1e-3
    finetune_epochs: int = 40
    finetune_momentum: float = 0.0
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.macs < 1:
            raise AdapterError(f"macs is {self.macs}; give the share to keep, above 0, below 1")
        if not 0 < self.fraction < 1 or not 0 <= self.keep < 1:
            raise AdapterError("give fraction above 0 and below 1, and keep in [0, 1)")
        if self.eta < 0 or self.strength < 0 or not self.low_rate > 0:
            raise AdapterError("give eta and strength of at least 0, and low_rate above 0")
        if min(self.tick_epochs, self.tock_epochs, self.ticks, self.finetune_epochs) < 1:
            raise AdapterError(
                "give tick_epochs, tock_epochs, ticks and finetune_epochs of at least 1"
            )
        if not 0 <= self.finetune_momentum < 1:
            raise AdapterError("give finetune_momentum in [0, 1)")


class GateDecorator(Adapter):
    """See the module."""

    Options: ClassVar[type] = GateDecoratorOptions
    stages: ClassVar[Mapping[str, bool]] = {"prune": True}
    carries_optimizer: ClassVar[bool] = False  # melting merges gates, and fine-tuning has its own

    def __init__(self, context: Context, options: GateDecoratorOptions) -> None:
        super().__init__(context, options)
        stage = context.stages["prune"]
        self._times = method.TickTock(
            stage.steps_per_epoch, options.tick_epochs, options.tock_epochs, options.ticks
        )
        self._rates = (options.low_rate, stage.learning_rate)
        self._last = stage.steps - options.finetune_epochs * stage.steps_per_epoch
        self._made: Any = None
        self._optimizer: Any = None
        self._steps = 0  # of ticks and tocks, hearings' batches not among them
        self._turn: Any = None
        self._tuned_from: int | None = None  # the stage's step at which fine-tuning began
        self._released = 0  # since the last selection
        self._left = 1.0  # share of the MACs, decaying structures counted as gone

    def _decorated(self, model: nn.Module) -> Any:
        o = self.options
        try:
            return method.GateDecorator(
                model,
                self.context.example,
                fraction=o.fraction,
                eta=o.eta,
                keep=o.keep,
                strength=o.strength,
                ignored=o.ignored,
                progress=self.context.progress,
            )
        except method.GateError as cause:
            raise AdapterError(str(cause)) from cause

    def check(self) -> None:
        """Refuse too short a stage, a model without gates, and a target that no selection meets."""
        needed = self._times.steps_per_epoch * (self._times.tock_epochs + self._times.tick_epochs)
        needed += self.context.decay_steps()
        if needed > self._last:
            raise AdapterError(
                f"the first tock and tick and a decay take up to {needed} steps, but before "
                f"fine-tuning the stage 'prune' has {self._last}; give it more epochs or shorten "
                "smooth.steps, tock_epochs or finetune_epochs"
            )
        model = self.context.model
        with refusals():
            graph.require_plain_weights(model)
        made = self._decorated(running.copied(model))
        for group in made.groups:
            for name in group.members:
                own = model.get_submodule(name).named_parameters(prefix=name)
                self.check_trainable(group.name, own)
        least = made.least() / made.costs.dense
        if self.options.macs < least:
            raise AdapterError(
                f"macs {self.options.macs} is impossible: with what is protected in every group, "
                f"{least:.4f} are left. Raise macs, or lower keep"
            )
        super().check()

    # ------------------------------------------------------------------ the run

    def optimizer(self, stage: str) -> Optimizer:
        """One for all ticks and tocks, and one for fine-tuning. The first puts the gates in."""
        settings = self.context.stages[stage]
        if self.removed is not None:
            settings = replace(settings, momentum=self.options.finetune_momentum)
        elif self._made is None:
            self.make_sure()
            self._made = self._decorated(self.context.model)
        return settings.new_optimizer(self.context.model)

    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Ticks and tocks begin, or fine-tuning."""
        super().begin(stage, optimizer, loss)
        self._optimizer = optimizer
        if self.removed is None and self.context.variant != "base":
            groups = (structure_group(g, self._made.gates) for g in self._made.groups)
            self.attach_core(groups, optimizer, loss)

    def before_step(self, step: int) -> None:
        """The method's own learning rates, and frozen convolutions in a tick."""
        if self.removed is None:
            if step >= self._last:
                over = self._left > self.options.macs
                what = f"{self._left:.4f} of the MACs are left" if over else "decays go on"
                raise AdapterError(
                    f"{what} where fine-tuning should begin, with {self.options.macs} as the "
                    "target; give the stage 'prune' more epochs, or raise fraction"
                )
            self._turn = method.turn_at(self._steps, self._times)
            self._made.begin(self._turn)
            rate = method.learning_rate(self._turn, *self._rates)
        else:
            if self._tuned_from is None:
                self._tuned_from = step
            length = self.context.stages["prune"].steps - self._tuned_from
            rate = method.triangle(step - self._tuned_from, length, *self._rates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def after_backward(self) -> None:
        """Scores in a tick, the penalty in a tock."""
        if self.removed is None:
            self._made.after_backward(self._turn)

    def after_step(self) -> None:
        """Mask what has become zero; after a tick, select."""
        if self.removed is not None:
            return
        self._steps += 1
        self._follow()
        if self._turn.kind == "tick" and self._turn.last and self._left > self.options.macs:
            self._select()
            self._follow()
            self._measure()

    def _follow(self) -> None:
        """Mask the structures that the core has pruned, and count those that it has released."""
        for event in self.new_events():
            if event.kind == "prune":
                self._made.table.mask(self._made.table.ids(event.group, event.structures))
            elif event.kind == "release":
                self._released += len(event.structures)
                self._measure()

    def _select(self) -> None:
        """Take out what the tick's scores single out, and as many again as were released."""
        self.decided = True
        target = int(self.options.macs * self._made.costs.dense)
        try:
            if self.dpm is None:
                self._made.prune(target)
                return
            alive, spared = self._alive(), self._by_structure(self.dpm.available) == 0
            found = self._made.selected(target, alive, spared, more=self._released)
        except method.GateError as cause:
            raise AdapterError(str(cause)) from cause
        self._released = 0
        self.dpm.decay(self._made.table.split(found))

    def _by_structure(self, what: Callable[[str], Tensor]) -> Tensor:
        """What the core says of each group's structures, in the order of the method's table."""
        found = torch.cat([what(group.name) for group in self._made.groups])
        return found.to(running.device_of(self.context.example, self.context.model))

    def _alive(self) -> Tensor:
        """Structures that stay, as things are: decaying ones count as gone."""
        if self.dpm is None:
            alive: Tensor = self._made.table.alive()
            return alive
        return self._by_structure(self.dpm.phases) == Phase.ACTIVE

    def _measure(self) -> None:
        """After a selection or a release, and at no other time, the MACs have changed."""
        self._left = self._made.macs(self._alive()) / self._made.costs.dense

    def settled(self) -> bool:
        """Whether the target is met and nothing decays any more."""
        if self.removed is not None or not self.decided:
            return self.removed is not None
        decaying = self.dpm is not None and self.dpm.count(Phase.DECAYING) > 0
        return not decaying and self._left <= self.options.macs

    def due(self) -> bool:
        """As soon as the target is met."""
        return self.removed is None and self.settled()

    def remove(self) -> None:
        """Melt: plain BatchNorms again, without the masked structures."""
        pruned = int((~self._alive()).sum())
        try:
            self.removed = self._made.melt(self.context.example)
        except method.GateError as cause:
            raise AdapterError(str(cause)) from cause
        if self.dpm is not None:
            self.dpm.detach()
        self.pruned, self._made = pruned, None

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """With its own progress and the scores; gates and masks are in the model."""
        return {
            **super().state_dict(),
            "steps": self._steps,
            "tuned_from": self._tuned_from,
            "released": self._released,
            "scores": self._made.state_dict() if self.removed is None else None,
        }

    def restore_model(self, state: Mapping[str, Any]) -> None:
        """Small, or with gates."""
        super().restore_model(state)
        if self.removed is None:
            self._made = self._decorated(self.context.model)

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up where :meth:`state_dict` was called."""
        self.begin(stage, optimizer, loss)
        self._steps, self._tuned_from = state["steps"], state["tuned_from"]
        self._released = state["released"]
        if self.removed is None:
            self._made.load_state_dict(state["scores"])
        super().load_state_dict(state, stage, optimizer, loss)
        if self.removed is None:
            self._measure()


def structure_group(
    group: method.GateGroup, gates: Mapping[str, method.GatedBatchNorm]
) -> StructureGroup:
    """Tied gates as the core's structure group: a structure is a gate with its shift."""
    slices = [
        Slice(getattr(gates[name], part), index, batch_norm=True, name=f"{name}.{part}")
        for name, index in group.members.items()
        for part in ("gate", "shift")
    ]
    owners = [Owner(gates[name], index) for name, index in group.members.items()]
    return StructureGroup(group.name, slices, owners)
