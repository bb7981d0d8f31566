"""Many runs of one configuration: each a process of its own, as many at once as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .run import Request, RunError, finished


def compare(
    config_path: Path, requests: Sequence[Request], *, data: str | None, jobs: int | None = None
) -> list[Path]:
    """Carry out all runs that are not there yet; go on with those that were stopped.

    A seed's dense model is trained by the seed's first run, and read by the others.

    Args:
        config_path: the file the requests' configuration was read from.
        requests: the runs.
        data: what overrides the configuration's data, for the runs' command lines.
        jobs: runs at a time. By default one per core, each with one thread; on a GPU one.

    Returns:
        The records, in the order of the requests.

    Raises:
        RunError: a run failed; its output is quoted, the others are kept.
    """
    if jobs is None:
        on_gpu = bool(requests) and requests[0].device.type == "cuda"
        jobs = 1 if on_gpu else os.cpu_count() or 1
    first = {r.seed: r for r in reversed(requests)}
    waiting = [r for r in requests if not finished(r)]
    # First the runs that train dense models, then those that find them.
    leading = [r for r in waiting if r is first[r.seed]]
    queues = [leading, [r for r in waiting if r is not first[r.seed]]]
    bar = tqdm(
        total=len(requests),
        initial=len(requests) - len(waiting),
        unit="run",
        desc=config_path.stem,
        disable=None,
    )
    with bar:
        for queue in queues:
            _work(queue, config_path, data, jobs, bar)
    return [r.folder / "record.json" for r in requests]


def _work(
    queue: list[Request], config_path: Path, data: str | None, jobs: int, bar: tqdm[None]
) -> None:
    running: list[tuple[Request, subprocess.Popen[bytes]]] = []
    try:
        while queue or running:
            while queue and len(running) < jobs:
                request = queue.pop(0)
                running.append((request, _start(request, config_path, data, jobs)))
            bar.set_postfix_str(", ".join(f"{r.variant} {r.seed}" for r, _ in running), False)
            bar.refresh()
            time.sleep(0.5)
            for request, process in list(running):
                code = process.poll()
                if code is None:
                    continue
                running.remove((request, process))
                if code:
                    log = (request.folder / "run.log").read_text(errors="replace").strip()
                    raise RunError(
                        f"{request.variant}, seed {request.seed} ended with code {code}:\n"
                        + "\n".join(log.splitlines()[-15:])
                    )
                bar.update()
                if bar.disable:  # no terminal: a line per run instead of a moving bar
                    print(f"finished {request.variant}, seed {request.seed}", flush=True)
    finally:
        # Interrupted: let every run save itself, so that the same command goes on later.
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def _start(
    request: Request, config_path: Path, data: str | None, jobs: int
) -> subprocess.Popen[bytes]:
    request.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments", "run", str(config_path)]
    command += ["--variant", request.variant, "--seed", str(request.seed), "--resume"]
    command += ["--out", str(request.out), "--data-root", str(request.data_root)]
    command += ["--device", str(request.device), "--save-every", str(request.save_every)]
    command += ["--threads", str(max(1, torch.get_num_threads() // jobs))]
    if data is not None:
        command += ["--data", data]
    with (request.folder / "run.log").open("ab") as log:
        # A session of its own: an interrupt on the terminal reaches this process alone, which
        # then asks every run once. A second signal would end a run before it has saved itself.
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
