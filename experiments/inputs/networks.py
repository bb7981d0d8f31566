"""Any network by its name: built in, torchvision's, timm's, or from a function of one's own.

A name is one of :data:`.models.MODELS`, or says what is imported and what is called:

- ``torchvision.models:resnet18``, ``package.module:function``: a function, or a class, of a module
  that Python can import
- ``path/to/file.py:function``: of a file; its path starts at the current folder
- ``timm:vit_tiny_patch16_224``: a network of timm's

What is called gets ``num_classes`` if its signature takes that, by name or as ``**kwargs``; the
number of colour channels as ``in_channels`` or ``in_chans`` if it takes one of them by name; and
``[model_options]``, which come before both. timm gets ``num_classes`` and ``in_chans``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import random
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dpm_core import DecayPruningError
from dpm_core.errors import first_line, kind_and_line
from dpm_core.third_party import running

from ..names import shown
from . import models

FORMS = "MODULE:FUNCTION, FILE.py:FUNCTION or timm:NAME"
ANY = "*"
"""Among what is allowed: any code may be imported."""
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_TIMM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class NetworkError(DecayPruningError, ValueError):
    """A network cannot be built by its name. The message names it, and says what to do."""


@dataclass(frozen=True)
class Network:
    """How a network is built: all that a configuration, and a model's file, say of it.

    Attributes:
        name: as the module's docstring has it.
        options: keyword arguments, besides those for classes and channels.
        sha256: of the file that the name names; ``None`` for other names, and for a file as it is.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def code(self) -> str | None:
        """The module or file that has to be imported; ``None`` for a built-in network."""
        return None if self.name in models.MODELS else self.name.rpartition(":")[0]

    @property
    def file(self) -> Path | None:
        """The file that the name names, if it names one."""
        if not (self.code and self.code.endswith(".py")):
            return None
        try:
            return Path(self.code).expanduser()
        except RuntimeError as cause:  # ~somebody who is not known
            raise NetworkError(f"model: {self.code}: {cause}; give the whole path") from cause

    def check(self) -> None:
        """Refuse what can be no network, without importing anything.

        Raises:
            NetworkError: the name has no known form, a built-in network is given options, or
                ``sha256`` is given for what is no file.
        """
        code, function = self.code, self.name.rpartition(":")[2]
        if code is None:
            if self.options:
                raise NetworkError(
                    f"model_options: {self.name} is built in and takes none; they are for "
                    f"{FORMS} as model"
                )
        elif code == "timm":
            if not _TIMM.fullmatch(function):
                raise NetworkError(f"model: {shown(function)!r} is no name of timm's")
        elif not (code.endswith(".py") or _MODULE.fullmatch(code)) or not function.isidentifier():
            raise NetworkError(
                f"unknown model {shown(self.name)!r}; there are: {', '.join(models.MODELS)}, or "
                f"give {FORMS}"
            )
        for key in self.options:
            if not key.isidentifier():
                raise NetworkError(f"model_options: {shown(key)!r} can be no keyword argument")
        if self.sha256 is not None and self.file is None:
            raise NetworkError("model_sha256 is of the file that model names, and it names none")

    def facts(self) -> dict[str, Any]:
        """What a model's file says of its network: :attr:`name`, and the rest if there is any."""
        said = {"model_options": dict(self.options), "model_sha256": self.sha256}
        return {"model": self.name, **{key: value for key, value in said.items() if value}}

    def require_hash(self) -> None:
        """Refuse a file that nothing says the content of.

        Raises:
            NetworkError: with the remedy.
        """
        if self.file is not None and self.sha256 is None:
            raise NetworkError(
                f"model_sha256 is missing, the SHA-256 of {self.file}; experiments.config.load "
                "fills it in"
            )

    def require_allowed(self, allowed: Collection[str]) -> None:
        """Refuse code that nobody has allowed to be imported.

        Args:
            allowed: modules and files, as they stand before the colon; :data:`ANY` for all.

        Raises:
            NetworkError: saying what would be imported, and how to allow it.
        """
        code = self.code
        if code is not None and code not in allowed and ANY not in allowed:
            raise NetworkError(
                f"its network is {shown(self.name)!r}, and building it would run the code of "
                f"{shown(code)!r}; if you trust that, give allow=[{shown(code)!r}], or --allow "
                f"{shown(code)} on the command line"
            )

    def find(self) -> Callable[..., Any]:
        """What builds the network: imported, but not called yet.

        Returns:
            A function of the channels, the number of classes and :attr:`options`, by keywords that
            :meth:`_arguments` chooses; for a built-in network one of :data:`models.MODELS`.

        Raises:
            NetworkError: the module or file cannot be imported, or is another one than
                :attr:`sha256` says; or it has no such function; or that does not take the options.
        """
        self.check()
        code, name = self.code, self.name.rpartition(":")[2]
        if code is None:
            return models.MODELS[self.name]
        if code == "timm":
            timm = self._imported(lambda: importlib.import_module("timm"))
            if not timm.is_model(name):
                near = difflib.get_close_matches(name, timm.list_models(), 3)
                raise NetworkError(f"timm has no network {name!r}{_like(near)}")
            create: Callable[..., Any] = timm.create_model
            return create
        module = self._imported(self._load_file if self.file else self._load_module)
        function = getattr(module, name, None)
        if not callable(function):
            callables = [n for n, value in vars(module).items() if callable(value)]
            what = "is no function" if hasattr(module, name) else "is not there"
            near = difflib.get_close_matches(name, callables, 3)
            raise NetworkError(f"model: {name!r} {what} in {code}{_like(near)}")
        self._arguments(function, 1, 2)
        building: Callable[..., Any] = function
        return building

    def build(self, in_channels: int, classes: int, seed: int | None = None) -> nn.Module:
        """A freshly initialised network, on the host.

        Built-in networks are initialised as :func:`.models.build` says, others as they
        do it themselves.

        Args:
            in_channels: of the images.
            classes: number of classes.
            seed: of the initial weights; global random states are left alone.

        Raises:
            NetworkError: as :meth:`find`; or the call failed, or gave no network.
        """
        function = self.find()
        if self.code is None:
            return models.build(self.name, in_channels, classes, seed)
        arguments = self._arguments(function, in_channels, classes)
        try:
            with _drawing(seed):
                model = function(**arguments)
        except Exception as cause:
            given = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if k != "model_name")
            raise NetworkError(
                f"model: {self.name} cannot be built with {shown(given)} ({_line(cause)}); correct "
                "model_options, or the function"
            ) from cause
        if not isinstance(model, nn.Module):
            raise NetworkError(
                f"model: {self.name} gives {_kind(model)}, where a torch.nn.Module is needed"
            )
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise NetworkError(
                    f"model: {self.name} gives a network whose {name!r} has no shape yet; give "
                    "lazy layers their sizes"
                )
        return model

    def _arguments(
        self, function: Callable[..., Any], in_channels: int, classes: int
    ) -> dict[str, Any]:
        """What a function is called with.

        Raises:
            NetworkError: its signature does not take that.
        """
        if self.code == "timm":
            name = self.name.rpartition(":")[2]
            sizes = {"num_classes": classes, "in_chans": in_channels}
            return {"model_name": name, **sizes, **self.options}
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of a function in C
            return {"num_classes": classes, **self.options}
        taken = {p.name for p in signature.parameters.values() if p.kind in _BY_NAME}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        given: dict[str, Any] = {}
        if "num_classes" in taken or open_ended:
            given["num_classes"] = classes
        if channels := [n for n in ("in_channels", "in_chans") if n in taken]:
            given[channels[0]] = in_channels
        given |= self.options
        try:
            signature.bind(**given)
        except TypeError as cause:
            raise NetworkError(
                f"model: {self.name} does not take what it is given: {cause}. Its signature is "
                f"{shown(str(signature))}; correct model_options"
            ) from cause
        return given

    def _imported(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except NetworkError:
            raise
        except (Exception, SystemExit) as cause:
            remedy = "correct the file" if self.file else "install it, or correct the name"
            raise NetworkError(
                f"model: {self.code} cannot be imported ({_line(cause)}); {remedy}"
            ) from cause

    def _load_module(self) -> types.ModuleType:
        assert self.code is not None
        return importlib.import_module(self.code)

    def _load_file(self) -> types.ModuleType:
        """The file's module, of exactly the content that the hash is of; once per content."""
        assert self.file is not None
        content, sha256 = _read(self.file)
        if self.sha256 not in (None, sha256):
            raise NetworkError(
                f"model: {self.file} is another file than this network was built from (SHA-256 "
                f"{sha256[:16]}..., not {str(self.sha256)[:16]}...); put the right one there"
            )
        name = f"network_file_{sha256}"
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__file__ = str(self.file.resolve())
            sys.modules[name] = module  # dataclasses look themselves up there
            try:
                exec(compile(content, module.__file__, "exec"), vars(module))  # noqa: S102
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def fingerprint(name: str) -> str | None:
    """The SHA-256 of the file that a network's name names; ``None`` if it names none.

    Raises:
        NetworkError: the file cannot be read, or the name has no known form.
    """
    network = Network(name)
    if network.file is None:
        return None
    network.check()
    return _read(network.file)[1]


def version(network: Network) -> dict[str, str]:
    """The installed package that a network's code is of, with its version; empty if of none."""
    if network.code is None or network.file is not None:
        return {}
    top = network.code.partition(".")[0]
    return {d: metadata.version(d) for d in metadata.packages_distributions().get(top, [])}


def require_logits(network: Network, model: nn.Module, example: Tensor, classes: int) -> None:
    """Try a network out, in evaluation and in training; it stays as it is.

    Args:
        network: for the message.
        model: on the device of the example.
        example: images, float32 (N, C, H, W).
        classes: number of classes.

    Raises:
        NetworkError: it cannot take such images, or does not give a tensor of logits,
            (N, classes), in one of both modes.
    """
    size = "x".join(map(str, example.shape[1:]))
    for training in (False, True)[: len(example)]:  # BatchNorm cannot train on a single image
        mode = " in training" if training else ""
        try:
            with torch.no_grad():
                given = running.probe(model, example, training=training)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as cause:  # whatever a network of somebody else's raises
            raise NetworkError(
                f"{network.name} cannot take images of {size}{mode} ({_line(cause)}); choose "
                "another model or larger images"
            ) from cause
        if not isinstance(given, Tensor):
            raise NetworkError(
                f"{network.name} gives {_kind(given)}{mode}, where a tensor of logits is needed; "
                "give a function that builds a network without other outputs, or model_options "
                "that leave them out, such as aux_logits = false"
            )
        if given.shape != (len(example), classes):
            raise NetworkError(
                f"{network.name} gives {tuple(given.shape)}{mode} for {len(example)} images of "
                f"{classes} classes, where ({len(example)}, {classes}) is needed; its function has "
                "to take num_classes, or model_options have to say how many there are"
            )


@contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside, whatever draws, and leave the global random states alone."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def _read(file: Path) -> tuple[bytes, str]:
    try:
        content = file.read_bytes()
    except OSError as cause:
        raise NetworkError(
            f"model: {file} cannot be read ({cause.strerror}); give the file's path from the "
            "current folder, or the whole path"
        ) from cause
    return content, hashlib.sha256(content).hexdigest()


def _line(cause: BaseException) -> str:
    return first_line(cause) if isinstance(cause, RuntimeError) else kind_and_line(cause)


def _like(near: list[str]) -> str:
    return f"; there are, for instance: {', '.join(near)}" if near else ""


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value}"
