"""Carrying an optimizer over a removal: parameters keep the momentum of what is left of them.

The optimizer remains the same object, so that learning-rate schedulers, step hooks and settings by
parameter group go on as well. Which rows and columns stay of each parameter is read off the same
removal of a copy (:func:`dpm_core.third_party.dependency.survivors`). All of this is ours.

States of their parameter's shape are carried over: momentum, running means of squares. So are
single values. Whatever else an optimizer keeps is about what is gone, too: means over rows and
columns (Adafactor), factors of a curvature (Shampoo, SOAP, PSGD's Kron), projections (GaLore),
blocks of eight bits, lists of such. Where a parameter loses something, its state then begins anew,
as in a new optimizer. A state as large as its parameter counts as such a factor, too, if the state
of the same name is one elsewhere: the factors of a square matrix are as large as the matrix.

What is kept in optimizers inside of this one, as Lookahead does, is treated in the same way. An
optimizer that keeps tensors beside the states of its parameters is refused, by
:func:`require_carried`: in an attribute, in a parameter group, or in ``state`` under a name, as
MADGRAD and SPAM keep their numbers of steps. Single values may be kept anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpm_core.third_party.errors import AdapterError
from dpm_core.third_party.tensor_hooks import hand_on

_KNOWN = ("params", "param_groups", "state")


class CarryOverError(AdapterError):
    """An optimizer cannot go on over a removal. The message says why, and what to do."""


class CarryOver:
    """One optimizer and one removal: construct it before the removal, call :meth:`finish` after.

    Args:
        model: before the removal.
        optimizer: of its parameters; it may hold others as well, which are left alone.

    Raises:
        CarryOverError: as of :func:`require_carried`. Nothing has changed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        require_carried(optimizer)
        self._model = model
        self._optimizers = list(_with_those_inside(optimizer))
        self._names: dict[Tensor, str] = {}
        for name, parameter in model.named_parameters():
            self._names[parameter] = name

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
            states: dict[Tensor, Any] = {}
            foreign = {
                key
                for parameter, state in _states(optimizer)
                for key, value in state.items()
                if not (_single(value) or _shaped(value, parameter) or _is_mean(value, parameter))
            }
            for old, new in fresh.items():
                state = optimizer.state.get(old, {})
                if not isinstance(state, Mapping):  # of which nobody says how it could be cut
                    if new.shape == old.shape:
                        states[new] = state
                    continue
                factored = any(k in foreign or _is_mean(v, old) for k, v in state.items())
                if new is old or not state or (factored and new.shape != old.shape):
                    continue
                states[new] = {
                    key: _cut(value, stays[self._names[old]], new)
                    if key not in foreign and _shaped(value, old)
                    else value
                    for key, value in state.items()
                }
            exchange(optimizer, fresh)
            optimizer.state.update(states)


class Attributes:
    """What somebody has put on a model's parameters: attributes, and hooks on their gradients.

    Optimizers read attributes, such as ``p.no_decay = True``, and some write their own: timm's
    AdaHessian does when it is constructed, and cannot go on without. Hooks clip gradients, or step
    an optimizer as soon as one is there. They go on as they are, in their order, and their handles
    go on removing them: see :func:`dpm_core.third_party.tensor_hooks.hand_on`.

    Construct this before a removal, call :meth:`finish` after.

    Args:
        parameters: by name, before the removal.

    Attributes:
        divided: whether there are tensors of a parameter's shape among them.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._before = dict(parameters)
        self.divided = any(_shaped(v, p) for p in self._before.values() for v in vars(p).values())

    @torch.no_grad()
    def finish(self, now: Mapping[str, Tensor], stays: Mapping[str, list[Tensor]]) -> None:
        """The model is small: put them on its new parameters; what cannot be divided is left out.

        Args:
            now: the parameters after the removal, by the same names.
            stays: as :meth:`CarryOver.finish` takes it; not needed where nothing is ``divided``,
                nor of parameters that lose nothing.
        """
        for name, old in self._before.items():
            new = now[name]
            if new is old:
                continue
            hand_on(old, new)
            for key, value in vars(old).items():
                if _shaped(value, old):
                    setattr(new, key, _cut(value, stays.get(name, ()), new))
                elif _plain(value):
                    setattr(new, key, value)


def require_carried(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that keeps tensors where a removal cannot exchange or divide them.

    Raises:
        CarryOverError: naming the optimizer, where it keeps them, and the remedy.
    """
    for one in _with_those_inside(optimizer):
        optimized: set[Tensor] = {p for group in one.param_groups for p in group["params"]}
        own = [(k, v) for group in one.param_groups for k, v in group.items()]
        own = [kv for kv in [*own, *vars(one).items()] if kv[0] not in _KNOWN]
        own += [(f"state[{k!r}]", v) for k, v in one.state.items() if not isinstance(k, Tensor)]
        hidden = {k for k, v in own if any(t in optimized or t.numel() > 1 for t in _tensors(v))}
        if hidden:
            raise CarryOverError(
                f"{type(one).__name__} keeps tensors of its own in {sorted(hidden)}, which would "
                "stay as large as they are. Take another optimizer, or attach a new one before the "
                "removal"
            )


def _with_those_inside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, and all that it holds in its attributes, each once."""
    seen: set[int] = set()
    ahead: list[Any] = [optimizer]
    while ahead:
        one = ahead.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.optim.Optimizer):
            yield one
            ahead += [v for k, v in vars(one).items() if k not in _KNOWN]
        elif isinstance(one, Mapping):
            ahead += one.values()
        elif isinstance(one, list | tuple):
            ahead += one


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """What an optimizer keeps of each parameter, by name."""
    for key, value in optimizer.state.items():
        if isinstance(key, Tensor) and isinstance(value, Mapping):
            yield key, value


def _single(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.shape == (1,)
    return value is None or isinstance(value, bool | int | float | complex | str)


def _plain(value: object) -> bool:
    """Whether a value is single, or consists of single ones."""
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_plain, value))
    return _single(value)


def _shaped(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_mean(value: object, parameter: Tensor) -> bool:
    """Whether a state's shape is its parameter's with one dimension of size 1, or without it."""
    if not isinstance(value, Tensor) or parameter.dim() < 2 or _shaped(value, parameter):
        return False
    shape = parameter.shape
    shorter = [(*shape[:d], *shape[d + 1 :]) for d in range(len(shape))]
    kept = [(*shape[:d], 1, *shape[d + 1 :]) for d in range(len(shape))]
    return tuple(value.shape) in (*shorter, *kept)


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
