"""Where a network at zero and the same network without these channels part, to name the cause.

Two forward passes are followed from module to module. What goes in and comes out is the same in
both, but for slices of zeros, up to the place where the removal goes wrong. All of this is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import running
from .heads import weight_dims

SAME = 1e-6
"""Two tensors are the same up to this share of their largest value, in double precision; ours."""


@dataclass
class Passage:
    """What went into a module, or came out, in the order of a pass.

    Attributes:
        name: the module's.
        out: whether it came out.
        tensors: copies.
    """

    name: str
    out: bool
    tensors: list[Tensor]


@contextmanager
def followed(model: nn.Module) -> Iterator[list[Passage]]:
    """The passages of the forward passes inside, in a list that grows."""
    passages: list[Passage] = []

    def kept(values: object) -> list[Tensor]:
        found = running.tensors(values)
        return [t.detach().clone() for t in found if t.layout == torch.strided]

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        hooks.append(
            module.register_forward_pre_hook(
                lambda _m, given, n=name: passages.append(Passage(n, False, kept(given)))
            )
        )
        hooks.append(
            module.register_forward_hook(
                lambda _m, _given, out, n=name: passages.append(Passage(n, True, kept(out)))
            )
        )
    try:
        yield passages
    finally:
        for hook in hooks:
            hook.remove()


def cause(model: nn.Module, zeroed: list[Passage], removed: list[Passage]) -> str | None:
    """Where two passes part, and why, in words that follow what is different; ``None``: unknown.

    Args:
        model: of both.
        zeroed: of the pass with some channels at zero.
        removed: of the pass without them; it may have broken off.
    """
    inside: list[int] = []  # passages into modules that are not left yet
    for number, (one, other) in enumerate(zip(zeroed, removed, strict=False)):
        if (one.name, one.out) != (other.name, other.out):
            return None
        if not _alike(one, other):
            if not one.out:
                return _between(model, [zeroed[i].name for i in inside], one.name)
            return _at(model, zeroed[inside[-1]], one, other)
        if one.out:
            inside.pop()
        else:
            inside.append(number)
    if len(removed) < len(zeroed) and inside:
        return f"{_what(model, zeroed[inside[-1]].name)} cannot go on without them"
    return None


def _at(model: nn.Module, given: Passage, one: Passage, other: Passage) -> str:
    """Why a module's outputs differ, where nothing that its parts put out did."""
    module, what = model.get_submodule(one.name), _what(model, one.name)
    if weight_dims(module) is not None:
        return (
            f"the graph takes other columns out of {what} than those that read them, as where "
            "channels are put into another order"
        )
    if len(given.tensors) >= 1 <= len(one.tensors):
        before, after, left = given.tensors[0], one.tensors[0], other.tensors[0]
        for dim in range(after.dim()):
            if before.dim() != after.dim() or before.shape[dim] != after.shape[dim]:
                continue
            silent = ~_heard(before, dim)
            if after.shape[dim] == left.shape[dim] or not bool(silent.any()):
                continue
            if bool((silent & _heard(after, dim)).any()):
                return f"{what} answers zeros with more than zeros"
            if torch.equal(silent, ~_heard(after, dim)):
                return (
                    f"what {what} makes of a channel depends on those at zero, as a mean over "
                    "several does"
                )
    return f"{what} does something else with fewer channels"


def _between(model: nn.Module, inside: list[str], before: str) -> str:
    within = f"in the forward pass of {_what(model, inside[-1])}, " if inside and inside[-1] else ""
    return (
        f"{within}something before {_what(model, before)} answers zeros with more than zeros, or "
        "the graph takes its channels for others there"
    )


def _what(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"{name!r} ({kind})" if name else f"the forward pass of {kind}"


def _alike(one: Passage, other: Passage) -> bool:
    """Whether tensors are the same but for slices of zeros; also if they cannot be compared."""
    return all(map(_same, one.tensors, other.tensors))


def _same(zeroed: Tensor, removed: Tensor) -> bool:
    if zeroed.dim() != removed.dim() or not zeroed.is_floating_point():
        return True
    differ = [d for d in range(zeroed.dim()) if zeroed.shape[d] != removed.shape[d]]
    if len(differ) > 1:
        return True
    for dim in differ:
        zeroed = zeroed.movedim(dim, 0)[_heard(zeroed, dim)]
        removed = removed.movedim(dim, 0)[_heard(removed, dim)]
        if zeroed.shape != removed.shape:
            return False
    if not zeroed.numel():
        return True
    within = max(SAME, torch.finfo(zeroed.dtype).eps ** 0.5)
    largest = float(zeroed.abs().max())
    return not float((zeroed - removed).abs().max()) > within * largest


def _heard(tensor: Tensor, dim: int) -> Tensor:
    """Which slices along a dimension are not all zero, (size,) bool."""
    return (tensor != 0).movedim(dim, 0)[..., None].flatten(1).any(1)
