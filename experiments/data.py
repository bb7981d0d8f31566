"""Images, decoded once into one uint8 tensor, and batches that depend on seed and position alone.

``digits``: scikit-learn's bundled handwriting (1,797 images of 8x8), offline. ``cifar10`` and
``cifar100``: torchvision's downloads. ``folder:PATH``: any image folder with ``train`` and
``test`` (or ``val``) inside, one subfolder per class in each.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from .files import save_tensors


class DataError(ValueError):
    """The data is not there, or not what it is said to be. The message says what to do."""


@dataclass(frozen=True)
class Images:
    """A training and a test set on one device.

    Attributes:
        label: how tables and plots call the data.
        train, test: uint8, (N, C, H, W).
        train_labels, test_labels: int64, (N,).
        classes: number of classes.
        pad: random crops are cut from the image padded by this many pixels.
        flip: whether half of the training images are mirrored.
    """

    label: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    pad: int
    flip: bool

    @property
    def channels(self) -> int:
        """Colour channels."""
        return self.train.shape[1]

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        names = ("train", "train_labels", "test", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 to float32 with mean 0 and deviation 1 per channel over the training images."""
        mean, deviation = self._moments()
        return (images.float() / 255 - mean) / deviation

    def _moments(self) -> tuple[Tensor, Tensor]:
        cached: tuple[Tensor, Tensor] | None = getattr(self, "_cached_moments", None)
        if cached is None:
            pixels = self.train.double() / 255
            shape = (1, self.channels, 1, 1)
            mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
            cached = (mean.float().view(shape), deviation.float().view(shape))
            object.__setattr__(self, "_cached_moments", cached)
        return cached

    def digest(self) -> str:
        """Names the training images and their labels, all that training sees: 16 hex digits."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in (self.train, self.train_labels):
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def steps_per_epoch(self, batch: int) -> int:
        """Full batches in one pass over the training images."""
        if batch > len(self.train):
            raise DataError(f"batch {batch} exceeds the {len(self.train)} training images")
        return len(self.train) // batch

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
        draw = torch.Generator().manual_seed(_mix(seed, 2, position))
        rows = self._order(seed, epoch)[step * size : (step + 1) * size]
        images = self.train[rows.to(self.train.device)]
        return self.normalize(self._augment(images, draw)), self.train_labels[
            rows.to(images.device)
        ]

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch; the last one is kept, as the next batch asks for it again."""
        cached: tuple[tuple[int, int], Tensor] | None = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != (seed, epoch):
            draw = torch.Generator().manual_seed(_mix(seed, 1, epoch))
            cached = ((seed, epoch), torch.randperm(len(self.train), generator=draw))
            object.__setattr__(self, "_cached_order", cached)
        return cached[1]

    def _augment(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Mirror and crop in one gather, which is cheaper than one after the other."""
        if not (self.flip or self.pad):
            return images
        n, channels, height, width = images.shape
        mirrored = torch.rand(n, generator=draw) < 0.5 if self.flip else torch.zeros(n) > 0
        shift = torch.zeros(2, n, dtype=torch.int64)
        if self.pad:
            shift = torch.randint(2 * self.pad + 1, (2, n), generator=draw)
        wide = width + 2 * self.pad
        rows = shift[0, :, None] + torch.arange(height)
        columns = shift[1, :, None] + torch.arange(width)
        columns = torch.where(mirrored[:, None], wide - 1 - columns, columns)
        places = (rows[:, :, None] * wide + columns[:, None, :]).view(n, 1, -1).to(images.device)
        padded = functional.pad(images, (self.pad,) * 4).flatten(2)
        cut = padded.gather(2, places.expand(n, channels, height * width))
        return cut.view(n, channels, height, width)


def _mix(seed: int, purpose: int, number: int) -> int:
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
    draw = random.Random(_mix(seed, 3, position))  # noqa: S311
    order = torch.Generator().manual_seed(_mix(seed, 4, position))
    return draw.betavariate(alpha, alpha), torch.randperm(size, generator=order)


def load(
    name: str,
    root: Path,
    *,
    size: int = 32,
    label: str | None = None,
    train: int | None = None,
    validation: int | None = None,
) -> Images:
    """Load a data set by name, on the host.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100`` or ``folder:PATH``.
        root: where downloads and decoded folders are kept.
        size: images of a folder are brought to this height and width.
        label: what a folder's images are called; by default the folder's name.
        train: so many of the training images, always the same ones, equally many of each class.
        validation: so many of the other training images take the place of the test images.

    Raises:
        DataError: the name is unknown, the data cannot be had, or has fewer images than asked for.
    """
    whole = _whole(name, root, size)
    if label is not None:
        if not name.startswith("folder:"):
            raise DataError(f"{name} has a name of its own; a label is for a folder's images")
        whole = replace(whole, label=label)
    return _parted(whole, train, validation)


def _parted(whole: Images, train: int | None, validation: int | None) -> Images:
    """A part of the training images, and another part in the test images' place."""
    if train is None and validation is None:
        return whole
    order, apart = _balanced(whole.train_labels), validation or 0
    most = len(order) - apart
    if train is None:
        train = most
    if not 1 <= train <= most:
        raise DataError(
            f"{whole.label} has {len(order)} training images, fewer than the {train} to train on "
            f"and {apart} for validation; lower data.train or data.validation"
        )
    label = whole.label
    if train < len(order):
        label += f", {train:,} training images"
    rows = order[:train]
    made = replace(
        whole, label=label, train=whole.train[rows], train_labels=whole.train_labels[rows]
    )
    if not apart:
        return made
    rows = order[-apart:]
    return replace(
        made,
        label=f"{label}, {apart:,} for validation",
        test=whole.train[rows],
        test_labels=whole.train_labels[rows],
    )


def _balanced(labels: Tensor) -> Tensor:
    """A fixed order of all images in which any stretch has about as many of every class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = torch.empty(len(labels))
    for label in labels.unique():
        rows = shuffled[labels[shuffled] == label]
        turn[rows] = (torch.arange(len(rows)) + 0.5) / len(rows)
    return turn.argsort(stable=True)


def _whole(name: str, root: Path, size: int) -> Images:
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, root)
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")).expanduser(), root, size)
    raise DataError(f"unknown data {name!r}; give digits, cifar10, cifar100 or folder:PATH")


def _digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundled = load_digits()
    # 17 grey levels, 0 to 16.
    images = torch.tensor(bundled.images * 15, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(bundled.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=500, random_state=0, stratify=bundled.target
    )
    return Images(
        "digits", images[train], labels[train], images[test], labels[test], 10, pad=1, flip=False
    )


def _cifar(name: str, root: Path) -> Images:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except Exception as cause:
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({cause}); put torchvision's "
            f"files there, or give folder:PATH"
        ) from cause
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets, dtype=torch.int64) for part in parts]
    label = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    classes = len(parts[0].classes)
    return Images(label, images[0], labels[0], images[1], labels[1], classes, pad=4, flip=True)


def _folder(path: Path, root: Path, size: int) -> Images:
    from torchvision.datasets import ImageFolder

    test = next((path / n for n in ("test", "val") if (path / n).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise DataError(
            f"{path} needs the folders train and test (or val), each with one folder of images "
            "per class"
        )
    try:
        parts = [ImageFolder(str(path / "train")), ImageFolder(str(test))]
    except FileNotFoundError as cause:
        raise DataError(f"{path}: {cause}") from cause
    if parts[0].classes != parts[1].classes:
        differ = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise DataError(f"{path}: train and test differ in classes {differ}")
    stamp = hashlib.sha256(f"{path.resolve()} {size}\n".encode())
    for part in parts:
        for file, label in part.samples:
            at = Path(file)
            seen = at.stat()
            line = f"{at.relative_to(path)} {seen.st_size} {seen.st_mtime_ns} {label}\n"
            stamp.update(line.encode())
    cache = root / "decoded" / f"{path.resolve().name}-{stamp.hexdigest()[:16]}.pt"
    if not cache.exists():
        tensors = {}
        for split, part in zip(("train", "test"), parts, strict=True):
            tensors[split] = _decode([file for file, _ in part.samples], size, split)
            tensors[f"{split}_labels"] = torch.tensor([label for _, label in part.samples])
        save_tensors(cache, tensors)
    loaded = torch.load(cache, weights_only=True)
    return Images(
        f"{path.resolve().name} (folder)", **loaded, classes=len(parts[0].classes), pad=4, flip=True
    )


def _decode(files: list[str], size: int, what: str) -> Tensor:
    from PIL import Image

    out = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, desc=f"decoding {what}", unit="image", disable=None)):
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as cause:
            raise DataError(f"{file} is not an image ({cause}); remove it") from cause
        if image.size != (size, size):
            # The largest centred square, resized.
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        out[i] = raw.view(size, size, 3).permute(2, 0, 1)
    return out
