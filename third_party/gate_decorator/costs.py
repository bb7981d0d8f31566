"""MACs and parameters as functions of how many structures every group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import dependency, running, walk
from .gates import GateError, gated
from .groups import GateGroup

Counted = Literal["macs", "parameters"]
"""What a target is a number of: MACs of one sample, as in the paper, or parameters (ours)."""


class CostModel:
    """What the physically smaller model costs, exactly, without building it.

    Every dimension of a parameter shrinks by a fixed number with each structure of a group that is
    removed. These numbers are read off a copy of the model from which one structure of every group
    is really removed. Parameters are all elements of all parameters, a shared one counted once. Of
    MACs, a layer costs unit * rows * columns, where rows and columns are the first two dimensions
    of its weight. Whatever depends on no group, and any operation outside convolutions and linear
    layers, is a constant.

    Args:
        model: plain and dense; stays as it is.
        example: a batch of any size on the model's device.
        groups: what :func:`tied_gates` returned for it.
        counted: which of the two is the cost.

    Attributes:
        counted: as given.
        word: what messages call it.
        sizes: int64 (G,), the structures of each group.
        dense: the cost with all of them.

    Raises:
        GateError: the model has gates, or nothing is known that is called ``counted``.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        groups: Sequence[GateGroup],
        counted: Counted = "macs",
    ) -> None:
        if counted not in get_args(Counted):
            raise GateError(f"counted is {counted!r}; give 'macs' or 'parameters'")
        if gated(model):
            raise GateError("the model has gates; the costs are those of the plain dense model")
        # PyTorch's counter fails at a parameter with a gradient that is the input of a layer.
        copied = running.copied(model).eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            running.probe(copied, running.first(example))
        total = counter.get_total_flops() // 2
        kinds = walk.roots()
        layers = {n: m for n, m in copied.named_modules() if isinstance(m, kinds)}
        by_name, prefix = counter.get_flop_counts(), type(copied).__name__
        macs = [sum(by_name.get(f"{prefix}.{n}", {}).values()) // 2 for n in layers]

        def shapes() -> Tensor:
            return torch.tensor([m.weight.shape[:2] for m in layers.values()], device="cpu").T

        names = [n for n, _ in copied.named_parameters()]
        longest = max(p.dim() for p in copied.parameters())

        def extents() -> Tensor:  # of all parameters, as if each had as many dimensions
            every = [copied.get_parameter(n).shape for n in names]
            return torch.tensor([(*s, *[1] * (longest - len(s))) for s in every], device="cpu").T

        self._dims, self._extents = shapes(), extents()
        self._unit = torch.tensor(macs, device="cpu") // self._dims.prod(0)
        self._constant = total - sum(macs)
        self.sizes = torch.tensor([g.structures for g in groups], device="cpu")
        self._less = torch.zeros(len(groups), *self._dims.shape, dtype=torch.int64, device="cpu")
        self._shorter = torch.zeros(
            len(groups), *self._extents.shape, dtype=torch.int64, device="cpu"
        )
        # A lone structure cannot go.
        first = {g.name: i for i, g in enumerate(groups) if g.structures > 1}
        plan = [(groups[i].name, groups[i].channels_of([0])) for i in first.values()]
        for name in dependency.one_by_one(copied, example, plan):
            self._less[first[name]] = self._dims - shapes()
            self._shorter[first[name]] = self._extents - extents()
        self.counted: Counted = counted
        self.word = "MACs" if counted == "macs" else "parameters"
        self.dense = total if counted == "macs" else int(self._extents.prod(0).sum())

    def of(self, kept: Tensor) -> Tensor:
        """The cost that is counted: :meth:`macs` or :meth:`parameters`, of the same ``kept``."""
        return self.macs(kept) if self.counted == "macs" else self.parameters(kept)

    def macs(self, kept: Tensor) -> Tensor:
        """MACs of one sample.

        Args:
            kept: int64 (..., G), structures left in each group, in the groups' order.

        Returns:
            int64 (...), on the host.

        Raises:
            GateError: a number is negative or above the group's size.
        """
        rows, columns = (self._dims - torch.tensordot(self._gone(kept), self._less, 1)).unbind(-2)
        total: Tensor = self._constant + (self._unit * rows * columns).sum(-1)
        return total

    def parameters(self, kept: Tensor) -> Tensor:
        """Elements of all parameters; as :meth:`macs` otherwise."""
        left = self._extents - torch.tensordot(self._gone(kept), self._shorter, 1)
        total: Tensor = left.prod(-2).sum(-1)
        return total

    def _gone(self, kept: Tensor) -> Tensor:
        gone = self.sizes - kept.cpu()
        if bool(((gone < 0) | (gone > self.sizes)).any()):
            raise GateError(f"kept is {kept.tolist()}; the groups hold {self.sizes.tolist()}")
        return gone

    def along(self, kept: Tensor, order: Tensor) -> Tensor:
        """What is left after each of several removals, one after the other.

        Args:
            kept: int64 (G,), what each group has before.
            order: int64 (n,), the group of each structure that goes, in order.

        Returns:
            int64 (n, G), on the host: structures left in each group, for :meth:`of`.
        """
        steps = nn.functional.one_hot(order.cpu(), len(self.sizes)).cumsum(0)
        return kept.cpu() - steps
