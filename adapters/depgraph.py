"""DepGraph (torch-pruning): GroupNormPruner, with and without sparse learning.

``base`` is upstream's own pruning of the model. For ``sp`` and ``sr`` upstream prunes a copy, to
the same target; what it removed there decays in the real model and is removed at the end.

Structures are output channels, hidden units among them, and whole heads of attention: where several
heads of queries share one of keys and values, all of these together. Heads are found in whatever
layers a network keeps them (``third_party.heads``), which is ours; upstream ranks them among one
another, by the mean of its importance over their channels. The channels of an embedding that norms
take their mean over cannot go; ``skip_unsupported`` leaves them, and whatever else cannot, as they
are, so that one call serves transformers, too.

In rounds (iterative pruning) that happens several times in one training: every round prunes the
model of that time a part of the way, by upstream's ranking at that time. Ours: the MACs or the
channels shrink by the same factor in every round; and a structure that was released is immune for
the rest of its round, but not in the next one, which decides anew.

A pruner of one's own takes the model's place: ``DepGraph(pruner, SmoothPruning(200))`` is a
:class:`~dpm_core.adapters.torch_pruning.TorchPruning` of it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dpm_core import SelfRectifying, SmoothPruning, StructureGroup
from dpm_core.third_party import dependency, graph, running, tracing, trial
from dpm_core.third_party.groups import Plan, UpstreamGroup, named
from dpm_core.third_party.pruner import Pruner

from .base import Adapter, AdapterError, Structures, count_macs, structure_group, width_unit
from .gradients import mean_gradients
from .macs import MacsLeft
from .removal import Removal

NORMALIZER = re.compile(r"mean|max|sum|standarization|gaussian|lamp|sentinel_0?\.\d{1,9}")
"""Upstream's, as it spells them."""
Importance = Literal["magnitude", "taylor", "hessian", "fpgm", "lamp", "bn-scale", "random"]


@dataclass(frozen=True)
class DepGraphOptions:
    """Settings of the framework. Exactly one of ``speed_up`` and ``ratio`` is the target.

    Attributes:
        speed_up: MACs of the dense over MACs of the pruned model, at least.
        ratio: share of channels to remove, and of heads, in one upstream step.
        steps: upstream's ``iterative_steps`` towards a speed-up.
        global_pruning: rank all groups against one another, rather than each by itself.
        normalizer: upstream's ``normalizer`` of the importance. ``None``: ``max`` with sparse
            learning, ``mean`` without, as upstream's own recipes have it.
        reg: upstream's ``reg``, the strength of sparse learning.
        importance: upstream's ranking: ``magnitude`` (of groups), ``taylor``, ``hessian``,
            ``fpgm``, ``lamp``, ``bn-scale`` (it leaves groups without a BatchNorm as they are); or
            ``random``: drawn from the adapter's ``seed``, to see what a rectifier makes of a blind
            ranking (the experiments draw alike in every run, unless ``draw_by_seed`` is set).
            Sparse learning goes by the magnitude, unless a ranking is drawn.
        batches: training batches that ``taylor`` and ``hessian`` get their gradients from before a
            decision; they count as steps of the training. With sparse learning its last steps are
            these. Ours: ``hessian`` takes the mean square of batches' gradients, as a training loop
            gives the mean loss of a batch, and not that of every sample; and what replaces a
            released structure is ranked by the gradients of the decision.
        round_to: upstream's: a layer that loses channels keeps a multiple of so many, and no fewer.
            Heads are not rounded.
        isomorphic: upstream's isomorphic pruning: of the groups that have the same layers, each
            kind is ranked by itself.
        max_pruning_ratio: no layer loses a larger share of its channels. Ours: that holds after
            every step and over all rounds, where upstream looks before a step only, as it does here
            for heads.
        ignored: names of layers that are left as they are, besides those that make the output.
        skip_unsupported: leave groups as they are in which a channel of zeros does not equal a
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
    importance: Importance = "magnitude"
    batches: int = 10
    round_to: int | None = None
    isomorphic: bool = False
    max_pruning_ratio: float = 1.0
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
        if self.steps < 1 or not self.reg >= 0:
            raise AdapterError("give steps of at least 1 and reg of at least 0")
        if self.normalizer is not None and not NORMALIZER.fullmatch(self.normalizer):
            raise AdapterError(
                f"normalizer is {self.normalizer!r}; give mean, max, sum, standarization, "
                "gaussian, lamp or sentinel_ and a share below 1"
            )
        if self.importance not in get_args(Importance):
            raise AdapterError(
                f"importance is {self.importance!r}; give {', '.join(get_args(Importance))}"
            )
        if self.importance == "lamp" and self.normalizer not in (None, "lamp"):
            raise AdapterError("importance 'lamp' is a normalizer itself; leave normalizer out")
        if self.batches < 1 or self.rounds < 1 or self.round_epochs < 1:
            raise AdapterError("give batches, rounds and round_epochs of at least 1")
        width_unit(self.round_to)
        if self.isomorphic and not self.global_pruning:
            raise AdapterError("isomorphic ranks groups together; give global_pruning, too")
        if not 0 < self.max_pruning_ratio <= 1:
            raise AdapterError(
                f"max_pruning_ratio is {self.max_pruning_ratio}; give above 0, at most 1"
            )
        if self.ratio is not None and self.ratio > self.max_pruning_ratio:
            raise AdapterError(
                f"ratio {self.ratio} is more than max_pruning_ratio, {self.max_pruning_ratio}"
            )

    @property
    def reads(self) -> int:
        """Training batches that are read before a decision."""
        return self.batches if self.importance in ("taylor", "hessian") else 0


class DepGraph(Adapter):
    """See the module."""

    Options: ClassVar[type] = DepGraphOptions
    options: DepGraphOptions
    learns_sparse: ClassVar[bool] = True

    def __new__(cls, model: Any = None, *given: Any, **settings: Any) -> Any:
        """A pruner in the model's place has an adapter of its own."""
        if not tracing.is_pruner(model):
            return super().__new__(cls)
        from .torch_pruning import TorchPruning

        return TorchPruning(model, *given, **settings)

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        options: DepGraphOptions,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, example, options, smooth, rectify, **settings)
        model = self.model  # without what compiles it
        if options.rounds > 1 and self.training is None:
            raise AdapterError(
                "rounds start some epochs apart; give training=Training(steps, steps_per_epoch)"
            )
        self._pruner: Pruner | None = None
        self._groups: dict[str, UpstreamGroup] = {}
        self._learning = self.training is not None and self.training.sparse is not None
        self._round = 0  # rounds that are over: their removal is done
        self._chosen = False  # whether the present round's decision has fallen
        self._left: dict[str, list[int]] = {}  # by group, what is left of the dense model's numbers
        # By gradients of batches that are read once: what goes, and how structures rank.
        self._plan: Structures | None = None
        self._scores: dict[str, Tensor] = {}
        if options.skip_unsupported:
            reading, self.skipped = trial.exact_groups(
                model,
                example,
                options.ignored,
                skip_unsupported=True,
                progress=self.progress,
                unfit=self._unfit,
            )
            for why in self.skipped.values():
                self.progress(f"left out: {why}")
        else:
            reading = graph.read(model, example, options.ignored)
            for why in reading.refused.values():
                raise AdapterError(f"{why}, or {_SKIP}")
            self.skipped = graph.unreached(reading.graph, model)
        self._ignored = sorted({*options.ignored, *reading.outputs, *self.skipped})
        # The model is the dense one, in a resumed run, too: it is made smaller later.
        self._macs = count_macs(model, example)
        self._counts: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        if options.max_pruning_ratio < 1 and options.rounds > 1:
            self._sizes = {g.root: g.structures for g in self._new_pruner(model).groups}
        if options.ratio is not None and options.rounds > 1:
            self._counts = self._new_pruner(model).counts()

    def _unfit(self, reading: graph.Reading, group: UpstreamGroup) -> str | None:
        if group.structures == 1 < group.channels:
            return graph.why_one(reading, self.model, group)
        return self.frozen((s.name, s.parameter) for s in group.shares)

    # ------------------------------------------------------------------ the target

    def _new_pruner(self, model: nn.Module, *, gradients: bool = False) -> Pruner:
        """Upstream's pruner.

        Args:
            model: what to prune.
            gradients: whether its parameters have those that the ranking needs; without them, and
                in sparse learning, the magnitude ranks. Given, it ranks as in a decision.
        """
        o = self.options
        importance: str | int = self.seed if o.importance == "random" else o.importance
        if o.importance != "random" and (self._learning or o.reads) and not gradients:
            importance = "magnitude"
        sparse = self.training is not None and self.training.sparse is not None
        return Pruner(
            model,
            self.example,
            ratio=1.0 if o.ratio is None else self._ratio(o.ratio),
            steps=o.steps if o.ratio is None else 1,
            global_pruning=o.global_pruning,
            normalizer=o.normalizer or ("max" if sparse else "mean"),
            reg=o.reg,
            ignored=self._ignored,
            importance=importance,
            round_to=o.round_to,
            isomorphic=o.isomorphic,
            max_pruning_ratio=o.max_pruning_ratio,
            sizes=self._sizes,
        )

    def _way(self) -> float:
        """The share of the way to the target that is done after the present round."""
        rounds: int = self.options.rounds
        return (self._round + 1) / rounds

    def _ratio(self, target: float) -> float:
        """Share of the dense model's channels that are gone after the present round."""
        way = self._way()
        return target if way == 1 else 1 - (1 - target) ** way

    def _selected(
        self, gradients: Mapping[str, Tensor] | None = None, *, by_sizes: bool = True
    ) -> Plan:
        """What upstream removes now from a copy of the model, to the present round's target.

        Args:
            gradients: of the parameters, by name, for a ranking by gradients.
            by_sizes: as of :class:`~dpm_core.adapters.macs.MacsLeft`.

        Raises:
            AdapterError: upstream does not meet the target.
        """
        model, example, o = running.copied(self.model), self.example, self.options
        for name, parameter in model.named_parameters() if gradients else ():
            parameter.grad = gradients[name].clone()  # type: ignore[index]
        pruner = self._new_pruner(model, gradients=gradients is not None)
        if gradients and self.rectify is not None:
            self._scores = {g.root: pruner.importance(g) for g in pruner.groups}
        if o.ratio is not None:
            pruner.count_from(self._counts)
            before = {g.root: g for g in pruner.groups if not g.heads}
            plan = pruner.run(lambda: False, self.progress)
            if pruner.kept:
                self._require_share(plan, before, pruner.kept)
            if pruner.left_whole:
                raise AdapterError(
                    f"ratio {o.ratio} is not met: upstream leaves "
                    f"{', '.join(map(repr, pruner.left_whole))} whole, which would lose all there "
                    "is. Lower ratio, or name such layers in `ignored`"
                )
            return plan
        assert o.speed_up is not None
        goal = self._macs / o.speed_up ** self._way()
        macs = MacsLeft(model, example, goal, by_sizes=by_sizes)
        plan = pruner.run(macs.reached, self.progress)
        if macs.missed():
            return self._selected(gradients, by_sizes=False)
        if macs.left > goal:
            raise AdapterError(
                f"speed_up {o.speed_up} was not reached: {macs.left} MACs are left, {goal:.0f} "
                "wanted; lower speed_up or raise steps"
            )
        return plan

    def _require_share(
        self, plan: Plan, groups: Mapping[str, UpstreamGroup], kept: Sequence[str]
    ) -> None:
        """Refuse a plan that takes too little, because some layers have to keep more."""
        assert self.options.ratio is not None
        there = sum(g.structures for g in groups.values())
        whole = sum(self._counts.values()) or there
        wanted = there - int(whole * (1 - self._ratio(self.options.ratio)))
        gone = sum(len(groups[r].structures_of(c)) for r, c in plan if r in groups)
        if gone < wanted:
            raise AdapterError(
                f"ratio {self.options.ratio} is not met: {gone} of {wanted} structures go, as "
                f"round_to or max_pruning_ratio keeps more of {', '.join(map(repr, kept))}. Lower "
                "ratio or round_to, raise max_pruning_ratio, or give speed_up, which is reached "
                "in steps"
            )

    def check(self) -> None:
        """Refuse too short a training, odd or frozen layers, and a target that cannot be met."""
        self.check_length()
        if self.options.rounds > 1:
            self._check_rounds()
        model, example = self.model, self.example
        pruner = self._new_pruner(model)
        groups = pruner.groups
        for group in groups:
            self.check_trainable(group.root, ((s.name, s.parameter) for s in group.shares))
        if not self.options.skip_unsupported:  # else each was tried at the start
            odd = trial.inexact(model, example, groups, self.progress)
            for root, why in odd.items():
                raise AdapterError(f"{named(root, why)}, or {_SKIP}")
        if not groups:
            left_out = f" ({'; '.join(self.skipped.values())})" if self.skipped else ""
            raise AdapterError(f"no group of layers is left to prune{left_out}; shorten `ignored`")
        other = self._learning or self.options.reads
        ranking = self._new_pruner(model, gradients=True) if other else pruner
        if not ranking.require_ranking():
            raise AdapterError(
                f"importance {self.options.importance!r} says nothing about any group of this "
                "network, as none has a BatchNorm; choose another one"
            )
        if self.options.speed_up is not None:
            most = [(g.root, pruner.most(g)) for g in groups]
            small = running.copied(model)
            dependency.take_out(small, example, [p for p in most if p[1]])
            limit = self._macs / count_macs(small, example)
            if self.options.speed_up > limit:
                o = self.options
                bounded = width_unit(o.round_to) > 1 or o.max_pruning_ratio < 1
                least = "as few channels as may be" if bounded else "one channel"
                raise AdapterError(
                    f"speed_up {o.speed_up} is impossible: with {least} left in "
                    f"every group it is {limit:.1f}. Lower speed_up"
                )
        elif not (self.options.reads and self.options.global_pruning):
            self._selected()  # of each group by itself the ranking does not say how much goes
        super().check()

    def decay_steps(self) -> int:
        """The base's, and before them the batches that a ranking reads."""
        reads: int = self.options.reads
        return super().decay_steps() + reads

    def check_length(self) -> None:
        """For :meth:`check`: refuse a training that is too short for decay and ranking."""
        super().check_length()
        sparse = None if self.training is None else self.training.sparse
        if sparse is not None and self.options.reads >= sparse.steps:
            raise AdapterError(
                f"importance {self.options.importance!r} reads {self.options.reads} batches in the "
                f"end of sparse learning, which has {sparse.steps} steps; lower batches, or give "
                "it more epochs"
            )

    def _check_rounds(self) -> None:
        assert self.training is not None
        o, steps, needed = self.options, self.training.steps, self.decay_steps()
        apart, last = self._start_of(1), self._start_of(o.rounds - 1)
        if needed > apart:
            raise AdapterError(
                f"the decay takes up to {needed} steps, but the next round starts {apart} steps "
                "after it; raise round_epochs or shorten smooth.steps"
            )
        if last + max(needed, 1) > steps:
            raise AdapterError(
                f"the last of {o.rounds} rounds starts after {last} steps and its decay takes up "
                f"to {needed}, but the training has {steps}; give it more epochs or "
                "shorten smooth.steps, or lower rounds or round_epochs"
            )

    # ------------------------------------------------------------------ the run

    @property
    def complete(self) -> bool:
        """Whether the last round's removal is done."""
        rounds: int = self.options.rounds
        return self._round == rounds

    def numbers(self, group: str) -> Sequence[int]:
        """The numbers that a group's structures had in the dense model, by their present ones."""
        return self._left.get(group, range(self._groups[group].structures))

    def _start_of(self, number: int) -> int:
        """The step with which a round starts, counted from 0."""
        if number == 0:
            return 0
        assert self.training is not None
        epochs: int = number * self.options.round_epochs
        return epochs * self.training.steps_per_epoch

    def groups(self) -> list[StructureGroup]:
        """Upstream's dependency groups."""
        self._pruner = self._new_pruner(self.model)
        self._groups = {g.root: g for g in self._pruner.groups}
        return [structure_group(g) for g in self._groups.values()]

    def selection(self) -> Structures:
        """What upstream removes from a copy, to the present round's target."""
        if self.dpm is None:
            self.groups()
        return self._structures(self._selected()) if self._plan is None else self._plan

    def _structures(self, plan: Plan) -> Structures:
        return {root: self._groups[root].structures_of(c) for root, c in plan}

    def decide(self) -> None:
        """The base's; a ranking by gradients reads its batches before."""
        if self.options.reads:
            assert self._loss is not None
            squared = self.options.importance == "hessian"
            gradients = mean_gradients(self.model, self._loss, self.options.reads, squared=squared)
            self._heard += self.options.reads
            if self.dpm is None:
                self.groups()
            self._plan = self._structures(self._selected(gradients))
        super().decide()

    def follow(self) -> None:
        """The base's, if there is a loss for a ranking that needs one."""
        if self.options.reads and not self.complete and self._loss is None:
            raise AdapterError(
                f"importance {self.options.importance!r} ranks by gradients of training batches; "
                "give attach(optimizer, loss), which runs the model on the next batch"
            )
        super().follow()

    def choose(self, group: str, count: int, free: Tensor) -> Tensor:
        """What upstream ranks lowest in the same group."""
        assert self._pruner is not None
        if group in self._scores:
            score = self._scores[group].clone()
        else:
            score = self._pruner.importance(self._groups[group])
        score[~free] = torch.inf
        return score.argsort(stable=True)[:count]

    def start(self) -> None:
        """Sparse learning starts, or the first round."""
        self.follow()
        if not self._learning:
            self._decide_in_time()

    def _decide_in_time(self) -> None:
        """Decide what goes in the present round, if it is time."""
        if self.complete or self._chosen:
            return
        reads = self.options.reads if self.training and self.training.sparse else 0
        done = self.clock + self.heard - reads  # what is read in sparse learning is of its steps
        if self._round == 0 or done >= self._start_of(self._round):
            self.decide()
            self._chosen = True

    def before_step(self) -> None:
        """Upstream's regularizer, while sparse learning lasts; brought up to date once an epoch."""
        if self._learning:
            assert self.training is not None
            assert self.training.sparse is not None
            if self._pruner is None:
                self._pruner = self._new_pruner(self.model)
            if self.clock and self.clock % self.training.sparse.steps_per_epoch == 0:
                self._pruner.update_regularizer()
            self._pruner.regularize()

    def after_step(self) -> None:
        """Sparse learning ends, or a round starts."""
        if self._learning:
            assert self.training is not None
            assert self.training.sparse is not None
            if self.clock + self.options.reads < self.training.sparse.steps:
                return
            self._learning, self.clock = False, 0
            if self.dpm is not None:
                self.dpm.clock = 0
        self._decide_in_time()

    @property
    def settled(self) -> bool:
        """Whether all that is to go in all rounds is zero, or removed."""
        last = self._chosen and self._round == self.options.rounds - 1
        return self.complete or (last and self.dpm is not None and self._none_decays())

    @property
    def due(self) -> bool:
        """Whether the removal of the present round is to follow now."""
        return self._chosen and self._none_decays()

    def channels(self, group: str, structures: Sequence[int] | Tensor) -> list[int]:
        """Some structures as output channels of the group's root layer."""
        return self._groups[group].channels_of(torch.as_tensor(structures, device="cpu").tolist())

    def remove(self) -> Removal:
        """Remove; the next round starts at its time."""
        removal = super().remove()
        self._decide_in_time()
        return removal

    def _account(self, removal: Removal, going: Structures) -> None:
        super()._account(removal, going)
        self._round, self._chosen, self._pruner = self._round + 1, False, None
        self._plan, self._scores = None, {}
        if self.complete:
            return  # the last core stays, and with it the numbers that its events go by
        for root, structures in going.items():
            gone = set(torch.as_tensor(structures, device="cpu").tolist())
            self._left[root] = [n for k, n in enumerate(self.numbers(root)) if k not in gone]
        if self.dpm is not None:
            self._heard, self.dpm = self.heard, None

    # ------------------------------------------------------------------ saving

    def own_state(self) -> dict[str, Any]:
        """How far sparse learning and the rounds are."""
        return {
            "learning": self._learning,
            "round": self._round,
            "chosen": self._chosen,
            "left": dict(self._left),
            "plan": self._plan,
            "scores": dict(self._scores),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the next attach()."""
        super().load_state_dict(state)
        self._learning, self._round = state["learning"], state["round"]
        self._chosen, self._left = state["chosen"], state["left"]
        # States of earlier releases have no ranking by gradients.
        self._plan, self._scores = state.get("plan"), state.get("scores", {})


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

    Each is tried out: removing its structures has to be the same as setting them to zero.

    Args:
        model: stays in its mode.
        example: of its inputs, on its device: a batch, several inputs in a tuple or list, or a
            mapping of arguments.
        ignored: layers, or their names, to leave out, besides those that make the output.
        skip_unsupported: leave out, too, the groups whose channels cannot be decayed; a warning
            says which, and why.
        tried: whether this model was tried out before, with this ``ignored``; it takes a while.
        progress: called now and then with what is going on; large networks take some seconds.

    Raises:
        UnsupportedLayerError: naming a layer whose channels cannot be decayed, or whose removal
            is not the same as zeros.
    """
    reading, skipped = trial.exact_groups(
        running.inside(model),
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
