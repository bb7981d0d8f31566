"""Images by name, as a configuration names them.

``digits``: scikit-learn's bundled handwriting (1,797 images of 8x8), offline. ``cifar10`` and
``cifar100``: torchvision's downloads. ``folder:PATH``: any image folder with ``train`` and
``test`` (or ``val``) inside, one subfolder per class in each; see :mod:`.folders`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import folders
from .images import Augmentation, DataError, Images, Pixels, Rows


def load(
    name: str,
    root: Path,
    *,
    size: int = 32,
    label: str | None = None,
    train: int | None = None,
    validation: int | None = None,
    augmentation: Augmentation = "shift",
    before: Callable[[int, int], None] = lambda _classes, _training: None,
) -> Images:
    """Load a data set by name, on the host.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100`` or ``folder:PATH``.
        root: where downloads and decoded folders are kept.
        size: images of a folder are brought to this height and width.
        label: what a folder's images are called; by default the folder's name.
        train: so many of the training images, always the same ones, equally many of each class.
        validation: so many of the other training images take the place of the test images.
        augmentation: how training images are varied; see :class:`~.images.Images`.
        before: is called right before a folder's images are decoded, if they are, with the numbers
            of classes and of the images to train on. What it raises passes through.

    Raises:
        DataError: the name is unknown, the data cannot be had, or has fewer images than asked for.
        OSError: a decoded folder cannot be written.
    """

    def decoding(classes: int, found: int) -> None:
        before(classes, _count(name, found, train, validation))

    whole = _whole(name, root, size, augmentation, decoding)
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
    train = _count(whole.label, len(order), train, validation)
    label = whole.label
    if train < len(order):
        label += f", {train:,} training images"
    rows = order[:train]
    height, width = whole.train.shape[2:]
    part = replace(
        whole,
        label=label,
        train=_rows(whole, rows, (height, width)),
        train_labels=whole.train_labels[rows],
    )
    if not apart:
        return part
    rows = order[-apart:]
    return replace(
        part,
        label=f"{label}, {apart:,} for validation",
        test=_rows(whole, rows, whole.size),
        test_labels=whole.train_labels[rows],
    )


def _count(label: str, found: int, train: int | None, validation: int | None) -> int:
    """How many of the training images there are is trained on.

    Raises:
        DataError: there are fewer than asked for.
    """
    apart = validation or 0
    most = found - apart
    if train is None:
        train = most
    if not 1 <= train <= most:
        raise DataError(
            f"{label} has {found} training images, fewer than the {train} to train on "
            f"and {apart} for validation; lower data.train or data.validation"
        )
    return train


def _rows(whole: Images, rows: Tensor, size: tuple[int, int]) -> Pixels:
    """Some of the training images, or the middle of them."""
    taken = Rows(torch.as_tensor(whole.train), rows, size)
    return taken if whole.mapped else taken[:]


def _balanced(labels: Tensor) -> Tensor:
    """A fixed order of all images in which any stretch has about as many of every class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = torch.empty(len(labels))
    for label in labels.unique():
        rows = shuffled[labels[shuffled] == label]
        turn[rows] = (torch.arange(len(rows)) + 0.5) / len(rows)
    return turn.argsort(stable=True)


def _whole(
    name: str,
    root: Path,
    size: int,
    augmentation: Augmentation,
    before: Callable[[int, int], None],
) -> Images:
    if name == "digits":
        return replace(_digits(), augmentation=augmentation)
    if name in ("cifar10", "cifar100"):
        return replace(_cifar(name, root), augmentation=augmentation)
    if name.startswith("folder:"):
        try:
            path = Path(name.removeprefix("folder:")).expanduser()
        except RuntimeError as cause:  # ~somebody who is not known
            raise DataError(f"{name}: {cause}; give the whole path") from cause
        return folders.load(path, root, size, augmentation, before)
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
