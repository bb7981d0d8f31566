"""Carrying an optimizer over a removal: parameters keep the momentum of what is left of them.

The optimizer remains the same object, so that learning-rate schedulers, step hooks and settings by
parameter group go on as well. Which rows and columns stay of each parameter is read off the same
removal of a copy (:func:`dpm_core.third_party.dependency.survivors`). All of this is ours.

States of their parameter's shape are carried over: momentum, running means of squares. A state of
that shape whose rows and columns mean something else, such as the factors of a square matrix's
curvature, would be cut wrongly; attach a new optimizer before the removal if yours has such states.

Means over rows and columns, as Adafactor keeps them, are about what is gone, too, and whether it
keeps them may depend on a parameter's size. Where a parameter loses something, its state begins
anew, as in a new optimizer. What is kept in an optimizer inside of this one, as Lookahead does, is
treated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpm_core.third_party.errors import AdapterError

_KNOWN = ("params", "param_groups", "state")
_ANOTHER = "Take another optimizer, or attach a new one before the removal"


class CarryOverError(AdapterError):
    """An optimizer cannot go on over a removal. The message says why, and what to do."""


class CarryOver:
    """One optimizer and one removal: construct it before the removal, call :meth:`finish` after.

    Args:
        model: before the removal.
        optimizer: of its parameters; it may hold others as well, which are left alone.

    Raises:
        CarryOverError: the optimizer has state that cannot be divided by structure, or keeps
            parameters in places of its own. Nothing has changed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        inside = [v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)]
        self._optimizers = [optimizer, *inside]
        self._names: dict[Tensor, str] = {}
        for name, parameter in model.named_parameters():
            self._names[parameter] = name
        for one in self._optimizers:
            self._require_divisible(one)

    def _require_divisible(self, optimizer: torch.optim.Optimizer) -> None:
        optimized: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
        own = [(k, v) for group in optimizer.param_groups for k, v in group.items()]
        own = [kv for kv in [*own, *vars(optimizer).items()] if kv[0] not in _KNOWN]
        hidden = {k for k, v in own if any(t in optimized or t.dim() for t in _tensors(v))}
        if hidden:
            raise CarryOverError(
                f"{type(optimizer).__name__} keeps tensors of its own in {sorted(hidden)}, which "
                f"would stay as large as they are. {_ANOTHER}"
            )
        for own_one, name in self._names.items():
            for key, value in optimizer.state.get(own_one, {}).items():
                what = f"{type(optimizer).__name__}'s state {key!r} of {name!r}"
                _require_single_or_shaped(what, value, own_one.shape)

    def finish(self, stays: Mapping[str, list[Tensor]]) -> None:
        """The model is small: let the optimizer go on with its parameters, and cut its states.

        Frozen parameters stay frozen, and new states have their parameters' memory layout.

        Args:
            stays: by parameter and dimension, the positions that are left, (N,) on the host.
        """
        now = dict(self._model.named_parameters(remove_duplicate=False))
        groups = [group for one in self._optimizers for group in one.param_groups]
        optimized = {p for group in groups for p in group["params"]}
        fresh = {p: now[name] for p, name in self._names.items() if p in optimized}
        for optimizer in self._optimizers:
            states: dict[Tensor, dict[str, Any]] = {}
            for old, new in fresh.items():
                state = optimizer.state.get(old, {})
                if new is old or not state or (new.shape != old.shape and _factored(state, old)):
                    continue
                states[new] = {
                    key: _cut(value, stays[self._names[old]], new)
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }
            exchange(optimizer, fresh)
            optimizer.state.update(states)


def _require_single_or_shaped(what: str, value: object, shape: torch.Size) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str):
        return
    if isinstance(value, Tensor) and (value.shape == shape or value.dim() == 0):
        return
    if isinstance(value, Tensor) and _is_mean(value.shape, shape):
        return
    is_ = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is no tensor"
    raise CarryOverError(
        f"{what} {is_}; only states of the parameter's own shape, here {tuple(shape)}, means over "
        f"one of its dimensions, and single values can be carried over. {_ANOTHER}"
    )


def _is_mean(mean: torch.Size, shape: torch.Size) -> bool:
    """Whether a state's shape is its parameter's with one dimension of size 1, or without it."""
    shorter = [(*shape[:d], *shape[d + 1 :]) for d in range(len(shape))]
    kept = [(*shape[:d], 1, *shape[d + 1 :]) for d in range(len(shape))]
    return len(shape) > 1 and tuple(mean) in (*shorter, *kept)


def _factored(state: Mapping[str, Any], parameter: Tensor) -> bool:
    values = [v for v in state.values() if isinstance(v, Tensor) and v.shape != parameter.shape]
    return any(_is_mean(v.shape, parameter.shape) for v in values)


def exchange(optimizer: torch.optim.Optimizer, fresh: Mapping[Tensor, Tensor]) -> None:
    """Put parameters in the place of others, in the same groups; their states are dropped.

    Args:
        optimizer: with the others in its groups.
        fresh: the new parameter of each that is to go.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [fresh.get(p, p) for p in group["params"]]
    for old, new in fresh.items():
        if new is not old:
            new.requires_grad_(old.requires_grad)
            optimizer.state.pop(old, None)


@torch.no_grad()
def _cut(value: Tensor, stays: Iterable[Tensor], like: Tensor) -> Tensor:
    """What stays of a state, in the memory layout of its parameter."""
    for dim, index in enumerate(stays):
        if len(index) < value.shape[dim]:
            value = value.index_select(dim, index.to(value.device))
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def _tensors(value: object) -> Iterable[Tensor]:
    """All tensors in a value made of dictionaries, lists, tuples and sets."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _tensors(k)
            yield from _tensors(v)
    elif isinstance(value, list | tuple | set | frozenset):
        for v in value:
            yield from _tensors(v)
