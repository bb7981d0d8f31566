"""Removing channels from a model by torch-pruning's dependency graph, whoever chose them.

All channels of one removal go at once: the graph is read before anything is small, so that no step
depends on what an earlier one left behind. A model whose outputs a removal would change is put back
to what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpm_core.errors import first_line

from . import comparing, graph, running, shares, tracing
from .groups import Plan, UnsupportedLayerError, UpstreamGroup

Build = Callable[[nn.Module, Any], Any]
"""Gives upstream's graph of a model, for an example of its inputs."""


class RemovalError(UnsupportedLayerError):
    """A removal would change what the model computes. Nothing has been removed."""


def remove(model: nn.Module, example: Any, plan: Plan, build: Build = tracing.build) -> None:
    """Make a model physically smaller, in place; parameters become new objects.

    The channels have to be zero already: the outputs for the example stay the same, to rounding.

    Args:
        model: whose channels go.
        example: of its inputs, on its device.
        plan: what to remove.
        build: gives the graph to go by, of the model and of its copies.

    Raises:
        RemovalError: the outputs would change; the model is as it was.
        UnsupportedLayerError: upstream cannot remove this; the model is as it was.
    """
    before = Comparison(model, example)
    with _put_back_on_failure(model):
        take_out(model, example, plan, build)
        before.require_same(model, plan)


def cut(model: nn.Module, example: Any, plan: Plan, build: Build = tracing.build) -> None:
    """Like :func:`remove`, for channels that are not zero, as in a freshly built model.

    The small model computes what the large one would with these channels set to zero.

    Raises:
        RemovalError: it would compute something else; the model is as it was.
        UnsupportedLayerError: upstream cannot remove this; the model is as it was.
    """
    with _put_back_on_failure(model):
        for part in separate(plan):
            zeroed = running.copied(model)
            set_to_zero(zeroed, example, part, build)
            before = Comparison(zeroed, example)
            take_out(model, example, part, build)
            before.require_same(model, part)


class Comparison:
    """What a model computes on an example, to hold what a removal leaves of it against.

    In double precision if the model runs in it; in evaluation mode, and also in training mode, in
    which other parts may run, if the example can be run in it. Dropout and noise are at their mean
    then; a pass that draws anything else, such as an order, is not compared.

    Args:
        model: the large model; stays as it is.
        example: of the inputs.

    Attributes:
        large: a copy of it, in the precision of the comparison.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.large = running.Precision(model, running.informative(example), 8)

    def require_same(self, small: nn.Module, plan: Plan) -> None:
        """Refuse a removal that changes the outputs by more than rounding.

        Args:
            small: the model after the removal; stays as it is.
            plan: what was removed, for the message.

        Raises:
            RemovalError: saying how far the outputs are off.
        """
        why = self._differs(self.large.of(small))
        if why:
            layers = ", ".join(repr(name) for name, _ in plan[:4]) + (", ..." if plan[4:] else "")
            raise RemovalError(
                f"removing channels of {layers} {why}, so nothing was removed. Either they are not "
                "zero in the weights that the model has now (an averaging or schedule-free "
                "optimizer keeps others), or this network answers their zeros with more than zeros"
            )

    def _differs(self, small: nn.Module) -> str | None:
        large, example = self.large.model, self.large.example
        try:
            left = running.outputs(small, example)
        except Exception as cause:
            return f"leaves a model that cannot run ({first_line(cause)})"
        moved = comparing.rounding(large, example, self.large.outputs)
        why = comparing.unlike(self.large.outputs, left, moved, doubts=False)
        trained = running.outputs_in_training(large, example)
        if why or trained is None:
            return why
        left_in_training = running.outputs_in_training(small, example)
        if left_in_training is None:
            return "leaves a model that cannot run in training mode"
        if trained.draws:  # of other shapes in a small model
            return None
        moved = comparing.rounding(large, example, trained, training=True)
        why = comparing.unlike(trained, left_in_training, moved, doubts=False)
        return f"{why}, in training mode" if why else None


def set_to_zero(model: nn.Module, example: Any, plan: Plan, build: Build = tracing.build) -> None:
    """Set the channels of one removal to zero, in place, with all that has to go with them."""
    by = _fitting(build, plan)
    for name, table in graph.tables(model, example, [name for name, _ in plan], by).items():
        zero(table, table.structures_of(dict(plan)[name]))


@torch.no_grad()
def zero(
    table: UpstreamGroup, structures: Sequence[int], of: Callable[[Tensor], Tensor] = lambda p: p
) -> None:
    """Set some structures to zero, in the parameters that ``of`` gives for the group's own."""
    for share in table.shares:
        positions = torch.tensor(
            [p for k in structures for p in share.index[k]], dtype=torch.int64, device="cpu"
        )
        parameter = of(share.parameter)
        parameter.index_fill_(share.dim, positions.to(parameter.device), 0)


def separate(plan: Plan) -> Iterator[Plan]:
    """Split a plan into successive removals, in each of which a layer occurs once.

    A layer that occurs again begins the next one; without any channels, it does nothing else.
    """
    part: Plan = []
    for name, channels in plan:
        if any(name == other for other, _ in part):
            yield part
            part = []
        if channels:
            part.append((name, channels))
    if part:
        yield part


def take_out(model: nn.Module, example: Any, plan: Plan, build: Build = tracing.build) -> None:
    """Remove channels from a model, in place, without comparing its outputs.

    Raises:
        UnsupportedLayerError: upstream cannot remove this; the model is as it was.
    """
    trained = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    with _whole_or_not(model):
        for part in separate(plan):
            built = _fitting(build, part)(model, example)
            with tracing.upstream(model):
                _apply_whole(built, model, part)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # upstream makes new ones that train


def _fitting(build: Build, plan: Plan) -> Build:
    """The graph for a removal, which follows attentions itself that lose parts of their heads."""

    def fitting(model: nn.Module, example: Any) -> Any:
        built = build(model, example)
        built.heads = built.heads.whole_in(plan)
        return built

    return fitting


def _apply_whole(built: Any, model: nn.Module, part: Plan) -> None:
    """One removal, of whole structures, that leaves something of every layer."""
    graph.require_whole(built, model, part)
    had = {n for n, p in model.named_parameters(remove_duplicate=False) if p.numel()}
    apply(built, model, gathered(built, model, part))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in had and not parameter.numel():
            raise UnsupportedLayerError(
                f"the removal leaves nothing of {name!r}; leave the channels out of the plan that "
                "lead there"
            )


def gathered(built: Any, model: nn.Module, plan: Plan) -> list[tuple[Any, list[int]]]:
    """All that one removal takes, by a model's graph: each dependency, with its positions."""
    taken: dict[tuple[Any, Any], tuple[Any, set[int]]] = {}
    for name, channels in plan:
        layer = model.get_submodule(name)
        heads = built.heads.of(name)
        if heads is not None:
            act = _Act(layer, partial(heads.remove, model))
            gone = heads.structures_of(channels)  # once, also if several of their layers are named
            taken.setdefault((id(heads.parts), None), (act, set()))[1].update(gone)
            continue
        for dep, idxs in graph.whole(built, layer, channels).items:
            taken.setdefault((dep.target, dep.handler), (dep, set()))[1].update(idxs)
    for heads in built.counted.heads:
        layer = model.get_submodule(heads.root)
        for dep, positions in list(taken.values()):
            if dep.target.module is layer and built.is_out_channel_pruning_fn(dep.handler):
                with suppress(UnsupportedLayerError):  # parts of heads
                    gone = heads.structures_of(sorted(positions))
                    act = _Act(layer, partial(heads.count_without, model))
                    taken[id(heads.parts), None] = (act, set(gone))
    return [(dep, sorted(positions)) for dep, positions in taken.values()]


@dataclass
class _Act:
    """What happens to whole heads of a layer, in the form of upstream's dependencies.

    Attributes:
        layer: computes heads.
        do: called with the heads' numbers.
    """

    layer: nn.Module
    do: Callable[[Sequence[int]], None]
    handler: None = None

    @property
    def target(self) -> Any:
        """What upstream's dependencies lead to."""
        return SimpleNamespace(module=self.layer)

    def __call__(self, heads: Sequence[int]) -> None:
        """Do it."""
        self.do(heads)


def apply(built: Any, model: nn.Module, taken: Sequence[tuple[Any, list[int]]]) -> None:
    """Take positions out of a model's layers; the graph still describes the model as it was.

    Raises:
        UnsupportedLayerError: layers that share a parameter would lose different parts of it.
    """
    layers = set(model.modules())
    tied = shared_parameters(model)
    for dep, positions in taken:
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            parent, _, last = built._param_to_name[module].rpartition(".")
            setattr(model.get_submodule(parent), last, dep(positions))
        elif module in layers:
            dep(positions)
    for names in tied:
        _tie(model, names)
    adapt = getattr(built, "adapt", None)
    if adapt is not None:
        adapt(model)


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several, because layers share it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [n for n in names.values() if len(n) > 1]


def _tie(model: nn.Module, names: Sequence[str]) -> None:
    """Let layers share a parameter again after each has lost the same part of it."""
    parameter = model.get_parameter(names[0])
    for name in names[1:]:
        other = model.get_parameter(name)
        if other is parameter:
            continue
        if other.shape != parameter.shape or not torch.equal(other, parameter):
            raise UnsupportedLayerError(
                f"{names[0]!r} and {name!r} are one parameter, of which the two layers would lose "
                "different parts"
            )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, parameter)


def one_by_one(model: nn.Module, example: Any, plan: Plan) -> Iterator[str]:
    """Remove each item of a plan alone, yield its layer's name, and put the model back."""
    built = tracing.build(model, example)
    for item in plan:
        kept = running.parts(model)
        try:
            with tracing.upstream(model):
                apply(built, model, gathered(built, model, [item]))
            yield item[0]
        finally:
            running.put_back(kept)


@contextmanager
def _put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Put a model back to what it was if the code inside fails."""
    kept = running.parts(model)
    try:
        yield
    except BaseException:
        running.put_back(kept)
        raise


@contextmanager
def _whole_or_not(model: nn.Module) -> Iterator[None]:
    """The same, where upstream takes channels away: whatever it fails on is an error of ours."""
    try:
        with _put_back_on_failure(model):
            yield
    except UnsupportedLayerError:
        raise
    except Exception as cause:
        raise UnsupportedLayerError(
            f"upstream cannot remove these channels ({first_line(cause)}); leave out of the "
            "plan what leads there"
        ) from cause


def survivors(
    model: nn.Module, example: Any, plan: Plan, build: Build = tracing.build
) -> dict[str, list[Tensor]]:
    """Which positions of every parameter :func:`take_out` would leave.

    It is tried on a copy in which the value of every element is its own position, so the answer
    holds whatever upstream does inside. Its graph is read before, with the model's own values.

    Args:
        model: left as it is.
        example: of its inputs, on its device.
        plan: what would be removed.
        build: gives the graph to go by.

    Returns:
        By the parameter's name (each of them, where layers share one): for each of its dimensions
        the positions that stay, (N,) on the host.

    Raises:
        UnsupportedLayerError: what stays of a parameter is not whole rows and columns of it.
    """
    trial = running.copied(model)

    def parameters() -> dict[str, nn.Parameter]:
        return dict(trial.named_parameters(remove_duplicate=False))

    shapes = {n: p.shape for n, p in parameters().items()}
    own = {n: p.detach().flatten() for n, p in model.named_parameters(remove_duplicate=False)}
    codes = {
        n: torch.arange(shape.numel(), device="cpu").view(shape) for n, shape in shapes.items()
    }
    for part in separate(plan):
        for name, parameter in parameters().items():  # what runs may depend on the values
            parameter.grad = None
            parameter.data = own[name][codes[name].to(parameter.device)]
        built = _fitting(build, part)(trial, example)
        for name, parameter in parameters().items():
            parameter.data = codes[name].double().to(parameter.device)  # exact to 2^53
        with _whole_or_not(trial), tracing.upstream(trial):
            _apply_whole(built, trial, part)
        codes = {n: p.detach().cpu().long() for n, p in parameters().items()}
    return {n: shares.positions(n, value, shapes[n]) for n, value in codes.items()}
