"""Images, decoded once into one uint8 tensor, and batches that depend on seed and position alone.

``digits``: scikit-learn's bundled handwriting (1,797 images of 8x8), offline. ``cifar10`` and
``cifar100``: torchvision's downloads. ``folder:PATH``: any image folder with ``train`` and
``test`` (or ``val``) inside, one subfolder per class in each.

In a class folder, and in folders within it, every file has to be an image that Pillow reads; others
are counted and named in an error. Only files and folders whose names start with a dot, and what
file managers leave behind, are passed over. Colours are read as 8-bit RGB, as torchvision reads
them: transparency and colour profiles are ignored. 16 bits are rounded to 8, photographs are turned
as their EXIF orientation says. Images that cannot be read so (floating point, 32 bits, several
frames) are refused by name.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dpm_core import DecayPruningError

from .files import FileError, load_tensors, save_tensors

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 3
"""How many of the wrong files an error names."""
UNWANTED = {"desktop.ini", "Thumbs.db"}
"""What file managers leave in folders, beside files with a dot in front."""


class DataError(DecayPruningError, ValueError):
    """The data is not there, or not what it is said to be. The message says what to do."""


@dataclass(frozen=True)
class Images:
    """A training and a test set on one device.

    Attributes:
        label: what tables and plots call the data.
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
        """uint8 to float32 with mean 0 and deviation 1 per channel over the training images.

        A channel that is the same in all of them has no deviation, and is only shifted (our
        choice).
        """
        mean, deviation = self._moments()
        return (images.float() / 255 - mean) / deviation

    def _moments(self) -> tuple[Tensor, Tensor]:
        cached: tuple[Tensor, Tensor] | None = getattr(self, "_cached_moments", None)
        if cached is None:
            pixels = self.train.double() / 255
            shape = (1, self.channels, 1, 1)
            mean = pixels.mean((0, 2, 3))
            deviation = pixels.std((0, 2, 3), correction=min(1, pixels[:, 0].numel() - 1))
            constant = self.train.amax((0, 2, 3)) == self.train.amin((0, 2, 3))
            deviation = torch.where(constant, 1.0, deviation)  # which rounding may leave above 0
            cached = (mean.float().view(shape), deviation.float().view(shape))
            object.__setattr__(self, "_cached_moments", cached)
        return cached

    def digest(self) -> str:
        """A hash of the images and labels of both sets: 16 hex digits."""
        return self._named("digest", "train", "train_labels", "test", "test_labels")

    def training_digest(self) -> str:
        """A hash of the training images and their labels, all that training sees: 16 hex digits."""
        return self._named("training_digest", "train", "train_labels")

    def _named(self, digest: str, *tensors: str) -> str:
        cached: str | None = getattr(self, f"_cached_{digest}", None)
        if cached is None:
            content = hashlib.blake2b(digest_size=8)
            for name in tensors:
                content.update(getattr(self, name).cpu().contiguous().numpy().data)
            cached = content.hexdigest()
            object.__setattr__(self, f"_cached_{digest}", cached)
        return cached

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
        draw = torch.Generator().manual_seed(mix(seed, 2, position))
        rows = self._order(seed, epoch)[step * size : (step + 1) * size]
        images = self.train[rows.to(self.train.device)]
        return self.normalize(self._augment(images, draw)), self.train_labels[
            rows.to(images.device)
        ]

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch; the last one is kept, as the next batch asks for it again."""
        cached: tuple[tuple[int, int], Tensor] | None = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != (seed, epoch):
            draw = torch.Generator().manual_seed(mix(seed, 1, epoch))
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
    part = replace(
        whole, label=label, train=whole.train[rows], train_labels=whole.train_labels[rows]
    )
    if not apart:
        return part
    rows = order[-apart:]
    return replace(
        part,
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
        try:
            path = Path(name.removeprefix("folder:")).expanduser()
        except RuntimeError as cause:  # ~somebody who is not known
            raise DataError(f"{name}: {cause}; give the whole path") from cause
        return _folder(path, root, size)
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
    test = next((path / n for n in ("test", "val") if (path / n).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise DataError(
            f"{path} needs the folders train and test (or val), each with one folder of images "
            "per class"
        )
    seen: dict[str, Path] = {os.path.realpath(path): path}
    parts = {"train": _classes(path / "train", seen), "test": _classes(test, seen)}
    names = [set(part) for part in parts.values()]
    if names[0] != names[1]:
        raise DataError(f"{path}: train and test differ in classes {sorted(names[0] ^ names[1])}")
    if len(names[0]) < 2:
        raise DataError(f"{path} has the classes {sorted(names[0])}; it takes two folders or more")
    stamp = _stamp(path, parts, size)
    cache = root / "decoded" / f"{path.resolve().name}-{stamp[:16]}.pt"
    of = {"kind": "decoded images", "stamp": stamp}
    if cache.exists():
        try:
            tensors = load_tensors(cache, of)
        except FileError as cause:
            raise DataError(
                f"{cache} cannot be read ({cause}); delete it, and the images are decoded anew"
            ) from cause
    else:
        tensors = _decoded(path, parts, size)
        if _stamp(path, parts, size) != stamp:
            raise DataError(f"{path} changed while it was read; run again when all is there")
        save_tensors(cache, tensors, of)
    return Images(
        f"{path.resolve().name} (folder)", **tensors, classes=len(names[0]), pad=4, flip=True
    )


Classes = Mapping[str, list[Path]]
"""Files by class, both in order."""


def _classes(folder: Path, seen: dict[str, Path]) -> Classes:
    """The files of a folder's classes, in the order of torchvision's ``ImageFolder``."""
    from PIL import Image

    classes = {}
    loose = []
    _once(folder, seen)
    for entry in _entries(folder):
        if _is_folder(entry):
            classes[entry.name] = sorted(_below(Path(entry.path), seen), key=_place)
        elif Path(entry.name).suffix.lower() in Image.registered_extensions():
            loose.append(entry.name)
    if loose:
        raise DataError(
            f"{folder} has {len(loose)} images outside of its class folders "
            f"({_some(sorted(loose))}); put them into one, or remove them"
        )
    if empty := [name for name, files in classes.items() if not files]:
        raise DataError(f"{folder} has class folders without images ({_some(empty)}); remove them")
    return classes


def _place(file: Path) -> tuple[str, str]:
    return str(file.parent), file.name


def _below(folder: Path, seen: dict[str, Path]) -> Iterator[Path]:
    """All files in a folder, and in folders in it."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        _once(here, seen)
        for entry in _entries(here):
            if _is_folder(entry):
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path)


def _once(folder: Path, seen: dict[str, Path]) -> None:
    """Refuse a folder that was read before: a link would multiply images, or lead in circles."""
    other = seen.setdefault(os.path.realpath(folder), folder)
    if other is not folder:
        raise DataError(
            f"{folder} and {other} are one and the same folder, whose images would count twice; "
            "remove the link"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as cause:
        raise DataError(f"{folder} cannot be read ({cause.strerror})") from cause
    return [e for e in entries if not e.name.startswith(".") and e.name not in UNWANTED]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stamp(path: Path, parts: Mapping[str, Classes], size: int) -> str:
    """A hash of a folder's files as they are on disk.

    It includes the time of each inode's last change, which no program can set. So it changes even
    if files are replaced by others of equal size and an older date.
    """
    stamp = hashlib.sha256(os.fsencode(path.resolve()) + f" {size}\n".encode())
    for part in parts.values():
        for label, files in enumerate(part.values()):
            for file in files:
                try:
                    at = file.stat()
                    line = f" {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns} {label}\n"
                except OSError:  # such as a link to nothing, which decoding will name
                    line = f" {label}\n"
                stamp.update(os.fsencode(file.relative_to(path)) + line.encode())
    return stamp.hexdigest()


def _decoded(path: Path, parts: Mapping[str, Classes], size: int) -> dict[str, Tensor]:
    """Images and labels of both sets.

    Raises:
        DataError: counting and naming files that are no images; all were tried.
    """
    tensors, wrong, count = {}, [], 0
    for split, part in parts.items():
        listed = [(file, label) for label, of in enumerate(part.values()) for file in of]
        out = torch.empty(len(listed), 3, size, size, dtype=torch.uint8)
        bar = tqdm(listed, desc=f"decoding {split}", unit="image", disable=None)
        for i, (file, _) in enumerate(bar):
            try:
                out[i] = _decode(file, size)
            except Exception as cause:  # Pillow's readers raise many kinds
                reason = " ".join(str(cause).split()) or type(cause).__name__
                wrong.append(f"{file.relative_to(path)}: {reason}")
        tensors[split] = out
        tensors[f"{split}_labels"] = torch.tensor([label for _, label in listed])
        count += len(listed)
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} of {count} files are not images that can be used "
            f"({_some(wrong, '; ')}); convert them, or remove them"
        )
    return tensors


def _some(names: list[str], between: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *more])


def _decode(file: Path, size: int) -> Tensor:
    """An image's largest centred square, (3, size, size), uint8."""
    from PIL import Image

    if not file.is_file():  # a pipe would be waited for
        raise ValueError("is no file, or a link to nothing")
    with Image.open(file) as opened:
        image = _coloured(opened)
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
        )
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(size, size, 3).permute(2, 0, 1)


def _coloured(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, the right way up.

    Raises:
        ValueError: its pixels cannot be read so.
    """
    from PIL import Image, ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph's second frame is its preview
        raise ValueError(f"has {frames} frames, of which only one could be used")
    image.load()
    turned, mode = ImageOps.exif_transpose(image), image.mode
    if mode.startswith("I"):
        turned = Image.fromarray(_eight_bits(image, np.asarray(turned)))
    elif mode == "F":
        raise ValueError("has floating-point pixels (mode F), whose range it does not say")
    elif mode == "P" and "transparency" in image.info:
        turned = turned.convert("RGBA")  # else Pillow warns that it is ignored
    return turned.convert("RGB")


def _eight_bits(image: Image.Image, pixels: np.ndarray) -> np.ndarray:
    """Pixels of 16 bits, rounded to 8; Pillow's own conversion would clip them at 255.

    Raises:
        ValueError: the image has integers of another range.
    """
    # Pillow reads grey images of other depths in the same modes, and scales some of them.
    tags = getattr(image, "tag_v2", {})
    sixteen = {
        "PNG": True,
        "JPEG2000": True,
        "PPM": True,
        "TIFF": (tags.get(258), tags.get(262)) == ((16,), 1) and image.mode != "I",
    }
    if not sixteen.get(image.format or "", False):
        raise ValueError(
            f"has pixels of mode {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    return ((pixels.astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8)
