"""A small VisionTransformer: hidden units and whole heads go, the embedding stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from dpm_core import Hearing, Phase, SelfRectifying, SmoothPruning
from dpm_core.adapters.base import AdapterError, Training, count_macs
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions, structure_groups
from dpm_core.third_party import graph
from dpm_core.third_party.attention import SplitAttention, split_attention
from dpm_core.third_party.groups import UnsupportedLayerError, UpstreamGroup
from tests.support import rounding
from tests.support.frameworks import EAGER, until_removed
from tests.support.rounding import exact_outputs

EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SPEED_UP = 1.6
OPTIONS = {"speed_up": SPEED_UP, "steps": 50, "skip_unsupported": True}
VARIANTS = ("base", "sp", "sr")


def whole_vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    for block in model.encoder.layers:  # and these biases
        nn.init.normal_(block.self_attention.in_proj_bias, std=0.3)
        nn.init.normal_(block.mlp[0].bias, std=0.3)
    return model


def split_vit() -> nn.Module:
    model = whole_vit()
    split_attention(model)
    return model


def outputs(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1000)
    return exact_outputs(model, torch.randn(8, 3, 32, 32, generator=draw))


def adapter(model: nn.Module, variant: str, rectify: SelfRectifying = EAGER, **options) -> DepGraph:
    return DepGraph(
        model,
        EXAMPLE,
        DepGraphOptions(**(options or OPTIONS)),
        None if variant == "base" else SmoothPruning(5),
        rectify if variant == "sr" else None,
        training=Training(14, 3),
    )


def heads(model: nn.Module) -> list[int]:
    return [m.heads for m in model.modules() if isinstance(m, SplitAttention)]


@pytest.mark.parametrize("build", [whole_vit, split_vit], ids=["units", "units-and-heads"])
def test_the_smaller_transformer_gives_the_zeroed_ones_outputs(build):
    sizes = set()
    dense = count_macs(build(), EXAMPLE)
    speed_up = 1.3 if build is whole_vit else SPEED_UP
    for variant in VARIANTS:
        model = build()
        made = adapter(model, variant, **{**OPTIONS, "speed_up": speed_up})
        before, after = until_removed(made)
        if variant != "base":
            rounding.assert_exact(after, before)
        assert before.std() > 0.1
        macs = count_macs(model, EXAMPLE)
        assert macs <= dense / speed_up
        sizes.add((macs, made.pruned, tuple(heads(model))))
        roots = {root.rpartition("layers.")[2] for root, _ in made.removed}
        assert any(root.endswith("mlp.0") for root in roots)
        assert any(root.endswith("self_attention.value") for root in roots) == bool(heads(model))
        assert model.hidden_dim == model.encoder.ln.weight.numel() == 32
        if variant == "sr":
            released = [e for e in made.dpm.events if e.kind == "release"]
            assert released
            if heads(model):
                assert any(e.group.endswith("value") for e in released)

        # And it can be repeated on a dense model, as on reloading.
        again = build()
        made.removed.apply(again, EXAMPLE, cut=True)
        again.load_state_dict(model.state_dict())
        assert torch.equal(outputs(again), outputs(model))
    assert len(sizes) == 1


def test_a_hearing_gates_hidden_units_and_the_values_of_heads():
    made = adapter(
        split_vit(), "sr", SelfRectifying(Hearing(batches=2, threshold=-1), max_share=0.4)
    )
    before, after = until_removed(made)
    rounding.assert_exact(after, before)
    assert any(e.kind == "release" for e in made.dpm.events)


def test_a_ratio_removes_that_share_of_heads_and_units():
    model = split_vit()
    made = adapter(model, "base", ratio=0.5, global_pruning=False, skip_unsupported=True)
    until_removed(made)
    assert heads(model) == [2, 2]
    assert [block.mlp[0].out_features for block in model.encoder.layers] == [32, 32]


@pytest.mark.parametrize("speed_up", [1.05, 2.0, 2.6])
def test_every_attention_keeps_a_head(speed_up):
    """Upstream fails where a step has no head to remove, and counts heads that it then keeps."""
    model = split_vit()
    until_removed(adapter(model, "base", speed_up=speed_up, steps=100, skip_unsupported=True))
    assert min(heads(model)) >= 1


def test_a_head_is_a_structure_of_its_queries_keys_and_values():
    groups = structure_groups(split_vit(), EXAMPLE, skip_unsupported=True)
    assert sorted(g.size for g in groups) == [4, 4, 64, 64]
    (first, _) = (g for g in groups if g.size == 4)
    assert {s.name.split(".")[-2] for s in first.slices} == {"query", "key", "value"}
    assert all(s.index[1].tolist() == list(range(8, 16)) for s in first.slices)


def test_the_embedding_is_refused_and_the_message_says_why():
    with pytest.raises(AdapterError, match=r"LayerNorm.*`ignored`.*skip_unsupported"):
        adapter(split_vit(), "sp", speed_up=1.2, steps=50)
    with pytest.raises(UnsupportedLayerError, match=r"LayerNorm.*`ignored`"):
        structure_groups(whole_vit(), EXAMPLE)


def test_only_what_is_not_supported_is_skipped():
    model = split_vit()
    left = graph.read(model, EXAMPLE).outputs
    made = adapter(model, "sp")
    skipped = set(made._ignored) - set(left)
    assert skipped == {"encoder.layers.encoder_layer_1.mlp.3"}  # the root of the embedding's group
    named = adapter(split_vit(), "sp", speed_up=1.6, steps=50, ignored=tuple(skipped))
    named.check()
    assert made._ignored == named._ignored


def test_heads_of_an_attention_that_is_ignored_stay():
    model = split_vit()
    stays = "encoder.layers.encoder_layer_0.self_attention"
    made = adapter(model, "sp", **{**OPTIONS, "ignored": (stays,), "speed_up": 1.4})
    until_removed(made)
    assert heads(model)[0] == 4
    assert made.dpm.count(Phase.PRUNED) == made.pruned


@pytest.mark.parametrize("bias", [True, False])
def test_an_attention_taken_apart_computes_the_same(bias):
    torch.manual_seed(2)
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double()
    made = SplitAttention.of(layer)
    x, y = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    expected, _ = layer(x, y, y.flip(1), need_weights=False)
    rounding.assert_exact(made(x, y, y.flip(1))[0], expected)
    assert made.heads == 3


def test_a_transformer_taken_apart_computes_the_same():
    rounding.assert_exact(outputs(split_vit()), outputs(whole_vit()))


def test_an_attention_that_cannot_be_taken_apart_is_refused_and_nothing_is_changed():
    model = nn.Sequential(
        nn.MultiheadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, kdim=4)
    )
    with pytest.raises(UnsupportedLayerError, match=r"'1' .*batch_first=False, kdim"):
        split_attention(model)
    assert all(type(m) is nn.MultiheadAttention for m in model)
    x = torch.randn(1, 3, 8)
    with pytest.raises(UnsupportedLayerError, match="need_weights=False"):
        SplitAttention.of(model[0])(x, x, x, need_weights=True)


@pytest.mark.parametrize(
    ("members", "channels"),
    [
        ([[0, 3, 6], [1, 4, 7], [2, 5, 8]], [1, 4, 7, 2, 5, 8]),
        ([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [3, 4, 5, 6, 7, 8]),
    ],
)
def test_channels_of_structures_and_back(members, channels):
    group = UpstreamGroup("root", members)
    assert (group.channels, group.structures) == (9, 3)
    assert group.channels_of([2, 1]) == sorted(channels)
    assert group.structures_of(channels) == [1, 2]
    with pytest.raises(UnsupportedLayerError, match="not whole structures"):
        group.structures_of(channels[:4])


def test_macs_of_attention_are_those_of_the_attention_taken_apart():
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(whole_vit(), EXAMPLE) == count_macs(split_vit(), EXAMPLE)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_transformer_is_pruned_in_rounds():
    model, seen = split_vit(), []
    made = adapter(model, "sp", **OPTIONS, rounds=2, round_epochs=2)
    dense = count_macs(model, EXAMPLE)
    while not made.complete:
        before, after = until_removed(made)
        rounding.assert_exact(after, before)
        seen.append((count_macs(model, EXAMPLE), sum(heads(model))))
    assert len(seen) == 2
    assert all(macs <= dense / SPEED_UP ** (r / 2) for r, (macs, _) in enumerate(seen, 1))
    assert 8 > seen[0][1] > seen[1][1]
    again = split_vit()
    made.removed.apply(again, EXAMPLE, cut=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(model))


def test_a_ratio_of_heads_is_met_in_rounds():
    options = {"ratio": 0.75, "skip_unsupported": True, "rounds": 2, "round_epochs": 2}
    for global_pruning in (True, False):
        model, seen = split_vit(), []
        made = adapter(model, "sp", **options, global_pruning=global_pruning)
        while not made.complete:
            until_removed(made)
            seen.append(sum(heads(model)))
        assert seen == [4, 2]
