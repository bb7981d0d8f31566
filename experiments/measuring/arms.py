"""The arms of the benchmark: one training step without the core, with it idle, and decaying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import (
    DecayPruning,
    Phase,
    SelfRectifying,
    SmoothPruning,
    StructureGroup,
    Trajectory,
)
from dpm_core.adapters.base import structure_group
from dpm_core.adapters.depgraph import structure_groups
from dpm_core.adapters.gate_decorator import structure_group as gate_group
from dpm_core.third_party import gate_decorator, otov2

from ..inputs import models

ARMS = ("plain", "idle", "decaying")
CLASSES = 10
# So long that no decision falls and nothing ends while the clock runs.
DECAY_STEPS = 10**6
SEED = 0


@dataclass(frozen=True)
class Settings:
    """What is measured, for one model in one framework."""

    model: str
    batch: int
    channels: int
    image_size: int
    repeats: int
    device: torch.device
    framework: str = "depgraph"

    def build(self) -> tuple[nn.Module, list[StructureGroup]]:
        """The model in training mode and its groups; every call gives a copy of the same."""
        return copy.deepcopy(_built(self))

    def images(self) -> Tensor:
        """A batch of noise; every call gives the same."""
        draw = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.channels, self.image_size, self.image_size)
        return torch.randn(shape, generator=draw).to(self.device)


@lru_cache(maxsize=1)
def _built(settings: Settings) -> tuple[nn.Module, list[StructureGroup]]:
    # Kept, because finding the groups of ResNet-56 takes seconds.
    model = models.build(settings.model, settings.channels, CLASSES, seed=SEED)
    model = model.to(settings.device).train()
    return model, structure_groups(model, settings.images()[:2])


@dataclass
class Arm:
    """One way to take the step, with a model and an optimizer of its own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    dpm: DecayPruning | None = None

    def step(self) -> None:
        """One training step; its gradients stay until the next."""
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


# A low learning rate: the same gradients are applied many times over.
RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
Parts = tuple[nn.Module, list[StructureGroup], torch.optim.Optimizer]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)


def _depgraph(settings: Settings, _plain: bool) -> Parts:
    model, groups = settings.build()
    return model, groups, _sgd(model)


def _otov2(settings: Settings, plain: bool) -> Parts:
    model, _ = settings.build()
    oto = otov2.graph(model, settings.images()[:2])
    kind = otov2.DHSPG if plain else otov2.DeferringDHSPG
    # An epsilon of 0: at this learning rate the half-space is never left, and the penalty goes on.
    optimizer = kind(
        oto,
        variant="sgd",
        lr=RATE,
        first_momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        target_group_sparsity=0.5,
        epsilon=0.0,
    )
    return model, [structure_group(g) for g in otov2.groups(oto, model)], optimizer


def _gate_decorator(settings: Settings, _plain: bool) -> Parts:
    model, _ = settings.build()
    decorator = gate_decorator.GateDecorator(model, settings.images()[:2], fraction=0.01)
    groups = [gate_group(g, decorator.gates) for g in decorator.groups]
    return model, groups, _sgd(model)


FRAMEWORKS: dict[str, Callable[[Settings, bool], Parts]] = {
    "depgraph": _depgraph,
    "otov2": _otov2,
    "gate-decorator": _gate_decorator,
}


def make_arms(settings: Settings) -> dict[str, Arm]:
    """The arms, by name; in the last one half of every group's structures decay."""
    images = settings.images()
    labels = torch.arange(settings.batch, device=settings.device) % CLASSES
    arms = {}
    for name in ARMS:
        model, groups, optimizer = FRAMEWORKS[settings.framework](settings, name == "plain")
        arms[name] = Arm(model, optimizer, images, labels)
        if name == "plain":
            continue
        dpm = DecayPruning(groups, SmoothPruning(DECAY_STEPS), SelfRectifying(Trajectory()))
        arms[name].dpm = dpm.attach(optimizer)
        if name == "decaying":
            draw = torch.Generator().manual_seed(SEED)
            dpm.decay(
                {g.name: torch.randperm(g.size, generator=draw)[: g.size // 2] for g in groups}
            )
    return arms


def decaying_slices(arm: Arm) -> tuple[list[Tensor], list[Tensor]]:
    """Compact copies of what is decaying: slices, and their gradients."""
    assert arm.dpm is not None
    slices, gradients = [], []
    for group in arm.dpm.groups.values():
        decaying = (arm.dpm.phases(group.name) == Phase.DECAYING).nonzero()[:, 0]
        for s in group.slices:
            rows = s.index[decaying.to(s.index.device)].reshape(-1)
            assert s.parameter.grad is not None
            slices.append(s.parameter.detach().index_select(s.dim, rows))
            gradients.append(s.parameter.grad.index_select(s.dim, rows))
    return slices, gradients
