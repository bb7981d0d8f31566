"""A run that is killed, again and again: ``python -m tests.support.killed FOLDER``.

Each kill is a SIGKILL to a process of its own, forked from this one, that carries the run out: at a
line of this project's code, drawn at random, or after some time. After each one every file that is
there is loaded, and the run is taken up. Writes a report of every kill, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from dpm_core.adapters.saved import read, write
from experiments.record import MODEL
from experiments.running.request import Request
from experiments.running.run import run
from experiments.running.training import Stopped
from tests.support import tiny
from tests.support.snapshot import difference

WATCHED = tuple(
    str(tiny.ROOT / name)
    for name in (
        "adapters/depgraph.py",
        "adapters/saved.py",
        "experiments/files.py",
        "experiments/record.py",
        "experiments/running/checkpoint.py",
        "experiments/running/run.py",
        "experiments/running/training.py",
        "third_party/dependency.py",
    )
)
# Of 4 + 8 + 16 steps; what was released is replaced, and all is zero and removed, after the 21st.
BEFORE_REMOVAL = 20
AT_REMOVAL, IN_WRITING, AT_END, ANYWHERE, AT_TIMES = 6, 10, 3, 2, 6
"""How often it is killed where."""


@dataclass
class Lines:
    """Counts lines of :data:`WATCHED`, and ends the process at one of them.

    Attributes:
        last: the line at which to end; 0 for none.
        count: lines so far.
        marks: the count when the removal and the saving of the model and of the record began and
            ended.
        writing: the counts of lines in which some file is being written.
    """

    last: int
    count: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    writing: list[int] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in WATCHED:
            return None
        if event == "line":
            self.count += 1
            if code is write.__code__:
                self.writing.append(self.count)
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
        elif code.co_qualname in ("Loop._remove", "save_pruned", "Record.save"):
            self.marks.setdefault(f"{code.co_qualname} {event}", self.count)
        return self


def carry_out(request: Request, last: int = 0, seconds: float | None = None) -> dict[str, Any]:
    """The run in a process of its own, which may be killed at a line or after some time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lines = Lines(last)
            if seconds is None:
                sys.settrace(lines)
            run(request)
            sys.settrace(None)
            said = {**lines.marks, "end": lines.count, "writing": lines.writing}
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    line = os.read(reader, 1 << 16)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed; see above"
    return {"killed": os.WIFSIGNALED(status), "marks": json.loads(line) if line else {}}


def load_all(out: Path) -> list[str]:
    """Load every file of a run, and return the names. Half-written files have hidden names."""
    paths = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]
    for path in paths:
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert path.name == MODEL, path
            read(path)
    return sorted(p.name for p in paths)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tiny.miniature(patch := pytest.MonkeyPatch())
    draw = random.Random(0)

    def asked(name: str) -> Request:
        changes = tiny.MINIATURE
        return tiny.request(folder / name, "sr", changes, resume=True, save_every=0)

    whole = tiny.results(run(asked("whole")))
    with tiny.asked_when(lambda step: step == BEFORE_REMOVAL), contextlib.suppress(Stopped):
        run(asked("before"))
    shutil.copytree(folder / "before", folder / "usual")
    started = time.perf_counter()
    marks = carry_out(asked("usual"))["marks"]
    usual = time.perf_counter() - started
    start, end = marks["Loop._remove call"], marks["Loop._remove return"]
    points = [("removal", draw.randint(start + 1, end)) for _ in range(AT_REMOVAL)]
    points += [("writing", line) for line in draw.sample(marks["writing"], IN_WRITING)]
    saving, last = marks["save_pruned call"] + 1, marks["end"]
    points += [("end", draw.randint(saving, last)) for _ in range(AT_END)]
    points += [("end", marks["Record.save return"] + 1)]  # the record is there, and the checkpoint
    points += [("anywhere", draw.randint(1, last)) for _ in range(ANYWHERE)]
    kills: list[tuple[str, dict[str, Any]]] = [(where, {"last": line}) for where, line in points]
    kills += [("time", {"seconds": draw.uniform(0, usual)}) for _ in range(AT_TIMES)]
    reports = []
    for i, (where, how) in enumerate(kills):
        # All but a few start anew from right before the removal; those go on from where they are.
        name = f"killed{i if where != 'time' else ''}"
        if not (folder / name).exists():
            shutil.copytree(folder / "before", folder / name)
        request = asked(name)
        killed = carry_out(request, **how)["killed"]
        files = load_all(folder / name)
        if where != "time":
            carry_out(request)
            reports.append(compared(where, killed, files, request, whole))
    request = asked("killed")
    carry_out(request)
    reports.append(compared("time", True, load_all(folder / "killed"), request, whole))
    patch.undo()
    sys.stdout.write(json.dumps(reports))


def compared(
    where: str, killed: bool, files: list[str], request: Request, whole: dict[str, Any]
) -> dict[str, Any]:
    """What became of a run that was killed and taken up."""
    record = request.folder / "record.json"
    return {
        "where": where,
        "killed": killed,
        "files": files,
        "left": load_all(request.folder),
        "difference": difference(tiny.results(record), whole),
        "latency": sorted(json.loads(record.read_text(encoding="utf-8"))["latency"]),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
