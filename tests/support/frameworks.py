"""One case per adapter for the contract suite, and the smallest loop that can drive any of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters import registry
from adapters.base import Adapter, Context
from dpm_core import SelfRectifying, SmoothPruning, Trajectory

CLASSES = 5


class SmallResNet(nn.Module):
    """A tied residual group, a free one, and a layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 12, 3, padding=1)
        self.outer_norm = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 10, 3)
        self.hidden = nn.Linear(10 * 36, 14)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        inner = functional.relu(self.inner_norm(self.inner(x)))
        x = functional.relu(x + self.outer_norm(self.outer(inner)))
        x = functional.relu(self.last(x)).flatten(1)
        return self.head(functional.relu(self.hidden(x)))


def small_resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EAGER = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.4)
"""Releases as many as it may."""


@dataclass
class Case:
    """What the contract suite needs to know of a framework."""

    framework: str
    options: dict[str, Any]
    stages: dict[str, int]
    speed_up: float
    impossible: dict[str, Any]
    build: Callable[[], nn.Module] = small_resnet

    def adapter(
        self,
        model: nn.Module,
        variant: str,
        *,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying = EAGER,
        stages: dict[str, int] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Adapter:
        kind = registry.load(self.framework)
        context = Context(
            model=model,
            example=EXAMPLE,
            variant=variant,  # type: ignore[arg-type]
            smooth=smooth or SmoothPruning(6),
            rectify=rectify,
            stages=stages or self.stages,
            steps_per_epoch=3,
        )
        return kind(context, kind.Options(**(self.options if options is None else options)))


CASES = [
    Case("depgraph", {"speed_up": 2.0, "steps": 25}, {"prune": 16}, 2.0, {"speed_up": 1e6}),
    Case(
        "depgraph",
        {"speed_up": 2.0, "steps": 25},
        {"sparse": 7, "prune": 16},
        2.0,
        {"speed_up": 1e6},
    ),
]
IDS = ["depgraph", "depgraph-sparse"]


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 + number)
    labels = torch.randint(0, CLASSES, (16,), generator=draw)
    images = torch.randn(16, 3, 8, 8, generator=draw) + labels.view(-1, 1, 1, 1) * 0.3
    return images, labels


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


@dataclass
class Drive:
    """Train through all stages; can be stopped after any step and taken up from its state."""

    case: Case
    adapter: Adapter
    stage: int = 0
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None
    before_removal: nn.Module | None = None
    batches: int = field(default=0)

    @property
    def model(self) -> nn.Module:
        return self.adapter.context.model

    def loss(self) -> Tensor:
        images, labels = batch(100 * self.stage + self.step)
        self.step += 1
        self.batches += 1
        return functional.cross_entropy(self.model(images), labels)

    def run(self, stop_after: int | None = None) -> Drive:
        stages = list(self.adapter.context.stages.items())
        while self.stage < len(stages):
            name, steps = stages[self.stage]
            if self.optimizer is None:
                self._begin(name)
            while True:
                if self.adapter.due():
                    self.before_removal = copy.deepcopy(self.model)
                    self.adapter.remove()
                    self._begin(name)
                if self.step >= steps:
                    break
                self.model.train()
                assert self.optimizer is not None
                self.optimizer.zero_grad()
                self.loss().backward()
                self.adapter.after_backward()
                self.optimizer.step()
                self.adapter.after_step()
                if self.batches == stop_after:
                    return self
            self.stage, self.step, self.optimizer = self.stage + 1, 0, None
        return self

    def _begin(self, name: str) -> None:
        self.optimizer = new_optimizer(self.model)
        self.adapter.begin(name, self.optimizer, self.loss)
