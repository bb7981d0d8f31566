"""The method as one object, for a training loop of one's own."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..groups import Plan, structures_in
from .costs import CostModel, Counted
from .gates import (
    GateError,
    add_sparsity_gradient,
    decorate,
    freeze,
    frozen_convolutions,
    unfreeze,
)
from .groups import GateTable, melt, survivors, tied_gates
from .schedule import Turn
from .selection import KEEP, GateScores, highest, places, protected, select


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
        round_to: layers that lose channels keep a multiple of so many in the end (ours).
        ignored, progress: as in :func:`tied_gates`.

    Attributes:
        groups, costs, gates, table, scores: the parts, as their classes describe them.
        units: int64 (G,), of how many structures each group keeps a multiple, on the host.

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
        round_to: int = 1,
        ignored: Sequence[str] = (),
        progress: Callable[[str], object] = str,
    ) -> None:
        if round_to < 1:
            raise GateError(f"round_to is {round_to}; give at least 1")
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
        self.units = torch.tensor(
            [structures_in(round_to, len(g.tied[0])) for g in self.groups], device="cpu"
        )
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

        Where widths are rounded, the selection with which all groups at their next lower multiple
        would meet the target takes them there: of each group what ranks lowest (ours).

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
        spared = torch.zeros_like(alive) if spared is None else spared
        scores, group, kept = self.scores.of_structures(), self.table.group, self.table.kept(alive)
        rounds = bool((self.units > 1).any())
        chosen = select(
            scores,
            alive,
            group,
            self.fraction,
            filters=self.table.filters,
            keep=self.keep,
            eta=self.eta,
            areas=self.table.areas,
            spared=spared,
            more=more,
            least=self._least(self.table.kept(alive & spared).cpu()).to(kept.device)
            if rounds
            else None,
        )
        if not len(chosen):
            raise GateError(
                f"nothing is left to select at {self.cost(alive)} {self.costs.word}, and "
                f"{self.least()} is the least there can be; raise the target or lower keep"
            )
        if target is None:
            return chosen
        lefts = self.costs.along(kept, group[chosen])
        count = int((self.costs.of(self.rounded(lefts)) > target).sum())
        if count == len(chosen) or not rounds:
            return chosen[: count + 1]
        chosen, left = chosen[: count + 1], lefts[count]
        safe = highest(scores, alive, group, protected(self.table.sizes, self.keep))
        free = (alive & ~safe & ~spared).index_fill(0, chosen, False)
        going = (left - self.rounded(left)).to(kept.device)
        place = places(scores.where(free, torch.inf), group)
        return torch.cat([chosen, (free & (place < going[group])).nonzero()[:, 0]])

    def rounded(self, kept: Tensor) -> Tensor:
        """Structures of each group, (..., G), at the next lower multiple; whole groups stay."""
        return torch.where(kept == self.costs.sizes, kept, kept // self.units * self.units)

    def even(self, alive: Tensor) -> bool:
        """Whether all groups that have lost structures are at multiples."""
        kept = self.table.kept(alive).cpu()
        return bool((self.rounded(kept) == kept).all())

    def spare(self) -> dict[str, int]:
        """By group, how many structures have to be free so that any width can be rounded."""
        kept = protected(self.costs.sizes, self.keep) + self.units - 1
        return {g.name: n for g, n in zip(self.groups, kept.tolist(), strict=True)}

    def releasable(self, staying: Tensor, going: Tensor, target: int) -> Tensor:
        """How many structures that go may come to stay, with the target still in reach (ours).

        Of every group the same share may, and the target is met with every group down to those, to
        what is protected, and to what stays already.

        Args:
            staying: int64 (G,), living structures that are not to be selected.
            going: int64 (G,), structures that may come to stay.
            target: cost to be met.

        Returns:
            int64 (G,), at most ``going``; zeros where the target cannot be met without them.
        """
        staying, going = staying.cpu(), going.cpu()
        every = int(going.max())
        shares = [going * n // max(every, 1) for n in range(every + 1)]

        def fits(share: Tensor) -> bool:
            return int(self.costs.of(self._least(staying + share))) <= target

        # The cost does not fall with the share.
        return shares[max(0, bisect.bisect_left(shares, True, key=lambda s: not fits(s)) - 1)]

    def _least(self, staying: Tensor) -> Tensor:
        """How many structures each group keeps at least, (G,): the protected, and some others."""
        sizes = self.costs.sizes
        least = protected(sizes, self.keep) + staying
        return torch.minimum((least + self.units - 1) // self.units * self.units, sizes)

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
        return int(self.costs.of(self._least(torch.zeros_like(self.costs.sizes))))

    def melt(self, example: Any) -> Plan:
        """:func:`melt` the model; nothing else here can be used afterwards."""
        return melt(self.model, example, self.groups, self._frozen)

    def survivors(self, example: Any) -> dict[str, list[Tensor]]:
        """What :meth:`melt` will leave of the plain model's parameters."""
        return survivors(self.model, example, self.groups)

    def state_dict(self) -> dict[str, Any]:
        """The scores; gates, shifts and masks are in the model's own state."""
        return self.scores.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the scores, after the model has taken up its state."""
        self.scores.load_state_dict(state)
