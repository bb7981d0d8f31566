"""Scores against numerical derivatives, selection against plain Python, and the whole loop."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.optim import SGD

from dpm_core.adapters.base import count_macs, count_parameters
from dpm_core.third_party.gate_decorator import (
    GatedBatchNorm,
    GateDecorator,
    GateError,
    GateScores,
    TickTock,
    Turn,
    gated,
    learning_rate,
    protected,
    select,
    turn_at,
)
from tests.support import rounding
from tests.support.rounding import in_double
from tests.support.snapshot import difference, refused, same_bits, says
from tests.third_party.gate_nets import LABELS, SMALL, gate_all, some, tied

# ---------------------------------------------------------------------------- scores


def test_scores_are_the_derivative_by_the_gate_times_the_gate():
    model = tied().double().train()
    table = gate_all(model, SMALL.double())
    table.mask(table.ids(table.groups[1].name, [2]))
    scores = GateScores(table)
    batches = [SMALL.double(), SMALL.double().flip(0) * 1.3]

    def loss(images):
        return functional.cross_entropy(model(images), LABELS)

    for images in batches:
        model.zero_grad()
        loss(images).backward()
        scores.add()
    assert scores.batches == 2

    eps, expected = 1e-6, {}
    for name, gate in table.gates.items():
        expected[name] = [0.0] * len(gate.gate)
        for c in range(len(gate.gate)):
            value = gate.gate[c].item()
            for images in batches:
                losses = []
                for moved in (value + eps, value - eps):
                    with torch.no_grad():
                        gate.gate[c] = moved
                        losses.append(loss(images).item())
                with torch.no_grad():
                    gate.gate[c] = value
                expected[name][c] += abs((losses[0] - losses[1]) / (2 * eps) * value)
    totals = scores.of_structures()
    assert totals.shape == (28,)
    for group in table.groups:
        sums = [
            sum(expected[n][c] for n, index in group.members.items() for c in index[k].tolist())
            for k in range(group.structures)
        ]
        close = torch.tensor(sums, dtype=torch.float64)
        torch.testing.assert_close(totals[table.ids(group.name)], close, rtol=1e-4, atol=1e-8)
    assert totals[table.ids(table.groups[1].name, [2])] == 0
    assert totals.count_nonzero() == 27
    scores.reset()
    assert scores.of_structures().count_nonzero() == scores.batches == 0


def test_scores_go_round_and_refuse_what_is_not_theirs():
    model = tied()
    table = gate_all(model, SMALL)
    scores = GateScores(table)
    with refused(GateError, "after backward", model=model):
        scores.add()
    functional.cross_entropy(model(SMALL), LABELS).backward()
    scores.add()
    fresh = GateScores(table)
    fresh.load_state_dict(scores.state_dict())
    assert same_bits(fresh.of_structures(), scores.of_structures())
    assert fresh.batches == 1
    scores.add()
    assert not torch.equal(fresh.total, scores.total)
    with says(GateError, "of 3 gates", "40"):
        fresh.load_state_dict({"total": torch.ones(3), "batches": 9})
    assert fresh.batches == 1


# ---------------------------------------------------------------------------- selection


def by_hand(scores, alive, group, fraction, filters, keep, eta, areas, spared, more) -> list[int]:
    """The rule of selection in plain Python."""
    structures = range(len(scores))
    safe = set()
    for g in set(group):
        members = [s for s in structures if group[s] == g]
        living = sorted((s for s in members if alive[s]), key=lambda s: (scores[s], s))
        safe |= set(living[-max(1, int(keep * len(members))) :])
    left = {g: sum(alive[s] for s in structures if group[s] == g) for g in set(group)}
    free = [
        s for s in structures if alive[s] and s not in safe and scores[s] != 0 and not spared[s]
    ]
    free.sort(key=lambda s: (scores[s] - eta * areas[group[s]] * left[group[s]], s))
    n = max(1, int(fraction * sum(filters[s] for s in structures if alive[s])))
    return free[: n + more]


@given(data=st.data())
def test_selection_follows_the_rule(data):
    sizes = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    group = data.draw(st.permutations(group))
    n = len(group)

    def draw(values):
        return data.draw(st.lists(values, min_size=n, max_size=n))

    # Few distinct scores: ties, and zeros.
    scores = [s / 4 for s in draw(st.integers(0, 6))]
    alive, filters = draw(st.booleans()), draw(st.integers(1, 3))
    fraction = data.draw(st.sampled_from([0.01, 0.25, 0.5, 1.0]))
    keep, eta = data.draw(st.sampled_from([0.0, 0.1, 0.5])), data.draw(st.sampled_from([0, 0.125]))
    areas = [2.0**g for g in range(len(sizes))]
    spared, more = draw(st.booleans()), data.draw(st.integers(0, 2))
    chosen = select(
        torch.tensor(scores),
        torch.tensor(alive),
        torch.tensor(group),
        fraction,
        filters=torch.tensor(filters),
        keep=keep,
        eta=eta,
        areas=torch.tensor(areas),
        spared=torch.tensor(spared),
        more=more,
    )
    settings = (fraction, filters, keep, eta, areas, spared, more)
    assert chosen.tolist() == by_hand(scores, alive, group, *settings)


def test_each_groups_best_stay():
    scores = torch.arange(1.0, 61)
    group = torch.tensor([0] * 35 + [1] * 5 + [2] * 20)
    alive = torch.ones(60, dtype=torch.bool)
    chosen = select(scores, alive, group, 1.0)
    safe = sorted(set(range(60)) - set(chosen.tolist()))
    assert safe == [32, 33, 34, 39, 58, 59]  # 3 of 35, 1 of 5, 2 of 20
    assert protected(torch.tensor([35, 5, 20])).tolist() == [3, 1, 2]
    # What is left of a group counts, not what it had.
    alive[33:35] = False
    assert 32 not in select(scores, alive, group, 1.0).tolist()
    assert 29 in select(scores, alive, group, 1.0).tolist()


def test_zero_scores_and_the_dead_stay():
    scores = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    alive = torch.ones(10, dtype=torch.bool)
    alive[2] = False
    group = torch.zeros(10, dtype=torch.int64)
    assert select(scores, alive, group, 0.25).tolist() == [1, 3]
    assert select(scores, alive, group, 0.01).tolist() == [1]
    assert select(torch.zeros(10), alive, group, 1.0).tolist() == []


def test_the_term_for_flops_prefers_large_maps_with_many_left():
    scores = torch.tensor([1.0, 5, 9, 1.5, 5.25, 9.5])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    alive, areas = torch.ones(6, dtype=torch.bool), torch.tensor([1.0, 4.0])
    assert select(scores, alive, group, 0.4).tolist() == [0, 3]
    # 1 - 0.5 * 3 and 5 - 0.5 * 3 against 1.5 - 0.5 * 12 and 5.25 - 0.5 * 12
    assert select(scores, alive, group, 0.4, eta=0.5, areas=areas).tolist() == [3, 4]
    alive[3] = False  # two left: 5.25 - 0.5 * 8 = 1.25
    assert select(scores, alive, group, 0.4, eta=0.5, areas=areas).tolist() == [0, 4]


def test_tied_gates_count_each():
    scores, group = torch.arange(1.0, 11), torch.zeros(10, dtype=torch.int64)
    alive, filters = torch.ones(10, dtype=torch.bool), torch.full((10,), 3)
    assert len(select(scores, alive, group, 0.1)) == 1
    assert len(select(scores, alive, group, 0.1, filters=filters)) == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"fraction": 0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"keep": -0.1}, "keep"),
        ({"eta": -1.0}, "eta"),
        ({"more": -1}, "more"),
        ({"spared": torch.ones(3, dtype=torch.bool)}, "shape"),
        ({"eta": 1.0}, "areas"),
        ({"eta": 1.0, "areas": torch.ones(3)}, "areas"),
        ({"filters": torch.ones(3, dtype=torch.int64)}, "shape"),
        ({"alive": torch.ones(3, dtype=torch.bool)}, "shape"),
        ({"scores": torch.tensor([1.0, -1, 2, 3])}, "negative"),
        ({"scores": torch.tensor([1.0, torch.nan, 2, 3])}, "finite"),
        ({"scores": torch.tensor([1.0, torch.inf, 2, 3])}, "finite"),
    ],
)
def test_selection_refuses_bad_input(change, word):
    given_values = {
        "scores": torch.arange(1.0, 5),
        "alive": torch.ones(4, dtype=torch.bool),
        "group": torch.tensor([0, 0, 1, 1]),
        "fraction": 0.5,
    }
    assert len(select(**given_values)) == 2
    with says(GateError, word):
        select(**(given_values | change))


def test_a_dead_structures_score_may_be_anything():
    scores = torch.tensor([torch.nan, 1.0, 2.0])
    alive, group = torch.tensor([False, True, True]), torch.zeros(3, dtype=torch.int64)
    assert select(scores, alive, group, 1.0).tolist() == [1]


# ---------------------------------------------------------------------------- the whole loop

TIMES = TickTock(2, tock_epochs=2, ticks=3)


def counts(model: nn.Module) -> dict[str, int]:
    return {"macs": count_macs(model, SMALL), "parameters": count_parameters(model)}


class Run:
    """The loop of GateDecorator's docstring, which can stop and go on."""

    def __init__(self, **options: Any) -> None:
        self.model = in_double(tied())
        self.decorator = GateDecorator(self.model, SMALL, fraction=0.05, **options)
        self.optimizer = SGD(self.model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        self.step = 0
        self.taken: list[tuple[int, dict[str, list[int]]]] = []

    def go(self, target: int, steps: int = 1000) -> None:
        end = self.step + steps
        while self.decorator.cost() > target and self.step < end:
            turn = turn_at(self.step, TIMES)
            self.decorator.begin(turn)
            self.optimizer.param_groups[0]["lr"] = learning_rate(turn)
            self.optimizer.zero_grad()
            images = SMALL.roll(self.step, 0)
            functional.cross_entropy(self.model(images), LABELS.roll(self.step)).backward()
            self.decorator.after_backward(turn)
            self.optimizer.step()
            assert self.decorator.scores.batches == (turn.step + 1 if turn.kind == "tick" else 0)
            gone = self.decorator.end(turn, target)
            if gone:
                self.taken.append((self.step, gone))
            self.step += 1


@pytest.mark.parametrize("counted", ["macs", "parameters"])
def test_a_run_meets_its_target_and_melts(counted):
    run = Run(counted=counted)
    dense = run.decorator.cost()
    assert dense == run.decorator.costs.dense == counts(tied())[counted]
    target = int(0.4 * dense)
    assert run.decorator.least() < target
    run.go(target)
    assert all(turn_at(s, TIMES).kind == "tick" and turn_at(s, TIMES).last for s, _ in run.taken)
    assert max(sum(map(len, gone.values())) for _, gone in run.taken) == int(0.05 * 40)
    # Without the last one taken it would not be met.
    alive = run.decorator.table.alive()
    last_group = list(run.taken[-1][1])
    short = [
        run.decorator.costs.of(run.decorator.table.kept(alive) + torch.eye(2, dtype=torch.int64)[i])
        for i, g in enumerate(run.decorator.groups)
        if g.name in last_group
    ]
    assert max(short) > target >= run.decorator.cost()
    run.model.eval()
    expected, left = run.model(SMALL), (run.decorator.macs(), run.decorator.cost())
    plan = run.decorator.melt(SMALL)
    rounding.assert_exact(run.model(SMALL), expected)
    assert left == (counts(run.model)["macs"], counts(run.model)[counted])
    taken = {name: [] for name, _ in plan}
    for _, gone in run.taken:
        for name, structures in gone.items():
            taken[name] += structures
    assert plan == [(name, sorted(taken[name])) for name, _ in plan]
    assert all(p.requires_grad for p in run.model.parameters())


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 9])
def test_a_run_stopped_and_resumed_ends_in_the_same_bits(stop):
    whole, first, second = Run(), Run(), Run()
    whole.go(0, 14)
    first.go(0, stop)
    saved = copy.deepcopy(
        (first.model.state_dict(), first.optimizer.state_dict(), first.decorator.state_dict())
    )
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.decorator.load_state_dict(saved[2])
    second.step = stop
    second.go(0, 14 - stop)
    assert len(whole.taken) == 3
    assert difference(whole.model.state_dict(), second.model.state_dict()) is None
    assert difference(whole.optimizer.state_dict(), second.optimizer.state_dict()) is None


@pytest.mark.parametrize(("counted", "word"), [("macs", "MACs"), ("parameters", "parameters")])
def test_a_run_that_can_go_no_further_says_so(counted, word):
    run = Run(counted=counted)
    run.decorator.scores.total.fill_(1.0)
    run.decorator.table.mask(torch.arange(28)[run.decorator.selected()])
    run.decorator.fraction = 1.0
    assert set(run.decorator.prune()) == {g.name for g in run.decorator.groups}
    assert run.decorator.cost() == run.decorator.least()
    with refused(GateError, f"{run.decorator.least()} {word},", "keep", model=run.model):
        run.decorator.prune()


@pytest.mark.parametrize("counted", ["macs", "parameters"])
def test_a_target_ends_the_selection_where_it_is_met(counted):
    decorator = Run(counted=counted).decorator
    decorator.fraction = 0.3
    decorator.scores.total.copy_(torch.arange(40.0, 0, -1))
    every = decorator.selected()
    assert len(every) == 12
    alive = decorator.table.alive()
    for n in range(len(every)):
        alive[every[n]] = False
        for target in (decorator.cost(alive), decorator.cost(alive) + 1):
            assert decorator.selected(target).tolist() == every[: n + 1].tolist()
    assert decorator.selected(decorator.cost(alive) - 1).tolist() == every.tolist()


def test_the_settings_reach_the_selection():
    def selected(**options):
        decorator = GateDecorator(tied(), SMALL, **({"fraction": 1.0} | options))
        decorator.scores.total.copy_(torch.arange(40.0, 0, -1))
        return decorator.selected().tolist()

    usual = selected()
    assert len(selected(keep=0.5)) < len(usual) == 26
    assert selected(eta=50.0) != usual
    assert len(selected(fraction=0.3)) == 12
    decorator = GateDecorator(in_double(tied()), SMALL, fraction=0.1, strength=0.5)
    functional.cross_entropy(decorator.model(SMALL), LABELS).backward()
    before = decorator.model.norm.gate.grad.clone()
    decorator.after_backward(Turn("tock", 0, 0, 3))
    added = decorator.model.norm.gate.grad - before
    rounding.assert_exact(added, 0.5 * decorator.model.norm.gate.sign())
    assert decorator.end(Turn("tock", 0, 2, 3)) == decorator.end(Turn("tick", 0, 1, 3)) == {}


def test_selected_honours_what_counts_as_left_and_masks_nothing():
    run = Run()
    run.decorator.scores.total.copy_(torch.arange(1.0, 41))
    first = run.decorator.selected()
    alive = run.decorator.table.alive()
    assert bool(alive.all())
    alive[first] = False
    second = run.decorator.selected(alive=alive)
    spared = torch.zeros_like(alive)
    spared[second[0]] = True
    third = run.decorator.selected(None, alive, spared, more=1)
    assert third[: len(second)].tolist() == [*second[1:].tolist(), third[len(second) - 1].item()]
    assert len(third) == len(second) + 1
    assert not set(first.tolist()) & set(second.tolist())
    assert run.decorator.macs(alive) < run.decorator.macs() == run.decorator.costs.dense


@cache
def untouched() -> Run:
    return Run()


@given(data=st.data())
def test_as_many_may_come_back_as_the_target_allows(data):
    run = untouched()
    table, sizes = run.decorator.table, run.decorator.table.sizes.tolist()
    staying = [data.draw(st.integers(0, n)) for n in sizes]
    going = [data.draw(st.integers(0, n - s)) for n, s in zip(sizes, staying, strict=True)]
    target = data.draw(st.integers(run.decorator.least() - 10, run.decorator.costs.dense))

    def cost(share: int) -> int:
        """With what stays, what is protected, and this share of what goes."""
        alive = torch.zeros_like(table.alive())
        for g, (n, s, more) in enumerate(zip(sizes, staying, going, strict=True)):
            left = min(n, max(1, int(0.01 * n)) + s + more * share // max(max(going), 1))
            alive[(table.group == g).nonzero()[:left, 0]] = True
        return run.decorator.cost(alive)

    share = max([s for s in range(max(going) + 1) if cost(s) <= target], default=0)
    expected = [n * share // max(max(going), 1) for n in going]
    found = run.decorator.releasable(torch.tensor(staying), torch.tensor(going), target)
    assert found.tolist() == expected


@pytest.mark.parametrize("options", [{"fraction": 0}, {"keep": 2}, {"eta": -1}, {"strength": -1}])
def test_a_run_refuses_bad_settings_before_any_gate(options):
    model = tied()
    with refused(GateError, next(iter(options)), model=model):
        GateDecorator(model, SMALL, **({"fraction": 0.1} | options))
    assert not gated(model)


def test_ignored_layers_get_no_gates():
    decorator = GateDecorator(tied(), SMALL, fraction=0.1, ignored=["norm"])
    assert list(decorator.gates) == ["inner_norm"]
    assert isinstance(decorator.model.inner_norm, GatedBatchNorm)
    decorator.table.mask(some(decorator.table))
    assert [name for name, _ in decorator.melt(SMALL)] == ["inner"]
    assert decorator.model.stem.out_channels == 12
