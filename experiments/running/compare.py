"""Many runs: on this machine each a process of its own, as many at once as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from ..errors import QuotingError, RunError
from ..places import BusyError, busy
from ..record import RECORD
from .finished import finished
from .jobs import Job, command, last_lines, word


def compare(
    jobs: Sequence[Job], *, at_once: int | None = None, scheduler: str | None = None
) -> list[Path]:
    """Carry out all runs that are not there yet; go on with those that were stopped.

    A dense model is trained by the first run that needs it, and read by the others.

    Args:
        jobs: the runs, of one configuration or several.
        at_once: runs at a time. By default one per core, each with one thread; on a GPU one.
        scheduler: the address of a Dask scheduler, whose workers carry the runs out, one for each
            of their threads.

    Returns:
        The records, in the order of the jobs.

    Raises:
        RunError: two configurations have one name; or a run failed: its output is quoted, and the
            other runs are kept; or there is no such scheduler.
        BusyError: another process carries one of the runs out.
    """
    if at_once is None:
        on_gpu = bool(jobs) and jobs[0].request.device.type == "cuda"
        at_once = 1 if on_gpu else os.cpu_count() or 1
    own: dict[Path, Job] = {}
    for job in jobs:
        other = own.setdefault(job.request.folder, job)
        if other.request.config != job.request.config:
            raise RunError(
                f"{other.config_path} and {job.config_path} differ, but both are named "
                f"{job.request.config.name!r}, which names the runs' folders; rename one"
            )
    jobs = list(own.values())  # a run that was asked for twice is one run
    first = {job.dense: job for job in reversed(jobs) if job.dense is not None}
    waiting = [job for job in jobs if not finished(replace(job.request, resume=True))]
    for job in waiting:
        if busy(job.request.folder):
            raise BusyError(
                f"another process is at work in {job.request.folder}; wait until it has ended, or "
                "end it, or give another --out"
            )
    # First the runs that train dense models; those that read a dense model wait for its run.
    leading = [job for job in waiting if job.dense is not None and job is first[job.dense]]
    queue = leading + [job for job in waiting if job.dense is None or first[job.dense] is not job]
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(waiting), unit="run", desc="runs", disable=None
    )
    with bar, _place(scheduler, at_once) as place:
        _work(queue, {job.dense: job for job in leading}, place, bar)
    return [job.request.folder / RECORD for job in jobs]


@contextmanager
def _place(scheduler: str | None, at_once: int) -> Iterator[Place]:
    if scheduler is None:
        yield Here(at_once)
        return
    from .cluster import cluster  # only now: Dask is an extra, and takes a while to load

    with cluster(scheduler) as there:
        yield there


class Running(Protocol):
    """A run that is being carried out."""

    @property
    def job(self) -> Job:
        """Which."""

    def ended(self) -> bool:
        """Whether it has ended and its record is there.

        Raises:
            RunError: it failed.
        """

    def stop(self) -> None:
        """Ask it to stop."""

    def wait(self) -> None:
        """Wait until it has stopped."""


class Place(Protocol):
    """Where runs are carried out."""

    @property
    def slots(self) -> int:
        """How many at a time, now."""

    def start(self, job: Job) -> Running:
        """Begin a run."""


def _work(queue: list[Job], leading: dict[str | None, Job], place: Place, bar: tqdm[None]) -> None:
    """Carry out a queue; ``leading`` has, by dense model, the run that has to finish first."""
    running: list[Running] = []
    try:
        while queue or running:
            ready = [job for job in queue if leading.get(job.dense, job) is job]
            for job in ready[: max(0, place.slots - len(running))]:
                queue.remove(job)
                running.append(place.start(job))
            names = "; ".join(run.job.name for run in running)
            bar.set_postfix_str(names or "waiting for workers", False)
            bar.refresh()
            time.sleep(0.5)
            for run in list(running):
                if not run.ended():
                    continue
                running.remove(run)
                if leading.get(run.job.dense) is run.job:
                    del leading[run.job.dense]
                bar.update()
                if bar.disable:  # no terminal: a line per run instead of a moving bar
                    print(f"finished {run.job.name}", flush=True)
    finally:
        # Interrupted: let every run save itself, so that the same command goes on later.
        for run in running:
            run.stop()
        for run in running:
            run.wait()


@dataclass(frozen=True)
class Here:
    """This machine, on which every run is a process of its own.

    Attributes:
        slots: runs at a time, which share the threads.
    """

    slots: int

    def start(self, job: Job) -> Process:
        """Start a run; one that was stopped goes on."""
        request = job.request
        request.folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, torch.get_num_threads() // self.slots)
        words = [sys.executable, "-m", "experiments", "run", word(job.config_path)]
        words += [*command(job, threads), "--resume", "--out", word(request.out), "--until-eof"]
        with (request.folder / "run.log").open("ab") as log:
            # A session of its own: an interrupt on the terminal reaches this process alone, which
            # then asks every run once. A second signal would end a run before it has saved itself.
            # Nothing is written into the pipe: it ends with this process, whatever ends it, and
            # then the run saves itself, too.
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Process(job, process)


@dataclass(frozen=True)
class Process:
    """A run in a process on this machine."""

    job: Job
    process: subprocess.Popen[bytes]

    def ended(self) -> bool:
        """Whether it has ended. If it failed, what it printed last is quoted."""
        code = self.process.poll()
        if code is None:
            return False
        assert self.process.stdin is not None
        self.process.stdin.close()
        if code:
            log = (self.job.request.folder / "run.log").read_text(errors="replace")
            raise QuotingError(last_lines(self.job, code, log))
        return True

    def stop(self) -> None:
        """Ask it to save itself."""
        self.process.terminate()

    def wait(self) -> None:
        """Wait until it has."""
        self.process.wait()
