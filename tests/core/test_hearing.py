"""A hearing against each sample run by itself, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dpm_core import (
    DecayPruning,
    GradientError,
    GroupError,
    Hearing,
    LeastResistant,
    Owner,
    RandomRelease,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
)
from dpm_core.hearing import Objective, gate_derivatives
from tests.support import oracle
from tests.support.snapshot import assert_unchanged, refused, snapshot
from tests.support.toys import OPTIMIZERS, TOYS, Toy, make

Gated = list[Tensor]


def doomed(toy: Toy) -> Gated:
    return [torch.tensor(sorted(toy.doomed[g.name])) for g in toy.groups]


def loss_with_gates(
    toy: Toy, x: Tensor, y: Tensor, gates: dict[tuple[int, int], Tensor | float]
) -> Tensor:
    """One sample's loss with owners' outputs multiplied, position by position, by the gates."""

    def hook_for(number: int, owner: Owner) -> Callable[..., Tensor]:
        def multiply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            slabs = list(output.unbind(owner.dim))
            for (group, k), gate in gates.items():
                for position in owner.index[k].tolist() if group == number else ():
                    slabs[position] = slabs[position] * gate
            return torch.stack(slabs, owner.dim)

        return multiply

    handles = [
        owner.module.register_forward_hook(hook_for(number, owner))
        for number, group in enumerate(toy.groups)
        for owner in group.owners
    ]
    try:
        return functional.cross_entropy(toy.model(x[None]), y[None])
    finally:
        for handle in handles:
            handle.remove()


def one_by_one(
    toy: Toy, gated: Gated, batches: list[tuple[Tensor, Tensor]], gate: float
) -> list[list[float]]:
    """For each gated structure, the derivative of each sample's loss by its gate."""
    everyone = [(i, int(k)) for i, numbers in enumerate(gated) for k in numbers]
    found = []
    for key in everyone:
        derivatives = []
        for x, y in batches:
            for sample, label in zip(x, y, strict=True):
                own = torch.tensor(gate, dtype=torch.float64, requires_grad=True)
                gates: dict[tuple[int, int], Tensor | float] = dict.fromkeys(everyone, gate)
                loss = loss_with_gates(toy, sample, label, gates | {key: own})
                derivatives.append(float(torch.autograd.grad(loss, own)[0]))
        found.append(derivatives)
    return found


def room(toy: Toy, first: int = 100) -> Objective:
    """The loop's closure: batch ``first`` and those after it."""
    count = iter(range(first, first + 100))
    return Objective(toy.model, lambda: toy.loss(next(count)))


# ---------------------------------------------------------------------- the derivative


@pytest.mark.parametrize("gate", [1e-3, 0.7])
@pytest.mark.parametrize("name", TOYS)
def test_the_derivative_is_that_of_each_sample_run_alone(name: str, gate: float) -> None:
    toy = make(name, torch.float64)
    toy.model.eval()  # in training mode BatchNorm lets samples see one another
    mean, square = gate_derivatives(room(toy), toy.groups, doomed(toy), 2, gate)
    rows = one_by_one(toy, doomed(toy), [toy.batch(100), toy.batch(101)], gate)
    assert len(rows[0]) == 12
    assert any(abs(d) > 1e-6 for row in rows for d in row)
    assert mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([sum(r) / len(r) for r in rows], rel=1e-9, abs=1e-15)
    squares = [sum(d * d for d in r) / len(r) for r in rows]
    assert square.tolist() == pytest.approx(squares, rel=1e-9, abs=1e-18)


def test_the_derivative_is_the_slope_of_the_loss() -> None:
    """Against differences, in case autograd and the oracle share a mistake."""
    toy = make("conv", torch.float64)
    toy.model.eval()
    gated, gate, h = doomed(toy), 0.4, 1e-6
    mean, _ = gate_derivatives(room(toy), toy.groups, gated, 1, gate)
    everyone = [(i, int(k)) for i, numbers in enumerate(gated) for k in numbers]
    for key, found in zip(everyone, mean.tolist(), strict=True):
        sides = []
        for value in (gate + h, gate - h):
            gates: dict[tuple[int, int], Tensor | float] = dict.fromkeys(everyone, gate)
            gates[key] = value
            losses = [
                loss_with_gates(toy, x, y, gates) for x, y in zip(*toy.batch(100), strict=True)
            ]
            sides.append(torch.stack(losses).mean().item())
        assert found == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-5, abs=1e-9)


class Sequence(nn.Module):
    """Channels last, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        return self.head(self.inner(x).tanh().mean(1))


@pytest.mark.parametrize("dim", [2, -1])
def test_an_owner_may_run_twice_and_count_its_dimension_from_the_end(dim: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sequence().double()
    group = StructureGroup(
        "inner", [Slice.whole(model.inner.weight)], [Owner(model.inner, torch.arange(4), dim)]
    )
    toy = Toy(model, [group], {"inner": [1, 2]}, (5, 4))
    mean, square = gate_derivatives(room(toy), toy.groups, doomed(toy), 1, 0.5)
    rows = one_by_one(toy, doomed(toy), [toy.batch(100)], 0.5)
    assert mean.tolist() == pytest.approx([sum(r) / 6 for r in rows], rel=1e-9)
    assert square.tolist() == pytest.approx([sum(d * d for d in r) / 6 for r in rows], rel=1e-9)


def test_a_structure_that_is_zero_is_heard_to_have_no_effect() -> None:
    toy = make("conv", torch.float64)
    with torch.no_grad():
        toy.model.bn1.weight[1], toy.model.bn1.bias[1] = 0, 0
    mean, square = gate_derivatives(room(toy), toy.groups, doomed(toy), 1, 1e-3)
    assert (mean[0], square[0]) == (0, 0)
    assert square[1] > 0


# ---------------------------------------------------------------------- nothing changes


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def noisy() -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Noisy()
    group = StructureGroup(
        "conv",
        [Slice.whole(model.conv.weight), Slice.whole(model.bn.weight, batch_norm=True)],
        [Owner(model.bn, torch.arange(4))],
    )
    return Toy(model, [group], {"conv": [0, 3]}, (2, 3, 3))


def test_a_hearing_changes_nothing() -> None:
    toy = noisy()
    optimizer = OPTIMIZERS["adam"](toy.model.parameters())
    toy.train_step(optimizer, 0)
    before = snapshot(toy.model, optimizer)
    gate_derivatives(room(toy), toy.groups, doomed(toy), 3, 1e-3)
    assert_unchanged(before, toy.model, optimizer)


def test_a_hearing_that_fails_changes_nothing() -> None:
    toy = noisy()

    def loss() -> Tensor:
        toy.loss(0)
        raise OSError("no more batches")

    before = snapshot(toy.model)
    with pytest.raises(OSError, match="no more batches"):
        gate_derivatives(Objective(toy.model, loss), toy.groups, doomed(toy), 3, 1e-3)
    assert_unchanged(before, toy.model)


def test_a_hearing_runs_inside_no_grad_as_the_step_does() -> None:
    toy = make("conv", torch.float64)
    with torch.no_grad():
        mean, _ = gate_derivatives(room(toy), toy.groups, doomed(toy), 1, 1e-3)
    assert bool((mean != 0).any())
    assert not mean.requires_grad


# ---------------------------------------------------------------------- refusals


def one_group(
    toy: Toy, module: nn.Module, index: Tensor | None = None, dim: int = 1
) -> tuple[list[StructureGroup], Gated]:
    """The first group of a toy, with another owner."""
    group = toy.groups[0]
    index = torch.arange(group.size) if index is None else index
    return [StructureGroup(group.name, group.slices, [Owner(module, index, dim)])], [
        torch.tensor([0, group.size - 1])
    ]


def test_a_group_without_owners_is_refused() -> None:
    toy = make("conv")
    groups = [StructureGroup("bare", toy.groups[0].slices)]
    with refused(GroupError, "'bare'", "no owners", "Trajectory()", model=toy.model):
        gate_derivatives(room(toy), groups, [torch.tensor([0])], 1, 1e-3)


@pytest.mark.parametrize("dim", [0, 4, -4, -5])
def test_an_owner_whose_output_lacks_the_dimension_is_refused(dim: int) -> None:
    toy = make("conv")
    groups, gated = one_group(toy, toy.model.bn1, dim=dim)
    with refused(GroupError, "'conv1'", f"dim {dim}", "another module", model=toy.model):
        gate_derivatives(room(toy), groups, gated, 1, 1e-3)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_an_owner_that_returns_no_tensor_is_refused() -> None:
    toy = make("conv")
    pair = Pair()
    toy.model.relu1.register_forward_hook(lambda m, a, out: pair(out)[0])
    groups, gated = one_group(toy, pair)
    with refused(GroupError, "'conv1'", "tensor", "another module", model=toy.model):
        gate_derivatives(room(toy), groups, gated, 1, 1e-3)


def test_an_owner_with_fewer_positions_than_its_index_is_refused() -> None:
    toy = make("conv")
    groups, gated = one_group(toy, toy.model.bn2)  # 5 channels, and conv1 has 6
    with refused(GroupError, "'conv1'", model=toy.model):
        gate_derivatives(room(toy), groups, gated, 1, 1e-3)


def test_an_owner_without_the_batch_in_front_is_refused() -> None:
    toy = make("conv")
    folded = nn.Flatten(0, 1)
    toy.model.relu1.register_forward_hook(lambda m, a, out: folded(out).view_as(out))
    groups, gated = one_group(toy, folded, torch.arange(3)[[0, 1, 2, 0, 1, 2]])
    groups.append(toy.groups[1])
    with refused(GroupError, "owner", "batch", model=toy.model):
        gate_derivatives(room(toy), groups, [*gated, torch.tensor([0])], 1, 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    toy = make("conv")
    words = ("loss of a hearing", str(value), "check the closure")
    with refused(GradientError, *words, model=toy.model):
        gate_derivatives(
            Objective(toy.model, lambda: toy.loss(0) + value), toy.groups, doomed(toy), 1, 1e-3
        )


def test_a_closure_that_does_not_run_the_model_is_refused() -> None:
    toy, other = make("conv"), make("conv")
    with refused(GradientError, "does not depend", "must run the model", model=toy.model):
        gate_derivatives(
            Objective(toy.model, lambda: other.loss(0)), toy.groups, doomed(toy), 1, 1e-3
        )


def unrelated(toy: Toy) -> Tensor:
    toy.loss(0)
    return toy.model.head.weight.square().mean()


def without_gradient(toy: Toy) -> Tensor:
    with torch.no_grad():
        return toy.loss(0)


@pytest.mark.parametrize("loss", [unrelated, without_gradient, lambda toy: toy.loss(0).detach()])
def test_a_loss_that_does_not_depend_on_the_structures_is_refused(
    loss: Callable[[Toy], Tensor],
) -> None:
    toy = make("conv")
    with refused(GradientError, "loss", "closure", model=toy.model):
        gate_derivatives(Objective(toy.model, lambda: loss(toy)), toy.groups, doomed(toy), 1, 1e-3)


class Branches(nn.Module):
    """A layer that a test runs in some way of its own, beside one that always counts."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.head(x + self.run(self.inner, x))


def branches(run: Callable[[nn.Module, Tensor], Tensor]) -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branches(run).double()
    owners = [Owner(m, torch.arange(4)) for m in (model.stem, model.inner)]
    slices = [Slice.whole(model.stem.weight), Slice.whole(model.inner.weight)]
    return Toy(model, [StructureGroup("tied", slices, owners)], {"tied": [1, 2]}, (4,))


def not_called(_inner: nn.Module, x: Tensor) -> Tensor:
    return x.square()


def without_hooks(inner: nn.Module, x: Tensor) -> Tensor:
    return inner.forward(x).tanh()


def in_passing(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x).detach().tanh()


def no_gradients(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return inner(x).tanh()


def once_in_two(inner: nn.Module, x: Tensor) -> Tensor:
    """As with a momentum encoder: one call counts, and the other is only looked at."""
    with torch.no_grad():
        inner(x)
    return inner(x).tanh()


def reentrant(inner: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda y: inner(y).tanh(), x, use_reentrant=True)
    return found


def traced(inner: nn.Module, x: Tensor) -> Tensor:
    weight, bias = inner.weight, inner.bias
    return functional.linear(x, weight, bias).tanh()  # what compiled code makes of a module


UNUSED = [
    (not_called, GroupError, ("owner 1 (Linear) of group 'tied'", "not called")),
    (without_hooks, GroupError, ("owner 1 (Linear) of group 'tied'", "module(x)")),
    (traced, GroupError, ("owner 1 (Linear) of group 'tied'", "compiled")),
    (in_passing, GradientError, ("owner 1 (Linear) of group 'tied'", "goes nowhere")),
    (no_gradients, GradientError, ("owner 1 (Linear) of group 'tied'", "no_grad()")),
    (once_in_two, GradientError, ("owner 1 (Linear) of group 'tied'", "no_grad()")),
    (reentrant, GradientError, ("checkpoint", "use_reentrant=False", "Trajectory()")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("run", "error", "words"), UNUSED)
def test_a_gate_that_no_forward_pass_used_is_refused_with_its_cause(
    run: Callable[[nn.Module, Tensor], Tensor], error: type[Exception], words: tuple[str, ...]
) -> None:
    toy = branches(run)
    with refused(error, *words, model=toy.model):
        gate_derivatives(room(toy), toy.groups, doomed(toy), 2, 0.5)


def checkpointed(inner: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda y: inner(y).tanh(), x, use_reentrant=False)
    return found


def test_a_checkpointed_layer_is_heard_as_any_other() -> None:
    plain = branches(lambda inner, x: inner(x).tanh())
    toy = branches(checkpointed)
    found = [gate_derivatives(room(t), t.groups, doomed(t), 2, 0.5) for t in (plain, toy)]
    for expected, told in zip(*found, strict=True):
        assert torch.equal(expected, told)
        assert bool((told != 0).any())


@pytest.mark.slow
def test_a_compiled_part_is_heard_as_it_was_written() -> None:
    plain = branches(lambda inner, x: inner(x).tanh())
    compiled = torch.compile(lambda inner, x: inner(x).tanh(), backend="eager")
    toy = branches(lambda inner, x: compiled(inner, x))
    for step in range(2):
        toy.loss(step)
        plain.loss(step)
    found = [gate_derivatives(room(t), t.groups, doomed(t), 2, 0.5) for t in (plain, toy)]
    for expected, told in zip(*found, strict=True):
        torch.testing.assert_close(expected, told, rtol=1e-9, atol=1e-12)
    assert torch.equal(plain.loss(5), toy.loss(5))  # no gate is left in what was compiled


# ---------------------------------------------------------------------- in a decay


def run(
    toy: Toy, rectify: SelfRectifying, starts: dict[int, dict[str, list[int]]], steps: int
) -> tuple[DecayPruning, list[tuple[str, int]], list[list[float]]]:
    """Decay over ten steps; what was gated at the decision, and the samples' derivatives there."""
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(10), rectify)
    batches = iter(range(100, 200))
    dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(next(batches)))
    gated: list[tuple[str, int]] = []
    rows: list[list[float]] = []
    for step in range(steps):
        if step in starts:
            dpm.decay(starts[step])
        toy.backward(optimizer, step)
        if step == 8:
            numbers = [dpm.phases(g.name).eq(1).nonzero().flatten() for g in toy.groups]
            gated = [(g.name, int(k)) for g, n in zip(toy.groups, numbers, strict=True) for k in n]
            heard = [toy.batch(100 + i) for i in range(2)]
            rows = one_by_one(toy, numbers, heard, 1e-3)
        optimizer.step()
    return dpm, gated, rows


def test_the_hearing_of_a_decay_releases_the_highest_score() -> None:
    # Without BatchNorm samples do not see one another in training mode either.
    toy = make("shared", torch.float64, seed=3)
    rectify = SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.5)
    dpm, gated, rows = run(toy, rectify, {0: {"singles": [0, 1, 2], "pairs": [1]}}, 9)
    scores = {key: oracle.hearing_score(row) for key, row in zip(gated, rows, strict=True)}
    singles = {k: s for (group, k), s in scores.items() if group == "singles"}
    assert len(set(singles.values())) == 3
    released = [(e.step, e.group, e.structures) for e in dpm.events if e.kind == "release"]
    # One of three, at step ceil(0.9 * 10) = 9; one of one pair would be more than half.
    assert released == [(9, "singles", tuple(oracle.strongest(singles, 1)))]
    assert dpm.heard == 2


def test_everyone_decaying_is_gated_but_only_those_due_are_judged() -> None:
    toy = make("shared", torch.float64, seed=3)
    rectify = SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.5)
    starts = {0: {"singles": [1, 3]}, 5: {"singles": [0], "pairs": [0]}}
    dpm, gated, rows = run(toy, rectify, starts, 9)
    assert gated == [("singles", 0), ("singles", 1), ("singles", 3), ("pairs", 0)]
    due = {k: oracle.hearing_score(rows[i]) for i, k in ((1, 1), (2, 3))}
    released = [e.structures for e in dpm.events if e.kind == "release"]
    assert released == [tuple(oracle.strongest(due, 1))]


def test_decaying_structures_are_gated_to_the_criterions_value() -> None:
    toy = make("shared", torch.float64, seed=3)
    rectify = SelfRectifying(Hearing(batches=2, gate=0.25), max_share=0.5)
    shown: list[Tensor] = []
    toy.model.relu.register_forward_pre_hook(lambda m, args: shown.append(args[0].detach()))
    run_forward = toy.loss

    def loss(step: int) -> Tensor:
        if step >= 100:
            shown.clear()
            found = run_forward(step)
            with torch.no_grad():
                x, _ = toy.batch(step)
                plain = functional.linear(x, toy.model.body.weight, toy.model.body.bias)
            ratios = shown[0] / plain
            # Singles 1 and 3 decay, and of the pairs the second: rows 6 and 7.
            expected = torch.tensor([1, 0.25, 1, 0.25, 1, 1, 0.25, 0.25, 1]).double()
            assert torch.allclose(ratios, expected.expand_as(ratios), rtol=1e-12)
            return found
        return run_forward(step)

    toy.loss = loss  # type: ignore[method-assign]
    dpm, _, _ = run(toy, rectify, {0: {"singles": [1, 3], "pairs": [1]}}, 9)
    assert dpm.heard == 2


def test_the_threshold_of_a_hearing_can_keep_everyone() -> None:
    toy = make("shared", torch.float64, seed=3)
    rectify = SelfRectifying(Hearing(batches=2, threshold=1), max_share=0.5)
    dpm, _, _ = run(toy, rectify, {0: {"singles": [0, 1, 2]}}, 10)
    assert [e.kind for e in dpm.events] == ["decay", "prune"]
    assert dpm.heard == 2


@pytest.mark.parametrize("control", [RandomRelease, LeastResistant])
def test_controls_of_a_hearing_hold_it_too(control: type) -> None:
    toy = make("shared", torch.float64, seed=3)
    rectify = SelfRectifying(control(Hearing(batches=2, threshold=-1)), max_share=0.5)
    dpm, gated, rows = run(toy, rectify, {0: {"singles": [0, 1, 2]}}, 9)
    released = [(e.step, e.structures) for e in dpm.events if e.kind == "release"]
    assert [(step, len(ks)) for step, ks in released] == [(9, 1)]
    assert dpm.heard == 2
    if control is LeastResistant:
        means = [sum(row) / len(row) for row in rows]
        assert released[0][1] == (gated[means.index(max(means))][1],)


@pytest.mark.parametrize("decayed", [[0, 1, 2, 3], [0]])
def test_no_hearing_is_held_where_nobody_could_be_released(decayed: list[int]) -> None:
    """All four decay and nothing could replace one; or half of one, rounded down, is none."""
    toy = make("shared", torch.float64)
    rectify = SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.5)
    dpm, _, _ = run(toy, rectify, {0: {"singles": decayed}}, 10)
    assert dpm.heard == 0
    assert [e.kind for e in dpm.events] == ["decay", "prune"]
