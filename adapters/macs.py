"""The MACs of a model that loses channels, many times over and without a forward pass each time."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import counted


class MacsLeft:
    """Tells in which of many steps a model that loses channels has come down to some MACs.

    A forward pass after each step would take as long as the steps. But what an operation on a
    weight costs for each element of it, and what any other operation costs, mostly stays what it
    was in the dense model; so the sizes of the weights tell the MACs. A pass checks that of every
    operation after 1, 2, 4, 8 ... steps, and in the step that comes down to the goal. Costs never
    rise as channels go, so what holds before and after some steps holds in between. Where it does
    not hold, as where channels are rows of a later layer's input, a pass counts after every further
    step. If the goal may then lie behind, :meth:`missed` says so.

    Args:
        model: loses channels between the calls.
        example: of its inputs, as for :func:`~dpm_core.adapters.base.count_macs`.
        goal: the MACs.
        by_sizes: ``False``: a pass counts after every step.

    Attributes:
        left: the MACs after the last step.
    """

    def __init__(self, model: nn.Module, example: Any, goal: float, *, by_sizes: bool = True):
        self._model, self._example, self._goal = model, example, goal
        self._by_sizes, self._missed = by_sizes, False
        self._steps, self._sure = 0, True
        self._costs, names = self._pass()
        self._sizes = [(name, self._size(name)) for name in names]
        self.left = sum(self._costs) // 2

    def reached(self) -> bool:
        """Whether the steps are to end: the goal is reached, or may have been missed.

        To be called before the first step, and after each.
        """
        if self._steps > 0:  # before the first, it was counted already
            self.left = sum(self._expected()) // 2
            due = self._steps & (self._steps - 1) == 0
            self._sure = False
            if not self._by_sizes or due or self.left <= self._goal:
                self._count()
        self._steps += 1
        return self._missed or self.left <= self._goal

    def missed(self) -> bool:
        """Whether an earlier step may have reached the goal: begin anew, without ``by_sizes``.

        To be called after the last step.
        """
        if not self._sure:
            self._count()
        return self._missed

    def _count(self) -> None:
        """Count by a pass."""
        costs, _ = self._pass()
        self.left, self._sure = sum(costs) // 2, True
        if self._by_sizes and costs != self._expected():
            self._by_sizes, self._missed = False, self.left <= self._goal

    def _expected(self) -> list[int]:
        """What each operation costs by the sizes of the weights."""
        now = {name: self._size(name) for name, _ in self._sizes}
        both = zip(self._costs, self._sizes, strict=True)
        return [cost * now[name] // before for cost, (name, before) in both]

    def _size(self, name: str | None) -> int:
        return 1 if name is None else self._model.get_parameter(name).numel()

    def _pass(self) -> tuple[list[int], list[str | None]]:
        """Each operation's cost, and the name of the one weight that it computes with."""
        weights = {
            p.untyped_storage().data_ptr(): name
            for name, p in self._model.named_parameters()
            if p.dim() > 1 and p.numel()
        }
        costs, names = [], []
        for cost, given in counted(self._model, self._example):
            found = [weights[address] for address in given if address in weights]
            costs.append(cost)
            names.append(found[0] if len(found) == 1 else None)
        return costs, names
