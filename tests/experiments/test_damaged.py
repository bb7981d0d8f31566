"""Records and norms from elsewhere, changed field by field: refused in one line, or shown."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.errors import RunError
from experiments.files import save_tensors
from experiments.record import trace_of
from experiments.showing import figures, kept, norms, plot, sections
from experiments.showing.results import keep
from tests.support.records import content, of, record

GOOD = content(
    "sr",
    0,
    versions={"torch": "2.11.0"},
    releases=[[3, "first", 2]],
    config={
        "options": {"importance": "magnitude"},
        "data": {"name": "digits", "validation": None},
    },
    revision="0123456789abcdef",
    processes=1,
)
SAMPLE = {
    "variant": "sr",
    "seed": 0,
    "counts": {"released": 1},
    "lines": {"released": [[[0, 1.0], [5, 0.5]]]},
    "releases": [[5, 0.5]],
}


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in nested lists and tables."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*at, i))


GONE = object()
ODD = [
    *(None, True, False, 0, -1, 1, 1.5, 10**30, -(10**400), 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), "", "x", "..", "../../x", "/abs/x", "a/b", "x" * 300, "a\nb"),
    *("a\0b", "\x1b[31m", "<script>", "$x^{", "ä", "7", [], [1], [[]], {}, {"a": 1}, GONE),
]


def changed(content: Any, at: tuple, value: Any) -> Any:
    copied = copy.deepcopy(content)
    inside = copied
    for key in at[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[at[-1]]
    else:
        inside[at[-1]] = value
    return copied


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused_or_shown(folder: Path, command: str, path: Path) -> bool:
    """Carry a command out; returns whether it was refused, in one line that names the file."""
    out, said = folder / "out", io.StringIO()
    before = tree(folder)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([command, str(path), "--out", str(out)])
    new = tree(folder) - before
    assert all(p == "out" or p.startswith("out/") for p in new), new
    if code == 0:
        return False
    assert code == 2
    assert not new
    lines = said.getvalue().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert path.name in lines[0] or "made-up" in lines[0]
    return True


# ---------------------------------------------------------------------- records


@pytest.mark.parametrize("at", list(places(GOOD)), ids=lambda at: ".".join(map(str, at)))
def test_a_record_with_any_field_changed_is_refused_or_shown_in_a_table(tmp_path, at):
    path = tmp_path / "record.json"
    for i, value in enumerate(ODD):
        content = changed(GOOD, at, value)
        try:
            path.write_text(json.dumps(content))
        except (ValueError, UnicodeEncodeError):
            continue
        folder = tmp_path / str(i)
        folder.mkdir()
        if not refused_or_shown(folder, "table", path):
            runs = kept.located([path])
            for written in keep(runs, folder / "kept"):
                assert written.parent == folder / "kept"
            assert kept.read([folder / "kept"]) == [record for _, record in runs]


@given(
    st.sampled_from(list(places(GOOD))),
    st.sampled_from(ODD),
    st.sampled_from(list(places(GOOD))),
    st.sampled_from(ODD),
    st.sampled_from(["plots", "report", "table"]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_with_fields_changed_are_refused_or_drawn(
    tmp_path_factory, at, value, other, second, command
):
    folder = tmp_path_factory.mktemp("drawn")
    content = changed(GOOD, at, value)
    with contextlib.suppress(KeyError, IndexError, TypeError):  # it is gone with the first
        content = changed(content, other, second)
    try:
        text = json.dumps(content)
    except (ValueError, UnicodeEncodeError):
        return
    # Beside a sound record of another seed, which it may not fit.
    path = folder / "record.json"
    path.write_text(text)
    (folder / "other").mkdir()
    (folder / "other" / "record.json").write_text(json.dumps(changed(GOOD, ("seed",), 9)))
    refused_or_shown(folder, command, path if command == "table" else folder)


def test_what_was_tried_is_shown_unchanged(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(GOOD))
    for command in ("table", "plots", "report"):
        assert not refused_or_shown(tmp_path, command, path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nonsense",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"version": 3}',
        '{"version": ' + "9" * 5000 + "}",
        json.dumps(GOOD)[:-20],
        json.dumps(GOOD).replace("85.0", "1e999"),
        json.dumps(GOOD).replace("85.0", "NaN"),
        json.dumps(GOOD).replace("magnitude", "\\udcff"),
        json.dumps(GOOD).replace('"magnitude"', "Infinity"),
    ],
    ids=range(13),
)
def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    for command in ("table", "plots", "report", "keep"):
        assert refused_or_shown(tmp_path, command, tmp_path / "record.json")


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a" / "record.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "record.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "record.json").write_bytes(b"\xff\xfe\x00")
    for name in "abc":
        with pytest.raises(RunError, match=rf"{name}/record\.json"):
            kept.located([tmp_path / name])


def test_records_of_other_layers_under_one_configuration_are_refused(tmp_path):
    records = [record("base", 0), record("base", 1, channels={"first": [16, 8], "other": [3, 2]})]
    with pytest.raises(RunError, match=r"different networks.*base, seed 1"):
        sections.sections(records)


def test_pictures_of_two_sections_never_take_one_anothers_place(tmp_path):
    records = [record("base", 0, data="Pets (1)"), record("base", 0, data="Pets [1]")]
    runs = [(tmp_path / "record.json", m) for m in records]
    pictures = plot.plot(runs, tmp_path)
    assert len(pictures) == len(set(pictures)) == 4


# ---------------------------------------------------------------------- norms


def test_kept_norms_with_any_field_changed_are_refused_or_drawn(tmp_path):
    (tmp_path / "made-up.jsonl").write_text(json.dumps(GOOD) + "\n")
    path = tmp_path / "made-up-norms.json"
    entry = {"config_hash": GOOD["config_hash"], "sample": SAMPLE}
    outcomes = set()
    for at in places(entry):
        for value in ODD:
            try:
                path.write_text(json.dumps({"norms": [changed(entry, at, value)]}))
            except (ValueError, UnicodeEncodeError):
                continue
            try:
                runs = kept.located([tmp_path / "made-up.jsonl"])
                found = norms.find_norms(runs, [r for _, r in runs])
                outcomes.add(bool(found))
            except RunError as refused:
                assert str(path) in str(refused)  # noqa: PT017
                assert "\n" not in str(refused)  # noqa: PT017
                outcomes.add("refused")
            else:
                if found:
                    figures.draw_norms(found)
    assert outcomes == {True, False, "refused"}


def saved(path: Path, content: Any) -> None:
    """A trace with a sound checksum, of the same run as the record."""
    save_tensors(path, content, trace_of(of(GOOD).run))


TRACES = {
    "no file of PyTorch": lambda path: path.write_bytes(b"junk"),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "no checksum": lambda path: torch.save({"trace": [], "events": []}, path),
    "a tensor": lambda path: saved(path, torch.zeros(3)),
    "no events": lambda path: saved(path, {"trace": []}),
    "an odd event": lambda path: saved(path, {"trace": [], "events": [{"kind": "decay"}]}),
    "NaN": lambda path: saved(
        path,
        {
            "trace": [],
            "events": [
                {
                    "step": 0,
                    "kind": "decay",
                    "group": "first",
                    "structures": (1,),
                    "norms": (float("nan"),),
                    "wave": 0,
                }
            ],
        },
    ),
}


@pytest.mark.parametrize("what", TRACES)
@pytest.mark.parametrize("command", ["plots", "report"])
def test_a_damaged_trace_is_refused_in_one_line_that_names_it(tmp_path, what, command, capsys):
    (tmp_path / "record.json").write_text(json.dumps(GOOD))
    TRACES[what](tmp_path / "trace.pt")
    assert main([command, str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "trace.pt") in line
    assert "delete it" in line
    assert "weights_only" not in line


def test_nothing_is_kept_where_a_trace_is_damaged(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(GOOD))
    (tmp_path / "trace.pt").write_bytes(b"junk")
    with pytest.raises(RunError, match=r"trace\.pt"):
        keep(kept.located([tmp_path / "record.json"]), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
