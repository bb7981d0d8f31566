"""Small models with their structure groups, and one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from dpm_core import Owner, Slice, StructureGroup

CLASSES = 3
BATCH = 6


@dataclass
class Toy:
    """A model, its groups, what decays in the tests, and the shape of a sample."""

    model: nn.Module
    groups: list[StructureGroup]
    doomed: dict[str, list[int]]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The training batch of a step, always the same one."""
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, *self.shape, generator=draw)
        y = torch.randint(CLASSES, (BATCH,), generator=draw)
        return x.to(self.dtype), y

    def loss(self, step: int) -> Tensor:
        x, y = self.batch(step)
        return functional.cross_entropy(self.model(x), y)

    def backward(self, optimizer: Optimizer, step: int) -> None:
        optimizer.zero_grad()
        self.loss(step).backward()

    def train_step(self, optimizer: Optimizer, step: int) -> None:
        self.backward(optimizer, step)
        optimizer.step()


def rows(module: nn.Module, name: str, dim: int = 0, index: Tensor | None = None) -> list[Slice]:
    """A slice of each parameter of a layer, by output channel."""
    slices = []
    for kind, p in module.named_parameters():
        along = dim if p.dim() > 1 else 0
        here = torch.arange(p.shape[along]) if index is None else index
        norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        slices.append(Slice(p, here, along, batch_norm=norm, name=f"{name}.{kind}"))
    return slices


def _wake(model: nn.Module) -> None:
    """Give BatchNorm parameters values of their own: at 1 and 0 half of every sum is trivial."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)


def conv_net() -> Toy:
    """Two conv-BatchNorm-ReLU layers, a group each, of different widths."""
    model = nn.Sequential()
    model.conv1, model.bn1, model.relu1 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    model.conv2 = nn.Conv2d(6, 5, 2, bias=False)
    model.bn2, model.relu2 = nn.BatchNorm2d(5), nn.ReLU()
    model.flat, model.head = nn.Flatten(), nn.Linear(5 * 4, CLASSES)
    _wake(model)
    groups = [
        StructureGroup(
            "conv1",
            rows(model.conv1, "conv1") + rows(model.bn1, "bn1"),
            [Owner(model.bn1, torch.arange(6))],
        ),
        StructureGroup(
            "conv2",
            rows(model.conv2, "conv2") + rows(model.bn2, "bn2"),
            [Owner(model.bn2, torch.arange(5))],
        ),
    ]
    return Toy(model, groups, {"conv1": [1, 4], "conv2": [0]}, (2, 5, 5))


def flatten_net() -> Toy:
    """No BatchNorm; a structure's share in the linear layer is four consecutive columns."""
    model = nn.Sequential()
    model.conv, model.relu = nn.Conv2d(2, 4, 3), nn.ReLU()
    model.flat, model.head = nn.Flatten(), nn.Linear(4 * 4, CLASSES)
    slices = rows(model.conv, "conv")
    slices.append(Slice.whole(model.head.weight, 1, per_structure=4, name="head.weight"))
    group = StructureGroup("conv", slices, [Owner(model.conv, torch.arange(4))])
    return Toy(model, [group], {"conv": [0, 3]}, (2, 4, 4))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        x = (x + self.bn(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


def residual_net() -> Toy:
    """Channels tied by an addition: one structure in two layers, with two owners."""
    model = Residual()
    _wake(model)
    slices = rows(model.stem, "stem") + rows(model.stem_bn, "stem_bn")
    slices += rows(model.conv, "conv") + rows(model.bn, "bn")
    owners = [Owner(m, torch.arange(4)) for m in (model.stem_bn, model.bn)]
    return Toy(model, [StructureGroup("tied", slices, owners)], {"tied": [2]}, (2, 3, 3))


def strided_net() -> Toy:
    """A grouped convolution: structure k is channel k of both of its halves."""
    model = nn.Sequential()
    model.conv, model.bn, model.relu = nn.Conv2d(2, 8, 2), nn.BatchNorm2d(8), nn.ReLU()
    model.grouped = nn.Conv2d(8, 4, 2, groups=2)
    model.flat, model.head = nn.Flatten(), nn.Linear(4, CLASSES)
    _wake(model)
    index = torch.arange(8).view(2, 4).T
    slices = rows(model.conv, "conv", index=index) + rows(model.bn, "bn", index=index)
    group = StructureGroup("halves", slices, [Owner(model.bn, index)])
    return Toy(model, [group], {"halves": [0, 2]}, (2, 3, 3))


def transposed_net() -> Toy:
    """A transposed convolution has its output channels along dim 1."""
    model = nn.Sequential()
    model.conv, model.bn, model.relu = nn.ConvTranspose2d(2, 5, 2), nn.BatchNorm2d(5), nn.ReLU()
    model.flat, model.head = nn.Flatten(), nn.Linear(5 * 9, CLASSES)
    _wake(model)
    slices = rows(model.conv, "conv", dim=1) + rows(model.bn, "bn")
    group = StructureGroup("up", slices, [Owner(model.bn, torch.arange(5))])
    return Toy(model, [group], {"up": [4, 1]}, (2, 2, 2))


def shared_net() -> Toy:
    """One parameter of two groups, rows 0 to 3 and pairs of rows 4 to 7, and of none: row 8."""
    model = nn.Sequential()
    model.body, model.relu, model.head = nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, CLASSES)
    singles, pairs = torch.arange(4), torch.arange(4, 8).view(2, 2)
    groups = [
        StructureGroup(name, rows(model.body, "body", index=index), [Owner(model.body, index)])
        for name, index in (("singles", singles), ("pairs", pairs))
    ]
    return Toy(model, groups, {"singles": [3, 1], "pairs": [0]}, (3,))


TOYS: dict[str, Callable[[], Toy]] = {
    "conv": conv_net,
    "flatten": flatten_net,
    "residual": residual_net,
    "strided": strided_net,
    "transposed": transposed_net,
    "shared": shared_net,
}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.02, weight_decay=1e-2),
    "adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """A toy in training mode; the same arguments give the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        toy = TOYS[name]()
    # In place: the groups hold these very parameters.
    toy.model.to(dtype)
    toy.model.train()
    return toy
