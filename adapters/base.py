"""What an adapter is: the translation between one pruning framework and the core.

An adapter's author reads this file and one adapter. Its user writes an ordinary training loop::

    options = DepGraphOptions(speed_up=2.0)
    run = DepGraph(model, example, options, SmoothPruning(200), SelfRectifying())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run.attach(optimizer)
    for images, labels in loader:
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()
        optimizer.step()
        if run.due:
            run.remove()

Without smoothing the framework prunes as it does by itself; without a rectifier no decision is
taken back. An adapter works in the optimizer's own step hooks. A step that a gradient scaler skips
does not count. After :meth:`Adapter.remove` the model is small, and
the same optimizer goes on with what is left of its parameters and of its state.

To go on from a checkpoint, make the adapter of the dense model, as at the start, and then::

    run.load_state_dict(saved["run"])  # gives the model the layers that it had
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.load_state_dict(saved["optimizer"])
    run.attach(optimizer)
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dpm_core import (
    DecayPruning,
    Event,
    Owner,
    Phase,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
)
from dpm_core.attachment import Attachment, all_unwrapped
from dpm_core.groups import is_sharded
from dpm_core.numbering import Numbering
from dpm_core.processes import DECIDE_ALIKE, Processes
from dpm_core.rectify import require_settings
from dpm_core.third_party import running
from dpm_core.third_party.errors import AdapterError as AdapterError
from dpm_core.third_party.groups import UpstreamGroup

from .optimizer_state import require_carried
from .removal import Removal, require_example, require_model, root_channels

Loss = Callable[[], Tensor]
"""Runs the model on the next training batch and returns the mean loss."""
Structures = dict[str, Sequence[int] | Tensor]
"""Numbers of structures, by group."""

VERSION = 2
"""The version of :meth:`Adapter.state_dict`."""


@dataclass(frozen=True)
class Training:
    """How long the training is that an adapter works in. Batches of hearings count as steps.

    Attributes:
        steps: in all, from :meth:`Adapter.attach` on.
        steps_per_epoch: in one pass over the training data, where settings count epochs.
        sparse: what comes before the pruning, for a framework that learns sparsely first.
    """

    steps: int
    steps_per_epoch: int = 1
    sparse: Training | None = None


class UnfinishedWarning(UserWarning):
    """A training has ended before the last removal."""


class Adapter(ABC):
    """One run of one framework on one model.

    An adapter of one's own defines :attr:`Options`, :meth:`groups`, :meth:`selection` and
    :meth:`check`, and for Self-Rectifying :meth:`choose`, unless :attr:`refills` is false. That is
    a framework that decides once, at the start. One that decides at other times calls
    :meth:`decide` in :meth:`start` or :meth:`after_step`; one that removes several times has
    :attr:`complete`, :attr:`due` and :meth:`numbers` of its own, too.
    What it has to remember is its :meth:`own_state`, and comes back in :meth:`load_state_dict`, or
    in :meth:`restore`, when the optimizer is there.

    Args:
        model: the dense model; the adapter works on it in place. One that ``torch.compile`` wraps
            is pruned inside, and called by its own names.
        example: of its inputs, on its device: a batch of any size, several inputs in a tuple or
            list, or a mapping of arguments. The forward pass is called with these alone.
        options: the framework's own settings, an :attr:`Options`.
        smooth: the decay. ``None``: structures are taken out at once, as the framework does it.
        rectify: how decisions are taken back. ``None``: they are not.
        training: how long the training is. ``None``: nothing is checked against its length, and
            a framework that has to know it refuses.
        seed: for what a framework draws.
        progress: called now and then during long work outside the training steps, with what is
            going on.

    Attributes:
        dpm: the core at work; ``None`` before :meth:`attach` and without smoothing.
        optimizers: what was attached.
        clock: optimizer steps so far; with sparse learning, steps since it ended.
        decided: whether the framework has begun to take structures out.
        removed: all that :meth:`remove` has taken away, or ``None`` before.
        pruned: how many structures that were.
        skipped: why groups are left as they are, by their root layer's name.
        checked: whether :meth:`check` has passed; if not, :meth:`attach` calls it.

    Raises:
        ConfigurationError: ``smooth`` or ``rectify`` is something else.
        AdapterError: the model is no module, or cannot be run on the example;
            there is a rectifier and no smoothing, or no :meth:`choose` to replace what it
            releases; the model is wrapped in DistributedDataParallel, sharded as FSDP does it, of
            TorchScript, or ``torch.compile`` wraps a part of it;
            or the training is not one that the framework can work in.
    """

    Options: ClassVar[type]
    """A frozen dataclass: the framework's own settings, checked in its ``__post_init__``."""
    learns_sparse: ClassVar[bool] = False
    """Whether the framework can learn sparsely before it prunes."""
    needs_training: ClassVar[bool] = False
    """Whether the framework's schedule depends on the training's length."""
    carries: ClassVar[bool] = True
    """Whether an optimizer goes on with its states after a removal."""
    channels_last: ClassVar[bool] = True
    """Whether the framework can do with parameters that are not contiguous."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        options: Any,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        *,
        training: Training | None = None,
        seed: int = 0,
        progress: Callable[[str], object] = str,
    ) -> None:
        name = type(self).__name__
        if not isinstance(options, self.Options):
            raise AdapterError(f"{name} takes a {self.Options.__name__}, not {options!r}")
        self.options = options
        require_settings(smooth, rectify)
        if rectify is not None and smooth is None:
            raise AdapterError(
                "a rectifier takes back decays, and without smoothing there are none; give a "
                "SmoothPruning(steps), too"
            )
        if rectify is not None and rectify.criterion.exchanges and not self.refills:
            raise AdapterError(
                f"{name} replaces what was released by its next selection, so it cannot follow an "
                "exchange; take Trajectory() or Hearing()"
            )
        if rectify is not None and self.refills and type(self).choose is Adapter.choose:
            raise AdapterError(
                f"{name} cannot replace what a rectifier releases: leave the rectifier out, or let "
                "the adapter define choose()"
            )
        if not isinstance(training, Training | None):
            raise AdapterError(f"training is {training!r}; give Training(steps, steps_per_epoch)")
        if training is None and self.needs_training:
            raise AdapterError(
                f"{name} plans by the length of the training; give training=Training(steps, "
                "steps_per_epoch)"
            )
        if training is not None and training.sparse is not None and not self.learns_sparse:
            raise AdapterError(f"{name} has no sparse learning; leave out Training's `sparse`")
        require_model(model)
        model = running.inside(model)
        _require_whole(model)
        require_example(model, example)
        self.model, self.example = model, example
        self.smooth, self.rectify = smooth, rectify
        self.training, self.seed, self.progress = training, seed, progress
        self.dpm: DecayPruning | None = None
        self.optimizers: list[Optimizer] = []
        self.clock = 0
        self.checked = self.decided = False
        self.removed: Removal | None = None
        self.pruned = 0
        self.skipped: dict[str, str] = {}
        self._loss: Loss | None = None
        self._steps: Attachment | None = None  # without a core
        self._heard = 0  # batches of earlier cores' hearings
        self._seen = 0  # events of the core that new_events() has given
        self._grouped: dict[str, StructureGroup] | None = None  # without a core
        self._state: Mapping[str, Any] | None = None  # to be taken up when attached
        self._type = running.type_of(model)
        self._attached = False
        self._lacks = ""  # as of Removal

    # ------------------------------------------------------------------ for users

    def attach(self, optimizer: Optimizer | Sequence[Optimizer], loss: Loss | None = None) -> Self:
        """Work around every step of an optimizer from now on; a first decision may fall at once.

        Attached again, to the optimizer of another stage of training, the adapter goes on with the
        new one.

        Args:
            optimizer: of the model's parameters; or several, each of a part of them, which step
                one after the other. Wrappers, such as accelerate's, are looked through. Of several,
                those that hold nothing of the model are left out. It may lack layers that are not
                pruned, and hold parameters besides the model's.
            loss: runs the model on the next training batch and returns the mean loss; for
                :class:`~dpm_core.Hearing`, :class:`~dpm_core.Exchange`, and a framework's ranking
                by gradients alone. Each call uses up a step of the training.

        Returns:
            self.

        Raises:
            AdapterError: as :meth:`check`, if that was left out; or the optimizer is of another
                model, such as the large one after a removal, or keeps tensors where a removal
                cannot divide them. Such that it has after its first steps alone are refused there.
            AttachmentError: see :meth:`dpm_core.DecayPruning.attach`.
        """
        _require_whole(self.model)  # it may have been sharded since
        self._bring_example()
        optimizers = self._training(all_unwrapped(optimizer))
        self._require_carried(optimizers)
        if not (self.checked or self.complete):
            self.check()
        before, self._grouped = (self.optimizers, self._loss), None
        self.detach()
        self.optimizers, self._loss = optimizers, loss
        try:
            if self._state is not None:
                self.restore(self._state)
            elif not before[0]:
                self.start()
            else:
                self.follow()
        except BaseException:
            self.detach()
            self.optimizers, self._loss = before
            raise
        self._state = None
        return self

    def detach(self) -> None:
        """Leave the optimizer. What is decaying stays as it is, and goes on when attached again."""
        self._attached = False
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
        if self.dpm is not None:
            self.dpm.detach()

    def finish(self) -> None:
        """Leave the optimizer at the end of a training; warn if a removal is still to come."""
        early, decaying = self._attached and not self.complete, 0
        if early and self.dpm is not None:
            decaying = self.dpm.count(Phase.DECAYING)
        self.detach()
        if early:
            still = f"{decaying} structures still decay" if decaying else "a removal is to come"
            warnings.warn(
                f"the training has ended, and {still}, so the model has not its final size: train "
                "on, give it more epochs, or shorten smooth.steps",
                UnfinishedWarning,
                stacklevel=2,
            )

    @property
    def refills(self) -> bool:
        """Whether released structures are replaced at once, in their group: by :meth:`choose`."""
        return True

    @property
    def due(self) -> bool:
        """Whether to call :meth:`remove` now: all is decided, and nothing decays any more."""
        return self.decided and not self.complete and self._none_decays()

    def remove(self) -> Removal:
        """Make the model physically smaller, in place; its optimizer goes on with what is left.

        Parameters become new objects, with the attributes and gradient hooks of the old ones. What
        lists parameters, or is kept by them, is to be taken anew (``clip_grad_norm_``, averages).

        Returns:
            What this removal took; :attr:`removed` is all of them.

        Raises:
            AdapterError: it is not due; or the outputs would change by more than rounding (see
                :meth:`Removal.apply`), or the optimizer's state cannot be divided. Model and
                optimizer are as they were.
            DisagreementError: the processes of a run would remove different structures; likewise.
        """
        if not self.due:
            raise AdapterError(
                "there is nothing to remove yet: call remove() when `due` says so"
                if not self.complete
                else "all is removed that was to go"
            )
        going = self.going()
        if self.dpm is None:  # else the core has seen to it in every step
            _require_same_everywhere(going)
        removal = self.take_out(going).leaving(self.model, self._lacks)
        self._account(removal, going)
        self.follow()
        return removal

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer."""
        if self._state is not None:  # loaded, and not taken up yet
            return dict(self._state)
        at_work = self.dpm is not None and not self.complete
        return {
            "version": VERSION,
            "settings": self._settings(),
            "attached": bool(self.optimizers),
            "clock": self.clock,
            "heard": self._heard if at_work else self.heard,
            "seen": self._seen,
            "decided": self.decided,
            "removed": None if self.removed is None else list(self.removed),
            "pruned": self.pruned,
            "dpm": self.dpm.state_dict() if self.dpm is not None and at_work else None,
            **self.own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the next :meth:`attach`.

        The dense model gets the layers that it had when the state was saved; load its values, and
        make the optimizer, afterwards.

        Raises:
            AdapterError: the state is of another release, of other settings or of another model,
                which then is as it was.
        """
        if self.optimizers:
            raise AdapterError("load_state_dict() comes before attach(): make a new adapter")
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            raise AdapterError(
                "the adapter's state is damaged or was saved by another release; start anew, or "
                "go on with the release that saved it"
            )
        if not state.get("attached", True):
            return  # all is to come, as without it
        now = self._settings()
        for name, before in state.get("settings", {}).items():  # earlier releases saved none
            if name in now and now[name] != before:
                raise AdapterError(
                    f"the state is of a run with {name} = {before!r}, and here it is "
                    f"{now[name]!r}; construct the adapter with the same, or start anew"
                )
        self.lay_out(None if state["removed"] is None else Removal(state["removed"]))
        self.clock, self._heard, self._seen = state["clock"], state["heard"], state["seen"]
        self.decided, self.pruned = state["decided"], state["pruned"]
        self._state = state

    def lay_out(self, removed: Removal | None) -> None:
        """Give the dense model the layers that it had in a run, after what the run had removed.

        The run's weights can then be loaded into it, those of its end or those before a removal.
        """
        if removed is not None:
            self._bring_example()
            removed.apply(self.model, self.example, cut=True)
        self._laid_out(removed)

    def is_of(self, module: nn.Module) -> bool:
        """Whether this adapter's model is a module, or a part of it."""
        return any(m is self.model for m in module.modules())

    # ------------------------------------------------------------------ for comparisons

    @property
    def complete(self) -> bool:
        """Whether the model has its final size: no removal is to follow."""
        return self.removed is not None

    @property
    def settled(self) -> bool:
        """Whether all that is to go is zero, or removed."""
        return self.complete or (self.decided and self.dpm is not None and self._none_decays())

    @property
    def heard(self) -> int:
        """Batches that hearings and rankings have used up; they count as steps of the training."""
        return self._heard + (0 if self.dpm is None else self.dpm.heard)

    def numbers(self, group: str) -> Sequence[int]:
        """The numbers that a group's structures had in the dense model, by their present ones."""
        assert self.dpm is not None
        return range(self.dpm.groups[group].size)

    def events(self) -> list[Event]:
        """What the present core has reported, with structures numbered as in the dense model."""
        events = [] if self.dpm is None else self.dpm.events
        return [
            replace(e, structures=tuple(self.numbers(e.group)[k] for k in e.structures))
            for e in events
        ]

    def new_optimizer(
        self, kind: str, learning_rate: float, momentum: float, weight_decay: float
    ) -> Optimizer:
        """:func:`new_optimizer` of the model as it is, or instead the framework's own."""
        return new_optimizer(self.model, kind, learning_rate, momentum, weight_decay)

    # ------------------------------------------------------------------ for authors

    @abstractmethod
    def check(self) -> None:
        """Refuse, before any training, a target or a model that the framework cannot handle.

        An adapter that overrides this method calls it at the end of its own.

        Raises:
            AdapterError: with cause and remedy.
        """
        self.checked = True

    @abstractmethod
    def groups(self) -> Iterable[StructureGroup]:
        """The core's structure groups of the model as it is now."""

    @abstractmethod
    def selection(self) -> Structures:
        """What the framework takes out now: structures by group. The model stays as it is."""

    def choose(self, group: str, count: int, free: Tensor) -> Sequence[int] | Tensor:
        """The structures that decay in place of released ones, by the framework's ranking.

        Args:
            group: in which they were released.
            count: how many to choose; fewer where no more are free.
            free: which may be chosen, (K,) bool.
        """
        raise NotImplementedError(f"{type(self).__name__} does not replace what was released")

    def start(self) -> None:
        """When attached for the first time: decide, unless the framework waits."""
        self.follow()
        self.decide()

    def before_step(self) -> None:
        """When the optimizer is about to step, and the gradients are there."""
        return

    def after_step(self) -> None:
        """When the optimizer and the core have done their step, and :attr:`clock` has counted."""
        return

    def going(self) -> Structures:
        """What a removal takes: what is zero, or, without smoothing, what the framework selects."""
        if self.dpm is None:
            return self.selection()
        return {g: (self.dpm.phases(g) == Phase.PRUNED).nonzero()[:, 0] for g in self.dpm.groups}

    def take_out(self, going: Structures) -> Removal:
        """Make the model smaller by some structures, and let the optimizer go on."""
        removal = Removal((g, self.channels(g, structures)) for g, structures in going.items())
        removal.apply(self.model, self.example, self.optimizers, cut=self.dpm is None)
        return removal

    def channels(self, group: str, structures: Sequence[int] | Tensor) -> list[int]:
        """Some structures as output channels of the layer that their group is named after.

        Raises:
            PhaseError: there is no such group, or these are not numbers of its structures.
        """
        groups = self.grouped()
        Numbering(groups.values()).numbers({group: structures})
        return root_channels(groups[group], structures)

    def own_state(self) -> dict[str, Any]:
        """What this framework has to remember besides, for :meth:`state_dict`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """In place of :meth:`start`, when attached with a saved state: go on from there."""
        self.follow()
        if self.dpm is not None and state["dpm"] is not None:
            self.dpm.load_state_dict(state["dpm"])
            self._seen = state["seen"]  # follow() has begun a core that had nothing to report

    def decide(self) -> None:
        """Let the framework decide now: what it selects decays, or is due for removal."""
        if self.dpm is not None:
            self.dpm.decay(self.selection())
        self.decided = True

    def grouped(self) -> Mapping[str, StructureGroup]:
        """The structure groups of the model as it is, by name; read once for each removal."""
        if self.dpm is not None:
            return self.dpm.groups
        if self._grouped is None:
            self._grouped = {g.name: g for g in self.groups()}
        return self._grouped

    def new_events(self) -> list[Event]:
        """What the core has reported since the last call; nothing without a core."""
        if self.dpm is None:
            return []
        new, self._seen = self.dpm.events[self._seen :], len(self.dpm.events)
        return new

    def follow(self) -> None:
        """Put hooks on the optimizer's step: the core's, and this adapter's around them."""
        self._attached = True
        if self.complete or self.smooth is None:
            self._steps = Attachment(self.optimizers, [], self.before_step, self._after)
            return
        if self.dpm is None:
            self.dpm = DecayPruning(self.groups(), self.smooth, self.rectify)
            self.dpm.clock, self._seen = self.clock, 0
        self.dpm.attach(
            self.optimizers,
            model=self.model,
            loss=self._loss,
            refill=self.choose if self.refills else None,
            before=self.before_step,
            after=self._after,
        )

    def decay_steps(self) -> int:
        """Steps from a decision until all is zero, replacements and hearings included."""
        if self.smooth is None:
            return 0
        needed = self.smooth.steps
        if self.rectify is not None:
            heard = self.rectify.decision_step(needed) + self.rectify.criterion.batches
            needed += self.rectify.waves * heard
        return needed

    def check_length(self) -> None:
        """For :meth:`check`: refuse a training that is too short for the decay.

        Raises:
            AdapterError: with both lengths.
        """
        if self.training is not None and self.decay_steps() > self.training.steps:
            raise AdapterError(
                f"the decay takes up to {self.decay_steps()} steps, but the training has "
                f"{self.training.steps}; give it more epochs or shorten smooth.steps"
            )

    @staticmethod
    def frozen(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
        """Why structures with a part in these (name, parameter) cannot decay, if one is frozen."""
        for name, parameter in parameters:
            if not parameter.requires_grad:
                return f"holds {name!r}, which is frozen (requires_grad is False) and cannot decay"
        return None

    def check_trainable(self, root: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """For :meth:`check`: refuse to prune what is frozen.

        Args:
            root: the name of the group's root layer.
            parameters: with a part in the group, by name.

        Raises:
            AdapterError: naming the layer and the remedy.
        """
        why = self.frozen(parameters)
        if why is not None:
            raise AdapterError(
                f"the group of {root!r} {why}. Let it train, or name {root!r} in `ignored`"
            )

    # ------------------------------------------------------------------ internals

    def __getstate__(self) -> dict[str, Any]:
        """For copies, where nothing of the adapter is at work."""
        if self._attached and self.dpm is not None:
            raise AdapterError(
                f"a {type(self).__name__} that is attached cannot be copied or pickled: it works "
                "on this model and its optimizer. Save its state_dict(); for a copy of the model, "
                "make a new one of that at its full size, and give it this state"
            )
        return self.__dict__.copy()

    def _settings(self) -> dict[str, Any]:
        """What a state can go on with only as it was, as plain values."""
        settings: dict[str, Any] = {
            "smooth": None if self.smooth is None else "SmoothPruning",
            "rectify": None if self.rectify is None else type(self.rectify.criterion).__name__,
        }
        if is_dataclass(self.options):
            for field in fields(self.options):
                value = getattr(self.options, field.name)
                if value is None or isinstance(value, bool | int | float | str):
                    settings[field.name] = value
        return settings

    def _after(self) -> None:
        self.clock += 1
        if self.clock & (self.clock - 1) == 0:  # some begin to keep things after some steps
            self._require_carried(self.optimizers)
        self.after_step()

    def _require_carried(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse what the removal would refuse, when the training would be lost."""
        if self.carries and not self.complete:
            for one in optimizers:
                require_carried(one)

    def _bring_example(self) -> None:
        """A trainer may have moved the model to another device or another type since."""
        place, before, self._type = (
            running.device_of((), self.model),
            self._type,
            running.type_of(self.model),
        )
        self.example = running.map_tensors(
            self.example,
            lambda t: t.to(place, self._type if t.dtype == before else t.dtype),
        )

    def _none_decays(self) -> bool:
        return self.dpm is None or self.dpm.count(Phase.DECAYING) == 0

    def _laid_out(self, removed: Removal | None) -> None:
        """The model is as a run had it after what is removed."""
        self.removed = None if removed is None else removed.leaving(self.model, self._lacks)
        self.checked, self._grouped = True, None

    def _account(self, removal: Removal, going: Structures) -> None:
        """After a removal: leave the optimizer, and add up what was removed."""
        self.detach()
        self._grouped = None
        self.pruned += sum(len(structures) for structures in going.values())
        removed = removal if self.removed is None else self.removed + removal
        self.removed = removed.leaving(self.model, self._lacks)

    @property
    def optimizer(self) -> Optimizer | None:
        """The attached optimizer, or the first of several."""
        return self.optimizers[0] if self.optimizers else None

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _training(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Those that hold parameters of the model."""
        parameters = set(self.model.parameters())
        held = [{p for group in o.param_groups for p in group["params"]} for o in optimizers]
        optimized = set().union(*held)
        lacking = {n: p for n, p in self.model.named_parameters() if p not in optimized}
        if any(p.requires_grad for p in lacking.values()) and not optimized <= parameters:
            # It may be of some layers, and of what else trains. Then all that is pruned is in it.
            pruned = self._pruned() if optimized & parameters else parameters
            missing = next((n for n, p in lacking.items() if p in pruned), None)
            if missing is not None:
                raise AdapterError(
                    "the optimizer is of another model: it holds parameters that this one has not, "
                    f"and lacks {missing!r}, as after a removal. Give the one that went through "
                    "the removal, or a new one of model.parameters()"
                )
        ours = [o for o, params in zip(optimizers, held, strict=True) if params & parameters]
        return ours or optimizers

    def _pruned(self) -> set[Tensor]:
        """The parameters that an optimizer needs to have to be this model's."""
        if not self.carries:
            return {p for p in self.model.parameters() if p.requires_grad}
        if not self.complete:
            return {s.parameter for group in self.grouped().values() for s in group.slices}
        layers = dict(self.model.named_modules())
        named = [layers[name] for name, _ in self.removed or () if name in layers]
        return {p for layer in named for p in layer.parameters()}


def new_optimizer(
    model: nn.Module, kind: str, learning_rate: float, momentum: float, weight_decay: float
) -> Optimizer:
    """PyTorch's own optimizer, for all parameters of a model.

    Args:
        model: whose parameters.
        kind: ``sgd``, ``adam`` or ``adamw``.
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: of all parameters.
    """
    parameters = model.parameters()
    if kind == "sgd":
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )
    adam: type[torch.optim.Adam] = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return adam(parameters, lr=learning_rate, weight_decay=weight_decay)


def _require_same_everywhere(going: Structures) -> None:
    """Refuse a removal that is another one in another process of the run.

    Raises:
        DisagreementError: in every process, naming a structure.
    """
    processes = Processes.found()
    if processes is None:
        return
    try:
        lines = [
            f"structure {k} of group {group!r}"
            for group, structures in sorted(going.items())
            for k in sorted(torch.as_tensor(structures, device="cpu").tolist())
        ]
        processes.require_same("what is removed", lines, DECIDE_ALIKE)
    finally:
        processes.close()


def _require_whole(model: nn.Module) -> None:
    """Refuse a model that is wrapped or sharded for several processes in a way pruning would break.

    Raises:
        AdapterError: with cause and remedy.
    """
    if isinstance(model, DistributedDataParallel):
        raise AdapterError(
            "the model is wrapped in DistributedDataParallel, which a removal would leave with "
            "parameters that are gone; give the model inside (.module), and wrap it anew after "
            "the removal"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise AdapterError(
            f"the model is a {type(model).__name__}, whose layers cannot be exchanged; prune it "
            "before torch.jit makes it one"
        )
    for name, _, _ in running.compiled_parts(model):
        raise AdapterError(
            f"torch.compile wraps the part {name!r}, whose layers it gives other names; compile it "
            f"in place ({name}.compile() instead of torch.compile({name})), or give this part "
            "alone to be pruned"
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise AdapterError(
                f"{name!r} is sharded over processes ({type(parameter).__name__}, as FSDP and "
                "tensor parallelism make them), so no process can rank or remove its channels; "
                "train with DistributedDataParallel, or prune before the model is sharded"
            )


def structure_group(group: UpstreamGroup) -> StructureGroup:
    """An upstream's group as the core's structure group, named after its root layer."""
    return StructureGroup(
        group.root,
        [
            Slice(s.parameter, torch.tensor(s.index, device="cpu"), s.dim, s.batch_norm, s.name)
            for s in group.shares
        ],
        [
            Owner(module, torch.tensor(index, device="cpu"), dim)
            for module, dim, index in group.owners
        ],
    )


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of convolutions and linear layers for one sample.

    By the formulas of PyTorch's own FlopCounterMode, on the model as it is. It stays in its mode.

    Args:
        model: what to count.
        example: of its inputs; one row is taken of every tensor with as many rows as the first.
    """
    return sum(flops for flops, _ in counted(model, example)) // 2


def counted(model: nn.Module, example: Any) -> list[tuple[int, list[int]]]:
    """A pass for :func:`count_macs`: the ``counted`` of :class:`~.running.Watched`."""
    watched = running.Watched(counting=True)
    with torch.no_grad():
        try:
            running.probe(model, running.first(example), watched=watched)
        except Exception:  # rows that are no samples, as of a graph: then the whole example
            watched = running.Watched(counting=True)
            running.probe(model, example, watched=watched)
    return watched.counted


def width_unit(round_to: int | None) -> int:
    """Of how many channels the widths of layers that lose some keep a multiple, by an option.

    Raises:
        AdapterError: the option is below 1.
    """
    if round_to is not None and round_to < 1:
        raise AdapterError(f"round_to is {round_to}; give at least 1")
    return round_to or 1


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements."""
    return sum(p.numel() for p in model.parameters())
