"""A torch-pruning pruner of one's own: what it would remove decays, and what decays is removed."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import Hearing, Phase, SelfRectifying, SmoothPruning
from dpm_core.adapters.base import AdapterError, Training
from dpm_core.adapters.depgraph import DepGraph, LeftUnprunedWarning
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import SavedModelError, load_pruned
from dpm_core.adapters.torch_pruning import TorchPruning
from dpm_core.third_party import dependency
from tests.support.frameworks import (
    CLASSES,
    EAGER,
    EXAMPLE,
    Grouped,
    batch,
    bias_less,
    small_resnet,
)
from tests.support.rounding import in_double
from tests.support.structures import Net, conv

P, IMP = tp.pruner, tp.importance
SMOOTH = SmoothPruning(4)
QUIET = pytest.mark.filterwarnings("ignore::dpm_core.adapters.depgraph.LeftUnprunedWarning")
"""For tests of whether it ends as upstream does, which may leave groups whole."""
Make = Callable[[nn.Module], Any]


def pruner(model: nn.Module, kind: Any = P.BasePruner, importance: Any = None, **given: Any) -> Any:
    """As a user constructs one; upstream shares its default dictionaries, so fresh ones go in."""
    heads = [m for n, m in model.named_modules() if n == "head"]
    own = {
        "pruning_ratio": 0.4,
        "ignored_layers": heads,
        "in_channel_groups": {},
        "out_channel_groups": {},
        "num_heads": {},
    }
    example = EXAMPLE.to(next(model.parameters()))
    return kind(model, example, importance or IMP.GroupMagnitudeImportance(), **{**own, **given})


def learn(model: nn.Module, number: int = 99) -> None:
    """One pass, for its gradients."""
    model.zero_grad()
    images, labels = batch(number)
    functional.cross_entropy(model(images), labels).backward()


def with_hessian(model: nn.Module) -> Any:
    importance = IMP.GroupHessianImportance()
    images, labels = batch(98)
    losses = functional.cross_entropy(model(images[:3]), labels[:3], reduction="none")
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    return importance


def with_activations(model: nn.Module) -> Any:
    importance = IMP.ActivationImportance()
    with importance.compute_importance(model):
        model(batch(97)[0])
    return importance


def learnt(kind: type) -> Make:
    def importance(model: nn.Module) -> Any:
        learn(model)
        return kind()

    return importance


def by_bias(group: Any) -> Tensor:
    """An importance of the user's own."""
    return group[0].dep.target.module.weight.detach().flatten(1).amax(1)


IMPORTANCES: dict[str, Make] = {
    "magnitude": lambda _: IMP.GroupMagnitudeImportance(p=1, normalizer="max"),
    "lamp": lambda _: IMP.LAMPImportance(),
    "fpgm": lambda _: IMP.FPGMImportance(),
    "random": lambda _: IMP.RandomImportance(),
    "taylor": learnt(IMP.GroupTaylorImportance),
    "hessian": with_hessian,
    "activation": with_activations,
    "a function": lambda _: by_bias,
}
OPTIONS: dict[str, Make] = {
    "global": lambda m: pruner(m, global_pruning=True, pruning_ratio=0.3),
    "isomorphic": lambda m: pruner(m, global_pruning=True, isomorphic=True),
    "max ratio": lambda m: pruner(m, global_pruning=True, max_pruning_ratio=0.5),
    "rounded": lambda m: pruner(m, round_to=4, pruning_ratio=0.3),
    "by layer": lambda m: pruner(
        m, pruning_ratio=0.0, pruning_ratio_dict={m.inner: 0.5, (m.last, m.hidden): 0.2}
    ),
    "by layer, global": lambda m: pruner(
        m, global_pruning=True, pruning_ratio_dict={(m.inner, m.last): 0.5, m.hidden: 0.0}
    ),
    "channel groups": lambda m: pruner(m, out_channel_groups={m.inner: 4, m.hidden: 2}),
    "ignored": lambda m: pruner(m, ignored_layers=[m.head, m.stem]),
    "in steps": lambda m: pruner(m, iterative_steps=3),
    "in steps, global": lambda m: pruner(m, iterative_steps=2, global_pruning=True),
    "BNScalePruner": lambda m: pruner(m, P.BNScalePruner, IMP.BNScaleImportance()),
    "GroupNormPruner": lambda m: pruner(m, P.GroupNormPruner, iterative_steps=2),
    "GrowingRegPruner": lambda m: pruner(m, P.GrowingRegPruner),
}


def ranking_by(importance: Make) -> Make:
    return lambda model: pruner(model, importance=importance(model))


MAKERS = OPTIONS | {name: ranking_by(importance) for name, importance in IMPORTANCES.items()}


def by_upstream(model: nn.Module, make: Make, steps: int | None = None) -> nn.Module:
    """Upstream's own steps, on the model as it is."""
    torch.manual_seed(7)
    own = make(model)
    torch.manual_seed(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(own.iterative_steps if steps is None else steps):
            own.step()
    return model


def running(model: nn.Module, make: Make, *given: Any, **named: Any) -> TorchPruning:
    torch.manual_seed(7)
    named.setdefault("example", EXAMPLE)
    run = TorchPruning(make(model), *given, **named)
    run.check()
    torch.manual_seed(8)
    return run.attach(torch.optim.SGD(model.parameters(), 0.02, momentum=0.9))


def train(run: TorchPruning, steps: int = 1) -> None:
    model = run.model.train()
    for number in range(steps):
        run.optimizer.zero_grad()
        images, labels = batch(number)
        functional.cross_entropy(model(images.to(run.example)), labels).backward()
        run.optimizer.step()


def finish(run: TorchPruning) -> None:
    for _ in range(80):
        if run.complete:
            return
        train(run)
        if run.due:
            run.remove()
    raise AssertionError("it takes too long")


def decaying(run: TorchPruning) -> Removal:
    phases = {name: run.dpm.phases(name) == Phase.DECAYING for name in run.dpm.groups}
    return Removal((n, run.channels(n, mask.nonzero()[:, 0])) for n, mask in phases.items())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    values = other.state_dict()
    return shapes(one) == shapes(other) and all(
        torch.equal(v, values[n]) for n, v in one.state_dict().items()
    )


# ---------------------------------------------------------------------- what goes


@QUIET
@pytest.mark.parametrize("name", MAKERS)
def test_base_ends_where_the_pruner_by_itself_does(name):
    model = small_resnet()
    run = running(model, MAKERS[name])
    while run.due:
        run.remove()
    assert run.complete
    assert run.removed
    assert same(model, by_upstream(small_resnet(), MAKERS[name]))


@QUIET
@pytest.mark.parametrize("name", MAKERS)
def test_what_decays_is_what_the_pruner_would_remove(name):
    """All of its steps, or the first of several that are to be some training apart."""
    steps = MAKERS[name](small_resnet()).iterative_steps
    for every, number in ((0, steps), (1, 1))[:steps]:
        model = small_resnet()
        torch.manual_seed(7)
        run = TorchPruning(MAKERS[name](model), SMOOTH, example=EXAMPLE, every=every)
        run.check()
        twin = copy.deepcopy(model)
        torch.manual_seed(8)
        run.attach(torch.optim.SGD(model.parameters(), 0.02))
        assert same(model, twin)
        small = copy.deepcopy(model)
        decaying(run).apply(small, EXAMPLE, cut=True)
        assert same(small, by_upstream(small_resnet(), MAKERS[name], steps=number))


@QUIET
@pytest.mark.parametrize("name", MAKERS)
def test_with_releases_it_ends_in_upstreams_sizes(name):
    model = small_resnet()
    run = running(model, MAKERS[name], SMOOTH, EAGER)
    released = 0
    while not run.complete:
        train(run)
        if run.due:
            released += sum(len(e.structures) for e in run.events() if e.kind == "release")
            before = copy.deepcopy(model)
            assert list(run.remove())
            x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
            double = [in_double(copy.deepcopy(m)).eval()(x) for m in (before, model)]
            assert torch.allclose(*double, rtol=1e-9, atol=1e-9)
    assert released
    assert shapes(model) == shapes(by_upstream(small_resnet(), MAKERS[name]))


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_drawn_settings_end_where_the_pruner_by_itself_does(data):
    draw = data.draw
    ratios = st.sampled_from([0.0, 0.2, 0.35, 0.5, 0.7])
    chosen = {
        "pruning_ratio": draw(st.sampled_from([0.2, 0.35, 0.5, 0.7])),
        "global_pruning": draw(st.booleans()),
        "isomorphic": draw(st.booleans()),
        "round_to": draw(st.sampled_from([None, 2, 3, 4])),
        "max_pruning_ratio": draw(st.sampled_from([1.0, 0.6])),
        "iterative_steps": draw(st.integers(1, 3)),
    }
    chosen["isomorphic"] &= chosen["global_pruning"]
    layers = draw(st.lists(st.sampled_from(["inner", "last", "hidden"]), unique=True))
    by_layer = {name: draw(ratios) for name in layers}
    left = draw(st.sampled_from([["head"], ["head", "stem"], ["head", "last"]]))

    def make(model: nn.Module) -> Any:
        return pruner(
            model,
            ignored_layers=[model.get_submodule(n) for n in left],
            pruning_ratio_dict={model.get_submodule(n): r for n, r in by_layer.items()},
            **chosen,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftUnprunedWarning)
        run = running(model := small_resnet(), make)
        while run.due:
            run.remove()
    assert same(model, by_upstream(small_resnet(), make))


def test_grouped_convolutions_and_shared_norms():
    def make(m):
        return pruner(m, ignored_layers=[m.head], pruning_ratio=0.5)

    torch.manual_seed(0)
    model = Grouped()
    twin = copy.deepcopy(model)
    run = running(model, make, SMOOTH, EAGER)
    finish(run)
    assert shapes(model) == shapes(by_upstream(twin, make))
    assert model.grouped.groups == 4


def test_replacements_are_the_next_in_the_pruners_ranking():
    torch.manual_seed(0)
    model = small_resnet()
    run = running(model, lambda m: pruner(m, importance=IMP.RandomImportance()), SMOOTH, EAGER)
    ranked = {n: s.argsort().tolist() for n, s in run._scores.items()}
    gone = {name: set(channels) for name, channels in decaying(run)}
    replaced = 0
    while not run.due:
        seen = len(run.dpm.events)
        train(run)
        for event in run.dpm.events[seen:]:
            if event.kind == "decay":
                waits = [k for k in ranked[event.group] if k not in gone[event.group]]
                assert sorted(waits[: len(event.structures)]) == sorted(event.structures)
                gone[event.group] |= set(event.structures)
                replaced += len(event.structures)
    assert replaced


# ---------------------------------------------------------------------- layers of one's own


class Affine(nn.Module):
    """A layer that torch-pruning does not know."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, size, 1, 1) + 0.5)
        self.offset = nn.Parameter(torch.randn(2, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset.sum(0)[:, None, None]


class AffinePruner(tp.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = [i for i in range(layer.scale.shape[1]) if i not in set(idxs)]
        layer.scale = self._prune_parameter_and_grad(layer.scale, keep, 1)
        layer.offset = self._prune_parameter_and_grad(layer.offset, keep, 1)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.scale.shape[1]

    get_in_channels = get_out_channels


class Rms(Affine):
    """Whose channels of zeros count in a mean."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(1, keepdim=True).add(1e-3).rsqrt() * self.scale


class Mine(nn.Module):
    """A layer of one's own, and a bare parameter whose channels are not its last dimension."""

    def __init__(self, kind: type = Affine) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.own = kind(12)
        self.place = nn.Parameter(torch.randn(12, 1, 4) / 4)
        self.second = nn.Conv2d(12, 10, 3, 2)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.own(self.first(x)) + self.place.repeat(1, 1, 2))
        return self.head(functional.relu(self.second(x)).mean((2, 3)))


def mine(model: Mine, **given: Any) -> Any:
    return pruner(
        model,
        customized_pruners={type(model.own): AffinePruner()},
        unwrapped_parameters=[(model.place, 0)],
        root_module_types=[nn.Conv2d, nn.Linear],
        **given,
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_layers_of_ones_own_and_bare_parameters_go_by_the_pruners_functions(steps):
    def make(m):
        return mine(m, iterative_steps=steps)

    torch.manual_seed(0)
    model = Mine()
    twin, base = copy.deepcopy(model), copy.deepcopy(model)
    run = running(base, make)
    while run.due:
        run.remove()
    assert same(base, by_upstream(twin, make))
    run = running(model, make, SMOOTH, EAGER)
    names = {s.name for s in run.dpm.groups["first"].slices}
    assert names == {"first.weight", "first.bias", "own.scale", "own.offset", "place"}
    assert {s.name: s.dim for s in run.dpm.groups["first"].slices}["place"] == 0
    finish(run)
    assert shapes(model) == shapes(twin)
    assert model.own.offset.shape == (2, 12 - int(12 * 0.4 + 0.9))


def test_a_layer_of_ones_own_that_mixes_channels_is_refused():
    torch.manual_seed(0)
    with pytest.raises(AdapterError, match=r"group of 'first' gives different outputs at zero"):
        running(Mine(Rms), mine, SMOOTH)


class Tokens(nn.Module):
    """Attention of separate layers, as in a transformer."""

    def __init__(self, heads: int = 4, norm: bool = False) -> None:
        super().__init__()
        self.heads, self.size = heads, 6
        self.embed = nn.Linear(3 * 8, 16)
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.query, self.key, self.value = (nn.Linear(16, 24) for _ in range(3))
        self.out = nn.Linear(24, 16)
        self.hidden, self.last = nn.Linear(16, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x.transpose(1, 2).flatten(2)))
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.last(functional.gelu(self.hidden(x)))
        return self.head(x.mean(1))

    def count(self) -> None:
        self.heads = self.query.out_features // self.size


def tokens(model: Tokens, **given: Any) -> Any:
    parts = (model.query, model.key, model.value)
    left = [model.head, model.embed, model.out, model.last]
    return pruner(
        model,
        num_heads=dict.fromkeys(parts, model.heads),
        ignored_layers=left,
        **{"pruning_ratio": 0.5, **given},
    )


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_heads_and_parts_of_heads(whole, steps):
    def make(m):
        heads = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
        return tokens(m, iterative_steps=steps, **(heads if whole else {}))

    torch.manual_seed(0)
    model = Tokens()
    twin = copy.deepcopy(model)
    run = running(model, make, SMOOTH, EAGER, adapt=Tokens.count if whole else None)
    structures = run.dpm.groups["value"].size
    assert structures == (4 if whole else 6)
    finish(run)
    assert shapes(model) == shapes(by_upstream(twin, make))
    if whole and steps == 1:  # in several, upstream takes a share of those that are left
        assert model.heads == 2
    if not whole:
        assert (model.heads, model.query.out_features) == (4, 12)


WHOLE = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}


@pytest.mark.parametrize("given", [WHOLE, {}], ids=["heads", "parts"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_number_of_heads_follows_and_a_fresh_model_needs_no_pruner(given, steps, tmp_path):
    torch.manual_seed(0)
    model = Tokens()
    dense = copy.deepcopy(model)
    run = running(model, lambda m: tokens(m, iterative_steps=steps, **given), SMOOTH, EAGER)
    finish(run)
    left = model.value.out_features
    assert (model.heads, left < 24) == (left // 6 if given else 4, True)
    run.removed.save(tmp_path / "small.safetensors", model)
    load_pruned(tmp_path / "small.safetensors", dense, EXAMPLE)
    assert dense.heads == model.heads
    assert same(dense, model)


def test_concatenations_of_concatenations_are_followed_after_a_pruners_own_steps():
    """The shapes that autograd has noted are of the time before."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = functional.relu(torch.cat([m.a(x), m.b(x)], 1))
        return m.head(functional.relu(m.c(y) + m.d(torch.cat([y, m.e(x)], 1))).mean((2, 3)))

    torch.manual_seed(0)
    layers = {"a": conv(3, 8), "b": conv(3, 8), "c": conv(16, 8), "d": conv(24, 8), "e": conv(3, 8)}
    model = Net(run, **layers, head=nn.Linear(8, CLASSES))
    own = pruner(model, pruning_ratio=0.5, iterative_steps=4)
    for _ in range(2):
        own.step()
    assert model.d.in_channels == 18
    finish(running(model, lambda _: own, SMOOTH))
    assert model.d.in_channels == 12
    assert model(EXAMPLE).isfinite().all()


class Told(Tokens):
    """Keeps its number of heads where nobody looks."""

    @property
    def heads(self) -> int:
        return self.told[0]

    @heads.setter
    def heads(self, number: int) -> None:
        self.told = [number]


def test_a_number_of_heads_that_cannot_follow_is_asked_for_by_name():
    torch.manual_seed(0)
    with pytest.raises(AdapterError, match=r"group of 'value' cannot be removed.*or give adapt="):
        running(Told(), lambda m: tokens(m, **WHOLE), SMOOTH)
    run = running(model := Told(), lambda m: tokens(m, **WHOLE), SMOOTH, EAGER, adapt=Tokens.count)
    finish(run)
    assert model.heads == model.value.out_features // 6 == 2


# ---------------------------------------------------------------------- steps


def test_several_steps_one_after_the_other_or_in_ones_own_time():
    def make(m):
        return pruner(m, iterative_steps=2)

    run = running(model := small_resnet(), make, SMOOTH, every=4)
    train(run, 4)
    assert run.due
    first = run.remove()
    assert not run.due
    train(run, 3)
    assert run.dpm.count(Phase.DECAYING) == 0
    train(run)
    assert run.dpm.count(Phase.DECAYING)
    finish(run)
    assert list(run.removed)[: len(first)] == list(first)
    assert len(run.removed) > len(first)
    assert shapes(model) == shapes(by_upstream(small_resnet(), make))

    run = running(model := small_resnet(), make, SMOOTH, every=None)
    train(run, 2)
    assert not run.due
    assert not run.decided
    for _ in range(2):
        run.decide()
        with pytest.raises(AdapterError, match="still to come"):
            run.decide()
        train(run, 4)
        run.remove()
        train(run)
    assert run.complete
    with pytest.raises(AdapterError, match="all of its 2 steps"):
        run.decide()
    assert shapes(model) == shapes(by_upstream(small_resnet(), make))


def test_the_first_decision_has_the_gradients_of_the_step_before():
    def make(m):
        return pruner(m, importance=IMP.GroupTaylorImportance())

    model = small_resnet()
    run = running(model, make, SMOOTH, first=1)
    assert not run.decided
    train(run)
    twin = copy.deepcopy(model)
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        one.grad = other.grad.clone()
    small = copy.deepcopy(model)
    decaying(run).apply(small, EXAMPLE, cut=True)
    assert same(small, by_upstream(twin, make))


@pytest.mark.parametrize("every", [0, 1])
def test_events_keep_the_dense_models_numbers_after_the_last_removal(every):
    model = small_resnet()
    run = running(model, drawn_in_steps, SMOOTH, EAGER, every=every)
    before = []
    while not run.complete:
        train(run)
        before = run.events() if run.due else before
        if run.due:
            run.remove()
    assert before
    assert run.events() == before


def test_pytorchs_default_type_is_without_effect():
    ended = []
    for kind in (torch.float32, torch.float64):
        model = small_resnet().double()
        torch.set_default_dtype(kind)
        try:
            make = functools.partial(pruner, iterative_steps=2)
            run = running(model, make, SMOOTH, EAGER, example=EXAMPLE.double(), every=1)
            finish(run)
        finally:
            torch.set_default_dtype(torch.float32)
        ended.append(model)
    assert same(*ended)
    assert run.removed


def test_the_pruners_own_regularization_goes_on_over_a_removal():
    model = small_resnet()
    run = running(model, lambda m: pruner(m, P.GroupNormPruner, iterative_steps=2), SMOOTH)
    for number in range(10):
        run.optimizer.zero_grad()
        images, labels = batch(number)
        functional.cross_entropy(model(images), labels).backward()
        run.pruner.regularize(model)
        run.optimizer.step()
        if run.due:
            run.remove()
    assert run.complete
    assert run.pruner.pruning_history()


def test_the_optimizer_goes_on_with_its_momentum():
    model = small_resnet()
    run = running(model, pruner, SMOOTH)
    optimizer = run.optimizer
    train(run, 4)
    momentum = optimizer.state[model.hidden.weight]["momentum_buffer"].clone()
    gone = dict(run.remove())
    kept = [k for k in range(14) if k not in gone["hidden"]]
    inputs = [k for k in range(10) if k not in gone["last"]]
    left = momentum.view(14, 10, 36)[kept][:, inputs].flatten(1)
    assert torch.equal(optimizer.state[model.hidden.weight]["momentum_buffer"], left)
    assert optimizer is run.optimizer
    train(run, 2)


def drawn_in_steps(model: nn.Module) -> Any:
    return pruner(model, iterative_steps=2, importance=IMP.RandomImportance())


def heads_in_steps(model: nn.Module) -> Any:
    heads = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    return tokens(model, iterative_steps=2, **heads)


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Tokens()


@pytest.mark.parametrize(
    ("build", "make", "adapt"),
    [(small_resnet, drawn_in_steps, None), (attention, heads_in_steps, Tokens.count)],
)
@pytest.mark.parametrize(("every", "stop"), [(0, 2), (0, 15), (1, 2), (1, 7), (1, 15)])
def test_a_run_goes_on_from_its_state(build, make, adapt, every, stop):
    given = {"every": every, "adapt": adapt, "example": EXAMPLE}

    def loop(run, steps):
        for _ in range(steps):
            train(run)
            if run.due:
                run.remove()

    model = build()
    run = running(model, make, SmoothPruning(4), EAGER, **given)
    loop(run, stop)
    saved = copy.deepcopy((run.state_dict(), model.state_dict(), run.optimizer.state_dict()))
    torch.manual_seed(3)
    loop(run, 30)

    again = build()
    resumed = TorchPruning(make(again), SmoothPruning(4), EAGER, **given)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    optimizer = torch.optim.SGD(again.parameters(), 0.02, momentum=0.9)
    optimizer.load_state_dict(saved[2])
    resumed.attach(optimizer)
    torch.manual_seed(3)
    loop(resumed, 30)
    assert run.complete
    assert resumed.complete
    assert resumed.removed == run.removed
    assert same(again, model)


def test_hearings_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = Mine()
    run = TorchPruning(mine(model), SmoothPruning(4), SelfRectifying(Hearing(), max_share=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    run.attach(optimizer, lambda: functional.cross_entropy(model(batch(5)[0]), batch(5)[1]))
    finish(run)
    assert run.heard


# ---------------------------------------------------------------------- the example


def test_the_example_is_what_the_first_layer_has_read():
    run = TorchPruning(pruner(small_resnet()))
    assert torch.equal(run.example, EXAMPLE)
    assert torch.equal(
        TorchPruning(pruner(small_resnet()), example=EXAMPLE[:1]).example, EXAMPLE[:1]
    )


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(y)).relu().mean((2, 3)))


def test_where_the_example_is_not_kept_it_has_to_be_given():
    model = Two()
    given = (EXAMPLE, EXAMPLE + 1)
    own = P.BasePruner(
        model, given, IMP.GroupMagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model.head]
    )
    with pytest.raises(AdapterError, match="give it here, too, as example"):
        TorchPruning(own)
    run = TorchPruning(own, example=given)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    run.remove()
    assert model.head.in_features == 4


# ---------------------------------------------------------------------- refusals


class Odd(nn.Module):
    """Two grouped convolutions whose parts do not fit one another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.halves, self.thirds = nn.Conv2d(12, 12, 1, groups=2), nn.Conv2d(12, 12, 1, groups=3)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.halves(x) + self.thirds(x)).mean((2, 3)))


def untouched(model: nn.Module, own: Any, twin: nn.Module) -> None:
    assert same(model, twin)
    assert own.current_step == 0


def refused(model: nn.Module, make: Make, *given: Any, match: str, **named: Any) -> None:
    twin = copy.deepcopy(model)
    own = make(model)
    with pytest.raises(AdapterError, match=match):
        TorchPruning(own, *given, example=EXAMPLE, **named).attach(
            torch.optim.SGD(model.parameters(), 0.1)
        )
    untouched(model, own, twin)


def test_what_cannot_decay_is_refused_by_name():
    torch.manual_seed(0)
    refused(
        small_resnet(),
        lambda m: pruner(m, ignored_layers=[]),
        match="group of 'head' makes the network's output.*ignored_layers",
    )
    refused(
        Tokens(norm=True),
        lambda m: pruner(m, num_heads=dict.fromkeys((m.query, m.key, m.value), 4)),
        match="group of '.*' involves 'norm'.*LayerNorm.*ignored_layers",
    )
    refused(Odd(), pruner, match="'halves' without .* go with them")
    frozen = small_resnet()
    own = pruner(frozen)
    frozen.inner.bias.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"'inner' holds 'inner.bias', which is frozen"):
        TorchPruning(own, SMOOTH).check()
    refused(bias_less(), pruner, match=r"'outer_norm' \(BatchNorm2d\), .* as it has no bias")
    refused(small_resnet(), lambda m: pruner(m, pruning_ratio=0.0), match="no group of layers")
    refused(
        Tokens(),
        lambda m: tokens(m, prune_num_heads=True, head_pruning_ratio=0.5),
        match="group of 'value' would lose whole heads and a part of each",
    )


def test_layer_norm_is_no_hindrance_where_its_group_is_ignored():
    torch.manual_seed(0)
    model = Tokens(norm=True)
    run = running(model, tokens, SMOOTH)
    assert set(run.dpm.groups) == {"value", "hidden"}


def test_gradients_that_are_not_there():
    for importance in (IMP.GroupTaylorImportance(), IMP.GroupHessianImportance()):
        refused(
            small_resnet(),
            lambda m, i=importance: pruner(m, importance=i),
            match="the model has no gradients.*backward",
        )


def test_an_importance_that_fails_is_named_with_its_layer():
    def failing(group):
        if group[0].dep.target.module.weight.shape[0] == 14:
            raise KeyError("scores")
        return torch.rand(len(group[0].idxs))

    def make(m):
        return pruner(m, importance=failing)

    refused(small_resnet(), make, match="failing fails at the group of 'hidden' .KeyError")


def test_an_importance_with_more_scores_than_channels():
    """As upstream's of activations behind a flatten; what upstream leaves whole stays."""

    def counting(group):
        channels = len(group[0].idxs)
        return torch.arange(channels if channels != 10 else 90).float().flip(0)

    def make(ratio):
        return lambda m: pruner(m, importance=counting, pruning_ratio=ratio)

    refused(small_resnet(), make(0.05), match="more scores than the 10 channels of 'last'")
    model = small_resnet()
    with pytest.warns(LeftUnprunedWarning, match="'last' whole"):
        run = running(model, make(0.4))
    while run.due:
        run.remove()
    assert same(model, by_upstream(small_resnet(), make(0.4)))


def test_depgraph_takes_a_pruner_in_place_of_the_model():
    model = small_resnet()
    run = DepGraph(pruner(model), SMOOTH, EAGER, every=2)
    assert isinstance(run, TorchPruning)
    assert (run.model, run.smooth, run.rectify) == (model, SMOOTH, EAGER)
    assert run.options.every == 2


def test_an_importance_with_fewer_scores_than_channels():
    def short(group):
        return torch.rand(len(group[0].idxs) - 1)

    refused(
        small_resnet(),
        lambda m: pruner(m, importance=short),
        match=r"short gives \d+ scores for the \d+ channels of '.*'; it has to give one for each",
    )


def test_an_importance_that_fails_in_a_later_step_leaves_all_as_it_was():
    calls = []

    def failing(group):
        calls.append(group)
        if len(calls) == 7:  # the third of the second step
            raise KeyError("scores")
        return torch.rand(len(group[0].idxs))

    model = small_resnet()
    own = pruner(model, importance=failing, iterative_steps=3)
    with pytest.raises(AdapterError, match=r"failing fails at the group of '.*' .KeyError"):
        TorchPruning(own, SMOOTH, example=EXAMPLE).attach(torch.optim.SGD(model.parameters(), 0.1))
    untouched(model, own, small_resnet())
    own.importance = lambda group: group[0].dep.target.module.weight.detach().flatten(1).norm(dim=1)
    run = TorchPruning(own, example=EXAMPLE).attach(torch.optim.SGD(model.parameters(), 0.1))
    run.remove()
    twin = small_resnet()
    assert same(
        model, by_upstream(twin, lambda m: pruner(m, importance=own.importance, iterative_steps=3))
    )


def test_other_objects_and_settings():
    model = small_resnet()
    with pytest.raises(AdapterError, match="SmallResNet is no pruner of torch-pruning"):
        TorchPruning(model)
    for steps in (-1, 1.5, True):
        for name in ("first", "every"):
            with pytest.raises(AdapterError, match=f"{name} is"):
                TorchPruning(pruner(model), **{name: steps})
    with pytest.raises(AdapterError, match="first is None"):
        TorchPruning(pruner(model), first=None)
    own = pruner(model)
    with pytest.raises(AdapterError, match="decide\\(\\) comes after attach"):
        TorchPruning(own).decide()
    own.step()
    with pytest.raises(AdapterError, match="has taken all of its 1 steps"):
        TorchPruning(own)


def test_a_group_that_would_lose_everything_stays_with_a_warning():
    def make(m):
        for norm in (n for n in m.modules() if isinstance(n, nn.BatchNorm2d)):
            nn.init.ones_(norm.weight)  # all alike, as in a network that was not trained yet
        return pruner(m, P.BNScalePruner, IMP.BNScaleImportance(), global_pruning=True)

    model = small_resnet()
    with pytest.warns(LeftUnprunedWarning, match="leaves 'outer', 'inner' whole|'inner'"):
        run = running(model, make, SMOOTH)
    finish(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert shapes(model) == shapes(by_upstream(small_resnet(), make))


def test_a_removal_that_is_refused_leaves_all_as_it_was(monkeypatch):
    model = small_resnet()
    run = running(model, lambda m: pruner(m, iterative_steps=2), SMOOTH)
    train(run, 4)
    twin = copy.deepcopy(model)

    def odd(*_):
        raise dependency.RemovalError("the outputs would change")

    with monkeypatch.context() as patch:
        patch.setattr(dependency.Comparison, "require_same", odd)
        with pytest.raises(AdapterError, match="would change"):
            run.remove()
    assert same(model, twin)
    run.remove()
    finish(run)
    assert shapes(model) == shapes(
        by_upstream(small_resnet(), lambda m: pruner(m, iterative_steps=2))
    )


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(0, 4),
    every=st.sampled_from([0, 1, 3, None]),
    rounds=st.integers(1, 3),
    decay=st.sampled_from([0, 1, 4]),
)
def test_a_training_is_long_enough_by_the_check_if_and_only_if_it_is(first, every, rounds, decay):
    """Against the run itself, with as many steps as the check allows at least, and one fewer."""
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def run(steps: int) -> TorchPruning:
        model = copy.deepcopy(dense)
        own = P.BasePruner(
            model, x, IMP.GroupMagnitudeImportance(), pruning_ratio=0.5,
            iterative_steps=rounds, ignored_layers=[model[2]],
        )  # fmt: skip
        smooth = SmoothPruning(decay) if decay else None
        return TorchPruning(own, smooth, first=first, every=every, training=Training(steps))

    needed = 0
    endless = run(10**6)
    optimizer = torch.optim.SGD(endless.model.parameters(), lr=1e-3)
    endless.attach(optimizer)
    while True:
        while endless.due or (every is None and not endless.complete and not endless._open):
            endless.remove() if endless.due else endless.decide()
        if endless.complete:
            break
        optimizer.zero_grad()
        endless.model(x).square().sum().backward()
        optimizer.step()
        needed += 1
    run(max(needed, 1)).check()
    if needed > 1:
        with pytest.raises(AdapterError, match=f"to {needed} steps.*the training has {needed - 1}"):
            run(needed - 1).check()


@pytest.mark.parametrize("constructed", ["before", "after"])
def test_what_a_pruner_took_before_a_run_has_to_be_told_when_saving(tmp_path, constructed):
    model = small_resnet()
    own = pruner(model, iterative_steps=2)
    dense_widths = {n: len(p) for n, p in model.named_parameters()}
    run = TorchPruning(own, None) if constructed == "before" else None
    own.step()
    run = run or TorchPruning(own, None)
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    removal = run.remove()
    path = tmp_path / "small.safetensors"
    for told in (removal, run.removed, run.removed + Removal()):
        with pytest.raises(SavedModelError, match="had taken 1 of its 2 steps before"):
            told.save(path, model)
    assert not path.exists()
    twin = small_resnet()
    first = TorchPruning(pruner(twin, iterative_steps=2), None, every=None)
    first.attach(torch.optim.SGD(twin.parameters(), lr=0.1))
    first.decide()
    whole = first.remove() + run.removed
    assert sum(len(c) for _, c in whole) > 0
    assert any(len(p) < dense_widths[n] for n, p in model.named_parameters())
    whole.save(path, model)
    again = load_pruned(path, small_resnet(), EXAMPLE)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("always", [False, True])
def test_an_error_in_a_function_of_ones_own_is_told_as_its_own(always):
    def adapt(model: nn.Module) -> None:
        if always or len(model.stem.weight) < 12:
            raise KeyError("heads")

    model = small_resnet()
    run = TorchPruning(pruner(model), SMOOTH, adapt=adapt)
    with pytest.raises(AdapterError, match=r"given as adapt= fails.*KeyError: 'heads'") as raised:
        run.check()
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(AdapterError, match="adapt is 3; give a function"):
        TorchPruning(pruner(model), SMOOTH, adapt=3)


class Idle(nn.Module):
    """Has a layer that never runs, and one whose output is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 5)
        self.idle, self.ignored = nn.Conv2d(3, 4, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(functional.relu_(self.a(x))).relu())
        return y


def test_layers_that_the_pruners_graph_lacks_are_named():
    """In some releases of PyTorch ``a`` is one: in a sequence its output is a view."""
    model, said = Idle(), []
    left = [model.head, model.ignored]
    own = P.BasePruner(
        model, torch.randn(2, 3, 6), IMP.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=left,
    )  # fmt: skip
    run = DepGraph(own, SMOOTH, progress=said.append)
    grouped = {group.name for group in run.groups()}
    assert grouped | set(run.skipped) == {"a", "b", "idle"}
    assert "b" in grouped
    assert not grouped & set(run.skipped)
    assert "'idle' keeps all its channels, as the graph" in run.skipped["idle"]
    assert [f"left out: {why}" for why in run.skipped.values()] == said
    own.ignored_layers.extend([model.a, model.b])
    with pytest.raises(AdapterError, match=r"may prune no group.*; 'idle' keeps all"):
        TorchPruning(own, SMOOTH).check()
