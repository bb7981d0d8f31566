"""Operations that torch-pruning would misread, in ones that it knows, while it traces a model."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .running import map_tensors

# fmt: off
_BY_ELEMENT = {
    "add", "addcdiv", "addcmul", "div", "divide", "lerp", "maximum", "minimum", "mul", "multiply",
    "pow", "rdiv", "rpow", "rsub", "sub", "subtract", "true_divide", "where",
}
# fmt: on
"""Operations element by element, in which a single number has no part in the channels."""


class Rewritten(TorchFunctionMode):
    """Runs a model as it is written, but for what upstream would misread.

    - A gated linear unit, whose output has half the channels of its input, is a product of two
      halves here.
    - A single number that is made of bare parameters alone, such as ``w[0]`` in ``w[0] * a + w[1] *
      b``, loses its history where it meets a larger tensor: upstream would take the elements of
      ``w`` for channels.

    Args:
        model: whose bare parameters count: those of no layer that upstream knows.

    Attributes:
        numbers: autograd's nodes of the numbers that lost their history.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = [m for m in model.modules() if tp.ops.module2type(m) != tp.ops.OPTYPE.ELEMENTWISE]
        layers = {p for m in known for p in m.parameters()}
        self._bare = {p for p in model.parameters() if p not in layers}
        self.numbers: list[Any] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if func is functional.glu:
            return _gated(*args, **given[1])
        if getattr(func, "__name__", "").strip("_") in _BY_ELEMENT and self._bare:
            sizes: list[int] = []
            map_tensors(given, lambda t: sizes.append(t.numel()))
            if max(sizes, default=0) > 1:
                given = map_tensors(given, self._without_history)
        return func(*given[0], **given[1])

    def _without_history(self, tensor: Tensor) -> Tensor:
        node = tensor.grad_fn
        if tensor.numel() != 1 or node is None or not self._is_of_bare(node):
            return tensor
        self.numbers.append(node)
        return tensor.detach()

    def _is_of_bare(self, node: Any) -> bool:
        """Whether only bare parameters lead to a node of autograd's graph."""
        ahead, seen = [node], {node}
        while ahead:
            at = ahead.pop()
            if hasattr(at, "variable") and at.variable not in self._bare:
                return False
            fresh = {before for before, _ in at.next_functions if before is not None} - seen
            seen |= fresh
            ahead += fresh
        return True


def _gated(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002  (PyTorch's names)
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()
