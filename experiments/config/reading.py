"""Reading a configuration from its file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpm_core import ConfigurationError, DecayPruningError
from dpm_core.adapters.base import AdapterError

from ..inputs.networks import NetworkError, fingerprint
from ..names import faults
from ..refusals import described
from .whole import Config


class ConfigError(DecayPruningError, ValueError):
    """A configuration cannot be run. The message names the key and what it may be."""


def _plain(value: object) -> dict[str, str]:
    """TOML's dates and times, which no key takes, in a form that is refused under their key."""
    return {type(value).__name__: str(value)}


def load(path: Path, *, data: str | None = None, validation: int | None = None) -> Config:
    """Read and check a configuration.

    Args:
        path: a TOML file.
        data: takes the place of the configuration's ``data.name``, and of its label.
        validation: takes the place of the configuration's ``data.validation``.

    Raises:
        ConfigError: the file cannot be read, or a key, a type, a range or a target is wrong.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{path} is not TOML: it is not UTF-8 ({cause.reason})") from cause
    except ValueError as cause:  # of a number with thousands of digits, too
        raise ConfigError(f"{path} is not TOML: {cause}") from cause
    except RecursionError as cause:
        raise ConfigError(f"{path} is nested too deeply to be a configuration") from cause
    table = raw.get("data", {})
    if isinstance(table, dict):
        raw["data"] = table = dict(table)
        if data is not None and table.get("name") != data:
            table.pop("label", None)
            table["name"] = data
        if validation is not None:
            table["validation"] = validation
    if wrong := list(faults(raw)):  # not all of it can be written as JSON
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    _name_file(raw, path)
    try:
        # Strict JSON mode takes lists for tuples and whole numbers for floats, and nothing else.
        return Config.model_validate_json(json.dumps(raw, default=_plain), strict=True)
    except ValidationError as cause:
        raise ConfigError(f"{path}: " + "; ".join(described(cause))) from cause
    except (AdapterError, ConfigurationError, ImportError) as cause:
        raise ConfigError(f"{path}: {cause}") from cause


def _name_file(raw: dict[str, Any], path: Path) -> None:
    """Put the SHA-256 of a network's own file into a configuration, or check the one in it.

    Raises:
        ConfigError: the file cannot be read, or is another one.
    """
    try:
        sha256 = fingerprint(str(raw.get("model", "")))
    except NetworkError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    if sha256 is not None and raw.setdefault("model_sha256", sha256) != sha256:
        raise ConfigError(
            f"{path}: model_sha256: {raw['model'].rpartition(':')[0]} has another one, {sha256}; "
            "put the right file there, or leave model_sha256 out"
        )
