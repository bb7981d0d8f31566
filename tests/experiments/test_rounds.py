"""Several removals in one training: the optimizer goes on, and what a run records is right.

A miniature run has 4 steps of dense training, and rounds of 12 steps: decays take 5 steps, releases
fall in the fourth, and what decays in their place is zero after the ninth.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dpm_core import SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters.base import AdapterError, Training
from dpm_core.adapters.registry import load
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import read
from experiments.config import Stage
from experiments.running.rebuild import load_model
from experiments.running.run import run
from experiments.running.training import Loop, accuracy, laid_out
from experiments.showing import kept, norms, table
from tests.support import rounding, tiny
from tests.support.tiny import MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = {"features.0": 8, "features.3": 8, "features.7": 16}
"""The miniature network's convolutions."""


def changes(rounds: int) -> tiny.Changes:
    stage = {"epochs": 3 * rounds, "batch": 40, "learning_rate": 0.05, "milestones": [2]}
    return {
        **MINIATURE,
        "options.steps": 20,
        "options.speed_up": 3.0,
        "options.rounds": rounds,
        "options.round_epochs": 3,
        "rectify.max_share": 0.5,
        "stages": {"prune": stage},
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Runs in rounds, by variant and number; each is carried out when first asked for."""
    out = tmp_path_factory.mktemp("rounds")
    done: dict[tuple[str, int], Path] = {}

    def of(variant: str, rounds: int) -> Path:
        if (variant, rounds) not in done:
            with pytest.MonkeyPatch.context() as patch:
                tiny.miniature(patch)
                request = tiny.request(out / str(rounds), variant, changes(rounds))
                done[variant, rounds] = run(request)
        return done[variant, rounds]

    return of


def dense_numbers(plan: list) -> set[tuple[str, int]]:
    """The channels that successive removals have taken, by their numbers in the dense model."""
    left = {root: list(range(width)) for root, width in CHANNELS.items()}
    gone = set()
    for root, positions in plan:
        gone |= {(root, left[root][k]) for k in positions}
        left[root] = [n for k, n in enumerate(left[root]) if k not in positions]
    return gone


every_run = pytest.mark.parametrize(
    ("variant", "rounds"),
    [*((v, n) for v in ("base", "sp", "sr") for n in (2, 3)), ("random", 2)],
)


@every_run
@pytest.mark.usefixtures("miniature")
def test_a_run_in_rounds_meets_the_target_and_its_model_reloads(records, variant, rounds):
    path = records(variant, rounds)
    record = json.loads(path.read_text())
    macs, counted = record["macs"], record["structures"]
    assert macs["pruned"] <= macs["dense"] / 3
    assert macs["pruned"] > 0.7 * macs["dense"] / 3
    assert record["steps"]["total"] == 12 * rounds

    steps = record["steps"]
    last = 12 * (rounds - 1)
    assert steps["decision"] == 0
    assert steps["removal"] == steps["zero"] == last + {"base": 0, "sp": 5}.get(variant, 9)
    if variant == "base":
        assert record["output_difference"] is None
        assert counted["decayed"] == counted["released"] == counted["refilled"] == 0
    else:
        model, _ = load_model(path.parent / "model.safetensors")
        images = tiny.few_digits()
        limit = rounding.of_outputs(model, images.normalize(images.test[:64]))
        assert record["output_difference"] <= rounding.TIMES * limit
        assert counted["decayed"] + counted["refilled"] == counted["pruned"] + counted["released"]
        assert (counted["released"] > 0) == (variant != "sp")

    saved = read(path.parent / "model.safetensors")
    assert len(saved.removal) > len({root for root, _ in saved.removal}), "all went in one round"
    assert len(dense_numbers(saved.removal)) == counted["pruned"]
    model, _ = load_model(path.parent / "model.safetensors")
    laid_out(model)
    for name, width in CHANNELS.items():
        gone = len([root for root, _ in dense_numbers(saved.removal) if root == name])
        assert record["channels"][name] == [width, width - gone]
        assert model.get_submodule(name).out_channels == width - gone
    assert accuracy(model, tiny.few_digits()) == record["accuracy"]["final"]


@pytest.mark.parametrize(("variant", "rounds"), [("sp", 3), ("sr", 3)])
def test_events_and_norms_go_by_the_dense_models_numbers(records, variant, rounds):
    path = records(variant, rounds)
    saved = torch.load(path.parent / "trace.pt", weights_only=True)
    of = {kind: [e for e in saved["events"] if e["kind"] == kind] for kind in ("decay", "prune")}
    pruned = [(e["group"], k, e["step"]) for e in of["prune"] for k in e["structures"]]
    plan = read(path.parent / "model.safetensors").removal
    assert {(group, k) for group, k, _ in pruned} == dense_numbers(plan)
    assert len(pruned) == len(dense_numbers(plan))
    starts = {e["step"] for e in of["decay"] if not e["wave"]}
    assert starts == {12 * r for r in range(rounds)}

    times = [clock for clock, _ in saved["trace"]]
    assert times == sorted(set(times))
    norms = dict(saved["trace"])
    started = {}
    for e in of["decay"]:
        for k, norm in zip(e["structures"], e["norms"], strict=True):
            started.setdefault((e["group"], k), {})[e["step"]] = norm
    for group, k, end in pruned:
        assert norms[end][group][k] == 0
        initial = started[group, k][end - 5]
        assert norms[end - 2][group][k] == pytest.approx(initial * 2 / 5, rel=1e-4)


@pytest.mark.usefixtures("miniature")
def test_rounds_start_by_training_steps_and_hearings_are_among_them(tmp_path):
    hearing = {"criterion": "hearing", "threshold": -1.0, "batches": 2, "max_share": 0.5}
    settings = changes(2) | {"rectify": hearing}
    del settings["rectify.max_share"]
    path = run(tiny.request(tmp_path, "sr", settings))
    record = json.loads(path.read_text())
    assert (record["steps"]["total"], record["steps"]["heard"]) == (24, 4)
    events = torch.load(path.parent / "trace.pt", weights_only=True)["events"]
    # Two of the first 12 training steps were batches of a hearing, and no optimizer's step.
    assert {e["step"] for e in events if e["kind"] == "decay" and not e["wave"]} == {0, 10}
    assert record["structures"]["released"] > 0


@pytest.mark.parametrize("rounds", [2, 3])
def test_plots_and_tables_take_runs_in_rounds(tmp_path, records, rounds):
    paths = [records(v, rounds) for v in ("base", "sp", "sr")]
    runs = kept.located(paths)
    path = norms.keep_norms(runs, tmp_path / "miniature-norms.json")
    samples = [
        json.loads(line.rstrip(","))["sample"] for line in path.read_text().split("\n")[1:-2]
    ]
    for sample, (_, record) in zip(samples, runs[1:], strict=True):
        ended = sample["counts"]["decayed to zero"] + sample["counts"].get(
            "decayed in their place", 0
        )
        assert ended == record.structures.pruned
        for line in sample["lines"]["decayed to zero"]:
            assert line[-1][1] == 0
    assert "+SR" in table.markdown([record for _, record in runs])


# ---------------------------------------------------------------------- the optimizer goes on


def loop(framework: str, options: dict, kind: str, variant: str, epochs: int = 3) -> Loop:
    """A training loop of the miniature network, 4 steps an epoch."""
    images = tiny.few_digits()
    torch.manual_seed(0)
    model = tiny.models.VGG((8, 8, 0, 16), 1, 10)
    stage = Stage(epochs=epochs, batch=40, learning_rate=0.02, optimizer=kind)
    adapter = load(framework)
    rectify = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.3)
    pruning = adapter(
        model,
        images.normalize(images.test[:2]),
        adapter.Options(**options),
        None if variant == "base" else SmoothPruning(5),
        rectify if variant == "sr" else None,
        training=Training(4 * epochs, 4),
    )
    return Loop(model=model, images=images, seed=0, stages=[("prune", stage)], adapter=pruning)


def states(training: Loop) -> dict[str, dict[str, torch.Tensor]]:
    """A copy of the optimizer's state, by the parameters' names."""
    state = training.optimizer.state
    return {n: copy.deepcopy(state[p]) for n, p in training.model.named_parameters() if p in state}


def left(model: nn.Module, plan: list) -> dict[str, tuple[list[int], ...]]:
    """By a parameter's name, the rows and columns of it that a removal leaves, in a plain stack."""
    gone, positions, before = dict(plan), {}, [0]
    for name in CHANNELS:
        width = model.get_submodule(name).out_channels
        rows = [k for k in range(width) if k not in gone.get(name, [])]
        norm = f"features.{int(name.split('.')[1]) + 1}"
        positions[f"{name}.weight"] = (rows, before)
        for part in (f"{name}.bias", f"{norm}.weight", f"{norm}.bias"):
            positions[part] = (rows,)
        before = rows
    classes = list(range(10))
    return positions | {"classifier.weight": (classes, before), "classifier.bias": (classes,)}


WAYS = {
    "in one go": ("depgraph", {"speed_up": 2.0, "steps": 20}, "sp", 1),
    "released": ("depgraph", {"speed_up": 2.0, "steps": 20}, "sr", 1),
    "in rounds": ("depgraph", {"speed_up": 2.0, "steps": 20, "rounds": 2}, "base", 2),
    "by torch-prune": ("torch-prune", {"amount": 0.4}, "sp", 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_state_of_what_stays_is_what_it_was_before_the_removal(way, kind):
    framework, options, variant, removals = WAYS[way]
    training = loop(framework, options, kind, variant)
    adapter, seen, optimizers = training.adapter, [], set()
    remove = adapter.remove

    def removed() -> Removal:
        old, large = states(training), copy.deepcopy(training.model)
        removal = remove()
        rows, new = left(large, list(removal)), states(training)
        seen.append((old, rows))
        optimizers.update([id(training.optimizer), id(adapter.optimizer)])
        assert new.keys() == old.keys()
        for name, state in new.items():
            assert state.keys() == old[name].keys()
            for key, value in state.items():
                expected = old[name][key]
                if expected.dim():
                    for dim, index in enumerate(rows[name]):
                        expected = expected.index_select(dim, torch.tensor(index))
                assert torch.equal(value, expected), (name, key)
        return removal

    adapter.remove = removed
    training.run()
    assert len(seen) == removals
    assert len(optimizers) == 1
    old, rows = seen[-1]
    assert old, "there was no state to carry over"
    assert len(rows["features.7.weight"][0]) < 16


def test_training_that_ends_before_the_last_round_is_an_error():
    options = {"speed_up": 2.0, "steps": 20, "rounds": 3, "round_epochs": 2}
    training = loop("depgraph", options, "sgd", "sp")
    training.adapter.checked = True  # or attach() would refuse so short a stage
    with pytest.raises(AdapterError, match="ended before the removal was due"):
        training.run()
    assert training.adapter.removed
