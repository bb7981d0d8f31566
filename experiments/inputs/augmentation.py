"""How training images are varied, by draws of a generator alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Shares of the area, and ratios of width to height, that crops are drawn from; torchvision's."""
TRIES = 10


def shifted(images: Tensor, draw: torch.Generator, pad: int, flip: bool) -> Tensor:
    """Crops of the zero-padded images, in their size, half of them mirrored.

    Mirror and crop are one gather, which is cheaper than one after the other.

    Args:
        images: (N, C, H, W).
        draw: what is drawn from.
        pad: pixels on each side.
        flip: whether half of the images are mirrored.
    """
    if not (flip or pad):
        return images
    n, channels, height, width = images.shape
    mirrored = torch.rand(n, generator=draw) < 0.5 if flip else torch.zeros(n) > 0
    shift = torch.zeros(2, n, dtype=torch.int64)
    if pad:
        shift = torch.randint(2 * pad + 1, (2, n), generator=draw)
    wide = width + 2 * pad
    rows = shift[0, :, None] + torch.arange(height)
    columns = shift[1, :, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], wide - 1 - columns, columns)
    places = (rows[:, :, None] * wide + columns[:, None, :]).view(n, 1, -1).to(images.device)
    padded = functional.pad(images, (pad,) * 4).flatten(2)
    cut = padded.gather(2, places.expand(n, channels, height * width))
    return cut.view(n, channels, height, width)


def resized_crops(
    images: Tensor, draw: torch.Generator, size: tuple[int, int], flip: bool
) -> Tensor:
    """Crops of random area and shape, brought to one size, half of them mirrored.

    Source: torchvision's ``RandomResizedCrop``, as ImageNet's recipes have it. Ours: all crops of a
    batch are read at once, bilinearly, also over their own edge, and are not rounded; where no try
    fits, it is the whole image.

    Args:
        images: uint8 (N, C, H, W).
        draw: what is drawn from.
        size: height and width that crops are brought to.
        flip: whether half of the images are mirrored.

    Returns:
        float32 (N, C, *size), from 0 to 255.
    """
    n, _, height, width = images.shape
    top, left, high, wide = (t.to(images.device) for t in boxes(n, height, width, draw))
    mirrored = torch.rand(n, generator=draw) < 0.5 if flip else torch.zeros(n) > 0
    # In grid_sample's coordinates an image reaches from -1 to 1.
    rows = (top[:, None] + (_centres(size[0], images) * high[:, None])) * 2 / height - 1
    columns = (left[:, None] + (_centres(size[1], images) * wide[:, None])) * 2 / width - 1
    columns = torch.where(mirrored[:, None].to(images.device), columns.flip(1), columns)
    grid = torch.stack(
        [columns[:, None, :].expand(n, *size), rows[:, :, None].expand(n, *size)], dim=3
    )
    return functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _centres(count: int, like: Tensor) -> Tensor:
    """The middles of so many equal parts of 1."""
    return (torch.arange(count, device=like.device) + 0.5) / count


def boxes(n: int, height: int, width: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Crops as float32 (n,): top, left, height, width; all are whole pixels."""
    area = height * width * torch.empty(TRIES, n).uniform_(*AREA, generator=draw)
    log = torch.empty(TRIES, n).uniform_(*map(math.log, RATIO), generator=draw)
    place = torch.rand(2, n, generator=draw)
    wide = (area * log.exp()).sqrt().round().clamp(min=1)
    high = (area / log.exp()).sqrt().round().clamp(min=1)
    fits = (wide <= width) & (high <= height)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    wide = torch.where(found, wide.gather(0, first)[0], float(width))
    high = torch.where(found, high.gather(0, first)[0], float(height))
    top = (place[0] * (height - high + 1)).floor().clamp(max=height - high)
    left = (place[1] * (width - wide + 1)).floor().clamp(max=width - wide)
    return top, left, high, wide
