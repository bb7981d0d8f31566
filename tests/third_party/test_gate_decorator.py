"""Gated models compute what plain ones do; masked gates stay silent and melt away."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

from dpm_core.adapters.base import count_macs, count_parameters
from dpm_core.third_party.dependency import RemovalError
from dpm_core.third_party.gate_decorator import (
    CostModel,
    GatedBatchNorm,
    GateDecorator,
    GateError,
    GateTable,
    TickTock,
    add_sparsity_gradient,
    decorate,
    freeze,
    gated,
    melt,
    tied_gates,
    turn_at,
    undecorate,
    unfreeze,
)
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support import rounding
from tests.support.rounding import in_double
from tests.support.snapshot import refused, same_bits, says
from tests.third_party.gate_nets import (
    IMAGES,
    LABELS,
    SMALL,
    Tied,
    gate_all,
    network,
    some,
    tied,
    wake,
)

NETS = ("vgg16-quarter", "resnet20", "resnet56")


def loss(model, images=SMALL, labels=LABELS):
    return functional.cross_entropy(model(images), labels)


def sgd(model) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)


def train_step(model, optimizer) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


# ---------------------------------------------------------------------------- gates


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_a_gated_network_is_the_plain_one(name, training):
    plain, images = network(name).double(), IMAGES[:2].double()
    model = copy.deepcopy(plain)
    modes = [m.training for m in model.train(training).modules()]
    gates = decorate(model)
    assert [m.training for m in model.modules()] == modes
    assert len(gates) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    plain.train(training)
    with torch.no_grad():
        rounding.assert_exact(model(images), plain(images))
    expected = dict(plain.named_buffers())
    for key, buffer in model.named_buffers():
        if key.endswith("num_batches_tracked"):
            assert buffer == expected[key]
        elif not key.endswith("mask"):
            rounding.assert_exact(buffer, expected[key], key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_single_precision_network_is_the_plain_one(training):
    plain = tied().train(training)
    model = copy.deepcopy(plain)
    exact = in_double(plain)
    decorate(model)
    rounding.assert_rounded(model(SMALL), plain(SMALL), exact(SMALL))
    for one in (model, plain, exact):
        loss(one).backward()
    gradients = (m.stem.weight.grad for m in (model, plain, exact))
    rounding.assert_rounded(*gradients, what="gradients")
    assert plain.stem.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm1d, (5, 4, 3)),
        (nn.BatchNorm2d, (5, 4, 3, 3)),
        (nn.BatchNorm3d, (5, 4, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_and_setting_carries_over_and_back(kind, shape, options, bias):
    plain = kind(4, **options).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, -1.5, 1.0, -0.2]))
        plain.bias.copy_(torch.tensor([1.0, 0.3, -2.0, 0.0]))
    if not bias:
        plain.register_parameter("bias", None)
    if plain.running_mean is not None:
        plain(torch.randn(shape).double())
    gate = GatedBatchNorm(plain)
    back = gate.plain()
    assert type(back) is kind
    assert back.state_dict().keys() == plain.state_dict().keys()
    for training in (True, True, False):
        x = torch.randn(shape).double()
        plain.train(training), gate.train(training), back.train(training)
        expected = plain(x)
        rounding.assert_exact(gate(x), expected)
        rounding.assert_exact(back(x), expected)
    for key, value in plain.state_dict().items():
        for norm in (back, gate):
            if key == "num_batches_tracked":
                assert norm.state_dict()[key] == value
            elif norm is back or key not in ("weight", "bias"):
                rounding.assert_exact(norm.state_dict()[key], value, key)
    with pytest.raises(ValueError, match="expected"):
        gate(torch.randn(5))


def test_statistics_that_are_held_stay_held():
    plain = nn.BatchNorm1d(4).double()
    plain(torch.randn(5, 4).double())
    plain.track_running_stats = False  # they still serve in eval mode
    gate = GatedBatchNorm(plain)
    back = gate.plain()
    x = torch.randn(5, 4).double()
    for norm in (plain, gate, back):
        norm(x)
        assert norm.num_batches_tracked == 1
        assert torch.equal(norm.running_mean, plain.running_mean)
        rounding.assert_exact(norm.eval()(x), plain.eval()(x))


def test_the_gate_takes_the_weight_and_the_shift_is_clamped():
    plain = nn.BatchNorm1d(4)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, -2.0, 0.04, 0.0]))
        plain.bias.copy_(torch.tensor([1.0, 3.0, -0.5, 0.0]))
    plain.bias.requires_grad_(False)
    gate = GatedBatchNorm(plain)
    assert gate.gate.tolist() == pytest.approx([0.5, -2.0, 0.04, 0.0])
    assert gate.shift.tolist() == pytest.approx([2.0, -1.5, -10.0, 0.0])
    assert gate.clamped == 1
    assert gate.weight is None  # the fixed scale of 1
    assert gate.gate.requires_grad
    assert not gate.shift.requires_grad
    assert not gate.plain().bias.requires_grad
    plain.bias.requires_grad_(True)
    plain.weight.requires_grad_(False)
    turned = GatedBatchNorm(plain)
    assert turned.shift.requires_grad
    assert not turned.gate.requires_grad
    assert not turned.plain().weight.requires_grad
    model = nn.Sequential(plain)
    with pytest.warns(UserWarning, match=r"clamped.*\{'0': 1\}"):
        decorate(model)


def test_update_bn_estimates_the_plain_networks_statistics():
    plain = tied().double()
    model = copy.deepcopy(plain)
    decorate(model)
    batches = [SMALL.double(), SMALL.double() * 2 + 1]
    update_bn(batches, model)
    update_bn(batches, plain)
    for name, gate in gated(model).items():
        norm = plain.get_submodule(name)
        rounding.assert_exact(gate.running_mean, norm.running_mean)
        rounding.assert_exact(gate.running_var, norm.running_var)
        assert gate.momentum == 0.1
        assert gate.num_batches_tracked == 2


def test_state_and_copies_go_round():
    model = tied()
    table = gate_all(model, SMALL)
    optimizer = sgd(model)
    train_step(model, optimizer)
    table.mask(some(table))
    fresh = tied(seed=1)
    gate_all(fresh, SMALL)
    assert not torch.equal(fresh.eval()(SMALL), model.eval()(SMALL))
    fresh.load_state_dict(model.state_dict())
    assert same_bits(fresh(SMALL), model(SMALL))
    copied = copy.deepcopy(model)
    assert same_bits(copied(SMALL), model(SMALL))
    train_step(copied, sgd(copied))
    assert not torch.equal(copied.norm.gate, model.norm.gate)
    assert torch.equal(copied.norm.mask, model.norm.mask)


def test_masked_gates_stay_silent_while_training_goes_on():
    model = tied()
    table = gate_all(model, SMALL)
    optimizer = sgd(model)
    for _ in range(3):
        train_step(model, optimizer)  # momentum that would move the gates on
    ids = some(table)
    table.mask(ids)
    gone = table.split(ids)
    gates = {n: g.gate.detach().clone() for n, g in table.gates.items()}
    outputs = {}
    for name, gate in table.gates.items():
        gate.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
    for training in (True, True, True, False):
        model.train(training)
        train_step(model, optimizer)
        for group in table.groups:
            assert gone[group.name]
            for name, index in group.members.items():
                channels = index[gone[group.name]].flatten()
                assert outputs[name][:, channels].count_nonzero() == 0
                left = [c for c in range(outputs[name].shape[1]) if c not in channels.tolist()]
                assert all(outputs[name][:, c].count_nonzero() for c in left)
    assert not torch.equal(gates["norm"], model.norm.gate)
    undecorate(model)
    tied_group = next(g for g in table.groups if "norm" in g.members)
    index = tied_group.members["norm"][gone[tied_group.name]].flatten()
    assert model.norm.weight[index].count_nonzero() == model.norm.bias[index].count_nonzero() == 0


def test_undecorating_gives_plain_modules_and_the_same_outputs():
    model = in_double(tied()).eval()
    table = gate_all(model, SMALL)
    table.mask(some(table))
    expected = model(SMALL)
    names = [n for n, _ in tied().named_modules()]
    undecorate(model)
    assert [n for n, _ in model.named_modules()] == names
    assert not gated(model)
    assert all(not m.training for m in model.modules())
    rounding.assert_exact(model(SMALL), expected)
    assert model.state_dict().keys() == tied().state_dict().keys()


def test_a_tick_trains_all_but_convolutions_and_a_tock_all():
    model = tied().train()
    table = gate_all(model, SMALL)
    optimizer = sgd(model)
    train_step(model, optimizer)
    loss(model).backward()  # gradients and momentum that a careless freeze would step on
    before = copy.deepcopy(model.state_dict())
    freeze(model)
    optimizer.step()
    train_step(model, optimizer)
    for name, value in model.state_dict().items():
        kept = name.split(".")[0] in ("stem", "inner", "outer", "last") or name.endswith("mask")
        assert torch.equal(value, before[name]) == kept, name
    before = copy.deepcopy(model.state_dict())
    unfreeze(model)
    train_step(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith("mask"), name
    assert table.gates


def test_the_sparsity_gradient_is_that_of_the_penalty():
    model = tied().double()
    gates = decorate(model)
    with torch.no_grad():
        gates["norm"].gate[0] = 0
    images = SMALL.double()
    loss(model, images).backward()
    alone = {n: g.gate.grad.clone() for n, g in gates.items()}
    add_sparsity_gradient(gates.values(), 0.02)
    added = {n: g.gate.grad - alone[n] for n, g in gates.items()}
    model.zero_grad()
    (0.02 * sum(g.gate.abs().sum() for g in gates.values())).backward()
    for name, gate in gates.items():
        rounding.assert_exact(added[name], gate.gate.grad)
        assert gate.gate.grad.count_nonzero() == len(gate.gate) - (name == "norm")


# ---------------------------------------------------------------------------- groups and melting


def test_the_groups_of_a_resnet():
    model = network("resnet20")
    groups = {frozenset(g.members): g for g in tied_gates(model, IMAGES)}
    stages = [
        {"bn1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2"},
        {"layer2.0.shortcut.1", "layer2.0.bn2", "layer2.1.bn2", "layer2.2.bn2"},
        {"layer3.0.shortcut.1", "layer3.0.bn2", "layer3.1.bn2", "layer3.2.bn2"},
    ]
    alone = [{f"layer{s}.{b}.bn1"} for s in (1, 2, 3) for b in (0, 1, 2)]
    assert set(groups) == {frozenset(names) for names in stages + alone}
    for stage, width in zip(stages, (16, 32, 64), strict=True):
        group = groups[frozenset(stage)]
        assert group.structures == group.channels == width
        assert group.area == (512 // width) ** 2
        assert isinstance(model.get_submodule(group.name), nn.Conv2d)
        assert all(
            index.tolist() == [[k] for k in range(width)] for index in group.members.values()
        )
    assert model.training


def test_the_groups_of_a_vgg_are_its_batch_norms():
    model = network("vgg16-quarter")
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [list(g.members) for g in tied_gates(model, IMAGES)] == [[n] for n in norms]


@pytest.mark.parametrize("name", NETS)
def test_a_melted_network_equals_the_masked_one_and_costs_what_was_said(name):
    model = in_double(network(name)).eval()
    groups, example = tied_gates(model, IMAGES), IMAGES
    costs = CostModel(model, example, groups)
    assert costs.dense == count_macs(model, example)
    names = [n for n, _ in model.named_modules()]
    table = GateTable(groups, decorate(model, [n for g in groups for n in g.members]))
    ids = some(table)
    table.mask(ids)
    with torch.no_grad():
        expected = model(example)
        kept = table.kept(table.alive())
        said, parameters = costs.macs(kept), costs.parameters(kept)
        plan = melt(model, example, groups)
        rounding.assert_exact(model(example), expected)
    assert int(said) == count_macs(model, example) < costs.dense
    assert int(parameters) == count_parameters(model) < int(costs.parameters(costs.sizes))
    assert [n for n, _ in model.named_modules()] == names
    assert not gated(model)
    gone = table.split(ids)
    assert plan == [(g.name, sorted(gone[g.name])) for g in groups]
    for root, channels in plan:
        dense = next(g.channels for g in groups if g.name == root)
        assert model.get_submodule(root).out_channels == dense - len(channels)


@pytest.mark.parametrize("seed", range(6))
def test_melting_in_single_precision_is_not_taken_for_another_function(seed):
    """The melted bias is a product, rounded: large shifts show it beyond double's rounding."""
    model, draw = tied(seed), torch.Generator().manual_seed(seed)
    table = gate_all(model, SMALL)
    with torch.no_grad():
        for gate in table.gates.values():
            gate.gate.uniform_(0.5, 3, generator=draw)
            gate.shift.normal_(0, 3, generator=draw)
    table.mask(some(table, seed=seed))
    model.eval()
    with torch.no_grad():
        gated_outputs = model(SMALL)
    exact = in_double(copy.deepcopy(model))(SMALL.double()).detach()
    assert melt(model, SMALL, table.groups)
    rounding.assert_rounded(model(SMALL).detach(), gated_outputs, exact)


class Mixed(nn.Module):
    """Concatenation, depthwise, grouped, transposed and flattened layers, 1d BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.bare_depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.separable = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.separable_norm = nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.Conv2d(8, 12, 1, groups=4), nn.BatchNorm2d(12)
        self.branch, self.wide = nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(18)
        self.up, self.up_norm = nn.ConvTranspose2d(18, 5, 2, 2), nn.BatchNorm2d(5)
        self.hidden, self.hidden_norm = nn.Linear(5 * 256, 7), nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 5)
        self.register_buffer("turn", torch.randn(8, 8))

    def forward(self, x):
        x = x @ self.turn  # an operation that costs, and is no layer
        x = functional.relu(self.bare_depthwise(functional.relu(self.norm(self.first(x)))))
        x = functional.relu(self.separable_norm(self.separable(x)))
        x = functional.relu(self.grouped_norm(self.grouped(x)))
        x = functional.relu(self.wide(torch.cat([self.branch(x), x], 1)))
        x = functional.relu(self.up_norm(self.up(x)))
        return self.head(functional.relu(self.hidden_norm(self.hidden(x.flatten(1)))))


def test_layers_of_every_kind_melt_exactly():
    torch.manual_seed(0)
    model = in_double(wake(Mixed())).eval()
    groups = tied_gates(model, SMALL)
    assert {frozenset(g.members) for g in groups} == {
        frozenset({"norm", "separable_norm"}),
        frozenset({"grouped_norm", "wide"}),
        frozenset({"wide"}),
        frozenset({"up_norm"}),
        frozenset({"hidden_norm"}),
    }
    costs = CostModel(model, SMALL, groups)
    table = GateTable(groups, decorate(model, {n for g in groups for n in g.members}))
    shares = [
        sum(i.shape[1] for i in g.members.values()) for g in groups for _ in range(g.structures)
    ]
    assert table.filters.tolist() == shares
    assert int(table.filters.sum()) == 8 + 8 + 12 + 18 + 5 + 7
    areas = {frozenset(g.members): a for g, a in zip(groups, table.areas.tolist(), strict=True)}
    assert areas[frozenset({"norm", "separable_norm"})] == 64
    assert areas[frozenset({"up_norm"})] == 256
    assert areas[frozenset({"hidden_norm"})] == 1
    ids = torch.cat([table.ids(g.name, [1]) for g in groups])
    table.mask(ids)
    expected = model(SMALL)
    kept = table.kept(table.alive())
    assert kept.tolist() == [g.structures - 1 for g in groups]
    melt(model, SMALL, groups)
    rounding.assert_exact(model(SMALL), expected)
    assert int(costs.macs(kept)) == count_macs(model, SMALL)


class Odd(nn.Module):
    """A module that runs twice, a parameter of two layers, of none, and of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.steep = nn.PReLU(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.free, self.free_norm = nn.Conv2d(8, 6, (1, 3)), nn.BatchNorm2d(6)
        self.last, self.last_norm = nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9)
        self.head, self.other = nn.Linear(9 * 48, 5), nn.Linear(9 * 48, 5)
        self.other.weight = self.head.weight
        self.nowhere = nn.Parameter(torch.rand(7))
        self.last_norm.requires_grad_(False)

    def forward(self, x):
        x = self.steep(self.norm(self.stem(x)))
        for norm in self.norms:
            x = functional.relu(norm(self.twice(x)))
        x = functional.relu(self.free_norm(self.free(x)))
        x = functional.relu(self.last_norm(self.last(x))).flatten(1)
        return self.head(x) + functional.relu(self.other(x))


@cache
def with_costs(kind):
    """A network that is left as it is, its groups, and its costs in MACs and in parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = in_double(wake(kind())).eval()
    groups = tied_gates(model, SMALL)
    return model, groups, *(CostModel(model, SMALL, groups, c) for c in ("macs", "parameters"))


@settings(max_examples=20)
@given(data=st.data())
def test_costs_are_those_of_the_really_melted_network(data):
    dense, groups, macs, parameters = with_costs(data.draw(st.sampled_from([Tied, Mixed, Odd])))
    assert (macs.dense, parameters.dense) == (count_macs(dense, SMALL), count_parameters(dense))
    kept = torch.tensor([data.draw(st.integers(1, g.structures)) for g in groups])
    model = copy.deepcopy(dense)
    table = GateTable(groups, decorate(model, {n for g in groups for n in g.members}))
    for group, left in zip(groups, kept.tolist(), strict=True):
        order = data.draw(st.permutations(range(group.structures)))
        table.mask(table.ids(group.name, order[left:]))
    melt(model, SMALL, groups)
    both = count_macs(model, SMALL), count_parameters(model)
    for costs in (macs, parameters):
        assert (int(costs.macs(kept)), int(costs.parameters(kept))) == both
    assert (int(macs.of(kept)), int(parameters.of(kept))) == both


class Heard(nn.Module):
    """Pre-activation, and layers heard behind a bias, without BatchNorm, or beside their own."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside = beside
        self.stem, self.pre = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.outer, self.post = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.wide, self.wide_norm = nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9)
        self.biased, self.naked = nn.Conv2d(9, 9, 1, groups=9), nn.Conv2d(9, 4, 1)
        self.head = nn.Linear(10 if beside else 4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = y = x + self.outer(self.inner_norm(self.inner(self.pre(x).relu())).relu())
        x = self.biased(self.wide_norm(self.wide(self.post(x).relu())).relu())
        x = self.naked(x).relu().mean((2, 3))
        return self.head(torch.cat([x, y.mean((2, 3))], 1) if self.beside else x)


def test_groups_that_gates_cannot_silence_are_left_out():
    def member_names(model):
        return sorted(sorted(g.members) for g in tied_gates(model, SMALL))

    torch.manual_seed(0)
    # The sum of stem and outer is read through two BatchNorms, which silence it together.
    model = in_double(wake(Heard(beside=False))).eval()
    assert member_names(model) == [["inner_norm"], ["post", "pre"]]
    assert member_names(Heard(beside=True)) == [["inner_norm"]]
    groups = tied_gates(model, SMALL)
    table = gate_all(model, SMALL)
    table.mask(some(table))
    expected = model(SMALL)
    assert len(melt(model, SMALL, groups)) == 2
    rounding.assert_exact(model(SMALL), expected)


def test_masking_and_numbers():
    table = gate_all(tied(), SMALL)
    sizes = [g.structures for g in table.groups]
    assert table.sizes.tolist() == sizes
    assert sorted(sizes) == [12, 16]
    assert table.group.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    both = torch.cat([table.ids(g.name) for g in table.groups])
    assert both.tolist() == list(range(28))
    second = table.groups[1].name
    ids = table.ids(second, [3, 1])
    assert ids.tolist() == [sizes[0] + 3, sizes[0] + 1]
    assert table.split(ids) == {second: [3, 1]}
    table.mask(ids)
    assert (~table.alive()).nonzero()[:, 0].tolist() == sorted(ids.tolist())
    table.mask(table.ids(second, [0]))
    assert int(table.alive().sum()) == 25
    for name, structures in ((second, [sizes[1]]), (second, [-1]), ("nope", None)):
        with says(GateError, name, "no structures", str(sizes[0])):
            table.ids(name, structures)
    assert table.kept(table.alive()).tolist() == [sizes[0], sizes[1] - 3]


@pytest.mark.parametrize("counted", ["macs", "parameters"])
def test_costs_along_a_sequence_of_removals(counted):
    model = network("resnet20")
    groups = tied_gates(model, IMAGES)
    costs = CostModel(model, IMAGES, groups, counted)
    order = torch.tensor([0, 4, 4, 0, 7])
    kept = costs.sizes - 1
    expected = []
    for group in order.tolist():
        kept[group] -= 1
        expected.append(int(getattr(costs, counted)(kept)))
    assert costs.of(costs.along(costs.sizes - 1, order)).tolist() == expected
    assert expected == sorted(expected, reverse=True)
    assert len(set(expected)) == 5
    assert int(getattr(costs, counted)(costs.sizes)) == costs.dense


def test_melting_inside_a_tick_leaves_all_trainable():
    model = in_double(tied())
    groups = tied_gates(model, SMALL)
    table = GateTable(groups, decorate(model))
    table.mask(some(table))
    freeze(model)
    expected = model.eval()(SMALL)
    melt(model, SMALL, groups)
    rounding.assert_exact(model(SMALL), expected)
    assert all(p.requires_grad for p in model.parameters())
    assert model.stem.out_channels < 12


def test_frozen_layers_have_groups_and_costs_too():
    model, usual = tied(), tied()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups, expected = tied_gates(model, SMALL), tied_gates(usual, SMALL)
    assert [(g.name, list(g.members)) for g in groups] == [
        (g.name, list(g.members)) for g in expected
    ]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    kept = torch.tensor([g.structures - 3 for g in groups])
    frozen, free = CostModel(model, SMALL, groups), CostModel(usual, SMALL, expected)
    assert frozen.macs(kept) == free.macs(kept) < free.dense


def test_areas_are_over_the_smallest():
    table = gate_all(network("resnet20"), IMAGES)
    assert sorted(table.areas.tolist()) == [1.0] * 4 + [4.0] * 4 + [16.0] * 4
    assert {g.area // a for g, a in zip(table.groups, table.areas.tolist(), strict=True)} == {64}


def test_a_group_of_one_structure_keeps_it():
    layers = [nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)]
    model = wake(nn.Sequential(*layers, nn.Conv2d(4, 2, 1))).eval()
    groups = tied_gates(model, SMALL)
    costs = CostModel(model, SMALL, groups)
    assert costs.sizes.tolist() == [1, 4]
    table = GateTable(groups, decorate(model))
    table.mask(table.ids(groups[1].name, [0, 2]))
    melt(model, SMALL, groups)
    assert int(costs.macs(torch.tensor([1, 2]))) == count_macs(model, SMALL) == 64 * (3 + 2 + 4)


# ---------------------------------------------------------------------------- refusals


def edited(change):
    model = tied()
    change(model)
    return model


def zero_weight(model):
    with torch.no_grad():
        model.inner_norm.weight[2] = 0


def infinite(model):
    with torch.no_grad():
        model.inner_norm.bias[2] = torch.inf


def shared(model):
    model.again = model.norm


def synchronised(model):
    model.norm = nn.SyncBatchNorm(12)


def bare(model):
    model.norm = nn.BatchNorm2d(12, affine=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (zero_weight, ("'inner_norm'", "[2]", "ignored", "/ 10")),
        (infinite, ("'inner_norm'", "not finite")),
        (shared, ("'norm'", "'again'")),
        (synchronised, ("'norm'", "SyncBatchNorm", "ignored")),
        (bare, ("'norm'", "no weight", "ignored")),
        (decorate, ("undecorate",)),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_decorating_is_refused_before_anything_changed(change, words):
    model = edited(change)
    kinds = [type(m) for m in model.modules()]
    with refused(GateError, *words, model=model):
        decorate(model)
    assert [type(m) for m in model.modules()] == kinds


def test_zero_weights_without_a_bias_and_left_out_layers_are_fine():
    model = edited(zero_weight)
    assert set(decorate(model, ignored=["inner_norm"])) == {"norm", "outer_norm"}
    model = in_double(edited(zero_weight))
    with torch.no_grad():
        model.inner_norm.bias[2] = 0
    expected = copy.deepcopy(model)(SMALL)
    decorate(model)
    rounding.assert_exact(model(SMALL), expected)


def test_unknown_names_are_refused():
    model = tied()
    with refused(GateError, "nope", model=model):
        decorate(model, ["norm", "nope"])
    with refused(GateError, "nope", model=model):
        decorate(model, ignored=["nope"])
    with refused(UnsupportedLayerError, "nope", model=model):
        tied_gates(model, SMALL, ignored=["nope"])
    assert not gated(model)


def test_groups_and_costs_want_the_plain_model():
    model = tied()
    groups = tied_gates(model, SMALL)
    left = tied_gates(model, SMALL, ignored=["inner"])
    assert [set(g.members) for g in left] == [{"norm", "outer_norm"}]
    with refused(GateError, "ignored", model=model):
        tied_gates(model, SMALL, ignored=["inner_norm", "norm"])
    decorate(model)
    with refused(GateError, "plain", model=model):
        tied_gates(model, SMALL)
    with refused(GateError, "plain", model=model):
        CostModel(model, SMALL, groups)


def test_a_layer_that_cannot_be_zero_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    example = torch.randn(2, 4)
    with refused(UnsupportedLayerError, "LayerNorm", "ignored", model=model):
        tied_gates(model, example)


def test_a_group_whose_zeros_do_not_equal_its_removal_is_refused_by_name():
    class Sigmoid(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)).sigmoid())

    model = Sigmoid(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    example = torch.randn(2, 4)
    with refused(UnsupportedLayerError, "'0'", "different outputs", "ignored", model=model):
        tied_gates(model, example)


def test_melting_is_refused_before_anything_changed():
    model = tied()
    groups = tied_gates(model, SMALL)
    with refused(GateError, "decorate", model=model):
        melt(model, SMALL, groups)
    decorate(model)
    model.norm.mask[4] = 0
    with refused(GateError, "[4]", "some members", model=model):
        melt(model, SMALL, groups)
    model.norm.mask[4] = 1
    model.inner_norm.mask.zero_()
    with refused(GateError, "inner", "no structure left", model=model):
        melt(model, SMALL, groups)
    model.inner_norm.mask[1:] = 1
    model.register_forward_hook(lambda m, _, out: out + m.inner.out_channels)
    with refused(RemovalError, "'inner'", model=model):
        melt(model, SMALL, groups)
    assert len(gated(model)) == 3


def test_a_table_wants_the_gates_of_its_groups():
    groups = tied_gates(tied(), SMALL)
    gates = decorate(tied())
    assert len(GateTable(groups, gates).group) == 28
    with says(GateError, "['norm']", "decorate"):
        GateTable(groups, {n: g for n, g in gates.items() if n != "norm"})
    with says(GateError, "any group"):
        GateTable([], gates)
    with says(GateError, "'norm'", "smaller"):
        GateTable(groups, gates | {"norm": GatedBatchNorm(nn.BatchNorm2d(11))})


def test_costs_refuse_impossible_numbers():
    model = tied()
    costs = CostModel(model, SMALL, tied_gates(model, SMALL))
    for kept in (costs.sizes + 1, costs.sizes * 0 - 1):
        for cost in (costs.macs, costs.parameters, costs.of):
            with says(GateError, "the groups hold"):
                cost(kept)


def test_an_unknown_cost_is_refused():
    model = tied()
    with refused(GateError, "'flops'", "'macs' or 'parameters'", model=model):
        GateDecorator(model, SMALL, fraction=0.1, counted="flops")
    assert not gated(model)


def test_the_sparsity_gradient_wants_a_backward_first():
    model = tied()
    gates = decorate(model)
    with refused(GateError, "after backward", model=model):
        add_sparsity_gradient(gates.values())


def test_convolutions_that_the_user_froze_stay_frozen():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten()
    )
    model[0].weight.requires_grad_(False)
    images = torch.randn(4, 3, 8, 8)
    decorator = GateDecorator(model, images, fraction=0.5)
    times = TickTock(2, 1, 1, 1)
    for step in range(8):
        decorator.begin(turn_at(step, times))
        assert not model[0].weight.requires_grad
    decorator.begin(turn_at(0, times))
    assert model[3].weight.requires_grad
    decorator.table.mask(decorator.table.ids("0", [1, 2]))
    decorator.melt(images)
    assert model[0].weight.shape[0] == 6
    assert [p.requires_grad for p in (model[0].weight, model[0].bias, model[3].weight)] == [
        False,
        True,
        True,
    ]
