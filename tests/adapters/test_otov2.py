"""OTOv2: base is upstream, the target is met exactly and never overshot, the smaller model agrees."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adapters.base import AdapterError, Context, Stage, count_macs, structure_group
from adapters.otov2 import OTOv2, OTOv2Options
from dpm_core import Hearing, Phase, SelfRectifying, SmoothPruning
from experiments import models
from tests.support.frameworks import CASES, EAGER, EXAMPLE, SmallResNet, batch, small_resnet
from tests.support.snapshot import difference
from tests.support.tiny import ROOT
from tests.third_party.otov2_nets import IMAGES, Concatenated, Depthwise, Ended, stir
from third_party import otov2

OPTIONS = {
    "target_group_sparsity": 0.5,
    "tolerance_group_sparsity": 0.0,
    "start_epoch": 1,
    "epsilon": 0.9,
    "lmbda": 4.0,
}
STRUCTURES = 12 + 16 + 10 + 14
"""Of the small ResNet."""


def adapter_of(
    model: nn.Module,
    variant: str,
    *,
    example: Tensor = EXAMPLE,
    steps: int = 40,
    smooth: int = 6,
    rectify: SelfRectifying = EAGER,
    stage: dict[str, Any] | None = None,
    **options: Any,
) -> OTOv2:
    made = {"learning_rate": 0.05, "momentum": 0.0, **(stage or {})}
    context = Context(
        model=model,
        example=example,
        variant=variant,
        smooth=SmoothPruning(smooth),
        rectify=rectify,
        stages={"prune": Stage(steps, steps_per_epoch=3, **made)},
    )
    return OTOv2(context, OTOv2Options(**{**OPTIONS, **options}))


def rate_at(step: int) -> float:
    """The learning rate falls twice on the way."""
    return 1.0 if step < 12 else 0.5 if step < 24 else 0.1


def train(
    adapter: OTOv2, look: Callable[[OTOv2], object] = lambda _: None, steps: int | None = None
) -> OTOv2:
    """The stage as the training loop has it, up to the removal; ``look`` is called every step."""
    stage, model, step = adapter.context.stages["prune"], adapter.context.model, 0
    optimizer = adapter.optimizer("prune")

    def loss() -> Tensor:
        nonlocal step
        images, labels = batch(step)
        step += 1
        return functional.cross_entropy(model(images), labels)

    adapter.begin("prune", optimizer, loss)
    while step < (steps or stage.steps):
        assert not adapter.due()
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * rate_at(step)
        model.train()
        adapter.before_step(step)
        optimizer.zero_grad()
        loss().backward()
        adapter.after_backward()
        optimizer.step()
        adapter.after_step()
        look(adapter)
    if steps is None and adapter.due():
        adapter.remove()
    return adapter


# ---------------------------------------------------------------------- base is upstream


class Viewed(SmallResNet):
    """The small ResNet with nothing in it that upstream has to be told of."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        inner = functional.relu(self.inner_norm(self.inner(x)))
        x = functional.relu(x + self.outer_norm(self.outer(inner)))
        x = functional.relu(self.last(x))
        return self.head(functional.relu(self.hidden(x.view(x.size(0), -1))))


def viewed() -> nn.Module:
    model = Viewed()
    model.load_state_dict(small_resnet().state_dict())
    return model


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The stage's settings, and upstream's own.
    "sgd": (
        {"kind": "sgd", "learning_rate": 0.05, "weight_decay": 1e-3},
        {"variant": "sgd", "lr": 0.05, "weight_decay": 1e-3, "first_momentum": 0.0},
    ),
    "momentum": (
        {"kind": "sgd", "learning_rate": 0.02, "momentum": 0.9},
        {"variant": "sgd", "lr": 0.02, "weight_decay": 5e-4, "first_momentum": 0.9},
    ),
    "adam": (
        {"kind": "adam", "learning_rate": 0.01, "weight_decay": 0.0},
        {"variant": "adam", "lr": 0.01, "weight_decay": 0.0},
    ),
    "adamw": (
        {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.01},
        {"variant": "adamw", "lr": 0.01, "weight_decay": 0.01, "weight_decay_type": "l1_norm"},
    ),
}


def upstream(model: nn.Module, made: Any, steps: int, **own: Any) -> nn.Module:
    """The recipe of upstream's own documentation, written out."""
    with otov2.running(torch.device("cpu")):
        optimizer = made.dhspg(
            target_group_sparsity=0.5,
            tolerance_group_sparsity=0.1,
            start_pruning_steps=3,
            epsilon=0.9,
            lmbda=4.0,
            **own,
        )
        for step in range(steps):
            optimizer.set_learning_rate(own["lr"] * rate_at(step))
            model.train()
            images, labels = batch(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told", [False, True], ids=["upstream's own graph", "with a flatten"])
def test_base_is_upstream_bit_for_bit(monkeypatch, kind, told):
    stage, own = KINDS[kind]
    model = small_resnet() if told else viewed()
    if told:
        made = otov2.graph(model, EXAMPLE)
    else:
        monkeypatch.setattr(torch.onnx, "_optimize_graph", otov2._optimize_graph(), raising=False)
        with otov2.running(torch.device("cpu")):
            made = otov2.only_train_once.OTO(model, EXAMPLE)
        # Upstream's sets have no order of their own; another one would end in other bits.
        otov2._put_in_order(made, model)
    expected = upstream(model, made, 36, **own)

    options = {"tolerance_group_sparsity": 0.1}
    if kind == "adamw":
        options["weight_decay_type"] = "l1_norm"
    mine = small_resnet() if told else viewed()
    adapter = adapter_of(mine, "base", steps=36, stage=stage, **options)
    before: list[dict[str, Tensor]] = []
    train(adapter, lambda a: before.append({k: v.clone() for k, v in mine.state_dict().items()}))
    assert len(before) == 36
    assert difference(before[-1], dict(expected.state_dict())) is None
    # It has zeroed and removed something, and more than at random.
    assert adapter.pruned >= math.ceil(0.5 * STRUCTURES)
    rows = expected.stem.weight.flatten(1)
    assert 0 < int(rows.eq(0).all(1).sum()) or adapter.removed


# ---------------------------------------------------------------------- the target


def goal_of(target: float, penalised: int) -> int:
    return min(math.ceil(target * STRUCTURES - 1e-9), penalised)


@dataclass_like
class Watched:
    pass
