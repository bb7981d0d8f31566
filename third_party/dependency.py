"""The touch points in torch-pruning 1.6.1: its groups as plain index tables, its runs, its removal.

Facts this file answers, all of them of that version: building a graph leaves the model in eval
mode (``graph._trace``); pruners share dictionaries given as mutable defaults
(``BasePruner.__init__``), so fresh ones are passed; groups kept across a removal go stale, so they
are kept as (root, indices) and fetched anew; the graph follows gradients (``graph._trace``) and
silently misses layers that are frozen, so all train while it is built; the layers that produce the
network's output have to be named by the caller. Attention heads (``BasePruner._prune``): a group of
them is handed out rooted at the inputs of the layer behind; a step in which global ranking has no
head to remove fails; heads are counted as removed even where the removal is then refused, as that
of a layer's last ones is.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .attention import SplitAttention
from .groups import BATCH_NORMS, Share, UnsupportedLayerError, UpstreamGroup
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)
from torch_pruning.dependency import index_mapping  # noqa: E402

ROOTS = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]
Plan = list[tuple[str, list[int]]]
"""What was removed, in order: root layer's name, output positions in the dense layer's count."""
UNLIKE = 1e-3
"""How far outputs may differ between zeros and removal, of their size (:func:`inexact`). A mistake
is of the order of 1, rounding of 1e-15 (more, where a network turns to half precision itself)."""


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
    with modes_kept(model), _all_trainable(model), torch.enable_grad(), _explained(model):
        return tp.DependencyGraph().build_dependency(model, example, verbose=False)


class TraceError(UnsupportedLayerError):
    """Upstream cannot follow the channels through a network."""


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Say where in the network upstream fails, while it traces and follows channels.

    It takes reshapes for flattens by the number of channels it guesses behind them. Where that
    goes wrong it fails at some later place, or multiplies positions for hours; so there is a bound.
    """
    bound = 16 * max((max(p.shape, default=1) for p in model.parameters()), default=1)
    flatten = index_mapping._FlattenIndexMapping

    class Bounded(flatten):  # type: ignore[misc, valid-type]
        def __call__(self, idxs: Sequence[Any]) -> list[Any]:
            if not self.reverse and len(idxs) * self._stride > bound:
                raise OverflowError(
                    f"{len(idxs)} channels would become {len(idxs) * self._stride} positions, more "
                    "than any layer has"
                )
            return flatten.__call__(self, idxs)  # type: ignore[no-any-return]

    index_mapping._FlattenIndexMapping = Bounded
    try:
        yield
    except UnsupportedLayerError:
        raise
    except Exception as cause:
        where = _place(cause, model)
        if where is None:  # the network's own forward pass, say
            raise
        raise TraceError(
            f"torch-pruning cannot follow the channels {where} ({type(cause).__name__}: {cause}). "
            "Reshapes other than flattens, such as a channel shuffle, are not known to it; prune "
            "this network by another framework, or write that part of it in other layers"
        ) from cause
    finally:
        index_mapping._FlattenIndexMapping = flatten


def _place(cause: Exception, model: nn.Module) -> str | None:
    """Where in the graph upstream was: at a layer, or at an operation behind some."""
    names = {m: n for n, m in model.named_modules()}
    found: list[tp.dependency.Node] = []
    for frame, _ in traceback.walk_tb(cause.__traceback__):
        found += [v for v in frame.f_locals.values() if isinstance(v, tp.dependency.Node)][:1]
    if not found:
        return None
    ahead, seen, layers = [found[-1]], set(), set()
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.module in names:
            layers.add(names[node.module])
        else:
            ahead += node.inputs
    kind = found[-1].module
    if kind in names:
        return f"at {names[kind]!r}"
    behind = ", ".join(map(repr, sorted(layers)[:4])) or "the input"
    if len(layers) > 4:
        behind += f" and {len(layers) - 4} more"
    operation = type(kind).__name__.strip("_").removesuffix("Op").lower()
    return f"through the {operation} behind {behind}"


def output_layers(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the layers whose outputs leave the network; their channels must stay.

    Raises:
        TraceError: upstream cannot follow the channels; the message names the layers, and why.
    """
    built = graph(model, example)
    names = {m: n for n, m in model.named_modules()}
    found = []
    with _explained(model):
        for group in built.get_all_groups(root_module_types=ROOTS):
            produced = [i for i in group.items if built.is_out_channel_pruning_fn(i.dep.handler)]
            if any(not i.dep.target.outputs for i in produced):
                inside = [i.dep.target.module for i in produced if i.dep.target.module in names]
                found += [names[module] for module in inside]
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
    drawn: int | None = None,
) -> tp.pruner.GroupNormPruner:
    """Upstream's GroupNormPruner with the group magnitude (p = 2), free of shared defaults.

    The attentions that are :class:`~third_party.attention.SplitAttention` lose whole heads, as
    large a share as ``ratio``; they are ranked among one another. With ``drawn``, a seed, channels
    are drawn instead of ranked.
    """
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    if drawn is not None:
        importance = _drawn(model, drawn)
    heads = {part: a.heads for a in _attentions(model) for part in (a.query, a.key, a.value)}
    with (
        modes_kept(model),
        _all_trainable(model),
        torch.enable_grad(),
        _explained(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return tp.pruner.GroupNormPruner(
            model,
            example,
            importance=importance,
            reg=reg,
            global_pruning=global_pruning,
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=[model.get_submodule(name) for name in ignored],
            root_module_types=list(ROOTS),
            in_channel_groups={},
            out_channel_groups={},
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
        )


def _drawn(model: nn.Module, seed: int) -> Callable[..., Tensor]:
    """An importance that knows nothing: always the same for a layer, a channel and a seed."""
    names = {m: n for n, m in model.named_modules()}

    def importance(group: Any, **_: object) -> Tensor:
        key = zlib.crc32(f"{seed} {names[group[0].dep.target.module]}".encode())
        return torch.rand(len(group[0].idxs), generator=torch.Generator().manual_seed(key))

    return importance


def _attentions(model: nn.Module) -> list[SplitAttention]:
    return [m for m in model.modules() if isinstance(m, SplitAttention)]


def _attention_of(
    made: tp.pruner.GroupNormPruner, group: Any, attentions: Sequence[SplitAttention]
) -> SplitAttention | None:
    """The attention whose heads a group holds, if it holds any."""
    values = {a.value: a for a in attentions}
    for item in group.items if values else ():
        module, produced = item.dep.target.module, item.dep.handler
        if module in values and made.DG.is_out_channel_pruning_fn(produced):
            return values[module]
    return None


def _count_heads(made: tp.pruner.GroupNormPruner, attentions: Sequence[SplitAttention]) -> None:
    """Tell upstream how many heads there are, and not to ask for none in the next step."""
    left = 0
    for attention in attentions:
        for part in (attention.query, attention.key, attention.value):
            made.num_heads[part] = made.out_channel_groups[part] = attention.heads
        if attention.value not in made.ignored_layers and attention.value.out_features > 1:
            left += attention.heads
    ratios, step = made.per_step_head_pruning_ratio, made.current_step + 1
    if made.global_pruning and left <= int(made.initial_total_heads * (1 - ratios[step])):
        ratios[step] = 0.0


def has_heads(model: nn.Module) -> bool:
    """Whether a pruner would take attention heads of this model."""
    return bool(_attentions(model))


def counts(made: tp.pruner.GroupNormPruner) -> dict[str, int]:
    """How many structures there are, by upstream's scopes of ranking, of which a ratio is a share.

    Upstream counts them in a pruner's first step. Here that is one of a ratio of zero, which
    removes nothing.
    """
    for _ in made._prune():
        raise RuntimeError("torch-pruning removes structures at a ratio of zero")
    return dict(made._scope_initial_channels)


def count_from(made: tp.pruner.GroupNormPruner, before: Mapping[str, int]) -> None:
    """Let a pruner of a model that was pruned before take its ratio of what :func:`counts` gave."""
    made._scope_initial_channels.update(before)


def run(
    made: tp.pruner.GroupNormPruner, reached: Callable[[], bool], progress: Callable[[], object]
) -> Plan:
    """Upstream's own pruning, step by step until the target is reached or the steps are done.

    Returns:
        What was removed, by the channels' positions before the run.
    """
    names, attentions = {m: n for n, m in made.model.named_modules()}, _attentions(made.model)
    left: dict[str, list[int]] = {}
    removed: dict[str, list[int]] = {}
    while not reached() and made.current_step < made.iterative_steps:
        _count_heads(made, attentions)
        for group in made.step(interactive=True):
            root, here = group[0].dep.target.module, sorted(group[0].idxs)
            attention = _attention_of(made, group, attentions)
            if attention is not None:  # inputs and values are counted alike
                root = attention.value
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
    yield from _removing(graph(model, example), model, plan)


def _removing(built: tp.DependencyGraph, model: nn.Module, plan: Plan) -> Iterator[str]:
    for name, channels in plan:
        layer = model.get_submodule(name)
        prune = built.get_pruner_of_module(layer).prune_out_channels
        built.get_pruning_group(layer, prune, list(channels)).prune()
        yield name


def survivors(model: nn.Module, example: Tensor, plan: Plan) -> dict[str, list[Tensor]]:
    """What :func:`remove` would leave of every parameter, whatever upstream does inside.

    It is tried on a copy in which every element of a parameter is its own position.

    Args:
        model: left as it is.
        example: an input batch on the model's device.
        plan: what would be removed.

    Returns:
        By the parameter's name (each of them, where layers share one): for each of its dimensions
        the positions that stay, (N,) on the host.

    Raises:
        UnsupportedLayerError: what stays of a parameter is not whole rows and columns of it.
    """
    trial = copy.deepcopy(model)
    built = graph(trial, example)  # first: with positions for weights the forward pass overflows
    shapes = {n: p.shape for n, p in trial.named_parameters(remove_duplicate=False)}
    for parameter in trial.parameters():
        parameter.grad = None
        codes = torch.arange(parameter.numel(), dtype=torch.float64)  # exact to 2^53
        parameter.data = codes.view(parameter.shape).to(parameter.device)
    for _ in _removing(built, trial, plan):
        pass
    named = trial.named_parameters(remove_duplicate=False)
    return {n: _positions(n, p.detach().cpu().long(), shapes[n]) for n, p in named}


def _positions(name: str, codes: Tensor, shape: torch.Size) -> list[Tensor]:
    """Positions along each dimension, of positions in the flattened tensor."""
    if codes.dim() == len(shape) and codes.numel():
        strides = [shape[d + 1 :].numel() for d in range(len(shape))]
        index = []
        for d, stride in enumerate(strides):
            line = codes.movedim(d, 0).reshape(codes.shape[d], -1)[:, 0]
            index.append(line // stride % shape[d])
        expected = torch.zeros((), dtype=torch.int64)
        for positions, stride in zip(index, strides, strict=True):
            expected = expected[..., None] + positions * stride
        if torch.equal(expected, codes):
            return index
    raise UnsupportedLayerError(
        f"what the removal leaves of {name!r}, {tuple(codes.shape)} of {tuple(shape)}, is nothing, "
        "or is not whole rows and columns of it; leave the channels out of the plan that lead there"
    )


def inexact(model: nn.Module, example: Tensor, groups: Sequence[UpstreamGroup]) -> dict[str, str]:
    """Groups whose structures, removed, leave another network than at zero.

    That is so where the graph loses track of channels, or where something answers zeros with more
    than zeros. Every other structure is tried, on a copy with weights drawn at random, so that
    nothing hides behind what a network has not learnt yet, and in double precision. A model that
    cannot be run so, or whose outputs are not finite, is not judged.

    Args:
        model: what the groups are of; left as it is.
        example: an input batch on the model's device.
        groups: as of :func:`groups`, or another upstream's.

    Returns:
        Why, by the group's root, to follow its name; nothing if all is well.
    """
    why = _unlike(model, example, groups)
    if why is None:
        return {}
    # One by one, only to tell which: building the graph takes a while.
    alone = {g.root: _unlike(model, example, [g]) for g in groups}
    found = {root: said for root, said in alone.items() if said is not None}
    return found or {g.root: f"{why}, if all groups are removed together" for g in groups}


@torch.no_grad()
def _unlike(model: nn.Module, example: Tensor, groups: Sequence[UpstreamGroup]) -> str | None:
    copies: dict[int, Any] = {}  # by the id of what was copied
    trial = copy.deepcopy(model, copies).eval()
    batch = example.double() if example.is_floating_point() else example
    try:
        _draw(trial.double(), batch)
    except Exception:  # a layer that insists on its own precision
        return None
    plan: Plan = []
    for group in groups:
        rows = list(range(0, group.structures - 1, 2))
        for share in group.shares:
            parameter = copies[id(share.parameter)]
            index = torch.tensor([p for k in rows for p in share.index[k]], dtype=torch.int64)
            parameter.index_fill_(share.dim, index.to(parameter.device), 0)
        plan += [(group.root, group.channels_of(rows))] if rows else []
    zeroed = _flat(trial(batch))
    try:
        remove(trial, batch, plan)
        removed = _flat(trial.eval()(batch))
    except Exception as cause:  # whatever the removal of other channels than these breaks
        return f"cannot be removed: {(str(cause).splitlines() or [type(cause).__name__])[0]}"
    off = (removed - zeroed).abs().max()
    if off <= UNLIKE * zeroed.abs().max() or not zeroed.isfinite().all():
        return None
    return (
        "gives different outputs at zero and removed: the dependency graph takes its channels for "
        "others on their way, as behind a flatten of permuted axes, or something answers their "
        "zeros with more than zeros"
    )


def _flat(outputs: Any) -> Tensor:
    """All of a model's outputs in one vector."""
    return torch.cat([o.flatten() for o in tp.utils.flatten_as_list(outputs)])


def _draw(model: nn.Module, batch: Tensor) -> None:
    """Draw a model's weights by He's rule and its vectors from 0.5 to 1.5.

    BatchNorms get the statistics of the batch, but lower means: one that reads zeros speaks up, and
    no ReLU silences it.
    """
    draw = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if tensor.dim() > 1:
            drawn = torch.randn(tensor.shape, generator=draw) * (2 / tensor[0].numel()) ** 0.5
        else:
            drawn = torch.rand(tensor.shape, generator=draw) + 0.5
        tensor.copy_(drawn)
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean of all passes, where a module runs several times
    with contextlib.suppress(ValueError):  # a single image and position has no variance
        model(batch)
    for norm in norms:
        norm.eval().get_buffer("running_mean").sub_(norm.get_buffer("running_var").sqrt())


def importance(made: tp.pruner.GroupNormPruner, group: UpstreamGroup) -> Tensor:
    """Upstream's importance of each structure of a group of the pruner's model, on the host."""
    layer = made.model.get_submodule(group.root)
    prune = made.DG.get_pruner_of_module(layer).prune_out_channels
    with torch.no_grad():
        full = made.DG.get_pruning_group(layer, prune, list(range(group.channels)))
        scores: Tensor = made.importance(full)
    if group.consecutive:
        return scores.detach().view(-1, group.repeats).mean(1).cpu()
    return scores.detach().view(group.repeats, -1).mean(0).cpu()


def groups(made: tp.pruner.GroupNormPruner) -> list[UpstreamGroup]:
    """All groups that the pruner may prune, as index tables.

    Only output positions are listed: they are disjoint between groups and, at zero, leave nothing
    for the consumers' inputs to read.

    Raises:
        UnsupportedLayerError: naming the layer that cannot be set to zero, and why.
    """
    names, attentions = {m: n for n, m in made.model.named_modules()}, _attentions(made.model)
    return [_table(made, group, names, attentions) for group in _all_groups(made)]


def require_exact(model: nn.Module, example: Tensor, groups: Sequence[UpstreamGroup]) -> None:
    """Refuse what :func:`inexact` finds.

    Raises:
        UnsupportedLayerError: naming the first such group, why, and the remedy.
    """
    for root, why in inexact(model, example, groups).items():
        raise UnsupportedLayerError(_not_exact(root, why))


def exact_groups(made: tp.pruner.GroupNormPruner, example: Tensor) -> list[UpstreamGroup]:
    """:func:`groups`, each tried out by :func:`inexact`.

    Raises:
        UnsupportedLayerError: naming the layer that cannot be set to zero, or the group that is not
            the same at zero and removed, and why.
    """
    found = groups(made)
    require_exact(made.model, example, found)
    return found


def unsupported(made: tp.pruner.GroupNormPruner, example: Tensor) -> dict[str, str]:
    """Roots of the groups that :func:`exact_groups` refuses, and why."""
    names, attentions = {m: n for n, m in made.model.named_modules()}, _attentions(made.model)
    refused, found = {}, []
    for group in _all_groups(made):
        try:
            found.append(_table(made, group, names, attentions))
        except UnsupportedLayerError as cause:
            refused[names[group[0].dep.target.module]] = str(cause)
    odd = inexact(made.model, example, found)
    return refused | {root: _not_exact(root, why) for root, why in odd.items()}


def _not_exact(root: str, why: str) -> str:
    return f"the group of {root!r} {why}. Name {root!r} in `ignored` to leave it unpruned"


def _all_groups(made: tp.pruner.GroupNormPruner) -> Iterator[Any]:
    """Upstream's groups, but for those of ignored layers."""
    return made.DG.get_all_groups(  # type: ignore[no-any-return]
        ignored_layers=made.ignored_layers, root_module_types=made.root_module_types
    )


def _table(
    made: tp.pruner.GroupNormPruner,
    group: Any,
    names: Mapping[nn.Module, str],
    attentions: Sequence[SplitAttention],
) -> UpstreamGroup:
    """One group as index tables."""
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
    attention = _attention_of(made, group, attentions)
    if attention is not None:
        root = attention.value
        prune = made.DG.get_pruner_of_module(root).prune_out_channels
        group = made.DG.get_pruning_group(root, prune, list(range(root.out_features)))
        repeats = attention.head_dim
    made_group = UpstreamGroup(names[root], len(group[0].idxs), repeats, attention is not None)
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
    if attention is not None:  # without its values a head says nothing, whatever it looks at
        producers = [p for p in producers if p[0] is attention.value]
    made_group.owners = norms or producers
    return made_group


def heard_without_norm(made: tp.pruner.GroupNormPruner) -> set[str]:
    """Roots of the groups that BatchNorms alone cannot silence.

    In these some layer's output comes to a layer that reads it, or leaves the network, without a
    BatchNorm on the way. Operations between layers are taken to answer zeros with zeros.
    """
    names = {m: n for n, m in made.model.named_modules()}
    heard = set()
    for group in _all_groups(made):
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
        rows[group.structure_of(root)].append(position)
    if len({len(r) for r in rows}) != 1:
        raise UnsupportedLayerError(
            f"the group of {group.root!r} gives its structures unequal shares of a layer; name it "
            "in `ignored`"
        )
    return [sorted(r) for r in rows]
