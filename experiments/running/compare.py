"""Many runs: each a process of its own, as many at once as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import QuotingError, RunError
from ..places import BusyError, busy
from ..record import RECORD
from .finished import finished
from .request import Request


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        config_path: the file that the request's configuration was read from.
        request: the run.
        data, validation: what overrides the configuration's, for the run's command line.
    """

    config_path: Path
    request: Request
    data: str | None = None
    validation: int | None = None

    @property
    def dense(self) -> str | None:
        """Names the dense model that the run starts from, and may have to train."""
        config = self.request.config
        if config.dense is None:
            return None
        seed = config.dense_seed(self.request.seed)
        return f"{config.dense_hash(config.data.model_dump_json())}, seed {seed}"


def compare(jobs: Sequence[Job], *, at_once: int | None = None) -> list[Path]:
    """Carry out all runs that are not there yet; go on with those that were stopped.

    A dense model is trained by the first run that needs it, and read by the others.

    Args:
        jobs: the runs, of one configuration or several.
        at_once: runs at a time. By default one per core, each with one thread; on a GPU one.

    Returns:
        The records, in the order of the jobs.

    Raises:
        RunError: two configurations have one name; or a run failed: its output is quoted, and the
            other runs are kept.
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
    with bar:
        _work(queue, {job.dense: job for job in leading}, at_once, bar)
    return [job.request.folder / RECORD for job in jobs]


def _work(queue: list[Job], leading: dict[str | None, Job], at_once: int, bar: tqdm[None]) -> None:
    """Carry out a queue; ``leading`` has, by dense model, the run that has to finish first."""
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while queue or running:
            ready = [job for job in queue if leading.get(job.dense, job) is job]
            for job in ready[: at_once - len(running)]:
                queue.remove(job)
                running.append((job, _start(job, at_once)))
            bar.set_postfix_str("; ".join(_name(job.request) for job, _ in running), False)
            bar.refresh()
            time.sleep(0.5)
            for job, process in list(running):
                code, request = process.poll(), job.request
                if code is None:
                    continue
                running.remove((job, process))
                assert process.stdin is not None
                process.stdin.close()
                if code:
                    log = (request.folder / "run.log").read_text(errors="replace").strip()
                    raise QuotingError(
                        f"{_name(request)} ended with code {code}:\n"
                        + "\n".join(log.splitlines()[-15:])
                    )
                if leading.get(job.dense) is job:
                    del leading[job.dense]
                bar.update()
                if bar.disable:  # no terminal: a line per run instead of a moving bar
                    print(f"finished {_name(request)}", flush=True)
    finally:
        # Interrupted: let every run save itself, so that the same command goes on later.
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def _name(request: Request) -> str:
    return f"{request.config.name}, {request.variant}, seed {request.seed}"


def _start(job: Job, at_once: int) -> subprocess.Popen[bytes]:
    request = job.request
    request.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments", "run", _word(job.config_path)]
    command += ["--variant", request.variant, "--seed", str(request.seed), "--resume"]
    command += ["--out", _word(request.out), "--data-root", _word(request.data_root), "--until-eof"]
    command += ["--device", str(request.device), "--save-every", str(request.save_every)]
    command += ["--threads", str(max(1, torch.get_num_threads() // at_once))]
    if job.data is not None:
        command += ["--data", job.data]
    if job.validation is not None:
        command += ["--validation", str(job.validation)]
    with (request.folder / "run.log").open("ab") as log:
        # A session of its own: an interrupt on the terminal reaches this process alone, which
        # then asks every run once. A second signal would end a run before it has saved itself.
        # Nothing is written into the pipe: it ends with this process, whatever ends it, and then
        # the run saves itself, too.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _word(path: Path) -> str:
    """A path as a word of a command line: never an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)
