"""The method as one object, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..groups import Plan
from .costs import CostModel, Counted
from .gates import (
    GateError,
    add_sparsity_gradient,
    decorate,
    freeze,
    frozen_convolutions,
    unfreeze,
)
from .groups import GateTable, melt, tied_gates
from .schedule import Turn
from .selection import KEEP, GateScores, protected, select


class GateDecorator:
    """Puts gates into a model, scores and masks them, and melts the model at the end.

        decorator = GateDecorator(model, example, fraction=0.005)
        optimizer = SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        step = 0
        while decorator.cost() > target:
            turn = turn_at(step, times)
            decorator.begin(turn)
            optimizer.param_groups[0]["lr"] = learning_rate(turn)
            optimizer.zero_grad()
            loss_of(model).backward()
            decorator.after_backward(turn)
            optimizer.step()
            decorator.end(turn, target)
            step += 1
        decorator.melt(example)

    Args:
        model: plain; gets its gates here, in place. Make the optimizer afterwards.
        example: a batch of any size on the model's device.
        fraction: the paper's p: 0.005 for VGG16, 0.002 for ResNet-56.
        eta, keep: as in :func:`select`.
        strength: of the sparsity penalty.
        counted: what the cost is that targets are given in, as in :class:`CostModel`.
        ignored, progress: as in :func:`tied_gates`.

    Attributes:
        groups, costs, gates, table, scores: the parts, as their classes describe them.

    Raises:
        GateError: as :func:`tied_gates`, :class:`CostModel` and :func:`decorate`; the model is
            untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        fraction: float,
        eta: float = 0.0,
        keep: float = KEEP,
        strength: float = 1e-3,
        counted: Counted = "macs",
        ignored: Sequence[str] = (),
        progress: Callable[[str], object] = str,
    ) -> None:
        if not 0 < fraction <= 1 or not 0 <= keep <= 1 or eta < 0 or strength < 0:
            raise GateError(
                "give 0 < fraction <= 1, 0 <= keep <= 1, eta and strength of at least 0"
            )
        self.model = model
        self._frozen = frozen_convolutions(model)  # by the user
        self._kind = ""  # of the last step's turn; unknown again after a resume
        self.fraction, self.eta, self.keep, self.strength = fraction, eta, keep, strength
        self.groups = tied_gates(model, example, ignored=ignored, progress=progress)
        self.costs = CostModel(model, example, self.groups, counted)
        self.gates = decorate(model, [n for g in self.groups for n in g.members])
        self.table = GateTable(self.groups, self.gates)
        self.scores = GateScores(self.table)

    def begin(self, turn: Turn) -> None:
        """Before a step: freeze or unfreeze where the kind changes; scores start at zero."""
        if turn.kind != self._kind:
            if turn.kind == "tick":
                freeze(self.model)
            else:
                unfreeze(self.model, self._frozen)
            self._kind = turn.kind
        if turn.first:
            self.scores.reset()

    def after_backward(self, turn: Turn) -> None:
        """Score the gates in a tick; add the penalty's gradient in a tock."""
        if turn.kind == "tick":
            self.scores.add()
        else:
            add_sparsity_gradient(self.gates.values(), self.strength)

    def end(self, turn: Turn, target: int | None = None) -> dict[str, list[int]]:
        """After a step: at the end of a tick, :meth:`prune`."""
        return self.prune(target) if turn.kind == "tick" and turn.last else {}

    def selected(
        self,
        target: int | None = None,
        alive: Tensor | None = None,
        spared: Tensor | None = None,
        more: int = 0,
    ) -> Tensor:
        """The structures that the scores select; nothing is masked.

        Args:
            target: cost at which to stop (ours: the original may fall a little below its target).
            alive: bool (S,), the structures that count as left; ``None``: those not masked.
            spared: bool (S,), living structures that are not to be selected.
            more: structures to select beyond the fraction.

        Returns:
            int64 (n,), numbers in the table, the first to go first.

        Raises:
            GateError: nothing may go any more.
        """
        alive = self.table.alive() if alive is None else alive
        chosen = select(
            self.scores.of_structures(),
            alive,
            self.table.group,
            self.fraction,
            filters=self.table.filters,
            keep=self.keep,
            eta=self.eta,
            areas=self.table.areas,
            spared=spared,
            more=more,
        )
        if not len(chosen):
            raise GateError(
                f"nothing is left to select at {self.cost(alive)} {self.costs.word}, and "
                f"{self.least()} is the least there can be; raise the target or lower keep"
            )
        if target is not None:
            after = self.costs.along(self.table.kept(alive), self.table.group[chosen])
            chosen = chosen[: int((after > target).sum()) + 1]
        return chosen

    def prune(self, target: int | None = None) -> dict[str, list[int]]:
        """Mask the :meth:`selected` structures, for good.

        Returns:
            The structures by group.
        """
        chosen = self.selected(target)
        self.table.mask(chosen)
        return self.table.split(chosen)

    def macs(self, alive: Tensor | None = None) -> int:
        """MACs of one sample, of the structures that are alive (``None``: not masked)."""
        alive = self.table.alive() if alive is None else alive
        return int(self.costs.macs(self.table.kept(alive)))

    def cost(self, alive: Tensor | None = None) -> int:
        """What is counted (MACs or parameters), of the same structures as :meth:`macs`."""
        alive = self.table.alive() if alive is None else alive
        return int(self.costs.of(self.table.kept(alive)))

    def least(self) -> int:
        """The cost with every group down to what is protected; no lower target can be met."""
        return int(self.costs.of(protected(self.costs.sizes, self.keep)))

    def melt(self, example: Any) -> Plan:
        """:func:`melt` the model; nothing else here can be used afterwards."""
        return melt(self.model, example, self.groups, self._frozen)

    def state_dict(self) -> dict[str, Any]:
        """The scores; gates, shifts and masks are in the model's own state."""
        return self.scores.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the scores, after the model has taken up its state."""
        self.scores.load_state_dict(state)
