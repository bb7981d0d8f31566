"""Which positions of what an operation puts out are which positions of what it is given.

torch-pruning keeps an index map for either way along each edge of its graph. What this file works
around, all of it in torch-pruning 1.6.1:

- Maps are worked out anew for every group (``index_mapping``), though only a removal changes them.
- How many channels come along is told by the layers around (``shape_infer``): a slice counts for as
  wide as what it is taken from, and a concatenation that is flattened for as wide as what reads it.
  Here the shapes count that autograd has noted while the network was traced.
- Along which dimension channels lie is told by the number of dimensions: so it loses slices of
  sequences with channels first, and concatenations of maps with channels last.
- The ends of a slice that are counted from the end are numbers beyond 2**63.
- What is read behind a flatten is taken for positions of one layer's channels, with those of a
  channel side by side: not so where several flattens are concatenated, or behind a flatten of
  tokens (``update_reshape_index_mapping``).
- The map of a split has the place of that of a slice, or a flatten, which reads a part of it.
- After a removal a split keeps its old offsets (``SplitPruner``), and a slice takes its own
  positions for those of what it is taken from (``SlicePruner``).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)
from torch_pruning.dependency import index_mapping as _index_mapping  # noqa: E402
from torch_pruning.dependency import shape_infer as _shape_infer  # noqa: E402

Meeting = tuple[Tensor, Tensor]
"""Positions in a layer, and the root's channel at each (-1: unknown): both int64 (N,)."""

_CONCAT, _SPLIT, _SLICE = tp.ops.OPTYPE.CONCAT, tp.ops.OPTYPE.SPLIT, tp.ops.OPTYPE.SLICE
_RESHAPE = tp.ops.OPTYPE.RESHAPE


# ---------------------------------------------------------------------- what maps do


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


def _maps(dep: Any) -> Iterator[Any]:
    """The index maps of a dependency, in the order in which they apply.

    The first is what its source does to what it puts out, as a split; the second what its target
    does to what it reads, as a concatenation. Backward it is the other way round.
    """
    first, second = dep.index_mapping
    if getattr(second, "reverse", False):
        first, second = second, first
    return (of for of in (first, second) if of is not None)


def passes_by(dep: Any, first: int, last: int) -> bool:
    """Whether none of the positions from a first to a last one are in the part that a map keeps.

    What reads many parts has as many dependencies, most of which lead elsewhere.
    """
    of: Any = next(_maps(dep), None)
    if isinstance(of, _index_mapping._ConcatIndexMapping):
        keeps = of.reverse
    else:
        keeps = isinstance(of, _index_mapping._SplitIndexMapping) and not of.reverse
    return bool(keeps) and bool(last < of.offset[0] or first >= of.offset[1])


def mapped(dep: Any, pairs: Meeting, widest: int) -> Meeting:
    """What the index maps of a dependency make of pairs, all at once.

    Upstream guesses from the number of channels which reshapes are flattens. After a wrong guess it
    would multiply positions for hours, so their number is bounded.

    Raises:
        OverflowError: a reshape would make more positions than any layer has.
    """
    for of in _maps(dep):
        places, channels = pairs
        if isinstance(of, (_index_mapping._FlattenIndexMapping, _Repeated)) and of.reverse:
            inside = places % of.width if isinstance(of, _Repeated) else places // of._stride
            codes = coded(inside, channels + 1).unique()
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


def coded(places: Tensor, channels: Tensor) -> Tensor:
    """Each pair as one number; a layer has fewer than 2**31 channels."""
    return (places << 32) + channels


# ---------------------------------------------------------------------- how wide things are
# What autograd has kept is of the time of the tracing, so it is asked once, and what it says is
# noted on the node.


def _once(node: Any, what: str, ask: Callable[[Any, Any], Any], built: Any) -> Any:
    """What an operation does, asked the first time; ``None`` if autograd has not noted it."""
    if not hasattr(node, what):
        setattr(node, what, None)
        with contextlib.suppress(AttributeError, IndexError, TypeError):
            setattr(node, what, ask(built, node))
    return getattr(node, what)


def _shape(traced: Any, output: int) -> tuple[int, ...]:
    """The shape of one of the outputs of an operation that autograd has noted."""
    known = getattr(traced, "_input_metadata", None)
    return tuple(known[output].shape) if known else ()


def _signed(number: int) -> int:
    """A number as autograd keeps it, in which those counted from the end are beyond 2**63."""
    return number - 2**64 if number >= 2**63 else number


def _width(built: Any, node: Any) -> int | None:
    """How many channels a node puts out; a split puts out all that it is given."""
    memo: dict[Any, int | None] = built.__dict__.setdefault("widths", {})
    ahead, opened = [node], set()
    while ahead:
        here = ahead[-1]
        known = None if here in memo else built.get_out_channels(here)
        waiting = []
        if here not in memo and known is None and here not in opened:
            opened.add(here)
            waiting = [n for n in here.inputs if n not in memo and n not in opened]
        if waiting:
            ahead += waiting
            continue
        ahead.pop()
        if here not in memo:
            memo[here] = _passed_on(built, here) if known is None else known
    return memo.get(node)


def _passed_on(built: Any, node: Any) -> int | None:
    """The width of what an operation makes of its inputs, whose widths are known."""
    read = _read(built, node)
    given = next(iter(read), None)
    if node.type == _CONCAT and _is_along(built, node):
        return sum(node.module.concat_sizes)  # type: ignore[no-any-return]
    if node.type == _SLICE and given is not None and _is_sliced(built, node):
        return len(range(given)[node.module.start : node.module.end : node.module.step])
    if node.type == _RESHAPE and given is not None and _flatten(built, node):
        return given * node.flatten[0]  # type: ignore[no-any-return]
    layers = [w for w, n in zip(read, node.inputs, strict=True) if not _is_bare(n)]
    width = max((w for w in layers or read if w is not None), default=None)
    return width if width is None or _carries(built, node, width) else None


def _carries(built: Any, node: Any, width: int) -> bool:
    """Whether what an operation puts out has a dimension as wide as what it is given.

    Not so where channels are divided or summed up; they are lost there. Of a graph that a pruner of
    the user's own has pruned before, the shapes are not those of the tracing any more.
    """
    if not hasattr(node, "carries"):
        shape = () if built._pruning_history else _shape(node.grad_fn, 0)
        node.carries = node.type == _SPLIT or not shape or width in shape[1:]
    return bool(node.carries)


def _is_bare(node: Any) -> bool:
    """Whether a node is a parameter, whose dimension for channels upstream guesses."""
    return isinstance(node.module, nn.Parameter)


def _read(built: Any, node: Any) -> list[int | None]:
    """The width of each of an operation's inputs."""
    widths: list[int | None] = []
    before: dict[Any, int] = {}
    for source in node.inputs:
        number = before.setdefault(source, 0)
        before[source] += 1
        width = _width(built, source)
        if source.type == _SPLIT and _parts(built, source):
            width = source.module.split_sizes[source.parts[node][number]]
        elif source.type == _SPLIT and source.module.split_sizes:
            width = None  # of one of the parts
        widths.append(width)
    return widths


def _given(built: Any, node: Any) -> int | None:
    """The width of an operation's first input, ``None`` too if the graph has none of it."""
    return next(iter(_read(built, node)), None)


# ---------------------------------------------------------------------- what operations do


def _split_sizes(built: Any, node: Any) -> list[int] | None:
    """The channels of all parts of a split, or ``None`` if it is along something else."""
    traced = node.grad_fn
    shape, dim = traced._saved_self_sym_sizes, _signed(traced._saved_dim)
    width = _given(built, node)
    if not -len(shape) <= dim < len(shape):
        return None
    if width is None and (dim == -1 or (dim == 1 and len(shape) != 3)):  # behind a product, say
        width = shape[dim]
    if width is None or shape[dim] != width:
        return None
    if hasattr(traced, "_saved_split_sizes"):
        return list(traced._saved_split_sizes)
    size = traced._saved_split_size
    return [min(size, width - start) for start in range(0, width, size)]


def _parts(built: Any, node: Any) -> dict[Any, list[int]] | None:
    """Which parts of a split along the channels each reader has; ``None`` if that is not known."""
    return _once(node, "parts", _split_parts, built)  # type: ignore[no-any-return]


def _split_parts(built: Any, node: Any) -> dict[Any, list[int]] | None:
    sizes = _split_sizes(built, node)
    if sizes is None:
        return None
    node.module.split_sizes, node.module.offsets = sizes, list(accumulate([0, *sizes]))
    edges = {r: r.grad_fn.next_functions for r in node.outputs}
    parts = {r: [i for fn, i in e if fn is node.grad_fn] for r, e in edges.items()}
    complete = all(len(p) == node.outputs.count(r) for r, p in parts.items())
    return parts if complete else None


def _is_along(built: Any, node: Any) -> bool:
    """Whether a concatenation is along the channels, with parts of known sizes."""
    return bool(_once(node, "along", _concatenates_channels, built))


def _concatenates_channels(built: Any, node: Any) -> bool:
    cat, dim = node.module, _signed(getattr(node.grad_fn, "_saved_dim", 1))
    kept = cat.concat_sizes
    cat.concat_sizes, node.made, shapes = _concat_sizes(built, node)
    if None in cat.concat_sizes or dim == 0:
        return False
    widths = _read(built, node)
    sizes = [cat.concat_sizes[i] for i in node.made]
    known = [(w, s) for w, s in zip(widths, sizes, strict=True) if w is not None]
    if shapes and known:
        if any(w != s for w, s in known):
            # Along something else, or a pruner of the user's own has kept count since the tracing.
            read = _shape_infer.infer_in_channels_recursively(built, node, [0])
            if kept is None or None in kept or kept != widths or read != sum(kept):
                return False
            cat.concat_sizes, node.made = kept, list(range(len(kept)))
            return True
        return dim < 2 or all(s[1] != w for s, w in zip(shapes, widths, strict=True))
    if dim > 1:
        return False
    width = _shape_infer.infer_in_channels_recursively(built, node, [0])
    whole = len(node.made) == len(cat.concat_sizes)
    return bool(width == sum(cat.concat_sizes) or (width is None and whole))


def _concat_sizes(
    built: Any, node: Any
) -> tuple[list[int | None], list[int], list[tuple[int, ...]]]:
    """The sizes of a concatenation's parts, and which of them the graph's inputs of it are.

    Where several parts side by side are not in the graph, the first stands for all of them. Last,
    the shapes of those that are; none where autograd has not noted them.
    """
    edges = node.grad_fn.next_functions
    made = [i for i, (fn, _) in enumerate(edges) if fn is not None]
    starts = [i for i in range(len(edges)) if i not in made and (i == 0 or i - 1 in made)]
    whole, shapes = _shape(node.grad_fn, 0), [_shape(*edges[i]) for i in made]
    known = len(made) == len(node.inputs) and all(len(s) == len(whole) for s in shapes)
    if not known or len(starts) > 1 or len(whole) not in (2, 3, 4, 5):
        widths = _read(built, node)
        return widths, list(range(len(widths))), []
    dim = _signed(node.grad_fn._saved_dim)
    sizes: list[int | None] = [0] * len(edges)
    for i, shape in zip(made, shapes, strict=True):
        sizes[i] = int(shape[dim])
    for i in starts:
        sizes[i] = int(whole[dim]) - sum(int(shape[dim]) for shape in shapes)
    return sizes, made, shapes


def _is_sliced(built: Any, node: Any) -> bool | None:
    """Whether a slice is along the channels; ``None`` if how many there are is not known."""
    return _once(node, "sliced", _slices_channels, built)  # type: ignore[no-any-return]


def _slices_channels(built: Any, node: Any) -> bool | None:
    shape, counted = node.grad_fn._saved_self_sym_sizes, _signed(node.grad_fn._saved_dim)
    width = _given(built, node)
    fits = [d for d in range(1, len(shape)) if shape[d] == width]
    if width is None or not fits:
        return None
    dim = counted % len(shape)
    if dim not in fits:
        return False
    if len(fits) > 1 and counted > 0 and dim != (2 if len(shape) == 3 else 1):
        return False  # as upstream has it, where the shape does not tell
    ends = slice(_signed(node.module.start), _signed(node.module.end))
    node.module.start, node.module.end, _ = ends.indices(width)
    return True


def _flatten(built: Any, node: Any) -> tuple[int, bool] | None:
    """Of a flatten how many positions each channel has, and whether channels come last.

    ``None`` for what is no flatten, or may be one of either kind.
    """
    return _once(node, "flatten", _flattened, built)  # type: ignore[no-any-return]


def _flattened(built: Any, node: Any) -> tuple[int, bool] | None:
    shape, flat = tuple(node.grad_fn._saved_self_sym_sizes), _shape(node.grad_fn, 0)
    width = _given(built, node)
    if flat[-1:] == shape[-1:] == (width,) and width not in shape[1:-1]:
        return 1, False  # positions alone, with channels behind them
    if len(shape) > 2 and len(flat) > 2 and flat[:2] == shape[:2] and width == shape[1]:
        return 1, False
    if len(shape) > 2 and flat == (shape[0], math.prod(shape[1:])):
        if width == shape[1] and (len(shape) > 3 or width != shape[2]):
            return math.prod(shape[2:]), False
        if width == shape[-1] != shape[1]:
            return math.prod(shape[1:-1]), True
    return None


# ---------------------------------------------------------------------- the maps of a graph


def _both_ways(node: Any, source: Any) -> Iterator[tuple[Any, bool]]:
    """The dependencies between an operation and one of its inputs, and whether they lead back."""
    for one, other, back in ((node, source, True), (source, node, False)):
        for dep in one.dependencies:
            if dep.target is other:
                yield dep, back


def _map_split(built: Any, node: Any) -> None:
    """The map of a split, by the numbers of its parts.

    Upstream has none along a dimension that is counted from the front, unless it is the second, nor
    behind a parameter with three dimensions; and it numbers the parts as it comes across them. Its
    own map is taken where a part's reader is a layer that runs several times.
    """
    if not _parts(built, node):
        _index_mapping.update_split_index_mapping(built, node)
        return
    for reader, parts in node.parts.items():
        there = [dep for dep in node.dependencies if dep.target is reader]
        back = [dep for dep in reader.dependencies if dep.target is node]
        for part, one, other in zip(parts, there, back, strict=True):
            offset = node.module.offsets[part : part + 2]
            one.index_mapping[0] = _index_mapping._SplitIndexMapping(offset, reverse=False)
            other.index_mapping[0] = _index_mapping._SplitIndexMapping(offset, reverse=True)


def _map_concat(built: Any, node: Any) -> None:
    """The map of a concatenation, by the sizes of its parts.

    Upstream leaves out the parts that nothing in the graph has made, such as the network's inputs,
    and mistakes one edge for another where a layer that runs several times reads what it has made
    before.
    """
    if not _is_along(built, node) or not node.enable_index_mapping:
        return
    cat = node.module
    cat.offsets = list(accumulate([0, *cat.concat_sizes]))
    before: dict[Any, int] = {}
    for back, part in zip(node.dependencies, node.made, strict=False):  # its inputs come first
        source, offset = back.target, cat.offsets[part : part + 2]
        readers = source.dependencies[len(source.inputs) :]
        there = [dep for dep in readers if dep.target is node][before.get(source, 0)]
        before[source] = before.get(source, 0) + 1
        back.index_mapping[1] = _index_mapping._ConcatIndexMapping(offset, reverse=True)
        there.index_mapping[1] = _index_mapping._ConcatIndexMapping(offset, reverse=False)


def _map_slice(built: Any, node: Any) -> None:
    """The map of a slice, unless it is along something else, such as time."""
    sliced = _is_sliced(built, node)
    if sliced is None:
        _index_mapping.update_slice_index_mapping(built, node)
    if not sliced:
        return
    cut = node.module
    for dep, back in _both_ways(node, node.inputs[0]):
        dep.index_mapping[1] = _index_mapping._SliceIndexMapping(
            cut.dim, cut.start, cut.step, cut.end, back
        )


def _map_reshape(built: Any, node: Any) -> None:
    """The map of a flatten of channels and positions, by the shapes."""
    width = _given(built, node)
    if _flatten(built, node) is None or width is None:
        _index_mapping.update_reshape_index_mapping(built, node)
        return
    times, last = node.flatten
    for dep, back in _both_ways(node, node.inputs[0]):
        dep.index_mapping[1] = (
            _Repeated(width, times, back)
            if last
            else _index_mapping._FlattenIndexMapping(stride=times, reverse=back)
        )


_MAPS = {
    _CONCAT: _map_concat,
    _SPLIT: _map_split,
    _RESHAPE: _map_reshape,
    tp.ops.OPTYPE.UNBIND: _index_mapping.update_unbind_index_mapping,
    tp.ops.OPTYPE.EXPAND: _index_mapping.update_expand_index_mapping,
    _SLICE: _map_slice,
}


_SHAPES, _ALL = _shape_infer.init_shape_information, _index_mapping.update_index_mapping


def _note_splits(built: Any) -> None:
    """Note the sizes of splits from what autograd has kept; only of others upstream searches them.

    It searches through all readers of all parts, which takes ever longer in a loop.
    """
    rest = copy.copy(built)
    rest.module2node = {
        module: node
        for module, node in built.module2node.items()
        if node.type != _SPLIT or not (_parts(built, node) or node.module.split_sizes)
    }
    _SHAPES(rest)


def update(built: Any) -> None:
    """Work out all maps of a graph, unless nothing was removed since the last time.

    An operation whose sizes upstream does not know gets none; a group that passes through it is
    refused when it is tried.
    """
    if not getattr(built, "maps_valid", False):
        forget(built)
        for node in list(built.module2node.values()):
            if node.type in _MAPS:
                with contextlib.suppress(AttributeError, IndexError, TypeError, ZeroDivisionError):
                    _MAPS[node.type](built, node)
        built.maps_valid = bool(getattr(built, "module2node", None))
        built.edges = sum(len(node.dependencies) for node in built.module2node.values())
        built.widest = max((max(p.shape, default=1) for p in built.model.parameters()), default=1)
        built.furthest = _furthest(built)


def _furthest(built: Any) -> int:
    """Beyond all positions there are: what removals leave is never wider than what was traced."""
    traced = [node.grad_fn for node in built.module2node.values() if not _is_bare(node)]
    shapes = [_shape(one, 0) for one in traced]
    if not all(shapes):
        return int(16 * built.widest)
    return max(int(built.widest), *(max(shape) for shape in shapes))


def forget(built: Any) -> None:
    """Drop all maps of a graph: upstream by itself would take some in addition to its own."""
    for node in built.module2node.values():
        for dep in node.dependencies:
            dep.index_mapping = [None, None]
    built.widths, built.maps_valid = {}, False


@contextmanager
def removing(built: Any, *mets: dict[tuple[Any, Any], Meeting]) -> Iterator[None]:
    """Note what becomes of splits and slices when some positions go; the maps are invalid then.

    Args:
        built: the graph.
        mets: by node and function the positions that go, as :attr:`walk.Group.met`.
    """
    gone: dict[Any, Tensor] = {}
    for (node, function), (places, _) in (at for met in mets for at in met.items()):
        if not built.is_out_channel_pruning_fn(function):
            continue
        gone[node] = torch.cat([gone.get(node, places[:0]), places]).unique()
    ends: dict[Any, tuple[int, ...]] = {}
    for node in built.module2node.values():
        if node.type == _SLICE and getattr(node, "sliced", None):
            source, cut = node.inputs[0], node.module
            places = gone.get(source, torch.zeros(0, dtype=torch.int64, device="cpu"))
            if source.type == _SPLIT and getattr(source, "parts", None):
                (part,) = source.parts[node]
                places = places - source.module.offsets[part]
                places = places[(places >= 0) & (places < source.module.split_sizes[part])]
            ends[cut] = tuple(end - int((places < end).sum()) for end in (cut.start, cut.end))
    try:
        yield
    finally:
        built.maps_valid = False
    for cut, (start, end) in ends.items():
        cut.start, cut.end = start, end
    for module in built.module2node:
        if isinstance(module, tp.ops._SplitOp) and None not in (module.split_sizes or [None]):
            module.offsets = list(accumulate([0, *module.split_sizes]))


@contextmanager
def installed() -> Iterator[None]:
    """Let upstream take these maps for its own inside."""
    _index_mapping.update_index_mapping = update
    _shape_infer.init_shape_information = _note_splits
    try:
        yield
    finally:
        _index_mapping.update_index_mapping = _ALL
        _shape_infer.init_shape_information = _SHAPES
