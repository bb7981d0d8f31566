"""What an adapter is: the translation between one pruning framework and the core.

An adapter's author reads this file and one adapter. An adapter is made for one run of one variant
on one model. The training loop owns batches, loss and progress; it calls the adapter at fixed
points of every step and knows nothing of the framework behind it::

    optimizer = adapter.optimizer(stage)
    adapter.begin(stage, optimizer, loss)       once a stage, with the stage's optimizer
    for each step:
        adapter.before_step(step)               the learning rate is set, nothing else has happened
        loss.backward()
        adapter.after_backward()
        optimizer.step()
        adapter.after_step()
        if adapter.due():                       also asked once before the first step
            adapter.remove()                    then begin() again, with the same optimizer, or,
                                                as the adapter says, with a new one
        if adapter.settled():                   at the first time, what is lost is measured

A framework that prunes in rounds removes several times; :attr:`Adapter.complete` says when that is
over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

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
from dpm_core.groups import is_sharded
from third_party import running
from third_party.groups import Plan as Plan
from third_party.groups import UnsupportedLayerError, UpstreamGroup

Variant = Literal["base", "sp", "sr"]
Loss = Callable[[], Tensor]
"""Runs the model on the next training batch and returns the mean loss."""
State = Mapping[str, Any]
"""What :meth:`Adapter.state_dict` gave."""


class AdapterError(ValueError):
    """A framework cannot do what is asked of it. The message says why, and what to change."""


@dataclass(frozen=True)
class Stage:
    """One stretch of training, as far as an adapter has to know it.

    Attributes:
        steps: training steps; batches that hearings use up count among them.
        steps_per_epoch: steps in one pass over the training data.
        kind: of optimizer.
        learning_rate: at the start; the loop sets it anew before every step.
        momentum: of SGD.
        weight_decay: of the optimizer.
    """

    steps: int
    steps_per_epoch: int
    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def new_optimizer(self, model: nn.Module) -> Optimizer:
        """PyTorch's own optimizer, for all parameters of a model."""
        if self.kind == "sgd":
            return torch.optim.SGD(
                model.parameters(),
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        kind = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return kind(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


@dataclass
class Context:
    """What an adapter is made from.

    Attributes:
        model: the dense model; the adapter works on it in place.
        example: of its inputs, on its device: a batch of any size, several inputs in a tuple or
            list, or a mapping of arguments. The forward pass takes no other than these.
        variant: ``base`` is the framework alone, ``sp`` decays, ``sr`` decays and rectifies.
        smooth: the decay's settings, for ``sp`` and ``sr``.
        rectify: the rectifier's settings, for ``sr``.
        stages: the training stages, in order.
        progress: called now and then during long work outside the training steps, with what is
            going on.
        seed: of the run, for what a framework draws.

    Raises:
        AdapterError: there is no such variant.
    """

    model: nn.Module
    example: Any
    variant: Variant
    smooth: SmoothPruning
    rectify: SelfRectifying
    stages: Mapping[str, Stage]
    progress: Callable[[str], object] = str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            known = ", ".join(map(repr, get_args(Variant)))
            raise AdapterError(f"there is no variant {self.variant!r}; give one of {known}")

    def decay_steps(self) -> int:
        """Training steps from a decision until all is zero, replacements and hearings included."""
        if self.variant == "base":
            return 0
        needed = self.smooth.steps
        if self.variant == "sr":
            heard = self.rectify.decision_step(needed) + self.rectify.criterion.batches
            needed += self.rectify.waves * heard
        return needed


class Adapter(ABC):
    """One run of one framework.

    Attributes:
        context: what the adapter was made from.
        dpm: the core at work, or ``None`` before it is needed and for ``base``.
        decided: whether the framework has begun to take structures out.
        removed: what :meth:`remove` has taken away, or ``None`` before.
        pruned: how many structures that were.
        skipped: why groups are left as they are, by their root layer's name.
        checked: whether :meth:`check` has passed; :meth:`begin` makes up for it.

    Abstract are :meth:`check`, :meth:`begin` and :meth:`remove`. What stands here of
    :meth:`settled` and :meth:`due` is that of a framework that decides once; one that removes
    several times has :attr:`complete` and :meth:`numbers` of its own, too. An adapter that makes
    something in :meth:`begin`, the core above all, extends :meth:`load_state_dict`; one with
    progress of its own :meth:`state_dict`, too.

    An adapter's own :meth:`check` and :meth:`begin` end, or begin, with those that stand here.

    Raises:
        AdapterError: the model is wrapped in DistributedDataParallel, or sharded as FSDP does it,
            or a stage of training is missing or unknown.
    """

    Options: ClassVar[type]
    """A frozen dataclass: the framework's own settings, checked in its ``__post_init__``."""
    stages: ClassVar[Mapping[str, bool]]
    """Training stages the framework knows, in order, and whether each is required."""
    channels_last: ClassVar[bool] = True
    """Whether the framework can do with parameters that are not contiguous."""
    exchanges: ClassVar[bool] = False
    """Whether the framework decays what :class:`~dpm_core.Exchange` names for what was released."""
    carries_optimizer: ClassVar[bool] = True
    """Whether a stage's optimizer goes on over a removal, its state sliced with what is removed.

    By :mod:`adapters.optimizer_state`. False where the removal changes parameters besides, or where
    another optimizer follows: then a new one is made.
    """

    def __init__(self, context: Context, options: Any) -> None:
        _require_whole(context.model)
        exchanging = context.variant == "sr" and context.rectify.criterion.exchanges
        if exchanging and not self.exchanges:
            raise AdapterError(
                f"{type(self).__name__} chooses by itself what it decays in place of released "
                "structures, so it cannot follow an exchange; take Trajectory() or Hearing()"
            )
        _require_stages(context.stages, self.stages)
        self.context = context
        self.options = options
        self.checked = False
        self.skipped: dict[str, str] = {}
        self.dpm: DecayPruning | None = None
        self.decided = False
        self.removed: Plan | None = None
        self.pruned = 0
        self._seen = 0  # events of the core that new_events() has given

    def attach_core(
        self,
        groups: Iterable[StructureGroup],
        optimizer: Optimizer,
        loss: Loss,
    ) -> DecayPruning:
        """Let the core follow an optimizer's steps, with Self-Rectifying in ``sr``."""
        rectify = self.context.rectify if self.context.variant == "sr" else None
        self.dpm = DecayPruning(groups, self.context.smooth, rectify)
        self._seen = 0
        return self.dpm.attach(optimizer, model=self.context.model, loss=loss)

    @property
    def complete(self) -> bool:
        """Whether the model has its final size: no removal is to follow."""
        return self.removed is not None

    def numbers(self, group: str) -> Sequence[int]:
        """By the present numbers of a group's structures, those they had in the dense model."""
        assert self.dpm is not None
        return range(self.dpm.groups[group].size)

    def events(self) -> list[Event]:
        """What the present core has reported, structures by their numbers in the dense model."""
        found = []
        for event in self.dpm.events if self.dpm is not None else []:
            numbers = self.numbers(event.group)
            structures = tuple(numbers[k] for k in event.structures)
            found.append(replace(event, structures=structures))
        return found

    def new_events(self) -> list[Event]:
        """What the core has reported since the last call; nothing without a core."""
        if self.dpm is None:
            return []
        new, self._seen = self.dpm.events[self._seen :], len(self.dpm.events)
        return new

    @abstractmethod
    def check(self) -> None:
        """Refuse, before any training, a target or a model that cannot be served.

        Raises:
            AdapterError: with cause and remedy.
        """
        self.checked = True

    def make_sure(self) -> None:
        """:meth:`check`, unless that was done, or the model is small already."""
        if not (self.checked or self.complete):
            self.check()

    def check_length(self) -> None:
        """For :meth:`check`: refuse a stage 'prune' that is too short for the decay.

        Raises:
            AdapterError: with both lengths.
        """
        needed, given = self.context.decay_steps(), self.context.stages["prune"].steps
        if needed > given:
            raise AdapterError(
                f"the decay takes up to {needed} steps, but the stage 'prune' has {given}; give it "
                "more epochs or shorten smooth.steps"
            )

    def check_ignored(self, names: Iterable[str]) -> None:
        """Refuse to ignore what is not there.

        Raises:
            AdapterError: naming what is no layer of the model.
        """
        known = dict(self.context.model.named_modules())
        for name in names:
            if name not in known:
                raise AdapterError(f"ignored names {name!r}, which is no layer of the model")

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

    def optimizer(self, stage: str) -> Optimizer:
        """A new optimizer of the model's present parameters, for a stage."""
        return self.context.stages[stage].new_optimizer(self.context.model)

    @abstractmethod
    def begin(self, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """A stage starts, or goes on after a removal.

        What stands here, for an adapter's own to begin with, is the check, if it was left out.

        Args:
            stage: one of :attr:`stages`.
            optimizer: what :meth:`optimizer` gave; after a removal the same one, of the parameters
                that the model has now, where :attr:`carries_optimizer` says so.
            loss: runs the model on the next training batch and returns the mean loss; for
                hearings. Each call uses up one training step of the stage.

        Raises:
            AdapterError: as :meth:`check`, or there is no such stage, or the optimizer is of
                another model, such as the large one after a removal.
        """
        if stage not in self.context.stages:
            raise AdapterError(
                f"there is no stage {stage!r}; the context has {list(self.context.stages)}"
            )
        own = {p for p in self.context.model.parameters() if p.requires_grad}
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if not own <= held and not held <= set(self.context.model.parameters()):
            raise AdapterError(
                "the optimizer is of another model: it holds parameters that this one has not, and "
                "lacks some that this one has, as after a removal. Give the one that was carried "
                "over (adapters.optimizer_state), or a new one of model.parameters()"
            )
        self.make_sure()

    def before_step(self, step: int) -> None:
        """A training step begins: for a framework with a learning rate or frozen layers of its own.

        Args:
            step: steps of the stage done so far, hearings' batches among them.
        """
        return

    def after_backward(self) -> None:
        """Gradients are there, the optimizer has not stepped."""
        return

    def after_step(self) -> None:
        """The optimizer has stepped: replace what was released."""
        return

    def settled(self) -> bool:
        """Whether nothing is left of what is to go: it is zero, or removed."""
        if self.complete or self.dpm is None:
            return self.complete
        return self.dpm.count(Phase.DECAYING) == 0

    def due(self) -> bool:
        """Whether the removal is to follow now: decided, and no structure decays any more."""
        return self.decided and not self.complete and (self.dpm is None or self.settled())

    @abstractmethod
    def remove(self) -> None:
        """Make the model physically smaller, in place, and say in :attr:`removed` what went.

        The core, if there is one, is detached first. A further removal adds to :attr:`removed`.
        """

    @staticmethod
    def shrink(model: nn.Module, example: Any, plan: Plan) -> None:
        """Make a model smaller in which all that goes is zero, in place, whatever the framework.

        By torch-pruning's dependency graph. The model's outputs for the example are compared before
        and after, on a copy first.

        Raises:
            UnsupportedLayerError: the outputs would change by more than rounding, or upstream
                cannot remove this. The model is as it was.
        """
        from third_party import dependency  # only now: it loads torch-pruning

        dependency.remove(model, example, plan)

    @staticmethod
    def rebuild(model: nn.Module, example: Any, plan: Plan) -> None:
        """:meth:`shrink` a freshly built dense model, in which nothing is zero, as on reloading.

        Raises:
            UnsupportedLayerError: the small model would not compute what a copy computes in which
                all that goes is zero, or upstream cannot remove this. The model is as it was.
        """
        from third_party import dependency  # only now: it loads torch-pruning

        dependency.repeat(model, example, plan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer."""
        at_work = self.dpm is not None and not self.complete
        return {
            "decided": self.decided,
            "removed": self.removed,
            "pruned": self.pruned,
            "seen": self._seen,
            "dpm": self.dpm.state_dict() if self.dpm is not None and at_work else None,
        }

    def restore_model(self, state: Mapping[str, Any]) -> None:
        """Give the freshly built dense model the layers that it had when the state was made.

        Its values are loaded next, then its optimizer, then :meth:`load_state_dict` is called. A
        state that says ``None`` of ``removed`` gives the layers from before the removal.
        """
        self.checked = True  # before the run that made the state began
        self.removed = state["removed"]
        if self.removed is not None:
            self.rebuild(self.context.model, self.context.example, self.removed)

    def load_state_dict(self, state: State, stage: str, optimizer: Optimizer, loss: Loss) -> None:
        """Take up a run in the middle of a stage; replaces :meth:`begin`.

        An adapter makes anew what its :meth:`begin` makes, the core above all, and then calls this.
        """
        self.decided, self.pruned = state["decided"], state["pruned"]
        self._seen = state["seen"]
        if self.dpm is not None and state["dpm"] is not None:
            self.dpm.load_state_dict(state["dpm"])


def _require_stages(given: Mapping[str, Stage], known: Mapping[str, bool]) -> None:
    """Refuse training stages that a framework does not have, or that it needs and are missing.

    Raises:
        AdapterError: naming them.
    """
    missing = [name for name, required in known.items() if required and name not in given]
    unknown = [name for name in given if name not in known]
    if missing or unknown:
        raise AdapterError(
            f"the stages are {list(given)}, but the framework has {list(known)}"
            + (f" and needs {missing}" if missing else "")
            + "; correct the context's `stages`"
        )


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what third_party refuses into an :class:`AdapterError`."""
    try:
        yield
    except UnsupportedLayerError as cause:
        raise AdapterError(str(cause)) from cause


def _require_whole(model: nn.Module) -> None:
    """Refuse what wraps a model for several processes in a way that pruning does not survive.

    Raises:
        AdapterError: with cause and remedy.
    """
    if isinstance(model, DistributedDataParallel):
        raise AdapterError(
            "the model is wrapped in DistributedDataParallel, which a removal would leave with "
            "parameters that are gone; give the model inside (.module), and wrap it anew after "
            "the removal"
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
            Slice(s.parameter, torch.tensor(s.index), s.dim, s.batch_norm, s.name)
            for s in group.shares
        ],
        [Owner(module, torch.tensor(index), dim) for module, dim, index in group.owners],
    )


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of convolutions and linear layers for one sample.

    Counted by PyTorch's own FlopCounterMode on the model as it is; the model stays in its mode.

    Args:
        model: what to count.
        example: of its inputs; of tensors with as many rows as the first, one row is taken.
    """
    counter = FlopCounterMode(display=False)
    # Attention's fast path is one operation to the counter, which it does not know.
    with torch.no_grad(), counter:
        try:
            running.probe(model, running.first(example))
        except Exception:  # rows that are no samples, as of a graph: then the whole example
            counter.flop_counts.clear()
            running.probe(model, example)
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements."""
    return sum(p.numel() for p in model.parameters())
