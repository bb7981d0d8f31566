"""The command line: ``python -m experiments --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from adapters.base import AdapterError
from dpm_core import DecayPruningError

from .config import ConfigError, load
from .data import DataError
from .run import VARIANTS, Request, RunError, run
from .training import Stopped

STOPPED = 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run of one variant, one record")
    one.add_argument("config", type=Path, help="a TOML configuration")
    one.add_argument("--variant", choices=VARIANTS, required=True)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--data", help="digits, cifar10, cifar100 or folder:PATH")
    _common(one)
    one.add_argument("--resume", action="store_true", help="go on from a checkpoint, if any")
    one.add_argument("--force", action="store_true", help="throw away what is there")
    one.add_argument("--save-every", type=float, default=30.0, help="seconds between checkpoints")
    return top


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("runs"), help="where runs are kept")
    command.add_argument("--data-root", type=Path, default=Path("data"), help="downloads, caches")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    command.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")


def device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; prints what it made, or one clear error."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.command == "run":
            request = Request(
                config=load(args.config, data=args.data),
                variant=args.variant,
                seed=args.seed,
                out=args.out,
                data_root=args.data_root,
                device=device(args.device),
                resume=args.resume,
                force=args.force,
                save_every=args.save_every,
            )
            print(run(request))
    except Stopped:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    except (ConfigError, DataError, RunError, AdapterError, DecayPruningError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
