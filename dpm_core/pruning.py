"""DecayPruning: owns groups and phases, and works around the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .agreement import Agreement
from .attachment import Attachment, Callback
from .decay import SmoothPruning, target_norm
from .elsewhere import counterparts, write_zeros
from .errors import AttachmentError, ConfigurationError, GradientError, GroupError, PhaseError
from .events import Event, Kind, checked_events
from .groups import StructureGroup, require_disjoint, require_fit
from .hearing import Objective
from .numbering import Numbering, integers
from .phases import Move, Phase, after
from .rectify import SelfRectifying
from .releases import Choice, Releases, Sums
from .state import VERSION, Ledger, check_groups, check_header
from .stepping import Stepping
from .table import SliceTable

Refill = Callable[[str, int, Tensor], Sequence[int] | Tensor]
"""``choose(group, count, free)``: which structures decay in place of ``count`` released ones."""


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
        self._structures = Numbering(groups)
        self.groups: dict[str, StructureGroup] = self._structures.groups
        require_disjoint(self.groups.values())
        require_fit(self.groups.values())
        self.smooth = smooth if smooth is not None else SmoothPruning()
        self.rectify = rectify
        self.events: list[Event] = []
        self.clock = 0
        """Optimizer steps seen since the start."""
        self.heard = 0
        """Batches that hearings have run; they count as training steps in comparisons."""
        self.release_limit: int | None = None
        """How many structures may be released in all: for a framework whose target leaves no more.

        ``None``: as many as others of their groups can replace. Not saved with the state.
        """

        self._ledger = Ledger.blank(self._structures.size)
        self._attachment: Attachment | None = None
        self._refill: Refill | None = None
        self._before: Callback | None = None
        self._after: Callback | None = None
        self._build()

    def _build(self, new_zeros: Tensor | None = None, worth: Tensor | None = None) -> None:
        """What works on the ledger, and is built anew where the ledger is another one."""
        settings = [f"{name} = {value}" for name, value in self._settings().items()]
        self._agreement = Agreement(self._structures, self._ledger, settings)
        self._stepping = Stepping(self._structures, self._ledger, self.smooth.steps, new_zeros)
        self._releases: Releases | None = None
        if self.rectify is not None:
            steps = self.smooth.steps
            self._releases = Releases(self._structures, self._ledger, self.rectify, steps)
            self._releases.worth = worth
        self._sums: Sums | None = None  # from before a step, for after it
        self._choice: Choice | None = None
        self._skipped = False

    # ------------------------------------------------------------------ attachment

    def attach(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        model: nn.Module | None = None,
        loss: Callable[[], Tensor] | None = None,
        refill: Refill | None = None,
        before: Callback | None = None,
        after: Callback | None = None,
    ) -> DecayPruning:
        """Work around every step of ``optimizer`` from now on, by PyTorch's own step hooks.

        Attach to the outermost optimizer: what a wrapper does to the weights after the step of the
        one inside escapes the core. One that is no optimizer of its own (accelerate's, Lightning's)
        is looked through. An optimizer that is stepped by other calls (``second_step()``) has to
        have one inside whose ``step`` they call; attach to that one.

        Args:
            optimizer: any optimizer that owns all parameters of all groups, or several that own
                them together (a structure may be spread over them). Several are stepped once each,
                in any order, after all gradients have been computed; that is one step of the core.
                A closure given to ``step`` is run once, before gradients are read; an optimizer
                that has to run it several times (LBFGS) is refused.
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
        if self._attachment is not None and self._attachment.optimizers is not None:
            raise AttachmentError(
                "already attached to an optimizer; structures would decay twice a step. Call "
                "detach() first"
            )
        require_fit(self.groups.values())
        objective = None
        if self.rectify is not None and self.rectify.criterion.batches:
            if model is None or loss is None:
                raise AttachmentError(
                    f"{type(self.rectify.criterion).__name__} runs a hearing and needs the model "
                    "and its loss: attach(optimizer, model=model, loss=closure)"
                )
            for group in self.groups.values():
                if not group.owners:
                    raise AttachmentError(
                        f"group {group.name!r} has no owners, so a hearing cannot gate its "
                        "structures; give StructureGroup(owners=...), or use Trajectory()"
                    )
            objective = Objective(model, loss)
        groups = list(self.groups.values())
        # Nothing is assigned before all has been accepted.
        self._attachment = Attachment(optimizer, groups, self._enter, self._leave)
        self._refill, self._before, self._after = refill, before, after
        if self._releases is not None:
            self._releases.objective = objective
        return self

    def detach(self) -> None:
        """Leave the optimizer. Phases stay; nothing decays or is held at zero any more."""
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self._refill = self._before = self._after = None
        if self._releases is not None:
            self._releases.objective = None
        self._sums = self._choice = None
        self._agreement.close()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: everything but what belongs to this very process and optimizer's hooks."""
        hearing = self._releases is not None and self._releases.objective is not None
        if hearing or any(f is not None for f in (self._refill, self._before, self._after)):
            raise AttachmentError(
                "a DecayPruning with a loss for hearings, or with refill, before or after, cannot "
                "be copied or pickled: what the copy calls would still be about this model. Make a "
                "new one of the copied model's groups, attach it, and give it "
                "load_state_dict(dpm.state_dict())"
            )
        state = self.__dict__.copy()
        for name in ("_attachment", "_agreement", "_stepping", "_releases", "_sums", "_choice"):
            del state[name]
        state["optimizer"] = None if self._attachment is None else self._attachment.optimizers
        state["new_zeros"] = self._stepping.new_zeros
        state["worth"] = None if self._releases is None else self._releases.worth
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        optimizer, *built = (state.pop(name) for name in ("optimizer", "new_zeros", "worth"))
        self.__dict__.update(state)
        self._attachment = None
        self._build(*built)
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
        numbers = self._structures.numbers(structures)
        self._follow()
        if numbers.numel() == 0:
            return
        self._require_available(numbers)
        groups = self._structures.groups_of(numbers)
        for group in groups:
            for s in group.slices:
                if not s.parameter.requires_grad:
                    raise GroupError(
                        f"{s.name!r} of group {group.name!r} is frozen (requires_grad is False), "
                        "but the structure would decay while training goes on; unfreeze it, or "
                        "leave the group out"
                    )
        whole = SliceTable([g.slices for g in groups])
        part = SliceTable([g.effect_slices for g in groups])
        squares = [t.square_norms(t.parameters()) for t in (whole, part)]
        norms = torch.stack(squares).sqrt().to("cpu", torch.float64)
        norms = norms[:, torch.searchsorted(self._structures.all_of(groups), numbers)]
        if not bool(torch.isfinite(norms).all()):
            bad = numbers[~torch.isfinite(norms).all(0)]
            raise GradientError(
                f"the norm of {self._structures.described(bad)} is not finite; the model has "
                "diverged. Lower the learning rate, or go back to an earlier checkpoint"
            )
        zero = self._ledger.start(numbers, norms[0], norms[1], wave)
        self._record("decay", numbers[~zero], norms[0, ~zero])
        self._record("prune", numbers[zero], norms[0, zero])
        self._refresh()

    def phases(self, group: str) -> Tensor:
        """Phases of a group's structures, (K,) int64 on the host, as :class:`Phase` values.

        Raises:
            PhaseError: there is no such group; or structures that are PRUNED are not zero, because
                something other than the optimizer's step has changed them.
            GroupError: a parameter has another shape than it had when the group was made.
        """
        phases = self._ledger.phase[self._structures.span(group)].clone()
        pruned = (phases == Phase.PRUNED).nonzero().flatten()
        if pruned.numel() and bool((left := self.groups[group].nonzero(pruned)).any()):
            bad = pruned[left] + self._structures.span(group).start
            raise PhaseError(
                f"{self._structures.listed(bad)} should be exactly zero, being PRUNED, but "
                "something other than the optimizer's step has changed the weights: the eval() or "
                "train() of a schedule-free optimizer, a wrapper around the optimizer that was "
                "attached, weights that were loaded, or training after detach(). Take one more "
                "step, or call zero_in(model)"
            )
        return phases

    def available(self, group: str) -> Tensor:
        """Which structures of a group may be decayed: ACTIVE and never released; (K,) bool."""
        return self._ledger.available[self._structures.span(group)]

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
            write_zeros(group, self._structures.within(group.name, self._ledger.pruned), into)

    def worth(self, group: str) -> Tensor | None:
        """What the structures of a group are worth by the last hearing of an exchange.

        See :class:`~dpm_core.Exchange`. A refill decays the cheapest :meth:`available` ones in
        place of those that were released.

        Returns:
            (K,) float64 on the host, in units of the loss, NaN for groups that were not in the
            hearing; ``None`` where the criterion does not exchange, or has not decided yet.
        """
        if self._releases is None or self._releases.worth is None:
            return None
        return self._releases.worth[self._structures.span(group)].clone()

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
            with torch.no_grad():
                self._stepping.zero()  # of several optimizers one may have stepped
            return
        past = len(self.events)
        self._after_step()
        if self._refill is not None:
            for event in self.events[past:]:
                if event.kind == "release":
                    self._replace(event, self._refill)
        if self._after is not None:
            self._after()

    @torch.no_grad()
    def _before_step(self) -> None:
        assert self._attachment is not None
        self._sums, self._choice, self._skipped = None, None, False
        if not self._stepping.idle:
            self._follow()
        maximised = None
        if self._releases is not None and self._stepping.decaying is not None:
            maximised = self._attachment.maximised()
        overflow, scale = self._attachment.scaling()
        reading = self._stepping.read(overflow, scale, maximised)
        decaying = self._stepping.decaying
        numbers = None if decaying is None else decaying.numbers
        self._agreement.require_same_step(self.clock, numbers, reading.squares)
        # One fused optimizer of several does not know of the others' gradients.
        scaled_together = overflow is not None and len(self._attachment.optimizers or ()) > 1
        self._skipped = reading.skipped or (scaled_together and not reading.finite)
        if self._skipped:
            return
        sums = self._stepping.sums(reading)
        choice = None
        if self._releases is not None and sums is not None and maximised is not None:
            processes = self._agreement.processes
            limit = self.release_limit
            choice = self._releases.choose(sums, self.clock, limit, maximised, processes)
        if choice is not None and sums is not None and self._releases is not None:
            released = sums.numbers[choice.released]
            self._agreement.require_same_release(self.clock, released)
            self.heard += choice.batches
            if choice.worth is not None:
                self._releases.worth = choice.worth
        self._sums, self._choice = sums, choice

    @torch.no_grad()
    def _after_step(self) -> None:
        self.clock += 1
        sums, self._sums = self._sums, None
        if sums is not None:
            self._carry_out(sums, None if self._choice is None else self._choice.released)
        self._stepping.zero()

    def _carry_out(self, sums: Sums, which: Tensor | None) -> None:
        ledger = self._ledger
        released, finished = self._stepping.carry_out(sums, which)
        if released.numel():
            assert self.rectify is not None
            if self.rectify.restore == "effect":
                self._stepping.restore(released)
            initial, step = ledger.initial[released], ledger.step[released]
            ledger.release(released)
            self._record("release", released, target_norm(initial, step - 1, self.smooth.steps))
        if finished.numel():
            ledger.finish(finished)
            self._record("prune", finished, torch.zeros(finished.numel()))
        if released.numel() or finished.numel():
            self._refresh()

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

    def _follow(self) -> None:
        """Notice what happened to the optimizer and to the parameters since the last step.

        Raises:
            AttachmentError: the optimizer does not own a parameter any more, or is gone.
            GroupError: a parameter has another shape, or cannot be decayed any more.
        """
        assert self._attachment is not None
        self._attachment.require_owned()
        self._stepping.follow()

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides model and optimizer; tensors on the host."""
        return {
            "version": VERSION,
            **self._settings(),
            "clock": self.clock,
            "heard": self.heard,
            "groups": {
                name: self._ledger.part(self._structures.span(name)) for name in self.groups
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
        events = checked_events(state["events"], sizes, state["clock"])
        for name, part in state["groups"].items():
            self._ledger.assign(self._structures.span(name), part)
        self.clock, self.heard, self.events = state["clock"], state["heard"], events
        self._sums = self._choice = None
        self._stepping = Stepping(self._structures, self._ledger, self.smooth.steps)
        self._agreement.decisions_changed()
        if self._attachment is not None:
            self._attachment.restart()

    def _settings(self) -> dict[str, str]:
        return {"smooth": repr(self.smooth), "rectify": repr(self.rectify)}

    # ------------------------------------------------------------------ bookkeeping

    def _refresh(self) -> None:
        """To be called after every change of phases."""
        self._agreement.decisions_changed()
        self._stepping.refresh()

    def _record(self, kind: Kind, numbers: Tensor, norms: Tensor) -> None:
        """Add an event for each group and wave that some structures are of."""
        groups, waves = self._structures.group_of[numbers], self._ledger.wave[numbers]
        for i in groups.unique().tolist():
            name = self._structures.names[i]
            local = numbers - self._structures.span(name).start
            for wave in waves[groups == i].unique().tolist():
                here = (groups == i) & (waves == wave)
                structures, sizes = tuple(local[here].tolist()), tuple(norms[here].tolist())
                self.events.append(Event(self.clock, kind, name, structures, sizes, wave))

    def _require_available(self, numbers: Tensor) -> None:
        refused = after(self._ledger.phase[numbers], Move.START) < 0
        if bool(refused.any()):
            bad = numbers[refused]
            phase = Phase(int(self._ledger.phase[bad[0]])).name
            raise PhaseError(
                f"{self._structures.described(bad)} cannot start to decay, being {phase} already; "
                "decay structures that available() lists"
            )
        if bool(self._ledger.immune[numbers].any()):
            bad = numbers[self._ledger.immune[numbers]]
            raise PhaseError(
                f"{self._structures.described(bad)} was released and is immune from then on; decay "
                "structures that available() lists"
            )


def _require_refill(group: str, chosen: object, count: int, free: Tensor) -> Tensor:
    """What a refill chose, int64 (n,) on the host.

    Raises:
        ConfigurationError: it is no list of free structures, each once, or more than ``count``.
    """
    try:
        numbers = integers(group, chosen)
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
