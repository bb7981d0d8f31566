"""Writing is atomic, and what is read is what was written, or is refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import files
from tests.support.damage import each_bit_flipped


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


# ---------------------------------------------------------------------- tensors

CONTENT = {
    "state": {"weight": torch.arange(6.0).view(3, 2)},
    "plan": [("layer", [1, 2])],
    "n": None,
}
OF = {"kind": "test", "n": 1}


def test_tensors_are_read_back_as_they_were_without_running_code(tmp_path):
    files.save_tensors(tmp_path / "a.pt", CONTENT, OF)
    # PyTorch reads it, too, and does not look at what follows its own part.
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    for read in (files.load_tensors(tmp_path / "a.pt", OF), plain):
        assert torch.equal(read["state"]["weight"], CONTENT["state"]["weight"])
        assert read["plan"] == CONTENT["plan"]
        assert read["n"] is None
    assert files.load_tensors(tmp_path / "a.pt", {"n": 1, "kind": "test"})["n"] is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sound file's bytes, and a place for damaged ones."""
    path = tmp_path_factory.mktemp("written") / "a.pt"
    files.save_tensors(path, CONTENT, OF)
    return path.read_bytes(), path


def refused(path: Path) -> str:
    with pytest.raises(files.FileError) as caught:
        files.load_tensors(path, OF)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flipped_bit_and_every_cut_is_refused(written):
    content, path = written
    for _ in each_bit_flipped(path, content):
        assert "damaged" in refused(path)
    files.load_tensors(path, OF)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        assert "damaged" in refused(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 5000),
    gone=st.integers(0, 60),
    new=st.binary(max_size=40) | st.just(files.MARK),
)
def test_whatever_is_put_in_or_taken_out_is_refused(written, start, gone, new):
    content, path = written
    start = min(start, len(content))
    altered = content[:start] + new + content[start + gone :]
    path.write_bytes(altered)
    if altered == content:
        files.load_tensors(path, OF)
    else:
        assert "damaged" in refused(path)


def test_two_files_in_each_others_place_are_refused_saying_what_they_are(tmp_path):
    for n in (1, 2):
        files.save_tensors(tmp_path / f"{n}.pt", CONTENT, {"kind": "test", "n": n})
    (tmp_path / "2.pt").replace(tmp_path / "1.pt")
    assert (
        refused(tmp_path / "1.pt") == 'it is of {"kind":"test","n":2}, not of {"kind":"test","n":1}'
    )


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [Code(), {"a": [Code()]}, print, slice(3)],
    ids=["object", "inside", "function", "slice"],
)
def test_code_is_not_run_and_nobody_advises_to_run_it(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    files.save_tensors(tmp_path / "a.pt", content, OF)  # whose checksum is sound
    message = refused(tmp_path / "a.pt")
    assert "more than tensors and plain values" in message
    assert "weights_only" not in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("there", ["nothing", "a folder", "no tensors"])
def test_what_cannot_be_read_is_refused_with_the_cause(tmp_path, there):
    path = tmp_path / "a.pt"
    if there == "a folder":
        path.mkdir()
    elif there == "no tensors":
        path.write_text("hello, I am something else altogether " * 5)
    words = {"nothing": "No such file", "a folder": "Is a directory", "no tensors": "damaged"}
    assert words[there] in refused(path)


# ---------------------------------------------------------------------- JSON with its checksum

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(content=st.dictionaries(st.text().filter(lambda t: t != "sha256"), JSON, max_size=5))
@settings(max_examples=50)
def test_json_vouches_for_itself_in_any_layout(content):
    vouched = files.vouched(content)
    assert files.vouches(vouched)
    for layout in ({"indent": 1}, {"separators": (",", ":"), "sort_keys": True}):
        assert files.vouches(json.loads(json.dumps(vouched, **layout)))
    assert not files.vouches({**vouched, "one more": 1})
    assert not files.vouches(content)
