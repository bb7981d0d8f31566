"""Promise 7: stopped anywhere and resumed, a run ends in the same bits; damage is refused."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from dpm_core import (
    DecayPruning,
    Event,
    Hearing,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    SmoothPruning,
    StateError,
    Trajectory,
)
from tests.support.snapshot import difference, refused, snapshot
from tests.support.toys import OPTIMIZERS, Toy, make

STEPS, LENGTH = 18, 6

EASY = Trajectory(rate=-0.9, length=-3)
POLICIES: dict[str, SelfRectifying | None] = {
    "sp": None,
    "trajectory": SelfRectifying(EASY, max_share=0.5, waves=2),
    "keep": SelfRectifying(EASY, max_share=0.5, restore="keep"),
    "hearing": SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.5),
    "random": SelfRectifying(RandomRelease(EASY, seed=3), max_share=0.5),
    "least": SelfRectifying(LeastResistant(EASY), max_share=0.5),
}
DECISIONS = {
    1: {"conv1": [0, 2, 3, 5], "conv2": [1, 2]},
    3: {"conv2": [0]},
    9: {"conv2": [4]},
}


class Run:
    """A training with decisions and refills, which can be stopped between any two steps."""

    def __init__(self, policy: str, optimizer_name: str, backwards: bool = False) -> None:
        self.toy = make("conv")
        groups = self.toy.groups[::-1] if backwards else self.toy.groups
        self.optimizer = OPTIMIZERS[optimizer_name](self.toy.model.parameters())
        self.dpm = DecayPruning(groups, SmoothPruning(LENGTH), POLICIES[policy])
        self.dpm.attach(self.optimizer, model=self.toy.model, loss=self.heard)
        self.batch = 0

    def heard(self) -> Tensor:
        """The closure of a hearing: batches in an order of their own, which resumes too."""
        self.batch += 1
        return self.toy.loss(1000 + self.batch)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            if step in DECISIONS:
                self.dpm.decay(DECISIONS[step])
            seen = len(self.dpm.events)
            self.toy.train_step(self.optimizer, step)
            for event in list(self.dpm.events[seen:]):
                if event.kind == "release":
                    free = self.dpm.available(event.group).nonzero().flatten()
                    refill = free[: len(event.structures)]
                    self.dpm.decay({event.group: refill}, wave=event.wave + 1)

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.toy.model, self.optimizer, self.dpm)
        torch.save([p.state_dict() for p in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.toy.model, self.optimizer, self.dpm), states, strict=True):
            part.load_state_dict(state)
        self.batch = self.dpm.heard

    def end(self) -> dict[str, Any]:
        found = snapshot(self.toy.model, self.optimizer)
        # A checkpoint holds no gradients, and the loop's random state is the loop's affair.
        del found["random"], found["gradients"]
        # By name: which of two groups is first is not part of a run.
        ledger = self.dpm.state_dict()["groups"]
        found["ledger"] = {name: ledger[name] for name in sorted(ledger)}
        found["events"] = sorted(
            self.dpm.events, key=lambda e: (e.step, e.group, e.kind, e.wave, e.structures)
        )
        found["counts"] = (self.dpm.clock, self.dpm.heard)
        return found


@functools.cache
def uninterrupted(policy: str, optimizer_name: str) -> dict[str, Any]:
    run = Run(policy, optimizer_name)
    run.train(0, STEPS)
    kinds = {e.kind for e in run.dpm.events}
    assert kinds == ({"decay", "prune"} if policy == "sp" else {"decay", "release", "prune"})
    return run.end()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=5)
@given(
    stop=st.integers(0, STEPS),
    optimizer_name=st.sampled_from(["sgd", "adamw"]),
    backwards=st.booleans(),
)
def test_a_resumed_run_ends_in_the_same_bits(
    policy: str, stop: int, optimizer_name: str, backwards: bool
) -> None:
    first = Run(policy, optimizer_name)
    first.train(0, stop)
    second = Run(policy, optimizer_name, backwards)
    second.load(first.save())
    second.train(stop, STEPS)
    assert difference(uninterrupted(policy, optimizer_name), second.end()) is None


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_a_run_resumes_from_every_step(stop: int) -> None:
    first = Run("trajectory", "adamw")
    first.train(0, stop)
    second = Run("trajectory", "adamw")
    second.load(first.save())
    second.train(stop, STEPS)
    assert difference(uninterrupted("trajectory", "adamw"), second.end()) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_of_groups_is_no_part_of_a_run(policy: str) -> None:
    run = Run(policy, "sgd", backwards=True)
    run.train(0, STEPS)
    assert difference(uninterrupted(policy, "sgd"), run.end()) is None


def test_a_run_can_be_taken_back_to_an_earlier_step() -> None:
    """Loading over a core that is in the middle of something else."""
    run = Run("trajectory", "sgd")
    run.train(0, 4)
    saved = run.save()
    run.train(4, 11)
    run.load(saved)
    run.train(4, STEPS)
    assert difference(uninterrupted("trajectory", "sgd"), run.end()) is None


def test_a_state_survives_a_round_trip_unchanged() -> None:
    first = Run("hearing", "sgd")
    first.train(0, 12)
    state = first.dpm.state_dict()
    second = Run("hearing", "sgd")
    second.dpm.load_state_dict(state)
    assert difference(state, second.dpm.state_dict()) is None
    assert second.dpm.events == first.dpm.events
    assert all(type(e) is Event for e in second.dpm.events)


def test_a_loaded_state_is_a_copy() -> None:
    first = Run("trajectory", "sgd")
    first.train(0, 4)
    state = first.dpm.state_dict()
    kept = copy.deepcopy(state)
    second = Run("trajectory", "sgd")
    second.dpm.load_state_dict(state)
    second.train(4, 9)
    assert difference(kept, state) is None


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def middle() -> dict[str, Any]:
    """The state of a run with structures in every phase, one of them released."""
    run = Run("trajectory", "sgd")
    run.train(0, 9)
    state = run.dpm.state_dict()
    conv1, conv2 = (state["groups"][g] for g in ("conv1", "conv2"))
    assert set(conv1["phase"].tolist()) == {0, 1, 2}
    assert bool(conv1["immune"].any())
    assert set(conv2["phase"].tolist()) >= {0, 2}
    return state


def first_of(part: dict[str, Tensor], phase: int) -> int:
    return int((part["phase"] == phase).nonzero()[0])


def put(field: str, value: float, phase: int) -> Callable[[dict[str, Any]], None]:
    """Overwrite a field of the first structure in a phase."""

    def damage(state: dict[str, Any]) -> None:
        part = state["groups"]["conv1"]
        part[field][first_of(part, phase)] = value

    return damage


def entry(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


def cast(field: str, change: Callable[[Tensor], object]) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        part = state["groups"]["conv2"]
        part[field] = change(part[field])

    return damage


def event(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["events"][0].update({key: value})


def lose(*path: Any) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return damage


NAN, INF = float("nan"), float("inf")

DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "another version": (entry("version", 2), ("version 2", "release that wrote it")),
    "no version": (lose("version"), ("version None", "release that wrote it")),
    "an entry missing": (lose("clock"), ("entries", "damaged")),
    "groups missing": (lose("groups"), ("entries", "damaged")),
    "an entry too many": (entry("more", 1), ("more", "damaged")),
    "other length": (entry("smooth", "SmoothPruning(steps=7)"), ("smooth", "steps=7", "settings")),
    "other policy": (entry("rectify", "None"), ("rectify", "None", "same settings")),
    "negative clock": (entry("clock", -1), ("clock", "-1", "count")),
    "fractional clock": (entry("clock", 1.0), ("clock", "1.0", "count")),
    "clock is true": (entry("clock", True), ("clock", "True", "count")),
    "clock is a tensor": (entry("clock", torch.tensor(3)), ("clock", "count")),
    "negative heard": (entry("heard", -1), ("heard", "-1", "count")),
    "groups no mapping": (entry("groups", [1]), ("other groups", "same model")),
    "a group missing": (lose("groups", "conv2"), ("'conv2'", "same model")),
    "another group": (
        lambda s: s["groups"].update(conv3=s["groups"].pop("conv2")),
        ("'conv3'", "'conv2'", "same model"),
    ),
    "a field missing": (lose("groups", "conv2", "wave"), ("'conv2'", "lacks entries")),
    "a field too many": (
        lambda s: s["groups"]["conv2"].update(more=torch.zeros(5)),
        ("'conv2'", "entries"),
    ),
    "a group is no mapping": (
        lambda s: s["groups"].update(conv2=torch.zeros(5)),
        ("'conv2'", "entries"),
    ),
    "another width": (cast("phase", lambda t: t[:-1]), ("'conv2'", "phase", "5 structures")),
    "another shape": (cast("step", lambda t: t[:, None]), ("'conv2'", "step", "another width")),
    "single precision": (cast("initial", lambda t: t.float()), ("'conv2'", "initial", "float64")),
    "wrong integers": (cast("phase", lambda t: t.int()), ("'conv2'", "phase", "int64")),
    "immune as numbers": (cast("immune", lambda t: t.long()), ("'conv2'", "immune", "bool")),
    "a list for a tensor": (cast("wave", lambda t: t.tolist()), ("'conv2'", "wave", "tensor")),
    "no such phase": (put("phase", 3, 0), ("'conv1'", "contradict")),
    "negative phase": (put("phase", -1, 0), ("'conv1'", "contradict")),
    "a step past the end": (put("step", LENGTH, 1), ("'conv1'", "contradict")),
    "a negative step": (put("step", -1, 1), ("'conv1'", "contradict")),
    "an active one with steps": (put("step", 2, 0), ("'conv1'", "contradict")),
    "a pruned one with steps": (put("step", 2, 2), ("'conv1'", "contradict")),
    "a decay from zero": (put("initial", 0.0, 1), ("'conv1'", "contradict")),
    "a decay from below zero": (put("initial", -1.0, 1), ("'conv1'", "contradict")),
    "a negative wave": (put("wave", -1, 1), ("'conv1'", "contradict")),
    "a decaying immune one": (put("immune", True, 1), ("'conv1'", "contradict")),
    "a pruned immune one": (put("immune", True, 2), ("'conv1'", "contradict")),
    "initial is nan": (put("initial", NAN, 1), ("'conv1'", "contradict")),
    "effect is infinite": (put("effect", INF, 1), ("'conv1'", "contradict")),
    "resistance is nan": (put("resistance", NAN, 1), ("'conv1'", "contradict")),
    "gradient is infinite": (put("gradient", INF, 1), ("'conv1'", "contradict")),
    "a negative norm of an active one": (put("initial", -1.0, 0), ("'conv1'", "contradict")),
    "a negative norm of a pruned one": (put("initial", -1.0, 2), ("'conv1'", "contradict")),
    "a negative effect": (put("effect", -1.0, 1), ("'conv1'", "contradict")),
    "a negative gradient": (put("gradient", -1.0, 1), ("'conv1'", "contradict")),
    "an event's norm is nan": (event("norms", (NAN, 1.0, 1.0, 1.0)), ("events", "damaged")),
    "an event's norm is infinite": (event("norms", (INF, 1.0, 1.0, 1.0)), ("events", "damaged")),
    "an event's norm is negative": (event("norms", (-1.0, 1.0, 1.0, 1.0)), ("events", "damaged")),
    "an event's step is a truth value": (event("step", False), ("events", "damaged")),
    "events missing": (entry("events", None), ("events", "damaged")),
    "an event is no mapping": (entry("events", [3]), ("events", "damaged")),
    "an event lacks a field": (lose("events", 0, "wave"), ("events", "damaged")),
    "an event lacks its structures": (lose("events", 0, "structures"), ("events", "damaged")),
    "an event has a field too many": (event("more", 1), ("events", "damaged")),
    "an event's structures are no list": (event("structures", 4), ("events", "damaged")),
    "an event of another kind": (event("kind", "explosion"), ("events", "damaged")),
    "an event of no group": (event("group", "conv9"), ("events", "damaged")),
    "an event of no structure": (event("structures", (99,) * 4), ("events", "damaged")),
    "an event with a norm too few": (event("norms", (1.0,)), ("events", "damaged")),
    "an event in the future": (event("step", 99), ("events", "damaged")),
    "an event of a negative wave": (event("wave", -1), ("events", "damaged")),
    "an event's norms are words": (event("norms", ("a", "b", "c", "d")), ("events", "damaged")),
    "an event's step is a fraction": (event("step", 0.5), ("events", "damaged")),
    "an event's structures are fractions": (
        event("structures", (0.5, 1.5, 2.5, 3.5)),
        ("events", "damaged"),
    ),
    "an event's step is a word": (event("step", "soon"), ("events", "damaged")),
}


def damaged(state: dict[str, Any], kind: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    damage, words = DAMAGES[kind]
    broken = copy.deepcopy(state)
    damage(broken)
    return broken, words


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_is_assigned(
    kind: str, middle: dict[str, Any]
) -> None:
    run = Run("trajectory", "sgd")
    run.train(0, 3)
    state, words = damaged(middle, kind)
    with refused(StateError, *words, model=run.toy.model, optimizer=run.optimizer, dpm=run.dpm):
        run.dpm.load_state_dict(state)


def test_a_run_goes_on_after_a_damaged_state_was_refused(middle: dict[str, Any]) -> None:
    run = Run("trajectory", "sgd")
    run.train(0, 3)
    for kind in ("a pruned immune one", "an event lacks a field"):
        with pytest.raises(StateError):
            run.dpm.load_state_dict(damaged(middle, kind)[0])
    run.train(3, STEPS)
    assert difference(uninterrupted("trajectory", "sgd"), run.end()) is None


@pytest.mark.parametrize("wrong", [None, [], "state", 3])
def test_what_is_no_mapping_is_refused(wrong: object) -> None:
    run = Run("trajectory", "sgd")
    model, optimizer, dpm = run.toy.model, run.optimizer, run.dpm
    words = ("mapping", type(wrong).__name__)
    with refused(StateError, *words, model=model, optimizer=optimizer, dpm=dpm):
        dpm.load_state_dict(wrong)  # type: ignore[arg-type]


def other_length(toy: Toy) -> DecayPruning:
    return DecayPruning(toy.groups, SmoothPruning(7), POLICIES["trajectory"])


def other_policy(toy: Toy) -> DecayPruning:
    return DecayPruning(toy.groups, SmoothPruning(LENGTH), POLICIES["keep"])


def no_policy(toy: Toy) -> DecayPruning:
    return DecayPruning(toy.groups, SmoothPruning(LENGTH))


def fewer_groups(toy: Toy) -> DecayPruning:
    return DecayPruning(toy.groups[:1], SmoothPruning(LENGTH), POLICIES["trajectory"])


@pytest.mark.parametrize("build", [other_length, other_policy, no_policy, fewer_groups])
def test_a_state_of_other_settings_or_groups_is_refused(
    build: Callable[[Toy], DecayPruning], middle: dict[str, Any]
) -> None:
    toy = make("conv")
    dpm = build(toy)
    optimizer: Optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm.attach(optimizer)
    with refused(StateError, "same", model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.load_state_dict(middle)
