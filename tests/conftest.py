"""Shared by all tests: the command line, and hypothesis without time limits or chance."""

from __future__ import annotations

import os
from contextlib import ExitStack

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


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """A GPU. Where there is none the test is skipped, or fails under --require-cuda."""
    if not torch.cuda.is_available():
        if request.config.getoption("--require-cuda"):
            pytest.fail("--require-cuda was given, and there is no CUDA device")
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
