"""Two processes for tests: started once, then given one function after another."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

COUNT = 2
PATIENCE = 120.0
"""Seconds after which a test says that its processes hang."""


class Ranks:
    """Processes that run what they are given, each time in a new gloo group."""

    def __init__(self, connections: list[Connection], folder: Path) -> None:
        self._connections = connections
        self._folder = folder
        self._calls = 0

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``work(rank, *args)`` in every process; what each returns, or the error it raised.

        ``work`` is a function at the top of a module; errors come back as they were raised.
        """
        self._calls += 1
        for connection in self._connections:
            connection.send((work, args, str(self._folder / f"store{self._calls}")))
        results = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(PATIENCE), f"rank {rank} hangs"
            results.append(connection.recv())
        return results

    def results(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`run`, where no process may fail."""
        results = self.run(work, *args)
        for one in results:
            if isinstance(one, BaseException):
                raise one
        return results


@contextmanager
def two() -> Iterator[Ranks]:
    """Two processes, as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(COUNT)]
    processes = [
        context.Process(target=_serve, args=(rank, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for process in processes:
                process.start()
            yield Ranks([ours for ours, _ in pairs], Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # they meet on 127.0.0.1, whatever the host's name is
    while True:
        work, args, store = connection.recv()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=COUNT,
            timeout=timedelta(seconds=PATIENCE),
        )
        try:
            result = work(rank, *args)
        except BaseException as error:  # a failed assertion of pytest's is no Exception
            error.add_note("".join(traceback.format_exception(error)))
            result = error
        finally:
            dist.destroy_process_group()
        connection.send(_sendable(result))


def _sendable(result: Any) -> Any:
    try:
        pickle.loads(pickle.dumps(result))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(result)))
    return result
