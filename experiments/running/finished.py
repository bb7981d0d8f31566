"""Whether a run is finished, and what a forced one is to replace."""

from __future__ import annotations

import hashlib

from dpm_core.adapters.saved import DamagedError, read

from ..errors import RunError
from ..files import save_text
from ..record import MODEL, RECORD, Record
from .request import CHECKPOINT, Request

FORCED = ".forced"
"""A file that names the record which a forced run is to replace; the record stays until then."""


def finished(request: Request) -> bool:
    """Whether record and model of the run are there, and no forced run is to replace them.

    Raises:
        RunError: a record is there, but damaged or of another run or configuration.
        VersionError: the model was saved by a later release.
    """
    path = request.folder / RECORD
    if not path.exists() or to_be_replaced(request):
        return False
    # A comparison resumes, and knows no --force.
    anew = f"delete {path.parent}" if request.resume else "--force runs anew"
    try:
        record = Record.from_json(path.read_text(encoding="utf-8"))
    except IsADirectoryError as cause:
        raise RunError(f"{path} is a folder, and in the way; move it") from cause
    except (OSError, ValueError) as cause:
        raise RunError(f"{path} cannot be read ({cause}); {anew}") from cause
    if record.config_hash != request.config.hash():
        raise RunError(
            f"{path} is of another configuration of this name; {anew}, or keep both by another "
            "--out"
        )
    if (record.variant, record.seed) != (request.variant, request.seed):
        raise RunError(
            f"{path} is of {record.variant}, seed {record.seed}; put it back where it belongs"
        )
    try:
        run_of = read(request.folder / MODEL).facts.get("run")
    except (OSError, DamagedError):
        return False
    if run_of is not None and run_of != record.run:
        raise RunError(
            f"{request.folder / MODEL} is of another run than {path.name} beside it ({run_of}); "
            f"put both back where they belong, or {anew}"
        )
    return True


def _replaces(request: Request) -> str:
    """The content of :data:`FORCED` while the request's run is to replace the present record."""
    path = request.folder / RECORD
    content = path.read_bytes() if path.is_file() else b""
    return f"{hashlib.sha256(content).hexdigest()} {request.config.hash()}\n"


def to_be_replaced(request: Request) -> bool:
    """Whether a forced run is to replace the record that is there."""
    try:
        content = (request.folder / FORCED).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return content == _replaces(request)


def start_anew(request: Request) -> None:
    """Note that the old record is to be replaced, and remove the old checkpoint."""
    if (request.folder / RECORD).exists():
        save_text(request.folder / FORCED, _replaces(request))
    (request.folder / CHECKPOINT).unlink(missing_ok=True)
