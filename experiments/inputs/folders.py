"""Image folders: which files they have, and how these are decoded, each once.

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
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ..files import FileError
from ..places import BusyError, alone_in, check
from . import stored
from .images import Augmentation, DataError, Images

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 3
"""How many of the wrong files an error names."""
UNWANTED = {"desktop.ini", "Thumbs.db"}
"""What file managers leave in folders, beside files with a dot in front."""
SPARE = 8 / 7
"""Crops of random size are cut from images so many times larger: 256 pixels for 224."""


def load(
    path: Path,
    root: Path,
    size: int,
    augmentation: Augmentation,
    before: Callable[[int, int], None] = lambda _classes, _training: None,
) -> Images:
    """The images of a folder with ``train`` and ``test`` (or ``val``) inside, mapped into memory.

    They are decoded once, into a file. Test images are the largest centred square, brought to
    ``size``; so are training images, but for crops of random size: then both are brought to
    :data:`SPARE` times that, and of test images the middle is taken.

    Args:
        path: of the folder.
        root: where decoded folders are kept.
        size: height and width in pixels.
        augmentation: as :class:`~.images.Images` has it.
        before: is called right before images are decoded, which may take hours, with the numbers of
            classes and of training images. What it raises passes through, and nothing is decoded.

    Raises:
        DataError: the folder is not as it should be, or its decoded file is damaged.
        OSError: the decoded file cannot be written; before any work, if that can be known then.
    """
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
    side = size if augmentation == "shift" else round(SPARE * size)
    training = sum(map(len, parts["train"].values()))
    images = _cached(path, root, parts, size, side, lambda: before(len(names[0]), training))
    loaded = Images(
        f"{path.resolve().name} (folder)",
        **images.tensors,
        classes=len(names[0]),
        pad=4,
        flip=True,
        augmentation=augmentation,
        mapped=True,
    )
    # Known from the check of the file, and of images of this size another pass takes long.
    object.__setattr__(loaded, "_cached_digest", images.digest)
    object.__setattr__(loaded, "_cached_training_digest", images.training_digest)
    return loaded


def _cached(
    path: Path,
    root: Path,
    parts: Mapping[str, Classes],
    size: int,
    side: int,
    before: Callable[[], None],
) -> stored.Stored:
    """A folder's decoded images; they are decoded now, if they were not before."""
    stamp = _stamp(path, parts, size, side)
    cache = root / "decoded" / f"{path.resolve().name}-{stamp[:16]}.images"
    of = {"kind": "decoded images", "stamp": stamp}
    while not cache.exists():
        with suppress(BusyError), alone_in(cache.parent):
            if not cache.exists():  # another process may have written it just now
                before()
                _decode_all(path, cache, parts, size, side, of)
            break
        tqdm.write(f"waiting for another process that decodes in {cache.parent}", sys.stderr)
        time.sleep(WAIT)
    try:
        return stored.load(cache, of)
    except FileError as cause:
        raise DataError(
            f"{cache} cannot be read ({cause}); delete it, and the images are decoded anew"
        ) from cause


WAIT = 5.0
"""Seconds between looks at a folder in which another process decodes."""


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


def _stamp(path: Path, parts: Mapping[str, Classes], size: int, side: int) -> str:
    """A hash of a folder's files as they are on disk, and of the sizes they are decoded to.

    It includes the time of each inode's last change, which no program can set. So it changes even
    if files are replaced by others of equal size and an older date.
    """
    stamp = hashlib.sha256(os.fsencode(path.resolve()) + f" {size} {side}\n".encode())
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


def _decode_all(
    path: Path,
    cache: Path,
    parts: Mapping[str, Classes],
    size: int,
    side: int,
    of: Mapping[str, str],
) -> None:
    """Decode all images of a folder into a file; at no time more than one is in memory.

    Raises:
        DataError: counting and naming files that are no images, after all were tried; or the folder
            changed meanwhile. There is no file then.
    """
    listed = {
        split: [(file, label) for label, files in enumerate(part.values()) for file in files]
        for split, part in parts.items()
    }
    labels = {split: [label for _, label in files] for split, files in listed.items()}
    counts, sides = {s: len(files) for s, files in listed.items()}, {"train": side, "test": size}
    check(cache.parent, [cache.name], stored.size(counts, sides))
    wrong: list[str] = []
    bar = tqdm(total=sum(counts.values()), desc="decoding images", unit="image", disable=None)

    def decoded(split: str) -> Iterator[np.ndarray]:
        for file, _ in listed[split]:
            try:
                image = _decode(file, side)
            except Exception as cause:  # Pillow's readers raise many kinds
                reason = " ".join(str(cause).split()) or type(cause).__name__
                wrong.append(f"{file.relative_to(path)}: {reason}")
            else:
                if not wrong:
                    start = (side - sides[split]) // 2
                    end = start + sides[split]
                    yield image[:, start:end, start:end]
            bar.update()
        if split == "test" and wrong:
            raise DataError(
                f"{path}: {len(wrong)} of {bar.total} files are not images that can be used "
                f"({_some(wrong, '; ')}); convert them, or remove them"
            )
        if split == "test" and _stamp(path, parts, size, side) != of["stamp"]:
            raise DataError(f"{path} changed while it was read; run again when all is there")

    with bar:
        stored.save(cache, {split: decoded(split) for split in listed}, labels, sides, of)


def _some(names: list[str], between: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *more])


def _decode(file: Path, size: int) -> np.ndarray:
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
    return np.asarray(image).transpose(2, 0, 1)


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
