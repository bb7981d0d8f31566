"""Promise 11: what phases say is what the live parameters are, whatever became of their storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from dpm_core import DecayPruning, GroupError, Phase, PhaseError, SmoothPruning
from tests.support import oracle
from tests.support.snapshot import bits, refused
from tests.support.toys import Toy, make

LENGTH = 5


def swap(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def view(model: nn.Module) -> None:
    """All parameters become parts of one storage, as flattening optimizers do."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()


def two_storages(model: nn.Module) -> None:
    p = next(model.parameters())
    p.data = torch.stack([p.data, p.data], -1)[..., 0]  # its elements are no longer contiguous


EXCHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda m: None,
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "there and back": lambda m: m.float().double(),
    "data": data,
    "swap": swap,
    "view": view,
    "strided": two_storages,
    "apply": lambda m: m._apply(lambda t: t + 0),
    "loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=False),
}


def norms_of(toy: Toy) -> dict[tuple[str, int], float]:
    return {
        (g.name, k): oracle.length(oracle.values(oracle.shares_of(g), k))
        for g in toy.groups
        for k in toy.doomed[g.name]
    }


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(sorted(EXCHANGES)), min_size=9, max_size=9))
def test_the_core_follows_any_exchange_of_storage(exchanges: list[str]) -> None:
    toy = make("conv", torch.float64)
    plain = make("conv", torch.float64)
    steps = {}
    for t in (toy, plain):
        optimizer = SGD(t.model.parameters(), lr=0.1, momentum=0.9)
        dpm = DecayPruning(t.groups, SmoothPruning(LENGTH)).attach(optimizer)
        dpm.decay(t.doomed)
        steps[id(t)] = (optimizer, dpm)
    initial = norms_of(toy)
    for step, exchange in enumerate(exchanges):
        if exchange == "there and back":  # rounds to float32: both have to
            plain.model.float().double()
        EXCHANGES[exchange](toy.model)
        for t in (toy, plain):
            t.train_step(steps[id(t)][0], step)
        left = max(0, LENGTH - step - 1) / LENGTH
        for key, norm in norms_of(toy).items():
            assert norm == pytest.approx(initial[key] * left, rel=1e-5 if left else 0, abs=0)
        for g in toy.groups:
            steps[id(toy)][1].phases(g.name)  # which would refuse a PRUNED one that is not zero
    for p, q in zip(toy.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [2, 7], ids=["decaying", "pruned"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_the_core_follows_to_another_type(kind: torch.dtype, at: int) -> None:
    before = torch.float64 if kind == torch.float32 else torch.float32
    accuracy = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8 * 1.01}
    toy = make("conv", before)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    dpm.decay(toy.doomed)
    # L_init as it was measured, in the type of then.
    state = dpm.state_dict()["groups"]
    initial = {key: float(state[key[0]]["initial"][key[1]]) for key in norms_of(toy)}
    for step in range(10):
        if step == at:
            optimizer.zero_grad()
            toy.model.to(kind)
        toy.train_step(optimizer, step)
        left = max(0, LENGTH - step - 1) / LENGTH
        rel = accuracy[kind if step >= at else before]
        for key, norm in norms_of(toy).items():
            assert norm == pytest.approx(initial[key] * left, rel=rel if left else 0, abs=0)
    assert float(toy.groups[0].norms()[1]) == 0
    assert toy.groups[0].norms().dtype == torch.promote_types(kind, torch.float32)


@pytest.mark.parametrize("phase", ["decaying", "pruned"])
def test_another_shape_is_refused(phase: str) -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    length = 1 if phase == "pruned" else 9
    dpm = DecayPruning(toy.groups, SmoothPruning(length)).attach(optimizer)
    dpm.decay(toy.doomed)
    for step in range(2):
        toy.train_step(optimizer, step)
    optimizer.zero_grad()
    toy.model.conv1.weight.data = toy.model.conv1.weight.data[:5].clone()
    words = ("'conv1.weight'", "'conv1'", "(5, 2, 3, 3)", "(6, 2, 3, 3)", "new groups")
    requests = [optimizer.step, lambda: dpm.decay({"conv1": [0]}), toy.groups[0].norms]
    if phase == "pruned":
        requests.append(lambda: dpm.phases("conv1"))
    for request in requests:
        with refused(GroupError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
            request()


def test_pruned_structures_that_are_not_zero_are_not_reported_as_pruned() -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(1)).attach(optimizer)
    dpm.decay({"conv1": [1, 3, 4]})
    toy.train_step(optimizer, 0)
    with torch.no_grad():
        toy.model.bn1.bias[3] = 1e-30
        toy.model.conv1.weight[4, 0, 0, 0] = float("nan")
    words = ("structures 3, 4 of group 'conv1'", "exactly zero", "zero_in(model)")
    with refused(PhaseError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.phases("conv1")
    assert dpm.phases("conv2").tolist() == [0] * 5
    dpm.zero_in(toy.model)
    assert dpm.phases("conv1").tolist() == [0, 2, 0, 2, 2, 0]
    assert dpm.count(Phase.PRUNED) == 3


def test_the_core_follows_to_a_gpu_and_back(cuda: torch.device) -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(LENGTH)).attach(optimizer)
    dpm.decay(toy.doomed)
    initial = {key: torch.tensor(norm) for key, norm in norms_of(toy).items()}
    for step in range(8):
        device = cuda if step in (1, 2, 6) else torch.device("cpu")
        optimizer.zero_grad()
        toy.model.to(device)
        x, y = (t.to(device) for t in toy.batch(step))
        nn.functional.cross_entropy(toy.model(x), y).backward()
        optimizer.step()
        left = max(0, LENGTH - step - 1) / LENGTH
        for key, norm in norms_of(toy).items():
            assert norm == pytest.approx(float(initial[key]) * left, rel=1e-9, abs=0)
    assert bits(toy.groups[0].norms()[1]).item() == 0
