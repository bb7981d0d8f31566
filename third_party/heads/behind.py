"""What a tensor of a forward pass is computed from, read off autograd's graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .structures import Leaf, owner

_VIEWS = re.compile(
    r"(T|Transpose|View|UnsafeView|ReshapeAlias|Permute|Slice|Split|SplitWithSizes|Select|Unbind|Cat"
    r"|Expand|AsStrided|ToCopy|Clone|Alias|Squeeze|Unsqueeze|Narrow|Chunk)Backward\d*"
)
_PRODUCTS = re.compile(r"(Addmm|Mm|Bmm|Baddbmm|Linear|Mkldnn\w*|\w*Convolution\w*)Backward\d*")


@dataclass(frozen=True, eq=False)
class Source:
    """What a tensor is computed from: a parameter, a buffer, or the output of a layer.

    Attributes:
        tensor: its value in the pass.
        leaves: by dimension of the tensor what lies along it.
        layer: whether it is a layer's output.
    """

    tensor: Tensor
    leaves: dict[int, Leaf]
    layer: bool


@dataclass
class Behind:
    """What lies between a tensor and the layers that it comes from.

    Attributes:
        sources: outputs of those layers, and parameters and buffers on the way.
        cores: nodes of the attentions on the way: of a softmax, or of PyTorch's fused one.
        products: nodes of the matrix products of two activations on the way, only the nearest.
        mixed: names of the modules whose outputs attention mixes.
    """

    sources: list[Source] = field(default_factory=list)
    cores: list[Any] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)
    mixed: set[str] = field(default_factory=set)

    @property
    def layers(self) -> list[str]:
        """Names of the modules that it all belongs to."""
        return [owner(name) for s in self.sources for name, _ in s.leaves.values()]


def behind(tensor: Tensor, names: Mapping[int, str], outputs: Mapping[Any, Source]) -> Behind:
    """Follow a tensor back.

    Args:
        tensor: of a pass with gradients.
        names: of the model's parameters and buffers, by their ids.
        outputs: of its layers, by their nodes.
    """
    found = Behind()
    leaves: dict[int, Tensor] = {}
    ahead, seen = [(tensor.grad_fn, False)], set()
    while ahead:
        node, mixed = ahead.pop()  # mixed: by a product of two activations
        if node is None or (node, mixed) in seen:
            continue
        seen.add((node, mixed))
        name = node.name()
        if node in outputs:
            source = outputs[node]
            found.sources += [source] if source not in found.sources else []
            found.mixed |= {owner(leaf) for leaf, _ in source.leaves.values() if mixed}
        elif hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        elif "ScaledDotProduct" in name or ("oftmax" in name and mixed):
            found.cores.append(node)
            ahead += [(n, True) for n, _ in node.next_functions]
        elif _PRODUCTS.fullmatch(name):
            weights = [_weight(n, names) for n, _ in node.next_functions]
            for weight in weights:
                leaves |= {id(t): t for t in weight or ()}
                found.mixed |= {owner(names[id(t)]) for t in weight or () if mixed}
            if not any(weights) and not mixed and "Convolution" not in name:
                found.products.append(node)
            if not any(weights) or getattr(node, "_saved_groups", 1) > 1:
                edges = zip(node.next_functions, weights, strict=True)
                ahead += [(n, mixed or not any(weights)) for (n, _), w in edges if not w]
        else:
            ahead += [(n, mixed) for n, _ in node.next_functions]
    for number, leaf in leaves.items():
        if number in names:
            dims = {d: (names[number], d) for d in range(leaf.dim())}
            found.sources.append(Source(leaf, dims, False))
    return found


def _weight(node: Any, names: Mapping[int, str]) -> list[Tensor] | None:
    """The parameters that an operand is, if it is nothing but those."""
    ahead, leaves, steps = [node], [], 0
    while ahead:
        node, steps = ahead.pop(), steps + 1
        if node is None or steps > 64:
            return None
        if hasattr(node, "variable"):
            if id(node.variable) not in names:
                return None
            leaves.append(node.variable)
        elif _VIEWS.fullmatch(node.name()):
            # Constants among what is concatenated have no node.
            ahead += [n for n, _ in node.next_functions if n is not None]
        else:
            return None
    return leaves or None
