"""Names that become paths, and values of configurations: drawn ones are refused, or they fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.config import Config, ConfigError, load
from experiments.names import LONGEST, check_name, check_text, faults, folder_of, one_line, slug
from experiments.running.request import Request
from tests.support import tiny

ODD = st.sampled_from(
    ["..", ".", "/", "a/b", "../../x", "/abs", "a\0b", "a\nb", "-rf", "~", "\udcff", "ä" * 300]
)
ANY = st.one_of(st.text(max_size=300), ODD, st.text("./\\a\n\0 ~-_", max_size=12))


@given(ANY)
def test_a_name_that_is_taken_is_one_part_of_a_path(name):
    try:
        check_name(name)
    except ValueError as refused:
        assert one_line(str(refused)) == str(refused)  # noqa: PT017
        return
    path = Path("out") / f"{name}-norms.json"
    assert path.parent == Path("out")
    assert path.resolve().parent == Path("out").resolve()
    assert name[0] not in ".-~"
    assert len(name.encode()) <= LONGEST


@given(ANY)
def test_a_folder_of_a_label_never_leads_out_and_never_is_too_long(label):
    for part in (folder_of(label), slug(label)):
        assert "/" not in part
        assert not part.startswith(".")
        assert len(part.encode()) <= LONGEST


@given(ANY, ANY)
def test_long_labels_that_differ_have_folders_that_differ(one, other):
    one, other = "x" * 100 + one, "x" * 100 + other
    assert (folder_of(one) == folder_of(other)) == (one == other)


def test_labels_have_the_folders_that_they_always_had():
    assert folder_of("CIFAR-10 (JPEG)") == "CIFAR-10--JPEG-"
    assert folder_of("folder:/some/pets") == "folder--some-pets"
    assert slug("CIFAR-10 (JPEG), 10,000 training images") == (
        "cifar-10--jpeg---10-000-training-images"
    )


@given(ANY)
def test_a_text_that_is_taken_is_one_visible_line(text):
    try:
        check_text(text)
    except ValueError as refused:
        assert "\n" not in one_line(str(refused))  # noqa: PT017
        return
    assert text.splitlines() == [text]
    text.encode()


@given(ANY)
def test_one_line_has_no_other_and_can_be_printed(text):
    line = one_line(text)
    assert line.isprintable()
    line.encode()
    if text.isprintable():
        assert line == text


@given(ANY, ANY)
@settings(max_examples=60)
def test_a_run_stays_in_its_folder_whatever_its_configuration_says(name, label):
    changes = {"name": name, "data": {"name": "folder:/pets", "label": label}}
    try:
        config = Config.model_validate_json(json.dumps(tiny.raw(changes)), strict=True)
    except ValidationError:
        return
    folder = Request(config, "sp", 0, out=Path("out")).folder
    assert len(folder.resolve().relative_to(Path("out").resolve()).parts) == 3


# ---------------------------------------------------------------------- values

NUMBERS = st.one_of(
    st.floats(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([10**400, 1e308, -1e308, math.nan, math.inf, True, 2**31, 0, 5e-324]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, ANY, st.none(), st.booleans()),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(ANY, inside, max_size=3)
    ),
    max_leaves=8,
)
KEYS = [
    "name",
    "framework",
    "model",
    "data",
    "data.name",
    "data.label",
    "data.size",
    "data.train",
    "dense",
    "dense.epochs",
    "dense.learning_rate",
    "dense.gamma",
    "dense.milestones",
    "dense.mixup",
    "stages",
    "stages.prune",
    "stages.prune.learning_rate",
    "options",
    "options.speed_up",
    "options.steps",
    "options.reg",
    "options.normalizer",
    "options.ignored",
    "smooth.steps",
    "rectify.batches",
    "rectify.waves",
    "rectify.length",
    "curve.until",
    "compute.precision",
]


@given(st.sampled_from(KEYS), VALUES)
@settings(max_examples=300)
def test_a_drawn_value_is_refused_in_one_line_or_is_a_finite_configuration(key, value):
    content = tiny.raw({key: value})
    try:
        text = json.dumps(content)
    except ValueError:  # a number too long to be written
        return
    try:
        config = Config.model_validate_json(text, strict=True)
    except ValidationError:
        return
    assert list(faults(config.model_dump())) == []
    json.dumps(config.model_dump(), allow_nan=False)
    config.hash()


TEXTS = {
    "nested": "a = " + "[" * 5000 + "]" * 5000,
    "nested tables": "[" + ".".join(["a"] * 3000) + "]",
    "5000 digits": "a = 1" + "0" * 5000,
    "hexadecimal": "a = 0x" + "f" * 8000,
    "a key of two lines": '"a\\nb" = 1',
    "a long key": "a" * 5000 + " = 1",
    "a key that is not visible": '"\\u0000" = 1',
    "a long text": 'name = "' + "a" * 10**6 + '"',
    "two lines": 'name = "a\\nb"',
    "an escape": 'framework = "\\u001b[31m"',
    "infinity": "[options]\nspeed_up = inf",
    "not a number": "[options]\nreg = nan",
    "a list of infinities": "[options]\nignored = [[1.0, [-inf]]]",
    "an unknown home": '[data]\nname = "folder:~nobody-at-all/x"',
    "no folder": '[data]\nname = "folder:"',
    "a nought": '[data]\nname = "folder:/a\\u0000b"',
    "a label that leads out": '[data]\nname = "folder:/a"\nlabel = ""',
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_toml_can_say_is_refused_in_one_line(tmp_path, case):
    path = tmp_path / "c.toml"
    path.write_text(TEXTS[case], encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e10", "10000000000000000000000"])
@pytest.mark.parametrize("key", ["speed_up", "steps", "reg", "anything"])
def test_no_option_takes_what_is_not_finite_or_beyond_measure(tmp_path, key, value):
    path = tiny.write(tmp_path / "c.toml", {"options": {}})
    path.write_text(path.read_text().replace("[options]", f"[options]\n{key} = {value}"))
    with pytest.raises(ConfigError, match=f"options.{key}"):
        load(path)


def test_a_learning_rate_that_gamma_raises_beyond_measure_is_refused(tmp_path):
    wild = {"dense.gamma": 1e9, "dense.milestones": list(range(40))}
    with pytest.raises(ConfigError, match="gamma"):
        load(tiny.write(tmp_path / "c.toml", wild))


@pytest.mark.parametrize("name", ["plots", "dense", "table.json", "report.html", "overhead"])
def test_a_configuration_cannot_take_a_place_of_the_runs_folder(tmp_path, name):
    with pytest.raises(ConfigError, match=f"'{name}'"):
        load(tiny.write(tmp_path / "c.toml", {"name": name}))
