"""An optimizer goes on over a removal: momentum and the like of what stays, stays.

The optimizer remains the same object, so that learning-rate schedulers, step hooks and settings by
parameter group go on as well. Which rows and columns stay of each parameter is found by trying the
same removal on a copy (:func:`third_party.dependency.survivors`). All of this is ours.

What is carried over is what has its parameter's shape: momentum, running means of squares. A state
whose rows and columns mean something else, such as the factors of a square matrix's curvature,
would pass for such a one; optimizers with those need a new start. ::

    remove(model, example, plan, optimizer)

or, where somebody else removes::

    carried = CarryOver(model, optimizer)
    adapter.remove()
    carried.finish(example, adapter.removed)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from third_party import running
from third_party.groups import Plan

_KNOWN = ("params", "param_groups", "state")


class CarryOverError(ValueError):
    """An optimizer cannot go on over a removal. The message says why, and what to do."""


def remove(model: nn.Module, example: Any, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    """Make a model physically smaller, in place, and let its optimizer go on with what stays.

    Args:
        model: whose structures to remove; they are zero.
        example: of its inputs, on its device.
        plan: what to remove, by positions in the model as it is now.
        optimizer: of the model's parameters; it may hold others as well, which are left alone.

    Raises:
        CarryOverError: the optimizer's state cannot be divided by structure. Nothing has changed.
        UnsupportedLayerError: what would stay of a parameter is not whole rows and columns, layers
            that share a parameter would lose different parts of it, or the outputs for the example
            would change by more than rounding. Nothing has changed.
    """
    from third_party import dependency  # only now: it loads torch-pruning

    carried = CarryOver(model, optimizer)
    stays = carried.survivors(example, plan)
    dependency.remove(model, example, plan)
    carried.replace(stays)


class CarryOver:
    """One removal, from before to after: made before, :meth:`finish` ends it.

    Args:
        model: before the removal. A copy is kept.
        optimizer: of its parameters.

    Raises:
        CarryOverError: the optimizer has state that cannot be divided by structure, or keeps
            parameters in places of its own. Nothing has changed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._names: dict[Tensor, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(parameter, []).append(name)
        held: set[Tensor] = {p for group in optimizer.param_groups for p in group["params"]}
        own = [(k, v) for group in optimizer.param_groups for k, v in group.items()]
        own = [kv for kv in [*own, *vars(optimizer).items()] if kv[0] not in _KNOWN]
        hidden = {k for k, v in own if any(t in held or t.dim() for t in _tensors(v))}
        if hidden:
            raise CarryOverError(
                f"{type(optimizer).__name__} keeps tensors of its own in {sorted(hidden)}, which "
                "would stay as large as they are; make a new optimizer after the removal"
            )
        for held_one, state in optimizer.state.items():
            for name in self._names.get(held_one, []):
                for key, value in state.items():
                    self._check(f"{key!r} of {name!r}", value, held_one.shape)
        self._before = running.copied(model)

    def finish(self, example: Any, plan: Plan) -> None:
        """The model is small: let the optimizer go on with its parameters.

        Frozen parameters stay frozen, and new states have their parameters' memory layout.

        Args:
            example: of its inputs, on its device.
            plan: what was removed, by positions in the model as it was.

        Raises:
            UnsupportedLayerError: the model does not compute what the one before does with all
                that went at zero. The optimizer has not changed.
            CarryOverError: the model is not what the plan makes of it, or layers that shared a
                parameter no longer do so. The optimizer has not changed and still holds the large
                model's parameters: make a new one.
        """
        from third_party import dependency  # only now: it loads torch-pruning

        stays = self.survivors(example, plan)
        self._in_place_of(stays)
        small = running.copied(self._before)
        dependency.repeat(small, example, plan)
        dependency.compare(small, self.model, example, plan)
        self.replace(stays)

    def survivors(self, example: Any, plan: Plan) -> dict[str, list[Tensor]]:
        """By parameter and dimension, the positions that a plan leaves, (N,) on the host."""
        from third_party import dependency  # only now: it loads torch-pruning

        return dependency.survivors(self._before, example, plan)

    def replace(self, stays: Mapping[str, list[Tensor]]) -> None:
        """Put the model's present parameters in the place of those before, with their state."""
        fresh = self._in_place_of(stays)
        states: dict[Tensor, dict[str, Any]] = {}
        for old, new in fresh.items():
            if new is old or old not in self.optimizer.state:
                continue
            name = self._names[old][0]
            states[old] = {}
            for key, value in self.optimizer.state[old].items():
                self._check(f"{key!r} of {name!r}", value, old.shape)
                if isinstance(value, Tensor) and value.shape == old.shape:
                    value = _cut(value, stays[name], new)
                states[old][key] = value
        for old, new in fresh.items():
            new.requires_grad_(old.requires_grad)
        for group in self.optimizer.param_groups:
            group["params"][:] = [fresh.get(p, p) for p in group["params"]]
        for old, state in states.items():
            del self.optimizer.state[old]
            self.optimizer.state[fresh[old]] = state

    def _in_place_of(self, stays: Mapping[str, list[Tensor]]) -> dict[Tensor, nn.Parameter]:
        """The model's present parameters, by those before."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        fresh: dict[Tensor, nn.Parameter] = {}
        for old in self._held():
            name = self._names[old][0]
            left = torch.Size(len(i) for i in stays[name])
            if name not in now or now[name].shape != left:
                found = f"has shape {tuple(now[name].shape)}" if name in now else "is gone"
                raise CarryOverError(
                    f"{name!r} {found}, where the plan leaves {tuple(left)}: the model was "
                    "changed by something besides this plan; make a new optimizer"
                )
            fresh[old] = now[name]
            for other in self._names[old][1:]:
                if now.get(other) is not now[name]:
                    raise CarryOverError(
                        f"{name!r} and {other!r} were one parameter, and the removal has made two "
                        "of it, which train apart; make a new optimizer"
                    )
        return fresh

    def _held(self) -> list[Tensor]:
        """Parameters of the model before that the optimizer holds."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p in self._names]

    def _check(self, what: str, value: object, shape: torch.Size) -> None:
        if value is None or isinstance(value, bool | int | float | complex | str):
            return
        if isinstance(value, Tensor) and (value.shape == shape or value.dim() == 0):
            return
        is_ = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is no tensor"
        raise CarryOverError(
            f"{type(self.optimizer).__name__}'s state {what} {is_}; only states of the "
            f"parameter's own shape, here {tuple(shape)}, and single values can be carried over. "
            "Make a new optimizer after the removal"
        )


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
