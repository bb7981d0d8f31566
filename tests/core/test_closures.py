"""Promise 10: a step with a closure is a step, and the closure runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, Optimizer

from dpm_core import AttachmentError, DecayPruning, Phase, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.attachment import Attachment
from tests.support import oracle
from tests.support.snapshot import difference, refused, says
from tests.support.toys import OPTIMIZERS, TOYS, Toy, make
from tests.support.twins import assert_active_as_plain

LENGTH, STEPS = 4, 6


class StepError(RuntimeError):
    """What closures of these tests raise."""


def closure_for(toy: Toy, optimizer: Optimizer, step: int, calls: list[int]) -> Callable[[], Any]:
    """Zeroing, forward, backward and clipping in one, as trainers have it."""

    def closure() -> Tensor:
        calls.append(step)
        optimizer.zero_grad()
        loss = toy.loss(step)
        loss.backward()
        clip_grad_norm_(toy.model.parameters(), 0.5)
        return loss

    return closure


class Trainers:
    """A wrapper that is no optimizer, gives its own closure where it got none, and a keyword."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step(closure=closure if closure is not None else lambda: None)


class Accelerated(Optimizer):
    """A wrapper that is an optimizer by name, and skips steps while gradients are gathered."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.gathering = optimizer, False

    def step(self, closure: Any = None) -> Any:
        return None if self.gathering else self.optimizer.step(closure)


class After(SGD):
    """A step around its parent's: the closure goes through both."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(1.001)
        return loss


KINDS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    **OPTIMIZERS,
    "after": lambda p: After(p, lr=0.05, momentum=0.9),
}
GIVE: dict[str, Callable[[Optimizer, Callable[[], Any]], Any]] = {
    "positional": lambda o, c: o.step(c),
    "keyword": lambda o, c: o.step(closure=c),
    "trainer": lambda o, c: Trainers(o).step(c),
    "accelerate": lambda o, c: Accelerated(o).step(c),
}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_step_with_a_closure_is_a_step(data: st.DataObject) -> None:
    """The schedule, and the bits of what is ACTIVE, against a closure's step without a core."""
    name = data.draw(st.sampled_from(sorted(TOYS)))
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    toy, twin = make(name, torch.float64), make(name, torch.float64)
    optimizer, plain = kind(toy.model.parameters()), kind(twin.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    calls: list[int] = []
    starts = data.draw(st.integers(0, 2))
    initial: dict[tuple[str, int], float] = {}
    for step in range(STEPS):
        if step == starts:
            dpm.decay(toy.doomed)
            initial = {
                (g.name, k): oracle.length(oracle.values(oracle.shares_of(g), k))
                for g in toy.groups
                for k in toy.doomed[g.name]
            }
        twin.model.load_state_dict(toy.model.state_dict())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        expected = plain.step(closure_for(twin, plain, step, []))
        give = GIVE[data.draw(st.sampled_from(sorted(GIVE)))]
        loss = give(optimizer, closure_for(toy, optimizer, step, calls))
        assert torch.equal(loss, expected)
        assert calls == list(range(step + 1))
        assert dpm.clock == step + 1
        assert_active_as_plain(toy, twin, dpm)
        for g in toy.groups:
            for k in toy.doomed[g.name] if initial else []:
                left = max(0, LENGTH - (dpm.clock - starts)) / LENGTH
                found = oracle.length(oracle.values(oracle.shares_of(g), k))
                assert found == pytest.approx(initial[g.name, k] * left, rel=1e-9, abs=0)


def test_releases_are_those_of_a_loop_without_a_closure() -> None:
    found = []
    for by_closure in (True, False):
        toy = make("conv", torch.float64, seed=1)
        optimizer = SGD(toy.model.parameters(), lr=0.05, momentum=0.9)
        rectify = SelfRectifying(Trajectory(rate=0.0, length=0.5), max_share=0.5)
        dpm = DecayPruning(toy.groups, SmoothPruning(8), rectify).attach(optimizer)
        dpm.decay({"conv1": [0, 1, 2], "conv2": [0, 1]})
        for step in range(9):
            closure = closure_for(toy, optimizer, step, [])
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append([*toy.model.parameters(), dpm.state_dict()])
        assert any(e.kind == "release" for e in dpm.events)
    assert difference(found[0], found[1]) is None


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, STEPS - 1), min_size=1, max_size=3), st.booleans())
def test_a_closure_that_raises_changes_and_counts_nothing(raising: set[int], late: bool) -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["adam"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    dpm.decay(toy.doomed)

    def fail() -> Tensor:
        if late:
            toy.loss(99).backward()
        raise StepError

    for step in range(STEPS):
        if step in raising:
            before = copy.deepcopy([*toy.model.parameters(), dpm.state_dict()])
            state = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(StepError):
                optimizer.step(fail)
            assert difference(before, [*toy.model.parameters(), dpm.state_dict()]) is None
            assert difference(state, optimizer.state_dict()) is None
        optimizer.step(closure_for(toy, optimizer, step, []))
        assert dpm.clock == step + 1
    assert dpm.count(Phase.PRUNED) == 3


@pytest.mark.parametrize("core", [True, False])
def test_without_a_core_before_finds_the_gradients_of_the_closure(core: bool) -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    seen: list[bool] = []

    def before() -> None:
        seen.append(all(p.grad is not None for p in toy.model.parameters()))

    done: list[int] = []
    if core:
        DecayPruning(toy.groups).attach(optimizer, before=before, after=lambda: done.append(1))
    else:
        Attachment(optimizer, [], before, lambda: done.append(1))
    calls: list[int] = []
    with torch.no_grad():  # as an optimizer's own step may be called
        loss = optimizer.step(closure_for(toy, optimizer, 0, calls))
    assert seen == [True]
    assert (calls, done) == ([0], [1])
    assert loss.requires_grad


def test_before_may_change_weights_and_gradients() -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)

    @torch.no_grad()
    def before() -> None:
        for p in toy.model.parameters():
            p.mul_(0.99)
            assert p.grad is not None
            p.grad.add_(p)

    dpm = DecayPruning(toy.groups).attach(optimizer, before=before)
    optimizer.step(closure_for(toy, optimizer, 0, []))
    assert dpm.clock == 1


def test_two_cores_run_the_closure_once() -> None:
    toy = make("shared", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    cores = [DecayPruning([g], SmoothPruning(2)).attach(optimizer) for g in toy.groups]
    for core, group in zip(cores, toy.groups, strict=True):
        core.decay({group.name: toy.doomed[group.name]})
    calls: list[int] = []
    for step in range(3):
        optimizer.step(closure_for(toy, optimizer, step, calls))
    assert calls == [0, 1, 2]
    assert [core.clock for core in cores] == [3, 3]
    assert [core.count(Phase.PRUNED) for core in cores] == [2, 1]


# ---------------------------------------------------------------------- what is refused


class OwnLBFGS(LBFGS):
    pass


@pytest.mark.parametrize("kind", [LBFGS, OwnLBFGS])
def test_an_optimizer_that_needs_several_gradients_is_refused_by_name(kind: type[LBFGS]) -> None:
    toy = make("conv")
    optimizer = kind(toy.model.parameters())
    dpm = DecayPruning(toy.groups)
    words = (kind.__name__, "several times", "SGD or AdamW")
    with refused(AttachmentError, *words, model=toy.model, dpm=dpm):
        dpm.attach(optimizer)
    with says(AttachmentError, *words):
        Attachment(Trainers(optimizer), [], bool, bool)
    assert not optimizer._optimizer_step_pre_hooks
    dpm.attach(SGD(toy.model.parameters(), lr=0.1))


class Perturbs(SGD):
    """As SAM: a gradient where the weights are not."""

    how = "add"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        kept = [p.detach().clone() for p in parameters]
        for p in parameters:
            if self.how == "add":
                p.add_(0.1)
            else:
                p.data = p + 0.1
        with torch.enable_grad():
            loss = closure()
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
        super().step()
        return loss


class Twice(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize(
    ("kind", "how", "words"),
    [
        (Perturbs, "add", ("Perturbs", "changes the weights before", "SGD or AdamW")),
        (Perturbs, "data", ("Perturbs", "changes the weights before")),
        (Twice, "", ("Twice", "a second time", "SGD or AdamW")),
    ],
)
def test_a_closure_that_would_give_a_stale_gradient_is_refused(
    kind: Any, how: str, words: tuple[str, ...], decays: bool
) -> None:
    toy = make("conv", torch.float64)
    optimizer = kind(toy.model.parameters(), lr=0.1)
    optimizer.how = how
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    if decays:
        dpm.decay(toy.doomed)
    with says(AttachmentError, *words):
        optimizer.step(closure_for(toy, optimizer, 0, []))
    assert dpm.clock == 0
