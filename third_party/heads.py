"""Whole attention heads, in whatever layers and parameters a network keeps them.

All of this is ours. torch-pruning follows channels from operation to operation, and loses them
where a forward pass divides them among heads. Here the heads are read off autograd instead. Behind
every product with a softmax, or PyTorch's fused one, comes a layer whose inputs belong to one head
each; what has a gradient from one head's inputs alone is that head's: rows of queries, keys and
values, fused or not, their biases, columns of a table of positions. What heads share ties them
together, as a head of keys and values that serves several of queries; what all of them share stays.
The numbers of heads that modules keep are found by trying.
"""

from __future__ import annotations

import copy
import hashlib
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from . import running
from .groups import Plan, Share, UnsupportedLayerError, UpstreamGroup

Table = list[list[int]]
"""Positions by structure, equally many for each, in ascending order."""
Leaf = tuple[str, int]
"""A parameter's or buffer's name, and one of its dimensions."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention, or of several that only go together.

    Attributes:
        root: the name of the layer of the values, after which the group is named.
        parts: what goes with each structure: by (name of a parameter or buffer, dimension) the
            positions.
        inputs: those of ``parts`` that read the heads' outputs: columns of the output layer.
        owners: (name of a layer, positions in its output): the values.
        numbers: (module's name, attribute): whole numbers that shrink in proportion to the heads.
            An attribute may be one of an attribute, as ``config.num_attention_heads``.
    """

    root: str
    parts: dict[Leaf, Table]
    inputs: frozenset[Leaf]
    owners: tuple[tuple[str, Table], ...]
    numbers: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """How many structures there are."""
        return len(self.members)

    @property
    def members(self) -> Table:
        """The root's output channels by structure."""
        return next(t for (name, _), t in self.parts.items() if name == f"{self.root}.weight")

    @property
    def layers(self) -> set[str]:
        """Names of the modules whose outputs are the heads'."""
        return {_owner(name) for name, dim in self.parts if (name, dim) not in self.inputs}

    def group(self, model: nn.Module) -> UpstreamGroup:
        """The heads of a model as structures."""
        own = dict(model.named_parameters(remove_duplicate=False))
        shares = [
            Share(name, own[name], dim, False, index)
            for (name, dim), index in self.parts.items()
            if (name, dim) not in self.inputs and name in own
        ]
        layers = [(model.get_submodule(name), table) for name, table in self.owners]
        owners = [(layer, _axis(layer), table) for layer, table in layers]
        return UpstreamGroup(self.root, self.members, True, shares, owners)

    def structures_of(self, channels: Sequence[int]) -> list[int]:
        """The structures that some of the root's channels make up.

        Raises:
            UnsupportedLayerError: see :meth:`~.groups.UpstreamGroup.structures_of`.
        """
        return UpstreamGroup(self.root, self.members, True).structures_of(channels)

    def without(self, structures: Iterable[int]) -> Heads:
        """What is left of these heads when some have gone, with positions counted anew."""
        gone = set(structures)

        def left(table: Table, of: Table) -> Table:
            missing = sorted(p for k in gone for p in of[k])
            kept = [positions for k, positions in enumerate(table) if k not in gone]
            return [[p - bisect_left(missing, p) for p in positions] for positions in kept]

        rows = {name: table for (name, _), table in self.parts.items()}
        return replace(
            self,
            parts={leaf: left(table, table) for leaf, table in self.parts.items()},
            owners=tuple((n, left(table, rows[f"{n}.weight"])) for n, table in self.owners),
        )

    def remove(self, model: nn.Module, structures: Iterable[int]) -> None:
        """Take heads out of a model, in place; parameters become new objects.

        Raises:
            UnsupportedLayerError: none would be left.
        """
        gone = set(structures)
        if len(gone) >= self.count:
            raise UnsupportedLayerError(f"the removal leaves no head of {self.root!r}")
        names = _all_names(model)
        for (name, dim), table in self.parts.items():
            old = _tensor(model, name)
            missing = {p for k in gone for p in table[k]}
            keep = [p for p in range(old.shape[dim]) if p not in missing]
            new = _selected(old, dim, torch.tensor(keep, device=old.device))
            for other in names[name]:
                setattr(model.get_submodule(_owner(other)), other.rpartition(".")[2], new)
        for layer in {_owner(name) for name, _ in self.parts}:
            _renumber(model.get_submodule(layer))
        self.count_without(model, gone)

    def count_without(self, model: nn.Module, structures: Iterable[int]) -> None:
        """Bring a model's own numbers of heads up to date when some have gone."""
        for module, attribute in self.numbers:
            left = self.count - len(set(structures))
            _scale(model.get_submodule(module), attribute, left, self.count)


@dataclass
class Found:
    """The heads of a network.

    Attributes:
        heads: those that can go.
        refused: why others cannot, by the name of the layer of their values, in words that follow
            "the group of ...".
        layers: names of all layers that compute heads, of both kinds.
    """

    heads: list[Heads] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)

    def of(self, layer: str) -> Heads | None:
        """The heads that a layer computes, in the group of that name."""
        for heads in self.heads:
            if any(name == f"{layer}.weight" for name, dim in heads.parts.keys() - heads.inputs):
                return replace(heads, root=layer)
        return None

    def whole_in(self, plan: Plan) -> Found:
        """Without the heads of which a removal takes a part: upstream may know what that does."""
        parted: set[Leaf] = set()
        for layer, channels in plan:
            heads = self.of(layer)
            try:
                _ = heads and heads.structures_of(channels)
            except UnsupportedLayerError:
                parted |= heads.parts.keys() if heads else set()
        left = [h for h in self.heads if parted.isdisjoint(h.parts.keys() - h.inputs)]
        return replace(self, heads=left)


# ---------------------------------------------------------------------- layers of a known kind


def conv1d() -> tuple[Any, ...]:
    """Transformers' Conv1D, a linear layer with a transposed weight, if anybody has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    kind = getattr(module, "Conv1D", None)
    return () if kind is None else (kind,)


def weight_dims(module: nn.Module) -> tuple[int, int] | None:
    """The dimensions of outputs and inputs in the weight of a layer that mixes its inputs."""
    if isinstance(module, conv1d()):
        return 1, 0
    if isinstance(module, nn.Linear):
        return 0, 1
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return (0, 1) if module.groups == 1 else None
    return None


def _axis(layer: nn.Module) -> int:
    """The dimension of a layer's inputs and outputs that holds the channels."""
    return 1 if isinstance(layer, _ConvNd) else -1


def _renumber(module: nn.Module) -> None:
    """Bring a layer's own numbers up to date with its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, conv1d()):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        if module.groups > 1:  # a depthwise convolution
            module.groups = len(weight)
        module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = len(weight)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _tensor(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(model.get_submodule(_owner(name)), name.rpartition(".")[2])
    return tensor


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter or buffer all names of the same one."""
    same: dict[int, list[str]] = {}
    for listed in (model.named_parameters, model.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            same.setdefault(id(tensor), []).append(name)
    return {name: names for names in same.values() for name in names}


def _selected(old: Tensor, dim: int, keep: Tensor) -> Tensor:
    """Some positions of a parameter, with its gradient, or of a buffer."""
    value = old.detach().index_select(dim, keep)
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad.index_select(dim, keep)
    return new


def _scale(module: nn.Module, attribute: str, left: int, of: int) -> None:
    holder, _, last = attribute.rpartition(".")
    target: Any = module
    if holder:  # shared by all layers, which may keep unequal numbers of heads
        target = copy.copy(getattr(module, holder))
        setattr(module, holder, target)
    setattr(target, last, getattr(target, last) * left // of)


# ---------------------------------------------------------------------- following autograd's graph

_VIEWS = re.compile(
    r"(T|Transpose|View|UnsafeView|ReshapeAlias|Permute|Slice|Split|SplitWithSizes|Select|Unbind|Cat"
    r"|Expand|AsStrided|ToCopy|Clone|Alias|Squeeze|Unsqueeze|Narrow|Chunk)Backward\d*"
)
_PRODUCTS = re.compile(r"(Addmm|Mm|Bmm|Baddbmm|Linear|Mkldnn\w*|\w*Convolution\w*)Backward\d*")


@dataclass(frozen=True, eq=False)
class _Source:
    """What a tensor is computed from: a parameter, a buffer, or the output of a layer.

    Attributes:
        tensor: its value in the pass.
        leaves: by dimension of the tensor what lies along it.
        layer: whether it is a layer's output.
    """

    tensor: Tensor
    leaves: dict[int, Leaf]
    layer: bool


@dataclass
class _Behind:
    """What lies between a tensor and the layers that it comes from.

    Attributes:
        sources: outputs of those layers, and parameters and buffers on the way.
        cores: shapes of the attentions on the way.
        mixed: names of the modules whose outputs attention mixes.
    """

    sources: list[_Source] = field(default_factory=list)
    cores: list[tuple[int, ...]] = field(default_factory=list)
    mixed: set[str] = field(default_factory=set)

    @property
    def layers(self) -> list[str]:
        """Names of the modules that it all belongs to."""
        return [_owner(name) for s in self.sources for name, _ in s.leaves.values()]


def _behind(tensor: Tensor, names: Mapping[int, str], outputs: Mapping[Any, _Source]) -> _Behind:
    """Follow a tensor back.

    Args:
        tensor: of a pass with gradients.
        names: of the model's parameters and buffers, by their ids.
        outputs: of its layers, by their nodes.
    """
    found = _Behind()
    leaves: dict[int, Tensor] = {}
    ahead, seen = [(tensor.grad_fn, False)], set()
    while ahead:
        node, mixed = ahead.pop()  # mixed: by a product of two activations
        if node is None or (node, mixed) in seen:
            continue
        seen.add((node, mixed))
        name = node.name()
        if node in outputs:
            source = outputs[node]
            found.sources += [source] if source not in found.sources else []
            found.mixed |= {_owner(leaf) for leaf, _ in source.leaves.values() if mixed}
        elif hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        elif "ScaledDotProduct" in name or ("oftmax" in name and mixed):
            found.cores.append(_shape(node))
            ahead += [(n, True) for n, _ in node.next_functions]
        elif _PRODUCTS.fullmatch(name):
            weights = [_weight(n, names) for n, _ in node.next_functions]
            for weight in weights:
                leaves |= {id(t): t for t in weight or ()}
                found.mixed |= {_owner(names[id(t)]) for t in weight or () if mixed}
            if not any(weights) or getattr(node, "_saved_groups", 1) > 1:
                edges = zip(node.next_functions, weights, strict=True)
                ahead += [(n, mixed or not any(weights)) for (n, _), w in edges if not w]
        else:
            ahead += [(n, mixed) for n, _ in node.next_functions]
    for number, leaf in leaves.items():
        if number in names:
            dims = {d: (names[number], d) for d in range(leaf.dim())}
            found.sources.append(_Source(leaf, dims, False))
    return found


def _weight(node: Any, names: Mapping[int, str]) -> list[Tensor] | None:
    """The parameters that an operand is, if it is nothing but those."""
    ahead, leaves, steps = [node], [], 0
    while ahead:
        node, steps = ahead.pop(), steps + 1
        if node is None or steps > 64:
            return None
        if hasattr(node, "variable"):
            if id(node.variable) not in names:
                return None
            leaves.append(node.variable)
        elif _VIEWS.fullmatch(node.name()):
            # Constants among what is concatenated have no node.
            ahead += [n for n, _ in node.next_functions if n is not None]
        else:
            return None
    return leaves or None


def _shape(node: Any) -> tuple[int, ...]:
    """The shape of what an operation put out."""
    return tuple(node._input_metadata[0].shape)


# ---------------------------------------------------------------------- finding the heads


def find(model: nn.Module, example: Any) -> Found:
    """All heads of a network that can be removed whole.

    Args:
        model: left as it is. Its values do not matter: all is found on a copy with drawn ones.
        example: of its inputs, on its device.
    """
    if not any(weight_dims(m) for m in model.modules()):
        return Found()
    known, signature = running.remembered(model), _signature(model, example)
    if signature not in known:  # one removal asks several times
        copied = running.Precision(model, running.informative(example), 1)
        drawn, few = copied.model.eval().requires_grad_(True), copied.example
        running.draw_values(drawn, few)
        with torch.no_grad():  # or a softmax may choose one of its inputs, and have no gradient
            for parameter in drawn.parameters():
                parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
        known[signature] = _Search(drawn, few).found
    found: Found = known[signature]
    return found


def _signature(model: nn.Module, example: Any) -> str:
    """What may have changed in a network, but for the values of its parameters; and its example."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    def plain(of: Any) -> list[tuple[str, object]]:
        kinds = (int, str, float, bool, tuple, list, type(None))
        return [(k, v) for k, v in vars(of).items() if isinstance(v, kinds) and k != "training"]

    for name, module in model.named_modules(remove_duplicate=False):
        add(name, id(type(module)), plain(module), id(vars(module).get("forward")))
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            add(plain(config))
    for name, names in _all_names(model).items():
        tensor = _tensor(model, name)
        add(name, names, tensor.shape, tensor.dtype, tensor.device)
    add(running.map_tensors(example, lambda t: (t.shape, t.dtype, t.device)))
    for tensor in running.tensors(example):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class _Call:
    """One call of a layer whose inputs are the outputs of heads.

    Attributes:
        layer: its name.
        given: its input.
        behind: where that comes from.
        columns: positions in the input by head.
        touched: by leaf, whether each half of each head's positions depends on a position of the
            leaf, (2 * heads, size) bool; only where heads differ.
    """

    layer: str
    given: Tensor
    behind: _Behind
    columns: Table = field(default_factory=list)
    touched: dict[Leaf, Tensor] = field(default_factory=dict)

    def felt(self, leaf: Leaf) -> Tensor:
        """Whether each head depends on a position of a leaf, (heads, size) bool."""
        return self.touched[leaf][0::2] | self.touched[leaf][1::2]

    def own(self, leaf: Leaf) -> Tensor:
        """Whether a position of a leaf belongs to some heads, and not to all, (size,) bool."""
        count = self.felt(leaf).sum(0)
        return (count > 0) & (count < len(self.columns))


class _Search:
    """The search, in a copy of a model that may be changed."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._names = {m: n for n, m in model.named_modules()}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {id(t): n for n, t in tensors}
        self._layers = {n: m for m, n in self._names.items() if weight_dims(m) is not None}
        self.found = Found()
        for together in _joined(self._divided()):
            behind = dict.fromkeys(n for call in together for n in call.behind.layers)
            listed = [n for n in behind if n in self._layers]
            self.found.layers |= set(listed)
            try:
                self.found.heads.append(self._heads(together))
            except UnsupportedLayerError as why:
                self._refuse([*listed, together[0].layer][0], listed, str(why))
        self._find_numbers()

    def _refuse(self, root: str, layers: Iterable[str], why: str) -> None:
        self.found.refused[root] = f"{why} (the layers of its heads: {', '.join(layers)})"

    def _divided(self) -> list[_Call]:
        """Calls of layers that read heads, with what belongs to which head."""
        buffers = [
            buffer
            for module in self._model.modules()
            for buffer in module.buffers(recurse=False)
            if buffer.is_floating_point() and not isinstance(module, _NormBase)
        ]
        for parts in (buffers, []):  # a buffer, too, may have a part for every head
            for buffer in parts:
                buffer.requires_grad_(True)
            try:
                return [call for call in self._calls() if self._divide(call)]
            except (RuntimeError, NotImplementedError):  # as where a pass writes to a buffer
                continue
            finally:
                for buffer in parts:
                    buffer.requires_grad_(False)
                self._outputs = None
        return []  # something without a gradient

    def _calls(self) -> list[_Call]:
        """Calls of layers whose inputs come from an attention."""
        given: list[tuple[str, Tensor]] = []
        outputs: dict[Any, _Source] = {}

        def cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Note a layer's input, and let gradients end there: what is before is another's."""
            if not inputs or not isinstance(inputs[0], Tensor):
                return inputs
            given.append((self._names[module], inputs[0]))
            apart = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
            return apart.clone(), *inputs[1:]

        def note(module: nn.Module, _inputs: object, output: object) -> None:
            name = f"{self._names[module]}.weight"
            axis, rows = _axis(module), self._rows(name)
            weight: Any = module.weight
            if isinstance(output, Tensor) and output.shape[axis] == weight.shape[rows]:
                dims = {axis % output.dim(): (name, rows)}
                outputs[output.grad_fn] = _Source(output, dims, True)

        hooks = [m.register_forward_pre_hook(cut) for m in self._layers.values()]
        hooks += [m.register_forward_hook(note) for m in self._layers.values()]
        try:
            with torch.enable_grad():  # kept, as nothing else may hold on to what is between
                watched = running.Watched()
                self._outputs = running.probe(self._model, self._example, watched=watched)
        finally:
            for hook in hooks:
                hook.remove()
        self._eps = watched.eps
        traced = [(n, t) for n, t in given if t.grad_fn is not None]
        calls = [_Call(n, t, _behind(t, self._tensors, outputs)) for n, t in traced]
        return [c for c in calls if c.behind.cores]

    # ------------------------------------------------------------------ one call

    def _divide(self, call: _Call) -> bool:
        """Find out what belongs to which head; false if nothing tells heads apart.

        Too fine a division does no harm: what a head shares with another ties them.
        """
        width = call.given.shape[_axis(self._layers[call.layer])]
        counts = [shape[-3] for shape in call.behind.cores if len(shape) >= 4]
        counts += self._heads_by_name(call)
        for count in dict.fromkeys(counts):
            if count < 2 or width % count:
                continue
            size = width // count
            for columns in (
                [list(range(k * size, (k + 1) * size)) for k in range(count)],
                [list(range(k, width, count)) for k in range(count)],
            ):
                call.columns = columns
                call.touched = self._touched(call)
                if call.touched:
                    return True
        return False

    def _heads_by_name(self, call: _Call) -> list[int]:
        """The numbers of heads that a module around a layer keeps."""
        layer = call.layer
        while layer:
            layer = _owner(layer)
            own = vars(self._model.get_submodule(layer))
            numbers = [v for k, v in own.items() if type(v) is int and _counts(k)]
            if numbers:
                return sorted(numbers, reverse=True)
        return []

    def _touched(self, call: _Call) -> dict[Leaf, Tensor]:
        sources = call.behind.sources
        tensors = [source.tensor for source in sources]
        draw = torch.Generator().manual_seed(0)
        weights = (torch.rand(call.given.shape, generator=draw) + 0.5).to(call.given)
        axis = _axis(self._layers[call.layer]) % weights.dim()
        lines: dict[Leaf, list[Tensor]] = {}
        for row, part in enumerate(p for columns in call.columns for p in _halves(columns)):
            only = torch.tensor(part, dtype=torch.int64, device=weights.device)
            seed = torch.zeros_like(weights)
            seed.index_copy_(axis, only, weights.index_select(axis, only))
            gradients = torch.autograd.grad(
                call.given, tensors, seed, retain_graph=True, allow_unused=True
            )
            largest = max((float(g.abs().max()) for g in gradients if g is not None), default=0.0)
            for source, gradient in zip(sources, gradients, strict=True):
                felt = torch.zeros_like(source.tensor) if gradient is None else gradient
                # What adds up to nothing but for rounding, as for a bias of all keys, is nothing.
                felt = felt.abs() > (0.0 if source.layer else 1e3 * self._eps * largest)
                for dim, leaf in source.leaves.items():
                    if felt.shape[dim] == 1:
                        continue
                    over = [d for d in range(felt.dim()) if d != dim]
                    line = (felt.any(over) if over else felt).cpu()
                    mine = lines.setdefault(leaf, [])
                    if len(mine) > row:  # another output of the same layer
                        line |= mine.pop()
                    mine.append(line)
        touched = {leaf: torch.stack(mine) for leaf, mine in lines.items()}
        by_head = {leaf: along[0::2] | along[1::2] for leaf, along in touched.items()}
        return {f: along for f, along in touched.items() if (by_head[f] != by_head[f][:1]).any()}

    # ------------------------------------------------------------------ one group

    def _heads(self, calls: Sequence[_Call]) -> Heads:
        """Attentions that share parts of their heads, as one group of structures.

        Raises:
            UnsupportedLayerError: its heads cannot go, and why, in words that follow its name.
        """
        of, structures = _structures(calls)
        parts: dict[Leaf, Table] = {}
        values: dict[Leaf, Table] = {}
        for call, by_head in zip(calls, of, strict=True):
            for leaf in call.touched:
                _merge(parts, leaf, _table(call.felt(leaf), call.own(leaf), by_head, structures))
                both = (call.touched[leaf][0::2] & call.touched[leaf][1::2]).any(0)
                once = call.own(leaf) & ~both
                _merge(values, leaf, _table(call.felt(leaf), once, by_head, structures))
        mixed = {name for call in calls for name in call.behind.mixed}
        owners = [
            (_owner(name), table)
            for (name, dim), table in values.items()
            if all(table) and self._rows(name) == dim and _owner(name) in mixed
        ]
        if structures < 2 or not owners:
            raise UnsupportedLayerError(
                "is an attention in which all heads share the same values, or their values come "
                "from no layer, so that none of them can go alone"
            )
        self._complete(parts, calls)
        inputs: set[Leaf] = set()
        for call, by_head in zip(calls, of, strict=True):
            columns: Table = [[] for _ in range(structures)]
            for k, mine in zip(by_head, call.columns, strict=True):
                columns[k] = sorted([*columns[k], *mine])
            leaf = (f"{call.layer}.weight", 1 - self._rows(f"{call.layer}.weight"))
            if parts.setdefault(leaf, columns) != columns:
                raise UnsupportedLayerError(f"has heads that {call.layer!r} reads in several ways")
            inputs.add(leaf)
        for name, table in [*((n, t) for (n, _), t in parts.items()), *owners]:
            if len({len(positions) for positions in table}) != 1:
                raise UnsupportedLayerError(
                    f"has heads with unequal parts of {name!r}; if they are equal, an example "
                    "with more, and more varied, inputs shows it"
                )
        for name, _ in parts:
            self._require_known(name)
            if len({d for n, d in parts if n == name}) > 1:
                raise UnsupportedLayerError(f"has heads with both rows and columns of {name!r}")
        return Heads(owners[0][0], parts, frozenset(inputs), tuple(owners))

    def _rows(self, name: str) -> int:
        """The dimension of outputs in a layer's weight; -1 if the name is no such weight's."""
        dims = weight_dims(self._layers.get(_owner(name), nn.Identity()))
        return -1 if dims is None or not name.endswith(".weight") else dims[0]

    def _complete(self, parts: dict[Leaf, Table], calls: Sequence[_Call]) -> None:
        """Add what no gradient shows: a bias of keys, of which a softmax takes no notice, say."""
        for (name, dim), table in list(parts.items()):
            layer = self._model.get_submodule(_owner(name))
            if self._rows(name) == dim or isinstance(layer, _NormBase):
                for what in ("bias", "weight", "running_mean", "running_var"):
                    tensor = getattr(layer, what, None)
                    if isinstance(tensor, Tensor) and (what != "weight" or tensor.dim() == 1):
                        parts[f"{_owner(name)}.{what}", 0] = table
        bare = {n: t for (n, _), t in parts.items() if _tensor(self._model, n).dim() == 1}
        for source in (s for call in calls for s in call.behind.sources if not s.layer):
            name, leaf = source.leaves[0][0], source.tensor
            for other, table in bare.items():
                beside = _owner(other) == _owner(name) and _owner(name) not in self._layers
                if beside and leaf.dim() == 1 and len(leaf) == len(_tensor(self._model, other)):
                    parts.setdefault((name, 0), table)

    def _require_known(self, name: str) -> None:
        """Refuse parts of a module whose other numbers are not known here."""
        module = self._model.get_submodule(_owner(name))
        odd = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RNNBase, _ConvTransposeNd))
        split = isinstance(module, _ConvNd) and 1 < module.groups != module.out_channels
        if odd or split or name not in self._tensors.values():
            raise UnsupportedLayerError(
                f"has heads with parts of {_owner(name)!r} ({type(module).__name__}), from which "
                "they cannot be taken"
            )

    # ------------------------------------------------------------------ numbers of heads

    def _find_numbers(self) -> None:
        """Which numbers shrink with the heads, for each kind of attention once."""
        kinds: dict[Any, list[Heads]] = {}
        for heads in self.found.heads:
            kinds.setdefault(self._kind(heads), []).append(heads)
        self.found.heads = []
        for alike in kinds.values():
            numbers = self._tried(alike[0])
            if isinstance(numbers, str) and len(alike) > 1:  # they may depend on one another
                whole = reduce(_together, alike)
                others = self._tried(whole)
                if not isinstance(others, str):
                    alike, numbers = [whole], others
            for heads in alike:
                if isinstance(numbers, str):
                    listed = sorted(heads.layers & self._layers.keys())
                    self._refuse(heads.root, listed, numbers)
                else:
                    scope = self._scope(heads)
                    chosen = tuple((scope[place], what) for place, what in numbers)
                    self.found.heads.append(replace(heads, numbers=chosen))

    def _kind(self, heads: Heads) -> Any:
        """What attentions have in common that keep their numbers alike."""
        modules = [self._model.get_submodule(name) for name in self._scope(heads)]
        whole = [{k: v for k, v in vars(m).items() if type(v) is int} for m in modules]
        numbers = [tuple(i for i in w.items() if not re.search("idx|index", i[0])) for w in whole]
        return tuple(zip(map(type, modules), numbers, strict=True)), heads.count

    def _scope(self, heads: Heads) -> list[str]:
        """Names of the modules that may keep numbers of these heads, in order."""
        layers = {_owner(name) for name, _ in heads.parts}
        scope: list[str] = []
        for reader in sorted({_owner(name) for name, _ in heads.inputs}):
            others = [n for n in layers & self._layers.keys() if n != reader]
            top = _owner(reader)
            while top and not any(n.startswith(f"{top}.") for n in others):
                top = _owner(top)
            inside = f"{top}." if top else ""
            scope += [n for n in self._names.values() if n == top or n.startswith(inside)]
        return list(dict.fromkeys([*scope, *sorted(layers)]))

    def _tried(self, heads: Heads) -> tuple[tuple[int, str], ...] | str:
        """The numbers of one attention, by the modules' places in its scope; or why none will do.

        Some heads are set to zero, and removed with one choice of numbers after the other, until
        both give the same outputs.
        """
        model, example, scope = self._model, self._example, self._scope(heads)
        dense = running.outputs(model, example)
        rounding = [100 * dense.eps * running.size(t) for t in dense.values]
        gone = [0] if heads.count < 4 else [0, heads.count // 2]
        kept = running.parts(model)
        with _at_zero(heads.group(model), gone):
            zeroed = running.outputs(model, example)
        first = ""
        for numbers in self._choices(heads, scope):
            chosen = replace(heads, numbers=tuple((scope[i], what) for i, what in numbers))
            try:
                chosen.remove(model, gone)
                off = running.unlike(zeroed, running.outputs(model, example), rounding, doubts=True)
            except Exception as cause:  # whatever a forward pass with a wrong number breaks on
                line = (str(cause).splitlines() or [""])[0]
                off = f"leaves a model that cannot run ({type(cause).__name__}: {line})"
            finally:
                running.put_back(kept)
            if off is None:
                return numbers
            first = first or off
        return (
            f"has heads, of which the removal of one {first}: its forward pass takes their number, "
            "or that of their channels, from elsewhere"
        )

    def _choices(self, heads: Heads, scope: Sequence[str]) -> Iterator[tuple[tuple[int, str], ...]]:
        """Choices of numbers to shrink, the likeliest first."""
        widths = {len(table[0]) * heads.count for table in heads.parts.values()}
        counted: list[tuple[int, str]] = []
        others: list[tuple[int, str]] = []
        shared: list[tuple[int, str]] = []
        for i, name in enumerate(scope):
            module = self._model.get_submodule(name)
            for key, value in vars(module).items():
                if type(value) is not int or value < 1 or value % heads.count:
                    continue
                if _counts(key) or key == "all_head_size":
                    counted.append((i, key))
                elif value in widths and name not in self._layers:
                    others.append((i, key))
            config = vars(module).get("config")
            for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
                if type(value) is int and value > 0 and not value % heads.count and _counts(key):
                    shared.append((i, f"config.{key}"))
        more = [(), *((one,) for one in others[:12]), *([tuple(others)] if others[1:] else [])]
        yield from ((*counted, *some) for some in more)
        if shared:
            yield from ((*counted, *some, *shared) for some in more)
        if counted:
            yield ()


def _halves(columns: list[int]) -> tuple[list[int], list[int]]:
    half = len(columns) // 2
    return columns[:half], columns[half:]


def _counts(attribute: str) -> bool:
    """Whether an attribute's name is one for a number of heads."""
    return "head" in attribute and not re.search(
        "dim|size|width|per|channel|mask|index|idx|group|feature|scale|hidden", attribute
    )


def _together(one: Heads, other: Heads) -> Heads:
    """Two attentions with as many heads, of which the same go in both."""
    return Heads(
        one.root, one.parts | other.parts, one.inputs | other.inputs, one.owners + other.owners
    )


@contextmanager
def _at_zero(group: UpstreamGroup, structures: Sequence[int]) -> Iterator[None]:
    """Some structures of a group at zero, for a while."""
    values = [(s.parameter, s.parameter.detach().clone()) for s in group.shares]
    with torch.no_grad():
        for share in group.shares:
            at = torch.tensor([p for k in structures for p in share.index[k]])
            share.parameter.index_fill_(share.dim, at.to(share.parameter.device), 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)


def _joined(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls by groups: those that share a part of their heads, or the layer, are in one."""
    groups: list[tuple[set[Any], list[_Call]]] = []
    for call in calls:
        own, mine = {*call.touched, call.layer}, [call]
        for group in [g for g in groups if g[0] & own]:
            groups.remove(group)
            own, mine = own | group[0], [*group[1], *mine]
        groups.append((own, mine))
    return [mine for _, mine in groups]


def _structures(calls: Sequence[_Call]) -> tuple[list[list[int]], int]:
    """For each call the structure of each head, and how many structures there are.

    Heads are one structure if they share a position that not all heads of the call have.

    Raises:
        UnsupportedLayerError: structures have unequal numbers of heads.
    """
    label: list[list[int]] = []
    for call in calls:
        start = sum(map(len, label))
        label.append(list(range(start, start + len(call.columns))))
    parent = list(range(sum(map(len, label))))

    def top(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    first: dict[Leaf, tuple[Tensor, list[int]]] = {}
    for call, nodes in zip(calls, label, strict=True):
        for leaf in call.touched:
            own, felt = call.own(leaf), call.felt(leaf)
            for pattern in felt[:, own].T.unique(dim=0):
                mine = [nodes[h] for h in pattern.nonzero()[:, 0].tolist()]
                for node in mine:
                    parent[top(node)] = top(mine[0])
            heads = torch.where(own, felt.byte().argmax(0), -1)
            there, others = first.setdefault(leaf, (heads, nodes))
            both = torch.stack([there, heads])[:, (there >= 0) & (heads >= 0)]
            for one, other in both.T.unique(dim=0).tolist():
                parent[top(nodes[other])] = top(others[one])
    numbers: dict[int, int] = {}
    of = [[numbers.setdefault(top(n), len(numbers)) for n in nodes] for nodes in label]
    for by_head in of:
        if len({by_head.count(k) for k in range(len(numbers))}) > 1:
            raise UnsupportedLayerError("is an attention whose heads share unequal parts")
    return of, len(numbers)


def _table(felt: Tensor, own: Tensor, by_head: Sequence[int], structures: int) -> Table:
    """A leaf's positions by structure, among those that are ``own``."""
    table: Table = [[] for _ in range(structures)]
    heads = felt.byte().argmax(0).tolist()
    for position in own.nonzero()[:, 0].tolist():
        table[by_head[heads[position]]].append(position)
    return table


def _merge(tables: dict[Leaf, Table], leaf: Leaf, table: Table) -> None:
    old = tables.setdefault(leaf, table)
    tables[leaf] = [sorted({*a, *b}) for a, b in zip(old, table, strict=True)]
