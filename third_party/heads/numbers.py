"""The numbers of heads that modules keep, and which have to shrink with the heads.

No graph shows them: a forward pass reads them as plain numbers. So heads are removed from a copy
with one choice of attributes after the other, until it computes what it does with these at zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from dpm_core.errors import kind_and_line

from .. import comparing, running
from ..groups import UpstreamGroup
from .structures import Heads, owner, weight_dims

Numbers = tuple[tuple[int, str], ...]
"""Attributes of modules, each by the module's place in a scope."""


def kept_numbers(
    model: nn.Module, example: Any, found: Sequence[Heads]
) -> tuple[list[Heads], list[tuple[Heads, str]]]:
    """Find out which numbers shrink with heads, for each kind of attention once.

    Args:
        model: a copy, with drawn weights. It is changed meanwhile.
        example: of its inputs.
        found: heads, without numbers.

    Returns:
        The heads with their numbers; some may be one, as they only go together. And those that
        cannot go, with the reason.
    """
    trial = _Trial(model, example)
    kinds: dict[Any, list[Heads]] = {}
    for heads in found:
        kinds.setdefault(trial.kind(heads), []).append(heads)
    settled: list[Heads] = []
    refused: list[tuple[Heads, str]] = []
    for alike in kinds.values():
        numbers = trial.numbers(alike[0])
        if isinstance(numbers, str) and len(alike) > 1:  # they may depend on one another
            whole = reduce(_together, alike)
            others = trial.numbers(whole)
            if not isinstance(others, str):
                alike, numbers = [whole], others
        if isinstance(numbers, str):
            refused += [(heads, numbers) for heads in alike]
        else:
            settled += [trial.with_numbers(heads, numbers) for heads in alike]
    return settled, refused


class _Trial:
    """Removals of heads with one choice of numbers after the other."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._names = [name for name, _ in model.named_modules()]
        self._layers = {n for n, m in model.named_modules() if weight_dims(m) is not None}

    def with_numbers(self, heads: Heads, numbers: Numbers) -> Heads:
        """Heads with the numbers that another attention of their kind has."""
        scope = self._scope(heads)
        return replace(heads, numbers=tuple((scope[place], what) for place, what in numbers))

    def kind(self, heads: Heads) -> Any:
        """What attentions have in common that keep their numbers alike."""
        modules = [self._model.get_submodule(name) for name in self._scope(heads)]
        whole = [{k: v for k, v in vars(m).items() if type(v) is int} for m in modules]
        numbers = [tuple(i for i in w.items() if not re.search("idx|index", i[0])) for w in whole]
        return tuple(zip(map(type, modules), numbers, strict=True)), heads.count

    def _scope(self, heads: Heads) -> list[str]:
        """Names of the modules that may keep numbers of these heads, in order."""
        layers = {owner(name) for name, _ in heads.parts}
        scope: list[str] = []
        for reader in sorted({owner(name) for name, _ in heads.inputs}):
            others = [n for n in layers & self._layers if n != reader]
            top = owner(reader)
            while top and not any(n.startswith(f"{top}.") for n in others):
                top = owner(top)
            inside = f"{top}." if top else ""
            scope += [n for n in self._names if n == top or n.startswith(inside)]
        return list(dict.fromkeys([*scope, *sorted(layers)]))

    def numbers(self, heads: Heads) -> Numbers | str:
        """The numbers of one attention, by the modules' places in its scope; or why none will do.

        Some heads are set to zero, and removed with one choice of numbers after the other, until
        both give the same outputs.
        """
        model, example = self._model, self._example
        rounding = comparing.rounding(model, example, running.outputs(model, example))
        gone = [0] if heads.count < 4 else [0, heads.count // 2]
        kept = running.parts(model)
        with _at_zero(heads.group(model), gone):
            zeroed = running.outputs(model, example)
        first = ""
        for numbers in self._choices(heads):
            try:
                self.with_numbers(heads, numbers).remove(model, gone)
                off = comparing.unlike(
                    zeroed, running.outputs(model, example), rounding, doubts=True
                )
            except Exception as cause:  # whatever a forward pass with a wrong number breaks on
                off = f"leaves a model that cannot run ({kind_and_line(cause)})"
            finally:
                running.put_back(kept)
            if off is None:
                return numbers
            first = first or off
        return (
            f"has heads, of which the removal of one {first}: its forward pass takes their number, "
            "or that of their channels, from elsewhere"
        )

    def _choices(self, heads: Heads) -> Iterator[Numbers]:
        """Choices of numbers to shrink, the likeliest first."""
        widths = {len(table[0]) * heads.count for table in heads.parts.values()}
        counted: list[tuple[int, str]] = []
        others: list[tuple[int, str]] = []
        shared: list[tuple[int, str]] = []
        for i, name in enumerate(self._scope(heads)):
            module = self._model.get_submodule(name)
            for key, value in vars(module).items():
                if type(value) is not int or value < 1 or value % heads.count:
                    continue
                if says_how_many(key) or key == "all_head_size":
                    counted.append((i, key))
                elif value in widths and name not in self._layers:
                    others.append((i, key))
            config = vars(module).get("config")
            for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
                if (
                    type(value) is int
                    and value > 0
                    and not value % heads.count
                    and says_how_many(key)
                ):
                    shared.append((i, f"config.{key}"))
        more = [(), *((one,) for one in others[:12]), *([tuple(others)] if others[1:] else [])]
        yield from ((*counted, *some) for some in more)
        if shared:
            yield from ((*counted, *some, *shared) for some in more)
        if counted:
            yield ()


def says_how_many(attribute: str) -> bool:
    """Whether an attribute's name is one for a number of heads."""
    return "head" in attribute and not re.search(
        "dim|size|width|per|channel|mask|index|idx|group|feature|scale|hidden", attribute
    )


def _together(one: Heads, other: Heads) -> Heads:
    """Two attentions with as many heads, of which the same go in both."""
    return Heads(
        one.root, one.parts | other.parts, one.inputs | other.inputs, one.owners + other.owners
    )


@contextmanager
def _at_zero(group: UpstreamGroup, structures: Sequence[int]) -> Iterator[None]:
    """Some structures of a group at zero, for a while."""
    values = [(s.parameter, s.parameter.detach().clone()) for s in group.shares]
    with torch.no_grad():
        for share in group.shares:
            at = torch.tensor([p for k in structures for p in share.index[k]], device="cpu")
            share.parameter.index_fill_(share.dim, at.to(share.parameter.device), 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
