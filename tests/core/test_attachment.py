"""Promise 10: a step is a step whatever the optimizer; and what an attachment refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dpm_core import (
    AttachmentError,
    DecayPruning,
    Exchange,
    Hearing,
    Phase,
    PhaseError,
    SelfRectifying,
    SmoothPruning,
    StructureGroup,
    Trajectory,
)
from tests.support import oracle
from tests.support.snapshot import refused, says
from tests.support.toys import Toy, make

LENGTH, STEPS = 4, 7
RELEASING = SelfRectifying(Trajectory(rate=0.0, length=0.0), max_share=0.5)


class StepError(RuntimeError):
    """What a step of these tests raises."""


# What a class in a drawn hierarchy does around its parent's step.
def plain(_self: Any, up: Callable[[], None]) -> None:
    up()


def averages_afterwards(self: Any, up: Callable[[], None]) -> None:
    """As Lookahead: what it does after the parent's step must not escape the schedule."""
    up()
    for p in self.param_groups[0]["params"]:
        slow = self.slow.setdefault(p, p.detach().clone())
        slow.lerp_(p, 0.5)
        p.copy_(slow)


def moves_before(self: Any, up: Callable[[], None]) -> None:
    for p in self.param_groups[0]["params"]:
        p.mul_(1.01)
    up()


def steps_twice(_self: Any, up: Callable[[], None]) -> None:
    up()
    up()


def tries_again(self: Any, up: Callable[[], None]) -> None:
    """A parent's step that raises, and is caught, and tried once more."""
    self.failing = True
    try:
        up()
    except StepError:
        self.failing = False
        up()
    finally:
        self.failing = False


WORKS = [plain, averages_afterwards, moves_before, steps_twice, tries_again]


def hierarchy(works: list[Callable[..., None]], seen: list[bool]) -> type[Optimizer]:
    """A class over SGD for each work, new ones every time; ``seen``: which are instantiated."""

    class Base(SGD):
        slow: dict[Tensor, Tensor]
        failing = False

        def __init__(self, params: Iterable[Tensor], **kw: Any) -> None:
            super().__init__(params, **kw)
            self.slow = {}

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if self.failing:
                raise StepError("the innermost step")
            return super().step(closure)

    kind: type[Optimizer] = Base
    if seen[0]:
        kind([nn.Parameter(torch.zeros(1))], lr=0.1)  # type: ignore[call-arg]
    for work, made in zip(works, seen[1:], strict=True):

        def step(self: Any, closure: Any = None, work: Any = work, parent: Any = kind) -> None:
            with torch.no_grad():
                work(self, lambda: parent.step(self, closure))

        kind = type("Drawn", (kind,), {"step": step})
        if made:
            kind([nn.Parameter(torch.zeros(1))], lr=0.1)  # type: ignore[call-arg]
    return kind


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_step_counts_once_whatever_classes_it_goes_through(data: st.DataObject) -> None:
    works = data.draw(st.lists(st.sampled_from(WORKS), max_size=4))
    seen = data.draw(st.lists(st.booleans(), min_size=len(works) + 1, max_size=len(works) + 1))
    raising = data.draw(st.sets(st.integers(0, STEPS - 1), max_size=2))
    toy = make("shared", torch.float64)
    optimizer = hierarchy(works, seen)(toy.model.parameters(), lr=0.05, momentum=0.9)  # type: ignore[call-arg]
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    dpm.decay(toy.doomed)
    shares = {g.name: oracle.shares_of(g) for g in toy.groups}
    initial = {
        (name, k): oracle.length(oracle.values(shares[name], k))
        for name, numbers in toy.doomed.items()
        for k in numbers
    }
    for step in range(STEPS):
        toy.backward(optimizer, step)
        if step in raising and tries_again not in works:
            optimizer.failing = True  # type: ignore[attr-defined]
            with pytest.raises(StepError):
                optimizer.step()
            optimizer.failing = False  # type: ignore[attr-defined]
            assert dpm.clock == step
        optimizer.step()
        assert dpm.clock == step + 1
        for (name, k), start in initial.items():
            expected = start * max(0, LENGTH - dpm.clock) / LENGTH
            found = oracle.length(oracle.values(shares[name], k))
            assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert {e.step for e in dpm.events if e.kind == "prune"} == {LENGTH}


class Holder(Optimizer):
    """An optimizer that steps another one inside, with the same parameters, and goes on after it.

    With ``share`` the two have one set of hooks, as wrappers have that copy all attributes.
    """

    def __init__(self, inner: Optimizer, share: bool) -> None:
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})
        self.inner = inner
        if share:
            self._optimizer_step_pre_hooks = inner._optimizer_step_pre_hooks
            self._optimizer_step_post_hooks = inner._optimizer_step_post_hooks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for p in self.param_groups[0]["params"]:
            p.add_(0.01)


@pytest.mark.parametrize("share", [False, True])
def test_an_optimizer_inside_another_one_counts_once(share: bool) -> None:
    toy = make("conv", torch.float64)
    optimizer = Holder(SGD(toy.model.parameters(), lr=0.05), share)
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    dpm.decay(toy.doomed)
    for step in range(STEPS):
        toy.train_step(optimizer, step)
        assert dpm.clock == step + 1
    assert dpm.phases("conv1")[toy.doomed["conv1"]].tolist() == [Phase.PRUNED] * 2


def test_what_a_wrapper_does_after_the_step_of_the_attached_one_is_not_passed_over() -> None:
    toy = make("conv", torch.float64)
    inner = SGD(toy.model.parameters(), lr=0.05)
    outer = Holder(inner, share=False)
    dpm = DecayPruning(toy.groups, SmoothPruning(1)).attach(inner)
    dpm.decay({"conv1": [1, 4]})
    toy.train_step(outer, 0)
    with says(PhaseError, "structures 1, 4 of group 'conv1'", "zero", "wrapper"):
        dpm.phases("conv1")
    toy.train_step(inner, 1)
    assert dpm.phases("conv1").tolist() == [0, 2, 0, 0, 2, 0]


# ---------------------------------------------------------------------- wrappers


class Wrapper:
    """Hands all on to its ``optimizer``, as trainers' wrappers do; it is no Optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Dressed(Optimizer):
    """The same as a subclass of Optimizer that never calls its constructor."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


@pytest.mark.parametrize("kinds", [[Wrapper], [Dressed], [Wrapper, Dressed, Wrapper]])
def test_a_wrapper_is_looked_through(kinds: list[type]) -> None:
    toy = make("conv", torch.float64)
    inner = SGD(toy.model.parameters(), lr=0.05)
    outer: Any = inner
    for kind in kinds:
        outer = kind(outer)
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(outer)
    dpm.decay(toy.doomed)
    for step in range(3):
        toy.backward(inner, step)
        outer.step()
    assert (dpm.clock, dpm.count(Phase.PRUNED)) == (3, 3)


class Itself:
    @property
    def optimizer(self) -> Itself:
        return self


@pytest.mark.parametrize("what", [None, 3, object(), Itself(), Wrapper(None), Dressed(None), SGD])
def test_what_is_no_optimizer_is_refused_and_nothing_is_attached(what: Any) -> None:
    toy = make("conv")
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups)
    words = ("no torch.optim.Optimizer", ".optimizer", "attach to")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.attach(what)
    with says(AttachmentError, "attach(optimizer) first"):
        dpm.decay({"conv1": [0]})
    dpm.attach(optimizer).decay({"conv1": [0]})


def test_an_attach_that_fails_half_way_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make("conv")
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups)

    def fail(_hook: object) -> None:
        raise OSError("no second hook")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "register_step_post_hook", fail)
        with pytest.raises(OSError, match="no second hook"):
            dpm.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    dpm.attach(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


# ---------------------------------------------------------------------- two cores


def test_two_cores_on_the_same_structures_are_refused() -> None:
    toy = make("shared")
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    first = DecayPruning(toy.groups).attach(optimizer)
    again = StructureGroup("again", toy.groups[0].slices)
    words = ("another DecayPruning", "'singles'", "'again'", "detach()")
    for other in (optimizer, SGD(toy.model.parameters(), lr=0.1)):
        second = DecayPruning([again])
        with refused(AttachmentError, *words, model=toy.model, optimizer=other, dpm=second):
            second.attach(other)
    first.detach()
    second.attach(other)


def test_two_cores_on_other_structures_of_one_parameter_work_side_by_side() -> None:
    toy = make("shared", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    cores = [DecayPruning([g], SmoothPruning(n)) for g, n in zip(toy.groups, (2, 4), strict=True)]
    for core, group in zip(cores, toy.groups, strict=True):
        core.attach(optimizer).decay({group.name: toy.doomed[group.name]})
    for step in range(5):
        toy.train_step(optimizer, step)
    assert [e.step for core in cores for e in core.events if e.kind == "prune"] == [2, 4]


def test_a_core_whose_optimizer_nobody_holds_any_more_is_no_obstacle() -> None:
    toy = make("conv")
    DecayPruning(toy.groups).attach(SGD(toy.model.parameters(), lr=0.1))
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    DecayPruning(toy.groups).attach(optimizer)


# ---------------------------------------------------------------------- exchanged parameters


@pytest.mark.parametrize("phase", ["decaying", "pruned"])
def test_a_parameter_exchanged_in_the_optimizer_is_noticed(phase: str) -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups, SmoothPruning(1 if phase == "pruned" else 9)).attach(optimizer)
    dpm.decay(toy.doomed)
    for step in range(2):
        toy.train_step(optimizer, step)
    new = nn.Parameter(toy.model.conv1.weight.detach().clone())
    toy.model.conv1.weight = new
    optimizer.param_groups[0]["params"][0] = new
    toy.backward(optimizer, 2)
    words = ("'conv1.weight'", "'conv1'", "exchanged", "detach()")
    for request in (optimizer.step, lambda: dpm.decay({"conv1": [0]})):
        with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
            request()


def test_the_optimizer_of_a_model_that_is_gone_is_refused() -> None:
    toy = make("conv")
    groups = toy.groups
    for module in toy.model.modules():  # a removal gives every layer new parameters
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(groups)
    words = ("'conv1.weight'", "not a parameter of this optimizer", "removal", "new groups")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.attach(optimizer)


def test_parameters_that_are_added_to_the_optimizer_are_no_exchange() -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(optimizer)
    dpm.decay(toy.doomed)
    toy.train_step(optimizer, 0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    toy.train_step(optimizer, 1)
    assert dpm.count(Phase.PRUNED) == 3


# ---------------------------------------------------------------------- maximisation


def twins(
    signs: tuple[float, float], kind: Callable[..., Optimizer], **settings: Any
) -> tuple[Toy, Optimizer]:
    """A toy of which the first group's parameters ascend where the first sign is negative."""
    toy = make("conv", torch.float64, seed=1)
    ids = [{id(s.parameter) for s in g.slices} for g in toy.groups]
    parts = [[p for p in toy.model.parameters() if id(p) in own] for own in ids]
    parts.append([p for p in toy.model.parameters() if not any(id(p) in own for own in ids)])
    groups = [
        {"params": part, "maximize": sign < 0}
        for part, sign in zip(parts, (*signs, 1.0), strict=True)
    ]
    return toy, kind(groups, lr=0.05, **settings)


@pytest.mark.parametrize("how", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("signs", [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0)])
def test_resistance_is_about_what_is_minimised(signs: tuple[float, float], how: str) -> None:
    """The gradients of ascending parameters are turned by hand: all else is the same training."""
    settings = {} if how == "plain" else {how: True}
    toy, optimizer = twins(signs, SGD, **settings)
    other, plain_optimizer = twins((1.0, 1.0), SGD)
    cores = []
    for t, o in ((toy, optimizer), (other, plain_optimizer)):
        cores.append(DecayPruning(t.groups, SmoothPruning(8), RELEASING).attach(o))
        cores[-1].decay({"conv1": [0, 1, 2], "conv2": [0, 1]})
    for step in range(9):
        toy.backward(optimizer, step)
        for p, q in zip(toy.model.parameters(), other.model.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        for group, sign in zip(toy.groups, signs, strict=True):
            for s in group.slices:
                assert s.parameter.grad is not None
                s.parameter.grad *= sign
        optimizer.step()
        plain_optimizer.step()
        for p, q in zip(toy.model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
    mine, theirs = (core.state_dict()["groups"] for core in cores)
    for name in mine:
        bound = theirs[name]["gradient"].max()
        close = (mine[name]["resistance"] - theirs[name]["resistance"]).abs() <= 1e-9 * bound
        assert bool(close.all())
        assert bool((theirs[name]["resistance"].abs() > 1e-4 * bound).any())
    assert cores[0].events != []
    assert [(e.kind, e.structures) for e in cores[0].events] == [
        (e.kind, e.structures) for e in cores[1].events
    ]


@pytest.mark.parametrize("kind", ["hearing", "exchange"])
def test_a_hearing_of_an_objective_that_is_maximised_is_that_of_its_negative(kind: str) -> None:
    criterion = Exchange(batches=2) if kind == "exchange" else Hearing(batches=2, threshold=-1)
    found = []
    for sign in (1, -1):
        toy = make("conv", torch.float64, seed=1)
        optimizer = SGD(toy.model.parameters(), lr=0.05, maximize=sign < 0)
        batches = iter(range(100, 200))
        dpm = DecayPruning(toy.groups, SmoothPruning(8), SelfRectifying(criterion, max_share=0.7))
        dpm.attach(
            optimizer,
            model=toy.model,
            loss=lambda t=toy, s=sign, b=batches: s * t.loss(next(b)),  # type: ignore[misc]
        )
        dpm.decay({"conv1": [0, 1, 2], "conv2": [0, 1]})
        worth = None
        for step in range(8):
            optimizer.zero_grad()
            (sign * toy.loss(step)).backward()
            optimizer.step()
            worth = worth if worth is not None else dpm.worth("conv1")
        found.append((dpm.events, worth))
    (events, worth), (turned, turned_worth) = found
    assert any(e.kind == "release" for e in events)
    assert [(e.step, e.kind, e.structures) for e in events] == [
        (e.step, e.kind, e.structures) for e in turned
    ]
    if kind == "exchange":
        torch.testing.assert_close(worth, turned_worth, rtol=1e-9, atol=1e-12)


def test_a_hearing_of_a_group_with_two_signs_is_refused() -> None:
    toy = make("conv", torch.float64)
    own = [s.parameter for s in toy.groups[0].slices]
    rest = [p for p in toy.model.parameters() if not any(p is q for q in own)]
    optimizer = SGD([{"params": own[:1], "maximize": True}, {"params": [*own[1:], *rest]}], lr=0.01)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(Hearing(), max_share=0.5))
    dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(0))
    dpm.decay({"conv1": [0, 1]})
    for step in range(2):  # the decision falls in the third
        toy.train_step(optimizer, step)
    toy.backward(optimizer, 2)
    words = ("maximises by some parameters of group 'conv1'", "Trajectory()")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        optimizer.step()
