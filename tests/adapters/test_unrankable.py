"""No importance of upstream's knows all layers. Which it does not is said by check(), by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from dpm_core import SmoothPruning
from dpm_core.adapters.base import AdapterError
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions, Importance
from tests.support.snapshot import difference, snapshot

SMOOTH = SmoothPruning(2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cell = nn.Linear(8, 16), nn.LSTM(16, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.inner(x))[0])


def images(*layers: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.ReLU(), nn.Conv2d(8, 3, 1)), IMAGES


IMAGES = torch.randn(2, 3, 8, 8)
NETS = {
    "grouped": lambda: images(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)),
    "wider parts": lambda: images(nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "transposed in parts": lambda: images(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2)),
    "transposed depthwise": lambda: images(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=8)),
    "instance norm": lambda: images(nn.InstanceNorm2d(8, affine=True)),
    "linear": lambda: (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
        torch.randn(2, 8),
    ),
    "one dimension": lambda: (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 3, 1)),
        torch.randn(2, 3, 12),
    ),
    "recurrent": lambda: (Recurrent(), torch.randn(2, 5, 8)),
}
CLASSES = (
    *("GroupMagnitude", "GroupTaylor", "GroupHessian"),
    *("LAMP", "FPGM", "BNScale", "Random"),
)


def goes_or_names(model: nn.Module, run: Any, loss: Any) -> str | None:
    """A decision falls; or what check() says, which is an error of ours and changes nothing."""
    before = snapshot(model)
    try:
        run.check()
    except AdapterError as why:
        assert difference(before, snapshot(model)) is None
        return str(why)
    run.attach(torch.optim.SGD(model.parameters(), 0.01), loss)
    assert run.decided
    return None


@pytest.mark.parametrize("net", NETS)
def test_what_an_importance_cannot_rank_is_refused_by_check(net):
    for importance in Importance.__args__:
        torch.manual_seed(0)
        model, example = NETS[net]()
        options = DepGraphOptions(
            ratio=0.4,
            importance=importance,
            batches=1,
            global_pruning=False,
            skip_unsupported=True,
        )
        try:
            run = DepGraph(model, example, options, SMOOTH)
        except AdapterError:
            continue
        why = goes_or_names(model, run, lambda m=model, x=example: m(x).square().mean())
        if importance == "fpgm" and net in ("grouped", "one dimension"):
            assert "group of '0' cannot be ranked" in why
            assert "importance 'fpgm' fails on its layers (RuntimeError" in why
            assert "another importance, or name '0' in `ignored`" in why


@pytest.mark.parametrize("kind", CLASSES)
def test_a_pruner_of_ones_own_is_told_before_anything_has_changed(kind):
    for net in ("grouped", "wider parts", "transposed depthwise", "linear", "one dimension"):
        why = by_own_pruner(net, getattr(tp.importance, f"{kind}Importance")())
        if net == "linear" and kind == "BNScale":
            assert why.startswith("BNScaleImportance ranks no group of layers; give BasePruner")
        elif net == "linear":
            assert why is None
        if net == "grouped" and kind == "FPGM":
            assert "FPGMImportance fails at the group of '0' (RuntimeError" in why
            assert "give BasePruner another importance, or put the layer into its ignored" in why


def test_an_importance_may_get_what_it_needs_in_the_training():
    with pytest.raises(AdapterError, match="has no sums of gradients yet: run its _prepare_model"):
        by_own_pruner("linear", tp.importance.OBDCImportance())
    with pytest.raises(AdapterError, match="ActivationImportance ranks no group of layers"):
        by_own_pruner("linear", tp.importance.ActivationImportance())


def by_own_pruner(net: str, importance: Any) -> str | None:
    torch.manual_seed(0)
    model, example = NETS[net]()
    model(example).square().mean().backward()
    weighted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    own = tp.pruner.BasePruner(
        model,
        example,
        importance,
        pruning_ratio=0.4,
        ignored_layers=[weighted[-1], *(m for m in model.modules() if isinstance(m, nn.LSTM))],
    )
    run = DepGraph(own, SMOOTH, example=example)
    return goes_or_names(model, run, lambda: model(example).square().mean())
