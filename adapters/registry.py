"""Adapters by name, imported only when asked for: a new one adds a line here.

An installed package offers one by an entry point of the group ``decay_pruning.adapters``: a class
derived from :class:`dpm_core.adapters.base.Adapter`, with ``Options`` and all that is abstract
there.
"""

from __future__ import annotations

import sys
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module, metadata
from inspect import isclass

from .base import Adapter, AdapterError

ADAPTERS = {
    "depgraph": "dpm_core.adapters.depgraph:DepGraph",
    "otov2": "dpm_core.adapters.otov2:OTOv2",
    "gate-decorator": "dpm_core.adapters.gate_decorator:GateDecorator",
    "torch-prune": "dpm_core.adapters.torch_prune:TorchPrune",
}
GROUP = "decay_pruning.adapters"
"""The group of entry points in which installed packages offer adapters, by framework."""


def load(name: str) -> type[Adapter]:
    """The adapter class of a framework, from here or from an installed package.

    Raises:
        AdapterError: there is no adapter of that name, more than one, or an installed package
            offers one that cannot be used.
        ImportError: the framework of one from here is missing; the message names the extra to
            install.
    """
    offered = _offered(tuple(sys.path))
    if name not in {*ADAPTERS, *(e.name for e in offered)}:  # installed only now, perhaps
        _offered.cache_clear()
        offered = _offered(tuple(sys.path))
    matching = [e for e in offered if e.name == name]
    makers = [f"{e.value} of {_package(e)}" for e in matching]
    if name in ADAPTERS:
        makers.insert(0, f"{ADAPTERS[name]} of this repository")
    if not makers:
        # Built-in names first, each name once.
        names = dict.fromkeys([*ADAPTERS, *(e.name for e in offered)])
        raise AdapterError(f"there is no adapter {name!r}; there are: {', '.join(names)}")
    if len(makers) > 1:
        raise AdapterError(
            f"the adapter {name!r} is offered more than once: {', '.join(makers)}. Records would "
            "not tell which of them ran: rename one, or uninstall its package"
        )
    if matching:
        return _installed(matching[0])
    module, attribute = ADAPTERS[name].split(":")
    built_in: type[Adapter] = getattr(import_module(module), attribute)
    return built_in


@cache
def _offered(_path: tuple[str, ...]) -> list[metadata.EntryPoint]:
    """Entry points of all packages on the path. Reading them takes some hundredths of a second."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name, _package(e)))


def _installed(entry: metadata.EntryPoint) -> type[Adapter]:
    where = f"the adapter {entry.name!r} ({entry.value}) of the installed package {_package(entry)}"
    try:
        adapter = entry.load()
    except (Exception, SystemExit) as cause:
        raise AdapterError(
            f"{where} cannot be loaded ({type(cause).__name__}: {cause}); repair or uninstall the "
            "package"
        ) from cause
    if not (isclass(adapter) and issubclass(adapter, Adapter)):
        raise AdapterError(f"{where} is no class derived from dpm_core.adapters.base.Adapter")
    abstract = {*getattr(adapter, "__abstractmethods__", ())}
    missing = sorted(abstract | ({"Options"} - {*dir(adapter)}))
    if missing:
        raise AdapterError(f"{where} does not define {', '.join(missing)}; see adapters/base.py")
    if not (isclass(adapter.Options) and is_dataclass(adapter.Options)):
        raise AdapterError(f"{where} has Options that are no dataclass; see adapters/base.py")
    for name in ("complete", "due", "settled"):  # methods would be true always
        if callable(getattr(adapter, name)):
            raise AdapterError(f"{where} has {name}() where a property belongs: add @property")
    return adapter


def _package(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package"
