"""The command line: ``python -m experiments --help``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from .config import load
from .errors import RunError, carried_out
from .files import save_json
from .names import LAST_SEED, shown
from .places import check, clean
from .running.compare import Job, compare
from .running.ranks import Ranks, joined, started
from .running.run import ASKING, CONTROLS, VARIANTS, Request, run
from .running.training import Stopped
from .showing import table

STOPPED = 130
MOST = 10**9
"""The largest count that is taken."""
MOST_THREADS, MOST_SEEDS = 1024, 1000


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run of one variant, one record")
    one.add_argument("config", type=Path, help="a TOML configuration")
    one.add_argument("--variant", choices=VARIANTS + CONTROLS, required=True)
    one.add_argument("--seed", type=seed, required=True)
    _common(one)
    one.add_argument("--resume", action="store_true", help="go on from a checkpoint, if any")
    one.add_argument(
        "--force", action="store_true", help="start anew, and replace what is there in the end"
    )
    one.add_argument("--save-every", type=pause, default=30.0, help="seconds between checkpoints")
    one.add_argument(
        "--until-eof",
        action="store_true",
        help="save and stop when standard input ends, as it does with whoever started this",
    )

    many = commands.add_parser("compare", help="all variants over several seeds, and their table")
    many.add_argument("configs", type=Path, nargs="+", help="TOML configurations")
    many.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help=f"{','.join(VARIANTS + CONTROLS)} (default: %(default)s)",
    )
    many.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="0-2, or 0,3,5")
    many.add_argument("--jobs", type=threads, help="runs at a time (default: one per core)")
    _common(many)

    small = commands.add_parser("export", help="a run's pruned model as ONNX, or by torch.export")
    small.add_argument("model", type=Path, help="a run's model.safetensors")
    small.add_argument("--kind", choices=("onnx", "torch"), default="onnx")
    small.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or file that may be imported to rebuild the network, if it is not built "
        "in; may be given several times; '*' allows any",
    )

    for name, what in (
        ("table", "table of finished runs"),
        ("plots", "plots of finished runs"),
        ("report", "one page of all there is to see of finished runs"),
        ("keep", "take finished runs into the records that are kept"),
    ):
        known = commands.add_parser(name, help=what)
        known.add_argument(
            "paths", type=folder, nargs="*", help="records or folders (default: --out)"
        )
        known.add_argument("--out", type=folder, default=Path("runs"), help="where runs are kept")
    commands.add_parser("results", help="RESULTS.md and its plots from the kept records")
    return top


def count(text: str, most: int = MOST) -> int:
    """A whole number of at least 1."""
    if not _whole(text) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no count; give 1 to {most}")
    return int(text)


def threads(text: str) -> int:
    """As many as a machine may run at once."""
    return count(text, MOST_THREADS)


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    if not _whole(text) or int(text) > LAST_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no seed; give 0 to {LAST_SEED}")
    return int(text)


def seeds(text: str) -> list[int]:
    """``0-4`` or ``0,2,5`` as a list."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _whole(first) or (dash and not _whole(last)):
            raise argparse.ArgumentTypeError(
                f"{shown(text)!r} is no list of seeds; give 0-4 or 0,2,5"
            )
        start, end = seed(first), seed(last if dash else first)
        if end < start:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} runs backwards; give 0-4 or 0,2,5")
        if len(numbers) + end - start >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(
                f"{shown(text)!r} is more than {MOST_SEEDS} seeds; give fewer at a time"
            )
        numbers += range(start, end + 1)
    return sorted(set(numbers))


def _whole(text: str) -> bool:
    """Whether text is a whole number of a length that any number here may have."""
    return text.isascii() and text.isdigit() and len(text) < 20


def pause(text: str) -> float:
    """Seconds, 0 or more; ``inf`` for never."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} are no seconds; give 0 or more")
    return seconds


def folder(text: str) -> Path:
    """A path that is not empty: an empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a folder's")
    return Path(text)


def _run(args: argparse.Namespace, ranks: Ranks, own: torch.device) -> None:
    request = Request(
        config=load(args.config, data=args.data, validation=args.validation),
        variant=args.variant,
        seed=args.seed,
        out=args.out,
        data_root=args.data_root,
        device=own,
        resume=args.resume,
        force=args.force,
        save_every=args.save_every,
        ranks=ranks,
    )
    record = run(request)
    if ranks.first:
        print(record)


def _compare(args: argparse.Namespace) -> None:
    # A termination is an interrupt too, and so is the end of a terminal: the runs are to save
    # themselves.
    if threading.current_thread() is threading.main_thread():
        for kind in ASKING:
            if signal.getsignal(kind) == signal.SIG_DFL:
                signal.signal(kind, signal.default_int_handler)
    variants = args.variants.split(",")
    every = VARIANTS + CONTROLS
    if unknown := [v for v in variants if v not in every]:
        raise RunError(f"unknown variant {unknown[0]!r}; there are: {', '.join(every)}")
    common = {"out": args.out, "data_root": args.data_root, "device": device(args.device)}
    loaded = [
        (path, load(path, data=args.data, validation=args.validation)) for path in args.configs
    ]
    jobs = [
        Job(path, Request(config, variant, seed, **common), args.data, args.validation)
        for path, config in loaded
        for seed in args.seeds
        for variant in every
        if variant in variants
    ]
    check(args.out, ["table.json"])
    check(args.out / "plots")
    runs = table.located(compare(jobs, at_once=args.jobs))
    records = [record for _, record in runs]
    print(table.markdown(records), end="\n\n")
    _plots(runs, args.out)
    print(_figures(records, args.out))


def _figures(records: list[table.Record], out: Path) -> Path:
    """Write the table's figures as JSON, in full precision."""
    content = [{"title": t, "rows": table.rows(m)} for t, m in table.sections(records)]
    clean(out)
    save_json(out / "table.json", content)
    return out / "table.json"


def _plots(runs: list[tuple[Path, table.Record]], out: Path) -> None:
    from .showing import plot  # only now, as in other commands: matplotlib takes a second to load

    clean(out / "plots")
    for picture in plot.plot(runs, out / "plots"):
        print(picture)


def _show(command: str, runs: list[tuple[Path, table.Record]], out: Path) -> None:
    if command == "table":
        records = [record for _, record in runs]
        print(table.markdown(records), end="\n\n")
        print(_figures(records, out))
    elif command == "plots":
        _plots(runs, out)
    elif command == "report":
        from .showing.report import report

        print(report(runs, out / "report.html"))
    else:
        from .showing.results import keep

        for path in keep(runs):
            print(path)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="digits, cifar10, cifar100 or folder:PATH")
    command.add_argument(
        "--validation",
        type=count,
        help="measure on so many training images set apart, not on the test images",
    )
    command.add_argument("--out", type=folder, default=Path("runs"), help="where runs are kept")
    command.add_argument("--data-root", type=folder, default=Path("data"), help="downloads, caches")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    command.add_argument("--threads", type=threads, help="CPU threads (default: PyTorch's choice)")


def device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.ones(1, device=chosen).add(1).item()  # a device that can compute
    except Exception as cause:  # every kind of device has errors of its own
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise RunError(f"there is no device {name!r} ({reason}); give auto, cpu or cuda") from cause
    return chosen


def stop_at_eof() -> None:
    """Ask this process to stop, as by SIGTERM, when its standard input ends.

    A pipe from the process that started it ends with that process, even if it is killed.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; prints its results, or one clear error."""
    args = parser().parse_args(arguments)
    os.environ.setdefault("MPLBACKEND", "agg")  # files only, whatever the machine has for a screen
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    if getattr(args, "until_eof", False):
        stop_at_eof()
    return carried_out(
        lambda: _stoppable(args),
        lambda: "" if started().first else f" on rank {started().number}",
    )


def _stoppable(args: argparse.Namespace) -> int:
    try:
        _carry_out(args)
    except Stopped:
        if started().first:
            print("stopped; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return STOPPED
    return 0


def _carry_out(args: argparse.Namespace) -> None:
    if args.command == "run":
        with joined(device(args.device)) as (ranks, own):
            _run(args, ranks, own)
    elif started().count > 1:
        raise RunError(f"{args.command} is for one process; only run takes several")
    elif args.command == "compare":
        _compare(args)
    elif args.command == "export":
        from .running.export import export  # only now: onnxruntime takes a while to load

        print(export(args.model, args.kind, allow=args.allow))
    elif args.command == "results":
        from .showing import results

        for path in results.renew():
            print(path)
    else:
        _show(args.command, table.located(args.paths or [args.out]), args.out)


if __name__ == "__main__":
    sys.exit(main())
