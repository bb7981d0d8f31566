"""Asking a run to save and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ASKING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)  # not all are on Windows
]
"""Signals that ask to save and stop. A run that was started to outlive its terminal goes on."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Take an interrupt or a termination as a request: the step ends, a checkpoint is written."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        for kind in previous:  # a second signal stops at once
            signal.signal(kind, signal.SIG_DFL)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for kind in ASKING:
            left_alone = kind not in (signal.SIGINT, signal.SIGTERM)
            if not (left_alone and signal.getsignal(kind) == signal.SIG_IGN):
                previous[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
