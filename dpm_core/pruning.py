"""DecayPruning: what a user calls. Groups, phases, and when the parts of the core do their work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .agreement import Agreement
from .attachment import Attachment, Callback
from .decay import SmoothPruning
from .elsewhere import counterparts, write_zeros
from .errors import AttachmentError, ConfigurationError, PhaseError
from .events import Event, Kind, checked_events, events_of
from .groups import StructureGroup, require_disjoint, require_fit
from .numbering import Numbering
from .phases import Phase
from .rectify import SelfRectifying, require_settings
from .releases import Choice, Refill, Releases, Sums
from .state import VERSION, Ledger, check_groups, check_header, require_available
from .stepping import Stepping


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
    counts once: the core works before and after the outermost one. It does not see what happens to
    the weights outside of ``step``. If structures that are PRUNED are moved away from zero there,
    :meth:`phases` raises. Where the optimizer maximises (``maximize=True``), gradients count with
    the opposite sign, so that resistance is always about what is really minimised.

    The core follows its parameters where their storage, type or device is exchanged
    (``model.to(...)``, ``p.data = ...``). Parameters that are exchanged themselves are refused.

    Copy model, optimizer and core together: ``copy.deepcopy((model, optimizer, dpm))``. The copy of
    the core then follows the copy of the optimizer; without that it is attached to nothing. A core
    with a loss for hearings, or with ``refill``, ``before`` or ``after``, cannot be copied: what it
    calls would still be about the original model.

    In several processes, each has a DecayPruning of its own, with the same groups and settings.
    All decide the same, from the weights and averaged gradients that DistributedDataParallel keeps
    equal. In each step they compare a few figures. If one has decided otherwise, or gradients were
    not averaged, all raise :class:`~dpm_core.DisagreementError` before the step changes anything.

    Args:
        groups: the structure groups, on one device.
        smooth: the decay's length and shape.
        rectify: how decisions are taken back; ``None`` for Smooth Pruning alone.

    Raises:
        GroupError: no groups, something else than groups, two of one name, overlapping slices, or
            several devices.
        ConfigurationError: the decay is too short for Self-Rectifying, or something else is given
            for one of the two.
    """

    def __init__(
        self,
        groups: Iterable[StructureGroup],
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
    ) -> None:
        require_settings(smooth, rectify)
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
        self.reserved: dict[str, int] = {}
        """By group, how many :meth:`available` structures releases must leave there.

        For a framework that has other plans for them than to replace what was released. Groups that
        are not named keep none. Not saved with the state.
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
        self._stepping = Stepping(self._structures, self._ledger, self.smooth, new_zeros)
        self._releases: Releases | None = None
        if self.rectify is not None:
            parts = (self._structures, self._ledger, self.rectify, self.smooth.steps)
            self._releases = Releases(*parts, worth)
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
            model: with ``loss``, for a criterion that runs a hearing: the model whose buffers
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
        objective = None if self._releases is None else self._releases.objective_of(model, loss)
        # Nothing is assigned before all has been accepted.
        self._attachment = self._attached_to(optimizer)
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

    def _attached_to(self, optimizer: object, keep: bool = True) -> Attachment:
        groups = list(self.groups.values())
        return Attachment(optimizer, groups, self._enter, self._leave, keep)

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
            self._attachment = self._attached_to(optimizer, keep=False)

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
            AttachmentError: not attached, or the optimizer does not own the parameters any more.
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
        require_available(self._ledger, self._structures, numbers)
        initial, effect = self._stepping.start_norms(numbers)
        zero = self._ledger.start(numbers, initial, effect, wave)
        self._record("decay", numbers[~zero], initial[~zero])
        self._record("prune", numbers[zero], initial[zero])
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
        return None if self._releases is None else self._releases.worth_of(group)

    # ------------------------------------------------------------------ the step

    def _enter(self) -> bool:
        """Before an optimizer's step. Returns False: whether it is skipped is looked up here."""
        if self._before is not None:
            self._before()
        if self._attachment is not None:  # else it has detached
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
        for event in self.events[past:]:
            if event.kind == "release" and self._refill is not None and self._releases is not None:
                free = self.available(event.group)
                instead = self._releases.replacements(event, free, self._refill)
                self.decay({event.group: instead}, wave=event.wave + 1)
        if self._after is not None:
            self._after()

    @torch.no_grad()
    def _before_step(self) -> None:
        attachment, stepping, releases = self._attachment, self._stepping, self._releases
        assert attachment is not None
        self._sums, self._choice, self._skipped = None, None, False
        if not stepping.idle:
            self._follow()
        decaying, maximised = stepping.decaying, None
        if decaying is not None and releases is not None:
            maximised = attachment.maximised()
        overflow, scale = attachment.scaling()
        reading = stepping.read(overflow, scale, maximised)
        numbers = None if decaying is None else decaying.numbers
        self._agreement.require_same_step(self.clock, numbers, reading.squares)
        # Of several fused optimizers the first does not know of the others' gradients.
        together = overflow is not None and attachment.several
        self._skipped = reading.skipped or (together and not reading.finite)
        if self._skipped:
            return
        sums, choice = stepping.sums(reading), None
        if sums is not None and releases is not None and maximised is not None:
            processes, limit = self._agreement.processes, self.release_limit
            choice = releases.choose(sums, self.clock, limit, self.reserved, maximised, processes)
            if choice is not None:
                self._agreement.require_same_release(self.clock, sums.numbers[choice.released])
                self.heard += choice.batches
                if choice.worth is not None:
                    releases.worth = choice.worth
        self._sums, self._choice = sums, choice

    @torch.no_grad()
    def _after_step(self) -> None:
        self.clock += 1
        sums, self._sums = self._sums, None
        if sums is not None:
            which = None if self._choice is None else self._choice.released
            restore = self.rectify is not None and self.rectify.restore == "effect"
            released, norms, finished = self._stepping.carry_out(sums, which, restore)
            self._record("release", released, norms)
            self._record("prune", finished, torch.zeros(finished.numel(), device="cpu"))
            if released.numel() or finished.numel():
                self._refresh()
        self._stepping.zero()

    def _follow(self) -> None:
        """Notice what happened to the optimizer and to the parameters since the last step."""
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
            "groups": {g: self._ledger.part(self._structures.span(g)) for g in self.groups},
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
        self._stepping = Stepping(self._structures, self._ledger, self.smooth)
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
        waves = self._ledger.wave[numbers]
        self.events += events_of(self._structures, kind, self.clock, numbers, norms, waves)
