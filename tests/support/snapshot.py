"""Everything that a refusal must leave as it was, and the comparison bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_core import DecayPruning

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bits, in which NaN equals itself and -0 is not 0."""
    plain = tensor.detach().to_dense().clone()
    return plain.view(_INTEGER[plain.element_size()]) if plain.is_floating_point() else plain


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def difference(left: Any, right: Any, where: str = "") -> str | None:
    """Where two nested states differ first; None where they do not."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return None if same_bits(left, right) else where
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if list(left) != list(right):
            return f"{where} (entries)"
        return next((d for k in left if (d := difference(left[k], right[k], f"{where}.{k}"))), None)
    if isinstance(left, list | tuple) and type(left) is type(right):
        if len(left) != len(right):
            return f"{where} (length)"
        pairs = enumerate(zip(left, right, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{where}[{i}]"))), None)
    return None if left == right else where


def snapshot(
    model: nn.Module, optimizer: Optimizer | None = None, dpm: DecayPruning | None = None
) -> dict[str, Any]:
    """Copies of all that training goes on from."""
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        "step hooks": None
        if optimizer is None
        else [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)],
        "dpm": None if dpm is None else copy.deepcopy(dpm.state_dict()),
    }


def objects(model: nn.Module, optimizer: Optimizer | None = None) -> list[list[int]]:
    """Which parameters it is that the model has, and the optimizer in each group."""
    held = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
    return [list(map(id, parameters)) for parameters in [model.parameters(), *held]]


def assert_unchanged(
    before: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    dpm: DecayPruning | None = None,
) -> None:
    changed = difference(before, snapshot(model, optimizer, dpm))
    assert changed is None, f"changed: {changed}"


@contextmanager
def refused(
    error: type[Exception],
    *words: str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    dpm: DecayPruning | None = None,
) -> Iterator[None]:
    """The block raises exactly ``error``, the message has all ``words``, and nothing changed."""
    before, same = snapshot(model, optimizer, dpm), objects(model, optimizer)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert_says(caught.value, *words)
    assert_unchanged(before, model, optimizer, dpm)
    assert objects(model, optimizer) == same


@contextmanager
def says(error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises exactly ``error``, and the message has all ``words``."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert_says(caught.value, *words)


def assert_says(error: BaseException, *words: str) -> None:
    missing = [w for w in words if w not in str(error)]
    assert not missing, f"{str(error)!r} does not say {missing}"
