"""What makes a network hard to prune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpm_core.third_party.attention import SplitAttention


class _Calls(TorchFunctionMode):
    """Notes the functions that a forward pass calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        several = name == "flatten" and args[0].dim() == 4 and args[0].shape[2:].numel() > 1
        self.names.add("flatten of several positions" if several else name)
        return func(*args, **(kwargs or {}))


def traits(model: nn.Module, example: Tensor) -> list[str]:
    """What makes a network hard to prune, by its layers and by what a forward pass calls."""
    times: dict[nn.Module, int] = {}

    def count(module: nn.Module, _inputs: Any) -> None:
        times[module] = times.get(module, 0) + 1

    parts = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_pre_hook(count) for m in parts]
    model.eval()
    with torch.no_grad(), _Calls() as calls:
        model(example)
    for hook in hooks:
        hook.remove()
    split = [m for m in parts if isinstance(m, nn.Conv2d) and m.groups > 1]
    depthwise = [m for m in split if m.groups == m.in_channels == m.out_channels]
    attention = {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
    whole = any(isinstance(m, (nn.MultiheadAttention, SplitAttention)) for m in model.modules())
    present = {
        "grouped": len(split) > len(depthwise),
        "depthwise": bool(depthwise),
        "concatenation": bool(calls.names & {"cat", "concat"}),
        "split": bool(calls.names & {"chunk", "split"}),
        "flatten of several positions": "flatten of several positions" in calls.names,
        "LayerNorm": any(isinstance(m, nn.LayerNorm) for m in parts),
        "attention": whole or bool(calls.names & attention),
        "shared modules": any(n > 1 for n in times.values()),
    }
    return [name for name, there in present.items() if there]
