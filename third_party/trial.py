"""Trying a removal before anything decays: are structures at zero the same as structures removed?

They are not where the graph loses track of channels, or where something answers zeros with more
than zeros. The trial is on a copy with random weights, because weights that have not learnt
anything yet may hide a difference. It takes several draws of structures, with unequal shares of
halves and thirds, so that no two mistakes cancel. All of this is ours.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpm_core.errors import kind_and_line

from . import comparing, dependency, graph, parting, running, tracing, trial_values
from .groups import UnsupportedLayerError, UpstreamGroup, named

ROWS = 2
"""How many samples of the example are enough; ours."""
Subset = Callable[[int, torch.Generator], list[int]]
"""Draws some of a number of structures: at least one, never all."""
REASONS = (
    ": the dependency graph takes its channels for others on their way, as where they are put into "
    "another order, or something answers their zeros with more than zeros"
)


def exact_groups(
    model: nn.Module,
    example: Any,
    ignored: Sequence[str | nn.Module] = (),
    *,
    skip_unsupported: bool = False,
    tried: bool = False,
    progress: Callable[[str], object] = str,
    unfit: Callable[[graph.Reading, UpstreamGroup], str | None] = lambda *_: None,
) -> tuple[graph.Reading, dict[str, str]]:
    """A network's groups, all tried out, and why the others are left out, by their root.

    Parts that the example does not run are named as well: they are as they were after a removal.

    Where a group is left out, its other layers are asked anew, without the root: what upstream then
    takes for a group has been tried as well.

    Args:
        model: stays as it is, in its mode.
        example: of its inputs, on its device.
        ignored: layers, or their names, to leave out besides those that make the output.
        skip_unsupported: leave out groups that would be refused.
        tried: whether they were tried out before, and none was at fault.
        progress: called now and then with what is going on.
        unfit: another reason to leave a group out, in words that follow its name, or ``None``;
            asked with ``skip_unsupported``.

    Raises:
        UnsupportedLayerError: naming a group that is not the same at zero and removed, and why.
    """
    reading = graph.read(model, example, ignored)
    if not skip_unsupported:
        for why in reading.refused.values():
            raise UnsupportedLayerError(why)
        require_exact({} if tried else inexact(model, example, reading.groups, progress))
        return reading, graph.unreached(reading.graph, model)
    left_out: dict[str, str] = {}
    named_with: set[str] = set()
    exact: list[Any] = []
    while True:
        fresh = [g for g in reading.groups if _facts(g) not in exact]
        reasons = {g.root: unfit(reading, g) for g in fresh}
        odd = {root: why for root, why in reasons.items() if why is not None}
        if not tried:
            odd |= inexact(model, example, [g for g in fresh if g.root not in odd], progress)
        exact += [_facts(g) for g in fresh if g.root not in odd]
        refused = reading.refused | {root: named(root, why) for root, why in odd.items()}
        named_with |= {layer for layers in reading.layers.values() for layer in layers}
        named_with |= {layer for g in fresh if g.root in odd for layer in g.layers}
        if refused.keys() <= left_out.keys():
            for root, other in reading.beside.items():
                if other in left_out and root not in named_with:
                    why = f"has channels of {other!r} in it, whose group is left out"
                    left_out[root] = named(root, why)
            return reading, left_out | graph.unreached(reading.graph, model)
        left_out |= refused
        without = graph.ignored_layers(model, [*ignored, *left_out])
        reading = graph.read_built(reading.graph, model, without)


def _facts(group: UpstreamGroup) -> Any:
    """What tells a group from another one of the same network."""
    return group.root, [(s.name, s.dim, s.index) for s in group.shares]


def require_exact(odd: dict[str, str]) -> None:
    """Refuse the groups that :func:`inexact` reports.

    Raises:
        UnsupportedLayerError: naming the first such group, why, and the remedy.
    """
    for root, why in odd.items():
        raise UnsupportedLayerError(named(root, why))


def inexact(
    model: nn.Module,
    example: Any,
    groups: Sequence[UpstreamGroup],
    progress: Callable[[str], object] = str,
    build: dependency.Build = tracing.build,
) -> dict[str, str]:
    """The groups for which removing structures is not the same as setting them to zero.

    Args:
        model: what the groups are of; left as it is.
        example: of its inputs, on its device.
        groups: those of :func:`dpm_core.third_party.graph.read`, or another upstream's.
        progress: called now and then with what is going on.
        build: gives the graph that removals go by, of a copy of the model.

    Returns:
        By the group's root why, in words that follow its name; empty if none is at fault.
    """
    # Layers of one kind side by side: mostly all of them are at fault, or none.
    groups = sorted((g for g in groups if g.structures > 1), key=lambda g: _kind(g.root))
    if not groups:
        return {}
    trial = Trial(model, example, groups, build)
    if trial.draws_in_training:
        progress("not compared in training mode, in which the forward pass draws other than means")
    faults = {g.root: trial.unfelt(g) or trial.parts_ties(g) for g in groups}
    odd = {root: why for root, why in faults.items() if why is not None}
    while left := [g for g in groups if g.root not in odd]:
        progress(f"trying out {len(left)} groups of channels")
        for subset in _SUBSETS:
            why = trial.unlike(left, subset)
            if why is not None:
                break
        else:
            break
        culprits = dict(_culprits(trial, left, subset, progress))
        together = f"{why}, if all groups are removed together{REASONS}"
        odd |= culprits or dict.fromkeys((g.root for g in left), together)
    return {g.root: odd[g.root] for g in groups if g.root in odd}


def _kind(root: str) -> str:
    return re.sub(r"\d+", "#", root)


def _culprits(
    trial: Trial,
    groups: Sequence[UpstreamGroup],
    subset: Subset,
    progress: Callable[[str], object],
) -> Iterator[tuple[str, str]]:
    """Which of some groups are at fault by themselves, searched by halving."""
    half = len(groups) // 2
    for part in (groups[:half], groups[half:]) if half else (groups,):
        progress(f"trying out {part[0].root!r}" + (f" to {part[-1].root!r}" if part[1:] else ""))
        why = trial.unlike(part, subset)
        if why is not None and len(part) > 1:
            yield from _culprits(trial, part, subset, progress)
        elif why is not None:
            checked = not why.startswith("cannot be checked")
            yield part[0].root, why + (trial.reason(part[0], subset) if checked else "")


class Trial:
    """A copy of a model, of which parts can be removed and put back.

    It computes in double precision if the model can, else in its own.

    Args:
        model: left as it is.
        example: of its inputs, on its device.
        groups: of it.
        build: gives the graph that removals go by.

    Attributes:
        draws_in_training: whether the outputs in training mode are not compared, because they
            depend on draws other than dropout's, and uniform and normal ones, in which it is run.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        groups: Sequence[UpstreamGroup],
        build: dependency.Build = tracing.build,
    ) -> None:
        tracing.require_plain_weights(model)
        example = running.informative(example)
        double = True
        try:
            self._copy(model, running.first(example, ROWS), groups, build, double)
        except Exception:  # rows that are no samples, or a layer that insists on its own precision
            few = running.shortened(model, example, ROWS)
            double = running.Precision(model, few).double
            self._copy(model, few, groups, build, double)
        layers = (self._model.get_submodule(g.root) for g in groups if not g.heads)
        if any(layer not in self._graph.module2node for layer in layers):  # few rows run fewer
            self._copy(model, example, groups, build, double)
        dense, again = self._dense, running.outputs(self._model, self._example)
        self._rounding = comparing.rounding(self._model, self._example, dense)
        # Not as measured: if passes differ, that is in the measurement.
        little = [
            replace(measured, moved=10 * dense.eps * measured.size) for measured in self._rounding
        ]
        differs = comparing.unlike(dense, again, little, doubts=False)
        if differs is not None and "finite" not in differs:
            raise UnsupportedLayerError(
                f"the model is not the same from pass to pass: running it again {differs}. Nothing "
                "can be said of a removal; give it in a state in which it answers the same example "
                "alike"
            )
        training = running.outputs_in_training(self._model, self._example)
        self._in_training = None if training is None or training.draws else training
        if self._in_training is not None:
            self._rounding_in_training = comparing.rounding(
                self._model, self._example, self._in_training, training=True
            )
        self._runs_in_training = training is not None
        self.draws_in_training = training is not None and bool(training.draws)
        self._silent = self._without_effect()

    def _copy(
        self,
        model: nn.Module,
        example: Any,
        groups: Sequence[UpstreamGroup],
        build: dependency.Build,
        double: bool,
    ) -> None:
        """Copy a model, read its graph in its own type, and draw weights."""
        copies: dict[int, Any] = {}
        self._model = running.copied(model, copies).eval()
        self._graph = build(self._model, example)
        if double:
            self._model.double()
        self._example = running.doubled(example) if double else example
        self._own = {id(s.parameter): copies[id(s.parameter)] for g in groups for s in g.shares}
        trial_values.draw_values(self._model, self._example)
        self._keeps = trial_values.settle(self._model, self._example)
        self._dense = running.outputs(self._model, self._example)

    def _without_effect(self) -> set[nn.Module]:
        """Layers whose weights have no effect on any output for the example, by the gradients."""
        own = [p for p in self._model.parameters() if p.is_floating_point()]
        try:
            with tracing.upstream(self._model):
                given = running.tensors(running.probe(self._model, self._example))
                real = [t for t in given if t.is_floating_point() and t.requires_grad]
                draw = torch.Generator().manual_seed(0)
                total = torch.zeros((), dtype=torch.float64, device="cpu")
                for t in real:
                    weights = torch.rand(t.shape, generator=draw, device="cpu").to(t) + 0.5
                    total = total + torch.where(t.isfinite(), t * weights, 0.0).sum().cpu().double()
                gradients = torch.autograd.grad(total, own, allow_unused=True)
        except (RuntimeError, NotImplementedError):  # something without a gradient
            return set()
        felt = {p for p, g in zip(own, gradients, strict=True) if g is not None and bool(g.any())}
        layers = ((m, list(m.parameters(recurse=False))) for m in self._model.modules())
        return {m for m, ps in layers if ps and felt.isdisjoint(ps)}

    def unfelt(self, group: UpstreamGroup) -> str | None:
        """Why a group cannot be checked, if a layer that it passes through has no effect."""
        with tracing.upstream(self._model):
            plan = [(group.root, group.channels_of(range(group.structures)))]
            try:  # what the removal will ask
                tied = dict(graph._tables(self._graph, self._model, [group.root]))
                touched = dependency.gathered(self._graph, self._model, plan)
            except UnsupportedLayerError as why:
                return f"cannot be removed: {why.__cause__ or why}"
        of = group.structure_of()
        for together in tied[group.root].members:
            if len({of.get(c) for c in together}) > 1:
                return (
                    f"cannot be removed in these structures: its channels {together[:8]} only go "
                    "together"
                )
        names = {m: n for n, m in self._model.named_modules()}
        layers = [dep.target.module for dep, _ in touched]
        layers += [self._model.get_submodule(name) for name in group.layers]
        for layer in layers:
            if layer in self._silent:
                return (
                    f"cannot be checked: {names[layer]!r}, which it passes through, "
                    "changes no output for the example. Give an example, or the model in a state, "
                    "in which it does"
                )
        return None

    @torch.no_grad()
    def unlike(self, groups: Sequence[UpstreamGroup], subset: Subset) -> str | None:
        """What is wrong with removing a subset of some groups' structures, or ``None``.

        The words follow the groups' names.
        """
        chosen = {g.root: subset(g.structures, _seeded(g.root)) for g in groups}
        kept, mode = running.parts(self._model), ""
        try:
            self._remove(groups, chosen)
            removed = running.outputs(self._model, self._example)
            if self._runs_in_training and subset is _anywhere:
                mode = ", in training mode"
                in_training = running.outputs(self._model, self._example, training=True)
        except Exception as cause:  # whatever the removal of other channels than these breaks
            keeps = ", ".join(map(repr, self._keeps[:4])) + (", ..." if self._keeps[4:] else "")
            state = f"; the model keeps {keeps} from call to call, maybe as wide" if keeps else ""
            return f"cannot be removed ({kind_and_line(cause)}{state}){mode}"
        finally:
            running.put_back(kept)
        with self._at_zero(groups, chosen):
            try:
                zeroed = running.outputs(self._model, self._example)
            except Exception as cause:  # a network that wants values other than zero
                return f"cannot run with channels at zero ({kind_and_line(cause)})"
            why = self._differs(zeroed, removed)
            if why is None and self._in_training is not None and subset is _anywhere:
                other = running.outputs(self._model, self._example, training=True)
                why = self._differs(other, in_training, training=True)
                why = f"{why}, in training mode" if why else None
        if why is None or why.startswith("cannot be checked"):
            return why
        return f"gives different outputs at zero and removed: its removal {why}"

    def _differs(
        self, zeroed: running.Outputs, removed: running.Outputs, training: bool = False
    ) -> str | None:
        """How outputs differ by more than rounding; the model is at zero, as in the first of them.

        Rounding is measured in the whole network, for all subsets at once. What is next to nothing
        there, in the tail of a sigmoid, say, may not be so at zero; so a difference is looked at
        again by what rounding does here.
        """
        measured = self._rounding_in_training if training else self._rounding
        why = comparing.unlike(zeroed, removed, measured, doubts=not training)
        if why is None or why.startswith("cannot be checked"):
            return why
        here = comparing.rounding(self._model, self._example, zeroed, training=training)
        return why if comparing.unlike(zeroed, removed, here, doubts=True) else None

    @torch.no_grad()
    def reason(self, group: UpstreamGroup, subset: Subset) -> str:
        """Why a removal is wrong, by the first module at which the outputs part; or in general.

        The words follow those of :meth:`unlike`.
        """
        chosen = {group.root: subset(group.structures, _seeded(group.root))}
        for training in (False, True) if self._runs_in_training else (False,):
            why = self._parting(group, chosen, training)
            if why is not None:
                return f": {why}"
        return REASONS

    def _parting(
        self, group: UpstreamGroup, chosen: dict[str, list[int]], training: bool
    ) -> str | None:
        with parting.followed(self._model) as removed:
            kept = running.parts(self._model)
            try:
                self._remove([group], chosen)
                removed.clear()
                running.outputs(self._model, self._example, training=training)
            except Exception:  # as it is reported
                if not removed:
                    return None
            finally:
                running.put_back(kept)
        with parting.followed(self._model) as zeroed, self._at_zero([group], chosen):
            try:
                running.outputs(self._model, self._example, training=training)
            except Exception:  # as it is reported
                return None
        return parting.cause(self._model, zeroed, removed)

    def _remove(self, groups: Sequence[UpstreamGroup], chosen: dict[str, list[int]]) -> None:
        with tracing.upstream(self._model):
            plan = [(g.root, g.channels_of(chosen[g.root])) for g in groups]
            taken = dependency.gathered(self._graph, self._model, plan)
            dependency.apply(self._graph, self._model, taken)

    def parts_ties(self, group: UpstreamGroup) -> str | None:
        """Why a group cannot be removed alone from layers that share a parameter, or ``None``.

        Removed with other groups it may seem exact, if both layers happen to lose the same part.
        """
        if not dependency.shared_parameters(self._model):
            return None
        kept = running.parts(self._model)
        try:
            self._remove([group], {group.root: [0]})
        except UnsupportedLayerError as why:
            return f"cannot be removed alone: {why}"
        except Exception:  # the trial with all others will report it
            return None
        finally:
            running.put_back(kept)
        return None

    @contextmanager
    def _at_zero(
        self, groups: Sequence[UpstreamGroup], chosen: dict[str, list[int]]
    ) -> Iterator[None]:
        shares = [s for g in groups for s in g.shares]
        own = {id(p): p for p in (self._own[id(s.parameter)] for s in shares)}
        values = [(p, p.clone()) for p in own.values()]
        for group in groups:
            dependency.zero(group, chosen[group.root], lambda p: self._own[id(p)])
        try:
            yield
        finally:
            for parameter, value in values:
                parameter.copy_(value)


def _seeded(root: str) -> torch.Generator:
    """A group's own random draws, which do not depend on what else is tried."""
    return torch.Generator().manual_seed(zlib.crc32(root.encode()))


def _some(count: int, share: float, draw: torch.Generator) -> list[int]:
    """A drawn subset of ``range(count)``, neither empty nor all of it (1 gives none)."""
    order = torch.rand(count, generator=draw, device="cpu")
    return order.argsort()[: max(1, min(count - 1, round(share * count)))].sort().values.tolist()


def _anywhere(count: int, draw: torch.Generator) -> list[int]:
    """Some between the ends: if only the ends went, all the others would keep their neighbours."""
    share = float(torch.empty((), device="cpu").uniform_(0.3, 0.7, generator=draw))
    ends = 1 if count > 2 else 0
    return [ends + k for k in _some(count - 2 * ends, share, draw)]


def _early(count: int, draw: torch.Generator) -> list[int]:
    """Most of the first two fifths: more of one half, and of one third, than of the others."""
    part = max(1, round(0.4 * count))
    order = torch.rand(part, generator=draw, device="cpu").argsort()
    return order[: max(1, round(0.8 * part))].sort().values.tolist()


def _late(count: int, draw: torch.Generator) -> list[int]:
    """Most of them near the end, and a few elsewhere where there are many."""
    part = max(1, round(0.3 * count))
    last = [count - 1 - k for k in (_some(part, 0.7, draw) if part > 1 else [0])]
    first = _some(count - part, 0.1, draw) if count >= 10 else []
    return sorted({*last, *first})


def _most(count: int, draw: torch.Generator) -> list[int]:
    """All but one: what is left may be fewer channels than the forward pass splits."""
    return _some(count, 1.0, draw)


_SUBSETS = (_anywhere, _early, _late, _most)
