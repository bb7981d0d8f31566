"""The record's class: what it reads it writes, byte for byte, and what is wrong is named."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.record import Record, RecordError, run_of
from experiments.showing import lengths, results
from tests.support.records import content, of, record

KEPT = [*sorted(results.RECORDS.glob("*.jsonl")), lengths.KEPT, lengths.BUDGETS]
WHOLE = {
    **content("sr", 3, releases=[[4, "first", 2]], versions={"torch": "2.12"}, dense_seed=1),
    "images": "0123456789abcdef",
    "processes": 2,
    "latency": {"batch": 128, "dense": 2.0, "masked": 2.5, "pruned": 1.0},
}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_records_are_written_as_they_were_read(path):
    text = path.read_text(encoding="utf-8")
    records = [Record.from_json(line) for line in text.splitlines()]
    assert "".join(f"{one.line()}\n" for one in records) == text
    for one in records:
        assert one.settings.hash() == one.config_hash
        assert one.settings.name == one.name
        assert one.run == run_of(one.config_hash, one.variant, one.seed, one.images)


def numbers(value, at=()):
    """The places of all numbers in nested lists and tables, outside of the configuration."""
    if isinstance(value, dict):
        for key in value.keys() - {"config", "version"}:
            yield from numbers(value[key], (*at, key))
    elif isinstance(value, list):
        for i, inside in enumerate(value):
            yield from numbers(inside, (*at, i))
    elif isinstance(value, int | float):
        yield at


def put(value, at, new):
    changed = copy.deepcopy(value)
    inside = changed
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = new
    return changed


PLACES = sorted(numbers(WHOLE), key=str)


@given(
    st.sampled_from(PLACES),
    st.one_of(st.integers(0, 10**12), st.floats(0, 1e12, allow_subnormal=True)),
    st.booleans(),
)
def test_a_record_with_any_number_is_refused_or_written_as_it_was(at, number, sealed):
    made = put(WHOLE, at, number)
    if not sealed:
        del made["images"]
    try:
        one = Record.model_validate_json(json.dumps(made))
    except ValueError as refused:
        assert str(at[0]) in str(refused)  # noqa: PT017
        return
    one = one.sealed() if sealed else one
    line = one.line()
    assert Record.from_json(line) == one
    assert Record.from_json(line).line() == line
    plain = json.loads(line)
    assert plain.pop("sha256", None) is not None or not sealed
    assert {k: repr(v) for k, v in plain.items()} == {k: repr(v) for k, v in made.items()}


def tables(value, at=()):
    """The places of all tables whose keys are fixed."""
    if isinstance(value, dict) and at not in (("config",), ("versions",), ("channels",)):
        yield at
        for key, inside in value.items():
            yield from tables(inside, (*at, key))


@pytest.mark.parametrize("at", list(tables(WHOLE)), ids=lambda at: ".".join(at) or "the record")
def test_an_unknown_key_and_a_missing_one_are_named(at):
    inside = WHOLE
    for key in at:
        inside = inside[key]
    dotted = "".join(f"{key}." for key in at)
    with pytest.raises(RecordError, match=rf"^{dotted}other: unknown key$"):
        of(put(WHOLE, (*at, "other"), 1))
    for key in inside.keys() - {"images"}:  # without it there is no checksum either
        left = {k: v for k, v in inside.items() if k != key}
        made = put(WHOLE, at, left) if at else left
        with pytest.raises(RecordError) as caught:
            of(made)
        message = str(caught.value)
        assert "\n" not in message
        if key == "version":
            assert message == "it has no 'version'"
        elif key in {"dense_seed", "processes", "masked", "speeds"}:
            assert message == "its checksum is another one: it was changed"
        else:
            assert message == f"{dotted}{key}: Field required"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"smooth": {"steps": 0}}, r"^config\.smooth\.steps is 0; give an integer of at least 1"),
        ({"smooth": {"step": 1}}, r"^config\.smooth\.step: unknown key$"),
        ({"rectify": {"rate": 2.0}}, r"^config\.rectify\.rate is 2\.0"),
        ({"stages": {"prune": {"epochs": 1}}}, r"^config\.stages\.prune\.learning_rate: Field"),
        ({"name": "../x"}, r"^config\.name: "),
        ({"colour": 1}, r"^config\.colour: unknown key$"),
    ],
)
def test_what_is_wrong_in_a_records_configuration_is_named(config, message):
    with pytest.raises(RecordError, match=message):
        record(config=config)
