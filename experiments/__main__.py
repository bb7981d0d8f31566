"""The command line: ``python -m experiments --help``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from .arguments import STOPPED, count, device, folder, pause, seed, seeds, threads
from .config import load
from .errors import RunError, carried_out
from .files import save_json
from .places import check, clean
from .record import CONTROLS, VARIANTS, Record
from .running.compare import compare
from .running.jobs import Job
from .running.ranks import Ranks, joined, started
from .running.request import Request
from .running.run import run
from .running.stopping import ASKING
from .running.training import Stopped
from .showing import kept, table
from .showing.kept import Run
from .showing.sections import rows, sections

MEASURING = {
    "overhead": "what decay pruning adds to a training step",
    "breadth": "which networks can be pruned",
}
"""Commands that have a module of their own in :mod:`experiments.measuring`, with its options."""


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
    many.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask scheduler whose workers carry the runs out"
    )
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
    for name, what in (
        ("lengths", "table of the decay lengths that were tried, on validation images"),
        ("budgets", "table of what a decay is worth with so many steps, on test images"),
    ):
        tried = commands.add_parser(name, help=what)
        tried.add_argument(
            "paths", type=folder, nargs="*", help="runs to keep first; none to render"
        )
        tried.add_argument("--out", type=Path, help="the kept records (default: the project's)")
    for name, what in MEASURING.items():
        commands.add_parser(name, help=what, add_help=False)
    return top


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
    here = args.scheduler is None  # else every worker looks for the device itself
    own = device(args.device if here else "cpu")
    common = {"out": args.out, "data_root": args.data_root, "device": own}
    overriding = (args.data, args.validation, None if here else args.device)
    loaded = [
        (path, load(path, data=args.data, validation=args.validation)) for path in args.configs
    ]
    jobs = [
        Job(path, Request(config, variant, seed, **common), *overriding)
        for path, config in loaded
        for seed in args.seeds
        for variant in every
        if variant in variants
    ]
    check(args.out, ["table.json"])
    check(args.out / "plots")
    runs = kept.located(compare(jobs, at_once=args.jobs, scheduler=args.scheduler))
    records = [record for _, record in runs]
    print(table.markdown(records), end="\n\n")
    _plots(runs, args.out)
    print(_figures(records, args.out))


def _figures(records: list[Record], out: Path) -> Path:
    """Write the table's figures as JSON, in full precision."""
    content = [{"title": t, "rows": [asdict(r) for r in rows(m)]} for t, m in sections(records)]
    clean(out)
    save_json(out / "table.json", content)
    return out / "table.json"


def _plots(runs: list[Run], out: Path) -> None:
    from .showing import plot  # only now, as in other commands: matplotlib takes a second to load

    clean(out / "plots")
    for picture in plot.plot(runs, out / "plots"):
        print(picture)


def _show(command: str, paths: list[Path], out: Path) -> None:
    runs = kept.located(paths)
    if command == "table":
        records = [record for _, record in runs]
        print(table.markdown(records), end="\n\n")
        print(_figures(records, out))
    elif command == "plots":
        _plots(runs, out)
    elif command == "report":
        from .showing.lengths import BUDGETS
        from .showing.report import report
        from .showing.results import RECORDS

        ours = [path.resolve() for path in paths] == [RECORDS.resolve()] and BUDGETS.exists()
        print(report(runs, out / "report.html", kept.read([BUDGETS]) if ours else ()))
    else:
        from .showing.results import keep

        for path in keep(runs):
            print(path)


def _lengths(paths: list[Path], out: Path | None, *, chosen: bool) -> None:
    from .showing import lengths

    if out is None:
        out = lengths.KEPT if chosen else lengths.BUDGETS
    if paths:
        lengths.keep(kept.read(paths), out, chosen=chosen)
    print(lengths.markdown(kept.read([out])))


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
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in MEASURING:
        measure: Callable[[list[str]], int] = import_module(
            f".measuring.{given[0]}", __package__
        ).main
        return measure(given[1:])
    args = parser().parse_args(given)
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
    elif args.command in ("lengths", "budgets"):
        _lengths(args.paths, args.out, chosen=args.command == "lengths")
    else:
        _show(args.command, args.paths or [args.out], args.out)


if __name__ == "__main__":
    sys.exit(main())
