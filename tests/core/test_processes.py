"""Two processes under DistributedDataParallel against one with the same global batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from dpm_core import (
    DecayPruning,
    DisagreementError,
    GradientError,
    GroupError,
    Hearing,
    RandomRelease,
    SelfRectifying,
    Slice,
    SmoothPruning,
    Trajectory,
)
from dpm_core.hearing import Objective, gate_derivatives
from dpm_core.processes import Processes
from tests.support.ranks import COUNT, Ranks, two
from tests.support.snapshot import assert_says, assert_unchanged, difference, snapshot
from tests.support.toys import Toy, make

STEPS = 12
TRAJECTORY = SelfRectifying(Trajectory(rate=-1, length=-1e9), max_share=0.5)
HEARING = SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two() as started:
        yield started


def frozen(seed: int = 0) -> Toy:
    """Convolutions under BatchNorm in eval mode, so that a sample's loss is its own affair."""
    toy = make("conv", torch.float64, seed)
    toy.model.eval()
    return toy


def share(whole: Tensor, rank: int, count: int) -> Tensor:
    return whole.chunk(count)[rank]


def loss(toy: Toy, forward: nn.Module, step: int, rank: int, count: int) -> Tensor:
    x, y = (share(part, rank, count) for part in toy.batch(step))
    return functional.cross_entropy(forward(x), y)


def train(
    rank: int,
    count: int = COUNT,
    rectify: SelfRectifying | None = TRAJECTORY,
    wrapped_room: bool = False,
) -> dict[str, Any]:
    """A decay with releases and refills, from start to end, of one process's share of batches."""
    toy = frozen()
    optimizer = SGD(toy.model.parameters(), lr=0.05, momentum=0.9)
    forward = DistributedDataParallel(toy.model) if count > 1 else toy.model
    dpm = DecayPruning(toy.groups, SmoothPruning(5), rectify)
    batches = iter(range(100, 200))
    room = forward if wrapped_room else toy.model
    dpm.attach(optimizer, model=room, loss=lambda: loss(toy, room, next(batches), rank, count))
    seen = 0
    for step in range(STEPS):
        if step == 1:
            dpm.decay({"conv1": [0, 2, 3], "conv2": [1, 4]})
        optimizer.zero_grad()
        loss(toy, forward, step, rank, count).backward()
        optimizer.step()
        for event in dpm.events[seen:]:
            if event.kind == "release":
                free = dpm.available(event.group).nonzero().flatten()
                dpm.decay({event.group: free[: len(event.structures)]}, wave=event.wave + 1)
        seen = len(dpm.events)
    dpm.detach()
    return {
        "state": dpm.state_dict(),
        "heard": dpm.heard,
        "model": {name: p.detach().clone() for name, p in toy.model.named_parameters()},
    }


def decisions(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (e["step"], e["kind"], e["group"], e["structures"], e["wave"])
        for e in found["state"]["events"]
    ]


@pytest.mark.parametrize(
    ("rectify", "wrapped_room"),
    [(None, False), (TRAJECTORY, False), (HEARING, False), (HEARING, True)],
    ids=["sp", "trajectory", "hearing", "hearing through the wrapper"],
)
def test_two_processes_and_one_select_and_release_the_same(
    ranks: Ranks, rectify: SelfRectifying | None, wrapped_room: bool
) -> None:
    alone = train(0, 1, rectify)
    left, right = ranks.results(train, COUNT, rectify, wrapped_room)
    kinds = [kind for _, kind, *_ in decisions(alone)]
    assert kinds.count("release") == (0 if rectify is None else 2)
    assert alone["heard"] == left["heard"] == right["heard"] == (2 if rectify is HEARING else 0)
    assert difference(left, right) is None
    assert decisions(left) == decisions(alone)
    for name, p in alone["model"].items():
        torch.testing.assert_close(left["model"][name], p, rtol=1e-9, atol=1e-12)


def heard(rank: int, count: int) -> tuple[Tensor, Tensor]:
    toy, batches = frozen(), iter(range(100, 200))
    room = Objective(toy.model, lambda: loss(toy, toy.model, next(batches), rank, count))
    gated = [torch.tensor([0, 2, 3]), torch.tensor([1, 4])]
    return gate_derivatives(room, toy.groups, gated, 2, 1e-3, Processes.found())


def test_a_hearing_weighs_the_samples_of_all_processes(ranks: Ranks) -> None:
    alone = heard(0, 1)
    assert bool((alone[1] > 0).all())
    for found in ranks.results(heard, COUNT):
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def unevenly_heard(rank: int, count: int) -> tuple[Tensor, Tensor]:
    toy = frozen()
    x, y = toy.batch(100)
    mine = slice(None) if count == 1 else slice(None, 4) if rank == 0 else slice(4, None)
    room = Objective(toy.model, lambda: functional.cross_entropy(toy.model(x[mine]), y[mine]))
    return gate_derivatives(
        room, toy.groups, [torch.tensor([0]), torch.tensor([1])], 1, 1e-3, Processes.found()
    )


def test_shares_of_a_hearing_may_be_uneven(ranks: Ranks) -> None:
    alone = unevenly_heard(0, 1)
    for found in ranks.results(unevenly_heard, COUNT):
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- disagreement


def disagree(rank: int, how: str) -> str:
    """Ten steps in which rank 1 does something else; the error, once nothing was changed by it."""
    odd = rank == 1
    toy = frozen(seed=rank if how == "another start" else 0)
    rectify = SelfRectifying(RandomRelease(Trajectory(rate=-1, length=-1e9)), max_share=0.5)
    if how == "another setting" and odd:
        rectify = TRAJECTORY
    dpm = DecayPruning(toy.groups, SmoothPruning(5), rectify)
    if how == "another release" and odd:
        object.__setattr__(rectify.criterion, "choose", _choose_first)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    alone = how in ("no averaging", "another start")
    forward = toy.model if alone else DistributedDataParallel(toy.model)
    dpm.attach(optimizer)
    before: dict[str, Any] = {}
    try:
        for step in range(10):
            if step == (4 if how == "another moment" and odd else 2):
                dpm.decay({"conv1": [0, 2, 3 if how == "another choice" and odd else 4, 5]})
            if how == "a decay that others have not" and step == 3 and odd:
                dpm.decay({"conv2": [1]})
            optimizer.zero_grad()
            averaged = how != "a step that is not averaged" or step != 3
            with nullcontext() if averaged else forward.no_sync():
                loss(toy, forward, step, rank, COUNT).backward()
            before = snapshot(toy.model, optimizer, dpm)
            optimizer.step()
            if how == "another checkpoint" and step == 6 and odd:
                dpm.load_state_dict({**dpm.state_dict(), "clock": 9})
    except DisagreementError as error:
        assert_unchanged(before, toy.model, optimizer, dpm)
        return f"step {step}: {error}"
    return "no error"


def _choose_first(evidence: Any, limits: Tensor, step: int) -> Tensor:
    return torch.arange(len(evidence.group)) < int(limits.sum())


DISAGREEMENTS = {
    "another choice": ("step 2", "structure 3 of group 'conv1' is DECAYING", "on rank 1, not on"),
    "another moment": ("step 2", "structure 0", "since step 2", "on rank 0, not on rank 1"),
    "a decay that others have not": ("step 3", "structure 1 of group 'conv2'", "on rank 1, not"),
    "another start": ("step 2", "norms that decays started from", "other weights"),
    "no averaging": ("step 2", "norms that decays started from", "averages their gradients"),
    "a step that is not averaged": ("step 3", "the gradients", "not averaged", "no_sync()"),
    "another release": ("step 5", "what is released", "on rank 1, not on rank 0"),
    "another setting": ("step 0", "groups and settings", "Trajectory", "on rank 1"),
    "another checkpoint": ("step 7", "steps done (7 on rank 0, 9 on rank 1)", "one checkpoint"),
}


@pytest.mark.parametrize("how", DISAGREEMENTS)
def test_a_process_that_differs_stops_all_of_them(ranks: Ranks, how: str) -> None:
    for said in ranks.results(disagree, how):
        assert_says(ValueError(said), "Rank 1 differs from rank 0", *DISAGREEMENTS[how])


def stumble(rank: int) -> str:
    """The loss of rank 1 alone is not finite in a hearing."""
    toy = frozen()
    forward = DistributedDataParallel(toy.model)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(5), HEARING)
    dpm.attach(
        optimizer,
        model=toy.model,
        loss=lambda: loss(toy, toy.model, 100, rank, COUNT) * (float("nan") if rank else 1),
    )
    dpm.decay({"conv1": [0, 2, 3]})
    before: dict[str, Any] = {}
    try:
        for step in range(5):
            optimizer.zero_grad()
            loss(toy, forward, step, rank, COUNT).backward()
            before = snapshot(toy.model, optimizer, dpm)
            optimizer.step()
    except (DisagreementError, GradientError) as error:
        assert_unchanged(before, toy.model, optimizer, dpm)
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_hearing_that_fails_in_one_process_fails_in_all(ranks: Ranks) -> None:
    there, here = ranks.results(stumble)
    assert there == "DisagreementError: a hearing failed on rank 1, which says why"
    assert here.startswith("GradientError: the loss of a hearing is nan")


def leave(rank: int) -> float:
    """Rank 1 ends its run; how long rank 0 then waited."""
    toy = frozen()
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(5)).attach(optimizer)
    optimizer.step()
    if rank == 1:
        dpm.detach()
        return 0.0
    started = time.perf_counter()
    with pytest.raises(DisagreementError, match="another process has ended"):
        optimizer.step()
    return time.perf_counter() - started


def test_a_process_that_is_gone_is_not_waited_for(ranks: Ranks) -> None:
    assert max(ranks.results(leave)) < 30


def overflow(rank: int) -> list[str]:
    """Gradients that are not finite in any process are the affair of each: all say the same."""
    toy = frozen()
    forward = DistributedDataParallel(toy.model)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(5)).attach(optimizer)
    dpm.decay({"conv1": [0]})
    found = []
    for scale in (float("inf") if rank else 1.0, 1.0):
        optimizer.zero_grad()
        (loss(toy, forward, 0, rank, COUNT) * scale).backward()
        try:
            optimizer.step()
        except GradientError as error:
            found.append(str(error))
    return [*found, str(dpm.clock)]


def test_a_gradient_that_is_not_finite_is_refused_by_all_and_training_goes_on(
    ranks: Ranks,
) -> None:
    left, right = ranks.results(overflow)
    assert left == right
    assert_says(ValueError(left[0]), "structure 0", "not finite")
    assert left[1:] == ["1"]


# ---------------------------------------------------------------------- what costs nothing


def test_one_process_compares_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective in one process")

    for name in ("new_group", "all_gather", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(dist, name, never)
    assert [kind for _, kind, *_ in decisions(train(0, 1))].count("release") == 2


def test_a_group_of_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert Processes.found() is None
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- sharded parameters


def sharded(rank: int, kind: str) -> list[str]:
    """What is said of each parameter of a model that FSDP has taken over."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (COUNT,)))
    else:
        model = FullyShardedDataParallel(
            model, use_orig_params=kind == "original", device_id=torch.device("cpu")
        )
    said = []
    for name, parameter in model.named_parameters():
        for made in (Slice.whole, lambda p, name: Slice(p, torch.arange(2), name=name)):
            with pytest.raises(GroupError) as caught:
                made(parameter, name=name)
            said.append(str(caught.value))
    return said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fully_shard", "flat", "original"])
def test_parameters_of_fsdp_are_refused(ranks: Ranks, kind: str) -> None:
    for said in ranks.results(sharded, kind):
        assert len(said) == (2 if kind == "flat" else 8)
        for text in said:
            assert_says(ValueError(text), "sharded", "FSDP", "DistributedDataParallel", "prune")
