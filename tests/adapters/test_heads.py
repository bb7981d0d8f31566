"""Transformers as people have them, from transformers and timm: hidden units and whole heads go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_core import SelfRectifying, SmoothPruning
from dpm_core.adapters.base import AdapterError, count_macs
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import load_pruned
from dpm_core.third_party import running, trial
from tests.support import rounding
from tests.support.frameworks import EAGER

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from dpm_core.adapters.transformers import (  # noqa: E402  (only where transformers is)
    load_pruned_pretrained,
    save_pruned_pretrained,
)

transformers.logging.set_verbosity_error()

IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(1))
PLAIN = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
IMAGE = {k: v for k, v in PLAIN.items() if k not in ("vocab_size", "max_position_embeddings")}
IMAGE |= {"image_size": 16, "patch_size": 8}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2]}
SWIN |= {"window_size": 4}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 50, "d_model": 16, "max_position_embeddings": 16}
BART |= {f"{s}_layers": 1 for s in ("encoder", "decoder")}
BART |= {f"{s}_attention_heads": 4 for s in ("encoder", "decoder")}
BART |= {f"{s}_ffn_dim": 12 for s in ("encoder", "decoder")}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def of(model: str, config: str, settings: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    """Builds a network of transformers from a configuration."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**settings, **more})
        return awake(getattr(transformers, model)(made))

    return build


def from_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return awake(timm.create_model(name, num_classes=5, **settings))

    return build


def awake(model: nn.Module) -> nn.Module:
    """With weights that no mistake hides behind; some start at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and what is to be found in it.

    Attributes:
        build: the network.
        example: of its inputs.
        heads: how many structures each group of heads has, in order.
        units: how many groups of hidden units there are.
        counts: attributes that say how many heads there are, before and after half have gone.
    """

    build: Callable[[], nn.Module]
    example: Any = dataclasses.field(default_factory=lambda: IDS)
    heads: tuple[int, ...] = (4, 4)
    units: int = 2
    counts: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


BERT = "bert.encoder.layer.1.attention.self."
CASES = {
    "bert": Case(
        of("BertForSequenceClassification", "BertConfig", PLAIN),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1])},
        units=3,  # one of them the pooler's
        counts={f"{BERT}num_attention_heads": (4, 2), f"{BERT}all_head_size": (16, 8)},
    ),
    "roberta": Case(of("RobertaForMaskedLM", "RobertaConfig", PLAIN, pad_token_id=0)),
    "albert": Case(of("AlbertModel", "AlbertConfig", PLAIN, embedding_size=8), heads=(4,), units=1),
    "deberta": Case(
        of(
            "DebertaV2Model",
            "DebertaV2Config",
            PLAIN,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        )
    ),
    "vit": Case(
        of("ViTForImageClassification", "ViTConfig", IMAGE),
        images(16),
        counts={"vit.layers.0.attention.num_attention_heads": (4, 2)},
    ),
    "beit": Case(of("BeitModel", "BeitConfig", IMAGE, use_relative_position_bias=True), images(16)),
    "clip": Case(of("CLIPVisionModel", "CLIPVisionConfig", IMAGE), images(16)),
    "swin": Case(
        of("SwinForImageClassification", "SwinConfig", SWIN),
        images(16),
        heads=(2, 2),
        counts={"swin.encoder.layers.0.blocks.0.attention.num_attention_heads": (2, 1)},
    ),
    "swinv2": Case(of("Swinv2Model", "Swinv2Config", SWIN), images(16), heads=(2, 2), units=4),
    "gpt2": Case(
        of("GPT2LMHeadModel", "GPT2Config", GPT2),
        counts={
            "transformer.h.0.attn.num_heads": (4, 2),
            "transformer.h.0.attn.split_size": (16, 8),
        },
    ),
    "neox": Case(of("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN)),
    "llama": Case(of("LlamaForCausalLM", "LlamaConfig", PLAIN)),
    "llama-grouped": Case(
        of("LlamaForCausalLM", "LlamaConfig", PLAIN, num_key_value_heads=2), heads=(2, 2)
    ),
    "qwen3": Case(
        of("Qwen3ForCausalLM", "Qwen3Config", PLAIN, num_key_value_heads=2, head_dim=4),
        heads=(2, 2),
    ),
    "phi3": Case(
        of("Phi3ForCausalLM", "Phi3Config", PLAIN, num_key_value_heads=2, pad_token_id=0),
        heads=(2, 2),
        counts={
            "model.layers.0.self_attn.num_key_value_heads": (2, 1),
            "model.layers.0.self_attn.config.num_attention_heads": (4, 2),
            "model.config.num_attention_heads": (4, 4),
        },
    ),
    "t5": Case(
        of("T5ForConditionalGeneration", "T5Config", T5),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        heads=(4, 4, 4),  # in all layers of the encoder at once, say
        units=4,
        counts={"decoder.block.1.layer.1.EncDecAttention.n_heads": (4, 2)},
    ),
    "bart": Case(
        of("BartModel", "BartConfig", BART),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        heads=(4, 4, 4),
    ),
    "timm-vit": Case(
        from_timm("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=4),
        images(32),
        counts={"blocks.0.attn.num_heads": (4, 2), "blocks.0.attn.head_dim": (4, 4)},
    ),
    "timm-swin": Case(
        from_timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            embed_dim=8,
            depths=(2,),
            num_heads=(2,),
            window_size=4,
        ),
        images(32),
        heads=(2, 2),
        counts={"layers.0.blocks.0.attn.num_heads": (2, 1)},
    ),
}
THROUGH = ("bert", "gpt2", "llama-grouped", "timm-swin")
"""Those that are pruned while they train; of the others only the removal is tried."""
FEW = ("bert", "vit", "swin", "gpt2", "llama", "llama-grouped", "t5", "timm-vit", "timm-swin")
"""Those that are tried where slow tests are left out."""
OPTIONS = DepGraphOptions(ratio=0.5, global_pruning=False, skip_unsupported=True)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """A model's outputs in double precision."""
    double = running.map_tensors(example, lambda t: t.double() if t.is_floating_point() else t)
    values = running.outputs(copy.deepcopy(model).double(), double).values
    return [t.double() for t in values]


def assert_alike(model: nn.Module, other: list[Tensor], example: Any) -> None:
    for ours, theirs in zip(outputs(model, example), other, strict=True):
        # Norms of some networks compute in single precision whatever the weights are.
        assert rounding.difference(ours, theirs) < 1e-5


def read(model: nn.Module, path: str) -> Any:
    """An attribute, by its path."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name) if not name.isdigit() else value[int(name)]
    return value


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_heads_and_hidden_units_are_found_by_one_call_and_can_go(name):
    case = CASES[name]
    model = case.build()
    reading, left_out = trial.exact_groups(model, case.example, skip_unsupported=True)
    assert sorted(g.structures for g in reading.groups if g.heads) == sorted(case.heads)
    assert sum(not g.heads for g in reading.groups) == case.units
    assert not [name for name in left_out if "attention" in name.lower() or "attn" in name]
    draw = torch.Generator().manual_seed(2)
    plan = []
    for group in reading.groups:
        half = torch.randperm(group.structures, generator=draw)[: group.structures // 2]
        plan.append((group.root, group.channels_of(half.tolist())))
    for path, (before, _) in case.counts.items():
        assert read(model, path.replace("model.config", "config")) == before
    # Compares the outputs, too: with the dense model in which these structures are zero.
    Removal(plan).apply(model, case.example, cut=True)
    for path, (_, after) in case.counts.items():
        assert read(model, path.replace("model.config", "config")) == after
    expected = outputs(model, case.example)
    assert_alike(copy.deepcopy(model), expected, case.example)


def train(model: nn.Module, case: Case, variant: str) -> DepGraph:
    """A run up to its removal."""
    smooth = None if variant == "base" else SmoothPruning(4)
    rectify: SelfRectifying | None = EAGER if variant == "sr" else None
    run = DepGraph(model, case.example, OPTIONS, smooth, rectify)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run.attach(optimizer)
    while not run.due:
        model.train()
        optimizer.zero_grad()
        real = [t for t in running.tensors(running.call(model, case.example)) if t.requires_grad]
        sum(t.square().mean() for t in real).backward()
        optimizer.step()
    return run


@pytest.mark.parametrize("name", THROUGH)
def test_sp_and_sr_end_where_base_does_and_the_small_model_is_saved(name, tmp_path):
    case, shapes = CASES[name], set()
    for variant in ("base", "sp", "sr"):
        model = case.build()
        run = train(model, case, variant)
        zeroed = outputs(model, case.example)
        removal = run.remove()
        small = outputs(model, case.example)
        if variant != "base":
            assert_alike(model, zeroed, case.example)
        if variant == "sr":
            released = {e.group for e in run.dpm.events if e.kind == "release"}
            assert released & {g.root for g in run._groups.values() if not g.heads}
        for path, (_, after) in case.counts.items():
            assert read(model, path) == after
        shapes.add((run.pruned, count_macs(model, case.example)))
    assert len(shapes) == 1
    removal.save(tmp_path / "small.safetensors", model)
    again = load_pruned(tmp_path / "small.safetensors", case.build(), case.example)
    assert all(map(torch.equal, outputs(again, case.example), small))


@pytest.mark.parametrize("name", ["bert", "llama-grouped", "phi3"])
def test_a_folder_is_loaded_by_the_dense_networks_configuration(name, tmp_path):
    case = CASES[name]
    model = case.build()
    run = DepGraph(model, case.example, OPTIONS)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    removal = run.remove()
    save_pruned_pretrained(tmp_path, model, removal)
    again = load_pruned_pretrained(type(model), tmp_path, case.example)
    assert all(map(torch.equal, outputs(again, case.example), outputs(model, case.example)))
    for path, (_, after) in case.counts.items():
        assert read(again, path.replace("model.config", "config")) == after


def test_a_token_more_needs_no_more_than_what_was_kept_of_the_others():
    case = CASES["llama-grouped"]
    model = case.build()
    run = train(model, case, "sp")
    run.remove()
    model.double().eval()
    with torch.no_grad():
        whole = model(IDS).logits[:, -1]
        before = model(IDS[:, :-1], use_cache=True)
        last = model(IDS[:, -1:], past_key_values=before.past_key_values).logits[:, -1]
    assert rounding.difference(last, whole) < 1e-5
    assert before.past_key_values.layers[0].keys.shape[1] == 1


@pytest.mark.parametrize(
    ("build", "layer", "why"),
    [
        (
            of("BloomForCausalLM", "BloomConfig", GPT2),
            "query_key_value",
            "cannot run|from elsewhere",
        ),
        (
            of("GemmaForCausalLM", "GemmaConfig", PLAIN, num_key_value_heads=1, head_dim=4),
            "v_proj",
            "all heads share the same values",
        ),
        (of("Olmo2ForCausalLM", "Olmo2Config", PLAIN), "v_proj", "cannot run"),
    ],
    ids=["slopes-by-number", "one-pair-for-all", "norm-over-all"],
)
def test_heads_that_cannot_go_are_left_out_by_name_with_the_reason(build, layer, why):
    run = DepGraph(build(), IDS, OPTIONS)
    (first, *_) = [name for name in run.skipped if name.endswith(layer)]
    with pytest.raises(AdapterError, match=rf"the group of '.*{layer}' .*({why})"):
        raise AdapterError(run.skipped[first])
    run.check()
    ignored = tuple(run.skipped)
    named = DepGraph(build(), IDS, dataclasses.replace(OPTIONS, ignored=ignored))
    assert named.skipped == {}


def test_an_attention_that_is_ignored_keeps_its_heads():
    case = CASES["bert"]
    stays = "bert.encoder.layer.0.attention"
    model = case.build()
    run = DepGraph(model, case.example, dataclasses.replace(OPTIONS, ignored=(stays,)))
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    run.remove()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    assert (first.num_attention_heads, second.num_attention_heads) == (4, 2)


def test_a_frozen_attention_is_left_out():
    case = CASES["bert"]
    model = case.build()
    model.bert.encoder.layer[0].attention.self.key.requires_grad_(False)
    run = DepGraph(model, case.example, OPTIONS)
    assert (
        "key.weight', which is frozen" in run.skipped["bert.encoder.layer.0.attention.self.value"]
    )
