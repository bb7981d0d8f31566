"""A pruner of torch-pruning as its user constructed it, with decays in place of its removals.

::

    pruner = tp.pruner.MagnitudePruner(model, example, tp.importance.MagnitudeImportance(), ...)
    run = DepGraph(pruner, SmoothPruning(200), SelfRectifying())  # a TorchPruning
    run.attach(optimizer)
    for images, labels in loader:
        ...
        optimizer.step()
        if run.due:
            run.remove()

What the pruner would remove in its next step decays, and is removed in the end, by the pruner's own
graph, and with its own functions for layers of one's own. Without smoothing it is removed as soon
as it is decided. Any of upstream's pruners serves, with any importance. Several ``iterative_steps``
are taken one after the other in one decision, or with training between them: see ``every``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpm_core import SelfRectifying, SmoothPruning, StructureGroup
from dpm_core.errors import kind_and_line
from dpm_core.third_party import dependency, running, trial
from dpm_core.third_party.groups import UnsupportedLayerError, UpstreamGroup
from dpm_core.third_party.own_pruner import OwnPruner, remedy, traced_example

from .base import Adapter, AdapterError, Structures, structure_group
from .depgraph import LeftUnprunedWarning
from .removal import Removal

COUNTED = "give adapt=..., a function that brings the model's own number of heads up to date"


@dataclass(frozen=True)
class TorchPruningOptions:
    """Settings of :class:`TorchPruning` beside the pruner's own.

    Attributes:
        first: optimizer steps before the pruner's first decision; 0: it falls in ``attach()``.
            With 1 an importance has the first batch's gradients.
        every: optimizer steps from one removal to the pruner's next step. 0: all of its steps are
            one decision, each of what those before it would leave, with no training between them.
            ``None``: each is taken when ``decide()`` is called, the first, too.
        adapt: called with the model after every removal, and with copies of it, to bring numbers
            up to date that upstream does not know, such as an attention's number of heads. It reads
            them off the layers. ``None``: numbers of heads follow where modules keep them as whole
            numbers (``third_party.heads``); where they do not, ``check`` says so.
    """

    first: int = 0
    every: int | None = 0
    adapt: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        for name, steps in (("first", self.first), ("every", self.every)):
            whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
            if not (whole or (name == "every" and steps is None)):
                raise AdapterError(f"{name} is {steps!r}; give a number of steps from 0")
        if self.adapt is not None and not callable(self.adapt):
            raise AdapterError(f"adapt is {self.adapt!r}; give a function of the model, or None")


class TorchPruning(Adapter):
    """See the module.

    Released structures are replaced by the lowest in the same group, in the order in which the
    pruner ranked them when it decided: gradients, and what is drawn, are those of that time.

    Args:
        pruner: of torch-pruning. It ranks, with the gradients that the model has when a decision
            falls; ``step()`` is called here alone.
        smooth: the decay. ``None``: what the pruner selects is removed as soon as it is due.
        rectify: how decisions are taken back. ``None``: they are not.
        example: of the model's inputs, on its device. ``None``: what autograd has kept of the one
            that the pruner was given, which is there where the first layer reads it as it comes.
        first, every, adapt: see :class:`TorchPruningOptions`.
        settings: ``training`` and ``progress`` as of :class:`~dpm_core.adapters.base.Adapter`.

    Raises:
        AdapterError: it is no pruner of torch-pruning, it has taken all its steps, or the example
            has to be given.
    """

    Options: ClassVar[type] = TorchPruningOptions
    options: TorchPruningOptions

    def __init__(
        self,
        pruner: Any,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        *,
        example: Any = None,
        first: int = 0,
        every: int | None = 0,
        adapt: Callable[[nn.Module], object] | None = None,
        **settings: Any,
    ) -> None:
        options = TorchPruningOptions(first, every, adapt)
        self._failures: list[Exception] = []
        self._own = OwnPruner(pruner, None if adapt is None else _named(adapt, self._failures))
        if example is None:
            example = traced_example(pruner)
        if example is None:
            raise AdapterError(
                f"{self._own.name} has kept no example of the model's inputs; give it here, too, "
                "as example=..."
            )
        super().__init__(self._own.model, example, options, smooth, rectify, **settings)
        if self._own.step >= self._own.steps:
            raise AdapterError(
                f"{self._own.name} has taken all of its {self._own.steps} steps; construct it anew"
            )
        self._note_earlier()
        self.skipped |= self._own.unseen()
        for why in self.skipped.values():
            self.progress(f"left out: {why}")
        self._groups: dict[str, UpstreamGroup] = {}
        self._selected: Structures = {}
        self._scores: dict[str, Tensor] = {}
        self._open = False  # a decision has fallen, and its removal is to come
        self._next = first  # when the next decision falls
        self._left: dict[str, list[int]] = {}  # by group, what is left of the dense model's numbers

    def _note_earlier(self) -> None:
        """What the pruner has taken by itself is in no removal of this run."""
        if self._own.step:
            self._lacks = (
                f"{self._own.name} had taken {self._own.step} of its {self._own.steps} steps "
                "before this run, which knows nothing of what went in them; give save() the sum of "
                "a Removal of that and of this one, or let a run take all steps"
            )

    @property
    def pruner(self) -> Any:
        """The user's own."""
        return self._own.upstream

    # ------------------------------------------------------------------ before the training

    def check(self) -> None:
        """Refuse groups that the pruner may prune and that cannot decay or be removed.

        Raises:
            AdapterError: naming a layer of the group, why, and the remedy; or the training is too
                short for the decay.
        """
        self.check_length()
        groups = self._own.groups()
        for why in self._own.refused.values():
            raise AdapterError(why)
        if not groups:
            raise AdapterError(
                f"{self._own.name} may prune no group of layers: raise its ratios, or shorten its "
                "ignored_layers" + "".join(f"; {why}" for why in self.skipped.values())
            )
        for group in groups:
            why_not = self.frozen((s.name, s.parameter) for s in group.shares)
            if why_not is not None:
                raise AdapterError(remedy(group.root, why_not))
        odd = trial.inexact(self.model, self.example, groups, self.progress, self._own.build)
        if odd and self._failures:  # rather than to blame a group for it
            raise self._failures[0]
        for root, why in odd.items():
            also = root in self._own.with_heads and self.options.adapt is None
            raise AdapterError(remedy(root, why) + (f", or {COUNTED}" if also else ""))
        self._own.require_ranking()
        super().check()

    def check_length(self) -> None:
        """For :meth:`check`: refuse a training that is too short for all of the pruner's decays.

        Where the user calls ``decide()``, the least that it can take counts: one after the other.

        Raises:
            AdapterError: with both lengths, and what they come of.
        """
        if self.training is None:
            return
        first, every, decay = self.options.first, self.options.every, self.decay_steps()
        rounds = 1 if every == 0 else self._own.steps - self._own.step
        needed = rounds * decay + (0 if every is None else first + (rounds - 1) * every)
        if needed > self.training.steps:
            raise AdapterError(
                f"{rounds} decays of up to {decay} steps, first={first} and every={every} take up "
                f"to {needed} steps, but the training has {self.training.steps}; give it more "
                "epochs, shorten smooth.steps, or lower first, every or the pruner's "
                "iterative_steps"
            )

    def groups(self) -> list[StructureGroup]:
        """Upstream's groups, as far as the pruner may prune them."""
        self._groups = {g.root: g for g in self._own.groups()}
        for why in self._own.refused.values():
            raise AdapterError(why)
        return [structure_group(g) for g in self._groups.values()]

    # ------------------------------------------------------------------ decisions

    @property
    def complete(self) -> bool:
        """Whether the removal of the pruner's last step is done."""
        return not self._open and self._own.step >= self._own.steps

    @property
    def due(self) -> bool:
        """Whether the removal of the pruner's present step is to follow now."""
        return self._open and self._none_decays()

    @property
    def settled(self) -> bool:
        """Whether nothing is left of what is to go in all of the pruner's steps."""
        last = self._own.step >= self._own.steps
        return last and (not self._open or (self.dpm is not None and self._none_decays()))

    def numbers(self, group: str) -> Sequence[int]:
        """By the present numbers of a group's structures, those they had in the dense model."""
        return self._left.get(group, range(self._groups[group].structures))

    def selection(self) -> Structures:
        """What the pruner takes out in its next step, or in all of them, which count as taken."""
        if self.dpm is None:
            self.groups()
        at_once = self.options.every == 0
        decision = (
            self._own.decide_all(self.example, self.progress) if at_once else self._own.decide()
        )
        self._scores = decision.scores
        if decision.dropped:
            layers = ", ".join(map(repr, decision.dropped))
            for root in decision.dropped:
                self.skipped[root] = "would lose all there is, so upstream leaves it whole"
            warnings.warn(
                f"{self._own.name} leaves {layers} whole in this step, which would lose all there "
                "is; give max_pruning_ratio, or lower the ratio",
                LeftUnprunedWarning,
                stacklevel=2,
            )
        return dict(decision.structures)

    def decide(self) -> None:
        """The pruner's next step: what it would remove now decays, or is due for removal.

        Called by itself, unless ``every`` is ``None``.

        Raises:
            AdapterError: before :meth:`attach`; the last decision's removal is still to come, or
                the pruner has taken all its steps; or upstream stumbles, with the layer's name.
        """
        if not self.optimizers:
            raise AdapterError("decide() comes after attach()")
        if self._open:
            raise AdapterError("the last decision's removal is still to come: wait until it is due")
        if self.complete:
            raise AdapterError(f"{self._own.name} has taken all of its {self._own.steps} steps")
        self._selected = self.selection()
        if self.dpm is not None:
            self.dpm.decay(self._selected)
        self.decided = self._open = True

    def choose(self, group: str, count: int, free: Tensor) -> Tensor:
        """The lowest of a group by the ranking that the decision went by."""
        score = self._scores[group].clone()
        score[~free] = torch.inf
        return score.argsort(stable=True)[:count]

    def start(self) -> None:
        """The first decision falls, unless the user says when."""
        self._note_earlier()
        self.follow()
        self._decide_in_time()

    def after_step(self) -> None:
        """The next decision falls when it is time."""
        self._decide_in_time()

    def _decide_in_time(self) -> None:
        waits = self.options.every is None or self._open or self.complete
        if not waits and self.clock >= self._next:
            self.decide()

    # ------------------------------------------------------------------ removal

    def going(self) -> Structures:
        """What a removal takes: what is zero, or, without smoothing, what was selected."""
        return self._selected if self.dpm is None else super().going()

    def channels(self, group: str, structures: Sequence[int] | Tensor) -> list[int]:
        """Some structures as output channels of the group's root layer."""
        return self._groups[group].channels_of(torch.as_tensor(structures, device="cpu").tolist())

    def take_out(self, going: Structures) -> Removal:
        """By the pruner's graph, after the same removal of a copy has left its outputs alike."""
        removal = Removal((g, self.channels(g, structures)) for g, structures in going.items())
        self._apply(removal, self.optimizers, cut=self.dpm is None)
        return removal

    def _apply(
        self, removal: Removal, optimizers: Sequence[torch.optim.Optimizer], *, cut: bool
    ) -> None:
        with self._own.removal(list(removal)):
            removal.apply(self.model, self.example, optimizers, cut=cut, build=self._own.build)

    def remove(self) -> Removal:
        """Make the model smaller; the pruner's next decision falls in its time.

        Returns:
            What this removal took; :attr:`removed` is all of them.

        Raises:
            AdapterError: as :meth:`dpm_core.adapters.base.Adapter.remove`. Model, optimizer and
                pruner are as they were.
        """
        removal = super().remove()
        self._decide_in_time()
        return removal

    def _account(self, removal: Removal, going: Structures) -> None:
        super()._account(removal, going)
        self._open, self._selected, self._scores = False, {}, {}
        self._next = self.clock + (self.options.every or 0)
        if self.complete:
            return  # the present core's numbers stay those of its events
        for root, structures in going.items():
            gone = set(torch.as_tensor(structures, device="cpu").tolist())
            self._left[root] = [n for k, n in enumerate(self.numbers(root)) if k not in gone]
        if self.dpm is not None:
            self._heard, self.dpm = self.heard, None

    # ------------------------------------------------------------------ saving

    def own_state(self) -> dict[str, Any]:
        """What the pruner counts, and the ranking of the present decision."""
        return {
            "pruner": self._own.state(),
            "open": self._open,
            "next": self._next,
            "left": dict(self._left),
            "scores": dict(self._scores),
            "selected": {
                g: torch.as_tensor(k, device="cpu").tolist() for g, k in self._selected.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the next attach().

        The pruner is one that was constructed anew, of the dense model, with the same settings.

        Raises:
            AdapterError: the state is of another release, adapter or model; this model and its
                layers then are as they were.
        """
        if isinstance(state, Mapping) and "pruner" not in state:
            raise AdapterError("this is the state of another adapter than TorchPruning")
        super().load_state_dict(state)
        self._own.load(state["pruner"])
        self._open, self._next = state["open"], state["next"]
        self._left, self._scores = dict(state["left"]), dict(state["scores"])
        self._selected = dict(state["selected"])

    def lay_out(self, removed: Removal | None) -> None:
        """Give the dense model the layers that it has in a run in which so much was removed."""
        kept = running.parts(self.model)
        try:
            for part in dependency.separate([] if removed is None else list(removed)):
                self._apply(Removal(part), [], cut=True)
        except BaseException:  # of a later part: the earlier ones are taken back
            running.put_back(kept)
            raise
        self._laid_out(removed)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Attached with a state to go on from."""
        if self.smooth is None:
            self.groups()
        super().restore(state)


def _named(
    adapt: Callable[[nn.Module], object], failures: list[Exception]
) -> Callable[[nn.Module], object]:
    """A user's function, whose errors say that they are its own; they are noted, too."""

    def named(model: nn.Module) -> None:
        try:
            adapt(model)
        except Exception as cause:
            why = UnsupportedLayerError(
                f"the function given as adapt= fails on a copy of the model without some channels "
                f"({kind_and_line(cause)}); let it read all numbers off the layers"
            )
            why.__cause__ = cause
            failures.append(why)
            raise why from cause

    return named
