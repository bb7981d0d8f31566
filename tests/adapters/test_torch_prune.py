"""torch-prune: what goes is what upstream masks, whole, and the real model never meets upstream."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dpm_core import Phase, PhaseError, Slice, SmoothPruning
from dpm_core.adapters import torch_prune
from dpm_core.adapters.base import AdapterError, count_macs
from dpm_core.adapters.torch_prune import TorchPrune, TorchPruneOptions, rows_of
from dpm_core.third_party.groups import UnsupportedLayerError
from experiments.inputs import models
from tests.support import rounding
from tests.support.frameworks import (
    CASES,
    EXAMPLE,
    Drive,
    Grouped,
    small_resnet,
    until_removed,
)

SMOOTH = SmoothPruning(4)
CASE = next(c for c in CASES if c.framework == "torch-prune")
TIED = "outer"
"""The group of ``stem`` and ``outer`` goes by the name of its root."""
DIGITS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def vgg() -> nn.Module:
    return models.build("vgg-digits", 1, 10, seed=3)


def adapter(model, smooth=SMOOTH, example=EXAMPLE, **options) -> TorchPrune:
    return TorchPrune(model, example, TorchPruneOptions(**{"amount": 0.4, **options}), smooth)


def begun(made: TorchPrune) -> TorchPrune:
    return made.attach(torch.optim.SGD(made.model.parameters(), lr=0.05))


def decaying(made: TorchPrune) -> dict[str, list[int]]:
    found = {name: made.dpm.phases(name) == Phase.DECAYING for name in made.dpm.groups}
    return {name: mask.nonzero()[:, 0].tolist() for name, mask in found.items()}


def upstream(layer: nn.Module, amount: float, n: float) -> list[int]:
    """Upstream by itself, as its documentation has it, on a copy of one layer."""
    mask = prune.ln_structured(copy.deepcopy(layer), "weight", amount, n, dim=0).weight_mask
    return (mask.flatten(1) == 0).all(1).nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------- the decision


@pytest.mark.parametrize("n", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_untied_layers_lose_exactly_what_upstream_masks(amount, n):
    model = vgg()
    made = begun(adapter(model, example=DIGITS, amount=amount, n=n))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert decaying(made) == {name: upstream(m, amount, n) for name, m in layers.items()}


@pytest.mark.parametrize("n", [1.0, 2.0])
def test_tied_layers_are_ranked_by_their_weights_side_by_side(n):
    model = small_resnet()
    tied = [model.stem.weight.detach().double(), model.outer.weight.detach().double()]
    norms = [sum(float(w[k].abs().pow(n).sum()) for w in tied) ** (1 / n) for k in range(12)]
    lowest = sorted(sorted(range(12), key=norms.__getitem__)[:5])  # round(0.4 * 12)
    assert decaying(begun(adapter(model, n=n)))[TIED] == lowest


def test_upstream_by_itself_masks_other_channels_in_tied_layers():
    """Why the rule above is needed."""
    model = small_resnet()
    assert upstream(model.stem, 0.4, 2) != upstream(model.outer, 0.4, 2)


def test_base_removes_exactly_what_sp_decays():
    base = begun(adapter(small_resnet(), None))
    removal = base.remove()
    sp = begun(adapter(small_resnet()))
    assert dict(removal) == decaying(sp)
    assert base.pruned == sp.dpm.count(Phase.DECAYING) == 5 + 6 + 4 + 6
    assert base.model.inner.out_channels == 16 - 6
    assert base.model.head.out_features == 5


def test_the_smaller_model_has_the_values_of_what_was_kept():
    dense, model = small_resnet(), small_resnet()
    gone = dict(begun(adapter(model, None)).remove())
    kept = [k for k in range(16) if k not in gone["inner"]]
    tied = [k for k in range(12) if k not in gone[TIED]]
    assert torch.equal(model.inner.weight, dense.inner.weight[kept][:, tied])
    assert torch.equal(model.inner_norm.bias, dense.inner_norm.bias[kept])
    assert torch.equal(model.outer.weight, dense.outer.weight[tied][:, kept])


def test_a_replacement_is_what_upstream_masks_next(monkeypatch):
    calls = []

    def spy(group, amount, n, free):
        norms = torch.cat([rows_of(s) for s in group.slices if s.parameter.dim() > 1], 1).norm(
            dim=1
        )
        found = original(group, amount, n, free)
        calls.append((amount, norms, free.clone(), found.tolist()))
        return found

    original = torch_prune.masked
    monkeypatch.setattr(torch_prune, "masked", spy)
    made = CASE.adapter(small_resnet(), "sr")
    Drive(CASE, made).run()
    later = [c for c in calls if isinstance(c[0], int)]
    assert later
    for amount, norms, free, found in later:
        assert not free.all()
        candidates = [k for k in range(len(free)) if free[k]]
        lowest = sorted(candidates, key=lambda k: float(norms[k]))[:amount]
        assert found == sorted(lowest)
    refilled = [list(e.structures) for e in made.dpm.events if e.kind == "decay" and e.wave == 1]
    assert sorted(refilled) == sorted(c[3] for c in later)


# ---------------------------------------------------------------------- upstream's traps


def test_the_real_model_never_meets_upstream():
    model = small_resnet()
    names, hooks = list(model.state_dict()), [m._forward_pre_hooks for m in model.modules()]
    parameters = list(model.parameters())
    begun(adapter(model))
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(hooks)
    assert not any(prune.is_pruned(m) for m in model.modules())
    copy.deepcopy(model)


def test_a_mask_alone_leaves_a_channel_speaking_and_a_decay_does_not():
    """The weight's row is zero in both: bias and BatchNorm make the difference."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    model, masks = small_resnet(), small_resnet()
    made = begun(adapter(model))
    gone = decaying(made)["inner"]
    prune.ln_structured(masks.inner, "weight", 0.4, 2, dim=0)
    assert (masks.inner.weight_mask[gone] == 0).all()
    with torch.no_grad():
        # As the end of the decay leaves them.
        for s in made.dpm.groups["inner"].slices:
            s.parameter[gone] = 0
        silent = model.inner_norm(model.inner(model.stem(images)))[:, gone]
        speaking = masks.inner_norm(masks.inner(masks.stem(images)))[:, gone]
    assert not silent.any()
    assert (speaking.abs().amax((0, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("variant", ["sp", "sr"])
def test_structures_of_several_channels_go_whole(variant):
    torch.manual_seed(1)
    model = Grouped()
    made = CASE.adapter(model, variant)
    assert any(len(r) > 1 for g in made.groups() for s in g.slices for r in s.index)
    dense = count_macs(model, EXAMPLE)
    before, after = until_removed(made)
    rounding.assert_exact(after, before)
    assert count_macs(model, EXAMPLE) < 0.6 * dense
    assert model.up.out_channels == 6
    assert any(e.kind == "release" for e in made.dpm.events) == (variant == "sr")


def test_a_row_is_a_structures_share_along_its_dimension():
    weight = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    index = torch.tensor([[0, 3], [5, 1]])
    rows = rows_of(Slice(weight, index, dim=1))
    for k in range(2):
        expected = torch.cat([weight[:, p].flatten() for p in index[k].tolist()])
        assert torch.equal(rows[k], expected)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [({"amount": a}, "amount") for a in (0.0, 1.0, 1, -0.1, 1.5, float("nan"))]
    + [({"amount": 0.5, "n": n}, "n is") for n in (0.0, -2.0, float("nan"))],
)
def test_an_amount_that_is_no_share_and_what_orders_no_norm_are_refused(options, named):
    with pytest.raises(AdapterError, match=named):
        TorchPruneOptions(**options)


def test_an_amount_that_rounds_to_nothing_is_refused():
    with pytest.raises(AdapterError, match=r"0\.01 takes nothing.*Raise amount"):
        adapter(small_resnet(), amount=0.01).check()


def test_an_amount_that_takes_a_whole_layer_names_the_layer_that_helps():
    """Of 10, 12, 14 and 16 channels, 0.96 takes all but of the widest layer."""
    with pytest.raises(AdapterError, match=r"all 1[024] channels of '(stem|last|hidden)'"):
        adapter(small_resnet(), amount=0.96).check()
    adapter(small_resnet(), amount=0.96, ignored=("stem", "last", "hidden")).check()


def test_an_ignored_layer_is_left_as_it_is_with_all_that_is_tied_to_it():
    model = small_resnet()
    removal = begun(adapter(model, None, ignored=("outer", "last"))).remove()
    assert {name for name, _ in removal} == {"inner", "hidden"}
    assert model.stem.out_channels == 12


def test_an_ignored_layer_that_is_not_there_is_refused_by_name():
    with pytest.raises(AdapterError, match="'inside'"):
        adapter(small_resnet(), ignored=("inside",)).check()


def test_nothing_left_to_prune_is_refused():
    with pytest.raises(AdapterError, match="shorten `ignored`"):
        adapter(small_resnet(), ignored=("stem", "inner", "last", "hidden")).check()


def test_a_layer_that_cannot_be_served_is_refused_by_name():
    model = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(UnsupportedLayerError, match=r"'1' \(LayerNorm\).*ignored"):
        adapter(model, example=torch.randn(2, 12)).check()


@pytest.mark.parametrize("smooth", [None, SmoothPruning(4)])
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"another": [0]}, "no group 'another'"),
        ({"inner": torch.zeros(16, dtype=torch.bool)}, "bool|whole numbers|integers"),
        ({"inner": [16]}, "0 to 15"),
        ({"inner": [3, 3]}, "listed twice"),
    ],
)
def test_what_an_adapter_of_ones_own_selects_is_checked_in_all_variants(smooth, chosen, message):
    class Own(TorchPrune):
        def selection(self):
            return chosen if self.checked else super().selection()

    model = small_resnet()
    run = Own(model, EXAMPLE, TorchPruneOptions(0.4), smooth)

    def work() -> None:
        run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        run.remove()

    with pytest.raises(PhaseError, match=message):
        work()
    assert len(model.inner.weight) == 16
