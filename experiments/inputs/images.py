"""Images, and batches of them that depend on seed and position alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dpm_core import DecayPruningError

from . import stored
from .augmentation import resized_crops, shifted

Augmentation = Literal["shift", "resized-crop"]
RESIDENT = 0.25
"""Images live on a GPU if they take no more than this share of its free memory."""


class DataError(DecayPruningError, ValueError):
    """The data is not there, or not what it is said to be. The message says what to do."""


class Rows:
    """Some of the images that are mapped into memory, in an order: read when they are asked for.

    Args:
        whole: uint8 (N, C, H, W).
        rows: which of them, (n,) int64.
        size: only the middle of each image, of this height and width.
    """

    def __init__(self, whole: Tensor, rows: Tensor, size: tuple[int, int]) -> None:
        self._whole, self._rows, self._size = whole, rows, size

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return torch.Size([len(self._rows), self._whole.shape[1], *self._size])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The images of some rows, (m, C, H, W)."""
        return middle(self._whole[self._rows[index]], self._size)


Pixels = Tensor | Rows
"""uint8 (N, C, H, W)."""


def middle(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images, (N, C, *size)."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[2:], size, strict=True))
    return images[:, :, top : top + size[0], left : left + size[1]]


@dataclass(frozen=True)
class Images:
    """A training and a test set.

    Attributes:
        label: what tables and plots call the data.
        train, test: uint8, (N, C, H, W). Training images may be larger than the test images, which
            have the size that networks get.
        train_labels, test_labels: int64, (N,), on the device that batches go to.
        classes: number of classes.
        pad: random crops are cut from the image padded by this many pixels.
        flip: whether half of the training images are mirrored.
        augmentation: ``shift``: crops of the padded image; or ``resized-crop``: crops of random
            area and shape, brought to the size of the test images.
        mapped: whether ``train`` and ``test`` are read from disk when they are asked for.
    """

    label: str
    train: Pixels
    train_labels: Tensor
    test: Pixels
    test_labels: Tensor
    classes: int
    pad: int
    flip: bool
    augmentation: Augmentation = "shift"
    mapped: bool = False

    @property
    def channels(self) -> int:
        """Colour channels."""
        return self.train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that networks get."""
        height, width = self.test.shape[2:]
        return height, width

    @property
    def device(self) -> torch.device:
        """Where batches go; the images themselves may stay on the host."""
        return self.train_labels.device

    def to(self, device: torch.device) -> Images:
        """The same images with batches on another device; too many for it stay on the host."""
        if device == self.device:
            return self
        names = ["train_labels", "test_labels"]
        moved = {name: getattr(self, name).to(device) for name in names}
        needed = sum(part.shape.numel() for part in (self.train, self.test))
        if device.type != "cuda" or needed <= RESIDENT * torch.cuda.mem_get_info(device)[0]:
            moved |= {"train": self.train[:].to(device), "test": self.test[:].to(device)}
            moved["mapped"] = False
        there = replace(self, **moved)
        for name in ("digest", "training_digest"):
            if known := getattr(self, f"_cached_{name}", None):
                object.__setattr__(there, f"_cached_{name}", known)
        return there

    def plain(self, part: slice) -> Tensor:
        """Some training images as networks get them, but not varied: (n, C, H, W)."""
        return middle(self.train[part], self.size)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels, 0 to 255, to float32 with mean 0 and deviation 1 per channel, on the device.

        Mean and deviation are those over the training images. A channel that is the same in all of
        them has no deviation, and is only shifted (our choice).
        """
        mean, deviation = self._moments()
        pixels = images.to(self.device).float() / 255
        return pixels.sub_(mean).div_(deviation)  # in place: large images take memory

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training images' channels, float32 (1, C, 1, 1).

        From sums of whole numbers, which are exact in any order.
        """
        cached: tuple[Tensor, Tensor] | None = getattr(self, "_cached_moments", None)
        if cached is None:
            sums = torch.zeros(2, self.channels, dtype=torch.int64)
            for chunk in _chunks(self.train):
                values = chunk.int()
                squares = values.square().sum((0, 2, 3), dtype=torch.int64)
                sums += torch.stack([values.sum((0, 2, 3), dtype=torch.int64), squares]).cpu()
            count = self.train.shape.numel() // self.channels
            mean = [total / (255 * count) for total in sums[0].tolist()]
            spread = [count * q - s * s for s, q in zip(*sums.tolist(), strict=True)]
            free = max(1, count - 1)
            deviation = [(v / (count * free)) ** 0.5 / 255 if v else 1.0 for v in spread]
            mean_, deviation_ = (
                torch.tensor(values, dtype=torch.float64).float().view(1, -1, 1, 1).to(self.device)
                for values in (mean, deviation)
            )
            cached = mean_, deviation_
            object.__setattr__(self, "_cached_moments", cached)
        return cached

    def digest(self) -> str:
        """A hash of the images and labels of both sets: 16 hex digits."""
        return self._named("digest", "train", "train_labels", "test", "test_labels")

    def training_digest(self) -> str:
        """A hash of the training images and their labels, all that training sees: 16 hex digits."""
        return self._named("training_digest", "train", "train_labels")

    def _named(self, digest: str, *parts: str) -> str:
        cached: str | None = getattr(self, f"_cached_{digest}", None)
        if cached is None:
            content = stored.hasher()
            for name in parts:
                for chunk in _chunks(getattr(self, name)):
                    content.update(chunk.cpu().contiguous().numpy().data)
            cached = str(content.hexdigest())
            object.__setattr__(self, f"_cached_{digest}", cached)
        return cached

    def steps_per_epoch(self, batch: int) -> int:
        """Full batches in one pass over the training images."""
        return full_batches(len(self.train), batch)

    def batch(self, size: int, position: int, seed: int) -> tuple[Tensor, Tensor]:
        """The training batch at a position: augmented and normalised, the same in every run.

        Args:
            size: images in the batch.
            position: counts training steps from 0; epochs follow one another in fresh orders.
            seed: of the order and the augmentation.

        Returns:
            Images, float32 (size, C, H, W), and labels (size,).
        """
        steps = self.steps_per_epoch(size)
        epoch, step = divmod(position, steps)
        draw = torch.Generator().manual_seed(mix(seed, 2, position))
        rows = self._order(seed, epoch)[step * size : (step + 1) * size]
        on_host = not isinstance(self.train, Tensor) or self.train.device.type == "cpu"
        images = self.train[rows if on_host else rows.to(self.device)].to(self.device)
        if self.augmentation == "resized-crop":
            images = resized_crops(images, draw, self.size, self.flip)
        else:
            images = shifted(images, draw, self.pad, self.flip)
        return self.normalize(images), self.train_labels[rows.to(self.device)]

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch; the last one is kept, as the next batch asks for it again."""
        cached: tuple[tuple[int, int], Tensor] | None = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != (seed, epoch):
            draw = torch.Generator().manual_seed(mix(seed, 1, epoch))
            cached = ((seed, epoch), torch.randperm(len(self.train), generator=draw))
            object.__setattr__(self, "_cached_order", cached)
        return cached[1]


def full_batches(images: int, batch: int) -> int:
    """How many batches there are of so many images, without what is left over.

    Raises:
        DataError: a batch is larger than all of them.
    """
    if batch > images:
        raise DataError(f"batch {batch} exceeds the {images} training images")
    return images // batch


def _chunks(part: Pixels) -> Iterator[Tensor]:
    """A tensor in stretches of some megabytes."""
    rows = max(1, stored.CHUNK // max(1, part.shape[1:].numel()))
    for start in range(0, len(part), rows):
        yield part[start : start + rows]


def mix(seed: int, purpose: int, number: int) -> int:
    """A seed for one purpose: neighbouring numbers give unrelated streams."""
    text = f"{seed}/{purpose}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def mixing(alpha: float, size: int, position: int, seed: int) -> tuple[float, Tensor | None]:
    """How mixup blends a batch with itself: a share, and each image's partner.

    Source: mixup, arXiv 1710.09412: the share is drawn from Beta(alpha, alpha), one for a batch.

    Args:
        alpha: 0 for no mixing.
        size: images in the batch.
        position: counts training steps from 0.
        seed: of the draw.

    Returns:
        The share of the image itself, and partners, int64 (size,), or ``None`` for no mixing.
    """
    if alpha == 0:
        return 1.0, None
    draw = random.Random(mix(seed, 3, position))  # noqa: S311
    order = torch.Generator().manual_seed(mix(seed, 4, position))
    return draw.betavariate(alpha, alpha), torch.randperm(size, generator=order)
