"""OTOv2 (only_train_once): the DHSPG optimizer on zero-invariant groups.

``base`` is upstream's optimizer untouched. For ``sp`` and ``sr``, where upstream's half-space
projection would zero a structure in one step, its decay starts instead. As upstream has it, the
network is trained at its full size to the end, and made smaller then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpm_core import DecayPruning, Phase
from third_party import otov2, running, trial
from third_party.groups import UnsupportedLayerError

from .base import Adapter, AdapterError, Context, Loss, State, refusals, structure_group


@dataclass(frozen=True)
class OTOv2Options:
    """Settings of the framework, by upstream's names and with upstream's defaults.

    Attributes:
        target_group_sparsity: share of structures to remove.
        tolerance_group_sparsity: how much larger G_p, the structures that are penalised, is than
            the target. With 0 just G_p goes; else upstream itself overshoots by what it zeroes in
            its last step, and ``base`` ends smaller than ``sp`` and ``sr``, which do not.
        start_epoch: epochs of plain training before G_p is chosen.
        warm_up_steps: until then the penalty is ``lmbda`` and nothing is zeroed.
        epsilon: of the half-space, in [0, 1); higher zeroes earlier.
        lmbda, lmbda_amplify, hat_lmbda_coeff: of the penalty; ``None`` takes upstream's default.
        weight_decay_type: ``l1_norm`` or ``l2_norm``; upstream heeds it for AdamW alone.
    """

    target_group_sparsity: float
    tolerance_group_sparsity: float = 0.05
    start_epoch: int = 0
    warm_up_steps: int = 0
    epsilon: float = 0.0
    lmbda: float | None = None
    lmbda_amplify: float | None = None
    hat_lmbda_coeff: float | None = None
    weight_decay_type: Literal["l1_norm", "l2_norm"] = "l2_norm"

    def __post_init__(self) -> None:
        if not 0 < self.target_group_sparsity < 1:
            raise AdapterError(
                f"target_group_sparsity is {self.target_group_sparsity}; give above 0, below 1"
            )
        if not 0 <= self.tolerance_group_sparsity <= 1 or not 0 <= self.epsilon < 1:
            raise AdapterError("give tolerance_group_sparsity in [0, 1] and epsilon in [0, 1)")
        given = (self.lmbda, self.lmbda_amplify, self.hat_lmbda_coeff)
        if any(v is not None and not v > 0 for v in given):
            raise AdapterError("give lmbda, lmbda_amplify and hat_lmbda_coeff above 0")
        if self.start_epoch < 0 or self.warm_up_steps < 0:
            raise AdapterError("give start_epoch and warm_up_steps of at least 0")
        if self.weight_decay_type not in ("l1_norm", "l2_norm"):
            raise AdapterError(
                f"weight_decay_type is {self.weight_decay_type!r}; give 'l1_norm' or 'l2_norm'"
            )


class OTOv2(Adapter):
    """See the module."""

    Options: ClassVar[type] = OTOv2Options
    stages: ClassVar[Mapping[str, bool]] = {"prune": True}
    channels_last: ClassVar[bool] = False  # upstream takes views of its parameters
    carries_optimizer: ClassVar[bool] = False  # DHSPG is of the full size, and all is trained then

    def __init__(self, context: Context, options: OTOv2Options) -> None:
        super().__init__(context, options)
        self._made: Any = None
        self._optimizer: Any = None
        self._done = 0  # training steps, hearings' batches among them
        self._goal = 0  # structures to remove; known once G_p is chosen
        self._round: int | None = None  # when decays were last started

    @property
    def _start(self) -> int:
        return int(self.options.start_epoch * self.context.stages["prune"].steps_per_epoch)

    @property
    def _needed(self) -> int:
        """Steps from the last decision to the end: earlier rounds may hold hearings, too.

        Rounds start a decay apart, all but the last. So the one before it still holds up to as many
        hearings as there are waves, the one before that up to one less, and so on.
        """
        if self.context.variant != "sr":
            return self.context.decay_steps()
        waves, batches = self.context.rectify.waves, self.context.rectify.criterion.batches
        return self.context.decay_steps() + batches * waves * (waves + 1) // 2

    def check(self) -> None:
        """Refuse too short a stage, an impossible target, and groups that removal contradicts."""
        given = self.context.stages["prune"].steps
        first = max(self._start + 1, self.options.warm_up_steps)
        if first + self._needed > given:
            raise AdapterError(
                f"the first decision falls after {first} steps and a decay takes up to "
                f"{self._needed}, but the stage 'prune' has {given}; give it more epochs or "
                "shorten smooth.steps, start_epoch or warm_up_steps"
            )
        model, example = running.copied(self.context.model), self.context.example
        try:
            made = otov2.graph(model, example)
            found = otov2.groups(made, model)
        except UnsupportedLayerError as cause:
            raise AdapterError(str(cause)) from cause
        except Exception as cause:  # whatever tracing and upstream stumble over
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise AdapterError(f"upstream cannot read this model: {reason}") from cause
        if not found:
            raise AdapterError(f"upstream finds nothing to prune: {otov2.unpruned(made)}")
        total = sum(g.structures for g in found)
        most = (total - len(found)) / total
        if self.options.target_group_sparsity > most:
            raise AdapterError(
                f"target_group_sparsity {self.options.target_group_sparsity} is impossible: with "
                f"one structure left in every group it is {most:.3f}. Lower it"
            )
        own = dict(self.context.model.named_parameters())
        for group in found:
            why = self.frozen((s.name, own[s.name]) for s in group.shares)
            if why is not None:
                raise AdapterError(
                    f"the group of {group.root!r} {why}. Upstream leaves out no layers, so let it "
                    "train"
                )
        with refusals():
            odd = trial.inexact(model, example, found, self.context.progress)
        for root, why in odd.items():
            raise AdapterError(  # of the first: a model with others cannot be pruned, either
                f"the group of {root!r} {why}. Upstream's groups and the dependency graph disagree "
                "on this model, so it cannot be pruned"
            )
        super().check()

    # ------------------------------------------------------------------ the run

    def optimizer(self, stage: str) -> Optimizer:
        """DHSPG; the stage's own optimizer once the model is small."""
        if self.removed is not None:
            return super().optimizer(stage)
        self.make_sure()
        settings, o = self.context.stages[stage], self.options
        self._made = otov2.graph(self.context.model, self.context.example)
        kind = otov2.DHSPG if self.context.variant == "base" else otov2.DeferringDHSPG
        made: Optimizer = kind(
            self._made,
            variant=settings.kind,
            lr=settings.learning_rate,
            first_momentum=settings.momentum if settings.kind == "sgd" else None,
            weight_decay=settings.weight_decay,
            weight_decay_type=o.weight_decay_type,
            target_group_sparsity=o.target_group_sparsity,
            tolerance_group_sparsity=o.tolerance_group_sparsity,
            start_pruning_steps=self._start,
            warm_up_steps=o.warm_up_steps,
            epsilon=o.epsilon,
            lmbda=o.lmbda,
            lmbda_amplify=o.lmbda_amplify,
            hat_lmbda_coeff=o.hat_lmbda_coeff,
        )
        return made

    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Decays follow the optimizer's steps; in ``base`` there is nothing to do."""
        super().begin(stage, optimizer, loss)
        if self.removed is not None:
            return
        self._optimizer = optimizer
        if self.context.variant == "base":
            return

        def counted() -> Tensor:
            self._done += 1
            return loss()

        groups = otov2.groups(self._made, self.context.model)
        self.attach_core(map(structure_group, groups), optimizer, counted)

    def before_step(self, step: int) -> None:
        """Upstream penalises while too few structures are zero or on their way."""
        if self.dpm is not None and self.removed is None:
            self._optimizer.reached = self.decided and self._gone() >= self._goal

    def after_step(self) -> None:
        """Replace what was released; decay what upstream would have zeroed."""
        self._done += 1
        if self.removed is not None:
            return
        if not self.decided and self._optimizer.partitioned:
            self.decided = True
            wanted = self.options.target_group_sparsity * self._optimizer.structures()
            # Upstream spares a structure of every component, so G_p may be smaller.
            self._goal = min(math.ceil(wanted - 1e-9), self._optimizer.penalised())
            self._limit_releases()
        if self.dpm is not None and self.decided:
            self._refill(self.dpm)
            self._decay_wanted(self.dpm)

    def _limit_releases(self) -> None:
        """What was released never goes, and one structure of every component stays anyway."""
        if self.dpm is not None and self.decided:
            spare = self._optimizer.structures() - self._goal - len(self.dpm.groups)
            self.dpm.release_limit = max(0, spare)

    def _refill(self, dpm: DecayPruning) -> None:
        """The next-ranked structures of the component enter G_p, and decay.

        Ours: they do not wait for the half-space. Theirs are the largest norms, and at the end of
        a run the penalty would bring them down late, at a low learning rate.
        """
        released = [event for event in self.new_events() if event.kind == "release"]
        for event in released:
            score = self._optimizer.scores[event.group].cpu().clone()
            # What is in G_p goes anyway: it is taken only where nothing else is left.
            score[self._optimizer.penalised_in(event.group)] -= 2 * score.abs().max() + 1
            score[~dpm.available(event.group)] = -torch.inf
            best = score.argsort(descending=True, stable=True)[: len(event.structures)]
            self._optimizer.exchange(event.group, event.structures, best.tolist())
            dpm.decay({event.group: best}, wave=event.wave + 1)
        for _ in range(self._goal - self._optimizer.penalised() if released else 0):
            self._widen(dpm)

    def _widen(self, dpm: DecayPruning) -> None:
        """The best-ranked structure anywhere enters G_p, and waits there for its turn.

        Where a component had nothing outside of G_p to replace a released structure with, G_p has
        become too small for the target.
        """
        ranked = []
        for name, scores in self._optimizer.scores.items():
            stays = ~self._optimizer.penalised_in(name) & (dpm.phases(name) == Phase.ACTIVE)
            free = (stays & dpm.available(name)).nonzero()[:, 0]
            if len(free) and int(stays.sum()) > 1:  # every component keeps one
                best = free[scores.cpu()[free].argmax()]
                ranked.append((float(scores[best]), name, int(best)))
        if ranked:
            _, name, best = max(ranked)
            self._optimizer.exchange(name, [], [best])

    def _decay_wanted(self, dpm: DecayPruning) -> None:
        """Start a round of decays, at most one in the time that a decay takes.

        Ours: rounds give Self-Rectifying structures to compare, and a hearing for many at once.
        In the last round whatever the target still lacks is decayed, too.
        """
        missing = self._goal - self._gone()
        last = self.context.stages["prune"].steps - self._done <= self._needed
        waits = self._round is not None and self._done - self._round < self.context.smooth.steps
        if missing <= 0 or not self._optimizer.wanted or (waits and not last):
            return
        names = list(self._optimizer.wanted)
        ratios = [
            ratio if last else torch.where(wanted, ratio, torch.inf)
            for wanted, ratio in self._optimizer.wanted.values()
        ]
        ratio = torch.cat(ratios).cpu()
        ratio[~torch.cat([dpm.available(name) for name in names])] = torch.inf
        order = ratio.argsort(stable=True)[:missing]
        chosen = torch.zeros_like(ratio, dtype=torch.bool)
        chosen[order] = ratio[order] < torch.inf
        if not bool(chosen.any()):
            return
        parts = chosen.split([len(r) for r in ratios])
        dpm.decay({n: part.nonzero()[:, 0] for n, part in zip(names, parts, strict=True)})
        self._round = self._done

    def _gone(self) -> int:
        assert self.dpm is not None
        return self.dpm.count(Phase.DECAYING) + self.dpm.count(Phase.PRUNED)

    def settled(self) -> bool:
        """Whether as many structures are zero as are to go."""
        if self.removed is not None or not self.decided:
            return self.removed is not None
        if self.dpm is not None:
            return self.dpm.count(Phase.PRUNED) >= self._goal
        zeros, made = self._optimizer.zeros(), self._optimizer
        return bool(made.reach_target_group_sparsity() or zeros >= made.penalised())

    def due(self) -> bool:
        """At the end of the stage.

        Raises:
            AdapterError: too few structures are zero then.
        """
        if self.removed is not None or self._done < self.context.stages["prune"].steps:
            return False
        if not self.settled():
            raise AdapterError(
                f"the stage 'prune' ends with {self._optimizer.zeros()} structures at zero, not "
                f"{self._goal}: upstream's penalty was too weak. Give the stage more epochs, lower "
                "start_epoch, or raise lmbda or epsilon"
            )
        return True

    def remove(self) -> None:
        """Whatever is zero is removed, by torch-pruning's dependency graph."""
        model = self.context.model
        zero = {
            g.root: (structure_group(g).norms() == 0).nonzero()[:, 0].tolist()
            for g in otov2.groups(self._made, model)
        }
        plan = [(root, rows) for root, rows in zero.items() if rows]
        with refusals():
            self.shrink(model, self.context.example, plan)
        if self.dpm is not None:
            self.dpm.detach()
        self.removed, self.pruned = plan, sum(len(rows) for _, rows in plan)
        self._made = self._optimizer = None

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """With its own progress; the optimizer saves itself."""
        own = {"done": self._done, "goal": self._goal, "round": self._round}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up where :meth:`state_dict` was called."""
        self.begin(stage, optimizer, loss)
        self._done, self._goal, self._round = state["done"], state["goal"], state["round"]
        super().load_state_dict(state, stage, optimizer, loss)
        if self.removed is None:
            self._limit_releases()
