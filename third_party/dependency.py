"""The touch points in torch-pruning 1.6.1: its groups as plain index tables, its runs, its removal.

Facts this file answers, all of them of that version: building a graph leaves the model in eval
mode (``graph._trace``); pruners share dictionaries given as mutable defaults
(``BasePruner.__init__``), so fresh ones are passed; groups kept across a removal go stale, so they
are kept as (root, indices) and fetched anew; the graph follows gradients (``graph._trace``) and
silently misses layers that are frozen, so all train while it is built; the layers that produce the
network's output have to be named by the caller.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .groups import BATCH_NORMS, Share, UnsupportedLayerError, UpstreamGroup
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)

ROOTS = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]
Plan = list[tuple[str, list[int]]]
"""What was removed, in order: root layer's name, output positions in the dense layer's count."""


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode (train or eval) it was in."""
    modes = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def graph(model: nn.Module, example: Tensor) -> tp.DependencyGraph:
    """Upstream's dependency graph of a model, which stays in its mode."""
    with modes_kept(model), _all_trainable(model), torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example, verbose=False)


def output_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the layers whose outputs leave the network; their channels must stay."""
    built = graph(model, example)
    names = {m: n for n, m in model.named_modules()}
    found = []
    for group in built.get_all_groups(root_module_types=ROOTS):
        produced = [i for i in group.items if built.is_out_channel_pruning_fn(i.dep.handler)]
        if any(not i.dep.target.outputs for i in produced):
            found += [names[i.dep.target.module] for i in produced if i.dep.target.module in names]
    return sorted(set(found))


def pruner(
    model: nn.Module,
    example: Tensor,
    *,
    ratio: float,
    steps: int,
    global_pruning: bool,
    normalizer: str,
    reg: float,
    ignored: Sequence[str],
) -> tp.pruner.GroupNormPruner:
    """Upstream's GroupNormPruner with the group magnitude (p = 2), free of shared defaults."""
    with modes_kept(model), _all_trainable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer),
            reg=reg,
            global_pruning=global_pruning,
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[model.get_submodule(name) for name in ignored],
            root_module_types=list(ROOTS),
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )


def run(
    made: tp.pruner.GroupNormPruner, reached: Callable[[], bool], progress: Callable[[], object]
) -> Plan:
    """Upstream's own pruning, step by step until the target is reached or the steps are done.

    Returns:
        What was removed, by the channels' positions before the run.
    """
    names = {m: n for n, m in made.model.named_modules()}
    left: dict[str, list[int]] = {}
    removed: dict[str, list[int]] = {}
    while not reached() and made.current_step < made.iterative_steps:
        for group in made.step(interactive=True):
            root, here = group[0].dep.target.module, sorted(group[0].idxs)
            name = names[root]
            before = left.setdefault(name, list(range(made.DG.get_out_channels(root))))
            removed.setdefault(name, []).extend(before[i] for i in here)
            gone = set(here)
            left[name] = [c for i, c in enumerate(before) if i not in gone]
            group.prune()
        progress()
    return [(name, sorted(channels)) for name, channels in removed.items()]


def remove(model: nn.Module, example: Tensor, plan: Plan) -> None:
    """Make a dense model physically smaller, in place; parameters become new objects."""
    for _ in removing(model, example, plan):
        pass


def removing(model: nn.Module, example: Tensor, plan: Plan) -> Iterator[str]:
    """:func:`remove`, item by item: tells each root's name when its channels are gone."""
    built = graph(model, example)
    for name, channels in plan:
        layer = model.get_submodule(name)
        prune = built.get_pruner_of_module(layer).prune_out_channels
        built.get_pruning_group(layer, prune, list(channels)).prune()
        yield name


def importance(made: tp.pruner.GroupNormPruner, group: UpstreamGroup) -> Tensor:
    """Upstream's importance of each structure of a group of the pruner's model, on the host."""
    layer = made.model.get_submodule(group.root)
    prune = made.DG.get_pruner_of_module(layer).prune_out_channels
    with torch.no_grad():
        full = made.DG.get_pruning_group(layer, prune, list(range(group.channels)))
        scores: Tensor = made.importance(full)
    return scores.detach().view(group.repeats, -1).mean(0).cpu()


def groups(made: tp.pruner.GroupNormPruner) -> list[UpstreamGroup]:
    """All groups that the pruner may prune, as index tables.

    Only output positions are listed: they are disjoint between groups and, at zero, leave nothing
    for the consumers' inputs to read.

    Raises:
        UnsupportedLayerError: naming the layer that cannot be set to zero, and why.
    """
    names = {m: n for n, m in made.model.named_modules()}
    found = []
    for group in made.DG.get_all_groups(
        ignored_layers=made.ignored_layers, root_module_types=made.root_module_types
    ):
        root = group[0].dep.target.module
        repeats = max(
            [1]
            + [
                (
                    made.out_channel_groups
                    if made.DG.is_out_channel_pruning_fn(item.dep.handler)
                    else made.in_channel_groups
                ).get(item.dep.target.module, 1)
                for item in group.items
            ]
        )
        made_group = UpstreamGroup(names[root], len(group[0].idxs), repeats)
        producers: list[tuple[nn.Module, int, list[list[int]]]] = []
        norms: list[tuple[nn.Module, int, list[list[int]]]] = []
        for item in group.items:
            module = item.dep.target.module
            if not made.DG.is_out_channel_pruning_fn(item.dep.handler):
                continue
            if module in names and not _can_speak(module):
                continue
            if module not in names and not isinstance(module, nn.Parameter):
                continue  # an operation between layers
            kind = _kind(module, names, made_group.root)
            if kind is None:
                continue
            dims, batch_norm = kind
            index = _rows(item.idxs, item.root_idxs, made_group)
            for attribute, dim in dims.items():
                parameter = getattr(module, attribute)
                if parameter is not None:
                    made_group.shares.append(
                        Share(f"{names[module]}.{attribute}", parameter, dim, batch_norm, index)
                    )
            (norms if batch_norm else producers).append(
                (module, -1 if isinstance(module, nn.Linear) else 1, index)
            )
        made_group.owners = norms or producers
        found.append(made_group)
    return found


def heard_without_norm(made: tp.pruner.GroupNormPruner) -> set[str]:
    """Roots of the groups that BatchNorms alone cannot silence.

    In these some layer's output comes to a layer that reads it, or leaves the network, without a
    BatchNorm on the way. Operations between layers are taken to answer zeros with zeros.
    """
    names = {m: n for n, m in made.model.named_modules()}
    heard = set()
    for group in made.DG.get_all_groups(
        ignored_layers=made.ignored_layers, root_module_types=made.root_module_types
    ):
        nodes = {
            item.dep.target
            for item in group.items
            if made.DG.is_out_channel_pruning_fn(item.dep.handler)
        }
        ahead = [n for n in nodes if not _passes_zeros(n.module) and not _is_norm(n.module)]
        seen = set(ahead)
        while ahead:
            for node in ahead.pop().outputs or [None]:
                if node is None or not (_is_norm(node.module) or _passes_channels(node.module)):
                    heard.add(names[group[0].dep.target.module])
                elif node not in seen and not _is_norm(node.module):
                    seen.add(node)
                    ahead.append(node)
    return heard


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS)


def _passes_channels(module: nn.Module) -> bool:
    """Whether each channel of the output comes of the same channel of the input alone."""
    if isinstance(module, _ConvNd):
        return 1 < module.groups == module.in_channels == module.out_channels
    bare = not isinstance(module, nn.Parameter) and not any(True for _ in module.parameters())
    return bare or isinstance(module, nn.PReLU)


def _passes_zeros(module: nn.Module) -> bool:
    """Whether, besides, zeros come out where zeros go in."""
    return _passes_channels(module) and getattr(module, "bias", None) is None


def _can_speak(module: nn.Module) -> bool:
    """Whether a module may answer zeros with something else than zeros."""
    norms = (nn.GroupNorm, nn.LayerNorm)
    return (
        _is_norm(module)
        or isinstance(module, norms)
        or any(True for _ in module.parameters(recurse=False))
    )


def _kind(
    module: Any, names: Mapping[nn.Module, str], root: str
) -> tuple[dict[str, int], bool] | None:
    """Dimensions of the output positions by attribute, and whether it is a batch norm.

    ``None`` where nothing has to be zero for the output to be zero.
    """
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(module, transposed):
        if module.groups == 1:
            return {"weight": 1, "bias": 0}, False
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return {"weight": 0, "bias": 0}, False
    elif _is_norm(module):
        if module.affine:
            return {"weight": 0, "bias": 0}, True
    elif isinstance(module, nn.PReLU):
        return None  # zero in, zero out, whatever its slope
    if isinstance(module, nn.Parameter):
        which, kind = f"the group of {root!r}", "a bare parameter"
    else:
        which, kind = repr(names[module]), type(module).__name__
    raise UnsupportedLayerError(
        f"{which} involves {kind}, where a channel of zeros does not equal a removed one: a "
        "LayerNorm, say, takes its mean over all channels, and a BatchNorm without weight and bias "
        f"shifts zeros by its running mean. Name {root!r} in `ignored` to leave the group unpruned"
    )


def _rows(positions: Sequence[int], roots: Sequence[int], group: UpstreamGroup) -> list[list[int]]:
    """Positions of one layer by structure, each with equally many."""
    rows: list[list[int]] = [[] for _ in range(group.structures)]
    for position, root in zip(positions, roots, strict=True):
        rows[root % group.structures].append(position)
    if len({len(r) for r in rows}) != 1:
        raise UnsupportedLayerError(
            f"the group of {group.root!r} gives its structures unequal shares of a layer; name it "
            "in `ignored`"
        )
    return [sorted(r) for r in rows]
