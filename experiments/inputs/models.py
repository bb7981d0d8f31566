"""The networks of the experiments, for 32x32 images and, small, for 8x8 digits.

VGG16-BN: 13 convolutions (with bias), BatchNorm and one linear layer, 14.73 M parameters; and the
same at a quarter of its widths, 0.92 M parameters, for comparisons on a few cores.
ResNet-20 and ResNet-56: basic blocks, shortcuts of 1x1 convolution and BatchNorm where the shape
changes, 0.27 M and 0.86 M parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class VGG(nn.Module):
    """A plain stack of 3x3 convolutions, each with BatchNorm and ReLU.

    Args:
        widths: output channels of each convolution; 0 stands for a 2x2 max pooling.
        in_channels: of the images.
        classes: number of classes.
    """

    def __init__(self, widths: Sequence[int], in_channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(in_channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, width, H / stride, W / stride)."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels.

    Args:
        blocks: blocks per stage: 3 for ResNet-20, 9 for ResNet-56.
        in_channels: of the images.
        classes: number of classes.
    """

    def __init__(self, blocks: int, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
_SLIM = (16, 0, 32, 0, 64, 0, 64, 64)
_DIGITS = (32, 32, 0, 64, 64, 0, 128, 128)

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg16-bn": lambda channels, classes: VGG(_VGG16, channels, classes),
    "vgg16-quarter": lambda channels, classes: VGG([w // 4 for w in _VGG16], channels, classes),
    "vgg-slim": lambda channels, classes: VGG(_SLIM, channels, classes),
    "vgg-digits": lambda channels, classes: VGG(_DIGITS, channels, classes),
    "resnet20": lambda channels, classes: ResNet(3, channels, classes),
    "resnet56": lambda channels, classes: ResNet(9, channels, classes),
}


def build(name: str, in_channels: int, classes: int, seed: int | None = None) -> nn.Module:
    """A freshly initialised network: He for convolutions, as both papers' recipes have it.

    Args:
        name: one of :data:`MODELS`.
        in_channels: of the images.
        classes: number of classes.
        seed: of the initial weights; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        model = MODELS[name](in_channels, classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model
