"""Promise 8: no loop over structures, and at most one wait for the device in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dpm_core import (
    DecayPruning,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
    Trajectory,
    stepping,
)
from tests.support.device import Watch
from tests.support.toys import Toy, make

EVERYONE = Trajectory(rate=-1, length=-1e9)
POLICIES: dict[str, SelfRectifying | None] = {
    "sp": None,
    "effect": SelfRectifying(EVERYONE, max_share=0.5),
    "keep": SelfRectifying(EVERYONE, max_share=0.5, restore="keep"),
    "random": SelfRectifying(RandomRelease(EVERYONE), max_share=0.5),
    "least": SelfRectifying(LeastResistant(EVERYONE), max_share=0.5),
}


def on_device(toy: Toy) -> list[Tensor]:
    return [*toy.model.parameters(), *(s.index for g in toy.groups for s in g.slices)]


def attach_watched(
    dpm: DecayPruning, optimizer: Optimizer, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Attach with the watch armed inside the core's own hooks; the returned list counts reads."""
    reads: list[int] = []

    def to_host(values: Tensor) -> Tensor:
        assert watch.on_device(values)
        reads.append(1)
        with watch.off():
            return values.detach().clone()

    monkeypatch.setattr(stepping, "_to_host", to_host)
    optimizer.register_step_pre_hook(watch.arm)
    optimizer.register_step_post_hook(watch.arm)
    dpm.attach(optimizer)
    optimizer.register_step_pre_hook(watch.disarm)
    optimizer.register_step_post_hook(watch.disarm)
    return reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_reads_from_the_device_once_and_waits_for_nothing_else(
    policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make("conv", dtype)
    optimizer = SGD(toy.model.parameters(), lr=0.1, momentum=0.9)
    watch = Watch(on_device(toy))
    dpm = DecayPruning(toy.groups, SmoothPruning(4), POLICIES[policy])
    reads = attach_watched(dpm, optimizer, watch, monkeypatch)
    waits: dict[int, list[str]] = {}
    # The second decay, which but for sp is released at step 5, and the step after the last zero.
    last = 7 if policy == "sp" else 6
    with watch:
        for step in range(9):
            if step == 2:
                dpm.decay({"conv1": [0, 1, 4], "conv2": [2, 3]})
            if step == 3:
                dpm.decay({"conv1": [2]})
            toy.backward(optimizer, step)
            assert all(watch.on_device(p.grad) for p in toy.model.parameters())
            reads.clear()
            watch.waits.clear()
            optimizer.step()
            waits[step] = list(watch.waits)
            assert len(reads) == (2 <= step <= last)
    kinds = {e.kind for e in dpm.events}
    assert kinds == ({"decay", "prune"} if policy == "sp" else {"decay", "prune", "release"})
    # Steps of every kind: before a decay, in it, releasing, finishing, and long afterwards.
    assert waits == {step: [] for step in range(9)}


def test_the_watch_sees_what_would_wait() -> None:
    """Else the test above could not fail."""
    p = torch.arange(4.0)
    mask, rows = torch.ones(4, dtype=torch.bool), torch.tensor([0])
    waiting = {
        "item": lambda: p.sum().item(),
        "bool": lambda: bool((p > 0).all()),
        "float": lambda: float(p[0]),
        "tolist": lambda: p.tolist(),
        "cpu": lambda: p.cpu(),
        "numpy": lambda: p.numpy(),
        "nonzero": lambda: (p * 2).nonzero(),
        "unique": lambda: p.unique(),
        "mask": lambda: p[p > 1],
        "where": lambda: torch.where(p > 1),
        "equal": lambda: torch.equal(p, p),
        "copy": lambda: torch.zeros(4).copy_(p),
        "put": lambda: torch.zeros(4).index_put_((rows,), p[:1]),
        "host rows": lambda: p[rows],
        "blocking": lambda: mask.to(p.device),
        "blocking by name": lambda: mask.to(device=p.device),
        "to the host": lambda: p.to("cpu"),
    }
    waitless = {
        "arithmetic": lambda: (p * 2 + torch.ones((), device=p.device)).sum(),
        "where": lambda: torch.where(p > 1, p, 0.0),
        "host": lambda: [bool(mask.all()), mask.nonzero(), mask.tolist(), rows.unique()],
        "gather": lambda: p[rows.to(p.device, non_blocking=True)],
        "detach": lambda: p.detach().clone(),
    }
    for cases, expected in ((waiting, True), (waitless, False)):
        for name, case in cases.items():
            watch = Watch([p])
            watch.arm()
            with watch:
                case()
            assert bool(watch.waits) == expected, name


# ---------------------------------------------------------------------- cost


def wide(structures: int) -> Toy:
    model = nn.Sequential()
    model.body, model.norm = nn.Linear(3, structures), nn.BatchNorm1d(structures)
    model.head = nn.Linear(structures, 3)
    slices = [
        Slice.whole(model.body.weight),
        Slice.whole(model.norm.weight, batch_norm=True),
        Slice.whole(model.norm.bias, batch_norm=True),
        Slice.whole(model.head.weight, 1),
    ]
    return Toy(model, [StructureGroup("body", slices)], {}, (3,))


def operations(structures: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """The operations of each step's hooks over two waves of decays."""
    toy = wide(structures)
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    watch = Watch(on_device(toy))
    dpm = DecayPruning(toy.groups, SmoothPruning(4), POLICIES[policy])
    attach_watched(dpm, optimizer, watch, monkeypatch)
    counts = []
    with watch:
        for step in range(9):
            if step in (1, 3):
                half = range(structures // 4)
                dpm.decay({"body": [k + (structures // 4) * (step == 3) for k in half]})
            toy.backward(optimizer, step)
            watch.operations.clear()
            optimizer.step()
            counts.append(watch.operations.copy())
    assert any(e.kind == "release" for e in dpm.events) == (policy != "sp")
    return counts


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_takes_no_more_operations_for_more_structures(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (operations(k, policy, monkeypatch) for k in (16, 256))
    assert few == many
    assert few[0].total() == 0  # nothing decays yet


def test_a_step_costs_nothing_before_a_decay_and_a_write_per_slice_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = operations(16, "sp", monkeypatch)
    assert counts[0] == Counter()
    assert counts[-1] == Counter(index_fill_=4)


# ---------------------------------------------------------------------- on a GPU


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_on_a_gpu_waits_only_to_read(
    policy: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("conv").model.to(cuda)
    layers = {"conv1": (model.conv1, model.bn1), "conv2": (model.conv2, model.bn2)}
    groups = [
        StructureGroup(
            name,
            [
                Slice.whole(p, batch_norm=layer is norm)
                for layer in (conv, norm)
                for p in layer.parameters()
            ],
        )
        for name, (conv, norm) in layers.items()
    ]
    toy = Toy(model, groups, {}, (2, 5, 5))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    dpm = DecayPruning(groups, SmoothPruning(4), POLICIES[policy])
    reads: list[int] = []
    read = stepping._to_host

    def to_host(values: Tensor) -> Tensor:
        reads.append(1)
        with sync_mode("default"):
            return read(values)

    monkeypatch.setattr(stepping, "_to_host", to_host)
    strict = lambda *_: torch.cuda.set_sync_debug_mode("error")  # noqa: E731
    loose = lambda *_: torch.cuda.set_sync_debug_mode("default")  # noqa: E731
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(strict)
    dpm.attach(optimizer)
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(loose)

    with sync_mode("default"):
        for step in range(9):
            if step == 2:
                dpm.decay({"conv1": [0, 1, 4], "conv2": [2, 3]})
            x, y = (t.to(cuda) for t in toy.batch(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            reads.clear()
            optimizer.step()
            assert len(reads) == (2 <= step <= 6)  # 6: whether the model bears the zeros
    gone = [k for e in dpm.events if e.kind == "prune" for k in e.structures if e.group == "conv1"]
    assert gone
    assert not model.conv1.weight[gone].any()
