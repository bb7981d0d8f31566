"""Runs of a comparison on a Dask cluster: what a run needs goes out, and its files come back.

No folder is shared. A worker keeps a run in a folder of its own, so that a run whose worker dies
starts anew elsewhere. Images are not sent: every worker has them, or downloads them.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dpm_core
from dpm_core.errors import first_line

from ..errors import QuotingError, RunError
from ..files import write
from ..names import folder_of
from ..places import alone_in
from ..record import MODEL, RECORD, TRACE
from .finished import finished
from .jobs import Job, command, last_lines

try:
    from distributed import Client, Future, get_worker
    from distributed.client import FutureCancelledError
    from distributed.core import Status
except ImportError as cause:
    raise RunError("a cluster needs dask: pip install distributed") from cause

PATIENCE = 20.0
"""Seconds in which a scheduler has to answer."""
DENSE = "dense"


@dataclass(frozen=True)
class Order:
    """One run, as it is sent.

    Attributes:
        release: of this project; the worker's has to be the same.
        config: the TOML file's content.
        options: of the command line, without places.
        folder: of the run, within the folder of all runs.
        dense: files of dense models that the run may start from, by name.
    """

    release: str
    config: bytes
    options: tuple[str, ...]
    folder: str
    dense: Mapping[str, bytes]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its exit code, what it printed, its files and new dense models."""

    code: int
    printed: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    dense: Mapping[str, bytes] = field(default_factory=dict)


# ---------------------------------------------------------------------- on a worker


def carry_out(order: Order) -> Outcome:
    """One run, on a worker, in a process of its own that ends with the worker."""
    if order.release != dpm_core.__version__:
        text = f"this worker has release {dpm_core.__version__}, the comparison {order.release}"
        return Outcome(1, f"{text}; start workers of one release")
    worker = get_worker()
    task = worker.get_current_task()

    def wanted() -> bool:
        """Whether anybody waits for the run: neither was it given up, nor does the worker end."""
        return worker.status == Status.running and worker.state.tasks[task].state == "executing"

    with tempfile.TemporaryDirectory(dir=worker.local_directory, prefix="run-") as place:
        config, out, log = Path(place) / "run.toml", Path(place) / "runs", Path(place) / "run.log"
        config.write_bytes(order.config)
        (out / DENSE).mkdir(parents=True)
        for name, content in order.dense.items():
            (out / DENSE / name).write_bytes(content)
        words = [sys.executable, "-m", "experiments", "run", str(config), "--out", str(out)]
        with log.open("wb") as printed:
            process = subprocess.Popen(  # its input ends with this process, and then the run, too
                [*words, *order.options, "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while process.poll() is None and wanted():
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        text = log.read_text(errors="replace").replace(f"{place}{os.sep}", "")
        if process.returncode:
            return Outcome(process.returncode, text)
        folder = out / order.folder
        new = [
            p for p in (out / DENSE).iterdir() if p.suffix == ".pt" and p.name not in order.dense
        ]
        return Outcome(
            0,
            text,
            {name: (folder / name).read_bytes() for name in (MODEL, TRACE, RECORD)},
            {path.name: path.read_bytes() for path in new},
        )


# ---------------------------------------------------------------------- here


class Cluster:
    """Carries runs out on the workers that a scheduler has, as many as it has at any time.

    Args:
        client: connected to the scheduler.
        address: the scheduler's, for messages.
    """

    def __init__(self, client: Client, address: str) -> None:
        self._client, self.address = client, address

    @property
    def slots(self) -> int:
        """How many runs at a time: one for each thread of the workers that are there now."""
        self.require()
        return sum(self._client.nthreads().values())

    def require(self) -> None:
        """Refuse to go on without a scheduler.

        Raises:
            RunError: it is gone.
        """
        if self._client.status != "running":
            raise RunError(
                f"the scheduler at {self.address} is gone; what was finished is kept, and the same "
                "command goes on when there is one again"
            )

    def start(self, job: Job) -> Away:
        """Send a run.

        Raises:
            BusyError: another process carries the run out.
        """
        request, lock = job.request, ExitStack()
        lock.enter_context(alone_in(request.folder))
        if finished(request):  # since this comparison began
            return Away(self, job, lock, None)
        model, seed = folder_of(request.config.model), request.config.dense_seed(request.seed)
        kept = (request.out / DENSE).glob(f"{model}-*-seed{seed}.pt")
        order = Order(
            dpm_core.__version__,
            job.config_path.read_bytes(),
            tuple(command(job, threads=1)),
            str(request.folder.relative_to(request.out)),
            {path.name: path.read_bytes() for path in kept},
        )
        future = self._client.submit(carry_out, order, pure=False)
        return Away(self, job, lock, future)


@dataclass
class Away:
    """A run that a worker carries out; its folder here is locked until it ends."""

    cluster: Cluster
    job: Job
    lock: ExitStack
    future: Future[Any] | None

    def ended(self) -> bool:
        """Whether it has ended; if so, its files are here.

        Raises:
            QuotingError: it failed.
            RunError: the workers that took it died, or the scheduler did.
        """
        if self.future is not None:
            self.cluster.require()
            if not self.future.done():
                return False
            self._take(self._outcome())
        self.lock.close()
        return True

    def _outcome(self) -> Outcome:
        assert self.future is not None
        try:
            outcome: Outcome = self.future.result()
        except FutureCancelledError:
            self.cluster.require()
            raise
        except Exception as cause:  # of the worker, not of the run, which has its own process
            why = first_line(cause)
            raise RunError(f"{self.job.name} was given up by the cluster: {why}") from cause
        return outcome

    def _take(self, outcome: Outcome) -> None:
        """Write a run's files; the record, which says that all is there, comes last."""
        request = self.job.request
        if outcome.code:
            raise QuotingError(last_lines(self.job, outcome.code, outcome.printed))
        for name, content in outcome.dense.items():
            path = request.out / DENSE / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _put(path, content)
        for name in (MODEL, TRACE, RECORD):
            _put(request.folder / name, outcome.files[name])

    def stop(self) -> None:
        """Give it up: of a run on a worker nothing is kept before it is finished."""
        if self.future is not None:
            self.future.cancel()

    def wait(self) -> None:
        """Let others have its folder."""
        self.lock.close()


def _put(path: Path, content: bytes) -> None:
    write(path, lambda file: file.write(content))


@contextmanager
def cluster(address: str) -> Iterator[Cluster]:
    """Connect to a scheduler, as long as the block lasts.

    Raises:
        RunError: none answers there.
    """
    logging.getLogger("distributed").setLevel(logging.ERROR)  # its reconnecting is not for users
    try:
        client: Any = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as cause:
        raise RunError(
            f"no Dask scheduler answers at {address!r} ({first_line(cause)}); start one, or "
            "give its address, such as tcp://host:8786"
        ) from cause
    try:
        yield Cluster(client, address)
    finally:
        client.close(timeout=5)
