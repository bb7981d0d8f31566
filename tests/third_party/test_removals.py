"""What cannot be removed is refused, and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune

from dpm_core.adapters.depgraph import structure_groups
from dpm_core.third_party import dependency, graph
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support.structures import IMAGES, Net, conv, norm_between

# ---------------------------------------------------------------------- refusals

WRAPPED = {
    "parametrizations.weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "parametrizations.spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), r"prune\.remove"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", WRAPPED)
def test_weights_that_are_worked_out_are_refused_with_the_remedy(name):
    wrap, remedy = WRAPPED[name]
    model = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedLayerError, match=f"'0'.*{remedy}"):
        structure_groups(model, torch.randn(2, 4))


def test_the_cause_is_named_where_it_is_a_norm_over_channels_and_not_elsewhere():
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(GroupNorm\), whose mean and variance"):
        structure_groups(norm_between(nn.GroupNorm(1, 8)), IMAGES)
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(BatchNorm2d\), which has no weight"):
        structure_groups(norm_between(nn.BatchNorm2d(8, affine=False)), IMAGES)
    with pytest.raises(UnsupportedLayerError, match=r"'n' \(InstanceNorm2d\), which has no weight"):
        structure_groups(norm_between(nn.InstanceNorm2d(8, track_running_stats=True)), IMAGES)
    for other in (nn.Sigmoid(), nn.LocalResponseNorm(3)):
        with pytest.raises(UnsupportedLayerError) as caught:
            structure_groups(norm_between(other), IMAGES)
        assert "mean and variance" not in str(caught.value)


def test_unknown_layers_in_ignored_are_refused():
    model = norm_between(nn.ReLU())
    for ignored in (("typo",), (nn.Linear(2, 2),), (3,)):
        with pytest.raises(UnsupportedLayerError, match="no layer of the model"):
            structure_groups(model, IMAGES, ignored)


def test_reading_leaves_the_model_as_it_was():
    model = norm_between(nn.BatchNorm2d(8)).train()
    model.a.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    structure_groups(model, IMAGES)
    assert model.training
    assert model.n.training
    assert not model.a.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------- removals


def bits(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


def grouped() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.o(F.relu(m.g(F.relu(m.a(x)))).mean((2, 3)))

    return Net(run, a=nn.Conv2d(3, 32, 1), g=conv(32, 32, groups=4), o=nn.Linear(32, 10))


PLANS = {
    "not whole structures": ([("a", [1, 2])], "go together with others.*takes.*along"),
    "beyond the layer": ([("a", [40])], "has channels 0 to 31"),
    "twice the same": ([("a", [1, 1])], "names one twice"),
    "no such layer": ([("b", [1])], "'b' is no convolution or linear layer"),
    "not at zero": ([("a", [0, 8, 16, 24])], "changes the outputs by"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_removal_that_is_refused_leaves_the_model_as_it_was(name):
    plan, message = PLANS[name]
    model = grouped()
    before = bits(model)
    with pytest.raises(UnsupportedLayerError, match=message):
        dependency.remove(model, IMAGES, plan)
    assert_untouched(model, before)
    assert [model.a.out_channels, model.g.in_channels, model.g.groups] == [32, 32, 4]


def test_what_fails_half_way_is_put_back(monkeypatch):
    model = grouped()
    before = bits(model)
    prune_linear = graph.tp.pruner.function.LinearPruner.prune_in_channels

    def fail(self: Any, layer: nn.Module, idxs: Any) -> None:
        prune_linear(self, layer, idxs)
        raise MemoryError("no more")

    plan = [("g", [0, 8, 16, 24])]
    dependency.set_to_zero(model, IMAGES, plan)
    before = bits(model)
    monkeypatch.setattr(graph.tp.pruner.function.LinearPruner, "prune_in_channels", fail)
    with pytest.raises((MemoryError, UnsupportedLayerError), match="no more"):
        dependency.take_out(model, IMAGES, plan)
    assert_untouched(model, before)


def test_frozen_layers_beside_the_removed_ones_stay_frozen():
    model = grouped()
    model.o.requires_grad_(False)
    plan = [("g", [0, 8, 16, 24])]
    dependency.set_to_zero(model, IMAGES, plan)
    dependency.remove(model, IMAGES, plan)
    assert model.o.weight.shape == (10, 28)
    assert not model.o.weight.requires_grad
    assert model.g.weight.requires_grad


def test_weights_that_are_kept_elsewhere_are_noticed_at_the_removal():
    """An averaging optimizer shows other weights in evaluation than those that were zeroed."""
    model, plan = norm_between(nn.ReLU()), [("a", [0, 1])]
    average = copy.deepcopy(model)
    dependency.set_to_zero(model, IMAGES, plan)
    with torch.no_grad():
        for ours, other in zip(average.parameters(), model.parameters(), strict=True):
            ours.lerp_(other, 0.9)
    with pytest.raises(UnsupportedLayerError, match="averaging or schedule-free optimizer"):
        dependency.remove(average, IMAGES, plan)
    dependency.remove(model, IMAGES, plan)


def test_rebuilding_needs_no_zeros_and_refuses_what_is_not_exact():
    model = norm_between(nn.ReLU())
    dependency.cut(model, IMAGES, [("a", [0, 1]), ("a", [0])])
    assert model.a.out_channels == 5
    odd = norm_between(nn.Sigmoid())
    before = bits(odd)
    with pytest.raises(UnsupportedLayerError, match="changes the outputs"):
        dependency.cut(odd, IMAGES, [("a", [0, 1])])
    assert_untouched(odd, before)
