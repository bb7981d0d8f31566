"""Tables whose keys are the fields of a dataclass, which has the types, limits and defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from dpm_core import DecayPruningError

from ..refusals import described, of_key


def settings_of(kind: type) -> dict[str, Any]:
    """A dataclass's settings with their defaults; ``MISSING`` for one that has none."""
    defaults = {}
    for field in fields(kind):
        if field.init:
            made = field.default_factory
            defaults[field.name] = field.default if made is MISSING else made()
    return defaults


_Kind = TypeVar("_Kind")


def built(kind: type[_Kind], given: Mapping[str, Any], at: str, **built_before: Any) -> _Kind:
    """A dataclass of settings from a table, by the types, limits and defaults that it has itself.

    Args:
        kind: the dataclass.
        given: what the table says.
        at: the table's name.
        built_before: settings that are no plain values.

    Raises:
        ValueError: naming the key.
    """
    known = settings_of(kind)
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{at}.{unknown[0]} is unknown; there are: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    lines = [
        f"{at}.{key}: Field required"
        for key, default in known.items()
        if default is MISSING and key not in {*given, *built_before}
    ]
    for key, value in given.items():
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(kind)[key])
            values[key] = adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as cause:
            lines += described(cause, f"{at}.{key}")
        except (PydanticUserError, NameError) as cause:
            reason = str(cause).splitlines()[0]
            raise ValueError(
                f"{at}: {kind.__name__} has a type that none can be of ({reason})"
            ) from cause
    if lines:
        raise ValueError("; ".join(lines))
    try:
        return kind(**values, **built_before)
    except (DecayPruningError, ValueError) as cause:
        raise ValueError(of_key(at, str(cause))) from cause
