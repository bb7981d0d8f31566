"""Folders that are written to: locked for one process at a time, checked first, and cleaned up.

A lock is the kernel's (``flock``): it ends with its process, however that ends. Where a file system
or a platform has no such locks, nothing is locked, and nothing is cleaned up.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpm_core import DecayPruningError
from dpm_core.adapters.saved import TEMPORARY, claim

LOCK = ".lock"
PATIENCE = 2.0
"""Seconds that a lock is waited for: others look at it for a moment, as :func:`busy` does."""


class BusyError(DecayPruningError, RuntimeError):
    """Another process is at work in a folder. The message names both, and says what to do."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, as long as the block lasts.

    The folder is created if need be, and removed again if nothing was written into it. Files that
    other processes left half-written are removed: none of them writes there now.

    Raises:
        BusyError: another process has locked it.
        OSError: the folder cannot be created, or not be written to.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        handle = _lock(folder)
        clean(folder)
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is locked: see _lock
            os.close(handle)
        for place in created:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def _lock(folder: Path) -> int:
    """Lock a folder; returns the handle of the open lock file."""
    path, until = folder / LOCK, time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not claim(handle):
            holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            if time.monotonic() > until:
                raise BusyError(
                    f"another process (number {holder}) is at work in {folder}; wait until it has "
                    "ended, or end it, or give another --out"
                )
            time.sleep(0.05)
            continue
        # The last owner may have removed the file meanwhile; the next turn creates a new one.
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                os.truncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        os.close(handle)


def busy(folder: Path) -> bool:
    """Whether a process has locked a folder right now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not claim(handle)
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Remove the temporary files that ended processes have left in a folder.

    A process keeps the temporary file that it writes locked, so one that can be locked is nobody's.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return  # no such folder: there is nothing to clean
    for name in names:
        with suppress(OSError):  # another process was faster
            handle = os.open(folder / name, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if claim(handle, sure=True):
                    (folder / name).unlink()
            finally:
                os.close(handle)


def check(folder: Path, names: Iterable[str] = (), needed: int = 0) -> None:
    """Refuse, before any work, a folder that cannot take what is to be written in the end.

    Args:
        folder: created if need be.
        names: of the files to be written; none of them may be a folder.
        needed: bytes that have to be free.

    Raises:
        OSError: with the path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in names):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as cause:
        raise OSError(cause.errno, cause.strerror, str(folder)) from cause
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"about {needed / 1e6:.1f} MB are needed, and {free / 1e6:.1f} MB are left"
        raise OSError(errno.ENOSPC, what, str(folder))


# ---------------------------------------------------------------------- what an error says

_REMEDIES = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "free some space, or give another folder",
    errno.EROFS: "give a folder that can be written to",
    errno.EACCES: "give a place that you have the rights to, or have them granted",
    errno.EPERM: "give a place that you have the rights to, or have them granted",
    errno.EISDIR: "a folder is in the way; move it, or give another name",
    errno.ENOTDIR: "a file is in the way; move it, or give another name",
    errno.EEXIST: "something of that name is in the way; move it, or give another name",
    errno.ENAMETOOLONG: "the name is too long; give a shorter path or name",
    errno.ELOOP: "links lead in a circle; give the place itself",
    errno.EMFILE: "too many files are open; end other processes, or raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open; end other processes",
    errno.ENOMEM: "there is not enough memory; end other processes, or take smaller batches",
    errno.EIO: "the disk is at fault; give another place",
    errno.ESTALE: "the network's disk has gone; mount it again",
}


def explained(error: OSError) -> str:
    """What went wrong with which file, and what to do, in one line."""
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    if error.filename is None:
        try:
            Path.cwd()
        except OSError:
            return f"the current folder is gone ({reason}); change to one that is there"
        return f"{reason}; {remedy}" if remedy else reason
    path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
    written = TEMPORARY.fullmatch(os.path.basename(path))
    if written:  # a user knows the file that it was to become
        path = os.path.join(os.path.dirname(path), written["name"])
    if error.errno == errno.ENOENT:
        remedy = "it is not there; give a path that is"
    return f"{path}: {reason}; {remedy or 'give another place'}"
