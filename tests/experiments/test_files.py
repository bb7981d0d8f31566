"""Atomic writing: a reader finds the old file or the new one, whatever happens on the way."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch

from experiments import files


def test_the_new_content_is_there_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    files.write(path, lambda file: file.write(b"x" * 100_000))
    assert path.read_bytes() == b"x" * 100_000
    files.write(path, lambda file: file.write(b"shorter"))
    assert path.read_bytes() == b"shorter"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("there", [True, False], ids=["over a file", "new"])
def test_an_error_while_filling_leaves_what_was_there(tmp_path, error, there):
    path = tmp_path / "file.bin"
    if there:
        path.write_bytes(b"old")

    def fill(file):
        file.write(b"half of the new")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        files.write(path, fill)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == (
        [("file.bin", b"old")] if there else []
    )


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fill(file):
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert os.fstat(file.fileno()).st_dev == path.stat().st_dev

    files.write(path, fill)
    assert path.read_bytes() == b"new"


def test_the_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    done = []
    sync, take = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.fstat(n).st_size), sync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), take(a, b)))
    files.write(tmp_path / "file.bin", lambda file: file.write(b"12345"))
    assert done == [5, "replace"]


def test_a_file_gets_the_permissions_that_the_umask_leaves(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    before = os.umask(0o022)
    try:
        plain.write_bytes(b"")
        files.write(ours, lambda file: file.write(b""))
    finally:
        os.umask(before)
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [float("-inf")]}], ids=str)
def test_json_refuses_what_is_no_number_and_keeps_the_old_file(tmp_path, bad):
    path = tmp_path / "record.json"
    files.save_json(path, {"accuracy": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        files.save_json(path, {"accuracy": bad})
    assert json.loads(path.read_text()) == {"accuracy": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_json_keeps_numbers_in_full_precision(tmp_path):
    content = {"third": 1 / 3, "tiny": 5e-324, "large": 2**60, "text": "ä ± %", "none": None}
    files.save_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content


def test_tensors_are_read_back_as_they_were_without_running_code(tmp_path):
    content = {"state": {"weight": torch.randn(3, 2)}, "plan": [("layer", [1, 2])], "n": None}
    files.save_tensors(tmp_path / "a.pt", content)
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(read["state"]["weight"], content["state"]["weight"])
    assert read["plan"] == content["plan"]
    assert read["n"] is None
