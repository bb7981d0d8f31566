"""A network's groups by torch-pruning 1.6.1, as index tables, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import heads, norms, shares, tracing, walk
from .groups import BATCH_NORMS, Plan, Share, UnsupportedLayerError, UpstreamGroup, named
from .maps import Meeting
from .upstreams import require
from .walk import EndlessWalkError, roots

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)


@dataclass
class Reading:
    """A network's groups, as index tables.

    Attributes:
        graph: upstream's.
        outputs: names of the layers whose outputs leave the network; their channels stay.
        groups: of structures that may be zeroed and removed, as far as the graph can tell.
        refused: why other groups may not, by their root.
        layers: names of the layers that a refused group takes output channels of, by its root.
        beside: an ignored layer that a group has channels of, by the group's root.
    """

    graph: Any
    outputs: list[str] = field(default_factory=list)
    groups: list[UpstreamGroup] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)


def read(model: nn.Module, example: Any, ignored: Collection[str | nn.Module] = ()) -> Reading:
    """All groups of a network but those of ignored layers and of its outputs.

    Only output positions are listed: they are disjoint between groups and, at zero, leave nothing
    for the consumers' inputs to read.

    Args:
        model: stays as it is, in its mode.
        example: of its inputs, on its device: a tensor, several, or a mapping of arguments.
        ignored: layers, or their names; all inside them is ignored, too.

    Raises:
        UnsupportedLayerError: the network cannot be traced at all, or an ignored name is unknown.
    """
    left = ignored_layers(model, ignored)  # or a name is refused before the model is traced
    return read_built(tracing.build(model, example), model, left)


def ignored_layers(model: nn.Module, ignored: Collection[str | nn.Module]) -> set[nn.Module]:
    """The layers to ignore, which are given as names or as layers, with all that is in them.

    Raises:
        UnsupportedLayerError: one is no layer of the model.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    names = tracing.names_of(model)
    found: set[nn.Module] = set()
    for given in ignored:
        name = names.get(given, given) if isinstance(given, nn.Module) else given
        if name not in layers:
            what = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
            raise UnsupportedLayerError(f"ignored names {what}, which is no layer of the model")
        found.update(layers[name].modules())
    return found


def read_built(built: Any, model: nn.Module, inside: Collection[nn.Module]) -> Reading:
    """The groups in a graph of a model, without those of the layers ``inside``."""
    reading = Reading(built)
    names = tracing.names_of(model)
    apart = {model.get_submodule(name) for name in built.heads.layers}
    with tracing.upstream(model):
        for root, group, cause in _walks(reading.graph, apart | set(inside)):
            name = names[root]
            if cause is not None:
                where = tracing.place(cause, model) or "on from there"
                reading.refused[name] = named(
                    name,
                    f"cannot be read: torch-pruning loses its channels {where} "
                    f"({type(cause).__name__}: {cause}); reshapes other than flattens, such as "
                    "a channel shuffle, are not known to it",
                )
                continue
            produced = [
                i.dep.target
                for i in group.items
                if reading.graph.is_out_channel_pruning_fn(i.dep.handler)
            ]
            if any(_leaves(reading.graph, node) for node in produced):
                reading.outputs += [names[n.module] for n in produced if n.module in names]
                continue
            others = [n.module for n in produced if n.module in names and n.module is not root]
            left = next((names[m] for m in others if m in inside), None)
            if left is not None:
                reading.beside[name] = left
                continue
            try:
                for node in produced:
                    if node.module in apart:
                        raise UnsupportedLayerError(
                            f"is added to, or multiplied with, the heads of {names[node.module]!r}"
                        )
                reading.groups.append(_table(reading.graph, group, names))
            except UnsupportedLayerError as why:
                listed = [names[m] for m in others if isinstance(m, roots())]
                reading.layers[name] = [name, *listed]
                too = f"; {tracing.listed(listed)} would lose channels, too" if listed else ""
                reading.refused[name] = named(name, f"{why}{too}")
    _add_heads(reading, model, {names[m] for m in inside if m in names})
    reading.outputs = sorted(set(reading.outputs))
    for name, shared in _overlapping(reading.groups).items():
        reading.refused[name] = named(name, shared)
    reading.groups = [g for g in reading.groups if g.root not in reading.refused]
    return reading


def unreached(built: Any, model: nn.Module) -> dict[str, str]:
    """Parts of a model that a pass on the example does not use, or of which no trace is found.

    Returns:
        By the name of the outermost module of each such part: why it is left as it is.
    """
    idle: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in idle):
            continue
        weight = getattr(module, "weight", None)
        if (
            heads.weight_dims(module) is not None
            and module in built.ran
            and module not in built.module2node
            and weight in built.felt
        ):
            idle[name] = (
                f"{name!r} runs, but autograd's graph does not show where its output goes, so it "
                "keeps all its channels: let its forward pass return what is used of it"
            )
            continue
        inside = list(module.parameters())
        if not any(p.is_floating_point() for p in inside) or any(p in built.felt for p in inside):
            continue
        if built.ran.isdisjoint(module.modules()):
            idle[name] = (
                f"{name!r} has no part in the outputs for this example, so it keeps all its "
                "channels. If other inputs, or a training, run it on channels that go, it cannot "
                "run afterwards: give an example that runs it, or name in `ignored` what it reads"
            )
    return idle


def _add_heads(reading: Reading, model: nn.Module, inside: Collection[str]) -> None:
    """The groups of attention heads, but for those with a layer ``inside``."""
    found = reading.graph.heads
    for one in found.heads:
        if one.layers.isdisjoint(inside):
            reading.groups.append(one.group(model))
    for name, why in found.refused.items():
        if name not in inside:
            reading.refused[name] = named(name, why)


def _overlapping(groups: Sequence[UpstreamGroup]) -> dict[str, str]:
    """Groups that have the same part of a shared parameter: by root, why they are refused."""
    shares_of: dict[Tensor, list[tuple[UpstreamGroup, Share]]] = {}
    refused: dict[str, str] = {}
    for group in groups:
        for share in group.shares:
            here = shares_of.setdefault(share.parameter, [])
            mine = {p for positions in share.index for p in positions}
            for other, theirs in here:
                taken = {p for positions in theirs.index for p in positions}
                apart = share.dim == theirs.dim and mine.isdisjoint(taken)
                if other is group or apart:
                    continue
                for one, with_whom in ((group, other), (other, group)):
                    refused[one.root] = (
                        f"shares {share.name!r} with the group of {with_whom.root!r}, so it cannot "
                        "be decayed or removed by itself"
                    )
            here.append((group, share))
    return refused


def tables(
    model: nn.Module,
    example: Any,
    roots: Iterable[str],
    build: Callable[[nn.Module, Any], Any] = tracing.build,
) -> dict[str, UpstreamGroup]:
    """The groups that some layers belong to, by the layers' names, whatever their root is.

    Raises:
        UnsupportedLayerError: naming a layer whose group cannot be read, and why.
    """
    built = build(model, example)
    with tracing.upstream(model):
        return dict(_tables(built, model, roots))


def _tables(built: Any, model: nn.Module, of: Iterable[str]) -> Iterator[tuple[str, UpstreamGroup]]:
    names, kinds = tracing.names_of(model), getattr(built, "roots", roots())
    layers: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for name in of:
        of_heads = built.heads.of(name)
        if of_heads is not None:
            yield name, of_heads.group(model)
            continue
        layer: Any = layers.get(name)
        if not isinstance(layer, kinds):
            raise UnsupportedLayerError(f"{name!r} is no convolution or linear layer of the model")
        if layer not in built.module2node:
            raise UnsupportedLayerError(f"{name!r} {walk.missing(built, layer)}")
        channels = range(built.get_pruner_of_module(layer).get_out_channels(layer))
        try:
            yield name, _table(built, whole(built, layer, channels), names)
        except UnsupportedLayerError as why:
            raise UnsupportedLayerError(named(name, str(why))) from why


def require_whole(built: Any, model: nn.Module, plan: Plan) -> None:
    """Refuse channels of a layer that cannot be removed without others.

    Raises:
        UnsupportedLayerError: naming the layer, and the missing channels.
    """
    tables = _tables(built, model, [name for name, _ in plan])
    for (_, table), (_, channels) in zip(tables, plan, strict=True):
        table.structures_of(channels)


def _walks(built: Any, inside: Collection[nn.Module]) -> Iterator[tuple[nn.Module, Any, Any]]:
    """Upstream's groups with all their channels: (root, group, None) or (root, None, error)."""
    visited: set[nn.Module] = set()
    modules: list[nn.Module] = list(built.module2node)
    for module in modules:
        if not isinstance(module, roots()) or module in inside or module in visited:
            continue
        prune = built.get_pruner_of_module(module)
        try:
            channels = range(prune.get_out_channels(module))
            group = built.get_pruning_group(module, prune.prune_out_channels, list(channels))
        except Exception as cause:  # whatever upstream stumbles over in this group
            yield module, None, cause
            continue
        for item in group.items:
            if built.is_out_channel_pruning_fn(item.dep.handler):
                visited.add(item.dep.target.module)
        yield module, group, None


def _leaves(built: Any, node: Any) -> bool:
    """Whether a node's output is one of the network's."""
    return bool(
        not node.outputs or node.type == tp.ops.OPTYPE.OUTPUT or node.grad_fn in built.put_out
    )


def whole(built: Any, layer: nn.Module, channels: Sequence[int]) -> Any:
    """Upstream's group of some output channels of a layer."""
    prune = built.get_pruner_of_module(layer).prune_out_channels
    return built.get_pruning_group(layer, prune, list(channels))


def _table(
    built: Any, group: Any, names: Mapping[nn.Module, str], ties: Sequence[Meeting] = ()
) -> UpstreamGroup:
    """One group as index tables; a refusal's message follows "the group of ..."."""
    tied = members(built, group, ties)
    table = UpstreamGroup(names[group[0].dep.target.module], tied)
    of = torch.empty(table.channels, dtype=torch.int64, device="cpu")
    for structure, channels in enumerate(tied):
        of[channels] = structure
    rows: dict[Any, list[Meeting]] = {}
    for node, handler in group.met:
        if built.is_out_channel_pruning_fn(handler):
            rows.setdefault(node, []).append(group.meeting((node, handler)))
        if isinstance(node.module, nn.Module) and node.module in names:
            tracing.require_no_parametrization(names[node.module], node.module)
    any_conv = any(isinstance(node.module, _ConvNd) for node in rows)
    producers: list[tuple[nn.Module, int, list[list[int]]]] = []
    norms: list[tuple[nn.Module, int, list[list[int]]]] = []
    for node, meetings in rows.items():
        module = node.module
        if isinstance(module, nn.Parameter):
            name = built._param_to_name[module]
            index = shares.by_structure(meetings, of, len(tied), name)
            dim = node.pruning_dim % module.dim()
            shares.add(table, shares.share_of(name, module, dim, False, index))
            continue
        if module not in names:
            continue  # an operation between layers
        if shares.customised(built, module):
            index = shares.by_structure(meetings, of, len(tied), names[module])
            for share in shares.probed(built, node, index, names[module]):
                shares.add(table, share)
            producers.append((module, 1 if any_conv else -1, index))
            continue
        kind = shares.kind_of(built, module, names[module])
        if kind is None:
            continue
        dims, norm = kind
        index = shares.by_structure(meetings, of, len(tied), names[module])
        for attribute, dim in dims.items():
            parameter = getattr(module, attribute)
            if parameter is not None:
                name = f"{names[module]}.{attribute}"
                shares.add(table, shares.share_of(name, parameter, dim, norm, index))
        source = isinstance(module, roots()) and not shares.depthwise(node.module)
        if source and sum(map(len, index)) != shares.width(module):
            raise UnsupportedLayerError(_partly(built, module, sum(map(len, index)), names))
        last = isinstance(module, (nn.Linear, nn.Embedding, *heads.conv1d()))
        (norms if norm else producers).append((module, -1 if last else 1, index))
    table.owners = norms or producers
    return table


def _partly(built: Any, layer: Any, tied: int, names: Mapping[nn.Module, str]) -> str:
    """Why a group has only some of a layer's channels, told by a walk from all of them."""
    width, what = shares.width(layer), names[layer]
    ties = f"ties {width} channels of {what!r} to {tied}"
    try:
        met = whole(built, layer, range(width)).met
    except EndlessWalkError as endless:
        met = endless.met
    except Exception:  # whatever upstream stumbles over from there
        met = {}
    for (node, handler), (places, _) in met.items():
        other, last = node.module, int(places.max())
        if not isinstance(other, roots()) or other not in names or last <= 0:
            continue
        out = built.is_out_channel_pruning_fn(handler)
        pruner = built.get_pruner_of_module(other)
        size = pruner.get_out_channels(other) if out else pruner.get_in_channels(other)
        if last < size:
            continue
        if size == 1:
            return f"{ties}, as where one channel is multiplied with all of another layer's"
        return (
            f"{ties}: {names[other]!r} has {size} {'outputs' if out else 'inputs'}, not "
            f"{last + 1}, so what it mixes lies along another axis than those channels, as "
            "positions do, or torch-pruning takes them for others on their way"
        )
    return (
        f"{ties}: the others go elsewhere, as where a layer's outputs are split in unequal parts, "
        "so its structures would be of several kinds"
    )


def why_one(reading: Reading, model: nn.Module, group: UpstreamGroup) -> str:
    """Why a group is one structure, in words that follow its name."""
    names = tracing.names_of(model)
    why = f"is one structure: its {group.channels} channels only go together"
    with tracing.upstream(model):
        met = whole(reading.graph, model.get_submodule(group.root), range(group.channels)).met
        for node, handler in met:
            parts, size = _parts(reading.graph, node, handler)
            if parts == size > 1:
                what = "outputs" if reading.graph.is_out_channel_pruning_fn(handler) else "inputs"
                return (
                    f"{why}, as each of the {parts} parts of {names[node.module]!r} "
                    f"({type(node.module).__name__}) has one of its {what}, and torch-pruning "
                    "takes as many from every part"
                )
    return why


def members(built: Any, group: Any, ties: Sequence[Meeting] = ()) -> list[list[int]]:
    """The root's channels by structure: those that can only be removed together.

    Two channels belong together where they meet in one position of some layer, or of ``ties``, lie
    in the same place of a grouped convolution's parts, or are normalised together by a GroupNorm.
    """
    root, count = group[0].dep, len(group[0].idxs)
    label = torch.arange(count, device="cpu")
    pairs = list(ties)
    for node, handler in group.met:
        places, channels = group.meeting((node, handler))
        if (node, handler) == (root.target, root.handler):
            places, channels = torch.cat([places, places]), torch.cat([places, channels])
        if int(channels.max()) >= count:
            raise UnsupportedLayerError("has channels beyond its root's")
        places = places // norms.together(node.module, built)
        parts, size = _parts(built, node, handler)
        if parts > 1:
            if len(places.unique()) != size:
                raise UnsupportedLayerError(
                    "covers a part of the channels of a grouped layer only, as behind a "
                    "concatenation"
                )
            places = places % (size // parts)
        if len(places) != count or not torch.equal(places, channels):  # else each meets only itself
            pairs.append((places, channels))
    while True:
        before = label.clone()
        for places, channels in pairs:
            lowest = torch.full((int(places.max()) + 1,), count, device="cpu")
            lowest.scatter_reduce_(0, places, label[channels], "amin")
            label.scatter_reduce_(0, channels, lowest[places], "amin")
        if torch.equal(before, label):
            break
    _, sizes = label.unique(return_counts=True)
    if bool((sizes != sizes[0]).any()):
        raise shares.uneven("its root")
    return label.argsort(stable=True).view(len(sizes), -1).tolist()


def _parts(built: Any, node: Any, handler: Any) -> tuple[int, int]:
    """How many parts a layer divides these channels into, and how many channels it has."""
    module = node.module
    if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
        return 1, 0
    pruner = built.get_pruner_of_module(module)
    if isinstance(pruner, type(tp.ops.DummyPruner())) or shares.depthwise(module):
        return 1, 0
    if built.is_out_channel_pruning_fn(handler):
        return pruner.get_out_channel_groups(module), pruner.get_out_channels(module)
    return pruner.get_in_channel_groups(module), pruner.get_in_channels(module)


def heard_without_norm(reading: Reading, model: nn.Module) -> set[str]:
    """Roots of the groups that BatchNorms alone cannot silence.

    In these, some layer's output reaches another layer, or leaves the network, without a BatchNorm
    on the way. Operations between layers are assumed to answer zeros with zeros.
    """
    built, heard = reading.graph, set()
    for table in reading.groups:
        if table.heads:
            heard.add(table.root)
            continue
        layer = model.get_submodule(table.root)
        with tracing.upstream(model):
            items = whole(built, layer, range(table.channels)).items
        nodes = {i.dep.target for i in items if built.is_out_channel_pruning_fn(i.dep.handler)}
        ahead = [n for n in nodes if not _passes_zeros(n.module) and not _is_norm(n.module)]
        seen = set(ahead)
        while ahead:
            for node in ahead.pop().outputs or [None]:
                if node is None or not (_is_norm(node.module) or _passes_channels(node.module)):
                    heard.add(table.root)
                elif node not in seen and not _is_norm(node.module):
                    seen.add(node)
                    ahead.append(node)
    return heard


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS)


def _passes_channels(module: nn.Module) -> bool:
    """Whether each channel of the output depends on the same channel of the input alone."""
    if isinstance(module, _ConvNd):
        return 1 < module.groups == module.in_channels == module.out_channels
    bare = not isinstance(module, nn.Parameter) and not any(True for _ in module.parameters())
    return bare or isinstance(module, nn.PReLU)


def _passes_zeros(module: nn.Module) -> bool:
    """The same, and zeros come out where zeros go in."""
    return _passes_channels(module) and getattr(module, "bias", None) is None
