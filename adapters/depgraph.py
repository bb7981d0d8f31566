"""DepGraph (torch-pruning): GroupNormPruner, with and without sparse learning.

``base`` is upstream's own pruning of the model. For ``sp`` and ``sr`` upstream prunes a copy, to
the same target; what it removed there decays in the real model and is removed at the end.

In rounds (iterative pruning) that happens several times in one training: every round prunes the
model as it is then a part of the way, by upstream's ranking at that time. Ours: equal factors of
the MACs or the channels in every round; and a structure that was released is immune for the rest of
its round, not in the next one, which decides anew.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_core import Phase, StructureGroup
from third_party import dependency, graph, running, trial
from third_party.groups import Plan, UpstreamGroup, named
from third_party.pruner import Pruner

from .base import Adapter, AdapterError, Context, Loss, State, count_macs, refusals, structure_group

NORMALIZER = re.compile(r"mean|max|sum|standarization|gaussian|lamp|sentinel_0?\.\d{1,9}")
"""Upstream's, as it spells them."""


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
        importance: the group magnitude, or ``random``: a ranking that knows nothing, drawn from the
            run's seed, to see what a rectifier makes of it.
        ignored: names of layers that are left as they are, besides those that make the output.
        skip_unsupported: leave all groups as they are in which a channel of zeros does not equal a
            removed one, such as a transformer's embedding, instead of refusing the model.
        rounds: how many times the stage ``prune`` prunes and removes; the last round meets the
            target.
        round_epochs: epochs from the start of a round to that of the next; the first starts with
            the stage.
    """

    speed_up: float | None = None
    ratio: float | None = None
    steps: int = 400
    global_pruning: bool = True
    normalizer: str | None = None
    reg: float = 5e-4
    importance: Literal["magnitude", "random"] = "magnitude"
    ignored: tuple[str, ...] = ()
    skip_unsupported: bool = False
    rounds: int = 1
    round_epochs: int = 1

    def __post_init__(self) -> None:
        if (self.speed_up is None) == (self.ratio is None):
            raise AdapterError("give exactly one target: speed_up (of MACs) or ratio (of channels)")
        if self.speed_up is not None and not self.speed_up > 1:
            raise AdapterError(f"speed_up is {self.speed_up}; give above 1 (2.0 halves the MACs)")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise AdapterError(f"ratio is {self.ratio}; give above 0, below 1")
        if self.steps < 1 or self.reg < 0:
            raise AdapterError("give steps of at least 1 and reg of at least 0")
        if self.normalizer is not None and not NORMALIZER.fullmatch(self.normalizer):
            raise AdapterError(
                f"normalizer is {self.normalizer!r}; give mean, max, sum, standarization, "
                "gaussian, lamp or sentinel_ and a share below 1"
            )
        if self.rounds < 1 or self.round_epochs < 1:
            raise AdapterError("give rounds and round_epochs of at least 1")


class DepGraph(Adapter):
    """See the module."""

    Options: ClassVar[type] = DepGraphOptions
    stages: ClassVar[Mapping[str, bool]] = {"sparse": False, "prune": True}
    exchanges: ClassVar[bool] = True

    def __init__(self, context: Context, options: DepGraphOptions) -> None:
        super().__init__(context, options)
        self.check_ignored(options.ignored)
        model, example = context.model, context.example
        self._pruner: Pruner | None = None
        self._groups: dict[str, UpstreamGroup] = {}
        self._stage = ""
        self._done = 0  # steps of the stage ``prune``, hearings' batches among them
        self._round = 0  # rounds that are over: their removal is done
        self._chosen = False  # whether the present round's decision has fallen
        self._left: dict[str, list[int]] = {}  # by group, what is left of the dense model's numbers
        with refusals():
            if options.skip_unsupported:
                reading, self.skipped = trial.exact_groups(
                    model,
                    example,
                    options.ignored,
                    skip_unsupported=True,
                    progress=context.progress,
                )
                for group in reading.groups:
                    why = self.frozen((s.name, s.parameter) for s in group.shares)
                    if why is not None:
                        self.skipped[group.root] = f"the group of {group.root!r} {why}"
                for why in self.skipped.values():
                    context.progress(f"left out: {why}")
            else:
                reading = graph.read(model, example, options.ignored)
                for why in reading.refused.values():
                    raise AdapterError(f"{why}, or {_SKIP}")
        self._ignored = sorted({*options.ignored, *reading.outputs, *self.skipped})
        # The model is the dense one, in a resumed run, too: it is made smaller later.
        self._macs = count_macs(model, example)
        self._counts: dict[str, int] = {}
        if options.ratio is not None and options.rounds > 1:
            self._counts = self._new_pruner(model).counts()

    # ------------------------------------------------------------------ the target

    def _new_pruner(self, model: nn.Module) -> Pruner:
        o = self.options
        with refusals():
            return Pruner(
                model,
                self.context.example,
                ratio=1.0 if o.ratio is None else self._ratio(o.ratio),
                steps=o.steps if o.ratio is None else 1,
                global_pruning=o.global_pruning,
                normalizer=o.normalizer or ("max" if "sparse" in self.context.stages else "mean"),
                reg=o.reg,
                ignored=self._ignored,
                drawn=self.context.seed if o.importance == "random" else None,
            )

    def _way(self) -> float:
        """How much of the way to the target the model has gone after the present round."""
        rounds: int = self.options.rounds
        return (self._round + 1) / rounds

    def _ratio(self, target: float) -> float:
        """Share of the dense model's channels that are gone after the present round."""
        way = self._way()
        return target if way == 1 else 1 - (1 - target) ** way

    def _selected(self) -> Plan:
        """What upstream removes now from a copy of the model, to the present round's target.

        Raises:
            AdapterError: upstream does not meet the target.
        """
        model, example, o = running.copied(self.context.model), self.context.example, self.options
        pruner = self._new_pruner(model)
        if o.ratio is not None:
            pruner.count_from(self._counts)
            with refusals():
                plan = pruner.run(lambda: False, self.context.progress)
            if pruner.left_whole:
                raise AdapterError(
                    f"ratio {o.ratio} is not met: upstream leaves "
                    f"{', '.join(map(repr, pruner.left_whole))} whole, which would lose all there "
                    "is. Lower ratio, or name such layers in `ignored`"
                )
            return plan
        assert o.speed_up is not None
        goal = self._macs / o.speed_up ** self._way()
        with refusals():
            plan = pruner.run(lambda: count_macs(model, example) <= goal, self.context.progress)
        if count_macs(model, example) > goal:
            raise AdapterError(
                f"speed_up {o.speed_up} was not reached: {count_macs(model, example)} "
                f"MACs are left, {goal:.0f} wanted; lower speed_up or raise steps"
            )
        return plan

    def check(self) -> None:
        """Refuse too short a stage, odd or frozen layers, and a target that cannot be met."""
        self.check_length()
        if self.options.rounds > 1:
            self._check_rounds()
        model, example = self.context.model, self.context.example
        groups = self._new_pruner(model).groups
        for group in groups:
            self.check_trainable(group.root, ((s.name, s.parameter) for s in group.shares))
        if not self.options.skip_unsupported:  # else each was tried at the start
            with refusals():
                odd = trial.inexact(model, example, groups, self.context.progress)
            for root, why in odd.items():
                raise AdapterError(f"{named(root, why)}, or {_SKIP}")
        if not groups:
            left_out = f" ({'; '.join(self.skipped.values())})" if self.skipped else ""
            raise AdapterError(f"no group of layers is left to prune{left_out}; shorten `ignored`")
        if self.options.speed_up is not None:
            most = [(g.root, g.channels_of(range(1, g.structures))) for g in groups]
            small = running.copied(model)
            with refusals():
                dependency.take_out(small, example, [p for p in most if p[1]])
            limit = self._macs / count_macs(small, example)
            if self.options.speed_up > limit:
                raise AdapterError(
                    f"speed_up {self.options.speed_up} is impossible: with one channel left in "
                    f"every group it is {limit:.1f}. Lower speed_up"
                )
        else:
            self._selected()
        super().check()

    def _check_rounds(self) -> None:
        o, stage, needed = self.options, self.context.stages["prune"], self.context.decay_steps()
        apart, last = o.round_epochs * stage.steps_per_epoch, self._start_of(o.rounds - 1)
        if needed > apart:
            raise AdapterError(
                f"the decay takes up to {needed} steps, but the next round starts {apart} steps "
                "after it; raise round_epochs or shorten smooth.steps"
            )
        if last + max(needed, 1) > stage.steps:
            raise AdapterError(
                f"the last of {o.rounds} rounds starts after {last} steps and its decay takes up "
                f"to {needed}, but the stage 'prune' has {stage.steps}; give it more epochs or "
                "shorten smooth.steps, or lower rounds or round_epochs"
            )
        if o.ratio is not None and graph.attentions(self.context.model):
            raise AdapterError(
                "upstream counts a ratio of attention heads within one step only; with rounds give "
                "speed_up"
            )

    # ------------------------------------------------------------------ the run

    @property
    def complete(self) -> bool:
        """Whether the last round's removal is done."""
        rounds: int = self.options.rounds
        return self._round == rounds

    def numbers(self, group: str) -> Sequence[int]:
        """By the present numbers of a group's structures, those they had in the dense model."""
        return self._left.get(group, range(self._groups[group].structures))

    def _start_of(self, number: int) -> int:
        """The step of the stage ``prune`` with which a round starts, counted from 0."""
        epochs: int = number * self.options.round_epochs
        return epochs * self.context.stages["prune"].steps_per_epoch

    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Sparse learning starts, or a round; after the last removal there is no more."""
        super().begin(stage, optimizer, loss)
        self._stage = stage
        if self.complete:
            return
        if stage == "sparse":
            self._pruner = self._new_pruner(self.context.model)
            return
        if self.context.variant != "base":
            self._attach(optimizer, loss)
        self._decide()

    def _attach(self, optimizer: Optimizer, loss: Loss) -> None:
        """Let a core follow the model as it is; its clock goes on from that of the round before."""

        def counted() -> Tensor:
            self._done += 1
            return loss()

        clock = 0 if self.dpm is None else self.dpm.clock
        self._pruner = self._new_pruner(self.context.model)
        self._groups = {g.root: g for g in self._pruner.groups}
        groups = map(structure_group, self._groups.values())
        self.attach_core(groups, optimizer, counted).clock = clock

    def _decide(self) -> None:
        """The present round's decision falls, if it is time."""
        if self.complete or self._chosen or self._done < self._start_of(self._round):
            return
        self.decided = self._chosen = True
        if self.dpm is not None:
            plan = self._selected()
            self.dpm.decay({root: self._groups[root].structures_of(c) for root, c in plan})

    def before_step(self, step: int) -> None:
        """Upstream's regularizer is brought up to date once an epoch."""
        if (
            self._stage == "sparse"
            and step
            and step % self.context.stages[self._stage].steps_per_epoch == 0
        ):
            assert self._pruner is not None
            self._pruner.update_regularizer()

    def after_backward(self) -> None:
        """Upstream's regularizer, while sparse learning lasts."""
        if self._stage == "sparse":
            assert self._pruner is not None
            self._pruner.regularize()

    def after_step(self) -> None:
        """Decay others of the same group for released ones: upstream's next, or the hearing's."""
        if self._stage != "prune":
            return
        self._done += 1
        for event in self.new_events():
            if event.kind != "release":
                continue
            assert self.dpm is not None
            assert self._pruner is not None
            score = self.dpm.worth(event.group)
            if score is None:
                score = self._pruner.importance(self._groups[event.group])
            score[~self.dpm.available(event.group)] = torch.inf
            lowest = score.argsort(stable=True)[: len(event.structures)]
            self.dpm.decay({event.group: lowest}, wave=event.wave + 1)
        self._decide()

    def settled(self) -> bool:
        """Whether nothing is left of what is to go in all rounds."""
        if self.complete or self.dpm is None:
            return self.complete
        last = self._chosen and self._round == self.options.rounds - 1
        return last and self.dpm.count(Phase.DECAYING) == 0

    def due(self) -> bool:
        """Whether the removal of the present round is to follow now."""
        return self._chosen and (self.dpm is None or self.dpm.count(Phase.DECAYING) == 0)

    def remove(self) -> None:
        """Upstream removes: by its own ranking in ``base``, what is zero in ``sp`` and ``sr``."""
        model, example = self.context.model, self.context.example
        if self.dpm is None:
            self._groups = {g.root: g for g in self._new_pruner(model).groups}
            plan = self._selected()
            with refusals():
                self.rebuild(model, example, plan)
        else:
            gone = {r: (self.dpm.phases(r) == Phase.PRUNED).nonzero()[:, 0] for r in self._groups}
            plan = [(r, self._groups[r].channels_of(k.tolist())) for r, k in gone.items()]
            plan = [(root, channels) for root, channels in plan if channels]
            with refusals():
                self.shrink(model, example, plan)
            self.dpm.detach()
        for root, channels in plan:
            structures = set(self._groups[root].structures_of(channels))
            numbers = enumerate(self.numbers(root))
            self._left[root] = [n for k, n in numbers if k not in structures]
            self.pruned += len(structures)
        self.removed = [*(self.removed or []), *plan]
        self._round, self._chosen = self._round + 1, False
        self._pruner = None

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """With the stage, which upstream's regularizer depends on, and the rounds."""
        return {
            **super().state_dict(),
            "stage": self._stage,
            "done": self._done,
            "round": self._round,
            "chosen": self._chosen,
            "left": dict(self._left),
        }

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up where :meth:`state_dict` was called."""
        self._stage, self._done = state["stage"], state["done"]
        self._round, self._chosen, self._left = state["round"], state["chosen"], state["left"]
        if stage == "sparse":
            self._pruner = self._new_pruner(self.context.model)
        elif state["dpm"] is not None:
            self._attach(optimizer, loss)
        super().load_state_dict(state, stage, optimizer, loss)


def structure_groups(
    model: nn.Module,
    example: Any,
    ignored: Collection[str | nn.Module] = (),
    *,
    skip_unsupported: bool = False,
    tried: bool = False,
    progress: Callable[[str], object] = str,
) -> list[StructureGroup]:
    """Every structure group of a model, for use of the core without this adapter.

    Each is tried out: its structures, removed, leave the network that they leave at zero.

    Args:
        model: stays in its mode.
        example: of its inputs, on its device: a batch, several inputs in a tuple or list, or a
            mapping of arguments.
        ignored: layers, or their names, to leave out, besides those that make the output.
        skip_unsupported: leave out, too, the groups whose channels cannot be decayed; a warning
            says which, and why.
        tried: whether that was done before, with this model and ``ignored``: it takes a while.
        progress: called now and then with what is going on; large networks take some seconds.

    Raises:
        UnsupportedLayerError: naming a layer whose channels cannot be decayed, or whose removal
            is not the same as zeros.
    """
    reading, skipped = trial.exact_groups(
        model,
        example,
        list(ignored),
        skip_unsupported=skip_unsupported,
        tried=tried,
        progress=progress,
    )
    if skipped:
        listed = "\n".join(f"- {why}" for why in skipped.values())
        warnings.warn(f"left unpruned:\n{listed}", LeftUnprunedWarning, stacklevel=2)
    return [structure_group(g) for g in reading.groups]


class LeftUnprunedWarning(UserWarning):
    """Groups of layers were left out, and why."""


_SKIP = "set `skip_unsupported` to leave out all groups of that kind"
