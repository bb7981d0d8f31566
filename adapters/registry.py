"""Adapters by name, imported only when asked for: a new one adds a line here."""

from __future__ import annotations

from importlib import import_module

from .base import Adapter, AdapterError

ADAPTERS = {
    "depgraph": "adapters.depgraph:DepGraph",
    "otov2": "adapters.otov2:OTOv2",
    "gate-decorator": "adapters.gate_decorator:GateDecorator",
}


def load(name: str) -> type[Adapter]:
    """The adapter class of a framework.

    Raises:
        AdapterError: there is no adapter of that name.
        ImportError: its framework is missing; the message names the extra to install.
    """
    if name not in ADAPTERS:
        raise AdapterError(f"there is no adapter {name!r}; there are: {', '.join(ADAPTERS)}")
    module, attribute = ADAPTERS[name].split(":")
    found: type[Adapter] = getattr(import_module(module), attribute)
    return found
