"""DepGraph's rankings, its rounding and its bounds: upstream's, and held in every variant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import GradientError, Phase, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters import gradients
from dpm_core.adapters.base import AdapterError, Training, count_macs
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.gradients import mean_gradients
from dpm_core.third_party.pruner import IMPORTANCES
from experiments.inputs import models
from tests.support.frameworks import (
    CASES,
    EXAMPLE,
    Drive,
    Grouped,
    batch,
    bias_less,
    check_once,
    group_normed,
    mixed,
    small_resnet,
    until_removed,
)

ALL = list(IMPORTANCES)
EAGER = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.4)


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Grouped()


NETS = {
    "small": small_resnet,
    "mixed": mixed,
    "grouped": grouped,
    "group-normed": group_normed,
    "bias-less": bias_less,
}


class Batches:
    """Losses of a model on one batch after another; and gradients, by plain backward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.read = model, 0

    def __call__(self) -> Tensor:
        images, labels = batch(self.read)
        self.read += 1
        return functional.cross_entropy(self.model(images), labels)


def plain_gradients(model: nn.Module, batches: int, squared: bool) -> dict[str, Tensor]:
    """As :func:`mean_gradients`, with nothing of it."""
    model = copy.deepcopy(model).train()
    loss, total = Batches(model), None
    for _ in range(batches):
        model.zero_grad()
        loss().backward()
        found = {n: p.grad**2 if squared else p.grad.clone() for n, p in model.named_parameters()}
        total = found if total is None else {n: total[n] + g for n, g in found.items()}
    return {n: g / batches for n, g in total.items()}


def with_gradients(model: nn.Module, importance: str, batches: int = 3) -> nn.Module:
    if importance in ("taylor", "hessian"):
        found = plain_gradients(model, batches, importance == "hessian")
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
    return model


def adapter(model: nn.Module, smooth=None, rectify=None, **options: Any) -> DepGraph:
    options = {"batches": 3, "steps": 25, **options}
    return DepGraph(model, EXAMPLE, DepGraphOptions(**options), smooth, rectify)


def attached(run: DepGraph) -> DepGraph:
    check_once(run)
    return run.attach(torch.optim.SGD(run.model.parameters(), lr=0.05), Batches(run.model))


def widths(model: nn.Module) -> dict[str, int]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return {
        n: m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for n, m in model.named_modules()
        if isinstance(m, kinds) and n != "head"
    }


# ---------------------------------------------------------------------- upstream's own

OWN = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "fpgm": tp.importance.FPGMImportance,
    "lamp": tp.importance.LAMPImportance,
    "bn-scale": tp.importance.BNScaleImportance,
}


def upstream(model: nn.Module, importance: str, speed_up: float, **settings: Any) -> nn.Module:
    """The recipe of upstream's own documentation, written out with nothing of this project."""
    with_gradients(model.train(), importance)
    pruner = tp.pruner.GroupNormPruner(
        model.eval(),
        EXAMPLE,
        importance=OWN[importance](),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=25,
        ignored_layers=[model.head],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **settings,
    )
    dense = count_macs(model, EXAMPLE)
    while count_macs(model, EXAMPLE) > dense / speed_up:
        pruner.step()
    return model


@pytest.mark.parametrize("isomorphic", [False, True], ids=["global", "isomorphic"])
@pytest.mark.parametrize("importance", ALL)
def test_base_is_upstream_bit_for_bit_whatever_ranks(importance, isomorphic):
    speed_up = 1.2 if importance == "bn-scale" else 1.8  # two groups have no BatchNorm
    expected = upstream(small_resnet(), importance, speed_up, isomorphic=isomorphic).state_dict()
    run = adapter(small_resnet(), importance=importance, speed_up=speed_up, isomorphic=isomorphic)
    attached(run).remove()
    left = run.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in left.items())
    assert any(v.shape != small_resnet().state_dict()[k].shape for k, v in left.items())


@pytest.mark.parametrize("importance", [*ALL, "random"])
def test_sp_selects_what_base_removes_whatever_ranks(importance):
    options = {"importance": importance, "speed_up": 1.3}
    removal = attached(adapter(small_resnet(), **options)).remove()
    sp = attached(adapter(small_resnet(), SmoothPruning(4), **options))
    decaying = {g: (sp.dpm.phases(g) == Phase.DECAYING).nonzero()[:, 0] for g in sp.dpm.groups}
    assert {g: sp.channels(g, k) for g, k in decaying.items() if len(k)} == dict(removal)


@pytest.mark.parametrize("net", [*NETS, "resnet20"])
def test_first_and_second_order_are_the_magnitude_where_gradients_say_so(net):
    """|w g| with g = w, and w^2 h with h = 1, are w^2: whatever goes together, and in any order."""
    model = models.build("resnet20", 3, 5, seed=0) if net == "resnet20" else NETS[net]()
    example = torch.randn(2, 3, 32, 32) if net == "resnet20" else EXAMPLE
    run = DepGraph(model, example, DepGraphOptions(ratio=0.5))
    scores = {}
    for importance in ("magnitude", "taylor", "hessian"):
        for parameter in model.parameters():
            parameter.grad = (
                torch.ones_like(parameter) if importance == "hessian" else parameter.detach()
            )
        object.__setattr__(run.options, "importance", importance)
        pruner = run._new_pruner(model, gradients=True)
        scores[importance] = {g.root: pruner.importance(g) for g in pruner.groups}
    # Upstream's first order passes over BatchNorms.
    layers = [nn.modules.conv._ConvNd, nn.Linear]
    pruner._importance = tp.importance.GroupMagnitudeImportance(target_types=layers)
    assert scores["magnitude"]
    for group in pruner.groups:
        expected = {"hessian": scores["magnitude"][group.root], "taylor": pruner.importance(group)}
        for importance, score in expected.items():
            torch.testing.assert_close(scores[importance][group.root], score)


def test_positions_in_another_order_keep_their_channels():
    """Upstream sorts the positions alone."""
    from dpm_core.third_party.pruner import _sorted

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 4, 4))
    item = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1, 2, 3])[0]
    odd = type(item)(item.dep, [2, 0, 3, 1])
    odd.root_idxs = [7, 8, 9, 6]
    ordered = _sorted(odd)
    assert (ordered.idxs, ordered.root_idxs) == ([0, 1, 2, 3], [8, 6, 7, 9])
    assert (odd.idxs, ordered.dep) == ([2, 0, 3, 1], item.dep)


def test_scales_of_batch_norms_leave_groups_without_one_alone():
    run = attached(adapter(small_resnet(), importance="bn-scale", speed_up=1.2))
    run.remove()
    left = widths(run.model)
    assert (left["last"], left["hidden"]) == (10, 14)
    assert left["inner"] < 16
    without = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    with pytest.raises(AdapterError, match=r"'bn-scale' says nothing .*none has a BatchNorm"):
        adapter(without, importance="bn-scale", speed_up=1.2).check()
    with pytest.raises(AdapterError, match=r"speed_up 40.* is impossible"):  # for it, not for all
        adapter(small_resnet(), importance="bn-scale", speed_up=40.0).check()
    adapter(small_resnet(), speed_up=40.0).check()


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("squared", [False, True], ids=["first order", "second order"])
def test_gradients_are_means_over_batches_and_nothing_changes(squared):
    model = small_resnet().double().train()
    model.dropout = nn.Dropout(0.5)  # draws, if only it is asked
    loss = Batches(model)
    draw = torch.get_rng_state()

    def drawn() -> Tensor:
        images, labels = batch(loss.read)
        loss.read += 1
        return functional.cross_entropy(model(model.dropout(images.double() * 0) + images), labels)

    model.zero_grad()
    functional.cross_entropy(model(batch(9)[0].double()), batch(9)[1]).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    own = {n: p.grad.clone() for n, p in model.named_parameters()}
    found = mean_gradients(model, drawn, 3, squared=squared)
    assert loss.read == 3
    assert torch.equal(torch.get_rng_state(), draw)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, own[n]) for n, p in model.named_parameters())

    class InDouble(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.double())

    expected = plain_gradients(InDouble(), 3, squared)
    assert {f"model.{n}" for n in found} == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[f"model.{name}"])


def test_several_processes_rank_by_what_one_would(monkeypatch):
    """Each reads its share of a batch: gradients are averaged, and squared after that."""
    model = small_resnet().double().eval()

    def losses(share):
        for number in range(2):
            images, labels = batch(number)
            part = slice(None) if share is None else slice(8 * share, 8 * share + 8)
            yield functional.cross_entropy(model(images[part].double()), labels[part])

    each = []

    class Two:
        count = 2

        @classmethod
        def found(cls):
            return cls()

        def together(self, what):
            return torch.enable_grad()

        def total(self, values):
            other = torch.autograd.grad(next(others), list(model.parameters()))
            each.append(values)
            return values + torch.cat([g.flatten() for g in other])

        def close(self):
            each.append("closed")

    one = mean_gradients(model, iter(losses(None)).__next__, 2, squared=True)
    others = losses(1)
    monkeypatch.setattr(gradients, "Processes", Two)
    two = mean_gradients(model, iter(losses(0)).__next__, 2, squared=True)
    assert each[-1] == "closed"
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient)


NO_GRADIENTS = {
    "not finite": (lambda model: model(batch(0)[0]).sum() * torch.nan, "loss .* is nan"),
    "an infinite gradient": (
        lambda model: model(batch(0)[0]).abs().sum() * 1e-30 + (model.head.bias * 0).sqrt().sum(),
        "gradient of 'head.bias' has values that are not finite",
    ),
    "detached": (lambda model: model(batch(0)[0]).sum().detach(), "does not depend on"),
    "of another model": (
        lambda model: small_resnet()(batch(0)[0]).sum(),
        "does not depend on the model's parameters",
    ),
}


@pytest.mark.parametrize("case", NO_GRADIENTS)
def test_what_gives_no_gradients_is_refused_and_nothing_has_changed(case):
    loss, words = NO_GRADIENTS[case]
    model = small_resnet()
    run = adapter(model, SmoothPruning(4), importance="taylor", speed_up=1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(GradientError, match=words):
        run.attach(optimizer, lambda: loss(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(AdapterError, match=r"ranks by gradients.*attach\(optimizer, loss\)"):
        run.attach(optimizer)
    attached(run)
    assert run.dpm.count(Phase.DECAYING)


def test_parameters_that_no_loss_depends_on_have_gradients_of_zero():
    class Aside(nn.Module):
        """A second branch that is multiplied by zero, and a layer that is never called."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.unused = nn.Linear(3, 2, bias=False)
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            parts = torch.cat([self.one(x).relu(), self.two(x).relu() * 0], 1)
            return self.head(parts.mean((2, 3)))

    model = Aside()
    found = mean_gradients(model, Batches(model), 1)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert [n for n, g in found.items() if not g.any()] == [
        "two.weight",
        "two.bias",
        "unused.weight",
    ]


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_replacements_are_ranked_by_the_gradients_of_the_decision(importance):
    model = small_resnet()
    run = adapter(model, SmoothPruning(6), EAGER, importance=importance, speed_up=2.0)
    expected = copy.deepcopy(model)
    attached(run)
    first = {g: run.dpm.phases(g) == Phase.DECAYING for g in run.dpm.groups}
    pruner = run._new_pruner(with_gradients(expected, importance), gradients=True)
    scores = {g.root: pruner.importance(g) for g in pruner.groups}
    until_removed(run)
    again = [e for e in run.dpm.events if e.kind == "decay" and e.wave == 1]
    assert again
    for event in again:
        free = (~first[event.group]).nonzero()[:, 0].tolist()
        ranked = sorted(free, key=lambda k: float(scores[event.group][k]))
        assert sorted(event.structures) == sorted(ranked[: len(event.structures)])


SCHEDULES = {
    "at once": ({}, {"prune": 20}),
    "after sparse learning": ({}, {"sparse": 7, "prune": 20}),
    "in rounds": ({"rounds": 2, "round_epochs": 5}, {"prune": 32}),
    "in rounds after sparse learning": (
        {"rounds": 2, "round_epochs": 5},
        {"sparse": 7, "prune": 32},
    ),
}


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_that_are_read_count_as_steps(schedule, variant):
    own, stages = SCHEDULES[schedule]
    options = {"importance": "taylor", "batches": 3, "speed_up": 1.6, "steps": 25, **own}
    case, decided = CASES[0], []
    run = case.adapter(
        small_resnet(), variant, smooth=SmoothPruning(6), stages=stages, options=options
    )
    drive, decide = Drive(case, run), run.decide

    def noted() -> None:
        decided.append(drive.step)
        decide()
        assert drive.step == decided[-1] + 3

    run.decide = noted
    drive.run()
    assert run.complete
    assert drive.step == sum(stages.values())
    assert run.heard == 3 * own.get("rounds", 1)
    # With sparse learning the first three are its last steps; a round starts at its own step.
    start = max(stages.get("sparse", 0) - 3, 0)
    rounds = [start] if not own else [start, stages.get("sparse", 0) + 15]
    assert decided == rounds


def test_too_short_a_training_for_the_batches_is_refused():
    def check(stages, batches):
        options = DepGraphOptions(speed_up=1.6, importance="taylor", batches=batches)
        sparse = Training(stages[0], 3) if stages[0] else None
        training = Training(stages[1], 3, sparse)
        DepGraph(small_resnet(), EXAMPLE, options, SmoothPruning(6), training=training).check()

    check((0, 10), 4)
    check((5, 10), 4)
    with pytest.raises(AdapterError, match=r"takes up to 11 steps.*training has 10"):
        check((0, 10), 5)
    with pytest.raises(AdapterError, match=r"reads 5 batches .* sparse learning, which has 5"):
        check((5, 20), 5)


# ---------------------------------------------------------------------- rounding and bounds


@st.composite
def bounds(draw) -> dict[str, Any]:
    options: dict[str, Any] = {
        "round_to": draw(st.sampled_from([None, 1, 2, 3, 4])),
        "max_pruning_ratio": draw(st.sampled_from([1.0, 0.8, 0.5, 0.34])),
        "global_pruning": draw(st.booleans()),
        "importance": draw(st.sampled_from(["magnitude", "random", "taylor"])),
        "steps": draw(st.sampled_from([5, 25])),
    }
    options["isomorphic"] = options["global_pruning"] and draw(st.booleans())
    if draw(st.booleans()):
        options["speed_up"] = draw(st.sampled_from([1.1, 1.4, 1.8, 2.5]))
    else:
        options["ratio"] = draw(st.sampled_from([0.1, 0.3, 0.5]))
    return options


def sizes(net: str) -> dict[str, tuple[int, int]]:
    """By root: channels of a structure, and structures of the group."""
    run = adapter(NETS[net](), ratio=0.3)
    return {g.root: (len(g.members[0]), g.structures) for g in run._new_pruner(run.model).groups}


SIZES = {net: sizes(net) for net in NETS}


@pytest.mark.slow
@given(st.sampled_from(list(NETS)), bounds())
@settings(max_examples=20)
def test_rounding_bounds_and_target_hold_or_are_refused(net, options):
    model = NETS[net]()
    dense = count_macs(model, EXAMPLE)
    try:
        run = attached(adapter(model, **options))
        removal = run.remove()
    except AdapterError as refused:
        assert "\n" not in str(refused)  # noqa: PT017
        assert widths(model) == widths(NETS[net]())
        return
    left = widths(model)
    for root, channels in removal:
        size, structures = SIZES[net][root]
        assert left[root] == size * structures - len(channels)
        assert left[root] > 0
        if options["round_to"]:
            assert left[root] % options["round_to"] == 0
        assert len(channels) <= options["max_pruning_ratio"] * size * structures + 1e-9
    if "speed_up" in options:
        assert count_macs(model, EXAMPLE) <= dense / options["speed_up"]
    else:
        total = sum(structures for _, structures in SIZES[net].values())
        gone = sum(len(channels) // SIZES[net][root][0] for root, channels in removal)
        assert gone >= total - int(total * (1 - options["ratio"]))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("importance", "bound"),
    [("taylor", {"round_to": 4}), ("magnitude", {"max_pruning_ratio": 0.5})],
)
def test_all_variants_end_in_the_same_widths(net, importance, bound):
    ends = []
    for smooth, rectify in ((None, None), (SmoothPruning(6), None), (SmoothPruning(6), EAGER)):
        run = adapter(NETS[net](), smooth, rectify, importance=importance, speed_up=1.5, **bound)
        attached(run)
        if smooth is not None:
            until_removed(run)
        else:
            run.remove()
        if rectify is not None:
            kinds = [e.kind for e in run.dpm.events]
            assert "release" in kinds
        ends.append(widths(run.model))
    assert ends[0] == ends[1] == ends[2]
    assert ends[0] != widths(NETS[net]())


def test_a_bound_holds_over_all_rounds():
    """Also where a round alone would not reach it."""
    options = {"speed_up": 3.0, "steps": 25, "rounds": 3, "round_epochs": 2}
    ends = {}
    for bound in (1.0, 0.5):
        run = CASES[0].adapter(
            small_resnet(),
            "base",
            stages={"prune": 18},
            options={**options, "max_pruning_ratio": bound},
        )
        ends[bound] = widths(Drive(CASES[0], run).run().model)
    whole = widths(small_resnet())
    assert all(ends[0.5][name] >= whole[name] / 2 for name in whole)
    assert any(ends[1.0][name] < whole[name] / 2 for name in whole)


def test_upstreams_rounding_is_kept_where_it_says_what_is_meant():
    """Every channel a structure, and none of a layer's last: then it is upstream's, bit for bit."""

    def plain():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in ((3, 24), (24, 32), (32, 40)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.add_module("head", nn.Linear(40, 5))
        return model

    expected = upstream(plain(), "magnitude", 2.0, round_to=4).state_dict()
    run = attached(adapter(plain(), speed_up=2.0, round_to=4))
    run.remove()
    assert all(torch.equal(v, expected[k]) for k, v in run.model.state_dict().items())


REFUSED = {
    "an unknown importance": ({"importance": "size"}, "importance is 'size'; give magnitude"),
    "lamp by the mean": ({"importance": "lamp", "normalizer": "mean"}, "'lamp' is a normalizer"),
    "no batches": ({"batches": 0}, "batches"),
    "rounding to nothing": ({"round_to": 0}, "round_to is 0"),
    "a bound of nothing": ({"max_pruning_ratio": 0.0}, "max_pruning_ratio is 0.0"),
    "a bound beyond all": ({"max_pruning_ratio": 1.5}, "max_pruning_ratio is 1.5"),
    "no number": ({"max_pruning_ratio": float("nan")}, "max_pruning_ratio is nan"),
    "alike, and each by itself": ({"isomorphic": True, "global_pruning": False}, "isomorphic"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_say_nothing_are_refused(case):
    options, words = REFUSED[case]
    with pytest.raises(AdapterError, match=words):
        DepGraphOptions(speed_up=2.0, **options)


def test_a_ratio_beyond_its_bound_is_refused():
    with pytest.raises(AdapterError, match=r"ratio 0\.6 is more than max_pruning_ratio, 0\.5"):
        DepGraphOptions(ratio=0.6, max_pruning_ratio=0.5)


TOO_MUCH = {
    "rounded": ({"speed_up": 4.0, "round_to": 8}, "with as few channels as may be left"),
    "bounded": ({"speed_up": 5.0, "max_pruning_ratio": 0.5}, "with as few channels as may be"),
    "a ratio that is rounded away": ({"ratio": 0.5, "round_to": 8}, "ratio 0.5 is not met"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_target_that_bounds_keep_out_of_reach_is_refused_before_any_work(case):
    options, words = TOO_MUCH[case]
    with pytest.raises(AdapterError, match=words):
        adapter(small_resnet(), SmoothPruning(4), **options).check()
