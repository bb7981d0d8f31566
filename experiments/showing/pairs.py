"""Statistics of paired runs: the same seed with two variants is one pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import special

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Difference:
    """One thing minus another over pairs, in the unit of the values (percentage points).

    Attributes:
        pairs: how many.
        networks: dense networks that they start from; as many as there are pairs, where each has
            its own.
        mean: of the networks' mean differences.
        deviation: standard deviation of those means, of a sample; ``None`` for one network.
        low, high: the 95% interval of the mean; ``None`` for one network.
        detectable: see :func:`detectable`; ``None`` for one network.
        seeds: of the pairs, in order.
        values: the difference of each pair.
    """

    pairs: int
    networks: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    detectable: float | None
    seeds: list[int]
    values: list[float]

    @property
    def interval(self) -> str:
        """The mean and its 95% interval, as text."""
        if self.low is None or self.high is None:
            return _signed(self.mean)
        return f"{_signed(self.mean)} [{_signed(self.low)}, {_signed(self.high)}]"

    @property
    def counted(self) -> str:
        """The pairs, and their networks if shared, as text."""
        text = f"{self.pairs} pair{'s' if self.pairs != 1 else ''}"
        if self.networks == self.pairs:
            return text
        return f"{text} of {self.networks} network{'s' if self.networks != 1 else ''}"

    @property
    def by_seed(self) -> str:
        """The difference of every pair, as text."""
        pairs = zip(self.seeds, self.values, strict=True)
        return ", ".join(f"{_signed(value)} ({seed})" for seed, value in pairs)


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # adding 0 leaves no negative zero


def difference(
    one: Mapping[int, float],
    other: Mapping[int, float],
    network: Mapping[int, int] | None = None,
) -> Difference | None:
    """``one`` minus ``other``, paired by seed; what only one of them has is left out.

    Pairs that start from one dense network are not independent, so what counts is the mean
    difference of each network: the interval is mean ± t_{0.975, k-1} s / sqrt(k) of these k means.
    It is exact for normal differences when every network has as many pairs, however much networks
    differ, and close to it otherwise; a network per pair makes it the paired t-test. Source: the
    between-groups estimator for few groups, Donald and Lang, "Inference with
    difference-in-differences and other panel data", Review of Economics and Statistics 89 (2007).

    Args:
        one: values by seed.
        other: values by seed.
        network: the dense network of every seed that both have; by default one each.

    Returns:
        ``None`` without a common seed.
    """
    seeds = sorted(one.keys() & other.keys())
    values = [one[seed] - other[seed] for seed in seeds]
    by_network: dict[int, list[float]] = {}
    for seed, value in zip(seeds, values, strict=True):
        by_network.setdefault(seed if network is None else network[seed], []).append(value)
    if not seeds:
        return None
    means = [statistics.fmean(d) for d in by_network.values()]
    n, mean = len(means), statistics.fmean(means)
    if n == 1:
        return Difference(len(seeds), 1, mean, None, None, None, None, seeds, values)
    deviation = statistics.stdev(means)
    reach = _quantile(1 - LEVEL / 2, n) * deviation / math.sqrt(n)
    smallest = detectable(n, deviation)
    low, high = mean - reach, mean + reach
    return Difference(len(seeds), n, mean, deviation, low, high, smallest, seeds, values)


def detectable(networks: int, deviation: float) -> float:
    """The smallest true difference that can be detected with so many networks.

    What detects it is a two-sided paired t-test at 5% with a power of 80%:
    (t_{0.975, n-1} + t_{0.8, n-1}) s / sqrt(n), the usual approximation to the noncentral t. Its
    true power is 78.4% with 4 of them, 77% with 3 and 73% with 2.

    Args:
        networks: n, at least 2.
        deviation: s, the standard deviation of their mean differences.

    Returns:
        In the unit of ``deviation``.

    Raises:
        ValueError: fewer than two have no t-test.
    """
    if networks < 2:
        raise ValueError(f"{networks} networks have no t-test; it takes 2 or more")
    both = _quantile(1 - LEVEL / 2, networks) + _quantile(POWER, networks)
    return both * deviation / math.sqrt(networks)


def _quantile(share: float, count: int) -> float:
    """Of Student's t with as many degrees of freedom as the mean of so many values has."""
    return float(special.stdtrit(count - 1, share))
