"""Errors that end a command in one line, with what to do; any other keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from dpm_core import DecayPruningError

from .names import one_line
from .places import explained

REFUSED, CUT_OFF = 2, 141


class RunError(DecayPruningError, RuntimeError):
    """A run cannot start or go on. The message says what to do."""


class QuotingError(RunError):
    """A run of a comparison failed. The message quotes what it printed, on lines of its own."""


def reported(error: BaseException) -> str | None:
    """The line for an error that a user can do something about; ``None`` for any other.

    A :class:`QuotingError` keeps its lines.
    """
    if isinstance(error, QuotingError):
        return str(error)
    if isinstance(error, DecayPruningError):
        return one_line(" ".join(str(error).split("\n")))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    ):
        return "there is not enough memory; take smaller batches or images, or fewer --jobs"
    if isinstance(error, OSError):
        return one_line(explained(error))
    return None


def carried_out(command: Callable[[], int], who: Callable[[], str] = str) -> int:
    """Carry a command out; an error that is no bug is printed in one line.

    Args:
        command: gives the exit status.
        who: gives what follows the word error, such as which of several processes it was.

    Returns:
        The exit status: the command's, 2 for an error, 141 if nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path may contain what is no text
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more is to fail on the way out
        return CUT_OFF
    except Exception as error:
        line = reported(error)
        if line is None:
            raise
        print(f"error{who()}: {line}", file=sys.stderr)
        return REFUSED
    return status
