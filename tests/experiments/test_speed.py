"""Times of forward passes in PyTorch and in onnxruntime."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from experiments.config import Config, Timing
from experiments.errors import RunError
from experiments.inputs import models
from experiments.record import Record, Speed
from experiments.running import export, speed
from experiments.showing.report import report
from tests.support import tiny
from tests.support.records import record
from tests.support.snapshot import difference


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 2)


IMAGE = torch.zeros(1, 3, 8, 8)


def networks() -> dict[str, nn.Module | None]:
    large, small = models.VGG((64, 0, 64), 3, 10), models.VGG((8, 0, 8), 3, 10)
    return {"dense": large, "masked": None, "pruned": small}


def test_every_engine_and_batch_is_timed_and_nothing_changes():
    there = networks()
    kept = {k: m.state_dict() for k, m in there.items() if m is not None}
    drawn = torch.get_rng_state()
    timed = speed.speeds(there, IMAGE, Timing(batches=[32, 1]))
    assert [(one.engine, one.batch) for one in timed] == [
        ("torch", 1),
        ("torch", 32),
        ("onnxruntime", 1),
        ("onnxruntime", 32),
    ]
    for one in timed:
        assert one.masked is None
        assert one.dense > 0
        assert one.pruned > 0
    assert {k: m.training for k, m in there.items() if m is not None} == {
        "dense": True,
        "pruned": True,
    }
    assert difference(kept, {k: m.state_dict() for k, m in there.items() if m is not None}) is None
    assert torch.equal(drawn, torch.get_rng_state())


def test_without_onnxruntime_pytorch_alone_is_timed(monkeypatch):
    (one,) = speed.speeds(networks(), IMAGE, Timing(batches=[2], onnxruntime=False))
    assert one.engine == "torch"

    def refuse(*_):
        raise RunError("no such operation")

    monkeypatch.setattr(export, "write_onnx", refuse)
    (one,) = speed.speeds(networks(), IMAGE, Timing(batches=[2]))
    assert one.engine == "torch"


def test_a_long_pass_is_measured_a_few_times_only(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 15)
    monkeypatch.setattr(speed, "ENOUGH", 0.0)
    calls = []
    spent = speed._side_by_side({"one": lambda: calls.append(1)})
    assert len(calls) == speed.FEWEST + 2
    assert spent.keys() == {"one"}


def test_what_is_timed_by_default_leaves_the_hash_alone():
    changes = {"latency": tiny.GONE}
    given = tiny.config({"latency": {"batches": [1, 128], "onnxruntime": True}})
    assert tiny.config(changes).hash() == given.hash() != tiny.config().hash()
    with pytest.raises(ValueError, match=r"latency\.batches"):
        tiny.config({"latency": {"batches": []}})
    assert isinstance(given, Config)


def test_the_promise_is_the_macs_and_its_share_what_arrives(tmp_path):
    one = record("sp", 0, macs={"dense": 400, "pruned": 100})
    timed = Speed(engine="onnxruntime", batch=8, dense=6.0, masked=6.0, pruned=2.0)
    assert one.kept_promise(timed) == pytest.approx(0.75)
    content = one.content() | {"speeds": [timed.model_dump()]}
    whole = Record.from_json(json.dumps(content))
    assert whole.speeds == [timed]
    page = report([(tmp_path / "record.json", whole)], tmp_path / "report.html").read_text()
    (row,) = (line for line in page.splitlines() if ">onnxruntime, 8<" in line)
    figures = [cell.split("<")[0] for cell in row.split(">") if cell[:1].isdigit()]
    assert figures == ["75", "3.00", "4.00", "6.00", "6.00", "2.00"]


def test_a_dense_latency_of_an_earlier_release_is_kept_and_not_shown(tmp_path):
    old = record("sp", 0, latency__dense=7.125, latency__masked=3.0, latency__pruned=2.0)
    old = Record.from_json(json.dumps({k: v for k, v in old.content().items() if k != "speeds"}))
    assert old.content()["latency"]["dense"] == 7.125
    assert [old.milliseconds(of) for of in ("dense", "masked", "pruned")] == [None, 3.0, 2.0]
    for runs, shown in ([old], False), ([old, record("base", 0, latency__dense=7.125)], True):
        located = [(tmp_path / r.variant / "record.json", r) for r in runs]
        page = report(located, tmp_path / "report.html").read_text()
        assert "slower of two layouts" in page
        assert ("7.12" in page) == shown
