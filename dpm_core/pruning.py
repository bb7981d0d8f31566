"""DecayPruning: owns groups and phases, and works around the steps of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from .attachment import Attachment
from .decay import SmoothPruning, target_norm
from .elsewhere import counterparts, write_zeros
from .errors import (
    AttachmentError,
    ConfigurationError,
    GradientError,
    GroupError,
    PhaseError,
    StateError,
)
from .groups import StructureGroup, require_disjoint, require_fit
from .hearing import Room, hold
from .phases import Move, Phase, after
from .processes import DECIDE_ALIKE, Processes, digest
from .rectify import Evidence, SelfRectifying, require_choice
from .state import VERSION, Ledger, check_groups, check_header
from .table import SliceTable, zero_

Kind = Literal["decay", "release", "prune"]
Refill = Callable[[str, int, Tensor], Sequence[int] | Tensor]
"""``choose(group, count, free)``: which structures decay in place of ``count`` released ones."""


@dataclass(frozen=True)
class Event:
    """Something that happened to structures of one group, for adapters, plots and records.

    Attributes:
        step: optimizer steps since the start, when it happened.
        kind: ``"decay"`` started, ``"release"`` or ``"prune"`` (became exactly zero).
        group: the group's name.
        structures: their numbers in the group.
        norms: L2 norm of each at that moment: L_init at the start of a decay, the norm that the
            decay had come to at a release, zero when pruned.
        wave: 0 for first decisions, 1 for replacements of released structures, and so on.
    """

    step: int
    kind: Kind
    group: str
    structures: tuple[int, ...]
    norms: tuple[float, ...]
    wave: int


@dataclass
class _Plan:
    """What the hook before a step found out, carried out by the hook after it."""

    decaying: Tensor
    resistance: Tensor
    gradient: Tensor
    release: Tensor
    heard: int = 0
    worth: Tensor | None = None


class DecayPruning:
    """Smooth Pruning and Self-Rectifying for the structures of some groups.

    Usage::

        dpm = DecayPruning(groups, SmoothPruning(steps=20), SelfRectifying())
        dpm.attach(optimizer)
        dpm.decay({"layer1.0.conv1": [3, 7]})
        loss.backward()
        optimizer.step()

    Around every ``optimizer.step()`` decaying structures are put on their schedule (arXiv
    2406.03879, section on smooth pruning), decisions are taken back where Self-Rectifying says
    so, and pruned structures are held at exactly zero. Structures that are ACTIVE get what the
    optimizer gave them, bit for bit. A step loops over no structures and waits for the device at
    most once, and while nothing decays not at all, but for the step after a structure has become
    zero. A parameter without a gradient in a step counts as one with a gradient of zero. A step
    that a gradient scaler skips decays nothing and is not counted; to learn of it from a fused
    optimizer, which skips and unscales by itself, takes that one wait in idle steps, too.

    A ``step`` that calls its parent's, or that of an optimizer inside which shares its hooks,
    counts once: the core works before and after the outermost one. What happens to the weights
    outside of ``step`` is not the core's: structures that are PRUNED may be moved away from zero
    there, and :meth:`phases` says so. Where the optimizer maximises (``maximize=True``), the
    objective's sign is turned, so that resistance is always about what is really minimised.

    The core follows its parameters where their storage, type or device is exchanged
    (``model.to(...)``, ``p.data = ...``). Parameters that are exchanged themselves are refused.

    A copy (``copy.deepcopy``, ``pickle``) works around the copy of the optimizer, where model,
    optimizer and core are copied together: ``copy.deepcopy((model, optimizer, dpm))``. Where the
    optimizer's copy is dropped, the copy of the core is attached to nothing. A core with a loss for
    hearings, or with ``refill``, ``before`` or ``after``, cannot be copied: what it calls would
    still be about the original model.

    In several processes every one makes its own, of the same groups and settings, and decides alike
    from the weights and averaged gradients that DistributedDataParallel keeps equal. In each step
    they compare a few figures; where one has decided otherwise, or its gradients were not averaged,
    all raise :class:`~dpm_core.DisagreementError` before the step has changed anything.

    Args:
        groups: the structure groups, on one device.
        smooth: the decay's length.
        rectify: how decisions are taken back; ``None`` for Smooth Pruning alone.

    Raises:
        GroupError: no groups, two of one name, overlapping slices, or several devices.
        ConfigurationError: the decay is too short for Self-Rectifying.
    """

    def __init__(
        self,
        groups: Iterable[StructureGroup],
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
    ) -> None:
        # By name: events and draws do not depend on the order in which groups were found.
        listed = sorted(groups, key=lambda g: g.name)
        self.groups: dict[str, StructureGroup] = {g.name: g for g in listed}
        if not listed:
            raise GroupError("no structure groups were given; there is nothing to prune")
        if len(self.groups) != len(listed):
            names = [g.name for g in listed]
            twice = sorted({n for n in names if names.count(n) > 1})
            raise GroupError(f"group names {twice} are given twice; names key what is saved")
        require_disjoint(listed)
        self._device = require_fit(listed)
        self.smooth = smooth if smooth is not None else SmoothPruning()
        self.rectify = rectify
        self._decision = rectify.decision_step(self.smooth.steps) if rectify else None
        self.events: list[Event] = []
        self.clock = 0
        """Optimizer steps seen since the start."""
        self.heard = 0
        """Batches that hearings have run; they count as training steps in comparisons."""
        self.release_limit: int | None = None
        """How many structures may be released in all: for a framework whose target leaves no more.

        ``None``: as many as others of their groups can replace. Not saved with the state.
        """

        self._start: dict[str, int] = {}
        total = 0
        for group in listed:
            self._start[group.name] = total
            total += group.size
        self._names = list(self.groups)
        self._group_of = torch.repeat_interleave(
            torch.arange(len(listed)), torch.tensor([g.size for g in listed])
        )
        self._ledger = Ledger.blank(total)
        self._attachment: Attachment | None = None
        self._room: Room | None = None
        self._refill: Refill | None = None
        self._before: Callable[[], object] | None = None
        self._after: Callable[[], object] | None = None
        self._plan: _Plan | None = None
        self._worth: Tensor | None = None  # not saved: it serves the step in which it was heard
        self._skipped = False
        self._processes: Processes | None = None
        self._decided: float | None = None  # the digest of all decisions, once it is asked for
        self._decaying: _Some | None = None
        self._new_zeros: _Some | None = None  # what became zero in the last step
        self._norms: Tensor | None = None  # of all structures of _decaying's table, on the device
        self._refresh()

    # ------------------------------------------------------------------ attachment

    def attach(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module | None = None,
        loss: Callable[[], Tensor] | None = None,
        refill: Refill | None = None,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> DecayPruning:
        """Work around every step of ``optimizer`` from now on, by PyTorch's own step hooks.

        Attach to the outermost optimizer: what a wrapper does to the weights after the step of the
        one inside escapes the core. One that is no optimizer of its own (accelerate's, Lightning's)
        is looked through. An optimizer that is stepped by other calls (``second_step()``) has to
        have one inside whose ``step`` they call; attach to that one.

        Args:
            optimizer: any optimizer that owns all parameters of all groups and whose ``step`` is
                called without a closure.
            model: with ``loss``, for a criterion that holds a hearing: the model whose buffers
                are put back afterwards.
            loss: runs the model on the next training batch and returns the mean loss over it: what
                the training loop calls ``backward()`` on. Where the optimizer maximises that, the
                loss is to give the same objective; its sign is turned here, as that of gradients.
            refill: ``choose(group, count, free)`` names the structures that decay in place of
                ``count`` released ones, in the step that released them: at most ``count`` numbers
                of those that ``free`` allows, (K,) bool, :meth:`available` at that moment. It is
                called when the step's own work is over, for each group and wave of the step's
                releases. A criterion that exchanges picks them itself, the cheapest by
                :meth:`worth`, and ``choose`` is not called. ``None``: nothing is replaced.
            before: called at the start of every step, with all gradients there and not yet read.
            after: called at the end of every step, refills included, unless a fused optimizer
                skipped it because of a gradient scaler.

        Returns:
            self.

        Raises:
            AttachmentError: attached already, it is no optimizer, a parameter is not the
                optimizer's, another core decays the same structures, or a hearing has no model or
                loss. Nothing was attached.
            GroupError: a parameter is not any more what a group was made from.
        """
        if self._attachment is not None and self._attachment.optimizer is not None:
            raise AttachmentError(
                "already attached to an optimizer; structures would decay twice a step. Call "
                "detach() first"
            )
        require_fit(self.groups.values())
        room = None
        if self.rectify is not None and self.rectify.criterion.batches:
            if model is None or loss is None:
                raise AttachmentError(
                    f"{type(self.rectify.criterion).__name__} holds a hearing and needs the model "
                    "and its loss: attach(optimizer, model=model, loss=closure)"
                )
            for group in self.groups.values():
                if not group.owners:
                    raise AttachmentError(
                        f"group {group.name!r} has no owners, so a hearing cannot gate its "
                        "structures; give StructureGroup(owners=...), or use Trajectory()"
                    )
            room = Room(model, loss)
        groups = list(self.groups.values())
        # Nothing is assigned before all has been accepted.
        self._attachment = Attachment(optimizer, groups, self._enter, self._leave)
        self._room, self._refill = room, refill
        self._before, self._after = before, after
        return self

    def detach(self) -> None:
        """Leave the optimizer. Phases stay; nothing decays or is held at zero any more."""
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None
        self._room = self._refill = self._before = self._after = None
        self._plan = None
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: everything but what belongs to this very process and optimizer's hooks."""
        given = (self._room, self._refill, self._before, self._after)
        if any(one is not None for one in given):
            raise AttachmentError(
                "a DecayPruning with a loss for hearings, or with refill, before or after, cannot "
                "be copied or pickled: what the copy calls would still be about this model. Make a "
                "new one of the copied model's groups, attach it, and give it "
                "load_state_dict(dpm.state_dict())"
            )
        state = self.__dict__.copy()
        for name in ("_attachment", "_processes", "_plan", "_decaying", "_pruned", "_norms"):
            del state[name]
        state["_new_zeros"] = None if self._new_zeros is None else self._new_zeros.numbers
        state["optimizer"] = None if self._attachment is None else self._attachment.optimizer
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        optimizer, new_zeros = state.pop("optimizer"), state.pop("_new_zeros")
        self.__dict__.update(state)
        self._attachment = self._processes = self._plan = self._decaying = self._norms = None
        self._new_zeros = None if new_zeros is None else self._some(new_zeros)
        self._refresh()
        if optimizer is not None:
            groups = list(self.groups.values())
            self._attachment = Attachment(optimizer, groups, self._enter, self._leave, keep=False)

    # ------------------------------------------------------------------ decisions

    @torch.no_grad()
    def decay(self, structures: Mapping[str, Sequence[int] | Tensor], *, wave: int = 0) -> None:
        """Start the decay of some structures; it runs with the optimizer's next N steps.

        A structure whose norm is zero is PRUNED at once.

        Args:
            structures: group name to the numbers of its structures: a list, set, range, tensor
                or array of integers.
            wave: 0 for a first decision; a replacement for structures released in wave w is
                decayed in wave w + 1.

        Raises:
            AttachmentError: not attached.
            AttachmentError: the optimizer does not own the groups' parameters any more.
            PhaseError: a structure is unknown, given twice, decaying, pruned, or was released, or
                this is no mapping to numbers.
            GroupError: a parameter of a group is frozen, or has another shape than it had.
            GradientError: the norm of a structure is not finite.
            ConfigurationError: ``wave`` is not a count.
        """
        if self._attachment is None:
            raise AttachmentError(
                "not attached to an optimizer, so no step would carry the decay out; call "
                "attach(optimizer) first"
            )
        if isinstance(wave, bool) or not isinstance(wave, int) or not 0 <= wave < 2**31:
            raise ConfigurationError(f"wave is {wave!r}; give 0, or 1 and up for replacements")
        numbers = self._resolve(structures)
        self._follow()
        if numbers.numel() == 0:
            return
        self._require_active(numbers)
        for i in self._group_of[numbers].unique().tolist():
            for s in self.groups[self._names[i]].slices:
                if not s.parameter.requires_grad:
                    raise GroupError(
                        f"{s.name!r} of group {self._names[i]!r} is frozen (requires_grad is "
                        "False), but the structure would decay while training goes on; unfreeze "
                        "it, or leave the group out"
                    )
        groups = self._groups_of(numbers)
        here = self._numbers_of(groups)
        whole = SliceTable([g.slices for g in groups])
        part = SliceTable([g.effect_slices for g in groups])
        squares = [t.square_norms(t.parameters()) for t in (whole, part)]
        norms = torch.stack(squares).sqrt().to("cpu", torch.float64)
        norms = norms[:, torch.searchsorted(here, numbers)]
        if not bool(torch.isfinite(norms).all()):
            bad = numbers[~torch.isfinite(norms).all(0)]
            raise GradientError(
                f"the norm of {self._describe(bad)} is not finite; the model has diverged. Lower "
                "the learning rate, or go back to an earlier checkpoint"
            )

        ledger, gone = self._ledger, norms[0] == 0
        ledger.wave[numbers] = wave
        ledger.initial[numbers], ledger.effect[numbers] = norms
        for field in (ledger.step, ledger.resistance, ledger.gradient):
            field[numbers] = 0
        self._move(numbers[~gone], Move.START)
        self._move(numbers[gone], Move.VANISH)
        self._record("decay", numbers[~gone], norms[0, ~gone])
        self._record("prune", numbers[gone], norms[0, gone])
        self._refresh()

    def phases(self, group: str) -> Tensor:
        """Phases of a group's structures, (K,) int64 on the host, as :class:`Phase` values.

        Raises:
            PhaseError: there is no such group; or structures that are PRUNED are not zero, because
                something other than the optimizer's step has changed them.
            GroupError: a parameter has another shape than it had when the group was made.
        """
        start = self._first_of(group)
        phases = self._ledger.phase[start : start + self.groups[group].size].clone()
        self._require_zero(self.groups[group], (phases == Phase.PRUNED).nonzero().flatten())
        return phases

    def available(self, group: str) -> Tensor:
        """Which structures of a group may be decayed: ACTIVE and never released; (K,) bool."""
        start = self._first_of(group)
        part = slice(start, start + self.groups[group].size)
        return (self._ledger.phase[part] == Phase.ACTIVE) & ~self._ledger.immune[part]

    def count(self, phase: Phase) -> int:
        """How many structures of all groups are in ``phase``; without a look at the weights."""
        return int((self._ledger.phase == phase).sum())

    @torch.no_grad()
    def zero_in(
        self, other: nn.Module | Mapping[str, Tensor], model: nn.Module | None = None
    ) -> None:
        """Set the structures that are PRUNED to exactly zero in weights that are kept elsewhere.

        For averages (``AveragedModel``, an EMA, SWA) and other copies before a removal, and for the
        model itself where something has moved it away from zero, such as the ``eval()`` of a
        schedule-free optimizer. An average remembers what structures were before they became zero,
        so it takes this call after its last update.

        Args:
            other: a model with the same parameter names and shapes, or tensors by those names. What
                AveragedModel, DistributedDataParallel and ``torch.compile`` put before the names is
                looked through.
            model: the model that the groups were made from, which names the parameters. May be left
                out where ``other`` is this model itself.

        Raises:
            GroupError: a parameter is not in ``model``, or has no counterpart of its shape in
                ``other``. Nothing was changed.
        """
        groups = list(self.groups.values())
        require_fit(groups)
        into = counterparts(groups, other, model)
        for group in groups:
            start = self._start[group.name]
            pruned = self._ledger.phase[start : start + group.size] == Phase.PRUNED
            write_zeros(group, pruned.nonzero().flatten(), into)

    # ------------------------------------------------------------------ the step

    def _enter(self) -> bool:
        """Before an optimizer's step. Returns False: whether it is skipped is looked up here."""
        if self._before is not None:
            self._before()
        self._before_step()
        return False

    def _leave(self) -> None:
        """After an optimizer's step."""
        if self._skipped:
            return
        last = len(self.events)
        self._after_step()
        if self._refill is not None:
            for event in self.events[last:]:
                if event.kind == "release":
                    self._replace(event, self._refill)
        if self._after is not None:
            self._after()

    @torch.no_grad()
    def _before_step(self) -> None:
        assert self._attachment is not None
        self._plan, self._skipped = None, False
        # What a gradient scaler tells an optimizer that skips and unscales by itself.
        overflow, scale = self._attachment.scaling()
        if self._decaying is not None or self._pruned:
            self._follow()
        decaying, zeros = self._decaying, self._new_zeros
        found: list[Tensor] = []
        if decaying is not None:
            found += self._evidence(decaying)
        if zeros is not None:
            found.append(zeros.table.square_norms(self._gradients(zeros)))
        scaled = overflow is not None or (scale is not None and bool(found))
        if scaled:
            kind = found[0].dtype if found else torch.float32
            base = torch.zeros(1, dtype=kind, device=self._device)
            found.append(base + (1.0 if scale is None else scale))
            found.append(base + (0.0 if overflow is None else overflow))
        if not found:
            self._agree()
            return
        # The only wait for the device in a step.
        host = list(_to_host(torch.cat(found)).double().split([len(part) for part in found]))
        skipped, unit = (host.pop(), host.pop()) if scaled else (None, None)
        after_zero = host.pop() if zeros is not None else None
        if decaying is None:
            self._agree()
        else:
            host = [row[decaying.local] for row in host]
            self._agree(decaying.numbers, host[0])
        self._skipped = skipped is not None and bool(skipped)
        if self._skipped:
            return
        if zeros is not None and after_zero is not None:
            self._require_gradients_at_zero(zeros.numbers, after_zero[zeros.local])
        if decaying is not None:
            self._plan = self._plan_for(decaying, host, 1.0 if unit is None else float(unit))
        self._new_zeros = None

    def _evidence(self, decaying: _Some) -> list[Tensor]:
        """What a step has to know, on the device: rows over all structures of the table.

        Returns:
            Square norms of gradients, norms of weights, and with Self-Rectifying the products of
            both, by the sign of what is minimised.
        """
        table, gradients = decaying.table, self._gradients(decaying)
        if self._norms is None:
            self._norms = table.square_norms(table.parameters()).sqrt()
        rows = [table.square_norms(gradients), self._norms]
        if self.rectify is not None:
            assert self._attachment is not None
            weights, maximised = table.parameters(), self._attachment.maximised()
            if maximised:
                weights = [
                    -w if w is not None and id(s.parameter) in maximised else w
                    for w, s in zip(weights, table.slices, strict=True)
                ]
            rows.append(table.dots(weights, gradients))
        return rows

    def _plan_for(self, decaying: _Some, host: list[Tensor], unit: float) -> _Plan:
        """What the step is to do, from its :meth:`_evidence` on the host.

        Args:
            decaying: who decays.
            host: the rows, (decaying,) each.
            unit: by how much gradients are scaled.
        """
        numbers, ledger = decaying.numbers, self._ledger
        squares, norms = host[0] / unit**2, host[1]
        dots = host[2] / unit if len(host) > 2 else torch.zeros_like(squares)
        if not bool(torch.isfinite(norms).all()):
            bad = numbers[~torch.isfinite(norms)]
            raise GradientError(
                f"the weights of {self._listed(bad)} are not finite any more. This step changed "
                "nothing: go back to an earlier checkpoint, and lower the learning rate"
            )
        sound = torch.isfinite(squares) & torch.isfinite(dots)
        if not bool(sound.all()):
            raise GradientError(
                f"the gradient of {self._describe(numbers[~sound])} is not finite. Nothing was "
                "changed: skip this step (optimizer.zero_grad()), clip gradients, or lower the "
                "learning rate"
            )
        initial, step = ledger.initial[numbers], ledger.step[numbers]
        # ||x_k|| is L_init (1 - (k - 1) / N), so L_init / ||x_k|| depends on the schedule alone.
        stretch = 1 / target_norm(torch.ones_like(initial), step, self.smooth.steps)
        plan = _Plan(
            decaying=numbers,
            gradient=ledger.gradient[numbers] + squares.sqrt() * initial,
            resistance=ledger.resistance[numbers] - dots * stretch,
            release=torch.zeros(numbers.numel(), dtype=torch.bool),
        )
        if self.rectify is not None:
            due = (step + 1 == self._decision) & (ledger.wave[numbers] < self.rectify.waves)
            if bool(due.any()):
                plan.release[due] = self._hear(plan, due)
                self._agree_on(numbers[plan.release])
                self.heard += plan.heard
                if plan.worth is not None:
                    self._worth = plan.worth
        return plan

    def _require_gradients_at_zero(self, numbers: Tensor, squares: Tensor) -> None:
        """Refuse a model that does not bear a structure at zero, in the first step that shows it.

        Args:
            numbers: of the structures that became zero in the last step.
            squares: the square norms of their gradients.
        """
        bad = numbers[~torch.isfinite(squares)]
        if bad.numel():
            raise GradientError(
                f"the gradient of {self._listed(bad)} is not finite in the first step after the "
                "norm became exactly zero. This step changed nothing: either the model divides by "
                "that norm (as weight_norm does: give a slice of the magnitude, original0, and "
                "none of the direction, original1), or it has diverged. Go back to an earlier "
                "checkpoint"
            )

    def _gradients(self, some: _Some) -> list[Tensor | None]:
        gradients = some.table.gradients()
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise self._sparse_gradient(some.names)
        return gradients

    def _follow(self) -> None:
        """Notice what happened to the optimizer and to the parameters since the last step.

        Raises:
            AttachmentError: the optimizer does not own a parameter any more, or is gone.
            GroupError: a parameter has another shape, or cannot be decayed any more.
        """
        assert self._attachment is not None
        self._attachment.require_owned()
        known = [some.table for some in (self._decaying, self._new_zeros) if some is not None]
        if self._zero_table is not None:
            known.append(self._zero_table)
        if all(table.fits() for table in known):
            return
        self._device = require_fit(self.groups.values())
        self._decaying = self._norms = None
        if self._new_zeros is not None:
            self._new_zeros = self._some(self._new_zeros.numbers)
        self._refresh()

    def _agree(self, numbers: Tensor | None = None, squares: Tensor | None = None) -> None:
        """Stop all processes of a run where one of them stands elsewhere than the others.

        Args:
            numbers: of the decaying structures; ``None`` where nothing decays.
            squares: the square norms of their gradients, (numbers,).
        """
        if self._processes is None:
            self._processes = Processes.found()
            if self._processes is None:
                return
            made = [f"{name!r} with {group.size} structures" for name, group in self.groups.items()]
            settings = [f"{name} = {value}" for name, value in self._settings().items()]
            self._processes.require_same(
                "groups and settings", made + settings, "Give all of them the same"
            )
        if self._decided is None:
            self._decided = digest(self._decisions())
        evidence = [0.0, 0.0]
        if numbers is not None and squares is not None:
            initial = self._ledger.initial[numbers]
            evidence = [float(initial.sum()), float(squares.sqrt().sum())]
        self._processes.require_same_step(self.clock, self._decided, evidence, self._decisions)

    def _agree_on(self, released: Tensor) -> None:
        """Stop all processes of a run where they would not release the same structures now."""
        if self._processes is not None:
            lines = [f"the release of {self._called(number)}" for number in released.tolist()]
            self._processes.require_same(
                f"what is released at optimizer step {self.clock}", lines, DECIDE_ALIKE
            )

    def _decisions(self) -> list[str]:
        """All that was decided so far, a line for each structure that it touched."""
        ledger = self._ledger
        touched = ((ledger.phase != Phase.ACTIVE) | ledger.immune).nonzero().flatten()
        rows = torch.stack(
            [touched, *(f[touched] for f in (ledger.phase, ledger.step, ledger.wave))]
        )
        what = {Phase.ACTIVE: "was released", Phase.PRUNED: "is PRUNED"}
        return [
            f"{self._called(number)} "
            + what.get(Phase(phase), f"is DECAYING since step {self.clock - step}")
            + f" (wave {wave})"
            for number, phase, step, wave in rows.T.tolist()
        ]

    def _sparse_gradient(self, names: list[str]) -> GradientError:
        name, s = next(
            (name, s)
            for name in names
            for s in self.groups[name].slices
            if s.parameter.grad is not None and s.parameter.grad.layout != torch.strided
        )
        return GradientError(
            f"{s.name!r} of group {name!r} has a sparse gradient, whose share in a structure "
            "cannot be read; switch sparse gradients off for its module"
        )

    def _hear(self, plan: _Plan, due: Tensor) -> Tensor:
        """Which of the structures whose decision falls now are released; bool."""
        assert self.rectify is not None
        criterion, numbers = self.rectify.criterion, plan.decaying[due]
        groups, cohort = self._group_of[numbers].unique(return_inverse=True)
        # A released structure must be replaceable, or the target could not be met.
        free = (self._ledger.phase == Phase.ACTIVE) & ~self._ledger.immune
        spare = self._per_group(free)[groups]
        judged = self._per_group(self._judged().index_fill(0, numbers, True))[groups]
        allowed = (self.rectify.max_share * judged + 1e-9).long()
        limits = torch.minimum(allowed - self._per_group(self._ledger.immune)[groups], spare)
        limits.clamp_(min=0)
        if self.release_limit is not None:
            left = max(0, self.release_limit - int(self._ledger.immune.sum()))
            if int(limits.sum()) > left:  # every group gives up the same share
                limits = limits * left // limits.sum()
        derivative = fisher = worth = price = None
        if criterion.batches and bool((limits > 0).any()):
            told = self._hold(plan.decaying)
            plan.heard = criterion.batches
            derivative, fisher = told[:, numbers]
            if criterion.exchanges:
                known = plan.worth = told[1] / 2 - told[0]
                worth = known[numbers]
                lists = [known[free & (self._group_of == g)].sort().values for g in groups]
                price = pad_sequence(lists, batch_first=True, padding_value=math.inf)
        elif criterion.batches:
            return torch.zeros(numbers.numel(), dtype=torch.bool)
        evidence = Evidence(
            cohort,
            plan.resistance[due],
            plan.gradient[due],
            self._typical(plan)[groups][cohort],
            derivative,
            fisher,
            worth,
            price,
        )
        chosen = criterion.choose(evidence, limits.clone(), self.clock)
        names = [self._names[i] for i in groups.tolist()]
        return require_choice(criterion, chosen, cohort, limits, names)

    def _hold(self, decaying: Tensor) -> Tensor:
        """What a hearing tells of every structure: mean derivative by its gate, and mean square.

        The derivative is of what is minimised: minus that of an objective which is maximised.

        Returns:
            (2, total) float64 on the host, NaN for what was not read.
        """
        assert self.rectify is not None
        assert self._room is not None
        criterion, heard = self.rectify.criterion, self._groups_of(decaying)
        signs = self._signs(heard)
        gated = [
            decaying[self._group_of[decaying] == self._names.index(g.name)] - self._start[g.name]
            for g in heard
        ]
        read, numbers = gated, decaying
        if criterion.exchanges:
            read, numbers = [torch.arange(g.size) for g in heard], self._numbers_of(heard)
        found = hold(
            self._room, heard, gated, criterion.batches, criterion.gate, self._processes, read
        )
        told = torch.full((2, self._ledger.phase.numel()), math.nan, dtype=torch.float64)
        told[:, numbers] = torch.stack(found).cpu()
        told[0, numbers] *= signs.repeat_interleave(torch.tensor([len(r) for r in read]))
        return told

    def _signs(self, groups: list[StructureGroup]) -> Tensor:
        """For each group, -1 where the optimizer maximises the loss by it, else 1; (groups,)."""
        assert self._attachment is not None
        maximised = self._attachment.maximised()
        signs = []
        for group in groups:
            kinds = {id(s.parameter) in maximised for s in group.slices}
            if len(kinds) > 1:
                raise AttachmentError(
                    f"the optimizer maximises by some parameters of group {group.name!r} and "
                    "minimises by others, so a hearing's loss has no sign for it; give them one "
                    "setting of maximize, or use Trajectory()"
                )
            signs.append(-1.0 if kinds.pop() else 1.0)
        return torch.tensor(signs, dtype=torch.float64)

    def worth(self, group: str) -> Tensor | None:
        """What the structures of a group are worth by the last hearing of an exchange.

        See :class:`~dpm_core.Exchange`. An adapter decays the cheapest :meth:`available` ones in
        place of those that were released.

        Returns:
            (K,) float64 on the host, in units of the loss, NaN where nothing was heard; ``None``
            where the criterion does not exchange, or has not decided yet.
        """
        if self._worth is None:
            return None
        start = self._first_of(group)
        return self._worth[start : start + self.groups[group].size].clone()

    def _judged(self) -> Tensor:
        """Which structures have had their decision in a wave that is heard; (total,) bool."""
        assert self.rectify is not None
        assert self._decision is not None
        ledger = self._ledger
        past = (ledger.phase == Phase.DECAYING) & (ledger.step >= self._decision)
        gone = (ledger.phase == Phase.PRUNED) & (ledger.initial > 0)
        return ledger.immune | ((past | gone) & (ledger.wave < self.rectify.waves))

    def _typical(self, plan: _Plan) -> Tensor:
        """Mean |resistance| of each group's structures that have decayed, over a decision's steps.

        Those that were released or pruned before are among them, so that a framework that decays
        few structures at a time has something to compare them with.
        """
        ledger, decision = self._ledger, self._decision
        assert decision is not None
        resistance, steps = ledger.resistance.clone(), torch.zeros_like(ledger.step)
        steps[ledger.immune] = decision
        steps[(ledger.phase == Phase.PRUNED) & (ledger.initial > 0)] = self.smooth.steps
        steps[plan.decaying] = ledger.step[plan.decaying] + 1
        resistance[plan.decaying] = plan.resistance
        decayed = steps > 0
        total = torch.zeros(len(self._names), dtype=torch.float64)
        mean = (resistance[decayed] / steps[decayed]).abs()
        total.index_add_(0, self._group_of[decayed], mean)
        return decision * total / self._per_group(decayed).clamp_min(1)

    def _per_group(self, which: Tensor) -> Tensor:
        """How many structures of each group are among ``which``; (groups,) int64."""
        return torch.bincount(self._group_of[which], minlength=len(self._names))

    def _replace(self, release: Event, choose: Refill) -> None:
        """Start the decay of other structures in place of those that were released.

        Raises:
            ConfigurationError: what ``choose`` returned is no choice of as many as were released
                or fewer, from those that are free.
        """
        group, count = release.group, len(release.structures)
        free, worth = self.available(group), self.worth(group)
        if self.rectify is not None and self.rectify.criterion.exchanges and worth is not None:
            cheapest = worth.argsort(stable=True)  # NaN last
            chosen = cheapest[free[cheapest]][:count]
        else:
            chosen = _require_refill(group, choose(group, count, free.clone()), count, free)
        self.decay({group: chosen}, wave=release.wave + 1)

    @torch.no_grad()
    def _after_step(self) -> None:
        self.clock += 1
        plan, self._plan = self._plan, None
        if plan is not None:
            self._carry_out(plan)
        zero_(self._pruned)

    def _carry_out(self, plan: _Plan) -> None:
        assert self._decaying is not None
        ledger, decaying = self._ledger, self._decaying
        numbers, kept = plan.decaying, ~plan.release
        ledger.gradient[numbers], ledger.resistance[numbers] = plan.gradient, plan.resistance
        ledger.step[numbers] += 1
        step = ledger.step[numbers]
        done = kept & (step == self.smooth.steps)

        # Every other structure of these groups keeps a factor of exactly one.
        table = decaying.table
        target = torch.full((table.size,), -1.0, dtype=torch.float64)
        target[decaying.local[kept]] = target_norm(
            ledger.initial[numbers], step, self.smooth.steps
        )[kept]
        wanted = target.to(device=self._device, dtype=table.dtype, non_blocking=True)
        norms = table.square_norms(table.parameters()).sqrt()
        # A structure that the optimizer made zero has no direction to grow in, and stays zero. One
        # that is not finite stays what it is, and the next step refuses it.
        scaled = (wanted >= 0) & (norms > 0) & torch.isfinite(norms)
        table.scale_(torch.where(scaled, wanted / norms, 1.0))
        self._norms = norms

        released = numbers[plan.release]
        if released.numel():
            assert self.rectify is not None
            if self.rectify.restore == "effect":
                self._restore(released)
            left = target_norm(ledger.initial[released], step[plan.release] - 1, self.smooth.steps)
            ledger.immune[released] = True
            self._move(released, Move.RELEASE)
            self._record("release", released, left)
        finished = numbers[done]
        if finished.numel():
            self._move(finished, Move.FINISH)
            self._record("prune", finished, torch.zeros(finished.numel()))
            self._new_zeros = _Some(decaying.names, table, finished, decaying.local[done])
        if released.numel() or finished.numel():
            self._refresh()

    def _restore(self, released: Tensor) -> None:
        """Bring the effect of released structures back to its norm at the decay's start."""
        groups = self._groups_of(released)
        table = SliceTable([g.effect_slices for g in groups])
        here = self._numbers_of(groups)
        target = torch.full((table.size,), -1.0, dtype=torch.float64)
        target[torch.searchsorted(here, released)] = self._ledger.effect[released]
        wanted = target.to(device=self._device, dtype=table.dtype, non_blocking=True)
        norms = table.square_norms(table.parameters()).sqrt()
        scaled = (wanted > 0) & (norms > 0) & torch.isfinite(norms)
        table.scale_(torch.where(scaled, wanted / norms, 1.0))

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides model and optimizer; tensors on the host."""
        return {
            "version": VERSION,
            **self._settings(),
            "clock": self.clock,
            "heard": self.heard,
            "groups": {
                name: self._ledger.part(self._start[name], group.size)
                for name, group in self.groups.items()
            },
            "events": [asdict(e) for e in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after checking all of it.

        Raises:
            StateError: the state is damaged, or of another version, configuration or model.
                Nothing was assigned.
        """
        check_header(state, self._settings())
        sizes = {name: group.size for name, group in self.groups.items()}
        check_groups(state["groups"], sizes, self.smooth.steps)
        try:
            events = [
                Event(**{**e, "structures": tuple(e["structures"]), "norms": tuple(e["norms"])})
                for e in state["events"]
            ]
            sound = all(self._could_have_happened(e, state["clock"]) for e in events)
        except (TypeError, KeyError) as cause:
            raise StateError(f"the state's events are damaged ({cause})") from cause
        if not sound:
            raise StateError(
                "the state's events are damaged: they name kinds, groups, structures or steps that "
                "there are not"
            )
        for name, part in state["groups"].items():
            self._ledger.assign(self._start[name], sizes[name], part)
        self.clock, self.heard, self.events = state["clock"], state["heard"], events
        self._plan = self._new_zeros = None
        self._refresh()

    def _could_have_happened(self, event: Event, clock: int) -> bool:
        numbers = (event.step, event.wave, *event.structures)
        return (
            all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
            and event.kind in get_args(Kind)
            and event.group in self.groups
            and 0 <= event.step <= clock
            and event.wave >= 0
            and len(event.norms) == len(event.structures)
            and all(0 <= k < self.groups[event.group].size for k in event.structures)
            and all(isinstance(n, float) and 0 <= n < math.inf for n in event.norms)
        )

    def _settings(self) -> dict[str, str]:
        return {"smooth": repr(self.smooth), "rectify": repr(self.rectify)}

    # ------------------------------------------------------------------ bookkeeping

    def _refresh(self) -> None:
        """Rebuild what depends on who decays and who is pruned; after every change of phase."""
        self._decided = None
        decaying = (self._ledger.phase == Phase.DECAYING).nonzero().flatten()
        pruned = (self._ledger.phase == Phase.PRUNED).nonzero().flatten()
        before = self._decaying
        self._decaying = self._some(decaying, before) if decaying.numel() else None
        if self._decaying is None or before is None or self._decaying.table is not before.table:
            self._norms = None
        self._pruned: list[tuple[Tensor, int, Tensor]] = []
        self._zero_table: SliceTable | None = None
        if pruned.numel():
            zeros = self._some(pruned)
            self._zero_table = zeros.table
            self._pruned = zeros.table.positions(zeros.local)

    def _some(self, numbers: Tensor, before: _Some | None = None) -> _Some:
        """Some structures with a table of their groups: the one from before, where it will do."""
        groups = self._groups_of(numbers)
        names = [g.name for g in groups]
        same = before is not None and before.names == names and before.table.fits()
        table = before.table if before and same else SliceTable([g.slices for g in groups])
        return _Some(names, table, numbers, torch.searchsorted(self._numbers_of(groups), numbers))

    def _move(self, numbers: Tensor, move: Move) -> None:
        self._ledger.phase[numbers] = after(self._ledger.phase[numbers], move)
        if move is not Move.START:
            self._ledger.step[numbers] = 0

    def _record(self, kind: Kind, numbers: Tensor, norms: Tensor) -> None:
        for i in self._group_of[numbers].unique().tolist():
            for wave in self._ledger.wave[numbers[self._group_of[numbers] == i]].unique().tolist():
                here = (self._group_of[numbers] == i) & (self._ledger.wave[numbers] == wave)
                name = self._names[i]
                local = numbers[here] - self._start[name]
                self.events.append(
                    Event(
                        self.clock,
                        kind,
                        name,
                        tuple(local.tolist()),
                        tuple(norms[here].tolist()),
                        wave,
                    )
                )

    def _resolve(self, structures: Mapping[str, Sequence[int] | Tensor]) -> Tensor:
        """Numbers of the named structures over all groups, sorted."""
        if not isinstance(structures, Mapping):
            raise PhaseError(
                f"structures are given as {type(structures).__name__}; give a mapping of group "
                "names to lists of numbers: {'conv1': [3, 7]}"
            )
        found = []
        for name, given in structures.items():
            start, size = self._first_of(name), self.groups[name].size
            local = _integers(name, given)
            if local.numel() == 0:
                continue
            if int(local.min()) < 0 or int(local.max()) >= size:
                raise PhaseError(
                    f"group {name!r} has structures 0 to {size - 1}; {local.tolist()} reaches "
                    "outside"
                )
            if local.unique().numel() != local.numel():
                raise PhaseError(
                    f"group {name!r}: a structure is listed twice in {local.tolist()}; list each "
                    "once"
                )
            found.append(start + local)
        return torch.cat(found).sort().values if found else torch.empty(0, dtype=torch.int64)

    def _require_zero(self, group: StructureGroup, pruned: Tensor) -> None:
        """Refuse to speak of PRUNED structures that are not zero; ``pruned`` are their numbers."""
        if not pruned.numel():
            return
        require_fit([group])
        left = torch.zeros(pruned.numel(), dtype=torch.bool)
        for s in group.slices:
            rows = s.index[pruned.to(s.index.device)].to(s.parameter.device)
            values = s.parameter.detach().index_select(s.dim, rows.reshape(-1)).movedim(s.dim, 0)
            left |= (values != 0).reshape(pruned.numel(), -1).any(1).cpu()
        if bool(left.any()):
            bad = pruned[left] + self._start[group.name]
            raise PhaseError(
                f"{self._listed(bad)} should be exactly zero, being PRUNED, but something other "
                "than the optimizer's step has changed the weights: the eval() or train() of a "
                "schedule-free optimizer, a wrapper around the optimizer that was attached, "
                "weights that were loaded, or training after detach(). Take one more step, or "
                "call zero_in(model)"
            )

    def _require_active(self, numbers: Tensor) -> None:
        refused = after(self._ledger.phase[numbers], Move.START) < 0
        if bool(refused.any()):
            bad = numbers[refused]
            phase = Phase(int(self._ledger.phase[bad[0]])).name
            raise PhaseError(
                f"{self._describe(bad)} cannot start to decay, being {phase} already; decay "
                "structures that available() lists"
            )
        if bool(self._ledger.immune[numbers].any()):
            bad = numbers[self._ledger.immune[numbers]]
            raise PhaseError(
                f"{self._describe(bad)} was released and is immune from then on; decay structures "
                "that available() lists"
            )

    def _first_of(self, group: str) -> int:
        if not isinstance(group, str) or group not in self._start:
            raise PhaseError(f"there is no group {group!r}; groups are {self._names}")
        return self._start[group]

    def _groups_of(self, numbers: Tensor) -> list[StructureGroup]:
        return [self.groups[self._names[i]] for i in self._group_of[numbers].unique().tolist()]

    def _numbers_of(self, groups: list[StructureGroup]) -> Tensor:
        """Numbers of all structures of some groups, in order."""
        runs = [torch.arange(self._start[g.name], self._start[g.name] + g.size) for g in groups]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)

    def _called(self, number: int) -> str:
        name = self._names[int(self._group_of[number])]
        return f"structure {number - self._start[name]} of group {name!r}"

    def _describe(self, numbers: Tensor) -> str:
        more = f" (and {numbers.numel() - 1} more)" if numbers.numel() > 1 else ""
        return f"{self._called(int(numbers[0]))}{more}"

    def _listed(self, numbers: Tensor) -> str:
        """All of some structures, group by group; of many in a group the first."""
        parts = []
        for group in self._groups_of(numbers):
            start = self._start[group.name]
            local = numbers[(numbers >= start) & (numbers < start + group.size)] - start
            shown = ", ".join(map(str, local[:_SHOWN].tolist()))
            more = f" and {local.numel() - _SHOWN} more" if local.numel() > _SHOWN else ""
            word = "structure" if local.numel() == 1 else "structures"
            parts.append(f"{word} {shown}{more} of group {group.name!r}")
        return "; ".join(parts)


_SHOWN = 8
"""How many structures of a group a message lists; ours."""


@dataclass
class _Some:
    """Some structures: the names of their groups, a table of those, and who they are.

    ``numbers`` count over all groups, ``local`` over the structures of ``table``.
    """

    names: list[str]
    table: SliceTable
    numbers: Tensor
    local: Tensor


def _integers(name: str, given: object) -> Tensor:
    """What is given for a group as int64 (n,) on the host.

    Raises:
        PhaseError: it is no list of integers.
    """
    listed: Any = given
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    if several and not hasattr(given, "dtype"):  # an array knows the kind of its numbers
        listed = list(listed)
    try:
        local: Tensor = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        raise PhaseError(
            f"group {name!r}: structures are given as {str(given)[:40]!r} "
            f"({type(given).__name__}); give a list of their numbers"
        ) from cause
    if local.numel() == 0 and local.dim() == 1:
        return torch.empty(0, dtype=torch.int64)
    plain = local.dim() == 1 and local.layout == torch.strided and not local.is_meta
    kind = local.dtype
    if isinstance(listed, list) and any(isinstance(k, bool) for k in listed):
        kind = torch.bool  # among integers it would count as one
    if not plain or kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise PhaseError(
            f"group {name!r}: structures are given as {kind} of shape {tuple(local.shape)}; give "
            "a list of their numbers"
        )
    return local.cpu().to(torch.int64)


def _require_refill(group: str, chosen: object, count: int, free: Tensor) -> Tensor:
    """What a refill chose, int64 (n,) on the host.

    Raises:
        ConfigurationError: it is no list of free structures, each once, or more than ``count``.
    """
    try:
        numbers = _integers(group, chosen)
    except PhaseError as cause:
        raise ConfigurationError(f"refill returned no choice. {cause}") from cause
    here = (numbers >= 0) & (numbers < free.numel())
    if numbers.numel() > count:
        fault = f"{numbers.numel()} structures, where {count} were released"
    elif not bool(here.all()) or not bool(free[numbers].all()):
        fault = "structures that are not free"
    elif numbers.unique().numel() != numbers.numel():
        fault = "a structure twice"
    else:
        return numbers
    raise ConfigurationError(
        f"refill chose {fault}, for group {group!r}: {numbers.tolist()}; return at most as many as "
        "its second argument says, each once, of those that its third one allows"
    )


def _to_host(values: Tensor) -> Tensor:
    """Wait for the device and bring values over; the one place on the step path that does."""
    return values.cpu()
