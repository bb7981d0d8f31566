"""The walk over torch-pruning's graph: which channels of which layers go together.

What this file works around, all of it in torch-pruning 1.6.1:

- A walk over the graph follows every path by itself, and carries lists of indices along each: it
  takes exponentially long where parts of channels join again, as in slices and concatenations, and
  need not end (``get_pruning_group``). What it merges does not say which channels go together. So
  the walk is ours.
- Index maps are worked out anew for every group (``index_mapping``), though only a removal changes
  them. After a removal a split keeps its old offsets (``SplitPruner``). Those of splits,
  concatenations and slices are worked out here, from the shapes that autograd has noted.
- What is read behind a flatten is taken for positions of one layer's channels, with those of a
  channel side by side: not so where several flattens are concatenated, or behind a flatten of
  tokens (``update_reshape_index_mapping``).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, norms
from .groups import BATCH_NORMS, UnsupportedLayerError
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)
from torch_pruning.dependency import graph as _graph_module  # noqa: E402
from torch_pruning.dependency import index_mapping as _index_mapping  # noqa: E402
from torch_pruning.dependency import shape_infer as _shape_infer  # noqa: E402

WALK = 40
"""A walk may take this many steps for every edge of the graph; ours. Most take one."""
PAIRS = 16
"""A walk may carry this many times as many channels along every edge, on average, as the widest
layer has; ours. Where each position belongs to one channel of the root, it is once at most."""


Meeting = tuple[Tensor, Tensor]
"""Positions in a layer, and the root's channel at each (-1: unknown): both int64 (N,)."""


def roots() -> tuple[Any, ...]:
    """The kinds of layers that groups are named after."""
    return (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, *heads.conv1d())


class EndlessWalkError(OverflowError):
    """A walk from layer to layer would not end.

    Attributes:
        met: see :attr:`Group.met`, so far.
    """

    def __init__(self, met: dict[tuple[Any, Any], Meeting]) -> None:
        super().__init__("the walk from layer to layer does not end")
        self.met = met


def _completed(pairs: Meeting, before: Tensor, size: int) -> Meeting:
    """Pairs, and more where of ``size`` positions that go together some have not been met.

    Args:
        pairs: what comes to a layer now.
        before: the positions that came there before.
        size: of the layer's parts that go whole.
    """
    places, channels = pairs
    parts, which = (places // size).unique(return_inverse=True)
    channel_of = torch.empty_like(parts)
    channel_of[which] = channels  # of each part any
    every = (parts[:, None] * size + torch.arange(size, device="cpu")).flatten()
    missing = ~torch.isin(every, torch.cat([before, places]))
    more = every[missing], channel_of.repeat_interleave(size)[missing]
    return joined([pairs, more])


class Group(_graph_module.Group):  # type: ignore[misc]
    """Upstream's group, which keeps what merging loses.

    Attributes:
        met: by layer, or operation, and function what has come there: which positions are which of
            the root's channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[tuple[Any, Any], Meeting] = {}

    def meeting(self, at: tuple[Any, Any]) -> Meeting:
        """One of :attr:`met`.

        Raises:
            UnsupportedLayerError: upstream does not say which channels of the root they belong to.
        """
        places, channels = self.met[at]
        if bool((channels < 0).any()):
            raise UnsupportedLayerError(
                "shares channels in a way that torch-pruning does not report, as attention heads "
                "may"
            )
        return places, channels

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """As upstream's; the index maps have to be worked out anew."""
        super().prune(idxs, record_history)
        self._DG.maps_valid = False
        for module in self._DG.module2node:
            if isinstance(module, tp.ops._SplitOp) and None not in (module.split_sizes or [None]):
                module.offsets = list(accumulate([0, *module.split_sizes]))


def _group_of(built: Any, layer: nn.Module, function: Any, idxs: Any) -> Group:
    """Upstream's ``get_pruning_group``, in steps that no path takes twice.

    What a dependency does with a pair of a position and a root's channel does not depend on others.
    So of what comes to a place only the pairs that have not been there go on, together with others
    that wait there.

    Raises:
        EndlessWalkError: it does not end within a bound, see :data:`WALK` and :data:`PAIRS`.
        OverflowError: a reshape would make more positions than any layer has.
        UnsupportedLayerError: the layer is not in the graph.
    """
    if layer not in built.module2node:
        name = {m: n for n, m in built.model.named_modules()}.get(layer, type(layer).__name__)
        raise UnsupportedLayerError(f"{name!r} {missing(built, layer)}")
    if isinstance(layer, tp.ops.TORCH_CONV) and layer.groups == layer.out_channels > 1:
        function = tp.function.prune_depthwise_conv_out_channels
    _update_maps(built)
    start = torch.tensor(
        [idxs] if isinstance(idxs, int) else list(idxs), dtype=torch.int64, device="cpu"
    )
    node = built.module2node[layer]
    first: Any = tp.dependency.Dependency(function, function, source=node, target=node)
    reached = {(node, function): _Reached(first, start, start)}
    stack, steps, pairs = [(node, function)], 0, len(start)
    lost = astray = False  # beyond the channels that a layer has, or beyond those that one puts out
    while stack:
        node, function = stack.pop()
        here = reached[node, function].leave()
        ends = tuple(map(int, here[0].aminmax())) if len(here[0]) else (0, -1)
        for dep in node.dependencies:
            if not dep.is_triggered_by(function) or _passes_by(dep, *ends):
                continue
            there = _mapped(dep, here, built.widest)
            if not len(there[0]):
                continue
            at = dep.target, dep.handler
            size = norms.together(dep.target.module, built)
            if size > 1:
                before = reached[at].all()[0] if at in reached else here[0][:0]
                there = _completed(there, before, size)
            if at not in reached:
                reached[at] = _Reached(dep, *there)
                fresh = len(there[0])
                stack.append(at)
            else:
                waiting, fresh = bool(reached[at].waiting), reached[at].add(*there)
                if fresh and not waiting:
                    stack.append(at)
            if fresh:
                steps, pairs = steps + 1, pairs + fresh
                lost = lost or reached[at].beyond(built)
                astray = astray or (lost and reached[at].beyond(built, roots(), made=True))
            # Positions that a layer does not have are refused anyhow, but where little is to be
            # done, other reasons may be plainer.
            most = max(10, built.edges)
            much = max(steps / WALK, pairs / (PAIRS * built.widest)) / most
            if much > 1 or (astray and much > 1 / WALK) or (lost and steps > most):
                raise EndlessWalkError({at: there.all() for at, there in reached.items()})
    group = Group()
    group._DG = built
    for at, arrived in reached.items():
        if not any(at[0].module is parameter for parameter in built.ignored_params):
            group.met[at] = arrived.all()
            group._group.append(arrived.item())
    return group


def missing(built: Any, layer: nn.Module) -> str:
    """Why a layer is not in the graph, in words that follow its name."""
    felt = getattr(built, "felt", ())
    if any(p in felt for p in layer.parameters(recurse=False)):
        return "is not in the graph: the model uses its parameters without running the layer itself"
    return (
        "is not in the graph: no output depends on it for this example, with the weights that the "
        "model has now. If the input decides which layers run, as in a mixture of experts, give an "
        "example that runs all of them, or name it in `ignored`"
    )


class _Reached:
    """What a walk has brought to one place: pairs of a position and a root's channel.

    Args:
        dep: the dependency that the walk first came by.
        places, channels: the pairs that came first.

    Attributes:
        waiting: pairs that have not gone on from here.
    """

    def __init__(self, dep: Any, places: Tensor, channels: Tensor) -> None:
        self._dep, self._seen = dep, [(places, channels)]
        self._known = {(id(places), id(channels))}
        self._codes: Tensor | None = None
        self.waiting: list[Meeting] = [(places, channels)]

    def add(self, places: Tensor, channels: Tensor) -> int:
        """Note pairs that come here; says how many have not been here before."""
        if (id(places), id(channels)) in self._known or self._alike(places, channels):
            return 0
        if self._codes is None:
            self._codes = _codes(*self.all())
        fresh = ~torch.isin(_codes(places, channels), self._codes)
        if not bool(fresh.any()):
            return 0
        places, channels = places[fresh], channels[fresh]
        self._codes = torch.cat([self._codes, _codes(places, channels)])
        self._seen.append((places, channels))
        self._known.add((id(places), id(channels)))
        self.waiting.append((places, channels))
        return len(places)

    def _alike(self, places: Tensor, channels: Tensor) -> bool:
        """Whether the same came at once before, as it does by each step of a loop."""
        return any(
            len(p) == len(places) and torch.equal(p, places) and torch.equal(c, channels)
            for p, c in self._seen[:4]
        )

    def beyond(self, built: Any, kinds: tuple[Any, ...] = (), made: bool = False) -> bool:
        """Whether what came last lies beyond the channels of a layer.

        Args:
            built: the graph.
            kinds: of layers that are asked; by default all whose channels are known.
            made: whether only channels count that the layer puts out.
        """
        layer, out = self._dep.target.module, built.is_out_channel_pruning_fn(self._dep.handler)
        if not isinstance(layer, kinds or (*roots(), *BATCH_NORMS)) or (made and not out):
            return False
        pruner = built.get_pruner_of_module(layer)
        width = pruner.get_out_channels(layer) if out else pruner.get_in_channels(layer)
        return bool(self._seen[-1][0].max() >= width)

    def leave(self) -> Meeting:
        """The pairs that go on from here now."""
        going, self.waiting = self.waiting, []
        return going[0] if len(going) == 1 else joined(going)

    def all(self) -> Meeting:
        """All pairs that have come here."""
        return self._seen[0] if len(self._seen) == 1 else joined(self._seen)

    def item(self) -> Any:
        """An item of upstream's group, in which a position that came twice is the first's."""
        places, channels = (t.tolist() for t in self.all())
        once: dict[int, int] = {}
        for place, channel in zip(places, channels, strict=True):
            once.setdefault(place, channel)
        places, channels = list(once), list(once.values())
        item = tp._helpers.GroupItem(self._dep, places)
        item.root_idxs = [None if c < 0 else c for c in channels]
        return item


def joined(pairs: Iterable[Meeting]) -> Meeting:
    """Several as one."""
    places, channels = zip(*pairs, strict=True)
    return torch.cat(places), torch.cat(channels)


def _codes(places: Tensor, channels: Tensor) -> Tensor:
    """Each pair as one number; a layer has fewer than 2**31 channels."""
    return (places << 32) + channels


def _maps(dep: Any) -> Iterator[Any]:
    """The index maps of a dependency, in the order in which they apply.

    Upstream has them in the other order where a concatenation reads a split: what belongs to which
    part has to be told by positions in the whole.
    """
    first, second = dep.index_mapping
    if isinstance(second, _index_mapping._ConcatIndexMapping) and second.reverse:
        first, second = second, first
    return (of for of in (first, second) if of is not None)


def _passes_by(dep: Any, first: int, last: int) -> bool:
    """Whether none of the positions from a first to a last one are in the part that a map keeps.

    What reads many parts has as many dependencies, most of which lead elsewhere.
    """
    of: Any = next(_maps(dep), None)
    if isinstance(of, _index_mapping._ConcatIndexMapping):
        keeps = of.reverse
    else:
        keeps = isinstance(of, _index_mapping._SplitIndexMapping) and not of.reverse
    return bool(keeps) and bool(last < of.offset[0] or first >= of.offset[1])


def _mapped(dep: Any, pairs: Meeting, widest: int) -> Meeting:
    """What upstream's index maps of a dependency make of pairs, all at once.

    Upstream guesses from the number of channels which reshapes are flattens. After a wrong guess it
    would multiply positions for hours, so their number is bounded.
    """
    for of in _maps(dep):
        places, channels = pairs
        if isinstance(of, (_index_mapping._FlattenIndexMapping, _Repeated)) and of.reverse:
            inside = places % of.width if isinstance(of, _Repeated) else places // of._stride
            codes = _codes(inside, channels + 1).unique()
            pairs = codes >> 32, (codes & (2**32 - 1)) - 1
        elif isinstance(of, (_index_mapping._FlattenIndexMapping, _Repeated)):
            if isinstance(of, _Repeated):
                times, size, step = of.times, 1, of.width
            else:
                times, size, step = of._stride, of._stride, 1
            if len(places) * times > 16 * widest:
                raise OverflowError(
                    f"{len(places)} channels would become {len(places) * times} positions, "
                    "more than any layer has"
                )
            inside = step * torch.arange(times, device="cpu")
            places = (places[:, None] * size + inside).flatten()
            pairs = places, channels.repeat_interleave(times)
        elif isinstance(of, _index_mapping._SliceIndexMapping):
            if of.reverse:
                pairs = places * of.step + of.start, channels
            else:
                inside = (places >= of.start) & (places < of.end)
                inside &= (places - of.start) % of.step == 0
                pairs = (places[inside] - of.start) // of.step, channels[inside]
        elif isinstance(of, _index_mapping._GQAIndexMapping):  # one way only, to no channel's
            size, whole = of.head_dim, of.head_dim * of.repeat
            inside = places // whole * size + places % size
            pairs = inside, torch.full_like(channels, -1)
            if not of.reverse:
                pairs = places[:0], channels[:0]
        elif isinstance(of, _index_mapping._ConcatIndexMapping) != of.reverse:
            pairs = places + of.offset[0], channels  # from a part to the whole
        else:
            inside = (places >= of.offset[0]) & (places < of.offset[1])
            pairs = places[inside] - of.offset[0], channels[inside]
    return pairs


def _split_sizes(built: Any, node: Any) -> list[int] | None:
    """The channels of all parts of a split, or ``None`` if it is along something else."""
    traced = node.grad_fn
    shape, dim = traced._saved_self_sym_sizes, traced._saved_dim
    dim -= 2**64 if dim >= 2**63 else 0  # counted from the end
    width = _shape_infer.infer_out_channels_recursively(built, node.inputs[0], [0])
    if not -len(shape) <= dim < len(shape):
        return None
    if width is None and (dim == -1 or (dim == 1 and len(shape) != 3)):  # too deep in a loop, say
        width = shape[dim]
    if shape[dim] != width:
        return None
    if hasattr(traced, "_saved_split_sizes"):
        return list(traced._saved_split_sizes)
    size = traced._saved_split_size
    return [min(size, width - start) for start in range(0, width, size)]


def _map_split(built: Any, node: Any) -> None:
    """The map of a split, by the numbers of its parts.

    Upstream has none along a dimension that is counted from the front, unless it is the second, nor
    behind a parameter with three dimensions; and it numbers the parts as it comes across them. Its
    own map is taken where a part's reader is a layer that runs several times.
    """
    split = node.module
    if not hasattr(node, "parts"):  # what autograd has kept is of the time of the tracing
        sizes = _split_sizes(built, node)
        edges = {r: r.grad_fn.next_functions for r in node.outputs}
        node.parts = {r: [i for fn, i in e if fn is node.grad_fn] for r, e in edges.items()}
        if sizes is None or any(len(p) != node.outputs.count(r) for r, p in node.parts.items()):
            node.parts = None
        else:
            split.split_sizes, split.offsets = sizes, list(accumulate([0, *sizes]))
    if node.parts is None:
        _index_mapping.update_split_index_mapping(built, node)
        return
    for reader, parts in node.parts.items():
        there = [dep for dep in node.dependencies if dep.target is reader]
        back = [dep for dep in reader.dependencies if dep.target is node]
        for part, one, other in zip(parts, there, back, strict=True):
            offset = split.offsets[part : part + 2]
            one.index_mapping[0] = _index_mapping._SplitIndexMapping(offset, reverse=False)
            other.index_mapping[0] = _index_mapping._SplitIndexMapping(offset, reverse=True)


def _map_concat(built: Any, node: Any) -> None:
    """The map of a concatenation, by the sizes of its parts.

    Upstream takes a slice for as wide as what it is taken from, leaves out the parts that nothing
    in the graph has made, such as the network's inputs, and mistakes one edge for another where a
    layer that runs several times reads what it has made before.
    """
    cat, dim = node.module, getattr(node.grad_fn, "_saved_dim", 1)
    if 1 != dim < 2**63:  # counted from the front; from the end, it may be that of the channels
        return
    if cat.concat_sizes is None:
        cat.concat_sizes, node.made = _concat_sizes(built, node)
    width = _shape_infer.infer_in_channels_recursively(built, node, [0])
    if None in cat.concat_sizes or width not in (None, sum(cat.concat_sizes)):
        return  # along something else
    if not node.enable_index_mapping or (width is None and len(node.made) < len(cat.concat_sizes)):
        return
    cat.offsets = list(accumulate([0, *cat.concat_sizes]))
    before: dict[Any, int] = {}
    for back, part in zip(node.dependencies, node.made, strict=False):  # its inputs come first
        source, offset = back.target, cat.offsets[part : part + 2]
        readers = source.dependencies[len(source.inputs) :]
        there = [dep for dep in readers if dep.target is node][before.get(source, 0)]
        before[source] = before.get(source, 0) + 1
        back.index_mapping[1] = _index_mapping._ConcatIndexMapping(offset, reverse=True)
        there.index_mapping[1] = _index_mapping._ConcatIndexMapping(offset, reverse=False)


def _concat_sizes(built: Any, node: Any) -> tuple[list[int | None], list[int]]:
    """The sizes of a concatenation's parts, and which of them the graph's inputs of it are.

    Where several parts side by side are not in the graph, the first stands for all of them.
    """
    edges = node.grad_fn.next_functions
    made = [i for i, (fn, _) in enumerate(edges) if fn is not None]
    starts = [i for i in range(len(edges)) if i not in made and (i == 0 or i - 1 in made)]
    whole, shapes = _shape(node.grad_fn, 0), [_shape(*edges[i]) for i in made]
    known = len(made) == len(node.inputs) and all(len(s) == len(whole) for s in shapes)
    if not known or len(starts) > 1 or len(whole) not in ((2, 3, 4, 5) if starts else (2, 4, 5)):
        widths = [_shape_infer.infer_channels_between(built, n, node) for n in node.inputs]
        return widths, list(range(len(widths)))
    dim = node.grad_fn._saved_dim
    dim -= 2**64 if dim >= 2**63 else 0
    sizes: list[int | None] = [0] * len(edges)
    for i, shape in zip(made, shapes, strict=True):
        sizes[i] = int(shape[dim])
    for i in starts:
        sizes[i] = int(whole[dim]) - sum(int(shape[dim]) for shape in shapes)
    return sizes, made


def _map_slice(built: Any, node: Any) -> None:
    """The map of a slice, unless it is along positions behind the channels, such as time.

    Upstream takes the last of three dimensions for that of the channels, as in linear layers.
    """
    if not hasattr(node, "behind"):  # what autograd has kept is of the time of the tracing
        shape, dim = node.grad_fn._saved_self_sym_sizes, node.grad_fn._saved_dim
        dim -= 2**64 if dim >= 2**63 else 0
        width = _shape_infer.infer_out_channels_recursively(built, node.inputs[0], [0])
        node.behind = len(shape) > 2 and dim % len(shape) > 1 and shape[1] == width != shape[dim]
    if not node.behind:
        _index_mapping.update_slice_index_mapping(built, node)


def _map_reshape(built: Any, node: Any) -> None:
    """The map of a flatten of channels and positions, by the shapes.

    Upstream takes all that is read from there for positions of these channels, each channel's side
    by side. So it loses them where several flattens are put side by side, or channels come last.
    """
    width = _shape_infer.infer_out_channels_recursively(built, node.inputs[0], [0])
    if not hasattr(node, "flatten"):  # what autograd has kept is of the time of the tracing
        shape: tuple[int, ...] = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        flat, node.flatten = _shape(node.grad_fn, 0), None
        if len(shape) > 2 and len(flat) > 2:
            first = flat[:2] == shape[:2] and width == shape[1]
            if first or flat[-1] == shape[-1] == width:  # positions alone are flattened
                node.flatten = 1, False
        elif len(shape) > 2 and flat == (shape[0], math.prod(shape[1:])):
            if width == shape[1] and (len(shape) > 3 or width != shape[2]):
                node.flatten = math.prod(shape[2:]), False  # where both fit, upstream says
            elif width == shape[-1] != shape[1]:
                node.flatten = math.prod(shape[1:-1]), True
    if node.flatten is None or width is None:
        _index_mapping.update_reshape_index_mapping(built, node)
        return
    times, last = node.flatten
    for source in node.inputs:
        for one, other, back in ((node, source, True), (source, node, False)):
            for dep in one.dependencies:
                if dep.target is other:
                    dep.index_mapping[0] = (
                        _Repeated(width, times, back)
                        if last
                        else _index_mapping._FlattenIndexMapping(stride=times, reverse=back)
                    )


@dataclass(frozen=True)
class _Repeated:
    """The map of a flatten of positions, each with all channels.

    Attributes:
        width: how many channels there are.
        times: how many positions.
        reverse: whether from a place among all to a channel.
    """

    width: int
    times: int
    reverse: bool


def _shape(node: Any, output: int) -> tuple[int, ...]:
    """The shape of one of the outputs of an operation that autograd has noted."""
    known = getattr(node, "_input_metadata", None)
    return tuple(known[output].shape) if known else ()


_MAPS = {
    tp.ops.OPTYPE.CONCAT: _map_concat,
    tp.ops.OPTYPE.SPLIT: _map_split,
    tp.ops.OPTYPE.RESHAPE: _map_reshape,
    tp.ops.OPTYPE.UNBIND: _index_mapping.update_unbind_index_mapping,
    tp.ops.OPTYPE.EXPAND: _index_mapping.update_expand_index_mapping,
    tp.ops.OPTYPE.SLICE: _map_slice,
}


_SHAPES = _shape_infer.init_shape_information


def _note_splits(built: Any) -> None:
    """Note the sizes of splits from what autograd has kept; only of others upstream searches them.

    It searches through all readers of all parts, which takes ever longer in a loop.
    """
    rest = copy.copy(built)
    rest.module2node = {}
    for module, node in built.module2node.items():
        sizes = None
        if node.type == tp.ops.OPTYPE.SPLIT:
            with contextlib.suppress(AttributeError, IndexError, TypeError):
                sizes = _split_sizes(built, node)
        if sizes is None:
            rest.module2node[module] = node
        else:
            module.split_sizes, module.offsets = sizes, list(accumulate([0, *sizes]))
    _SHAPES(rest)


def _update_maps(graph: Any) -> None:
    """Work out upstream's index maps, unless nothing was removed since the last time.

    An operation whose sizes upstream does not know gets none; a group that passes through it is
    refused when it is tried.
    """
    if not getattr(graph, "maps_valid", False):
        for node in list(graph.module2node.values()):
            if node.type in _MAPS:
                with contextlib.suppress(AttributeError, IndexError, TypeError, ZeroDivisionError):
                    _MAPS[node.type](graph, node)
        graph.maps_valid = bool(getattr(graph, "module2node", None))
        graph.edges = sum(len(node.dependencies) for node in graph.module2node.values())
        graph.widest = max((max(p.shape, default=1) for p in graph.model.parameters()), default=1)


@contextmanager
def installed() -> Iterator[None]:
    """Let upstream take this walk for its own inside."""
    theirs = tp.DependencyGraph.get_pruning_group, _index_mapping.update_index_mapping
    tp.DependencyGraph.get_pruning_group = _group_of
    _index_mapping.update_index_mapping = _update_maps
    _shape_infer.init_shape_information = _note_splits
    try:
        yield
    finally:
        tp.DependencyGraph.get_pruning_group, _index_mapping.update_index_mapping = theirs
        _shape_infer.init_shape_information = _SHAPES
