"""Models for Gate-Decorator's tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from dpm_core.third_party.gate_decorator import GateTable, decorate, tied_gates
from experiments.inputs import models

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SMALL = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(6))
LABELS = torch.tensor([0, 3, 1, 4, 2, 0])


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorms parameters and statistics of their own, some weights negative."""
    draw = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5, generator=draw)
                m.weight[::5] *= -1
                m.bias.uniform_(-0.5, 0.5, generator=draw)
                m.running_mean.normal_(0, 0.1, generator=draw)
                m.running_var.uniform_(0.5, 1.5, generator=draw)
    return model


def network(name: str) -> nn.Module:
    """One of the experiments' networks, for images of 32x32, in training mode.

    Its statistics fit the images: else the outputs of 56 layers are too large for a fixed bound.
    """
    model = wake(models.build(name, 3, 10, seed=0))
    update_bn([IMAGES], model)
    return model


class Tied(nn.Module):
    """A group of two tied gates, one gate alone, and layers that no gate can silence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.outer, self.outer_norm = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.last, self.head = nn.Conv2d(12, 10, 3), nn.Linear(10 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        inner = functional.relu(self.inner_norm(self.inner(x)))
        x = functional.relu(x + self.outer_norm(self.outer(inner)))
        return self.head(functional.relu(self.last(x)).flatten(1))


def tied(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return wake(Tied(), seed)


def gate_all(model: nn.Module, example: Tensor) -> GateTable:
    """Decorate what may be pruned."""
    groups = tied_gates(model, example)
    return GateTable(groups, decorate(model, [n for g in groups for n in g.members]))


def some(table: GateTable, share: float = 0.4, seed: int = 0) -> Tensor:
    """Numbers of randomly drawn structures, at least one left in every group."""
    draw = torch.rand(len(table.group), generator=torch.Generator().manual_seed(seed))
    chosen = draw < share
    for group in table.groups:
        chosen[table.ids(group.name, [0])] = False
    return chosen.nonzero()[:, 0]
