"""How far a run is: one bar over all its steps, with an estimate for all of them."""

from __future__ import annotations

import io
import re

import pytest
from tqdm import tqdm

from experiments.running import progress
from experiments.running.run import run
from experiments.running.training import Stopped
from tests.support import tiny
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread", "miniature")
DENSE, SPARSE, PRUNE = 4, 8, 16


@pytest.fixture
def shown(monkeypatch):
    """What would be on a terminal: the bars of steps, and what each has shown in turn."""
    bars, lines = [], []

    class Shown(tqdm):
        def __init__(self, *args, **settings):
            settings |= {"file": io.StringIO(), "disable": False, "mininterval": 0}
            super().__init__(*args, **settings)
            if settings.get("unit") == "step":
                bars.append(self)

        def update(self, n=1):
            super().update(n)
            lines.append((self.desc, self.n, self.total))

    monkeypatch.setattr(progress, "tqdm", Shown)
    return bars, lines


def test_one_bar_has_all_steps_of_a_run(tmp_path, shown):
    bars, lines = shown
    run(tiny.request(tmp_path, "sr", MINIATURE))
    (bar,) = bars
    assert [n for _, n, _ in lines] == list(range(1, DENSE + SPARSE + PRUNE + 1))
    assert {total for *_, total in lines} == {DENSE + SPARSE + PRUNE}
    stages = [stage for stage, *_ in lines]
    assert stages == ["dense"] * DENSE + ["sparse"] * SPARSE + ["prune"] * PRUNE
    # An estimate of the time that is left: elapsed<remaining, by the mean of all steps so far.
    assert re.search(r"dense: .* 2/28 \[\d\d:\d\d<\d\d:\d\d", bar.fp.getvalue())
    assert bar.smoothing == 0


def test_a_dense_model_that_is_read_is_no_part_of_it(tmp_path, shown):
    bars, lines = shown
    run(tiny.request(tmp_path, "base", MINIATURE))
    del lines[:]
    run(tiny.request(tmp_path, "sp", MINIATURE))
    assert len(bars) == 2
    assert lines[-1] == ("prune", SPARSE + PRUNE, SPARSE + PRUNE)
    assert lines[0] == ("sparse", 1, SPARSE + PRUNE)


@pytest.mark.parametrize("stop", [2, DENSE + 3, DENSE + SPARSE + 5])
def test_a_run_that_goes_on_shows_what_is_done(tmp_path, shown, stop):
    bars, lines = shown
    with tiny.asked_when(lambda step: step == stop), pytest.raises(Stopped):
        run(tiny.request(tmp_path, "sp", MINIATURE))
    del lines[:]
    run(tiny.request(tmp_path, "sp", MINIATURE, resume=True))
    read = 0 if stop < DENSE else DENSE  # the dense model is trained by then
    assert lines[0][1:] == (stop - read + 1, DENSE + SPARSE + PRUNE - read)
    assert lines[-1][1] == lines[-1][2]
    assert bars[-1].initial == stop - read


def test_a_dense_model_that_is_lost_is_trained_anew_within_the_bar(tmp_path, shown):
    bars, lines = shown
    with tiny.asked_when(lambda step: step == DENSE + 5), pytest.raises(Stopped):
        run(tiny.request(tmp_path, "sp", MINIATURE))
    (dense,) = (tmp_path / "dense").iterdir()
    dense.unlink()
    del lines[:]
    run(tiny.request(tmp_path, "sp", MINIATURE, resume=True))
    assert lines[0] == ("dense", 1, DENSE + SPARSE + PRUNE)
    assert lines[-1] == ("prune", DENSE + SPARSE + PRUNE, DENSE + SPARSE + PRUNE)
    assert bars[-1].initial == 5  # which took no time
