"""Two processes for tests: started once, then given one function after another."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import forked

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
            store = str(self._folder / f"store{self._calls}")
            connection.send_bytes(pickle.dumps((work, args, store)))
        results = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(PATIENCE), f"rank {rank} hangs"
            results.append(pickle.loads(connection.recv_bytes()))
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
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place = str(Path(folder) / "socket")
        listener = stack.enter_context(Listener(place))
        connections = []
        for rank in range(COUNT):
            command = [forked.python(), "-m", "tests.support.ranks", place, str(rank)]
            process = stack.enter_context(subprocess.Popen(command, cwd=forked.ROOT))
            stack.callback(process.kill)
            connections.append(listener.accept())
        yield Ranks(connections, Path(folder))


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # they meet on 127.0.0.1, whatever the host's name is
    while True:
        work, args, store = pickle.loads(connection.recv_bytes())
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
        connection.send_bytes(_sent(result))


def _sent(result: Any) -> bytes:
    try:
        content = pickle.dumps(result)
        pickle.loads(content)
    except Exception:
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(result))))
    return content


if __name__ == "__main__":
    with Client(sys.argv[1]) as served:
        _serve(int(sys.argv[2]), served)
