"""What decay pruning adds to a training step: ``python -m experiments overhead``.

Three arms take the same training step (forward, backward, the optimizer), in turns: `plain`;
`idle`, DecayPruning attached and nothing decaying; `decaying`, half of every structure group
decaying with Self-Rectifying on. Each framework has its own step: DepGraph's is SGD, OTOv2's is
DHSPG while it penalises, Gate-Decorator's is SGD with gates. Beside them: `optimizer.step()` alone,
which shows the hooks without the noise of forward and backward; the floor, one read of the decaying
slices and gradients and one read and write of the slices; and the decay of one group, done by the
core and by torch-kirigami. And, once each, what comes before the training with DepGraph: reading
the graph, the trial of all groups, and the selection for a speed-up of 2.11.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dpm_core import Phase
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.third_party import graph, trial

from ..arguments import device as device_of
from ..arguments import threads
from ..errors import carried_out
from ..files import save_json
from ..inputs import models
from ..places import check
from ..running.machine import device_name, revision
from . import kirigami
from .arms import FRAMEWORKS, Settings, decaying_slices, make_arms
from .timing import Figure, figure, interleave, wait_for

RECORD_VERSION = 2
TARGETS = {"idle": 1.01, "decaying": 1.03, "kirigami": kirigami.TARGET}
"""Time of a step over plain, at most; and how many times faster than torch-kirigami, at least."""
SPEED_UP = 2.11


def measure(settings: Settings) -> dict[str, Any]:
    """All figures of one model, by name."""
    arms = make_arms(settings)
    for arm in arms.values():
        arm.step()  # gradients, for what follows
    dpms = {name: arm.dpm for name, arm in arms.items() if arm.dpm is not None}
    slices, gradients = decaying_slices(arms["decaying"])

    def floor() -> None:
        torch._foreach_norm(slices)
        torch._foreach_norm(gradients)
        torch._foreach_mul_(slices, 1.0000001)

    # The optimizer alone, right after the step and at its gradients, has the same hooks (8.4 and
    # 7.9, 28 and 27 ms of CPU time for ResNet-56 and VGG16-BN), and no noise of other work.
    turns: list[dict[str, Callable[[], object]]] = [
        {f"step_{name}_ms": arm.step, f"optimizer_{name}_ms": arm.optimizer.step}
        for name, arm in arms.items()
    ]
    turns.append({"floor_ms": floor})
    title = f"{settings.model}, {settings.framework}: steps"
    times = interleave(turns, settings.repeats, settings.device, title)
    figures = {name: figure(values) for name, values in times.items()}
    plain = times["step_plain_ms"]
    for name in dpms:
        # The headline is paired, as what slows a round slows both arms: over 40 rounds of ResNet-56
        # on a busy machine it scattered by 0.019 and the ratio of medians by 0.028 (bootstrap).
        # A cost that this hides still shows in the hooks' own time.
        steps = times[f"step_{name}_ms"]
        alone = zip(times[f"optimizer_{name}_ms"], times["optimizer_plain_ms"], strict=True)
        hooks = [a - p for a, p in alone]
        ratios = {
            "": [a / p for a, p in zip(steps, plain, strict=True)],
            "_of_medians": [statistics.median(steps) / statistics.median(plain)],
            "_by_hooks": [1 + ms / p for ms, p in zip(hooks, plain, strict=True)],
        }
        for kind, values in ratios.items():
            figures[f"{name}_over_plain{kind}"] = figure(values, TARGETS[name])
        figures[f"hooks_{name}_ms"] = figure(hooks)
        if name == "decaying":
            over_floor = [ms / f for ms, f in zip(hooks, times["floor_ms"], strict=True)]
            figures["hooks_decaying_over_floor"] = figure(over_floor)
    result = {
        "figures": figures,
        "structures": sum(g.size for g in dpms["idle"].groups.values()),
        "decaying": {name: dpm.count(Phase.DECAYING) for name, dpm in dpms.items()},
    }
    if settings.framework == "depgraph":  # the decay of one group is the same in all frameworks
        group, decay = kirigami.decay_of_one_group(settings)
        result["figures"] = figures | decay | _set_up(settings)
        result["decayed_group"] = {
            "name": group.name,
            "structures": group.size,
            "elements": kirigami.elements(group),
        }
    return result


def _set_up(settings: Settings) -> dict[str, Figure]:
    """What DepGraph takes before a training starts."""
    (model, _), example = settings.build(), settings.images()[:2]
    run = DepGraph(model, example, DepGraphOptions(speed_up=SPEED_UP))
    groups = graph.read(model, example).groups
    work: dict[str, Callable[[], object]] = {
        "graph": lambda: graph.read(model, example),
        "trial": lambda: trial.inexact(model, example, groups),
        "selection": run.selection,
    }
    figures = {}
    for name, do in work.items():
        start = time.perf_counter()
        do()
        wait_for(settings.device)
        figures[f"setup_{name}_ms"] = figure([1e3 * (time.perf_counter() - start)])
    return figures


# ---------------------------------------------------------------------- output


def table(figures: Mapping[str, Figure | None]) -> str:
    """Figures as aligned lines; those that were not measured are left out."""
    lines = [["", "median", "quartiles", "target", "met"]]
    for name, f in figures.items():
        if f is None:
            continue
        line = [name, f"{f['median']:.5g}", f"{f['lower']:.5g} to {f['upper']:.5g}", "", ""]
        if "target" in f:
            line[3:] = [f"{f['target']:g}", "yes" if f["met"] else "no"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": device_name(torch.device("cpu")),
        "load": os.getloadavg()[0],  # before: well above zero, others were using the machine
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(prog="python -m experiments overhead", description=__doc__)
    top.add_argument(
        "--models", type=_models, default="vgg16-bn,resnet56", help="names, with commas between"
    )
    top.add_argument(
        "--frameworks", type=_frameworks, default=",".join(FRAMEWORKS), help="with commas between"
    )
    top.add_argument("--batch", type=_from_two, default=32)
    top.add_argument("--channels", type=int, default=3, help="of the images")
    top.add_argument("--image-size", type=int, default=32)
    top.add_argument("--repeats", type=_from_two, default=20, help="timed steps per arm")
    top.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    top.add_argument("--threads", type=threads, help="CPU threads (default: PyTorch's choice)")
    top.add_argument("--out", type=Path, default=Path("runs/overhead/overhead.json"))
    return top


def _models(text: str) -> list[str]:
    return _known(text, models.MODELS, "model")


def _frameworks(text: str) -> list[str]:
    return _known(text, FRAMEWORKS, "framework")


def _known(text: str, known: Collection[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise argparse.ArgumentTypeError(f"there is no {what} {name!r}; there are {listed}")
    return names


def _from_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 2")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the figures, write them as JSON and print its path last."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    return carried_out(lambda: _measured(args))


def _measured(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    check(args.out.parent, [args.out.name])
    content: dict[str, Any] = {
        "version": RECORD_VERSION,
        "revision": revision(),
        "machine": machine(device),
        "settings": {n: getattr(args, n) for n in ("batch", "channels", "image_size", "repeats")},
        "targets": TARGETS,
        "models": {},
    }
    print(", ".join(f"{key}: {value}" for key, value in content["machine"].items()))
    for name, framework in itertools.product(args.models, args.frameworks):
        asked = Settings(name, device=device, framework=framework, **content["settings"])
        result = measure(asked)
        content["models"].setdefault(name, {})[framework] = result
        decaying = result["decaying"]["decaying"]
        print(
            f"\n{name} in {framework}, batch {args.batch}: {decaying} of "
            f"{result['structures']} structures decaying"
        )
        if "decayed_group" in result:
            group = result["decayed_group"]
            print(f"decay of one group: {group['structures']} structures of {group['name']}")
        print(table(result["figures"]))
        if result["figures"].get("decay_kirigami_ms", 0) is None:
            print("torch-kirigami is not installed; pip install -e '.[dev]' brings it")
    save_json(args.out, content)
    print(f"\n{args.out}")
    return 0
