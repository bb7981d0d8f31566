"""OTOv2 (only_train_once): the DHSPG optimizer on zero-invariant groups.

``base`` is upstream's optimizer untouched. For ``sp`` and ``sr``, where upstream's half-space
projection would zero a structure in one step, its decay starts instead. As upstream has it, the
network is trained at its full size to the end, and made smaller then.

:class:`OTO` is upstream's own, which does not run on today's PyTorch without this module;
:meth:`OTOv2.of` brings smoothing into a loop that is written as upstream's README has it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpm_core import DecayPruning, Phase, SelfRectifying, SmoothPruning, StructureGroup
from dpm_core.errors import first_line
from dpm_core.third_party import otov2, running, trial
from dpm_core.third_party.groups import UnsupportedLayerError
from dpm_core.third_party.otov2 import OTO as OTO

from .base import Adapter, AdapterError, Loss, Structures, Training, structure_group, width_unit
from .removal import Removal

_OWN = ("target_group_sparsity", "tolerance_group_sparsity", "warm_up_steps", "weight_decay_type")


class TargetWarning(UserWarning):
    """A training has ended before the target was reached."""


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
        round_to: layers that lose channels keep a multiple of so many (ours; upstream's
            ``group_divisible`` rounds either way, and may miss the target). G_p is chosen in
            whole blocks, by the mean of upstream's score; all of it goes in every variant, so that
            ``tolerance_group_sparsity`` has no effect; and a released structure is replaced in its
            own layer, or not released where all others are in G_p.
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
    round_to: int | None = None

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
        width_unit(self.round_to)

    @property
    def unit(self) -> int:
        """Of how many structures a component keeps a multiple; a structure is one channel here."""
        return width_unit(self.round_to)


class OTOv2(Adapter):
    """See the module. :meth:`dhspg` gives the optimizer to attach."""

    Options: ClassVar[type] = OTOv2Options
    options: OTOv2Options
    training: Training
    needs_training: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False  # upstream takes views of its parameters

    _graph: Any = None
    _endless = False  # the user says when the training is over
    _over = False
    _goal = 0  # structures to remove; known once G_p is chosen
    _quotas: Mapping[str, int] | None = None  # by component, where widths are rounded
    _round: int | None = None  # when decays were last started

    @property
    def _done(self) -> int:
        return self.clock + self.heard

    @classmethod
    def of(
        cls,
        oto: otov2.OTO,
        optimizer: otov2.DHSPG,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        *,
        training: Training | None = None,
        progress: Callable[[str], object] = str,
        loss: Loss | None = None,
        state: Mapping[str, Any] | None = None,
        optimizer_state: Mapping[str, Any] | None = None,
    ) -> Self:
        """In a loop of one's own, as upstream's README has it: work around the optimizer's steps.

        ::

            from dpm_core.adapters.otov2 import OTO, OTOv2

            oto = OTO(model, dummy_input)
            optimizer = oto.dhspg(variant="sgd", lr=0.1, target_group_sparsity=0.7)
            run = OTOv2.of(oto, optimizer, SmoothPruning(200), SelfRectifying())
            ...                                                 # the training, as it was
            run.remove()                                        # the model is small

        To go on from a checkpoint, construct all of the dense model, as at the start, and load the
        model's values first::

            model.load_state_dict(saved["model"])
            saved_by = {"state": saved["run"], "optimizer_state": saved["optimizer"]}
            run = OTOv2.of(oto, optimizer, SmoothPruning(200), SelfRectifying(), **saved_by)

        Args:
            oto: upstream's, as imported here.
            optimizer: what its ``dhspg`` gave, before it has chosen what goes; it is attached. Its
                ``group_divisible`` is ``round_to`` here.
            smooth: the decay. ``None``: upstream zeroes structures by itself.
            rectify: how decisions are taken back. ``None``: they are not.
            training: how long it is, so that what the target lacks decays in time. ``None``: the
                call of :meth:`remove` ends it, and what upstream's penalty has not brought down
                stays.
            progress: as of the constructor.
            loss: as of :meth:`attach`.
            state: what :meth:`state_dict` gave in a run that is to go on.
            optimizer_state: what the optimizer's gave then. It is loaded here, as the optimizer has
                to know first what is asked of it.

        Raises:
            AdapterError: these are not from here, or the optimizer is another model's or has chosen
                already; one of the two states is missing, does not fit, or is of a run that was
                over; or as the constructor and :meth:`check`.
        """
        if not isinstance(oto, otov2.OTO):
            raise AdapterError(
                "upstream's own OTO does not run on this PyTorch: import OTO from "
                "dpm_core.adapters.otov2 instead, and give it with the optimizer of its dhspg()"
            )
        if not isinstance(optimizer, otov2.DHSPG):
            raise AdapterError(
                f"{type(optimizer).__name__} does not choose what goes in this model: give the "
                "optimizer of this OTO's dhspg()"
            )
        if (state is None) != (optimizer_state is None):
            raise AdapterError(
                "going on takes both: state=, which this adapter's state_dict() gave, and "
                "optimizer_state=, which the optimizer's gave"
            )
        if state is not None and state.get("removed") is not None:
            raise AdapterError(
                "the state is of a run that was over, whose model is small: reload that with "
                "load_pruned(), and train it with another optimizer"
            )
        own = {name: getattr(optimizer, name) for name in _OWN}
        first = optimizer.param_groups[0]
        options = cls.Options(
            **own, epsilon=float(first["epsilon"]), round_to=int(first["group_divisible"])
        )
        endless = Training(sys.maxsize) if training is None else training
        run = cls(oto._model, oto._dummy_input, options, smooth, rectify, training=endless)
        run.progress, run._endless, run._graph = progress, training is None, oto
        run._partition = optimizer.partition_step
        if state is None:
            run.check()
        else:
            run.load_state_dict(state)
        try:
            if smooth is not None:
                otov2.DeferringDHSPG.of(optimizer)
            optimizer.round_to = options.unit
            if optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
        except (UnsupportedLayerError, ValueError) as why:
            raise AdapterError(str(why)) from why
        return run.attach(optimizer, loss)

    _partition: int | None = None

    @property
    def _first(self) -> int:
        if self._partition is not None:
            return self._partition
        return self.options.start_epoch * self.training.steps_per_epoch

    @property
    def _needed(self) -> int:
        """Steps from the last decision to the end: earlier rounds may need hearings, too.

        All rounds but the last start a decay apart. So the round before the last may still need as
        many hearings as there are waves, the one before that one less, and so on.
        """
        if self.rectify is None:
            return self.decay_steps()
        waves, batches = self.rectify.waves, self.rectify.criterion.batches
        return self.decay_steps() + batches * waves * (waves + 1) // 2

    def check(self) -> None:
        """Refuse too short a training, an impossible target, and groups that are not exact."""
        first = max(self._first + 1, self.options.warm_up_steps)
        if first + self._needed > self.training.steps:
            raise AdapterError(
                f"the first decision falls after {first} steps and a decay takes up to "
                f"{self._needed}, but the training has {self.training.steps}; give it more epochs "
                "or shorten smooth.steps, start_epoch or warm_up_steps"
            )
        model, example = running.copied(self.model), self.example
        try:
            read = otov2.graph(model, example)
            groups = otov2.groups(read, model)
        except AdapterError:
            raise
        except Exception as cause:  # whatever tracing and upstream stumble over
            raise AdapterError(f"upstream cannot read this model: {first_line(cause)}") from cause
        if not groups:
            raise AdapterError(f"upstream finds nothing to prune: {otov2.unpruned(read)}")
        total, unit = sum(g.structures for g in groups), self.options.unit
        most = sum(otov2.most(g.structures, unit) for g in groups) / total
        if self.options.target_group_sparsity > most:
            left = "one structure" if unit == 1 else f"{unit} structures (round_to)"
            raise AdapterError(
                f"target_group_sparsity {self.options.target_group_sparsity} is impossible: with "
                f"{left} left in every group it is {most:.3f}. Lower it"
            )
        own = dict(self.model.named_parameters())
        for group in groups:
            why = self.frozen((s.name, own[s.name]) for s in group.shares)
            if why is not None:
                raise AdapterError(
                    f"the group of {group.root!r} {why}. Upstream leaves out no layers, so let it "
                    "train"
                )
        odd = trial.inexact(model, example, groups, self.progress)
        for root, why in odd.items():
            raise AdapterError(  # of the first: a model with others cannot be pruned, either
                f"the group of {root!r} {why}. Upstream's groups and the dependency graph disagree "
                "on this model, so it cannot be pruned"
            )
        super().check()

    # ------------------------------------------------------------------ the run

    def new_optimizer(
        self, kind: str, learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer:
        """DHSPG; PyTorch's own once the model is small."""
        if self.complete:
            return super().new_optimizer(kind, learning_rate, momentum, weight_decay)
        return self.dhspg(
            variant=kind,
            lr=learning_rate,
            first_momentum=momentum if kind == "sgd" else None,
            weight_decay=weight_decay,
        )

    def dhspg(self, **settings: Any) -> otov2.DHSPG:
        """Upstream's optimizer for this model, to be attached.

        Args:
            settings: upstream's own, by upstream's names (variant, lr, first_momentum, ...), beside
                those in the options.

        Raises:
            AdapterError: the model is small already; or as :meth:`check`, if that was left out.
        """
        if self.complete:
            raise AdapterError(
                "the model is small, and DHSPG chooses what goes in a large one: train on with "
                "another optimizer of model.parameters(), in a training of its own"
            )
        if not self.checked:
            self.check()
        self._graph, o = otov2.graph(self.model, self.example), self.options
        kind = otov2.DHSPG if self.smooth is None else otov2.DeferringDHSPG
        optimizer = kind(
            self._graph,
            weight_decay_type=o.weight_decay_type,
            target_group_sparsity=o.target_group_sparsity,
            tolerance_group_sparsity=o.tolerance_group_sparsity,
            start_pruning_steps=self._first,
            warm_up_steps=o.warm_up_steps,
            epsilon=o.epsilon,
            lmbda=o.lmbda,
            lmbda_amplify=o.lmbda_amplify,
            hat_lmbda_coeff=o.hat_lmbda_coeff,
            **settings,
        )
        optimizer.round_to = o.unit
        return optimizer

    @property
    def _dhspg(self) -> Any:
        return self.optimizers[0]

    def follow(self) -> None:
        """Upstream's optimizer has to be the one that is attached, until the model is small."""
        ours = self._graph is not None and isinstance(self._dhspg, otov2.DHSPG)
        if not (self.complete or ours):
            raise AdapterError(
                f"{type(self._dhspg).__name__} is not the optimizer that chooses what goes in this "
                "model; attach the one that this adapter's dhspg() gives"
            )
        super().follow()

    def start(self) -> None:
        """Upstream decides later, in its own steps."""
        self.follow()

    def groups(self) -> list[StructureGroup]:
        """Upstream's zero-invariant groups."""
        return [structure_group(g) for g in otov2.groups(self._graph, self.model)]

    def selection(self) -> Structures:
        """Whatever upstream has set to zero."""
        return {n: (g.norms() == 0).nonzero()[:, 0] for n, g in self.grouped().items()}

    def before_step(self) -> None:
        """Upstream penalises while too few structures are zero or on their way.

        Raises:
            AdapterError: the model is small, and its new optimizer was not attached.
        """
        if self.complete and isinstance(self._dhspg, otov2.DHSPG):
            raise AdapterError(
                "DHSPG is of the model before the removal, and would train nothing; go on with a "
                "new optimizer of model.parameters()"
            )
        if self.dpm is not None and not self.complete:
            self._dhspg.reached = self.decided and self._gone() >= self._goal

    def after_step(self) -> None:
        """Widen G_p for what was released; decay what upstream would have zeroed."""
        if self.complete:
            return
        if not self.decided and self._dhspg.partitioned:
            self.decided = True
            wanted = self.options.target_group_sparsity * self._dhspg.structures()
            # Upstream spares a structure of every component, so G_p may be smaller.
            self._goal = min(math.ceil(wanted - 1e-9), self._dhspg.penalised())
            self._round_goal()
            self._limit_releases()
        if self.dpm is not None and self.decided:
            past = len(self.dpm.events)
            self._exchange(self.dpm)
            self._decay_wanted(self.dpm)
            if len(self.dpm.events) != past:
                self._reserve(self.dpm)

    def _round_goal(self) -> None:
        """Where widths are rounded, all of G_p goes, and of each component as many as are in it."""
        if self.options.unit > 1:
            self._goal = self._dhspg.penalised()
            groups = self._dhspg.zero_invariant
            self._quotas = {name: g["num_groups_g_p"] for name, g in groups.items()}

    def _reserve(self, dpm: DecayPruning) -> None:
        """Where widths are rounded, what waits in G_p cannot replace anything: it goes itself."""
        if self._quotas is not None:
            dpm.reserved = {
                name: int((self._dhspg.penalised_in(name) & dpm.available(name)).sum())
                for name in self._quotas
            }

    def _limit_releases(self) -> None:
        """Allow no more releases than leave enough structures to meet the target."""
        if self.dpm is not None and self.decided:
            self._reserve(self.dpm)
            # What was released never goes, and one structure of every component stays anyway.
            spare = self._dhspg.structures() - self._goal - len(self.dpm.groups)
            self.dpm.release_limit = max(0, spare)

    def choose(self, group: str, count: int, free: Tensor) -> Tensor:
        """The next-ranked structures of the component.

        Ours: they do not wait for the half-space. They have the largest norms, and the penalty
        would bring them down only late in a run, at a low learning rate.
        """
        score = self._dhspg.scores[group].cpu().clone()
        # What is in G_p goes anyway: it is taken only where nothing else is left.
        score[self._dhspg.penalised_in(group)] -= 2 * score.abs().max() + 1
        score[~free] = -torch.inf
        best: Tensor = score.argsort(descending=True, stable=True)[:count]
        return best

    def _exchange(self, dpm: DecayPruning) -> None:
        """What was released leaves G_p, and what decays in its place enters."""
        released: dict[str, None] = {}
        for event in self.new_events():
            if event.kind == "release":
                self._dhspg.exchange(event.group, event.structures, [])
                released[event.group] = None
            elif event.kind == "decay" and event.wave:
                self._dhspg.exchange(event.group, [], event.structures)
        if not released:
            return
        for name, quota in (self._quotas or {}).items():
            lacking = quota - int(self._dhspg.penalised_in(name).sum()) if name in released else 0
            for _ in range(lacking):
                self._widen(dpm, [name])
        for _ in range(self._goal - self._dhspg.penalised()):
            self._widen(dpm, list(self._dhspg.scores))

    def _widen(self, dpm: DecayPruning, components: Sequence[str]) -> None:
        """The best-ranked structure of some components enters G_p, and waits there for its turn.

        Where a component had nothing outside of G_p to replace a released structure with, or an
        exchange took what waited in G_p, G_p has become too small for the target.
        """
        ranked = []
        for name in components:
            scores = self._dhspg.scores[name]
            stays = ~self._dhspg.penalised_in(name) & (dpm.phases(name) == Phase.ACTIVE)
            free = (stays & dpm.available(name)).nonzero()[:, 0]
            if len(free) and int(stays.sum()) > 1:  # every component keeps one
                best = free[scores.cpu()[free].argmax()]
                ranked.append((float(scores[best]), name, int(best)))
        if ranked:
            _, name, best = max(ranked)
            self._dhspg.exchange(name, [], [best])

    def _decay_wanted(self, dpm: DecayPruning) -> None:
        """Start a round of decays, at most one in the time that a decay takes.

        Ours: rounds give Self-Rectifying structures to compare, and a hearing for many at once.
        In the last round whatever the target still lacks is decayed, too.
        """
        missing = self._goal - self._gone()
        last = self.training.steps - self._done <= self._needed
        waits = self._round is not None and self._done - self._round < dpm.smooth.steps
        if missing <= 0 or not self._dhspg.wanted or (waits and not last):
            return
        names = list(self._dhspg.wanted)
        ratios = [
            ratio if last else torch.where(wanted, ratio, torch.inf)
            for wanted, ratio in self._dhspg.wanted.values()
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

    @property
    def settled(self) -> bool:
        """Whether as many structures are zero as are to go."""
        if self.complete or not self.decided:
            return self.complete
        if self.dpm is not None:
            return self.dpm.count(Phase.PRUNED) >= self._goal
        zeros, dhspg = self._dhspg.zeros(), self._dhspg
        reached: bool = dhspg.reach_target_group_sparsity()
        return reached or (self.options.unit == 1 and zeros >= dhspg.penalised())

    @property
    def due(self) -> bool:
        """At the end of the training; where its length is not known, when enough are zero.

        Raises:
            AdapterError: too few structures are zero then.
        """
        if self._endless:
            return not self.complete and (self._over or self.settled)
        if self.complete or self._done < self.training.steps:
            return False
        if not self.settled:
            zeros = self._dhspg.zeros()
            raise AdapterError(
                f"the training ends with {zeros} structures at zero, not {self._goal}: upstream's "
                "penalty was too weak. Give it more epochs, lower start_epoch, or raise lmbda or "
                "epsilon"
            )
        return True

    def remove(self) -> Removal:
        """Make the model smaller. Where the training's length is not known, this call ends it.

        Returns:
            What went.

        Raises:
            AdapterError: nothing is zero yet, or structures are on their way to it; or as
                :meth:`dpm_core.adapters.base.Adapter.remove`.
        """
        if self._endless and not self.complete and not self.settled:
            if self.dpm is not None and self.dpm.count(Phase.DECAYING):
                raise AdapterError(
                    f"{self.dpm.count(Phase.DECAYING)} structures still decay, which takes up to "
                    f"{self.decay_steps()} steps: train on, or give `training`, so that the last "
                    "decays start in time"
                )
            zeros = sum(len(k) for k in self.going().values())
            if not zeros:
                few = "no structure is" if self.options.unit == 1 else "too few structures are"
                raise AdapterError(
                    f"{few} zero yet, so there is nothing to remove: train on, start "
                    "pruning earlier, or raise lmbda or epsilon"
                )
            share = zeros / self._dhspg.structures()
            warnings.warn(
                f"target_group_sparsity {self.options.target_group_sparsity} is not reached: "
                f"{share:.3f} of the structures are zero, and go",
                TargetWarning,
                stacklevel=2,
            )
            self._over = True
        return super().remove()

    def going(self) -> Structures:
        """Whatever is zero; where widths are rounded, as many of it as leave multiples."""
        return {name: self._whole(name, zeros) for name, zeros in self.selection().items()}

    def _whole(self, component: str, zeros: Sequence[int] | Tensor) -> Sequence[int] | Tensor:
        unit, size = self.options.unit, self.grouped()[component].size
        left = math.ceil((size - len(zeros)) / unit) * unit
        return zeros[: max(0, size - left)]

    def take_out(self, going: Structures) -> Removal:
        """By the dependency graph. DHSPG is of the full size: another optimizer has to follow."""
        removal = Removal((g, self.channels(g, k)) for g, k in going.items())
        removal.apply(self.model, self.example)
        self._graph = None
        return removal

    # ------------------------------------------------------------------ saving

    def own_state(self) -> dict[str, Any]:
        """Its own progress; the optimizer saves itself."""
        return {"goal": self._goal, "round": self._round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the next attach()."""
        if self.optimizers and self._partition is not None:
            raise AdapterError(
                "OTOv2.of() has attached already: give it state= and optimizer_state= instead"
            )
        super().load_state_dict(state)
        self._goal, self._round = state["goal"], state["round"]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        super().restore(state)
        if not self.complete:
            if self.decided:
                self._round_goal()
            self._limit_releases()
