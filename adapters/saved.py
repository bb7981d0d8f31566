"""A pruned model on disk: one file of tensors with a description of what was removed.

The file is a safetensors file, whose metadata holds the removal, facts of the caller's and a
checksum; nothing in it is code. It is reloaded onto a freshly built dense model, by the
same removal for every framework::

    save_pruned(path, model, removal)
    load_pruned(path, build_the_dense_model(), example)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from dpm_core import DecayPruningError
from dpm_core.errors import first_line, kind_and_line
from dpm_core.third_party import running

from .optimizer_state import Attributes
from .removal import Removal, require_model

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "decay-pruning model"
VERSION = 1
TEMPORARY = re.compile(
    r"\.(?P<name>.+\.(images|json|jsonl|pt|pt2|onnx|safetensors|png|html|md))\.[a-z0-9_]{8}\.tmp"
)
"""The names that :func:`write` gives to incomplete files; others leave such files alone."""


_NOT_ALL = (
    "If they are the same, the file was saved with the dense model, or with another removal than "
    "led to the small one, such as that of the second of two runs: save the small model with the "
    "sum of all removals"
)


class SavedModelError(DecayPruningError, ValueError):
    """A pruned model cannot be saved or reloaded. The message says why, and what to do."""


class DamagedError(SavedModelError):
    """The file is not what was written."""


class VersionError(SavedModelError):
    """The file is of a later release."""


class MismatchError(SavedModelError):
    """The file is sound, but not of this model."""


@dataclass(frozen=True)
class Saved:
    """The content of a file.

    Attributes:
        removal: what was removed from the dense model.
        facts: the caller's own.
        tensors: parameters and buffers by name, in the names' order, on the host.
    """

    removal: Removal
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def load_into(self, model: nn.Module, example: Tensor) -> nn.Module:
        """Make a dense model the saved one, in place; see :func:`load_pruned`."""
        require_model(model)
        with running.uncompiled(model) as plain:
            self._load_into(plain, example)
        return model

    def _load_into(self, model: nn.Module, example: Tensor) -> None:
        from dpm_core.third_party import dependency  # only now: it loads torch-pruning

        self._check_names(model.state_dict())
        trial = running.copied(model)
        try:
            self.removal.apply(trial, example, cut=True)
        except Exception as cause:  # whatever upstream fails on in a model of another kind
            raise MismatchError(
                "what was removed from the saved model cannot be removed from this one "
                f"({first_line(cause)}); build the dense model with the same settings, and give "
                f"an example it can take. {_NOT_ALL}"
            ) from cause
        small = trial.state_dict()
        for name, tensor in self.tensors.items():
            if small[name].shape != tensor.shape:
                raise MismatchError(
                    f"{name!r} has shape {tuple(tensor.shape)} in the file and, after the same "
                    f"removal, {tuple(small[name].shape)} in this model; build the dense model "
                    f"with the same settings. {_NOT_ALL}"
                )
        trial.load_state_dict(self.tensors)
        for name, tensor in trial.state_dict().items():
            if not torch.equal(_bytes(tensor), _bytes(self.tensors[name])):
                raise MismatchError(
                    f"this model does not take {name!r} as it is in the file: it shares the "
                    "tensor with another layer, and the saved model did not, or changes it on "
                    "loading; build the dense model with the same settings"
                )
        attributes = Attributes(dict(model.named_parameters()))
        plan, stays = list(self.removal), {}
        if attributes.divided:
            stays = dependency.survivors(model, example, plan)
        dependency.take_out(model, example, plan)  # as was tried on the copy
        attributes.finish(dict(model.named_parameters(remove_duplicate=False)), stays)
        model.load_state_dict(self.tensors)

    def _check_names(self, dense: Mapping[str, Any]) -> None:
        missing, extra = sorted(dense.keys() - self.tensors), sorted(self.tensors.keys() - dense)
        if missing or extra:
            raise MismatchError(
                f"the file is of another model: it lacks {missing[:3]} and has {extra[:3]} "
                f"({len(missing)} and {len(extra)} in all); build the model that was saved"
            )
        for name, tensor in self.tensors.items():
            if dense[name].dtype != tensor.dtype:
                raise MismatchError(
                    f"{name!r} is {tensor.dtype} in the file and {dense[name].dtype} in this "
                    "model; bring the dense model, and the example, to the file's type first, as "
                    "with model.half()"
                )


def save_pruned(
    path: Path | str,
    model: nn.Module,
    removal: Removal | Iterable[tuple[str, Iterable[int]]] | None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model: parameters, persistent buffers, and what was removed.

    The file appears whole or not at all; until then an older file of that name is kept. A tensor
    with several names is written once. Device and memory layout are not kept. Equal models give
    equal bytes.

    Args:
        path: of the file; missing folders are made.
        model: physically small.
        removal: all that was removed from the dense model; after several runs, or after a removal
            of one's own, their sum: ``earlier.removed + later.removed``.
        facts: what else a reader should know, such as how the dense model is built: anything that
            JSON holds.

    Raises:
        SavedModelError: the model has something that is no tensor, or none that a file can hold,
            or the facts are not JSON's; there is no removal, or it is known that it is not all
            that has gone, or not from this model; nothing was written.
        OSError: the file cannot be written; nothing was.
    """
    if removal is None:
        raise SavedModelError(
            "there is no removal to save: a run's `removed` is None before its first removal"
        )
    if not isinstance(removal, Removal):
        removal = Removal(removal)
    if removal.lacks:
        raise SavedModelError(f"the removal is not all that has gone: {removal.lacks}")
    with running.uncompiled(model) as plain:
        layers, state = dict(plain.named_modules()), plain.state_dict()
        shapes = {name: p.shape for name, p in plain.named_parameters(remove_duplicate=False)}
    for name, shape in removal.leaves.items():
        if shapes.get(name, shape) != shape:
            raise SavedModelError(
                f"{name!r} has shape {tuple(shapes[name])} in the model given, and the removal has "
                f"left {tuple(shape)}; give the model as the removal has left it, or, after later "
                "removals, the sum of all"
            )
    for name, _ in removal:
        if name not in layers:
            raise SavedModelError(f"the removal names {name!r}, which is no layer of the model")
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise SavedModelError(
                f"{name!r} is no tensor with values of its own that a file can hold; only such "
                "parameters and buffers can be saved"
            )
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and first.setdefault(place, name) != name:
            same[name] = first[place]
            continue
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        described = {"plan": list(removal), "facts": dict(facts or {}), "same": same}
        read = json.loads(json.dumps(described, allow_nan=False))  # keys are text, to be sorted
        description = json.dumps(read, sort_keys=True)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "description": description,
            "sha256": checksum(description, tensors),
        }
        content = _ordered(safetensors.torch.save(tensors, metadata))
    except (KeyError, TypeError, ValueError, RuntimeError) as cause:
        raise SavedModelError(
            f"the model cannot be saved ({kind_and_line(cause)}); its "
            "tensors have to be of a type that safetensors knows, and the facts JSON's own values"
        ) from cause
    write(path, lambda file: file.write(content))


def read(path: Path | str) -> Saved:
    """The content of a file, checked to be what was written.

    Raises:
        DamagedError: it is cut off, altered, or no such file at all.
        VersionError: it is of a later release.
        OSError: it is not there, or cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        version = int(metadata["version"])
        if version <= VERSION:
            tensors = safetensors.torch.load(content)
            if version < 1 or metadata["sha256"] != checksum(metadata["description"], tensors):
                raise ValueError("its checksum does not fit its content")
            described = json.loads(metadata["description"])
            for name, other in described["same"].items():
                tensors[name] = tensors[other]
            tensors = {running.plain_name(n): t for n, t in tensors.items()}  # of earlier releases
            removal = Removal(described["plan"])
            return Saved(removal, described["facts"], dict(sorted(tensors.items())))
    except Exception as cause:  # damage shows in many ways
        raise DamagedError(
            f"{path} is damaged, or no pruned model ({kind_and_line(cause)}); "
            "save the model anew, or take another copy of the file"
        ) from cause
    raise VersionError(
        f"{path} has version {version}, and this release reads up to {VERSION}; take a later "
        "release, or save the model with this one"
    )


def load_pruned(path: Path | str, model: nn.Module, example: Tensor) -> nn.Module:
    """Make a freshly built dense model the saved one, in place.

    Whatever is refused leaves the model as it was: all is tried on a copy first. The model stays on
    its device and in its mode; parameters become new objects, with the attributes and gradient
    hooks of the old ones, so make the optimizer afterwards.

    Args:
        path: what :func:`save_pruned` wrote.
        model: built as the dense model of the saved one was; its values do not matter.
        example: an input batch of any size, on the model's device and of its type.

    Returns:
        The model.

    Raises:
        DamagedError, VersionError: see :func:`read`.
        MismatchError: names, types or shapes are not those of the saved model.
        AdapterError: the model is no module.
        OSError: the file is not there, or cannot be read.
    """
    return read(path).load_into(model, example)


def write(path: Path | str, fill: Callable[[BinaryIO], object]) -> None:
    """Write through a temporary file beside the target, flushed to disk before it takes its name.

    Args:
        path: the target; missing folders are made.
        fill: writes the content to an open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        claim(handle)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # somebody who cleans up was faster
    try:
        # Temporary files are private; this one takes the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as cause:
        Path(temporary).unlink(missing_ok=True)
        # PyTorch's writer hides an error of the file system behind one of its own.
        hidden = cause.__context__ if isinstance(cause, RuntimeError) else cause
        if isinstance(hidden, OSError) and hidden.errno:
            raise OSError(hidden.errno, hidden.strerror, str(path)) from cause
        raise


def claim(handle: int, sure: bool = False) -> bool:
    """Lock an open file for this process, until it is closed.

    Args:
        handle: of the open file.
        sure: return False where this platform or file system has no such locks, instead of True.

    Returns:
        Whether no other process has the lock.
    """
    if fcntl is None:
        return not sure
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        return not sure and cause.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a description and of every tensor's name, type, shape and bytes, in hex digits."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, description]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _ordered(content: bytes) -> bytes:
    """A safetensors file with sorted metadata, which the library writes in random order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order, on the host; compared by these, NaNs are equal, too."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
