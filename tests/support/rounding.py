"""What rounding does, so that no test types a bound that rounding alone can exceed.

Another processor, another number of threads or another shape of the same tensors adds numbers up in
another order. What is claimed to be exact is therefore compared in double precision, where a
difference that is no rounding stands out. What is claimed of single precision is compared with the
rounding that is measured of the same computation.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

EXACT = 1e-9
"""In double precision, relative to the largest value. One rounding is a ten-millionth of it; ten
steps of training with Adagrad, the worst of the tests, make it a hundredth (1.4e-11 measured)."""
TIMES = 32
"""How often two ways in single precision may be as far apart as one of them is from the truth."""


def in_double(model: nn.Module) -> nn.Module:
    """A copy that computes in double precision, whatever the precision of its inputs."""
    copied = copy.deepcopy(model).double()
    copied.register_forward_pre_hook(
        # Not where nothing is to be done: frameworks that trace a model see every operation.
        lambda _, given: tuple(t.double() if t.dtype == torch.float32 else t for t in given)
    )
    return copied


def exact_outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs in eval mode and in double precision; the model itself is left as it is."""
    with torch.no_grad():
        return in_double(model).eval()(images)


def of_outputs(model: nn.Module, images: Tensor) -> float:
    """What rounding in single precision does to a model's outputs: the largest difference."""
    exact = exact_outputs(model, images)
    with torch.no_grad():
        single = copy.deepcopy(model).eval()(images).double()
    return float((single - exact).abs().max() + exact.abs().max() * torch.finfo(images.dtype).eps)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value; infinity where one is NaN."""
    left, right = actual.detach().double(), expected.detach().double()
    size, apart = float(right.abs().max()), float((left - right).abs().max())
    if apart == 0:
        return 0.0
    return apart / size if size > 0 and math.isfinite(apart) else math.inf


def assert_exact(actual: Tensor, expected: Tensor, what: str = "results") -> None:
    """Two ways to one result, both in double precision."""
    assert actual.dtype == expected.dtype == torch.float64
    assert actual.shape == expected.shape
    apart = difference(actual, expected)
    assert apart <= EXACT, f"{what} are {apart:.1e} apart in double precision"


def assert_rounded(actual: Tensor, expected: Tensor, exact: Tensor, what: str = "results") -> None:
    """Two ways to one result in single precision, where ``exact`` is in double precision.

    Rounding is measured: how far the expected result is from the exact one, or a unit in the last
    place where that is less.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == expected.shape == exact.shape
    rounding = max(difference(expected, exact), torch.finfo(expected.dtype).eps)
    apart = difference(actual, expected)
    assert apart <= TIMES * rounding, f"{what} are {apart:.1e} apart, rounding is {rounding:.1e}"
