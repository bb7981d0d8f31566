"""Functions timed in turns, and the figures of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

WARM_UP = 1

Figure = dict[str, Any]
"""Median, quartiles and perhaps a target, by name."""


def interleave(
    turns: Sequence[Mapping[str, Callable[[], object]]],
    repeats: int,
    device: torch.device,
    title: str,
) -> dict[str, list[float]]:
    """Time several functions in turns, so that what disturbs the machine affects all of them.

    Args:
        turns: functions by name. Those of one turn are timed one after another, in their order; the
            order of the turns rotates from round to round.
        repeats: how many rounds are timed, after :data:`WARM_UP` untimed ones.
        device: is waited for whenever the clock is read.
        title: of the progress bar.

    Returns:
        Milliseconds by name, one figure per round.
    """
    times: dict[str, list[float]] = {name: [] for turn in turns for name in turn}
    for count in tqdm(range(-WARM_UP, repeats), desc=title, disable=None, leave=False):
        first = count % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            for name, work in turn.items():
                wait_for(device)
                start = time.perf_counter()
                work()
                wait_for(device)
                if count >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done what it was given; at once on a processor."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figure(values: Sequence[float], target: float | None = None, sign: int = 1) -> Figure:
    """Median and quartiles, and whether the median meets a target.

    Args:
        values: one or more measurements.
        target: what the median is not to exceed.
        sign: -1 for a target that the median has to reach instead.
    """
    points = values if len(values) > 1 else [*values, *values]
    quartiles = statistics.quantiles(points, n=4, method="inclusive")
    summary: Figure = dict(zip(("lower", "median", "upper"), quartiles, strict=True))
    if target is not None:
        summary |= {"target": target, "met": sign * summary["median"] <= sign * target}
    return summary
