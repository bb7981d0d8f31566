"""Events: what happened to structures, when, and how it is read back from a state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from .errors import StateError
from .numbering import Numbering

Kind = Literal["decay", "release", "prune"]


@dataclass(frozen=True)
class Event:
    """Something that happened to structures of one group, for adapters, plots and records.

    Attributes:
        step: optimizer steps since the start, when it happened.
        kind: ``"decay"`` started, ``"release"`` or ``"prune"`` (became exactly zero).
        group: the group's name.
        structures: their numbers in the group.
        norms: L2 norm of each at that moment: L_init at the start of a decay, the norm that the
            decay had come to at a release, zero when pruned.
        wave: 0 for first decisions, 1 for replacements of released structures, and so on.
    """

    step: int
    kind: Kind
    group: str
    structures: tuple[int, ...]
    norms: tuple[float, ...]
    wave: int


def events_of(
    structures: Numbering, kind: Kind, clock: int, numbers: Tensor, norms: Tensor, waves: Tensor
) -> list[Event]:
    """An event for each group and wave that some structures are of.

    Args:
        structures: the structures of all groups.
        kind: what happened.
        clock: optimizer steps so far.
        numbers: of the structures, (n,), as all that follows.
        norms: of each.
        waves: of each.
    """
    events, groups = [], structures.group_of[numbers]
    for i in groups.unique().tolist():
        name = structures.names[i]
        local = numbers - structures.span(name).start
        for wave in waves[groups == i].unique().tolist():
            here = (groups == i) & (waves == wave)
            which, sizes = tuple(local[here].tolist()), tuple(norms[here].tolist())
            events.append(Event(clock, kind, name, which, sizes, wave))
    return events


def checked_events(saved: Any, sizes: Mapping[str, int], clock: int) -> list[Event]:
    """The events of a state dict, if a run of these groups could have had them.

    Args:
        saved: a mapping of an event's attributes for each.
        sizes: group name to its number of structures.
        clock: optimizer steps so far.

    Raises:
        StateError: they are damaged.
    """
    try:
        events = [
            Event(**{**e, "structures": tuple(e["structures"]), "norms": tuple(e["norms"])})
            for e in saved
        ]
        sound = all(_could_have_happened(e, sizes, clock) for e in events)
    except (TypeError, KeyError) as cause:
        raise StateError(f"the state's events are damaged ({cause})") from cause
    if not sound:
        raise StateError(
            "the state's events are damaged: they name kinds, groups, structures or steps that "
            "there are not"
        )
    return events


def _could_have_happened(event: Event, sizes: Mapping[str, int], clock: int) -> bool:
    numbers = (event.step, event.wave, *event.structures)
    return (
        all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        and event.kind in get_args(Kind)
        and event.group in sizes
        and 0 <= event.step <= clock
        and event.wave >= 0
        and len(event.norms) == len(event.structures)
        and all(0 <= k < sizes[event.group] for k in event.structures)
        and all(isinstance(n, float) and 0 <= n < math.inf for n in event.norms)
    )
