"""Promise 10: several optimizers that share the parameters make one step together."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from dpm_core import (
    AttachmentError,
    DecayPruning,
    Hearing,
    Phase,
    SelfRectifying,
    SmoothPruning,
    Trajectory,
)
from dpm_core.attachment import Attachment
from tests.support import oracle
from tests.support.snapshot import difference, same_bits, says
from tests.support.toys import OPTIMIZERS, TOYS, Toy, make
from tests.support.twins import assert_active_as_plain

LENGTH, STEPS = 4, 7
RELEASING = SelfRectifying(Trajectory(rate=0.0, length=0.3), max_share=0.5)


class StepError(RuntimeError):
    """What steps of these tests raise."""


class Stumbling(SGD):
    stumbles = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.stumbles:
            raise StepError
        return super().step(closure)


def matrices_and_vectors(toy: Toy, **settings: Any) -> list[Optimizer]:
    """Two optimizers, over both of which every structure is spread."""
    parameters = list(toy.model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    first = Stumbling(matrices, lr=0.05, momentum=0.9, **settings)
    return [first, SGD(vectors, lr=0.02, momentum=0.5, **settings)]


def step_all(toy: Toy, optimizers: Sequence[Optimizer], step: int) -> None:
    backward(toy, step)
    for optimizer in optimizers:
        optimizer.step()


def backward(toy: Toy, step: int) -> None:
    toy.model.zero_grad()
    toy.loss(step).backward()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_several_optimizers_make_one_step(data: st.DataObject) -> None:
    """The schedule, and the bits of what is ACTIVE, for any partition in any order."""
    name = data.draw(st.sampled_from(sorted(TOYS)))
    toy, twin = make(name, torch.float64), make(name, torch.float64)
    count = data.draw(st.integers(2, 3))
    size = len(list(toy.model.parameters()))
    places = st.lists(st.integers(0, count - 1), min_size=size, max_size=size)
    place = data.draw(places.filter(lambda p: len(set(p)) == count))
    kinds = [OPTIMIZERS[data.draw(st.sampled_from(sorted(OPTIMIZERS)))] for _ in range(count)]

    def optimizers_of(of: Toy) -> list[Optimizer]:
        parameters = list(of.model.parameters())
        return [
            kind([p for p, where in zip(parameters, place, strict=True) if where == i])
            for i, kind in enumerate(kinds)
        ]

    optimizers, plain = optimizers_of(toy), optimizers_of(twin)
    calls: list[str] = []
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH))
    before, after = (lambda w=w: calls.append(w) for w in ("before", "after"))
    dpm.attach(tuple(optimizers), before=before, after=after)
    dpm.decay(toy.doomed)
    initial = {
        (g.name, k): oracle.length(oracle.values(oracle.shares_of(g), k))
        for g in toy.groups
        for k in toy.doomed[g.name]
    }
    for step in range(STEPS):
        twin.model.load_state_dict(toy.model.state_dict())
        for mine, theirs in zip(optimizers, plain, strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        order = data.draw(st.permutations(range(count)))
        step_all(twin, [plain[i] for i in order], step)
        backward(toy, step)
        for done, i in enumerate(order):
            assert dpm.clock == step
            assert calls == [*["before", "after"] * step, *["before"] * (done > 0)]
            optimizers[i].step()
        assert dpm.clock == step + 1
        assert_active_as_plain(toy, twin, dpm)
        for (group, k), start in initial.items():
            shares = oracle.shares_of(dpm.groups[group])
            expected = start * max(0, LENGTH - dpm.clock) / LENGTH
            found = oracle.length(oracle.values(shares, k))
            assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert calls == ["before", "after"] * STEPS
    dpm.detach()
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_releases_are_those_of_one_optimizer_with_as_many_parameter_groups() -> None:
    found = []
    for several in (True, False):
        toy = make("conv", torch.float64, seed=1)
        optimizers = matrices_and_vectors(toy)
        if not several:
            first, second = (o.param_groups[0] for o in optimizers)
            optimizers = [SGD([first, second], lr=0.1)]
        dpm = DecayPruning(toy.groups, SmoothPruning(8), RELEASING).attach(optimizers)
        dpm.decay({"conv1": [0, 1, 2], "conv2": [0, 1]})
        for step in range(9):
            step_all(toy, optimizers, step)
        assert any(e.kind == "release" for e in dpm.events)
        found.append([*toy.model.parameters(), dpm.state_dict()])
    assert difference(found[0], found[1]) is None


def test_maximisation_is_that_of_each() -> None:
    toy = make("conv", torch.float64)
    first, second = matrices_and_vectors(toy)
    second.param_groups[0]["maximize"] = True
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(Hearing(), max_share=0.5))
    dpm.attach([first, second], model=toy.model, loss=lambda: toy.loss(0))
    dpm.decay({"conv1": [0, 1]})
    with says(AttachmentError, "maximises by some parameters of group 'conv1'"):
        for step in range(4):
            step_all(toy, [first, second], step)


# ---------------------------------------------------------------------- attaching


def test_what_cannot_be_attached_together_is_refused_and_nothing_is_attached() -> None:
    toy = make("conv")
    first, second = matrices_and_vectors(toy)
    dpm = DecayPruning(toy.groups)
    cases: list[tuple[list[Any], tuple[str, ...]]] = [
        ([], ("no optimizer was given",)),
        ([first], ("'conv1.bias'", "not a parameter", "attach([first, second])")),
        ([first, second, first], ("given twice",)),
        ([first, None], ("NoneType", "no torch.optim.Optimizer")),
        ([first, LBFGS(second.param_groups[0]["params"])], ("LBFGS", "several times")),
    ]
    for optimizers, words in cases:
        with says(AttachmentError, *words):
            dpm.attach(optimizers)
        assert not first._optimizer_step_pre_hooks
        assert not second._optimizer_step_pre_hooks
    dpm.attach([first, second])


def test_an_attach_that_fails_half_way_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make("conv")
    optimizers = matrices_and_vectors(toy)

    def fail(_hook: object) -> None:
        raise OSError("no hook")

    for i, hook in itertools.product((0, 1), ("pre", "post")):
        with monkeypatch.context() as patch:
            patch.setattr(optimizers[i], f"register_step_{hook}_hook", fail)
            with pytest.raises(OSError, match="no hook"):
                DecayPruning(toy.groups).attach(optimizers)
        for o in optimizers:
            assert not o._optimizer_step_pre_hooks
            assert not o._optimizer_step_post_hooks


# ---------------------------------------------------------------------- out of phase


def attached(rectify: SelfRectifying | None = None) -> tuple[Toy, list[Optimizer], DecayPruning]:
    toy = make("conv", torch.float64, seed=1)
    optimizers = matrices_and_vectors(toy)
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH), rectify).attach(optimizers)
    dpm.decay(toy.doomed)
    return toy, optimizers, dpm


def assert_on_schedule(toy: Toy, optimizers: list[Optimizer], dpm: DecayPruning) -> None:
    """From any state between two steps on, the decay ends as if nothing had happened."""
    for step in range(100, 100 + LENGTH - dpm.clock):
        step_all(toy, optimizers, step)
    assert dpm.clock == LENGTH
    assert {e.step for e in dpm.events if e.kind == "prune"} == {LENGTH}
    assert dpm.phases("conv1")[toy.doomed["conv1"]].tolist() == [Phase.PRUNED] * 2


@pytest.mark.parametrize("i", [0, 1])
def test_a_second_step_of_one_is_refused_and_the_other_can_go_on(i: int) -> None:
    toy, optimizers, dpm = attached()
    backward(toy, 0)
    optimizers[i].step()
    before = copy.deepcopy([*toy.model.parameters(), dpm.state_dict()])
    words = (
        f"number {i + 1}", "a second time", f"number {2 - i}", "each of them once", "unscale_",
    )  # fmt: skip
    with says(AttachmentError, *words):
        optimizers[i].step()
    assert difference(before, [*toy.model.parameters(), dpm.state_dict()]) is None
    optimizers[1 - i].step()
    assert dpm.clock == 1
    assert_on_schedule(toy, optimizers, dpm)


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_left_out_is_noticed_in_the_next_round(
    left_out: int, to_none: bool
) -> None:
    """As a gradient scaler leaves one out: never is the core silently out of phase."""
    toy, optimizers, dpm = attached()
    step_all(toy, optimizers, 0)
    backward(toy, 1)
    optimizers[1 - left_out].step()
    toy.model.zero_grad(set_to_none=to_none)
    toy.loss(2).backward()
    before = copy.deepcopy([*toy.model.parameters(), dpm.state_dict()])
    with says(AttachmentError, "number", "step either all of them", "none"):
        optimizers[0].step()
    assert difference(before, [*toy.model.parameters(), dpm.state_dict()]) is None
    assert dpm.clock == 1
    assert_on_schedule(toy, optimizers, dpm)  # the loop goes on with the next batch


def test_gradients_that_change_between_the_steps_are_refused() -> None:
    toy, optimizers, dpm = attached()
    backward(toy, 0)
    optimizers[0].step()
    toy.model.bn1.weight.grad.mul_(0.5)
    with says(AttachmentError, "gradients of SGD (number 2", "have changed", "unscale_"):
        optimizers[1].step()
    assert dpm.clock == 0
    assert_on_schedule(toy, optimizers, dpm)


@pytest.mark.parametrize("again", ["all", "one"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_step_that_raises_is_no_step(order: tuple[int, int], again: str) -> None:
    toy, optimizers, dpm = attached()
    stumbling = optimizers[0]
    backward(toy, 0)
    stumbling.stumbles = True  # type: ignore[attr-defined]
    for i in order[: order.index(0)]:
        optimizers[i].step()
    with pytest.raises(StepError):
        stumbling.step()
    stumbling.stumbles = False  # type: ignore[attr-defined]
    if again == "one":
        for i in order[order.index(0) :]:
            optimizers[i].step()
    else:
        step_all(toy, [optimizers[i] for i in order], 0)
    assert dpm.clock == 1
    assert_on_schedule(toy, [optimizers[i] for i in order], dpm)


# ---------------------------------------------------------------------- closures


def test_the_first_may_have_a_closure_and_the_second_one_that_changes_nothing() -> None:
    toy, optimizers, dpm = attached()

    def closure(step: int) -> Tensor:
        toy.model.zero_grad()
        loss = toy.loss(step)
        loss.backward()
        return loss

    for step in range(2):
        assert optimizers[1].step(lambda step=step: closure(step)) > 0
        optimizers[0].step(lambda: None)
        assert dpm.clock == step + 1
    optimizers[0].step(lambda: closure(3))
    with says(AttachmentError, "have changed"):
        optimizers[1].step(lambda: closure(3))
    assert_on_schedule(toy, optimizers, dpm)


# ---------------------------------------------------------------------- gradient scalers


FUSED: list[Callable[[list[nn.Parameter]], Optimizer]] = [
    lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    lambda p: AdamW(p, lr=0.02, fused=True),
]
PLAIN: list[Callable[[list[nn.Parameter]], Optimizer]] = [
    lambda p: SGD(p, lr=0.05, momentum=0.9),
    lambda p: AdamW(p, lr=0.02),
]


@pytest.mark.parametrize("kinds", [FUSED, PLAIN, [FUSED[0], PLAIN[1]], [PLAIN[0], FUSED[1]]])
@pytest.mark.parametrize("bad", [None, "conv1.weight", "conv1.bias", "head.bias"])
def test_a_scaler_that_unscales_for_all_first_and_steps_all_or_none(
    kinds: list[Callable[[list[nn.Parameter]], Optimizer]], bad: str | None
) -> None:
    toy, optimizers, dpm, scaler = scaled(kinds)
    for step in range(10):
        scale(toy, scaler, step, bad if step in (3, 6) else None)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in toy.model.parameters()]
        if all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
    assert dpm.clock == 10 - 2 * (bad is not None)
    assert {e.step for e in dpm.events if e.kind == "prune"} == {LENGTH}


@pytest.mark.parametrize("bad", [None, "conv1.weight", "conv1.bias", "conv2.weight", "head.bias"])
def test_fused_optimizers_under_a_scaler_stay_in_phase(bad: str | None) -> None:
    """Each skips by its own gradients: where the first to step does, the step is not counted."""
    toy, optimizers, dpm, scaler = scaled(FUSED)
    for step in range(10):
        skipping = step in (3, 7)
        scale(toy, scaler, step, bad if skipping else None)
        before = copy.deepcopy(dpm.state_dict())
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        decaying = bad == "conv1.bias" and step == 3
        if skipping and (decaying or bad in ("conv1.weight", "conv2.weight")):
            after = dpm.state_dict()
            assert after["clock"] == before["clock"]
            assert difference(before["groups"], after["groups"]) is None
        else:  # where nothing that decays is concerned, the second one's skipping is its own
            assert dpm.clock == before["clock"] + 1
        for group in dpm.groups:  # PRUNED is zero whoever has stepped
            dpm.phases(group)
    assert {e.step for e in dpm.events if e.kind == "prune"} == {LENGTH}


@pytest.mark.parametrize("kinds", [PLAIN, [PLAIN[0], FUSED[1]]])
def test_a_scaler_that_unscales_one_after_the_other_is_refused_in_the_first_step(
    kinds: list[Callable[[list[nn.Parameter]], Optimizer]],
) -> None:
    """The second one's gradients would be read while they are scaled."""
    toy, optimizers, dpm, scaler = scaled(kinds)
    scale(toy, scaler, 0, None)
    before = copy.deepcopy([*toy.model.parameters(), dpm.state_dict()])
    with says(AttachmentError, "SGD (number 1", "AdamW (number 2", "unscale_() for each first"):
        scaler.step(optimizers[0])
    assert difference(before, [*toy.model.parameters(), dpm.state_dict()]) is None


@pytest.mark.parametrize("kinds", [FUSED, [FUSED[0], PLAIN[1]]])
def test_gradients_that_are_all_scaled_are_read_as_what_they_are(
    kinds: list[Callable[[list[nn.Parameter]], Optimizer]],
) -> None:
    sums = []
    for scaling in (True, False):
        toy, optimizers, dpm, scaler = scaled(kinds)
        for step in range(3):
            if not scaling:
                step_all(toy, optimizers, step)
                continue
            scale(toy, scaler, step, None)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        part = dpm.state_dict()["groups"]["conv1"]
        sums.append([part["resistance"], part["gradient"]])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


def scaled(
    kinds: list[Callable[[list[nn.Parameter]], Optimizer]],
) -> tuple[Toy, list[Optimizer], DecayPruning, GradScaler]:
    toy = make("conv", seed=1)
    parts = [
        [p for p in toy.model.parameters() if (p.dim() > 1) == matrices]
        for matrices in (True, False)
    ]
    optimizers = [kind(part) for kind, part in zip(kinds, parts, strict=True)]
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH), RELEASING).attach(optimizers)
    dpm.decay({"conv1": [1, 4]})
    return toy, optimizers, dpm, GradScaler("cpu", init_scale=1024.0)


def scale(toy: Toy, scaler: GradScaler, step: int, bad: str | None) -> None:
    toy.model.zero_grad()
    x, y = toy.batch(step)
    scaler.scale(functional.cross_entropy(toy.model(x), y)).backward()
    if bad is not None:
        gradient = toy.model.get_parameter(bad).grad
        assert gradient is not None
        gradient.view(-1)[-1 if bad == "conv1.weight" else 1] = float("inf")
        gradient.view(len(gradient), -1)[1] = float("inf")


# ---------------------------------------------------------------------- copies, resumption


def test_a_copy_of_all_together_trains_on_by_itself() -> None:
    toy, optimizers, dpm = attached(RELEASING)
    step_all(toy, optimizers, 0)
    twin, theirs, core = copy.deepcopy((toy, optimizers, dpm))
    for step in range(1, STEPS):
        step_all(toy, optimizers, step)
    for step in range(1, STEPS):
        step_all(twin, theirs, step)
    assert core.clock == dpm.clock == STEPS
    assert difference(dpm.state_dict(), core.state_dict()) is None
    for mine, other in zip(toy.model.parameters(), twin.model.parameters(), strict=True):
        assert same_bits(mine, other)


def test_a_copy_of_which_one_optimizer_is_dropped_says_so() -> None:
    toy, optimizers, dpm = attached()
    twin, theirs, core = copy.deepcopy((toy, optimizers, dpm))
    del theirs[1]
    gc.collect()
    backward(twin, 0)
    with says(AttachmentError, "gone", "attach(optimizer)"):
        theirs[0].step()
    with says(AttachmentError, "gone"):
        core.decay({"conv1": [0]})
    core.attach([theirs[0], SGD([p for p in twin.model.parameters() if p.dim() == 1], lr=0.1)])


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_ends_in_the_same_bits(at: int) -> None:
    toy, optimizers, dpm = attached(RELEASING)
    for step in range(at):
        step_all(toy, optimizers, step)
    saved = copy.deepcopy(
        [toy.model.state_dict(), [o.state_dict() for o in optimizers], dpm.state_dict()]
    )
    for step in range(at, STEPS):
        step_all(toy, optimizers, step)
    again = make("conv", torch.float64, seed=2)
    theirs = matrices_and_vectors(again)
    core = DecayPruning(again.groups, SmoothPruning(LENGTH), RELEASING).attach(theirs)
    again.model.load_state_dict(saved[0])
    for optimizer, state in zip(theirs, saved[1], strict=True):
        optimizer.load_state_dict(state)
    core.load_state_dict(saved[2])
    for step in range(at, STEPS):
        step_all(again, theirs, step)
    assert difference(dpm.state_dict(), core.state_dict()) is None
    for mine, other in zip(toy.model.parameters(), again.model.parameters(), strict=True):
        assert same_bits(mine, other)


def test_a_state_loaded_between_the_steps_of_a_round_starts_a_new_round() -> None:
    toy, optimizers, dpm = attached()
    state = copy.deepcopy(dpm.state_dict())
    backward(toy, 0)
    optimizers[0].step()
    dpm.load_state_dict(state)
    assert_on_schedule(toy, optimizers, dpm)


# ---------------------------------------------------------------------- without a core


@pytest.mark.parametrize("bad", [None, "conv1.weight", "conv1.bias"])
def test_without_a_core_the_rounds_are_the_same(bad: str | None) -> None:
    toy, optimizers, dpm, scaler = scaled(FUSED)
    dpm.detach()
    calls: list[str] = []
    hooks = Attachment(
        optimizers, [], lambda: calls.append("before"), lambda: calls.append("after")
    )
    for step in range(4):
        scale(toy, scaler, step, bad if step == 2 else None)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert calls.count("before") == 4
    assert calls.count("after") == 4 - (bad == "conv1.weight")  # where the first one skips
    scale(toy, scaler, 4, None)
    optimizers[0].step()
    with says(AttachmentError, "a second time"):
        optimizers[0].step()
    hooks.remove()
    optimizers[0].step()
