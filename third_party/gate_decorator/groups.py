"""Which gates belong together, and the view of all of them as flat tables of structures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .. import dependency, graph, running, trial
from ..groups import BATCH_NORMS, Plan, UnsupportedLayerError
from .gates import GatedBatchNorm, GateError, gated, undecorate, unfreeze


@dataclass(frozen=True, eq=False)
class GateGroup:
    """Tied gates: one structure is the same position in all members (the paper's group pruning).

    Attributes:
        name: the layer that the dependency graph roots the group in.
        tied: by structure, that layer's output channels that make it up.
        members: by the BatchNorm's module name, int64 (K, m): its m channels in each structure.
        area: positions of their feature map, such as height * width.
    """

    name: str
    tied: Sequence[Sequence[int]]
    members: Mapping[str, Tensor]
    area: int

    @property
    def structures(self) -> int:
        """K, how many structures the group has."""
        return len(self.tied)

    @property
    def channels(self) -> int:
        """How many output channels the root layer has."""
        return sum(map(len, self.tied))

    def channels_of(self, structures: Iterable[int]) -> list[int]:
        """The root's channels that make up some structures, sorted."""
        return sorted(c for k in structures for c in self.tied[k])


def tied_gates(
    model: nn.Module,
    example: Any,
    *,
    ignored: Sequence[str] = (),
    progress: Callable[[str], object] = str,
) -> list[GateGroup]:
    """The gate groups of a plain model, from its dependency graph, in the order of their roots.

    In a ResNet each stage has one group of the BatchNorms that meet in its additions (in the first
    the stem's, else the shortcut's, and every block's last); the others have a group each.

    Left out, as their gates could not silence them: groups without a BatchNorm, and groups in
    which some layer's output is read without a BatchNorm on the way (a bias-free depthwise
    convolution may follow one). Left out too are the layers that make the network's output.
    Operations between layers, activations above all, must answer zeros with zeros.

    Args:
        model: has no gates yet; stays as it is, in its mode.
        example: of its inputs, on its device: a batch of any size, several inputs in a tuple or
            list, or a mapping of arguments.
        ignored: module names of layers whose whole group is left out.
        progress: called now and then with what is going on.

    Raises:
        GateError: the model has gates, or no group is left.
        UnsupportedLayerError: a name is unknown, a layer cannot be set to zero, or a group is not
            the same at zero and removed.
    """
    if gated(model):
        raise GateError("the model has gates already; groups are those of the plain model")
    reading = graph.read(model, example, ignored)
    for why in reading.refused.values():
        raise UnsupportedLayerError(why)
    heard, areas = graph.heard_without_norm(reading, model), _areas(model, example)
    silenced = [
        g for g in reading.groups if g.root not in heard and all(m in areas for m, _, _ in g.owners)
    ]
    trial.require_exact(trial.inexact(model, example, silenced, progress))
    names = {m: n for n, m in model.named_modules()}
    tied = []
    for group in silenced:
        members = {names[m]: torch.tensor(index, device="cpu") for m, _, index in group.owners}
        area = areas[group.owners[0][0]]
        tied.append(GateGroup(group.root, group.members, members, area))
    if not tied:
        raise GateError("no group of layers is silenced by BatchNorms alone; shorten `ignored`")
    places = list(names.values())
    return sorted(tied, key=lambda g: places.index(g.name))


def _areas(model: nn.Module, example: Any) -> dict[nn.Module, int]:
    """Positions of each BatchNorm's feature map; the model stays as it is."""
    areas: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        areas[module] = output.shape[2:].numel()

    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    hooks = [m.register_forward_hook(note) for m in norms]
    try:
        with torch.no_grad():
            running.probe(model, running.first(example))
    finally:
        for hook in hooks:
            hook.remove()
    return areas


class GateTable:
    """All structures of some gate groups, numbered 0 .. S - 1 in the groups' order.

    Structure k of a group has the number ``ids(name)[k]``. A gate is a position in the
    concatenation of all gates (T of them, in the order of ``gates``).

    Args:
        groups: of :func:`tied_gates`.
        gates: of :func:`decorate`, with every member in it; others have no structures here.

    Attributes:
        groups: G of them.
        gates: the gated BatchNorms by name.
        group: int64 (S,), the position in ``groups`` that each structure belongs to.
        sizes: int64 (G,), the structures of each group.
        areas: float32 (G,), each group's feature-map area over the smallest.
        filters: int64 (S,), the gates of each structure.

    Raises:
        GateError: a member is not among the gates, or of another size.
    """

    def __init__(self, groups: Sequence[GateGroup], gates: Mapping[str, GatedBatchNorm]) -> None:
        missing = sorted({name for g in groups for name in g.members} - set(gates))
        if missing or not groups:
            raise GateError(f"no gates on {missing or 'any group'}; decorate what tied_gates names")
        self.groups, self.gates = tuple(groups), dict(gates)
        self._widths = [g.gate.numel() for g in gates.values()]
        device = next(iter(gates.values())).gate.device
        starts = dict(zip(gates, accumulate([0, *self._widths]), strict=False))
        rows = []
        for group in groups:
            for name, index in group.members.items():
                if int(index.max()) >= gates[name].gate.numel():
                    raise GateError(f"{name!r} is smaller than it was in tied_gates")
            rows.append(torch.cat([starts[n] + index for n, index in group.members.items()], 1))
        # Structures have unequal numbers of gates; the rest of a row points at a last, empty one.
        full, width = sum(self._widths), max(r.shape[1] for r in rows)
        pad = partial(nn.functional.pad, value=full)
        self._table = torch.cat([pad(r, (0, width - r.shape[1])) for r in rows]).to(device)
        self.filters = (self._table < full).sum(1)
        self.sizes = torch.tensor([g.structures for g in groups], device=device)
        self.group = torch.arange(len(groups), device=device).repeat_interleave(self.sizes)
        areas = torch.tensor([float(g.area) for g in groups], device=device)
        self.areas = areas / areas.min()
        starting = accumulate([0, *(g.structures for g in groups)])
        self._first = {g.name: n for g, n in zip(groups, starting, strict=False)}

    def ids(self, name: str, structures: Iterable[int] | None = None) -> Tensor:
        """Numbers of a group's structures (``None``: all of them), int64, on the host.

        Raises:
            GateError: there is no such group, or no such structure in it.
        """
        known = {g.name: g.structures for g in self.groups}
        wanted = list(range(known.get(name, 0)) if structures is None else structures)
        if name not in known or any(not 0 <= k < known[name] for k in wanted):
            raise GateError(f"{name!r} has no structures {wanted}; groups and sizes: {known}")
        return torch.tensor(wanted, dtype=torch.int64, device="cpu") + self._first[name]

    def split(self, ids: Tensor) -> dict[str, list[int]]:
        """Numbers as positions within groups, by group name, in the order given."""
        structures: dict[str, list[int]] = {}
        for number, position in zip(ids.tolist(), self.group[ids].tolist(), strict=True):
            name = self.groups[position].name
            structures.setdefault(name, []).append(number - self._first[name])
        return structures

    def gather(self, values: Tensor, empty: float) -> Tensor:
        """Per-gate values (T,) by structure: (S, M), with ``empty`` where there is no gate."""
        flat: Tensor = torch.cat([values, values.new_full((1,), empty)])
        return flat[self._table]

    def alive(self) -> Tensor:
        """Which structures have a gate that is not masked: bool (S,)."""
        return self.gather(torch.cat([g.mask for g in self.gates.values()]), 0).amax(1) > 0

    def kept(self, alive: Tensor) -> Tensor:
        """How many structures of each group are alive: int64 (G,)."""
        return self.group[alive].bincount(minlength=len(self.groups))

    @torch.no_grad()
    def mask(self, ids: Tensor) -> None:
        """Mask all gates of some structures for good. Gates and shifts keep their values."""
        flat = torch.cat([g.mask for g in self.gates.values()])
        flat = torch.cat([flat, flat.new_zeros(1)])
        flat[self._table[ids.to(flat.device)]] = 0
        for gate, part in zip(self.gates.values(), flat.split([*self._widths, 1]), strict=False):
            gate.mask.copy_(part)


def melt(
    model: nn.Module,
    example: Any,
    groups: Sequence[GateGroup],
    frozen: Collection[str] = (),
) -> Plan:
    """Turn a gated model into a plain one without the masked structures, in place.

    Module names are those of the plain dense model. Masked channels outside the groups stay, with
    zero weight and bias. Convolutions that a tick froze train again; make a new optimizer.

    Args:
        model: decorated.
        example: a batch of any size on the model's device.
        groups: what :func:`tied_gates` returned for the plain model.
        frozen: names of convolutions' parameters that stay frozen.

    Returns:
        What was removed: root layer's name, sorted positions in the dense layer.

    Raises:
        GateError: the groups are not those of the model, a structure is masked in some of its
            members only, or a group has no structure left; the model is untouched.
        RemovalError: the plain model would not compute what the gated one does; it is untouched.
    """
    plan = _plan(model, groups)
    # In double precision: the real one rounds gate * shift to its own, which is no fault.
    before = dependency.Comparison(model, example)
    plain = before.large.of(model)
    undecorate(plain)
    dependency.take_out(plain, before.large.example, plan)
    before.require_same(plain, plan)
    unfreeze(model, frozen)
    undecorate(model)
    dependency.take_out(model, example, plan)
    return plan


def survivors(
    model: nn.Module, example: Any, groups: Sequence[GateGroup]
) -> dict[str, list[Tensor]]:
    """What :func:`melt` will leave: by parameter of the plain model, the positions by dimension.

    Raises:
        GateError: as :func:`melt`.
    """
    plain = running.copied(model)
    undecorate(plain)
    return dependency.survivors(plain, example, _plan(model, groups))


def _plan(model: nn.Module, groups: Sequence[GateGroup]) -> Plan:
    """The masked structures, by root layer: sorted positions in the dense layer."""
    table = GateTable(groups, gated(model))
    masks = torch.cat([g.mask for g in table.gates.values()])
    alive = table.alive()
    torn = (alive & (table.gather(masks, 1).amin(1) == 0)).nonzero()[:, 0]
    if len(torn):
        raise GateError(f"structures {table.split(torn)} are masked in some members only; mask all")
    empty = [g.name for g, n in zip(groups, table.kept(alive).tolist(), strict=True) if n == 0]
    if empty:
        raise GateError(f"groups {empty} have no structure left; unmask one in each")
    gone = table.split((~alive).nonzero()[:, 0])
    return [(g.name, g.channels_of(gone[g.name])) for g in groups if g.name in gone]
