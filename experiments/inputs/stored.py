"""Images on disk that are read where they are asked for: a file that is written image by image.

Its bytes are those of the tensors, one after the other: training images, their labels, test
images, their labels. Behind them come, as JSON, what the file is of, the shapes and a hash of the
tensors; then the length of that text, its SHA-256, and :data:`MARK`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import FileError, write

MARK = b"decay-pruning-images-1\n"
NAMES = ("train", "train_labels", "test", "test_labels")
_SHA, _LENGTH = hashlib.sha256().digest_size, 4
CHUNK = 1 << 20
"""Bytes that are read at a time; sums of them take some times that."""


@dataclass(frozen=True)
class Stored:
    """Images that are mapped into memory: a page is read when it is looked at, and given back.

    Attributes:
        tensors: by :data:`NAMES`: uint8 (N, C, H, W), read only, and int64 (N,).
        digest, training_digest: hashes of all tensors, and of the first two; 16 hex digits.
    """

    tensors: dict[str, Tensor]
    digest: str
    training_digest: str


def hasher() -> Any:
    """Of images and labels; :attr:`Stored.digest` and :meth:`.images.Images.digest`."""
    return hashlib.blake2b(digest_size=8)


def save(
    path: Path,
    images: Mapping[str, Iterator[np.ndarray]],
    labels: Mapping[str, Sequence[int]],
    sides: Mapping[str, int],
    of: Mapping[str, Any],
) -> None:
    """Write images, atomically, as they come: none is kept in memory.

    Args:
        path: of the file.
        images: of ``train`` and ``test``, one after the other, uint8 (3, side, side). What they
            raise passes through, and nothing is written.
        labels: of ``train`` and ``test``.
        sides: height and width in pixels, of ``train`` and ``test``.
        of: what the file is of, in JSON's values; a reader has to give the same.
    """

    def fill(file: BinaryIO) -> None:
        hashed = hasher()

        def put(array: np.ndarray) -> None:
            content = np.ascontiguousarray(array).data
            hashed.update(content)
            file.write(content)

        shapes = {}
        for split in ("train", "test"):
            count, side = len(labels[split]), sides[split]
            for image in images[split]:
                put(image)
            put(np.array(labels[split], dtype="<i8"))
            shapes[split] = [count, 3, side, side]
        said = {"of": dict(of), "shapes": shapes, "digest": hashed.hexdigest()}
        text = json.dumps(said, sort_keys=True).encode()
        file.write(text + len(text).to_bytes(_LENGTH, "big"))
        file.write(hashlib.sha256(text).digest() + MARK)

    write(path, fill)


def size(counts: Mapping[str, int], sides: Mapping[str, int]) -> int:
    """About how many bytes a file takes, by the numbers and sides of ``train`` and ``test``."""
    return sum(n * (3 * sides[split] ** 2 + 8) for split, n in counts.items()) + 4096


def load(path: Path, of: Mapping[str, Any]) -> Stored:
    """What :func:`save` wrote, after a check of every byte and of what the file is of.

    Args:
        path: of the file.
        of: what the file has to be of.

    Raises:
        FileError: the file cannot be read, is damaged, or of something else.
    """
    try:
        with path.open("rb") as file:
            said, end = _said(file)
            if said["of"] != json.loads(json.dumps(dict(of))):
                raise FileError(f"it is of {said['of']}, not of {dict(of)}")
            shapes = {split: tuple(map(int, said["shapes"][split])) for split in ("train", "test")}
            parts = _parts(shapes)
            if sum(length for _, length in parts.values()) != end:
                raise FileError("it is damaged")
            digests = _digests(file, [length for _, length in parts.values()])
            if digests[-1] != said["digest"]:
                raise FileError("it is damaged")
            labels = {split: _labels(file, *parts[f"{split}_labels"]) for split in shapes}
    except OSError as cause:
        raise FileError(cause.strerror or str(cause)) from cause
    except (KeyError, TypeError, ValueError) as cause:
        if isinstance(cause, FileError):
            raise
        raise FileError("it is damaged") from cause
    tensors = {}
    for split, shape in shapes.items():
        tensors[split] = mapped(path, parts[split][0], shape)
        tensors[f"{split}_labels"] = labels[split]
    return Stored(tensors, digests[-1], digests[1])


def mapped(path: Path, start: int, shape: tuple[int, ...]) -> Tensor:
    """A stretch of a file as a uint8 tensor that must not be written to.

    The mapping is read-only and shared: the system can drop its pages, and it counts for no limit
    of a process's own memory.
    """
    array = np.memmap(path, np.uint8, mode="r", offset=start, shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the tensor could be written to
        return torch.from_numpy(array)


def _said(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """What a file says of itself, and where its tensors end."""
    end = file.seek(0, 2) - len(MARK) - _SHA - _LENGTH
    damaged = FileError("it is damaged, or was written by an earlier release")
    if end < 0:
        raise damaged
    file.seek(end)
    length = int.from_bytes(file.read(_LENGTH), "big")
    sha, mark = file.read(_SHA), file.read()
    if mark != MARK or length > end:
        raise damaged
    file.seek(end - length)
    text = file.read(length)
    if hashlib.sha256(text).digest() != sha:
        raise damaged
    return json.loads(text), end - length


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Where each tensor starts, and how many bytes it has, in order."""
    parts, start = {}, 0
    for split in ("train", "test"):
        for name, length in (
            (split, math.prod(shapes[split])),
            (f"{split}_labels", 8 * shapes[split][0]),
        ):
            parts[name] = (start, length)
            start += length
    return parts


def _digests(file: BinaryIO, lengths: Sequence[int]) -> list[str]:
    """The hash of all up to the end of each stretch."""
    hashed, digests = hasher(), []
    file.seek(0)
    for length in lengths:
        left = length
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                break
            hashed.update(chunk)
            left -= len(chunk)
        digests.append(hashed.copy().hexdigest())
    return digests


def _labels(file: BinaryIO, start: int, length: int) -> Tensor:
    file.seek(start)
    return torch.from_numpy(np.frombuffer(file.read(length), dtype="<i8").astype(np.int64))
