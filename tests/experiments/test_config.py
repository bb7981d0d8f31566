"""Configurations: wrong ones are refused before any work, naming the key; hashes name the rest."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import experiments
from dpm_core import ConfigurationError, SelfRectifying
from dpm_core.adapters.registry import ADAPTERS
from experiments.__main__ import main, seeds
from experiments.config import CRITERIA, Config, ConfigError, Rectify, load
from tests.support import tiny
from tests.support.tiny import GONE

SHIPPED = sorted((Path(experiments.__file__).parent / "configs").glob("*.toml"))
STAGE = {"epochs": 1, "learning_rate": 0.1}
HEARING = {"rectify.rate": GONE, "rectify.length": GONE, "rectify.criterion": "hearing"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path):
    config = load(path)
    assert config.name == path.stem
    assert config.hash() == load(path).hash()


def gate_decorator(path: Path, target: str) -> Path:
    """Gate-Decorator's configuration for the digits, with another target."""
    (digits,) = (p for p in SHIPPED if p.stem == "gate-decorator-digits")
    lines = digits.read_text().splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith("macs ="))
    path.write_text("\n".join([*lines[:at], target, *lines[at + 1 :]]))
    return path


def test_gate_decorators_target_may_be_of_parameters(tmp_path):
    config = load(gate_decorator(tmp_path / "c.toml", "parameters = 0.25"))
    assert config.build_options().parameters == 0.25
    assert config.build_options().macs is None
    assert "macs" not in config.options  # a configuration says no more than its file
    for target, word in (("", "neither of macs and"), ("macs = 0.2\nparameters = 0.2", "both of")):
        with pytest.raises(ConfigError, match=word):
            load(gate_decorator(tmp_path / "c.toml", target))


def test_every_framework_has_a_configuration_for_the_bundled_digits():
    small = {load(p).framework: load(p) for p in SHIPPED if p.stem.endswith("-digits")}
    assert set(small) == set(ADAPTERS)
    assert {config.data.name for config in small.values()} == {"digits"}


UNKNOWN_KEYS = {
    "colour": 1,
    "data.nme": "digits",
    "dense.lr": 0.1,
    "stages.prune.epoch": 3,
    "options.speedup": 2.0,
    "smooth.step": 5,
    "rectify.rates": 0.1,
    "curve.each": 5,
}


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_by_name_at_every_level(tmp_path, key):
    with pytest.raises(ConfigError) as caught:
        load(tiny.write(tmp_path / "c.toml", {key: UNKNOWN_KEYS[key]}))
    assert key in str(caught.value)
    assert "unknown" in str(caught.value)


WRONG = {
    # a wrong type
    "a string for a rate": ({"dense.learning_rate": "0.1"}, "dense.learning_rate", "number"),
    "a string for a count": ({"dense.epochs": "1"}, "dense.epochs", "integer"),
    "a float for a count": ({"dense.epochs": 1.5}, "dense.epochs", "integer"),
    "a whole float for a count": ({"stages.prune.batch": 64.0}, "stages.prune.batch", "integer"),
    "a bool for a count": ({"dense.epochs": True}, "dense.epochs", "integer"),
    "a bool for waves": ({"rectify.waves": True}, "rectify.waves", "integer"),
    "a bool for a rate": ({"dense.gamma": True}, "dense.gamma", "number"),
    "a number for a name": ({"name": 3}, "name", "string"),
    "a number for a list": ({"dense.milestones": 3}, "dense.milestones", "array"),
    "a number for a table": ({"smooth": 5}, "smooth", "object"),
    "a number for a stage": ({"stages.prune": 5}, "stages.prune", "object"),
    "a string for a target": ({"options.speed_up": "two"}, "options.speed_up", "number"),
    "an integer for a switch": ({"options.global_pruning": 1}, "options.global_pruning", "boolean"),
    "a string for layers": ({"options.ignored": "head"}, "options.ignored", "array"),
    # out of range
    "no epochs": ({"dense.epochs": 0}, "dense", "epochs", "checkpoint"),
    "a negative batch": ({"dense.batch": -1}, "dense.batch", "greater than or equal to 1"),
    "no learning rate": ({"dense.learning_rate": 0.0}, "dense.learning_rate", "greater than 0"),
    "an infinite learning rate": (
        {"dense.learning_rate": math.inf},
        "dense.learning_rate",
        "finite",
    ),
    "a learning rate that is NaN": ({"dense.learning_rate": math.nan}, "dense.learning_rate", ""),
    "a gamma of 0": ({"dense.gamma": 0.0}, "dense.gamma", "greater than 0"),
    "a momentum of 1": ({"dense.momentum": 1.0}, "dense.momentum", "less than 1"),
    "a negative momentum": ({"dense.momentum": -0.1}, "dense.momentum", "greater than or equal"),
    "a negative mixup": ({"dense.mixup": -0.2}, "dense.mixup", "greater than or equal to 0"),
    "an infinite mixup": ({"stages.prune.mixup": math.inf}, "stages.prune.mixup", "finite"),
    "a negative decay": ({"dense.weight_decay": -1.0}, "dense.weight_decay", "greater than or eq"),
    "a negative milestone": ({"dense.milestones": [1, -1]}, "dense.milestones.1", "greater than"),
    "an unknown optimizer": ({"dense.optimizer": "rmsprop"}, "dense.optimizer", "'sgd', 'adam'"),
    "no image": ({"data.size": 0}, "data.size", "greater than or equal to 1"),
    "no decay": ({"smooth.steps": 0}, "smooth.steps is 0", "at least 1"),
    "no curve": ({"curve.every": 0}, "curve.every", "greater than or equal to 1"),
    "a curve into the past": ({"curve.until": -1}, "curve.until", "greater than or equal to 0"),
    "a name with a slash": ({"name": "../a"}, "name", "pattern"),
    "an empty name": ({"name": ""}, "name", "pattern"),
    "a share of nothing": ({"rectify.max_share": 0.0}, "max_share", "above 0, at most 1"),
    "a decision too early": ({"rectify.at": 0.5}, "at is 0.5", "[0.75, 1)"),
    "a decision at the end": ({"rectify.at": 1.0}, "at is 1.0", "[0.75, 1)"),
    "a cosine beyond 1": ({"rectify.rate": 2.0}, "rate is 2.0", "-1 to 1"),
    "an infinite length": ({"rectify.length": math.inf}, "rectify.length", "finite"),
    "no waves": ({"rectify.waves": 0}, "waves is 0", "at least 1"),
    "an unknown restoring": ({"rectify.restore": "all"}, "rectify.restore", "'keep' or 'effect'"),
    "no batches to hear": ({**HEARING, "rectify.batches": 0}, "batches is 0", "at least 1"),
    "a threshold beyond 1": ({**HEARING, "rectify.threshold": 2.0}, "threshold is 2.0", "-1 to 1"),
    # the target
    "two targets": ({"options.ratio": 0.5}, "speed_up", "ratio", "exactly one"),
    "no target": ({"options.speed_up": GONE}, "speed_up", "ratio", "exactly one"),
    "no options at all": ({"options": GONE}, "speed_up", "ratio", "exactly one"),
    "a speed-up of 1": ({"options.speed_up": 1.0}, "speed_up is 1.0", "above 1"),
    "a ratio of 1": (
        {"options.speed_up": GONE, "options.ratio": 1.0},
        "ratio is 1.0",
        "above 0, below 1",
    ),
    "an unknown normalizer": ({"options.normalizer": "x"}, "normalizer is 'x'", "mean, max"),
    "a sentinel of nothing": ({"options.normalizer": "sentinel_"}, "'sentinel_'", "share"),
    "no upstream steps": ({"options.steps": 0}, "steps", "at least 1"),
    # stages
    "a stage of no framework": ({"stages.finetune": STAGE}, "'finetune'", "sparse, prune"),
    "a missing stage": ({"stages": {"sparse": STAGE}}, "'prune'", "[stages.prune]"),
    "no stages": ({"stages": {}}, "'prune'", "[stages.prune]"),
    # missing and unknown
    "no name": ({"name": GONE}, "name", "required"),
    "no learning rate given": ({"dense.learning_rate": GONE}, "dense", "learning_rate", "required"),
    "an unknown model": ({"model": "vgg"}, "model 'vgg'", "vgg16-bn", "vgg-digits", "resnet56"),
    "an unknown framework": ({"framework": "dep"}, "framework", "'dep'", "depgraph"),
    "an unknown criterion": (
        {"rectify.criterion": "oracle"},
        "rectify.criterion",
        "'trajectory', 'hearing' or 'exchange'",
    ),
    # contradictions
    "a setting of hearing": ({"rectify.threshold": 0.1}, "threshold", "'trajectory'"),
    "a setting of trajectory": ({**HEARING, "rectify.rate": 0.1}, "rate", "'hearing'"),
    "too short a decay for SR": ({"smooth.steps": 3}, "steps", "at least 4", "not 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_naming_the_key_and_what_it_may_be(tmp_path, case):
    changes, *words = WRONG[case]
    path = tiny.write(tmp_path / "c.toml", changes)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    text = message.replace(str(path), "")
    assert [w for w in words if w not in text] == []


def test_the_files_of_these_tests_are_right_but_for_the_change(tmp_path):
    assert load(tiny.write(tmp_path / "c.toml")) == load(tiny.PATH)
    load(tiny.write(tmp_path / "h.toml", HEARING))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"dense: epochs.*; .*smooth\.steps"):
        load(tiny.write(tmp_path / "c.toml", {"dense.epochs": 0, "smooth.steps": -3}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name = \n", ["is not TOML", "line 1"]),
        (b"[dense\nepochs = 1", ["is not TOML"]),
        (b'name = "caf\xe9"\n', ["is not TOML"]),
        (b"name = 2024-01-01\n", ["name", "string"]),
        (b"", ["name", "required"]),
    ],
    ids=["no value", "open bracket", "not UTF-8", "a date", "empty"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, words):
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [w for w in [str(path), *words] if w not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["missing.toml", "."], ids=["missing", "a folder"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / name)


# ---------------------------------------------------------------------- --data


def test_data_overrides_the_name_and_leaves_the_rest():
    config = load(tiny.PATH, data="folder:/somewhere")
    assert config.data.name == "folder:/somewhere"
    assert config.model_copy(update={"data": load(tiny.PATH).data}) == load(tiny.PATH)


def test_data_keeps_the_size_of_the_configuration(tmp_path):
    config = load(tiny.write(tmp_path / "c.toml", {"data.size": 64}), data="cifar10")
    assert (config.data.name, config.data.size) == ("cifar10", 64)


def test_data_may_be_given_where_the_configuration_names_none(tmp_path):
    path = tiny.write(tmp_path / "c.toml", {"data": GONE})
    assert load(path).data.name == "digits"
    assert load(path, data="cifar100").data.name == "cifar100"


def test_data_that_is_no_table_is_refused_with_an_override_too(tmp_path):
    path = tiny.write(tmp_path / "c.toml", {"data": "digits"})
    for override in (None, "digits"):
        with pytest.raises(ConfigError, match=r"data: .*object"):
            load(path, data=override)


# ---------------------------------------------------------------------- the command line

REFUSED = {
    "an unknown key": {"dense.lr": 0.1},
    "a wrong type": {"dense.epochs": "1"},
    "two targets": {"options.ratio": 0.5},
    "a missing stage": {"stages": {}},
    "an unknown framework": {"framework": "dep"},
    "an unknown data set": {"data.name": "digit"},
    "an image folder that is not there": {"data.name": "folder:/nowhere"},
    "too short a stage": {"smooth.steps": 20},
    "an impossible target": {"options.speed_up": 1e6},
    "an unknown layer": {"options.ignored": ["features.99"]},
    "a batch beyond the data in pruning": {"stages.prune.batch": 5000},
    "a batch beyond the data in dense training": {"dense.batch": 5000},
    "a network too deep for the images": {"model": "vgg16-bn"},
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("one_thread")
def test_the_command_line_refuses_with_one_error_and_leaves_no_files(tmp_path, capsys, case):
    path, out = tiny.write(tmp_path / "c.toml", REFUSED[case]), tmp_path / "out"
    command = ["run", str(path), "--variant", "sr", "--seed", "0", "--out", str(out)]
    code = main([*command, "--data-root", str(tmp_path / "data"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(tmp_path, capsys, device):
    command = ["run", str(tiny.PATH), "--variant", "sp", "--seed", "0"]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", device]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_upstream_is_said_and_not_thrown(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ImportError("torch-pruning is not installed")

    monkeypatch.setattr("dpm_core.adapters.registry.load", missing)
    assert main(["run", str(tiny.PATH), "--variant", "sp", "--seed", "0"]) == 2
    assert "torch-pruning is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("variants", ["bas", "base,", "base,+SP"])
def test_an_unknown_variant_is_refused_naming_those_there_are(tmp_path, capsys, variants):
    code = main(["compare", str(tiny.PATH), "--variants", variants, "--out", str(tmp_path)])
    assert code == 2
    assert "base, sp, sr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", [0]), ("0-2", [0, 1, 2]), ("0,3,5", [0, 3, 5]), ("1-2,7", [1, 2, 7]), ("4-4", [4])],
)
def test_seeds_are_ranges_and_lists(text, expected):
    assert seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "0-", "-1", "0,,1", "1.5", "0-b", "2-0"])
def test_what_is_no_list_of_seeds_is_refused(capsys, text):
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tiny.PATH), f"--seeds={text}"])
    assert ended.value.code == 2
    assert "give 0-4 or 0,2,5" in capsys.readouterr().err


# ---------------------------------------------------------------------- names of the content

# Another value for every setting there is.
OTHERS = {
    "name": "other",
    "model": "resnet20",
    "draw_by_seed": True,
    "model_sha256": None,  # of a file that `model` names: see test_networks.py
    "data.name": "cifar10",
    "data.size": 64,
    **{
        f"{stage}.{key}": value
        for stage in ("dense", "stages.prune")
        for key, value in {
            "epochs": 3,
            "batch": 32,
            "optimizer": "adam",
            "learning_rate": 0.3,
            "milestones": [2],
            "gamma": 0.5,
            "momentum": 0.5,
            "weight_decay": 0.0,
            "mixup": 0.3,
        }.items()
    },
    "dense.seeds": 2,
    "dense.checkpoint": str(tiny.PATH),  # any file: it is only hashed
    "stages.sparse": STAGE,
    "options.speed_up": 3.0,
    "options.steps": 10,
    "options.reg": 0.1,
    "smooth.steps": 6,
    "smooth.shape": "cosine",
    "rectify.criterion": None,
    "rectify.rate": 0.5,
    "rectify.length": 0.5,
    "rectify.batches": None,
    "rectify.threshold": None,
    "rectify.gate": None,
    "rectify.at": 0.8,
    "rectify.max_share": 0.2,
    "rectify.restore": "keep",
    "rectify.waves": 2,
    "curve.every": 7,
    "curve.until": 70,
    "data.label": "others",
    "data.train": 900,
    "data.augmentation": "resized-crop",
    "data.validation": 100,
    "compute.precision": "bfloat16",
    "compute.compile": True,
    "latency.batches": [1, 32],
    "latency.onnxruntime": True,
}
HEARING_OTHERS = {"rectify.batches": 3, "rectify.threshold": 0.3, "rectify.gate": 0.01}
IN_DENSE_HASH = {k for k in OTHERS if k.startswith("dense.") and k != "dense.seeds"} | {
    "model",
    "data.size",
    "data.augmentation",
    "compute.precision",
    "compute.compile",
}


def leaves(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_other_values_are_listed_for_every_setting():
    # Another "framework" has other options; see below.
    assert set(leaves(tiny.config().model_dump(mode="json"))) - set(OTHERS) == {"framework"}


OTOV2 = {"framework": "otov2", "options": {"target_group_sparsity": 0.5}}


def test_frameworks_share_the_dense_model_and_nothing_else():
    one, other = tiny.config(), tiny.config(OTOV2)
    assert one.hash() != other.hash()
    assert one.dense_hash("digits") == other.dense_hash("digits")


def test_the_dense_training_may_be_left_out():
    scratch = tiny.config({"dense": GONE})
    assert scratch.dense is None
    assert scratch.hash() != tiny.config().hash()
    assert scratch.hash() != tiny.config({"dense": GONE, "model": "resnet20"}).hash()
    text = json.dumps(scratch.model_dump(mode="json"))
    assert Config.model_validate_json(text, strict=True).hash() == scratch.hash()


@pytest.mark.parametrize("key", [k for k, v in OTHERS.items() if v is not None])
def test_the_hash_changes_with_any_value(key):
    before, after = tiny.config(), tiny.config({key: OTHERS[key]})
    assert before.hash() != after.hash()
    label = "digits"
    assert (before.dense_hash(label) != after.dense_hash(label)) == (key in IN_DENSE_HASH)


@pytest.mark.parametrize("key", HEARING_OTHERS)
def test_the_hash_changes_with_any_value_of_a_hearing(key):
    hashes = {
        tiny.config().hash(),
        tiny.config(HEARING).hash(),
        tiny.config({**HEARING, key: HEARING_OTHERS[key]}).hash(),
    }
    assert len(hashes) == 3


def test_seeds_take_the_shared_dense_models_in_turn():
    shared, own = tiny.config({"dense.seeds": 3}), tiny.config()
    assert [shared.dense_seed(s) for s in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [own.dense_seed(s) for s in range(7)] == list(range(7))
    assert tiny.config({"dense": GONE}).dense_seed(5) == 5
    assert shared.dense_hash("digits") == own.dense_hash("digits")


def test_the_dense_model_depends_on_the_data():
    assert tiny.config().dense_hash("digits") != tiny.config().dense_hash("CIFAR-10")


def test_the_hash_does_not_depend_on_the_order_of_keys(tmp_path):
    def backwards(table):
        items = reversed(table.items())
        return {k: backwards(v) if isinstance(v, dict) else v for k, v in items}

    changes = {"stages.sparse": STAGE}
    text = tiny.toml(backwards(tiny.raw(changes)))
    (tmp_path / "c.toml").write_text(text)
    config = load(tmp_path / "c.toml")
    assert list(tomllib.loads(text)["stages"]) == ["sparse", "prune"]
    assert list(tiny.raw(changes)["stages"]) == ["prune", "sparse"]
    assert config.hash() == tiny.config(changes).hash()
    assert config.dense_hash("digits") == tiny.config(changes).dense_hash("digits")


def test_a_configuration_survives_its_own_json():
    config = tiny.config({"stages.sparse": STAGE})
    text = json.dumps(config.model_dump(mode="json"))
    assert Config.model_validate_json(text, strict=True).hash() == config.hash()


def test_settings_reach_the_core():
    rectify = tiny.config({"rectify.at": 0.8, "rectify.waves": 2, "rectify.restore": "keep"})
    built = rectify.rectify.build()
    assert (built.criterion.rate, built.criterion.length) == (-1.0, -1000.0)
    assert (built.at, built.max_share, built.restore, built.waves) == (0.8, 0.3, "keep", 2)
    heard = tiny.config({**HEARING, **HEARING_OTHERS}).rectify.build().criterion
    assert (heard.batches, heard.threshold, heard.gate) == (3, 0.3, 0.01)
    drawn = tiny.config().rectify.build("random", seed=3).criterion
    assert (drawn.seed, drawn.like.rate) == (3, -1.0)
    least = tiny.config().rectify.build("least-resistant").criterion
    assert (type(least).__name__, least.like.length) == ("LeastResistant", -1000.0)
    assert tiny.config().smooth.steps == 5
    assert tiny.config().build_options().speed_up == 2.0


def test_other_data_on_the_command_line_drop_the_label_and_keep_the_rest(tmp_path):
    changes = {"data.name": "folder:some", "data.label": "Some", "data.train": 100}
    path = tiny.write(tmp_path / "labelled.toml", changes)
    assert load(path, data="folder:some").data == load(path).data
    other = load(path, data="digits", validation=50).data
    assert (other.name, other.label, other.train, other.validation) == ("digits", None, 100, 50)


@given(
    st.sampled_from([*CRITERIA]),
    st.dictionaries(
        st.sampled_from(["rate", "length", "batches", "threshold", "gate", "at", "max_share"]),
        st.one_of(st.integers(-3, 9), st.floats(-2, 3)),
        max_size=3,
    ),
    st.none() | st.integers(-2, 6),
)
def test_a_table_is_refused_where_the_core_refuses_it_and_is_the_same_settings_elsewhere(
    criterion, settings, waves
):
    kind = CRITERIA[criterion]
    whole = settings if waves is None else {**settings, "waves": waves}
    own = {f.name for f in fields(kind) if f.init}
    shared = {f.name for f in fields(SelfRectifying)} - own
    try:
        expected = SelfRectifying(
            kind(**{k: v for k, v in whole.items() if k in own or k not in shared}),
            **{k: v for k, v in whole.items() if k in shared},
        )
    except (ConfigurationError, TypeError):
        expected = None
    try:
        found = Rectify({"criterion": criterion, **whole}).build()
    except ValidationError as refused:
        assert any(f"rectify.{key}" in str(refused) for key in whole)  # noqa: PT017
        found = None
    assert found == expected
