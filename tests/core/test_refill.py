"""Refills and the two callables around a step: what is called when, and what it may return."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from dpm_core import (
    AttachmentError,
    ConfigurationError,
    DecayPruning,
    Exchange,
    Phase,
    SelfRectifying,
    SmoothPruning,
    Trajectory,
)
from dpm_core.attachment import Attachment
from tests.support.snapshot import difference, says
from tests.support.toys import Toy, make

LENGTH = 4
RELEASING = SelfRectifying(Trajectory(rate=-1, length=-1e9), max_share=0.7, waves=2)


def lowest(_group: str, count: int, free: Tensor) -> Tensor:
    return free.nonzero().flatten()[:count]


def start(rectify: SelfRectifying | None = RELEASING) -> tuple[Toy, Optimizer, DecayPruning]:
    toy = make("conv", torch.float64, seed=1)
    optimizer = SGD(toy.model.parameters(), lr=0.05, momentum=0.9)
    return toy, optimizer, DecayPruning(toy.groups, SmoothPruning(LENGTH), rectify)


# ---------------------------------------------------------------------- refills


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_refill_does_what_the_loop_would_do_by_hand_after_the_step(data: st.DataObject) -> None:
    """Drawn decisions at drawn steps; what is chosen is drawn, too, and may be too few."""
    plans = [
        {
            g.name: data.draw(st.sets(st.integers(0, g.size - 1), max_size=2))
            for g in start()[0].groups
        }
        for _ in range(3)
    ]
    draw = data.draw(st.randoms(use_true_random=False))
    answers: list[tuple[str, int, list[bool], list[int]]] = []

    def choose(group: str, count: int, free: Tensor) -> list[int]:
        everyone = free.nonzero().flatten().tolist()
        chosen = draw.sample(everyone, min(draw.randint(0, count), len(everyone)))
        answers.append((group, count, free.tolist(), chosen))
        return chosen

    toy, optimizer, dpm = start()
    dpm.attach(optimizer, refill=choose)
    other, plain_optimizer, by_hand = start()
    by_hand.attach(plain_optimizer)
    for step in range(14):
        for t, core in ((toy, dpm), (other, by_hand)):
            if step < len(plans):
                core.decay(
                    {
                        name: [k for k in sorted(numbers) if core.available(name)[k]]
                        for name, numbers in plans[step].items()
                    }
                )
            t.backward(optimizer if core is dpm else plain_optimizer, step)
        answers.clear()
        optimizer.step()
        seen = len(by_hand.events)
        plain_optimizer.step()
        released = [e for e in by_hand.events[seen:] if e.kind == "release"]
        assert [(a[0], a[1]) for a in answers] == [(e.group, len(e.structures)) for e in released]
        for event, (group, _, free, chosen) in zip(released, answers, strict=True):
            assert by_hand.available(group).tolist() == free
            by_hand.decay({group: chosen}, wave=event.wave + 1)
        assert difference(by_hand.state_dict(), dpm.state_dict()) is None
    for mine, theirs in zip(toy.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_exchange_refills_with_the_cheapest_and_asks_nobody() -> None:
    toy = make("shared", torch.float64, seed=5)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    batches = iter(range(100, 200))
    rectify = SelfRectifying(Exchange(batches=2), max_share=0.9)
    dpm = DecayPruning(toy.groups, SmoothPruning(10), rectify)

    def nobody(*_: Any) -> list[int]:
        raise AssertionError("an exchange picks itself")

    dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(next(batches)), refill=nobody)
    dpm.decay({"singles": [0, 1]})
    toy.train_step(optimizer, 0)
    (release,) = [e for e in dpm.events if e.kind == "release"]
    worth = dpm.worth("singles")
    assert worth is not None
    cheapest = min((2, 3), key=lambda k: float(worth[k]))
    last = dpm.events[-1]
    assert (last.step, last.kind, last.group, last.wave) == (1, "decay", "singles", 1)
    assert (last.structures, len(release.structures)) == ((cheapest,), 1)


def test_without_a_refill_nothing_is_replaced() -> None:
    toy, optimizer, dpm = start()
    dpm.attach(optimizer).decay({"conv1": [0, 1]})
    for step in range(6):
        toy.train_step(optimizer, step)
    assert [e.kind for e in dpm.events] == ["decay", "release", "prune"]


WRONG = [
    (lambda free: [k for k, ok in enumerate(free.tolist()) if ok][:2], ("2 structures", "1 were")),
    (lambda free: free.logical_not().nonzero().flatten()[:1], ("not free",)),
    (lambda _: [17], ("not free", "[17]")),
    (lambda _: [-1], ("not free", "[-1]")),
    (lambda _: None, ("NoneType", "list of their numbers")),
    (lambda free: free, ("bool", "list of their numbers")),
    (lambda _: [0.5], ("float", "list of their numbers")),
    (lambda _: 3, ("list of their numbers",)),
]


@pytest.mark.parametrize(("answer", "words"), WRONG, ids=range(len(WRONG)))
def test_what_a_refill_must_not_choose_is_refused(answer: Any, words: tuple[str, ...]) -> None:
    toy, optimizer, dpm = start()
    dpm.attach(optimizer, refill=lambda _group, _count, free: answer(free))
    dpm.decay({"conv1": [0, 1]})
    with says(ConfigurationError, "refill", "'conv1'", *words):
        for step in range(6):
            toy.train_step(optimizer, step)
    # The step itself is over: it is counted, and nothing decays that was not decaying.
    assert [e.kind for e in dpm.events] == ["decay", "release"]
    assert dpm.clock == dpm.events[-1].step
    for step in range(6, 9):
        toy.train_step(optimizer, step)
    assert dpm.count(Phase.PRUNED) == 1


def test_a_structure_twice_is_refused() -> None:
    toy, optimizer, dpm = start(SelfRectifying(RELEASING.criterion, max_share=1.0))
    dpm.attach(optimizer, refill=lambda _group, _count, free: [int(free.nonzero()[0])] * 2)
    dpm.decay({"conv1": [0, 1]})
    with says(ConfigurationError, "a structure twice", "'conv1'"):
        for step in range(6):
            toy.train_step(optimizer, step)


# ---------------------------------------------------------------------- before and after


def test_before_and_after_are_called_once_for_every_counted_step() -> None:
    toy, optimizer, dpm = start()
    calls: list[tuple[str, int, int]] = []

    def note(what: str) -> None:
        calls.append((what, dpm.clock, dpm.count(Phase.DECAYING)))

    dpm.attach(optimizer, refill=lowest, before=lambda: note("before"), after=lambda: note("after"))
    dpm.decay({"conv1": [0, 1]})
    for step in range(4):
        toy.train_step(optimizer, step)
    # The one released in step 3 is replaced before `after` is called.
    expected = [(w, n + (w == "after"), 2) for n in range(3) for w in ("before", "after")]
    assert calls == [*expected, ("before", 3, 2), ("after", 4, 1)]


def test_what_before_does_to_gradients_is_what_the_core_reads() -> None:
    found = []
    for by_hook in (True, False):
        toy, optimizer, dpm = start(SelfRectifying(Trajectory()))

        def penalty(t: Toy = toy) -> None:
            for p in t.model.parameters():
                assert p.grad is not None
                p.grad.add_(p.detach(), alpha=0.3)

        dpm.attach(optimizer, before=penalty if by_hook else None)
        dpm.decay(toy.doomed)
        for step in range(6):
            toy.backward(optimizer, step)
            if not by_hook:
                penalty()
            optimizer.step()
        found.append([*toy.model.parameters(), dpm.state_dict()])
    assert difference(found[0], found[1]) is None


def test_before_that_raises_leaves_all_as_it_was() -> None:
    toy, optimizer, dpm = start()
    failing = [True]

    def before() -> None:
        if failing:
            raise OSError("not now")

    dpm.attach(optimizer, before=before).decay({"conv1": [0]})
    toy.backward(optimizer, 0)
    kept = copy.deepcopy([*toy.model.parameters(), dpm.state_dict()])
    with pytest.raises(OSError, match="not now"):
        optimizer.step()
    assert difference(kept, [*toy.model.parameters(), dpm.state_dict()]) is None
    failing.clear()
    optimizer.step()
    assert dpm.clock == 1


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_has_no_after(fused: bool, core: bool) -> None:
    toy = make("conv", seed=1)
    optimizer = SGD(toy.model.parameters(), lr=0.05, fused=fused)
    calls: list[str] = []
    before, after = (lambda w=w: calls.append(w) for w in ("before", "after"))
    if core:
        DecayPruning(toy.groups).attach(optimizer, before=before, after=after)
    else:
        Attachment(optimizer, [], before, after)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(toy.loss(step)).backward()
        if step == 1:
            toy.model.bn1.weight.grad[0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
    assert calls.count("after") == 3
    assert calls.count("before") == 3 + fused


@pytest.mark.parametrize("given_", ["refill", "before", "after"])
def test_a_core_that_calls_somebody_cannot_be_copied(given_: str) -> None:
    _, optimizer, dpm = start()
    dpm.attach(optimizer, **{given_: lowest})  # type: ignore[arg-type]
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with says(AttachmentError, given_, "copied", "load_state_dict"):
            copying(dpm)
    dpm.detach()
    copy.deepcopy(dpm)


# ---------------------------------------------------------------------- detaching meanwhile


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("others", ["none", "behind", "in front", "around"])
def test_a_callable_may_detach_whatever_other_hooks_there_are(where: str, others: str) -> None:
    toy, optimizer, dpm = start()
    calls: list[str] = []

    def other(*_: object) -> None:
        calls.append("other")

    def register() -> None:
        optimizer.register_step_pre_hook(other)
        optimizer.register_step_post_hook(other)

    if others in ("in front", "around"):
        register()
    dpm.attach(optimizer, **{where: dpm.detach})  # type: ignore[arg-type]
    if others in ("behind", "around"):
        register()
    dpm.decay({"conv1": [0]})
    for step in range(3):
        calls.clear()
        toy.train_step(optimizer, step)
        assert len(calls) == {"none": 0, "around": 4}.get(others, 2)
        assert dpm.clock == (where == "after")
    DecayPruning(toy.groups).attach(optimizer)
    toy.train_step(optimizer, 3)
