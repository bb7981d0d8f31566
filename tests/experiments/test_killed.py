"""A run that is killed goes on to the same end, and every file it has left can be loaded."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support import forked, killed
from tests.support.tiny import ROOT


@pytest.mark.slow
def test_a_run_killed_at_any_point_of_removing_and_saving_goes_on_to_the_same_end(tmp_path):
    done = subprocess.run(
        [forked.python(), "-m", "tests.support.killed", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    lines = killed.AT_REMOVAL + killed.IN_WRITING + killed.AT_END + 1 + killed.ANYWHERE
    assert len(reports) == lines + 1  # those killed after some time are one run
    assert sum(f["killed"] for f in reports) == len(reports)
    for f in reports:
        assert f["difference"] is None, f
        assert f["left"] == ["model.safetensors", "record.json", "trace.pt"]
        assert f["latency"] == ["batch", "dense", "masked", "pruned"]
    # In the removal the checkpoint is all there is; at the end files come one by one.
    at_removal = [f["files"] for f in reports if f["where"] == "removal"]
    assert all("checkpoint.pt" in files for files in at_removal)
    assert not any("model.safetensors" in files for files in at_removal)
    at_end = [f["files"] for f in reports if f["where"] == "end"]
    assert {"checkpoint.pt", "model.safetensors", "record.json"} <= set(at_end[-1])
    assert len({tuple(files) for files in at_end}) > 1
