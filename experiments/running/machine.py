"""What a run is carried out with: processor, versions and revision."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import dpm_core
from dpm_core.third_party.upstreams import PINS, require

from ..config import Config
from ..inputs import networks


def revision() -> str | None:
    """The checkout's git revision, marked where files differ from it; ``None`` outside of git."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-changed" if changed else head


def versions(config: Config) -> dict[str, str]:
    """Of all that a run's figures depend on."""
    upstream = {name: require(name) for name in PINS if config.framework in PINS[name]["adapters"]}
    return {
        "decay-pruning": dpm_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **upstream,
        **networks.version(config.network),
    }


def device_name(device: torch.device) -> str:
    """The processor that runs, or would run, on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{named[0]}, {len(named)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
