"""The structures of all groups under one numbering, and how messages name them.

Groups are sorted by name and their structures are numbered through, those of the first group, then
those of the second. All numbers here are int64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import GroupError, PhaseError
from .groups import StructureGroup

SHOWN = 8
"""How many structures of a group a message lists; ours."""


class Numbering:
    """Structure groups, by name, and the numbers of their structures.

    Args:
        groups: in any order.

    Attributes:
        groups: by name, sorted, so that nothing depends on the order in which they were given.
        names: the same names.
        size: number of structures in all groups.
        group_of: (size,), the place of each structure's group in ``names``.

    Raises:
        GroupError: no groups, something else than groups, or two of one name.
    """

    def __init__(self, groups: Iterable[StructureGroup]) -> None:
        listed = list(groups) if isinstance(groups, Iterable) else [groups]
        alone = isinstance(groups, StructureGroup | Mapping)
        odd = [g for g in listed if alone or not isinstance(g, StructureGroup)]
        if odd:
            given = type(groups if alone else odd[0]).__name__
            raise GroupError(
                f"structure groups are given as, or hold, a {given}; give a list of "
                "StructureGroups: [group], or list(groups.values())"
            )
        by_name = sorted(listed, key=lambda g: g.name)
        self.groups: dict[str, StructureGroup] = {g.name: g for g in by_name}
        self.names = list(self.groups)
        if not by_name:
            raise GroupError("no structure groups were given; there is nothing to prune")
        if len(self.groups) != len(by_name):
            names = [g.name for g in by_name]
            twice = sorted({n for n in names if names.count(n) > 1})
            raise GroupError(f"group names {twice} are given twice; names key what is saved")
        self._first: dict[str, int] = {}
        self.size = 0
        for group in by_name:
            self._first[group.name] = self.size
            self.size += group.size
        sizes = torch.tensor([g.size for g in by_name], device="cpu")
        self.group_of = torch.repeat_interleave(torch.arange(len(by_name), device="cpu"), sizes)

    def span(self, group: str) -> slice:
        """The numbers of a group's structures.

        Raises:
            PhaseError: there is no such group.
        """
        if not isinstance(group, str) or group not in self._first:
            raise PhaseError(f"there is no group {group!r}; groups are {self.names}")
        first = self._first[group]
        return slice(first, first + self.groups[group].size)

    def numbers(self, structures: Mapping[str, Sequence[int] | Tensor]) -> Tensor:
        """Numbers of structures that are given by group, sorted.

        Raises:
            PhaseError: this is no mapping to numbers, or a structure does not exist or is listed
                twice.
        """
        if not isinstance(structures, Mapping):
            raise PhaseError(
                f"structures are given as {type(structures).__name__}; give a mapping of group "
                "names to lists of numbers: {'conv1': [3, 7]}"
            )
        parts = []
        for name, given in structures.items():
            span = self.span(name)
            size = span.stop - span.start
            local = integers(name, given)
            if local.numel() == 0:
                continue
            if int(local.min()) < 0 or int(local.max()) >= size:
                raise PhaseError(
                    f"group {name!r} has structures 0 to {size - 1}; {local.tolist()} reaches "
                    "outside"
                )
            if local.unique().numel() != local.numel():
                raise PhaseError(
                    f"group {name!r}: a structure is listed twice in {local.tolist()}; list each "
                    "once"
                )
            parts.append(span.start + local)
        return (
            torch.cat(parts).sort().values
            if parts
            else torch.empty(0, dtype=torch.int64, device="cpu")
        )

    def groups_of(self, numbers: Tensor) -> list[StructureGroup]:
        """The groups that some structures belong to, in order."""
        return [self.groups[self.names[i]] for i in self.group_of[numbers].unique().tolist()]

    def all_of(self, groups: Iterable[StructureGroup]) -> Tensor:
        """Numbers of all structures of some groups, in order."""
        spans = [self.span(g.name) for g in groups]
        runs = [torch.arange(span.start, span.stop, device="cpu") for span in spans]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")

    def within(self, group: str, numbers: Tensor) -> Tensor:
        """Those of some structures that are of a group, by their numbers in it."""
        span = self.span(group)
        local: Tensor = numbers - span.start
        return local[(local >= 0) & (numbers < span.stop)]

    def per_group(self, which: Tensor) -> Tensor:
        """How many structures of each group are among ``which``, a mask or numbers; (groups,)."""
        return torch.bincount(self.group_of[which], minlength=len(self.names))

    def called(self, number: int) -> str:
        """A structure in a message."""
        name = self.names[int(self.group_of[number])]
        return f"structure {number - self._first[name]} of group {name!r}"

    def described(self, numbers: Tensor) -> str:
        """The first of some structures, and how many more there are."""
        more = f" (and {numbers.numel() - 1} more)" if numbers.numel() > 1 else ""
        return f"{self.called(int(numbers[0]))}{more}"

    def listed(self, numbers: Tensor) -> str:
        """All of some structures, group by group; of many in a group the first."""
        parts = []
        for group in self.groups_of(numbers):
            local = self.within(group.name, numbers)
            shown = ", ".join(map(str, local[:SHOWN].tolist()))
            more = f" and {local.numel() - SHOWN} more" if local.numel() > SHOWN else ""
            word = "structure" if local.numel() == 1 else "structures"
            parts.append(f"{word} {shown}{more} of group {group.name!r}")
        return "; ".join(parts)


def integers(name: str, given: object) -> Tensor:
    """What is given for a group as int64 (n,) on the host.

    Raises:
        PhaseError: it is no list of integers.
    """
    values: Any = given
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    if several and not hasattr(given, "dtype"):  # an array knows the kind of its numbers
        values = list(values)
    try:
        local = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        raise PhaseError(
            f"group {name!r}: structures are given as {str(given)[:40]!r} "
            f"({type(given).__name__}); give a list of their numbers"
        ) from cause
    if local.numel() == 0 and local.dim() == 1:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    plain = local.dim() == 1 and local.layout == torch.strided and not local.is_meta
    kind = local.dtype
    if isinstance(values, list) and any(isinstance(k, bool) for k in values):
        kind = torch.bool  # among integers it would count as one
    if not plain or kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise PhaseError(
            f"group {name!r}: structures are given as {kind} of shape {tuple(local.shape)}; give "
            "a list of their numbers"
        )
    return local.cpu().to(torch.int64)
