"""Running a model, and what is noted of a pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dpm_core.adapters.base import count_macs
from dpm_core.third_party import running
from tests.support.networks import draw


class Attention(nn.Module):
    """Attention as one operation, as a layer of PyTorch's, and by products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + functional.scaled_dot_product_attention(x, x, x)
        x = x + self.layer(x, x, x)[0]
        return self.last(x, torch.einsum("bij,bkj->bik", x, x) @ x)


@pytest.mark.parametrize("seed", range(12))
def test_operations_are_counted_as_by_pytorchs_counter(seed):
    drawn = draw(seed)
    assert_counted(drawn.model, drawn.example)


def test_operations_of_attention_are_counted_as_by_pytorchs_counter():
    assert_counted(Attention(), torch.randn(1, 5, 6))


def assert_counted(model: nn.Module, example: object) -> None:
    rows = running.first(example)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        running.probe(model, rows)
    assert count_macs(model, example) == counter.get_total_flops() // 2 > 0


class Grouped(nn.Module):
    """Attention that reads its numbers of heads from attributes."""

    def __init__(self, heads: int, keys: int) -> None:
        super().__init__()
        self.heads, self.keys = heads, keys

    def forward(self, x: Tensor) -> Tensor:
        query, key = x[:, : self.heads], x[:, self.heads : self.heads + self.keys]
        return functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)


def test_an_attention_left_without_key_heads_is_an_error_and_no_end_of_the_process():
    example = torch.randn(2, 6, 3, 4)
    assert running.probe(Grouped(4, 2), example).shape == (2, 4, 3, 4)
    with pytest.raises(RuntimeError, match="no key heads"):
        running.probe(Grouped(4, 0), example)
