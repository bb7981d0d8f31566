"""Rows of networks: each is measured in a process of its own, and kept as soon as it is done."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

from dpm_core import DecayPruningError

from ..errors import RunError
from ..files import save_text
from ..running.machine import device_name, revision
from .breadth_page import cells
from .networks import TIMM, network, size_of, versions
from .prunable import Row, measure


def in_process(name: str, seconds: float) -> Row:
    """:func:`.prunable.measure` in a process of its own, which may crash or take too long."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["torchvision", "dpm_core.adapters.depgraph", *(["timm"] if name.startswith(TIMM) else [])]
    )  # once for all
    receiver, sender = processes.Pipe()
    process = processes.Process(target=_send, args=(name, torch.get_num_threads(), sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    row: Row = {"network": name, "outcome": "fails"}
    try:
        if receiver.poll(seconds):
            return receiver.recv()  # type: ignore[no-any-return]
        row |= {"outcome": "not run", "message": f"not done within {seconds:g} seconds"}
    except EOFError:
        process.join()
        row["message"] = f"its process ended with exit code {process.exitcode}; -9: out of memory?"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return row | {"seconds": time.perf_counter() - started}


def _send(name: str, threads: int, sender: Connection) -> None:
    threading.Thread(target=_end_with, args=(sender,), daemon=True).start()
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sender.send(measure(network(name)))
        except DecayPruningError as cause:  # there is none, or no images are known that it takes
            sender.send(
                {"network": name, "outcome": "fails", "message": str(cause), "seconds": 0.0}
            )


def _end_with(other: Connection) -> None:
    """End this process with the one that waits for its row, however that ends."""
    with suppress(EOFError, OSError):
        other.recv()  # nothing is sent this way
    signal.raise_signal(signal.SIGTERM)


def collect(
    names: Sequence[str],
    path: Path,
    largest: float,
    run: Callable[[str], Row],
    anew: bool = False,
) -> list[Row]:
    """Measure what has not been measured yet, the small first, and keep each row at once.

    Args:
        names: of networks.
        path: the file of rows. Networks whose row says ``not run`` are tried again: they were too
            large, or took too long.
        largest: networks with more parameters are not run.
        run: gives a network's row.
        anew: measure networks that have a row, too; it is replaced when the new one is complete.

    Returns:
        All rows of the file.
    """
    rows = {row["network"]: row for row in read(path)}
    undone = [n for n in names if rows.get(n, {"outcome": "not run"})["outcome"] == "not run"]
    sizes = {name: size_of(name) for name in (names if anew else undone)}
    circumstances = {
        "revision": revision(),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }
    bar = tqdm(sorted(sizes, key=lambda n: (sizes[n], n)), unit="network", disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        if sizes[name] > largest:
            row = {
                "network": name,
                "outcome": "not run",
                "message": f"more than {largest / 1e6:g} M parameters",
                "seconds": 0.0,
            }
        else:
            row = run(name)
        rows[name] = {"parameters": sizes[name], **row, "versions": versions(name), **circumstances}
        lines = (json.dumps(rows[n], allow_nan=False) for n in sorted(rows))
        save_text(path, "".join(f"{line}\n" for line in lines))
    return [rows[name] for name in sorted(rows)]


def read(path: Path) -> list[Row]:
    """The rows of a file, or none where there is no file.

    Raises:
        RunError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            cells(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise RunError(f"{path} cannot be read ({cause}); delete it, or take it anew") from cause
    return rows
