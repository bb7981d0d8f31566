"""Which networks can be pruned: ``python -m experiments breadth``.

Every classification network of torchvision, and the smallest of every family of timm, goes with
random weights through the DepGraph adapter as sp and as sr: upstream chooses a share of every
group's structures, these decay over a few steps on noise, some are released and replaced in sr, and
what is zero is removed. Each network is measured in a process of its own and kept as soon as it is
done, so the table grows from run to run and can be written without one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..arguments import STOPPED, threads
from ..errors import carried_out
from ..files import save_text
from ..places import check
from .breadth_page import markdown
from .collecting import collect, in_process
from .networks import networks

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "experiments" / "results" / "models.jsonl"
TABLE = ROOT / "experiments" / "results" / "models.md"


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(prog="python -m experiments breadth", description=__doc__)
    top.add_argument("--networks", help="names, with commas between (default: all)")
    top.add_argument("--largest", type=float, default=150.0, help="parameters, in millions")
    top.add_argument("--time-limit", type=float, default=600.0, help="seconds for one network")
    top.add_argument("--threads", type=threads, default=1, help="CPU threads (default: 1)")
    top.add_argument("--force", action="store_true", help="measure anew what is there, too")
    top.add_argument("--render", action="store_true", help="measure nothing, write the table")
    top.add_argument("--records", type=Path, default=RECORDS, help="a line for each network")
    top.add_argument("--out", type=Path, default=TABLE, help="the table")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, write the table and print its path."""
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    return carried_out(lambda: _measured(args))


def _measured(args: argparse.Namespace) -> int:
    names = args.networks.split(",") if args.networks else networks()
    names = [] if args.render else names
    for path in (args.records, args.out):
        check(path.parent, [path.name])
    try:
        rows = collect(
            names,
            args.records,
            1e6 * args.largest,
            lambda n: in_process(n, args.time_limit),
            args.force,
        )
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, the same command goes on", file=sys.stderr)
        return STOPPED
    there = {row["network"] for row in rows}
    save_text(args.out, markdown(rows, [n for n in networks() if n not in there]))
    print(args.out)
    return 0
