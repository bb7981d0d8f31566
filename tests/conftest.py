"""Shared by all tests: the command line, and hypothesis without time limits or chance."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
import torch

from tests.support import forked

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

# The tests' tensors are small: threads wait for one another longer than they work, and on a busy
# machine by a factor of ten. `make test-portable` asks for two, which split sums in another way.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start as well
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
os.environ["MPLBACKEND"] = "agg"  # pictures are drawn into files, on no screen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="tests that need a GPU fail where there is none, instead of being skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # for all processes of a parallel test run
        stack = ExitStack()
        stack.enter_context(forked.serving())
        config.add_cleanup(stack.close)


def pytest_collection_finish() -> None:
    # What is loaded stays. The collector need not look through it again and again: with all that
    # the tests import that takes it more than a second each time, a tenth of the whole.
    gc.collect()
    gc.freeze()


# Whoever compares numbers that were rounded in different ways says how far apart they may be.
TOLERANT = {
    *("assert_exact", "assert_rounded", "of_outputs", "finfo", "approx", "allclose", "isclose"),
    *("assert_close", "apart", "EXACT", "TOLERANCE"),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks as ``numeric`` every test that compares numbers with a tolerance, itself or by others.

    `make test-portable` runs these under all of its settings.
    """
    if isinstance(item, pytest.Function) and not TOLERANT.isdisjoint(_named(item.function, set())):
        item.add_marker("numeric")


def _named(function: Any, seen: set[int]) -> Iterator[str]:
    """Names in a function's code, and in that of the tests' own functions and classes it uses."""
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or id(code) in seen:
        return
    seen.add(id(code))
    nested, names = [code], set()
    while nested:
        code = nested.pop()
        names.update(code.co_names)
        nested += [c for c in code.co_consts if isinstance(c, CodeType)]
    yield from names
    for name in names:
        used = function.__globals__.get(name)
        if getattr(used, "__module__", "").startswith("tests."):
            for part in vars(used).values() if isinstance(used, type) else (used,):
                if isinstance(part, FunctionType):
                    yield from _named(part, seen)


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """A GPU. Where there is none the test is skipped, or fails under --require-cuda."""
    if not torch.cuda.is_available():
        if request.config.getoption("--require-cuda"):
            pytest.fail("--require-cuda was given, and there is no CUDA device")
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
