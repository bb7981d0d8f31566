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
import copy
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dpm_core import (
    DecayPruning,
    DecayPruningError,
    Phase,
    SelfRectifying,
    SmoothPruning,
    StructureGroup,
    Trajectory,
)
from dpm_core.adapters.base import structure_group
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions, structure_groups
from dpm_core.adapters.gate_decorator import structure_group as gate_group
from dpm_core.third_party import gate_decorator, graph, otov2, trial

from ..arguments import device as device_of
from ..arguments import threads
from ..errors import carried_out
from ..files import save_json
from ..inputs import models
from ..places import check
from ..running.machine import device_name, revision

RECORD_VERSION = 2
ARMS = ("plain", "idle", "decaying")
KIRIGAMI_FIGURES = ("decay_kirigami_ms", "decay_speed_up", "decay_norm_difference")
TARGETS = {"idle": 1.01, "decaying": 1.03, "kirigami": 300.0}
"""Time of a step over plain, at most; and how many times faster than torch-kirigami, at least."""
SPEED_UP = 2.11
CLASSES = 10
WARM_UP = 1
# So long that no decision falls and nothing ends while the clock runs.
DECAY_STEPS = 10**6
SEED = 0

Figure = dict[str, Any]


class OverheadError(DecayPruningError, RuntimeError):
    """The benchmark would compare unlike things. The message says which."""


@dataclass(frozen=True)
class Settings:
    """What is measured, for one model in one framework."""

    model: str
    batch: int
    channels: int
    image_size: int
    repeats: int
    device: torch.device
    framework: str = "depgraph"

    def build(self) -> tuple[nn.Module, list[StructureGroup]]:
        """The model in training mode and its groups; every call gives a copy of the same."""
        return copy.deepcopy(_built(self))

    def images(self) -> Tensor:
        """A batch of noise; every call gives the same."""
        draw = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.channels, self.image_size, self.image_size)
        return torch.randn(shape, generator=draw).to(self.device)


@lru_cache(maxsize=1)
def _built(settings: Settings) -> tuple[nn.Module, list[StructureGroup]]:
    # Kept, because finding the groups of ResNet-56 takes seconds.
    model = models.build(settings.model, settings.channels, CLASSES, seed=SEED)
    model = model.to(settings.device).train()
    return model, structure_groups(model, settings.images()[:2])


@dataclass
class Arm:
    """One way to take the step, with a model and an optimizer of its own."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    dpm: DecayPruning | None = None

    def step(self) -> None:
        """One training step; its gradients stay until the next."""
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


# A low learning rate: the same gradients are applied many times over.
RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
Parts = tuple[nn.Module, list[StructureGroup], torch.optim.Optimizer]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)


def _depgraph(settings: Settings, _plain: bool) -> Parts:
    model, groups = settings.build()
    return model, groups, _sgd(model)


def _otov2(settings: Settings, plain: bool) -> Parts:
    model, _ = settings.build()
    oto = otov2.graph(model, settings.images()[:2])
    kind = otov2.DHSPG if plain else otov2.DeferringDHSPG
    # An epsilon of 0: at this learning rate the half-space is never left, and the penalty goes on.
    optimizer = kind(
        oto,
        variant="sgd",
        lr=RATE,
        first_momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        target_group_sparsity=0.5,
        epsilon=0.0,
    )
    return model, [structure_group(g) for g in otov2.groups(oto, model)], optimizer


def _gate_decorator(settings: Settings, _plain: bool) -> Parts:
    model, _ = settings.build()
    decorator = gate_decorator.GateDecorator(model, settings.images()[:2], fraction=0.01)
    groups = [gate_group(g, decorator.gates) for g in decorator.groups]
    return model, groups, _sgd(model)


FRAMEWORKS: dict[str, Callable[[Settings, bool], Parts]] = {
    "depgraph": _depgraph,
    "otov2": _otov2,
    "gate-decorator": _gate_decorator,
}


def make_arms(settings: Settings) -> dict[str, Arm]:
    """The arms, by name; in the last one half of every group's structures decay."""
    images = settings.images()
    labels = torch.arange(settings.batch, device=settings.device) % CLASSES
    arms = {}
    for name in ARMS:
        model, groups, optimizer = FRAMEWORKS[settings.framework](settings, name == "plain")
        arms[name] = Arm(model, optimizer, images, labels)
        if name == "plain":
            continue
        dpm = DecayPruning(groups, SmoothPruning(DECAY_STEPS), SelfRectifying(Trajectory()))
        arms[name].dpm = dpm.attach(optimizer)
        if name == "decaying":
            draw = torch.Generator().manual_seed(SEED)
            dpm.decay(
                {g.name: torch.randperm(g.size, generator=draw)[: g.size // 2] for g in groups}
            )
    return arms


# ---------------------------------------------------------------------- timing


def interleave(
    turns: Sequence[Mapping[str, Callable[[], object]]],
    repeats: int,
    device: torch.device,
    title: str,
) -> dict[str, list[float]]:
    """Time several functions in turns, so that what disturbs the machine affects all of them.

    Args:
        turns: functions by name. Those of one turn are timed one after another, in their order; the
            order of the turns rotates from round to round.
        repeats: how many rounds are timed, after :data:`WARM_UP` untimed ones.
        device: is waited for whenever the clock is read.
        title: of the progress bar.

    Returns:
        Milliseconds by name, one figure per round.
    """
    times: dict[str, list[float]] = {name: [] for turn in turns for name in turn}
    for count in tqdm(range(-WARM_UP, repeats), desc=title, disable=None, leave=False):
        first = count % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            for name, work in turn.items():
                _wait_for(device)
                start = time.perf_counter()
                work()
                _wait_for(device)
                if count >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figure(values: Sequence[float], target: float | None = None, sign: int = 1) -> Figure:
    """Median and quartiles, and whether the median meets a target.

    Args:
        values: one or more measurements.
        target: what the median is not to exceed.
        sign: -1 for a target that the median has to reach instead.
    """
    points = values if len(values) > 1 else [*values, *values]
    quartiles = statistics.quantiles(points, n=4, method="inclusive")
    summary: Figure = dict(zip(("lower", "median", "upper"), quartiles, strict=True))
    if target is not None:
        summary |= {"target": target, "met": sign * summary["median"] <= sign * target}
    return summary


# ---------------------------------------------------------------------- what is measured


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
        group, decay = _decay_of_one_group(settings)
        result["figures"] = figures | decay | _set_up(settings)
        result["decayed_group"] = {
            "name": group.name,
            "structures": group.size,
            "elements": _elements(group),
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
        _wait_for(settings.device)
        figures[f"setup_{name}_ms"] = figure([1e3 * (time.perf_counter() - start)])
    return figures


def decaying_slices(arm: Arm) -> tuple[list[Tensor], list[Tensor]]:
    """Compact copies of what is decaying: slices, and their gradients."""
    assert arm.dpm is not None
    slices, gradients = [], []
    for group in arm.dpm.groups.values():
        decaying = (arm.dpm.phases(group.name) == Phase.DECAYING).nonzero()[:, 0]
        for s in group.slices:
            rows = s.index[decaying.to(s.index.device)].reshape(-1)
            assert s.parameter.grad is not None
            slices.append(s.parameter.detach().index_select(s.dim, rows))
            gradients.append(s.parameter.grad.index_select(s.dim, rows))
    return slices, gradients


def _decay_of_one_group(settings: Settings) -> tuple[StructureGroup, dict[str, Figure | None]]:
    """Set all structures of the largest group to new norms, by the core and by torch-kirigami.

    Raises:
        OverheadError: the two leave different norms.
    """
    (_, groups), (their_model, their_groups) = settings.build(), settings.build()
    group, their_group = (max(some, key=lambda g: g.size) for some in (groups, their_groups))
    targets = 0.9 * group.norms()

    def core() -> None:
        group.scale_(targets / group.norms())

    title = f"{settings.model}: decay of one group"
    times = interleave([{"core": core}], 10 * settings.repeats, settings.device, title)["core"]
    figures: dict[str, Figure | None] = {"decay_core_ms": figure(times)}
    example = settings.images()[:2]
    kirigami = kirigami_decay(their_model, their_group, example, targets.tolist())
    if kirigami is None:
        return group, figures | dict.fromkeys(KIRIGAMI_FIGURES)
    kirigami()
    difference = float((group.norms() / their_group.norms() - 1).abs().max())
    if not difference <= 1e-5:
        raise OverheadError(
            f"the core and torch-kirigami leave norms that differ by {difference:.1e} of their "
            f"size in group {group.name!r} of {settings.model}; their times do not compare"
        )
    # Hundreds of times slower, so fewer calls have to do.
    repeats = max(2, settings.repeats // 4)
    theirs_ms = interleave([{"kirigami": kirigami}], repeats, settings.device, title)["kirigami"]
    core_ms = statistics.median(times)
    compared = (
        figure(theirs_ms),
        figure([ms / core_ms for ms in theirs_ms], TARGETS["kirigami"], sign=-1),
        figure([difference]),
    )
    return group, figures | dict(zip(KIRIGAMI_FIGURES, compared, strict=True))


def kirigami_decay(
    model: nn.Module, group: StructureGroup, example: Tensor, targets: Sequence[float]
) -> Callable[[], None] | None:
    """Torch-kirigami's way to set each structure of a group of ``model`` to its target norm.

    Returns:
        A function that does it, or ``None`` where torch-kirigami is not installed.

    Raises:
        OverheadError: its groups have other elements than the structures.
    """
    try:
        from torch_kirigami import DependencyGraph, IndexSet
        from torch_kirigami.pruning import ParameterGroup
        from torch_kirigami.sparsity import set_group_norms_
    except ImportError:
        return None
    graph = DependencyGraph.build(model, args=(example,))
    names = {id(p): name for name, p in model.named_parameters()}
    axes = [graph.parameter(names[id(s.parameter)]).axis(s.dim) for s in group.slices]
    rows = zip(*(s.index.tolist() for s in group.slices), strict=True)
    # Checking the graph for each takes torch-kirigami 5 ms: seconds for a group, not for a model.
    theirs = tuple(
        ParameterGroup(
            graph,
            tuple(axis.select(IndexSet.of(at)) for axis, at in zip(axes, row, strict=True)),
        )
        for row in tqdm(rows, "torch-kirigami: groups", group.size, disable=None, leave=False)
    )
    count = sum(selection.count for g in theirs for selection in g.selections)
    if count != _elements(group):
        raise OverheadError(
            f"torch-kirigami's groups hold {count} elements and the structures of {group.name!r} "
            f"{_elements(group)}, so their times do not compare"
        )
    return lambda: set_group_norms_(theirs, tuple(targets))


def _elements(group: StructureGroup) -> int:
    return sum(
        s.index.numel() * s.parameter.numel() // s.parameter.shape[s.dim] for s in group.slices
    )


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
