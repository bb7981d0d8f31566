"""Networks by torchvision's own classes, most of them with fewer layers and channels than its own.

What can go wrong with them is in how their layers are connected, which is the same at every size;
`make table-models` tries those that torchvision names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models import DenseNet, ResNet, mobilenet_v2
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, make_layers


def vgg(classes: int) -> nn.Module:
    """For images of 96 x 96, of which 3 x 3 positions come to the flatten."""
    widths = [16, "M", 24, "M", 32, 32, "M", 48, 48, "M", 64, "M"]
    features = make_layers(widths, batch_norm=True)
    with torch.device("meta"):  # its own classifier has a hundred million weights
        model = VGG(features, classes, init_weights=False)
    model.avgpool = nn.Identity()
    for number, layer in {
        0: nn.Linear(64 * 9, 48),
        3: nn.Linear(48, 48),
        6: nn.Linear(48, classes),
    }.items():
        model.classifier[number] = layer
    return model


BUILD: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: ResNet(BasicBlock, [1, 2, 1, 1], classes),
    "resnet50": lambda classes: ResNet(Bottleneck, [1, 2, 1, 1], classes),
    "resnext": lambda classes: ResNet(
        Bottleneck, [1, 2, 1, 1], classes, groups=8, width_per_group=8
    ),
    "mobilenet_v2": lambda classes: mobilenet_v2(num_classes=classes, width_mult=0.25),
    "densenet": lambda classes: DenseNet(8, (2, 3, 2, 2), 16, num_classes=classes),
    "vgg_bn": vgg,
}
