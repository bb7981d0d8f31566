"""Weights that are kept elsewhere, and copies of a core."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpm_core import (
    AttachmentError,
    DecayPruning,
    GroupError,
    Hearing,
    Phase,
    PhaseError,
    SelfRectifying,
    SmoothPruning,
)
from tests.support import oracle
from tests.support.snapshot import difference, refused, same_bits, says, snapshot
from tests.support.toys import TOYS, Toy, make


def pruned(name: str = "conv") -> tuple[Toy, Optimizer, DecayPruning]:
    """A toy of which some structures are PRUNED, one decays, and a step of training is behind."""
    toy = make(name, torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(optimizer)
    dpm.decay(toy.doomed)
    for step in range(3):
        toy.train_step(optimizer, step)
    return toy, optimizer, dpm


def expected_zeros(toy: Toy, model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters with zeros at the elements of all doomed structures, one by one."""
    names = {id(p): name for name, p in toy.model.named_parameters()}
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in toy.groups:
        for share in oracle.shares_of(group):
            for k in toy.doomed[group.name]:
                for place in share.places(k):
                    found[names[id(share.parameter)]][place] = 0
    return found


@pytest.mark.parametrize("name", TOYS)
def test_zeros_come_into_a_copy_and_nothing_else_changes(name: str) -> None:
    toy, optimizer, dpm = pruned(name)
    other = make(name, torch.float64, seed=5).model
    expected = expected_zeros(toy, other)
    before = snapshot(toy.model, optimizer, dpm)
    dpm.zero_in(other, toy.model)
    for key, p in other.named_parameters():
        assert same_bits(p, expected[key]), key
    assert difference(before, snapshot(toy.model, optimizer, dpm)) is None


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda m: m,
    "averaged": AveragedModel,
    "half": lambda m: copy.deepcopy(m).half(),
    "state dict": lambda m: copy.deepcopy(m.state_dict()),
    "averaged state dict": lambda m: AveragedModel(m).state_dict(),
    "shadow": lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
    "flat": lambda m: dict(
        zip(
            [n for n, _ in m.named_parameters()],
            [
                part.view(p.shape)
                for part, p in zip(
                    torch.cat([p.detach().reshape(-1) for p in m.parameters()]).split(
                        [p.numel() for p in m.parameters()]
                    ),
                    m.parameters(),
                    strict=True,
                )
            ],
            strict=True,
        )
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_averages_of_many_forms_are_taken(form: str) -> None:
    toy, _, dpm = pruned()
    other = FORMS[form](make("conv", torch.float64, seed=5).model)
    dpm.zero_in(other, toy.model)
    named = other if isinstance(other, dict) else dict(other.named_parameters())
    weight = next(v for k, v in named.items() if k.endswith("conv1.weight"))
    gone = [not bool(row.any()) for row in weight]
    assert gone == [k in toy.doomed["conv1"] for k in range(6)]


def test_an_average_is_removed_from_without_a_change_of_its_outputs() -> None:
    """What an EMA keeps of a PRUNED structure goes once zeros have come into it."""
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    average = AveragedModel(toy.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(optimizer)
    dpm.decay(toy.doomed)
    for step in range(6):
        toy.train_step(optimizer, step)
        average.update_parameters(toy.model)
    assert bool(average.module.conv1.weight[1].any())
    dpm.zero_in(average, toy.model)
    x = toy.batch(0)[0]
    average.eval()
    found = average(x)
    with torch.no_grad():  # whatever is downstream of a structure at zero
        average.module.conv2.weight[:, toy.doomed["conv1"]] = 7.0
    torch.testing.assert_close(average(x), found, rtol=0, atol=0)


def missing(model: nn.Module) -> Any:
    state = model.state_dict()
    del state["bn2.bias"]
    return state


def narrow(model: nn.Module) -> Any:
    state = dict(model.state_dict())
    state["bn2.bias"] = state["bn2.bias"][:3].clone()
    return state


def tied(model: nn.Module) -> Any:
    state = dict(model.state_dict())
    state["bn2.bias"] = state["bn2.weight"]
    return state


def expanded(model: nn.Module) -> Any:
    return {**model.state_dict(), "bn2.bias": torch.zeros(1).expand(5)}


def inference(model: nn.Module) -> Any:
    with torch.inference_mode():
        return {**model.state_dict(), "bn2.bias": torch.zeros(5)}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (missing, ("'bn2.bias'", "'conv2'", "no such weight", "copy of the same model")),
        (narrow, ("'bn2.bias'", "(5,)", "(3,)", "before any removal")),
        (tied, ("tied", "copy of the same model")),
        (expanded, ("'bn2.bias'", "expanded")),
        (inference, ("'bn2.bias'", "inference", "clone")),
        (lambda m: {}, ("no such weight", "none")),
        (lambda m: list(m.parameters()), ("list", "neither a model nor")),
        (lambda m: {**m.state_dict(), "bn2.bias": "x"}, ("'bn2.bias'", "str")),
        (lambda m: {**m.state_dict(), "bn2.bias": torch.zeros(5).long()}, ("int64",)),
        (lambda m: make("residual").model, ("'conv1.weight'", "no such weight")),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    what: Callable[[nn.Module], Any], words: tuple[str, ...]
) -> None:
    toy, optimizer, dpm = pruned()
    source = make("conv", torch.float64, seed=5).model
    other = what(source)
    before = snapshot(source)
    with refused(GroupError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.zero_in(other, toy.model)
    assert difference(before, snapshot(source)) is None


def test_a_copy_without_the_model_that_names_it_is_refused() -> None:
    toy, _, dpm = pruned()
    other = copy.deepcopy(toy.model)
    with says(GroupError, "'conv1.weight'", "zero_in(copy, model)"):
        dpm.zero_in(other)
    with says(GroupError, "'conv1.weight'", "no parameter of the model given"):
        dpm.zero_in(other, other)


class ScheduleFree(SGD):
    """The part of a schedule-free optimizer that matters: in eval() the weights are others."""

    def move(self, sign: int) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(sign * 0.25)


def test_live_weights_that_an_optimizer_moves_are_said_not_to_be_zero() -> None:
    toy = make("conv", torch.float64)
    optimizer = ScheduleFree(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(1)).attach(optimizer)
    dpm.decay({"conv1": [2]})
    toy.train_step(optimizer, 0)
    optimizer.move(1)
    with says(PhaseError, "structure 2 of group 'conv1'", "schedule-free", "zero_in(model)"):
        dpm.phases("conv1")
    dpm.zero_in(toy.model)
    assert dpm.phases("conv1")[2] == Phase.PRUNED
    optimizer.move(-1)
    toy.train_step(optimizer, 1)
    assert dpm.phases("conv1")[2] == Phase.PRUNED


# ---------------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["core", "model", "optimizer"])
@pytest.mark.parametrize("at", [0, 2, 6])
def test_a_copy_with_model_and_optimizer_trains_as_the_original(
    at: int, first: str, how: str
) -> None:
    toy = make("conv", torch.float64)
    optimizer = Adam(toy.model.parameters(), lr=0.02)
    rectify = SelfRectifying(max_share=0.5)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    dpm.decay({"conv1": [0, 1, 2], "conv2": [3]})
    for step in range(at):
        toy.train_step(optimizer, step)
    things = {"core": dpm, "model": toy.model, "optimizer": optimizer}
    order = [first, *(n for n in things if n != first)]
    copied = COPIES[how]({name: things[name] for name in order})
    twin = Toy(copied["model"], list(copied["core"].groups.values()), toy.doomed, toy.shape)
    before = snapshot(toy.model, optimizer, dpm)
    for step in range(at, 8):
        twin.train_step(copied["optimizer"], step)
        if step == at + 1:
            copied["core"].decay({"conv2": [0]})
    assert difference(before, snapshot(toy.model, optimizer, dpm)) is None  # the original: nothing
    for step in range(at, 8):
        toy.train_step(optimizer, step)
        if step == at + 1:
            dpm.decay({"conv2": [0]})
    mine = snapshot(toy.model, optimizer, dpm)
    assert difference(mine, snapshot(twin.model, copied["optimizer"], copied["core"])) is None
    assert dpm.count(Phase.PRUNED) > 0


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_alone_is_attached_to_nothing_and_says_so(how: str) -> None:
    toy, optimizer, dpm = pruned()
    alone = COPIES[how](dpm)
    assert difference(dpm.state_dict(), alone.state_dict()) is None
    with says(AttachmentError, "gone", "attach(optimizer)"):
        alone.decay({"conv1": [0]})
    with says(AttachmentError, "not a parameter of this optimizer"):
        alone.attach(optimizer)
    alone.attach(SGD([s.parameter for g in alone.groups.values() for s in g.slices], lr=0.1))
    alone.decay({"conv1": [0]})
    toy.train_step(optimizer, 3)
    assert dpm.clock == 4


def test_a_shallow_copy_is_refused() -> None:
    toy, optimizer, dpm = pruned()
    with refused(
        AttachmentError, "another DecayPruning", model=toy.model, optimizer=optimizer, dpm=dpm
    ):
        copy.copy(dpm)


@pytest.mark.parametrize("how", COPIES)
def test_a_core_with_a_loss_is_not_copied(how: str) -> None:
    toy = make("conv", torch.float64)
    optimizer = SGD(toy.model.parameters(), lr=0.05)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(Hearing()))
    dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(0))
    words = ("cannot be copied or pickled", "loss", "load_state_dict(dpm.state_dict())")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        COPIES[how]((toy.model, optimizer, dpm))
    dpm.detach()
    COPIES[how]((toy.model, optimizer, dpm))
