"""Scores of the gates, and which structures they select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gates import GateError
from .groups import GateTable

KEEP = 0.1


class GateScores:
    """The paper's Taylor criterion: |dL/dphi * phi| of every gate, summed over batches.

    Call :meth:`reset` when a tick starts and :meth:`add` after each of its backward passes.

    Args:
        table: of the gates.

    Attributes:
        total: (T,), at least float32: the sums, in the table's order of gates.
        batches: how many were added.
    """

    def __init__(self, table: GateTable) -> None:
        self._table = table
        self._gates: list[Tensor] = [g.gate for g in table.gates.values()]
        self.batches = 0
        kind = torch.promote_types(self._gates[0].dtype, torch.float32)
        self.total = torch.zeros_like(torch.cat(self._gates).detach(), dtype=kind)

    def reset(self) -> None:
        """Forget all batches."""
        self.batches = 0
        self.total.zero_()

    @torch.no_grad()
    def add(self) -> None:
        """Add the batch whose gradients the gates have. No device synchronisation.

        Raises:
            GateError: a gate has no gradient; nothing was added.
        """
        gradients = [g.grad for g in self._gates if g.grad is not None]
        if len(gradients) < len(self._gates):
            raise GateError("a gate has no gradient; call this after backward, with gates trained")
        self.total += (torch.cat(gradients) * torch.cat(self._gates)).abs_()
        self.batches += 1

    def of_structures(self) -> Tensor:
        """Each structure's score, the sum over its gates: (S,). The same bits for the same sums."""
        return self._table.gather(self.total, 0).sum(1)

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a run that is resumed inside a tick."""
        return {"total": self.total.clone(), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up sums.

        Raises:
            GateError: they are of other gates; nothing was changed.
        """
        if state["total"].shape != self.total.shape:
            raise GateError(
                f"the state has scores of {len(state['total'])} gates, the model "
                f"{len(self.total)}; load what was saved for this model"
            )
        self.total.copy_(state["total"])
        self.batches = state["batches"]


def protected(sizes: Tensor, keep: float = KEEP) -> Tensor:
    """How many structures of each group always stay, max(1, int(keep * K)): int64 (G,)."""
    return torch.tensor([max(1, int(keep * n)) for n in sizes.tolist()], device=sizes.device)


def places(values: Tensor, group: Tensor) -> Tensor:
    """Each structure's place in its group, from the lowest value on: int64 (S,).

    Args:
        values: (S,); of equal ones the lower number comes first.
        group: int64 (S,), 0 .. G - 1.
    """
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    counts = group.bincount()
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(group)
    place[order] = torch.arange(len(order), device=order.device) - starts[group[order]]
    return place


def highest(scores: Tensor, alive: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """The structures with the highest scores of the living in each group: bool (S,).

    Args:
        scores: (S,), not negative.
        alive: bool (S,).
        group: int64 (S,), 0 .. G - 1.
        count: int64 (G,), how many of each.
    """
    # The dead come first, so a group's last are its best.
    from_top = group.bincount()[group] - 1 - places(scores.where(alive, -1.0), group)
    return from_top < count[group]


def select(
    scores: Tensor,
    alive: Tensor,
    group: Tensor,
    fraction: float,
    *,
    filters: Tensor | None = None,
    keep: float = KEEP,
    eta: float = 0.0,
    areas: Tensor | None = None,
    spared: Tensor | None = None,
    more: int = 0,
    least: Tensor | None = None,
) -> Tensor:
    """The structures that a tick takes out: the lowest of all groups together.

    There are n = int(fraction * filters left) of them, fewer if no more may go. The filters left
    are the gates of living structures, so tied gates count each. That is ours, as is at least one
    (a run would not end otherwise); counted once per structure, the paper's fraction of 0.002 would
    come to nothing below 500 structures.

    Never selected: dead and spared structures; zero scores; the max(1, int(keep * K)) highest of
    the living in each group of K. Of equal scores the lower number goes first (ours).

    Args:
        scores: (S,), not negative.
        alive: bool (S,).
        group: int64 (S,), each structure's group, 0 .. G - 1.
        fraction: the paper's p, above 0, at most 1.
        filters: int64 (S,), the gates of each structure; ``None``: one each.
        keep: share of a group that is protected.
        eta: strength of the term for FLOPs: eta * area * living structures of the group is taken
            off a score; at 0, the recipes' value, there is none.
        areas: (G,), feature-map area over the smallest; needed where eta is not 0.
        spared: bool (S,), living structures that are not to be selected (ours, for releases).
        more: structures to select beyond n (ours, to make up for releases).
        least: int64 (G,), how many of each group have to be left (ours, for widths); ``None``: as
            many as are protected.

    Returns:
        int64 (n,), numbers of structures, the first to go first.

    Raises:
        GateError: a shape, sign or range is wrong, or a living structure's score is not
            finite.
    """
    if not 0 < fraction <= 1 or not 0 <= keep <= 1 or eta < 0 or more < 0:
        raise GateError("give 0 < fraction <= 1, 0 <= keep <= 1, eta and more of at least 0")
    filters = torch.ones_like(group) if filters is None else filters
    spared = torch.zeros_like(alive) if spared is None else spared
    each = (scores, alive, group, filters, spared)
    if any(t.shape != (len(scores),) for t in each):
        raise GateError("scores, alive, group, filters and spared need one shape, (S,)")
    if not bool((torch.isfinite(scores) & (scores >= 0))[alive].all()):
        raise GateError("a score is negative or not finite; was the loss? Lower the learning rate")
    sizes = group.bincount()
    if eta and (areas is None or areas.shape != sizes.shape):
        raise GateError(f"eta is {eta}; give areas of shape ({len(sizes)},)")

    safe = highest(scores, alive, group, protected(sizes, keep))
    worth, left = scores, group[alive].bincount(minlength=len(sizes))
    if eta and areas is not None:
        worth = scores - eta * (areas * left)[group]
    free = alive & ~safe & ~spared & (scores != 0)
    if least is not None:
        free &= places(worth.where(free, torch.inf), group) < (left - least)[group]
    count = max(1, int(fraction * int(filters[alive].sum())))
    lowest = worth.where(free, torch.inf).argsort(stable=True)
    return lowest[: min(count + more, int(free.sum()))]
