"""Atomic writing and checked reading: a file that is not exactly what was written is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dpm_core import DecayPruningError
from dpm_core.adapters.saved import write

__all__ = [
    "FileError",
    "load_tensors",
    "save_json",
    "save_tensors",
    "save_text",
    "vouched",
    "vouches",
    "write",
]

MARK = b"decay-pruning-1\n"
"""Ends a file of tensors, after a SHA-256 of all before it."""
_SHA, _LENGTH = hashlib.sha256().digest_size, 4
_CHUNK = 1 << 20


class FileError(DecayPruningError, ValueError):
    """A file is not what was written under its name. The message says why, without the name."""


def save_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write(path, lambda file: file.write(text.encode()))


def save_json(path: Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    save_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------------- tensors


def save_tensors(path: Path, content: Any, of: Mapping[str, Any]) -> None:
    """Write tensors and plain values, atomically, for :func:`load_tensors`.

    PyTorch's own reader checks no checksum, and ignores whatever follows its own format. So behind
    it come ``of`` as JSON, the length of that, a SHA-256 of all bytes so far, and :data:`MARK`.

    Args:
        path: of the file.
        content: tensors and plain values, nested.
        of: what the file is of, such as which run, in JSON's values; a reader has to give the same.
    """

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        torch.save(content, hashed)  # type: ignore[arg-type]  # it only writes
        label = _plain(of)
        hashed.write(label)
        hashed.write(len(label).to_bytes(_LENGTH, "big"))
        file.write(hashed.sha.digest() + MARK)

    write(path, fill)


def load_tensors(path: Path, of: Mapping[str, Any], device: torch.device | None = None) -> Any:
    """What :func:`save_tensors` wrote, after a check of every byte and of what the file is of.

    Args:
        path: of the file.
        of: what the file has to be of.
        device: where tensors go; by default where they were.

    Raises:
        FileError: the file cannot be read, is damaged, of something else or of an earlier release,
            or has something in it that is no tensor or plain value.
    """
    try:
        with path.open("rb") as file:
            label = _checked(file)
            if label != _plain(of):
                raise FileError(f"it is of {label.decode()}, not of {_plain(of).decode()}")
            file.seek(0)
            return torch.load(file, weights_only=True, map_location=device)
    except OSError as cause:
        raise FileError(cause.strerror or str(cause)) from cause
    except FileError:
        raise
    except pickle.UnpicklingError as cause:
        # PyTorch's own message advises to load it all the same, which would run its code.
        raise FileError(
            "it holds more than tensors and plain values, which could be code, and was not loaded"
        ) from cause
    except Exception as cause:
        raise FileError(f"PyTorch cannot load it: {type(cause).__name__}") from cause


def _checked(file: BinaryIO) -> bytes:
    """What a file is of, as JSON, after a check of all its bytes."""
    end = file.seek(0, 2) - len(MARK) - _SHA
    damaged = FileError("it is damaged, or was written by an earlier release")
    if end < _LENGTH:
        raise damaged
    file.seek(end)
    if file.read(_SHA + len(MARK)) != _hash(file, end) + MARK:
        raise damaged
    file.seek(end - _LENGTH)
    length = int.from_bytes(file.read(_LENGTH), "big")
    file.seek(end - _LENGTH - length)
    return file.read(length)


def _hash(file: BinaryIO, length: int) -> bytes:
    sha, left = hashlib.sha256(), length
    file.seek(0)
    while left > 0:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            break
        sha.update(chunk)
        left -= len(chunk)
    return sha.digest()


class _Hashed:
    """Passes on what is written to a file, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write some bytes."""
        self.sha.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Nothing is buffered here, but PyTorch asks for it."""


# ---------------------------------------------------------------------- JSON


def vouched(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its content, whatever its layout, under ``sha256``."""
    return {**content, "sha256": hashlib.sha256(_plain(content)).hexdigest()}


def vouches(content: Mapping[str, Any]) -> bool:
    """Whether ``sha256`` is that of the rest of a JSON object."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return bool(vouched(rest) == content)


def _plain(content: Mapping[str, Any]) -> bytes:
    """JSON in one fixed layout, the same before writing and after reading."""
    read = json.loads(json.dumps(content, allow_nan=False))  # keys are text, tuples are lists
    return json.dumps(read, sort_keys=True, separators=(",", ":")).encode()
