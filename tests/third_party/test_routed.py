"""Networks in which values decide what runs: experts, loops to convergence, checked parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpm_core import SmoothPruning
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.third_party import dependency, graph, running, trial
from dpm_core.third_party.groups import Share, UnsupportedLayerError, UpstreamGroup

ROWS = torch.randn(40, 10, generator=torch.Generator().manual_seed(4))


class Experts(nn.Module):
    """A residual mixture of experts, each of which reads the rows that the router gives it."""

    def __init__(self, widths: list[int], best: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem, self.router = nn.Linear(10, 8), nn.Linear(10, len(widths))
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 8)) for w in widths
            )
            self.head = nn.Linear(8, 3)
        self.best = best

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.stem(x))
        share, chosen = self.router(x).softmax(-1).topk(self.best, -1)
        out = h
        for k, expert in enumerate(self.experts):
            row, place = torch.where(chosen == k)
            if len(row):
                out = out.index_add(0, row, expert(h[row]) * share[row, place, None])
        return self.head(out)


class Checked(nn.Module):
    """The forward pass refuses values of a parameter that a distribution cannot have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 9), nn.Linear(9, 3)
        self.sigma, self.weights = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        mean = self.b(torch.relu(self.a(x)))
        odds = torch.distributions.Categorical(probs=self.weights).probs
        return torch.distributions.Normal(mean, self.sigma).log_prob(torch.zeros(3)) + odds


class Converging(nn.Module):
    """A loop that ends where a step changes little, beside what the state has become."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 9), nn.Linear(9, 3)
        self.again = nn.Linear(9, 9, bias=False)
        with torch.no_grad():
            self.again.weight.mul_(0.2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        state, steps = torch.zeros_like(x), 0
        while True:
            new = 0.3 * self.again(state) + x
            with torch.no_grad():
                moved, size = float((new - state).abs().max()), float(new.abs().max())
            if moved < 1e-4 * size:
                return self.b(new)
            state, steps = new, steps + 1
            if steps > 1000:
                raise RuntimeError("the loop does not end")


def decayed(model: nn.Module, example: Tensor) -> tuple[nn.Module, DepGraph]:
    """A model with half of its structures at zero, and the run that is about to remove them."""
    options = DepGraphOptions(ratio=0.5, skip_unsupported=True, global_pruning=False)
    run = DepGraph(model, example, options, SmoothPruning(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    run.attach(optimizer)
    while not run.due:
        optimizer.zero_grad()
        model(example).pow(2).mean().backward()
        optimizer.step()
    return copy.deepcopy(model), run


def assert_same(large: nn.Module, small: nn.Module, example: Tensor) -> None:
    with torch.no_grad():
        before, after = (copy.deepcopy(m).double()(example.double()) for m in (large, small))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@settings(max_examples=8, deadline=None)
@given(
    widths=st.lists(st.integers(3, 6), min_size=2, max_size=4),
    best=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_experts_of_hard_routes_are_pruned_or_named(widths, best, seed):
    model = Experts(widths, best, seed)
    try:
        large, run = decayed(model, ROWS)
        removed = run.remove()
    except UnsupportedLayerError as why:
        if "give an example that runs all of them" not in str(why):
            raise
        return  # the router has come to leave an expert out
    assert_same(large, model, ROWS)
    layers = {f"experts.{k}.0" for k in range(len(widths))}
    assert layers <= {name for name, _ in removed} | set(run.skipped)


@pytest.mark.parametrize("model", [Checked, Converging])
def test_what_runs_is_read_with_the_values_that_the_model_has(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = model()
    large, run = decayed(small, ROWS)
    assert {name for name, _ in run.remove()} >= {"a"}
    assert_same(large, small, ROWS)


@settings(max_examples=10, deadline=None)
@given(parts=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_what_stays_of_each_parameter_is_what_a_removal_leaves(parts, seed):
    draw = torch.Generator().manual_seed(seed)
    model = Experts([6, 5], 2, seed)
    plan: list[Any] = []
    for _ in range(parts):  # a layer that occurs again begins the next removal
        channel = int(torch.randint(3, (), generator=draw))
        plan += [("experts.0.0", [channel]), ("experts.1.0", [channel])]
    stays = dependency.survivors(model, ROWS, plan)
    small = copy.deepcopy(model)
    dependency.take_out(small, ROWS, plan)
    for name, parameter in small.named_parameters():
        value = model.get_parameter(name)
        for dim, index in enumerate(stays[name]):
            value = value.index_select(dim, index)
        assert torch.equal(parameter, value)


def test_a_layer_that_the_trial_does_not_run_is_named_with_the_cause():
    model = Experts([5, 5], 1)
    with torch.no_grad():
        model.router.bias[1] = 1e3
        model.router.weight.zero_()
    weight = model.get_parameter("experts.0.0.weight")
    index = [[k] for k in range(5)]
    shares = [Share("experts.0.0.weight", weight, 0, False, index)]
    group = UpstreamGroup("experts.0.0", index, shares=shares)
    (why,) = trial.inexact(model, ROWS, [group]).values()
    assert "'experts.0.0' is not in the graph" in why
    assert "which layers run, as in a mixture of experts" in why
    with pytest.raises(UnsupportedLayerError, match=r"'experts.0.0' is not in the graph"):
        dependency.take_out(model, ROWS, [("experts.0.0", [1])])


class ByWeight(nn.Module):
    """A layer whose parameters are used without it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Any:
        weight = nn.functional.normalize(self.b.weight, dim=1)
        return self.c(torch.relu(nn.functional.linear(torch.relu(self.a(x)), weight, self.b.bias)))


def test_a_layer_that_is_used_by_its_weight_alone_is_named():
    model = ByWeight()
    with pytest.raises(UnsupportedLayerError, match=r"'b' is not in the graph: .* its parameters"):
        graph.tables(model, ROWS, ["b"])
    running.outputs(model, ROWS)  # it is as it was


class Branching(nn.Module):
    """Long inputs go through a block that short ones do not; another is never run."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.a, self.o = nn.Linear(10, 9), nn.Linear(9, 3)
        self.long = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return self.o(self.long(h) if len(x) > self.length else h)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [10, 100])
def test_parts_that_the_example_does_not_run_are_named(skip, length):
    run = DepGraph(
        Branching(length),
        ROWS,
        DepGraphOptions(ratio=0.5, skip_unsupported=skip),
        SmoothPruning(3),
    )
    assert set(run.skipped) == ({"long", "idle"} if length > len(ROWS) else {"idle"})
    run.check()


class Attending(nn.Module):
    """One attention without heads, whose values have another width than queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.o = nn.Linear(10, 9), nn.Linear(6, 8), nn.Linear(8, 3)
        self.query, self.key, self.value = nn.Linear(9, 5), nn.Linear(9, 5), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        share = (self.query(x) @ self.key(x).transpose(-2, -1)).softmax(-1)
        return self.o(torch.relu(self.w(share @ self.value(x))))


def test_every_layer_that_a_refusal_leaves_is_named():
    model = Attending()
    options = DepGraphOptions(ratio=0.5, skip_unsupported=True)
    run = DepGraph(model, ROWS.view(4, 10, 10), options, SmoothPruning(3))
    said = " ".join(run.skipped.values())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "o":
            assert name in run.grouped() or repr(name) in said, name
