"""A run of a comparison, and its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .request import Request


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        config_path: the file that the request's configuration was read from.
        request: the run.
        data, validation: what overrides the configuration's, for the run's command line.
        device: what the command line says, where the machine of the run is to choose: ``auto``.
    """

    config_path: Path
    request: Request
    data: str | None = None
    validation: int | None = None
    device: str | None = None

    @property
    def dense(self) -> str | None:
        """Names the dense model that the run starts from, and may have to train."""
        config = self.request.config
        if config.dense is None:
            return None
        seed = config.dense_seed(self.request.seed)
        return f"{config.dense_hash(config.data.model_dump_json())}, seed {seed}"

    @property
    def name(self) -> str:
        """The run, in words."""
        request = self.request
        return f"{request.config.name}, {request.variant}, seed {request.seed}"


def command(job: Job, threads: int) -> list[str]:
    """The options of a run's command line, without its folders' place."""
    request = job.request
    words = ["--variant", request.variant, "--seed", str(request.seed)]
    words += ["--data-root", word(request.data_root), "--device", job.device or str(request.device)]
    words += ["--save-every", str(request.save_every), "--threads", str(threads)]
    if job.data is not None:
        words += ["--data", job.data]
    if job.validation is not None:
        words += ["--validation", str(job.validation)]
    return words


def word(path: Path) -> str:
    """A path as a word of a command line: never an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def last_lines(job: Job, code: int, printed: str) -> str:
    """What to say of a run that failed: its exit code, and what it printed last."""
    return f"{job.name} ended with code {code}:\n" + "\n".join(printed.strip().splitlines()[-15:])
