"""Small networks for OTOv2's tests, with BatchNorms as after training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 3, 1, 4])


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change all BatchNorms: a fresh one answers zeros with zeros."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                ):
                    if tensor is not None:
                        tensor.uniform_(low, high, generator=draw)
    return model


class Concatenated(nn.Module):
    """Like a DenseNet: BatchNorms read concatenations, the second one of a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 4, 3, padding=1)
        self.both = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, 3, 3, padding=1)
        self.all = nn.BatchNorm2d(13)
        self.last = nn.Conv2d(13, 8, 3)
        self.last_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, self.second(functional.relu(self.both(x)))], 1)
        x = functional.relu(self.last_norm(self.last(functional.relu(self.all(x)))))
        return self.head(x.mean((2, 3)))


class Ended(nn.Module):
    """One convolution with BatchNorm whose output comes to the head in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        channels, kernel = WAYS[way]
        self.conv = nn.Conv2d(3, channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        size = 9 - kernel
        inputs = {
            "flatten": channels * size**2,
            "flatten of one position": channels,
            "view": channels * size**2,
            "mean over channels": size**2,
            "mean over channels and rows": size,
            "mean over columns": channels * size,
            "flatten of positions, mean": channels,
            "flatten from channels on": channels * size**2,
        }
        self.head = nn.Linear(inputs.get(way, channels), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        ways = {
            "flatten": lambda: x.flatten(1),
            "flatten of one position": lambda: x.flatten(1),
            "flatten from channels on": lambda: x.flatten(1, 2).flatten(1),
            "flatten of positions, mean": lambda: x.flatten(2).mean(2),
            "view": lambda: x.view(x.shape[0], -1),
            "mean": lambda: x.mean((2, 3)),
            "mean that keeps dimensions": lambda: x.mean((2, 3), keepdim=True).flatten(1),
            "pooling": lambda: functional.adaptive_avg_pool2d(x, 1).flatten(1),
            "mean over channels": lambda: x.mean(1).flatten(1),
            "mean over channels and rows": lambda: x.mean((1, 2)),
            "mean over columns": lambda: x.mean(3).flatten(1),
        }
        return self.head(ways[self.way]())


WAYS = {  # channels and kernel; images are of 8 by 8
    "flatten": (7, 6),
    "flatten of one position": (7, 8),
    "flatten from channels on": (7, 6),
    "flatten of positions, mean": (7, 6),
    "view": (7, 6),
    "mean": (7, 6),
    "mean that keeps dimensions": (7, 6),
    "pooling": (7, 6),
    "mean over columns": (7, 6),
    "mean over channels": (7, 6),
    "mean over channels and rows": (3, 6),  # three channels, three columns: shapes mislead
}
KEPT = (
    "flatten",
    "flatten of one position",
    "view",
    "mean",
    "mean that keeps dimensions",
    "pooling",
)
"""Ways that carry each channel to the head by itself, which upstream is given as known."""


class Depthwise(nn.Module):
    """A depthwise convolution, which upstream prunes apart from the layer in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.depthwise_norm(self.depthwise(x)))
        return self.head(x.mean((2, 3)))
