"""The pins of upstreams.toml, and a clear error where a package is missing or another version."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

PINS: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "upstreams.toml").read_text(encoding="utf-8")
)


class UpstreamError(ImportError):
    """An upstream package is missing, or not of the version that this project is built against."""


def require(package: str) -> str:
    """Make sure that an upstream package is installed in the pinned version.

    Args:
        package: its name on the package index, a table of upstreams.toml.

    Returns:
        The version.

    Raises:
        UpstreamError: naming the extra to install.
    """
    pin = PINS[package]
    remedy = f'pip install "decay-pruning[{pin["extra"]}]"'
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UpstreamError(f"{package} is not installed; run: {remedy}") from None
    if installed != pin["version"]:
        raise UpstreamError(
            f"{package} {installed} is installed, but this project is written for "
            f"{pin['version']}; run: {remedy}"
        )
    return installed
