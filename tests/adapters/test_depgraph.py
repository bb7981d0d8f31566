"""DepGraph: base is upstream, sp selects what upstream removes, and odd layers are refused."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from importlib import metadata

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from dpm_core import Phase, SmoothPruning
from dpm_core.adapters.base import AdapterError, count_macs
from dpm_core.adapters.depgraph import (
    DepGraph,
    DepGraphOptions,
    LeftUnprunedWarning,
    structure_groups,
)
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import graph, upstreams
from dpm_core.third_party.groups import UnsupportedLayerError
from dpm_core.third_party.pruner import Pruner
from experiments.inputs import models
from tests.support import rounding, torchvisions
from tests.support.frameworks import (
    CASES,
    EAGER,
    EXAMPLE,
    Case,
    Drive,
    Grouped,
    Shuffled,
    batch,
    group_normed,
    small_resnet,
    until_removed,
)

SMOOTH = SmoothPruning(4)


def depgraph(model: nn.Module, smooth: SmoothPruning | None = SMOOTH, **options) -> DepGraph:
    return DepGraph(model, EXAMPLE, DepGraphOptions(**options), smooth)


def attached(adapter: DepGraph) -> DepGraph:
    return adapter.attach(torch.optim.SGD(adapter.model.parameters(), lr=0.05))


def upstream(model: nn.Module, speed_up: float, sparse_steps: int) -> nn.Module:
    """The recipe of upstream's own documentation, written out with nothing of this project."""
    importance = tp.importance.GroupMagnitudeImportance(
        p=2, normalizer="max" if sparse_steps else "mean"
    )

    def pruner():
        return tp.pruner.GroupNormPruner(
            model,
            EXAMPLE,
            importance=importance,
            reg=5e-4,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=25,
            ignored_layers=[model.head],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )

    made = pruner()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(sparse_steps):
        model.train()
        if step and step % 3 == 0:
            made.update_regularizer()
        images, labels = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        made.regularize(model)
        optimizer.step()
    model.eval()
    made = pruner()
    dense = count_macs(model, EXAMPLE)
    while count_macs(model, EXAMPLE) > dense / speed_up:
        made.step()
    return model


@pytest.mark.parametrize("sparse_steps", [0, 7])
def test_base_is_upstream_bit_for_bit(sparse_steps):
    case = CASES[1 if sparse_steps else 0]
    expected = upstream(small_resnet(), 2.0, sparse_steps)
    stages = {"sparse": 7, "prune": 0} if sparse_steps else {"prune": 0}
    drive = Drive(case, case.adapter(small_resnet(), "base", stages=stages)).run()
    left, right = drive.model.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert right["stem.weight"].shape != small_resnet().state_dict()["stem.weight"].shape


NETS = {
    "small": (small_resnet, EXAMPLE),
    "vgg-digits": (lambda: models.build("vgg-digits", 1, 10, seed=0), torch.randn(2, 1, 8, 8)),
    "resnet20": (lambda: models.build("resnet20", 3, 10, seed=0), torch.randn(2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "options", [{"speed_up": 1.8, "steps": 25}, {"ratio": 0.4}], ids=["speed-up", "ratio"]
)
def test_sp_selects_exactly_what_base_removes(name, options):
    build, example = NETS[name]
    settings = example, DepGraphOptions(**options)
    base = attached(DepGraph(build(), *settings))
    removal = base.remove()
    sp = attached(DepGraph(build(), *settings, SMOOTH))
    decaying = {g: (sp.dpm.phases(g) == Phase.DECAYING).nonzero()[:, 0] for g in sp.dpm.groups}
    assert {g: sp.channels(g, k) for g, k in decaying.items() if len(k)} == dict(removal)

    # And removing the selection from the untouched model gives upstream's model, bit for bit.
    model = build()
    removal.apply(model, example, cut=True)
    expected = base.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_gradients_that_are_off_do_not_hinder_upstreams_tracing():
    models = []
    for off in (False, True):
        adapter = attached(depgraph(small_resnet(), None, ratio=0.5))
        with torch.no_grad() if off else contextlib.nullcontext():
            adapter.remove()
        models.append(adapter.model.state_dict())
    assert all(torch.equal(models[0][k], v) for k, v in models[1].items())


def test_a_ratio_removes_that_share_of_channels():
    model = small_resnet()
    attached(depgraph(model, None, ratio=0.5, global_pruning=False)).remove()
    assert model.inner.out_channels == 8
    assert model.stem.out_channels == 6
    assert model.head.out_features == 5


# ---------------------------------------------------------------------- rounds


def in_rounds(variant: str, stages: dict, **options) -> tuple[DepGraph, list[nn.Module]]:
    """Trained to the end, in epochs of 3 steps; and the model as it was after each removal."""
    model, seen = small_resnet(), []
    adapter = CASES[0].adapter(
        model, variant, smooth=SMOOTH, stages=stages, options={"steps": 25, **options}
    )
    remove = adapter.remove

    def removed() -> Removal:
        removal = remove()
        seen.append(copy.deepcopy(model))
        return removal

    adapter.remove = removed
    Drive(CASES[0], adapter).run()
    return adapter, seen


def widths(model: nn.Module) -> list[int]:
    layers = (model.stem, model.inner, model.outer, model.last)
    return [layer.out_channels for layer in layers] + [model.hidden.out_features]


@pytest.mark.parametrize("global_pruning", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("variant", ["base", "sp"])
def test_every_round_goes_its_share_of_the_way_to_the_speed_up(variant, global_pruning):
    dense = count_macs(small_resnet(), EXAMPLE)
    options = {"rounds": 3, "round_epochs": 2, "global_pruning": global_pruning}
    _, seen = in_rounds(variant, {"prune": 18}, speed_up=3.0, **options)
    assert len(seen) == 3
    for number, model in enumerate(seen, 1):
        goal = dense / 3 ** (number / 3)
        assert goal * 0.85 < count_macs(model, EXAMPLE) <= goal


@pytest.mark.parametrize("variant", ["base", "sp"])
def test_a_ratio_in_rounds_leaves_what_it_leaves_in_one_go(variant):
    made, seen = in_rounds(
        variant, {"prune": 18}, ratio=0.5, rounds=3, round_epochs=2, global_pruning=False
    )
    # What upstream leaves of C channels at a ratio r is int(C (1 - r)).
    for number, model in enumerate(seen, 1):
        share = 0.5 ** (number / 3)
        assert widths(model) == [int(c * share) for c in (12, 16, 12, 10, 14)]
    (once,) = in_rounds(variant, {"prune": 18}, ratio=0.5, global_pruning=False)[1]
    assert widths(seen[-1]) == widths(once)
    assert made.pruned == 6 + 8 + 5 + 7  # stem and outer are tied


@pytest.mark.parametrize("variant", ["base", "sp"])
def test_a_global_ratio_in_rounds_is_one_of_all_channels(variant):
    made, seen = in_rounds(variant, {"prune": 18}, ratio=0.4, rounds=3, round_epochs=2)
    total = 12 + 16 + 10 + 14
    assert made.pruned == total - int(total * 0.6)
    first, _, last = (sum(widths(m)) - m.outer.out_channels for m in seen)
    assert (first, last) == (int(total * 0.6 ** (1 / 3)), int(total * 0.6))


def test_a_round_decides_anew():
    """A structure that was released is immune for the rest of its round only."""
    case = next(c for c in CASES if c.name == "depgraph-rounds")
    drive = Drive(case, case.adapter(case.build(), "sr")).run(stop_after=12)
    (first,), dpm = drive.events, drive.adapter.dpm
    assert any(e.kind == "release" for e in first)
    assert {(e.kind, e.step, e.wave) for e in dpm.events} == {("decay", 12, 0)}
    for group in dpm.groups:
        assert bool((dpm.available(group) | (dpm.phases(group) == Phase.DECAYING)).all())


def test_the_events_of_a_further_core_are_new_from_its_first_on():
    case = next(c for c in CASES if c.name == "depgraph-rounds")
    adapter, new, cores = case.adapter(case.build(), "sr"), [], []
    after = adapter.after_step

    def look() -> None:
        after()
        new.extend(adapter.new_events())
        if not any(adapter.dpm is core for core in cores):
            cores.append(adapter.dpm)

    adapter.after_step = look
    Drive(case, adapter).run()
    assert len(cores) == 2
    assert new == [e for core in cores for e in core.events]


@pytest.mark.parametrize(
    ("variant", "stages", "options", "message"),
    [
        ("sp", {"prune": 18}, {"round_epochs": 1}, "next round starts 3 steps.*raise round_epochs"),
        ("sp", {"prune": 15}, {"round_epochs": 2}, "starts after 12 steps.*more epochs.*rounds"),
        ("base", {"prune": 12}, {"round_epochs": 2}, "starts after 12 steps.*more epochs.*rounds"),
    ],
)
def test_rounds_that_do_not_fit_the_training_are_refused(variant, stages, options, message):
    with pytest.raises(AdapterError, match=message):
        in_rounds(variant, stages, speed_up=2.0, rounds=3, **options)


# ---------------------------------------------------------------------- networks


def test_grouped_depthwise_transposed_and_concatenated_layers_leave_equal_outputs():
    torch.manual_seed(0)
    model = Grouped()
    adapter = depgraph(model, ratio=0.5, global_pruning=False)
    # In the first group upstream removes channels of each of the four convolution groups together.
    assert (4, 4) in {tuple(g.slices[0].index.shape) for g in adapter.groups()}
    before, after = until_removed(adapter)
    rounding.assert_exact(after, before)
    assert model.grouped.out_channels == 12


LARGE = {
    **{n: {"ratio": 0.3} for n in ("resnet18", "mobilenet_v2", "resnext", "densenet")},
    **{n: {"speed_up": 2.0, "steps": 25} for n in ("vgg16-quarter", "resnet56")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks_give_the_zeroed_models_outputs(name):
    torch.manual_seed(0)
    recipe = "speed_up" in LARGE[name]
    model = models.build(name, 3, 5, seed=0) if recipe else torchvisions.BUILD[name](5)
    example = torch.randn(2, 3, *((32, 32) if recipe else (64, 64)))
    adapter = DepGraph(model, example, DepGraphOptions(**LARGE[name]), SmoothPruning(1))
    dense = count_macs(model, example)
    before, after = until_removed(adapter, learning_rate=1e-3)
    rounding.assert_exact(after, before)
    assert count_macs(model, example) <= (dense / 2 if recipe else dense - 1)


# ---------------------------------------------------------------------- ranking


def test_a_replacement_is_upstreams_next_in_rank(monkeypatch):
    case: Case = CASES[0]
    adapter = case.adapter(small_resnet(), "sr")
    drive = Drive(case, adapter)
    chosen: dict[str, list[int]] = {}
    scores: dict[str, torch.Tensor] = {}
    original = Pruner.importance

    def importance(pruner, group):
        score = original(pruner, group)
        scores[group.root] = score.clone()
        return score

    monkeypatch.setattr(Pruner, "importance", importance)
    drive.run()
    for event in adapter.dpm.events:
        if event.kind == "decay" and event.wave == 1:
            chosen[event.group] = list(event.structures)
    assert chosen
    first = {
        e.group: set(e.structures) for e in adapter.dpm.events if e.kind == "decay" and e.wave == 0
    }
    for root, structures in chosen.items():
        free = [k for k in range(len(scores[root])) if k not in first[root]]
        expected = sorted(free, key=lambda k: float(scores[root][k]))[: len(structures)]
        assert sorted(structures) == sorted(expected)


def test_a_ranking_drawn_at_random_is_the_runs_own():
    """The same for a seed, another for another seed, and blind to the weights."""

    def selected(seed: int, scale: float) -> Removal:
        model = small_resnet()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale * torch.rand(parameter.shape).sign())
        options = DepGraphOptions(ratio=0.5, importance="random")
        return attached(DepGraph(model, EXAMPLE, options, seed=seed)).remove()

    assert selected(0, 1.0) == selected(0, -3.0)
    assert selected(0, 1.0) != selected(1, 1.0)


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
def test_groupnorms_end_with_whole_groups(variant):
    case = replace(
        CASES[0],
        build=group_normed,
        options={"ratio": 0.5, "global_pruning": False, "skip_unsupported": False},
    )
    model = Drive(case, case.adapter(case.build(), variant)).run().model
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(3, 6), (4, 8), (3, 6)]
    assert model.last.out_channels == 5


# ---------------------------------------------------------------------- what is refused


class WithLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(functional.relu(self.hidden(self.norm(self.embed(x)))))


def test_a_layer_norm_is_refused_by_name_and_can_be_left_out():
    model, example = WithLayerNorm(), torch.randn(2, 12)
    with pytest.raises(AdapterError, match=r"'norm'.*LayerNorm.*'embed'.*ignored"):
        DepGraph(model, example, DepGraphOptions(ratio=0.5))
    DepGraph(model, example, DepGraphOptions(ratio=0.5, ignored=("embed",))).check()
    assert [g.name for g in structure_groups(model, example, ("embed",))] == ["hidden"]


def test_a_batch_norm_without_weights_is_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    with pytest.raises(AdapterError, match=r"BatchNorm2d.*running mean"):
        depgraph(model, ratio=0.5)


def test_what_upstream_cannot_follow_is_refused_with_the_layers_and_the_reason():
    model = Shuffled()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=r"behind 'aside\.0', 'stem' .*positions.*shuffle"):
        depgraph(model, ratio=0.5)
    with pytest.raises(UnsupportedLayerError, match=r"behind 'aside\.0', 'stem'"):
        structure_groups(model, EXAMPLE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # What goes wrong in the network itself is not upstream's.
    with pytest.raises(RuntimeError, match="expected input"):
        structure_groups(model, torch.randn(2, 4, 8, 8))


class Between(nn.Module):
    """Two layers, then something that upstream takes for a plain flatten, then two more."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.between = between
        self.hidden = nn.Linear(6 * 64, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.between(functional.relu(self.norm(self.conv(x))))
        return self.head(functional.relu(self.hidden(x)))


NOT_EXACT = {
    "channels in another order": lambda x: x.flip(1).flatten(1),
    "zeros do not stay zeros": lambda x: x.sigmoid().flatten(1),
}


@pytest.mark.parametrize("between", NOT_EXACT.values(), ids=NOT_EXACT)
def test_a_removal_that_would_not_equal_the_zeros_is_refused_by_group(between):
    model = Between(between).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=r"'conv' gives different .*'conv' in `ignored`.*skip"):
        depgraph(model, ratio=0.5).check()
    with pytest.raises(UnsupportedLayerError, match="'conv' gives different outputs"):
        structure_groups(model, EXAMPLE)
    depgraph(model, ratio=0.5, ignored=("conv",)).check()
    with pytest.warns(LeftUnprunedWarning, match="'conv'"):
        (hidden,) = structure_groups(model, EXAMPLE, skip_unsupported=True)
    assert hidden.name == "hidden"
    adapter = depgraph(model, ratio=0.5, skip_unsupported=True)
    adapter.check()
    assert set(adapter.skipped) == {"conv"}
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_group_that_is_one_structure_is_left_out_by_name():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
    )
    head = nn.Linear(1, 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, head

        def forward(self, x):
            x = self.body(x).mean((2, 3))
            one, two, three = x.unflatten(1, (3, 2)).unbind(1)
            left, right = (one * two * three).chunk(2, 1)
            return self.head(left * right)

    adapter = depgraph(Net(), ratio=0.5, skip_unsupported=True)
    assert set(adapter.skipped) == {"body.2"}
    adapter.check()


@pytest.mark.slow
def test_what_upstream_takes_for_a_group_where_another_is_left_out_is_tried_as_well():
    shufflenets = pytest.importorskip("torchvision.models.shufflenetv2")
    torch.manual_seed(0)
    model = shufflenets.ShuffleNetV2([4, 8, 4], [8, 16, 32, 64, 16], num_classes=5)
    example = torch.randn(2, 3, 32, 32)
    options = DepGraphOptions(ratio=0.3, skip_unsupported=True)
    DepGraph(model, example, options, SMOOTH).check()


def test_a_plain_flatten_passes_whatever_the_weights_are():
    model = Between(lambda x: x.flatten(1))
    assert {g.name for g in structure_groups(model, EXAMPLE)} == {"conv", "hidden"}
    for weights in (0.0, torch.nan):
        for parameter in model.parameters():
            nn.init.constant_(parameter, weights)
        assert {g.name for g in structure_groups(model, EXAMPLE)} == {"conv", "hidden"}
        nowhere = Between(NOT_EXACT["channels in another order"])
        nowhere.load_state_dict(model.state_dict())
        with pytest.raises(UnsupportedLayerError, match="'conv' gives different outputs"):
            structure_groups(nowhere, EXAMPLE)


def test_layers_that_make_the_output_are_left_alone():
    assert graph.read(small_resnet(), EXAMPLE).outputs == ["head"]
    groups = structure_groups(small_resnet(), EXAMPLE)
    assert "head" not in {g.name for g in groups}
    softmax = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 5), nn.Softmax(1))
    assert graph.read(softmax, EXAMPLE).outputs == ["2"]


def test_batch_norm_is_in_the_structures_and_owns_them():
    groups = {g.name: g for g in structure_groups(small_resnet(), EXAMPLE)}
    names = {s.name for g in groups.values() for s in g.slices}
    assert {"norm.weight", "norm.bias", "outer_norm.weight", "inner_norm.bias"} <= names
    for group in groups.values():
        for s in group.slices:
            assert s.batch_norm == ("norm" in s.name)
    tied = next(g for g in groups.values() if any(s.name == "stem.weight" for s in g.slices))
    assert {type(o.module) for o in tied.owners} == {nn.BatchNorm2d}
    assert len(tied.owners) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "speed_up .* ratio"),
        ({"speed_up": 2.0, "ratio": 0.5}, "speed_up .* ratio"),
        ({"speed_up": 1.0}, "speed_up"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0.5, "steps": 0}, "steps"),
        ({"ratio": 0.5, "reg": -1.0}, "reg"),
        ({"ratio": 0.5, "reg": float("nan")}, "reg"),
        ({"ratio": 0.5, "normalizer": "largest"}, "normalizer"),
        ({"ratio": 0.5, "rounds": 0}, "rounds"),
        ({"ratio": 0.5, "round_epochs": 0}, "round_epochs"),
    ],
)
def test_contradictory_options_are_refused(options, named):
    with pytest.raises(AdapterError, match=named):
        DepGraphOptions(**options)


def test_an_unknown_layer_in_ignored_is_refused():
    with pytest.raises(AdapterError, match="'stemm'"):
        depgraph(small_resnet(), ratio=0.5, ignored=("stemm",))


def test_pruners_share_no_dictionaries():
    """Upstream's defaults are mutable and written to: a pruner's grouped layers would leak."""
    one = depgraph(Grouped(), ratio=0.5)._new_pruner(Grouped())
    other = depgraph(small_resnet(), ratio=0.5)._new_pruner(small_resnet())
    assert one.upstream.out_channel_groups
    assert not other.upstream.out_channel_groups
    assert not other.upstream.num_heads


def test_a_missing_upstream_names_the_extra(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(upstreams.UpstreamError, match=r"not installed.*\[depgraph\]"):
        upstreams.require("torch-pruning")


def test_another_upstream_version_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.5.0")
    with pytest.raises(upstreams.UpstreamError, match=r"1\.5\.0.*1\.6\.1"):
        upstreams.require("torch-pruning")


def test_frozen_layers_are_in_the_groups_too_and_stay_frozen():
    """The graph follows gradients: without care it would miss them, and not remove them."""
    model = small_resnet()
    expected = {g.name: [s.name for s in g.slices] for g in structure_groups(model, EXAMPLE)}
    model.inner.requires_grad_(False)
    model.outer_norm.requires_grad_(False)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    groups = structure_groups(model, EXAMPLE)
    assert {g.name: [s.name for s in g.slices] for g in groups} == expected
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    Removal([("inner", [0, 3])]).apply(model, EXAMPLE, cut=True)
    assert model.inner.out_channels == 14
    assert model.outer.in_channels == 14


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
def test_an_optimizer_of_what_is_pruned_and_of_a_loss_of_ones_own(variant):
    """The lower layers are not trained, and not frozen, either; the loss has parameters."""
    torch.manual_seed(0)
    lower, middle, upper = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 2)
    model, loss = nn.Sequential(lower, nn.ReLU(), middle, nn.ReLU(), upper), nn.Linear(2, 2)
    x = torch.randn(6, 4)
    run = DepGraph(
        model,
        x,
        DepGraphOptions(ratio=0.5, ignored=("0",)),
        None if variant == "base" else SmoothPruning(6),
        EAGER if variant == "sr" else None,
    )
    stale = torch.optim.SGD([*upper.parameters(), *loss.parameters()], lr=0.1)
    with pytest.raises(AdapterError, match=r"another model.*lacks '2.weight'"):
        run.attach(stale)
    trained = [*middle.parameters(), *upper.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    run.attach(optimizer)
    first = lower.weight.detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        loss(model(x)).square().sum().backward()
        optimizer.step()
        if run.due:
            run.remove()
    assert run.complete
    assert torch.equal(model[0].weight, first)
    assert len(model[2].weight) == 6
    run.detach()
    run.attach(optimizer)  # as for another stage
    with pytest.raises(AdapterError, match="another model"):
        run.attach(stale)
