"""The tiny configuration, changed at will, and a miniature of it that runs in half a second."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_core.adapters.saved import read
from experiments.config import Config
from experiments.inputs import models
from experiments.inputs.data import load as load_data  # kept: miniature() puts another in its place
from experiments.inputs.images import Images
from experiments.record import MODEL
from experiments.running import run as run_module
from experiments.running import speed
from experiments.running.request import Request
from experiments.running.run import run
from experiments.running.training import Stopped
from tests.support.snapshot import difference

PATH = Path(__file__).with_name("tiny.toml")
ROOT = PATH.parents[2]
"""The checkout, in which the command line is run."""
GONE = object()
"""As a change's value: the key is left out."""

Changes = Mapping[str, Any]

MINIATURE: Changes = {
    "name": "miniature",
    "model": "miniature",
    "dense.batch": 40,
    "options.steps": 8,
    "stages": {
        "sparse": {
            "epochs": 2,
            "batch": 40,
            "optimizer": "adamw",
            "learning_rate": 0.01,
            "milestones": [1],
        },
        "prune": {"epochs": 4, "batch": 40, "learning_rate": 0.05, "milestones": [2]},
    },
}
"""4 steps of dense training, 8 of sparse learning and 16 of pruning; see :func:`miniature`."""


def raw(changes: Changes | None = None) -> dict[str, Any]:
    """The tiny configuration as plain values, with changes by dotted keys."""
    content = tomllib.loads(PATH.read_text(encoding="utf-8"))
    for dotted, value in (changes or {}).items():
        *tables, key = dotted.split(".")
        table = content
        for name in tables:
            table = table.setdefault(name, {})
        if value is GONE:
            table.pop(key, None)
        else:
            table[key] = copy.deepcopy(value)
    return content


def config(changes: Changes | None = None) -> Config:
    """The tiny configuration, checked, with changes by dotted keys."""
    return Config.model_validate_json(json.dumps(raw(changes)), strict=True)


def write(path: Path, changes: Changes | None = None) -> Path:
    """The tiny configuration as a TOML file, with changes by dotted keys."""
    path.write_text(toml(raw(changes)), encoding="utf-8")
    return path


def toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Nested tables of plain values as TOML."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += [f"[{prefix}{key}]", toml(value, f"{prefix}{key}.")]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    # JSON's strings, numbers and lists are TOML's too, but for infinity and NaN.
    return repr(value) if isinstance(value, float) else json.dumps(value)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread, and afterwards PyTorch's settings as they were: runs change them."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def few_digits(train: int = 160, test: int = 100) -> Images:
    """The first of the digits."""
    whole = load_data("digits", Path("unused"))
    return replace(
        whole,
        train=whole.train[:train],
        train_labels=whole.train_labels[:train],
        test=whole.test[:test],
        test_labels=whole.test_labels[:test],
    )


def miniature(patch: pytest.MonkeyPatch) -> None:
    """Let runs know the model ``miniature``, and all data be a few digits."""
    images = few_digits()
    patch.setitem(
        models.MODELS,
        "miniature",
        lambda channels, classes: models.VGG((8, 8, 0, 16), channels, classes),
    )
    patch.setattr(run_module.data, "load", lambda name, root, **settings: images)
    patch.setattr(speed, "ROUNDS", 1)


def request(out: Path, variant: str, changes: Changes | None = None, **settings: Any) -> Request:
    """A run of the tiny configuration, with changes by dotted keys."""
    seed = settings.pop("seed", 0)
    return Request(config(changes), variant, seed, out=out, data_root=out / "data", **settings)


@contextmanager
def asked_when(when: Callable[[int], bool]) -> Iterator[None]:
    """Ask runs inside to stop after each step for whose number, from 1, ``when`` is true.

    Steps of the dense training count, and start at 1 in every run.
    """

    @contextmanager
    def asked() -> Iterator[Callable[[], bool]]:
        steps = 0

        def stop() -> bool:
            nonlocal steps
            steps += 1
            return when(steps)

        yield stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "asked_to_stop", asked)
        yield


def run_with_stops(wanted: Request, stops: Collection[int]) -> Path:
    """Carry a run out, stopping it after some of its steps and resuming it each time."""
    done, wanted = 0, replace(wanted, resume=True)
    for stop in sorted(stops):
        last = stop - done
        with asked_when(lambda step, last=last: step == last), pytest.raises(Stopped):
            run(wanted)
        assert (wanted.folder / "checkpoint.pt").exists()
        assert not (wanted.folder / "record.json").exists()
        done = stop
    record = run(wanted)
    assert not (wanted.folder / "checkpoint.pt").exists()
    return record


def results(record: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for what depends on when and how fast it ran."""
    figures = json.loads(record.read_text(encoding="utf-8"))
    for key in ("seconds", "loading", "latency", "speeds", "revision", "sha256"):
        del figures[key]
    return {
        "record": figures,
        "model": read(record.parent / MODEL).tensors,
        "trace": torch.load(record.parent / "trace.pt", weights_only=True),
    }


def assert_same_bits(left: Path, right: Path) -> None:
    """Two runs ended in the same model, figures, curve and trace, bit for bit."""
    unlike = difference(results(left), results(right))
    assert unlike is None, f"the runs differ in{unlike}"
