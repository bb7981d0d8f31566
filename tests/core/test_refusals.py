"""Promise 4 and misuse: a typed error with cause and remedy, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

from dpm_core import (
    AttachmentError,
    ConfigurationError,
    Criterion,
    DecayPruning,
    Evidence,
    GradientError,
    GroupError,
    Hearing,
    LeastResistant,
    Phase,
    PhaseError,
    RandomRelease,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
    Trajectory,
)
from tests.support.snapshot import difference, refused, same_bits, says, snapshot
from tests.support.toys import OPTIMIZERS, Toy, make
from tests.support.twins import norm

RELEASE_ALL = SelfRectifying(Trajectory(rate=-1, length=-1e9), max_share=1.0, restore="keep")


def begin(
    name: str = "conv",
    steps: int = 4,
    rectify: SelfRectifying | None = None,
    optimizer_name: str = "adam",
) -> tuple[Toy, Optimizer, DecayPruning]:
    """A toy with a step of training behind it, attached; nothing decays yet."""
    toy = make(name, torch.float64)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(steps), rectify).attach(optimizer)
    toy.train_step(optimizer, 0)
    return toy, optimizer, dpm


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_decay_too_short_to_be_rectified_is_refused(steps: int) -> None:
    toy = make("conv")
    with says(ConfigurationError, "at least 4 steps", f"not {steps}", "leave rectify out"):
        DecayPruning(toy.groups, SmoothPruning(steps), SelfRectifying())
    DecayPruning(toy.groups, SmoothPruning(steps))
    DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying())


# ---------------------------------------------------------------------- attachment


def test_attaching_twice_is_refused() -> None:
    toy, optimizer, dpm = begin()
    with refused(
        AttachmentError,
        "twice a step",
        "detach() first",
        model=toy.model,
        optimizer=optimizer,
        dpm=dpm,
    ):
        dpm.attach(optimizer)


def test_an_optimizer_that_does_not_own_a_parameter_is_refused() -> None:
    toy = make("conv")
    dpm = DecayPruning(toy.groups)
    partial = SGD([p for n, p in toy.model.named_parameters() if n != "bn2.bias"], lr=0.1)
    with refused(
        AttachmentError,
        "'bn2.bias'",
        "'conv2'",
        "Build the optimizer",
        model=toy.model,
        optimizer=partial,
        dpm=dpm,
    ):
        dpm.attach(partial)
    dpm.attach(SGD(toy.model.parameters(), lr=0.1))


@pytest.mark.parametrize("criterion", [Hearing(), RandomRelease(Hearing())], ids=repr)
@pytest.mark.parametrize("lacking", ["model", "loss"])
def test_a_hearing_without_model_or_loss_is_refused(lacking: str, criterion) -> None:
    toy = make("conv")
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(criterion))
    given = {"model": toy.model, "loss": lambda: toy.loss(0)}
    del given[lacking]
    words = (type(criterion).__name__, f"lacks {lacking}: give attach(optimizer, {lacking}=")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.attach(optimizer, **given)


def test_a_hearing_of_a_group_without_owners_is_refused() -> None:
    toy = make("conv")
    groups = [toy.groups[0], StructureGroup("bare", toy.groups[1].slices)]
    optimizer = SGD(toy.model.parameters(), lr=0.1)
    dpm = DecayPruning(groups, SmoothPruning(4), SelfRectifying(Hearing()))
    words = ("'bare'", "no owners", "StructureGroup(owners=...)")
    with refused(AttachmentError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.attach(optimizer, model=toy.model, loss=lambda: toy.loss(0))


def test_a_detached_core_does_nothing_and_can_be_attached_again() -> None:
    toy, optimizer, dpm = begin()
    dpm.decay({"conv1": [0]})
    dpm.detach()
    before = norm(toy, 0, 0)
    state = dpm.state_dict()
    toy.train_step(optimizer, 1)
    assert norm(toy, 0, 0) != pytest.approx(before * 3 / 4, rel=1e-3)
    assert difference(state, dpm.state_dict()) is None
    dpm.attach(optimizer)
    toy.train_step(optimizer, 2)
    assert norm(toy, 0, 0) == pytest.approx(before * 3 / 4, rel=1e-12)


# ---------------------------------------------------------------------- decisions


def test_a_decay_before_attach_is_refused() -> None:
    toy = make("conv")
    dpm = DecayPruning(toy.groups)
    with refused(AttachmentError, "attach(optimizer) first", model=toy.model, dpm=dpm):
        dpm.decay({"conv1": [0]})


DECISIONS = [
    ({"conv1": [2]}, ("structure 2", "'conv1'", "DECAYING", "available()")),
    ({"conv1": [0, 2, 3]}, ("structure 2", "DECAYING", "1 more", "available()")),
    ({"conv2": [1]}, ("structure 1", "'conv2'", "PRUNED", "available()")),
    ({"conv2": [4], "conv1": [2]}, ("structure 2", "'conv1'", "DECAYING")),
    ({"conv9": [0]}, ("'conv9'", "no group", "conv1")),
    ({"conv1": [0, 0]}, ("'conv1'", "[0, 0]", "list each once")),
    ({"conv1": [0, 6]}, ("'conv1'", "0 to 5", "6")),
    ({"conv1": [-1]}, ("'conv1'", "0 to 5", "-1")),
    ({"conv1": [0], "conv2": [7]}, ("'conv2'", "0 to 4", "7")),
    ({"conv1": [1.0]}, ("'conv1'", "float32", "list of their numbers")),
    ({"conv1": [True, False, True]}, ("'conv1'", "bool", "list of their numbers")),
    ({"conv1": torch.tensor([[1]])}, ("'conv1'", "(1, 1)", "list of their numbers")),
    ({"conv1": 1}, ("'conv1'", "()", "list of their numbers")),
    ({"conv1": None}, ("'conv1'", "NoneType", "list of their numbers")),
    ({"conv1": "12"}, ("'conv1'", "'12'", "str", "list of their numbers")),
    ({"conv1": b"12"}, ("'conv1'", "bytes", "list of their numbers")),
    ({"conv1": ""}, ("'conv1'", "str", "list of their numbers")),
    ({"conv1": ["1"]}, ("'conv1'", "list", "list of their numbers")),
    ({"conv1": [None]}, ("'conv1'", "list of their numbers")),
    ({"conv1": {1: True}}, ("'conv1'", "dict", "list of their numbers")),
    ({"conv1": [2**70]}, ("'conv1'", str(2**70)[:10], "list of their numbers")),
    ({"conv1": [-(2**70)]}, ("'conv1'", "list of their numbers")),
    ({"conv1": [2**63 - 1]}, ("'conv1'", "0 to 5")),
    ({"conv1": [0, True]}, ("'conv1'", "bool", "list of their numbers")),
    ({"conv1": {False}}, ("'conv1'", "bool", "list of their numbers")),
    ({"conv1": [[0], [1]]}, ("'conv1'", "(2, 1)", "list of their numbers")),
    ({"conv1": [[0], [1, 4]]}, ("'conv1'", "list of their numbers")),
    ({"conv1": [1j]}, ("'conv1'", "complex", "list of their numbers")),
    ({"conv1": np.array([0.0])}, ("'conv1'", "float64", "list of their numbers")),
    ({"conv1": np.array([True])}, ("'conv1'", "bool", "list of their numbers")),
    ({"conv1": np.array(1)}, ("'conv1'", "()", "list of their numbers")),
    ({"conv1": torch.tensor([0]).to_sparse()}, ("'conv1'", "list of their numbers")),
    ({None: [0]}, ("None", "no group")),
    ({3: [0]}, ("3", "no group")),
    (["conv1"], ("list", "mapping", "{'conv1': [3, 7]}")),
    (None, ("NoneType", "mapping")),
    ("conv1", ("str", "mapping")),
]


@pytest.mark.parametrize(("structures", "words"), DECISIONS)
def test_a_decision_that_cannot_be_followed_is_refused_as_a_whole(
    structures: dict[str, Sequence[int]], words: tuple[str, ...]
) -> None:
    toy, optimizer, dpm = begin()
    dpm.decay({"conv2": [1]})
    for step in range(1, 5):
        toy.train_step(optimizer, step)
    dpm.decay({"conv1": [2, 3]})
    with refused(PhaseError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.decay(structures)
    # Nor does the next step carry any of it out.
    toy.train_step(optimizer, 5)
    assert dpm.phases("conv1").tolist() == [0, 0, 1, 1, 0, 0]
    assert dpm.phases("conv2").tolist() == [0, 2, 0, 0, 0]


LISTS = [
    [0, 5],
    (5, 0),
    {0, 5},
    frozenset({0, 5}),
    range(0, 6, 5),
    {0: "a", 5: "b"}.keys(),
    np.array([0, 5]),
    np.array([5, 0], dtype=np.uint8),
    [np.int64(0), np.int32(5)],
    torch.tensor([5, 0], dtype=torch.int32),
    [torch.tensor(0), torch.tensor(5)],
]


@pytest.mark.parametrize("given", LISTS, ids=lambda given: type(given).__name__)
def test_numbers_come_in_any_list_of_integers(given: Any) -> None:
    _, _, dpm = begin()
    dpm.decay({"conv1": given})
    assert dpm.phases("conv1").tolist() == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", [None, 3, ["conv1"], "conv9"])
def test_asking_for_a_group_that_is_not_there_is_refused(name: Any) -> None:
    _, _, dpm = begin()
    for ask in (dpm.phases, dpm.available):
        with says(PhaseError, "no group", "conv1"):
            ask(name)


def test_a_released_structure_is_immune() -> None:
    toy, optimizer, dpm = begin(rectify=RELEASE_ALL)
    dpm.decay({"conv1": [4]})
    for step in range(1, 4):
        toy.train_step(optimizer, step)
    assert [e.kind for e in dpm.events] == ["decay", "release"]
    assert dpm.available("conv1").tolist() == [True, True, True, True, False, True]
    words = ("structure 4", "'conv1'", "immune", "available()")
    with refused(PhaseError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.decay({"conv1": [0, 4]})


@pytest.mark.parametrize("wave", [-1, 1.0, True, None, "0", 2**70])
def test_a_wave_that_is_no_count_is_refused(wave: object) -> None:
    toy, optimizer, dpm = begin()
    words = ("wave", repr(wave), "replacements")
    with refused(ConfigurationError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.decay({"conv1": [0]}, wave=wave)  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", ["phases", "available"])
def test_asking_for_an_unknown_group_is_refused(ask: str) -> None:
    _, _, dpm = begin()
    with says(PhaseError, "'conv9'", "'conv1', 'conv2'"):
        getattr(dpm, ask)("conv9")


def test_an_empty_decision_changes_nothing() -> None:
    toy, optimizer, dpm = begin()
    before = snapshot(toy.model, optimizer, dpm)
    dpm.decay({})
    dpm.decay({"conv1": [], "conv2": torch.empty(0, dtype=torch.int64)})
    assert difference(before, snapshot(toy.model, optimizer, dpm)) is None


def test_a_frozen_parameter_is_refused() -> None:
    toy, optimizer, dpm = begin()
    toy.model.bn1.bias.requires_grad_(False)
    words = ("'bn1.bias'", "'conv1'", "frozen", "unfreeze")
    with refused(GroupError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.decay({"conv1": [0], "conv2": [0]})
    dpm.decay({"conv2": [0]})  # its parameters are not frozen
    assert dpm.count(Phase.DECAYING) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_structure_whose_norm_is_not_finite_is_refused(value: float) -> None:
    toy, optimizer, dpm = begin()
    toy.model.conv1.weight.data[3, 0, 0, 0] = value
    words = ("structure 3", "'conv1'", "not finite", "earlier checkpoint")
    with refused(GradientError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        dpm.decay({"conv1": [1, 3]})
    dpm.decay({"conv1": [1]})


def test_a_structure_of_norm_zero_is_pruned_at_once() -> None:
    toy, optimizer, dpm = begin()
    with torch.no_grad():
        for p in (toy.model.conv1, toy.model.bn1):
            p.weight[3], p.bias[3] = 0, 0
    dpm.decay({"conv1": [2, 3]}, wave=1)
    assert dpm.phases("conv1").tolist() == [0, 0, 1, 2, 0, 0]
    found = [(e.step, e.kind, e.structures, e.wave) for e in dpm.events]
    assert found == [(1, "decay", (2,), 1), (1, "prune", (3,), 1)]
    for step in range(1, 7):
        toy.train_step(optimizer, step)
        assert norm(toy, 0, 3) == 0
    assert [e.structures for e in dpm.events if e.kind == "prune"] == [(3,), (2,)]


@pytest.mark.parametrize("trained", [True, False])
def test_a_structure_whose_batch_norm_part_alone_is_zero_decays(trained: bool) -> None:
    toy, optimizer, dpm = begin(rectify=SelfRectifying(RELEASE_ALL.criterion, max_share=1.0))
    with torch.no_grad():
        toy.model.bn1.weight[3], toy.model.bn1.bias[3] = 0, 0
    before = norm(toy, 0, 3)
    dpm.decay({"conv1": [3]})
    for step in range(1, 5):
        toy.backward(optimizer, step)
        if not trained:
            toy.model.bn1.weight.grad = toy.model.bn1.bias.grad = None
        optimizer.step()
        if step == 1:
            assert norm(toy, 0, 3) == pytest.approx(before * 3 / 4, rel=1e-12)
    # Released in between, with an effect of zero to go back to: whatever that is, it is finite.
    assert dpm.phases("conv1")[3] == Phase.ACTIVE
    assert trained or not toy.model.bn1.weight[3]
    assert all(bool(torch.isfinite(p).all()) for p in toy.model.parameters())


# ---------------------------------------------------------------------- the step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"])
@pytest.mark.parametrize("rectify", [None, RELEASE_ALL], ids=["sp", "sr"])
def test_a_gradient_that_is_not_finite_is_refused_and_training_can_go_on(
    value: float, where: str, rectify: SelfRectifying | None
) -> None:
    toy, optimizer, dpm = begin(rectify=rectify)
    twin, twin_optimizer, twin_dpm = begin(rectify=rectify)
    for t, o, d in ((toy, optimizer, dpm), (twin, twin_optimizer, twin_dpm)):
        d.decay({"conv1": [1, 2]})
        t.train_step(o, 1)
    toy.backward(optimizer, 2)
    dict(toy.model.named_parameters())[where].grad[2] = value
    words = ("structure 2", "'conv1'", "not finite", "optimizer.zero_grad()")
    with refused(GradientError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        optimizer.step()
    # A clean gradient, and all goes on as if nothing had been.
    for step in range(3, 7):
        toy.train_step(optimizer, step)
        twin.train_step(twin_optimizer, step)
    found = snapshot(toy.model, optimizer, dpm)
    other = snapshot(twin.model, twin_optimizer, twin_dpm)
    del found["buffers"], other["buffers"]  # the forward pass of the bad step counted
    assert difference(other, found) is None


@pytest.mark.parametrize("rectify", [None, RELEASE_ALL], ids=["sp", "sr"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_weights_that_the_optimizer_makes_infinite_stop_the_next_step(
    value: float, rectify: SelfRectifying | None
) -> None:
    """1e200 is finite and its square is not: its norm cannot be put on a schedule, either."""
    toy, optimizer, dpm = begin(optimizer_name="sgd", rectify=rectify)
    dpm.decay({"conv1": [0, 2, 3], "conv2": [1]})
    toy.train_step(optimizer, 1)
    toy.backward(optimizer, 2)
    optimizer.state[toy.model.conv1.weight]["momentum_buffer"][[2, 3]] = value
    optimizer.step()
    words = ("weights of structures 2, 3 of group 'conv1'", "not finite", "earlier checkpoint")
    for p in toy.model.parameters():
        p.grad = torch.zeros_like(p)
    with refused(GradientError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        optimizer.step()


def test_a_model_that_divides_by_a_norm_of_zero_is_stopped_at_once() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    parametrizations.weight_norm(model[0])
    kept = model[0].parametrizations.weight
    slices = [Slice.whole(kept.original0), Slice.whole(kept.original1), Slice.whole(model[0].bias)]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    dpm = DecayPruning([StructureGroup("l", slices)], SmoothPruning(2)).attach(optimizer)
    dpm.decay({"l": [1, 3]})

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(3, 4, dtype=torch.float64)).square().mean().backward()

    for _ in range(2):
        backward()
        optimizer.step()
    words = ("structures 1, 3 of group 'l'", "exactly zero", "weight_norm", "original0")
    for _ in range(2):  # as often as it is tried
        backward()
        with refused(GradientError, *words, model=model, optimizer=optimizer, dpm=dpm):
            optimizer.step()
    # The magnitude alone is what weight_norm can lose.
    assert bool(torch.isfinite(model[2].weight).all())


# ---------------------------------------------------------------------- a criterion of one's own


class Own(Criterion):
    """Returns what a test gives it, after the batches of a hearing where it holds one."""

    def __init__(self, choice: Callable[[Evidence, Tensor], Any]) -> None:
        self.choice = choice

    def choose(self, evidence: Evidence, limits: Tensor, step: int) -> Tensor:
        found: Tensor = self.choice(evidence, limits)
        return found


def everyone(evidence: Evidence, _limits: Tensor) -> Tensor:
    return torch.ones_like(evidence.group, dtype=torch.bool)


def raises_its_limits(evidence: Evidence, limits: Tensor) -> Tensor:
    limits.fill_(100)
    return everyone(evidence, limits)


CHOICES = [
    (everyone, ("releases 3 structures of group 'conv1'", "at most 1", "max_share")),
    (raises_its_limits, ("releases 3 structures of group 'conv1'", "at most 1")),
    (lambda e, n: everyone(e, n).long(), ("torch.int64 of shape (5,)", "torch.bool")),
    (lambda e, n: everyone(e, n)[:2], ("shape (2,)", "(5,)")),
    (lambda e, n: everyone(e, n)[:, None], ("shape (5, 1)", "(5,)")),
    (lambda e, n: torch.tensor(False), ("shape ()", "(5,)")),
    (lambda e, n: torch.zeros(11, dtype=torch.bool), ("shape (11,)", "(5,)")),
    (lambda e, n: [False] * 5, ("list", "torch.bool")),
    (lambda e, n: None, ("NoneType", "torch.bool")),
    (lambda e, n: e.resistance, ("torch.float64", "torch.bool")),
]


@pytest.mark.parametrize("control", [False, True], ids=["itself", "its control"])
@pytest.mark.parametrize(("choice", "words"), CHOICES)
def test_a_criterion_beyond_its_limits_is_refused(
    choice: Callable[[Evidence, Tensor], Any], words: tuple[str, ...], control: bool
) -> None:
    own: Criterion = RandomRelease(Own(choice)) if control else Own(choice)
    toy, optimizer, dpm = begin(rectify=SelfRectifying(own, max_share=0.4))
    dpm.decay({"conv1": [0, 1, 2], "conv2": [0, 1]})
    for step in range(1, 3):
        toy.train_step(optimizer, step)
    toy.backward(optimizer, 3)
    if control:
        words = tuple(w.replace("group 'conv1'", "group number 0") for w in words)
    with refused(
        ConfigurationError, "Own.choose", *words, model=toy.model, optimizer=optimizer, dpm=dpm
    ):
        optimizer.step()


def test_a_bad_gradient_of_an_active_structure_is_the_optimizers_affair() -> None:
    toy, optimizer, dpm = begin(optimizer_name="sgd")
    dpm.decay({"conv1": [1]})
    initial = norm(toy, 0, 1)
    toy.backward(optimizer, 1)
    for p in toy.model.parameters():
        if p.dim() > 1 and p.shape[0] == 6:
            p.grad[5] = float("nan")
    optimizer.step()
    assert norm(toy, 0, 1) == pytest.approx(initial * 3 / 4, rel=1e-12)
    assert bool(toy.model.conv1.weight[5].isnan().all())
    assert not bool(toy.model.conv1.weight[:5].isnan().any())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("dim", [0, 1])
def test_a_sparse_gradient_is_refused(dim: int) -> None:
    model = Words()
    group = StructureGroup("words", [Slice.whole(model.table.weight, dim, name="table.weight")])
    optimizer = SGD(model.parameters(), lr=0.1)
    dpm = DecayPruning([group], SmoothPruning(4)).attach(optimizer)
    dpm.decay({"words": [1]})
    functional.cross_entropy(model(torch.tensor([1, 2])), torch.tensor([0, 1])).backward()
    words = ("'table.weight'", "'words'", "sparse", "switch sparse gradients off")
    with refused(GradientError, *words, model=model, optimizer=optimizer, dpm=dpm):
        optimizer.step()


def test_a_refused_hearing_changes_nothing() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["adam"](toy.model.parameters())
    losses = iter([0, 1, None])

    def loss() -> Tensor:
        step = next(losses)
        torch.rand(3)  # somebody's dropout
        found = toy.loss(0 if step is None else step)
        return found * float("nan") if step is None else found

    dpm = DecayPruning(toy.groups, SmoothPruning(10), SelfRectifying(Hearing(), max_share=0.5))
    dpm.attach(optimizer, model=toy.model, loss=loss)
    dpm.decay({"conv1": [0, 1]})
    for step in range(8):
        toy.train_step(optimizer, step)
    toy.backward(optimizer, 8)
    words = ("loss of a hearing", "nan", "check the closure")
    with refused(GradientError, *words, model=toy.model, optimizer=optimizer, dpm=dpm):
        optimizer.step()
    assert dpm.heard == 0


def test_states_that_are_read_out_are_copies() -> None:
    toy, optimizer, dpm = begin()
    dpm.decay({"conv1": [0]})
    dpm.phases("conv1").fill_(Phase.PRUNED)
    dpm.available("conv1").fill_(True)
    dpm.state_dict()["groups"]["conv1"]["phase"].fill_(Phase.PRUNED)
    dpm.state_dict()["events"].clear()
    assert dpm.count(Phase.DECAYING) == 1
    assert len(dpm.events) == 1
    toy.train_step(optimizer, 1)
    assert not same_bits(toy.model.conv1.weight[0], torch.zeros_like(toy.model.conv1.weight[0]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((4,), ("smooth is 4", "SmoothPruning(4)")),
        ((True,), ("smooth is True", "give SmoothPruning(20)")),
        (("linear",), ("smooth is 'linear'",)),
        ((SmoothPruning,), ("smooth is <class",)),
        ((SmoothPruning(8), True), ("rectify is True", "give SelfRectifying()")),
        ((SmoothPruning(8), Trajectory()), ("rectify is", "SelfRectifying(Trajectory(...))")),
        ((SmoothPruning(8), "hearing"), ("rectify is 'hearing'",)),
        ((SelfRectifying(), SmoothPruning(8)), ("changed places",)),
        ((None, SmoothPruning(8)), ("changed places",)),
    ],
)
def test_other_things_than_settings_are_refused_where_they_are_given(
    given: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    toy = make("conv", torch.float64)
    with says(ConfigurationError, *words):
        DecayPruning(toy.groups, *given)


@pytest.mark.parametrize("kind", [RandomRelease, LeastResistant])
def test_a_control_of_no_criterion_is_refused(kind: type[Criterion]) -> None:
    with says(ConfigurationError, f"{kind.__name__}.like is 'hearing'", "give a Criterion"):
        kind(like="hearing")


def test_other_things_than_a_list_of_groups_are_refused() -> None:
    groups = list(make("conv", torch.float64).groups)
    for given, name in (
        (groups[0], "StructureGroup"),
        ({g.name: g for g in groups}, "dict"),
        ([*groups, "another"], "str"),
        ([groups], "list"),
        (None, "NoneType"),
    ):
        with says(GroupError, f"a {name}", "list of StructureGroups"):
            DecayPruning(given)
    DecayPruning(g for g in groups)
    DecayPruning(tuple(groups))
