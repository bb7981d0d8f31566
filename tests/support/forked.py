"""Python processes that begin with everything loaded, for tests that start one after another.

Loading PyTorch takes longer than most of what these processes do. :func:`python` is the path of a
program that takes an interpreter's arguments (``-c``, ``-m`` or a script). A server loads all that
is heavy, once in a test run, and forks a process for each call, with the caller's arguments,
folder, environment, and standard input and output. Signals are passed on, and the process ends with
its caller, even if that is killed.

A test takes ``sys.executable`` instead where the start is what it is about: what has been loaded or
installed, how Python was set up, or which number the process has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
VARIABLE = "TESTS_FORKED_PYTHON"
HEAVY = (
    "torch._dynamo",
    "torch.distributed.run",
    "sklearn.datasets",
    "experiments.running.compare",
    "experiments.showing.report",
    "dpm_core.adapters.depgraph",
    "dpm_core.adapters.otov2",
    "dpm_core.adapters.gate_decorator",
    "dpm_core.adapters.torch_prune",
)
ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
PAUSE = 0.02
"""Seconds between two looks at whether a process or its caller has ended."""


def python() -> str:
    """The path of the program that stands in for ``sys.executable``."""
    return os.environ[VARIABLE]


@contextmanager
def serving() -> Iterator[None]:
    """Lets :func:`python` work, here and in all processes started inside the block."""
    with tempfile.TemporaryDirectory(prefix="forked") as folder, socket.socket(socket.AF_UNIX) as s:
        place, program = Path(folder) / "socket", Path(folder) / "python"
        s.bind(str(place))
        s.listen(64)
        program.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -I -S '{__file__}' '{place}' \"$@\"\n"
        )
        program.chmod(0o700)
        command = [sys.executable, __file__, "--serve", str(s.fileno()), str(program)]
        with subprocess.Popen(  # ends with its standard input
            command, stdin=subprocess.PIPE, pass_fds=[s.fileno()], start_new_session=True
        ):
            os.environ[VARIABLE] = str(program)
            yield
            del os.environ[VARIABLE]


# ---------------------------------------------------------------------- the program


def ask(place: str, arguments: list[str]) -> NoReturn:
    """Have the server fork a process, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        content = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [struct.pack("!i", len(content))], [0, 1, 2])
        server.sendall(content)
        process = _number(server)
        for kind in ENDS:
            signal.signal(kind, lambda number, _: os.kill(process, number))
        status = _number(server)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(os.waitstatus_to_exitcode(status))


def _number(connection: socket.socket) -> int:
    found: int = struct.unpack("!i", _exactly(connection, 4))[0]
    return found


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            sys.exit("the server of forked processes has ended")
        found += part
    return found


# ---------------------------------------------------------------------- the server


def serve(listener: socket.socket, program: str) -> None:
    """Fork a process for every caller, until standard input ends."""
    path = [p for p in sys.path[1:] if p not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[0] = str(ROOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loaded = False
    while True:
        ready, *_ = select.select([0, listener], [], [], 1.0)
        while _ended():
            pass
        if 0 in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            if not loaded:
                for module in HEAVY:
                    with contextlib.suppress(ImportError):  # the core is tested alone, too
                        __import__(module)
                gc.freeze()  # nothing of this is looked at again, so that processes share it
                loaded = True
            if os.fork() == 0:
                listener.close()
                watch(connection, program, path)
            connection.close()


def _ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def watch(connection: socket.socket, program: str, path: list[str]) -> NoReturn:
    """Fork the process; tell its caller how it ends, and end it where the caller has ended."""
    server = os.getppid()
    size, files, *_ = socket.recv_fds(connection, 4, 3)
    asked = json.loads(_exactly(connection, struct.unpack("!i", size)[0]))
    process = os.fork()
    if process == 0:
        connection.close()
        become(program, path, files, *asked)
    for file in files:
        os.close(file)
    connection.sendall(struct.pack("!i", process))
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            connection.sendall(struct.pack("!i", status))
            os._exit(0)
        if select.select([connection], [], [], PAUSE)[0] or os.getppid() != server:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os._exit(0)


def become(
    program: str,
    path: list[str],
    files: list[int],
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
) -> NoReturn:
    """Be the process: what Python does with its arguments, and at its end."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for kind in ENDS:
        signal.signal(kind, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    at_once = arguments[0] == "-u"
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        opened = open(number, "w", closefd=False)  # noqa: SIM115
        opened.reconfigure(line_buffering=number == 2, write_through=at_once)
        setattr(sys, name, opened)
    sys.executable = program
    own = environment.get("PYTHONPATH")
    sys.path[:] = [*(own.split(os.pathsep) if own else []), *path]
    os._exit(_ended_with(arguments[at_once:]))


def _ended_with(arguments: list[str]) -> int:
    """Run a program, and all that is to follow; the process's exit status."""
    import atexit
    import threading
    import traceback

    code: Any = 0
    try:
        _run(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # waits for threads, after pools of them are told that this is the end
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"Exception ignored: {error!r}\n")
        code = 120
    sys.stderr.flush()
    return code or 0


def _run(arguments: list[str]) -> None:
    import runpy
    import types

    kind, *rest = arguments
    if kind == "-c":
        code, *rest = rest
        sys.argv, sys.path[:0] = ["-c", *rest], [""]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        name, *rest = rest
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)  # it begins anew
        sys.argv, sys.path[:0] = ["-m", *rest], [os.getcwd()]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(kind).resolve().parent)]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        with socket.socket(fileno=int(sys.argv[2])) as given:
            serve(given, sys.argv[3])
    else:
        ask(sys.argv[1], sys.argv[2:])
