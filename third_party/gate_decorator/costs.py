"""Multiply-accumulates as a function of how many structures every group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import dependency, graph, running
from .gates import GateError, gated
from .groups import GateGroup


class CostModel:
    """MACs of one sample, exact for the physically smaller model, without building it.

    A layer costs unit * rows * columns, where rows and columns are the first two dimensions of its
    weight. Both shrink by a fixed number with each structure of a group that is removed. These
    numbers are read off a copy of the model from which one structure of every group is really
    removed. Whatever depends on no group, and any operation outside convolutions and linear layers,
    is a constant.

    Args:
        model: plain and dense; stays as it is.
        example: a batch of any size on the model's device.
        groups: what :func:`tied_gates` returned for it.

    Attributes:
        sizes: int64 (G,), the structures of each group.
        dense: MACs with all of them.

    Raises:
        GateError: the model has gates.
    """

    def __init__(self, model: nn.Module, example: Any, groups: Sequence[GateGroup]) -> None:
        if gated(model):
            raise GateError("the model has gates; the costs are those of the plain dense model")
        copied = running.copied(model).eval()
        with running.without_gradients(copied), FlopCounterMode(display=False) as counter:
            running.probe(copied, running.first(example))
        self.dense = counter.get_total_flops() // 2
        kinds = graph.roots()
        layers = {n: m for n, m in copied.named_modules() if isinstance(m, kinds)}
        by_name, prefix = counter.get_flop_counts(), type(copied).__name__
        macs = [sum(by_name.get(f"{prefix}.{n}", {}).values()) // 2 for n in layers]

        def shapes() -> Tensor:
            return torch.tensor([m.weight.shape[:2] for m in layers.values()]).T

        self._dims = shapes()
        self._unit = torch.tensor(macs) // self._dims.prod(0)
        self._constant = self.dense - sum(macs)
        self.sizes = torch.tensor([g.structures for g in groups])
        self._less = torch.zeros(len(groups), *self._dims.shape, dtype=torch.int64)
        # A lone structure cannot go.
        first = {g.name: i for i, g in enumerate(groups) if g.structures > 1}
        plan = [(groups[i].name, groups[i].channels_of([0])) for i in first.values()]
        for name in dependency.one_by_one(copied, example, plan):
            self._less[first[name]] = self._dims - shapes()

    def macs(self, kept: Tensor) -> Tensor:
        """MACs of one sample.

        Args:
            kept: int64 (..., G), structures left in each group, in the groups' order.

        Returns:
            int64 (...), on the host.

        Raises:
            GateError: a number is negative or above the group's size.
        """
        gone = self.sizes - kept.cpu()
        if bool(((gone < 0) | (gone > self.sizes)).any()):
            raise GateError(f"kept is {kept.tolist()}; the groups hold {self.sizes.tolist()}")
        rows, columns = (self._dims - torch.tensordot(gone, self._less, 1)).unbind(-2)
        total: Tensor = self._constant + (self._unit * rows * columns).sum(-1)
        return total

    def along(self, kept: Tensor, order: Tensor) -> Tensor:
        """MACs after each of several removals, one after the other.

        Args:
            kept: int64 (G,), what each group has before.
            order: int64 (n,), the group of each structure that goes, in order.

        Returns:
            int64 (n,), on the host.
        """
        steps = nn.functional.one_hot(order.cpu(), len(self.sizes)).cumsum(0)
        return self.macs(kept.cpu() - steps)
