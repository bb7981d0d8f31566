"""Whole attention heads, in whatever layers and parameters a network keeps them. All of this is ours.

torch-pruning follows channels from operation to operation, and loses them where a forward pass
divides them among heads. Here the heads are read off autograd instead. Behind every product with a
softmax, or PyTorch's fused one, comes a layer whose inputs belong to one head each; what has a
gradient from one head's inputs alone is that head's: rows of queries, keys and values, fused or
not, their biases, columns of a table of positions. What heads share ties them together, as a head
of keys and values that serves several of queries; what all of them share stays. The numbers of
heads that modules keep are found by trying.
"""

from __future__ import annotations

import copy
import re
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from . import running
from .groups import Share, UnsupportedLayerError, UpstreamGroup

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
        owners = [(model.get_submodule(name), _axis(model, name), t) for name, t in self.owners]
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
        left: dict[Leaf, Table] = {}
        for leaf, table in self.parts.items():
            missing = sorted(p for k in gone for p in table[k])
            left[leaf] = [
                [p - bisect_left(missing, p) for p in positions]
                for k, positions in enumerate(table)
                if k not in gone
            ]
        owners = tuple((n, self._moved(n, gone)) for n, _ in self.owners)
        return replace(self, parts=left, owners=owners)

    def _moved(self, layer: str, gone: set[int]) -> Table:
        table = dict(self.owners)[layer]
        out = next(t for (n, _), t in self.parts.items() if n == f"{layer}.weight")
        missing = sorted(p for k in gone for p in out[k])
        kept = [positions for k, positions in enumerate(table) if k not in gone]
        return [[p - bisect_left(missing, p) for p in positions] for positions in kept]

    def remove(self, model: nn.Module, structures: Iterable[int]) -> None:
        """Take heads out of a model, in place; parameters become new objects.

        Raises:
            UnsupportedLayerError: none would be left.
        """
        gone = set(structures)
        if len(gone) >= self.count:
            raise UnsupportedLayerError(f"the removal leaves no head of {self.root!r}")
        cut: dict[str, Tensor] = {}
        for (name, dim), table in self.parts.items():
            missing = {p for k in gone for p in table[k]}
            old = _tensor(model, name)
            keep = [p for p in range(old.shape[dim]) if p not in missing]
            value = cut.get(name, old.detach())
            cut[name] = value.index_select(dim, torch.tensor(keep, device=old.device))
        for name, value in cut.items():
            _exchange(model, name, value)
        for name in {_owner(name) for name in cut}:
            _renumber(model.get_submodule(name))
        for name, attribute in self.numbers:
            _scale(model.get_submodule(name), attribute, self.count - len(gone), self.count)


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
        """The heads whose group is named after a layer."""
        return next((h for h in self.heads if h.root == layer), None)


# ---------------------------------------------------------------------- layers of a known kind


def conv1d() -> tuple[type, ...]:
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


def _axis(model: nn.Module, layer: str) -> int:
    """The dimension of a layer's output that holds its channels."""
    return 1 if isinstance(model.get_submodule(layer), _ConvNd) else -1


def _renumber(module: nn.Module) -> None:
    """Bring a layer's own numbers up to date with its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, conv1d()):
        module.nx, module.nf = weight.shape  # type: ignore[assignment]
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


def _exchange(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a model a new value for a parameter or buffer, under all names that it has."""
    old = _tensor(model, name)
    listed = (model.named_parameters, model.named_buffers)
    names = [n for named in listed for n, t in named(remove_duplicate=False) if t is old]
    new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for other in names:
        setattr(model.get_submodule(_owner(other)), other.rpartition(".")[2], new)


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


@dataclass
class _Behind:
    """What lies between a tensor and the layers that it comes from.

    Attributes:
        leaves: parameters and buffers on the way, and of those layers.
        cores: shapes of the attentions on the way.
    """

    leaves: dict[int, Tensor] = field(default_factory=dict)
    cores: list[tuple[int, ...]] = field(default_factory=list)


def _behind(tensor: Tensor, own: Collection[int]) -> _Behind:
    """Follow a tensor back; ``own`` are the ids of the model's tensors."""
    found = _Behind()
    ahead, seen = [(tensor.grad_fn, False)], set()
    while ahead:
        node, mixed = ahead.pop()  # mixed: by a product of two activations
        if node is None or (node, mixed) in seen:
            continue
        seen.add((node, mixed))
        name = node.name()
        if hasattr(node, "variable"):
            if id(node.variable) in own:
                found.leaves[id(node.variable)] = node.variable
        elif "ScaledDotProduct" in name or ("oftmax" in name and mixed):
            found.cores.append(_shape(node))
            ahead += [(n, False) for n, _ in node.next_functions]
        elif _PRODUCTS.fullmatch(name):
            weights = [_weight(n, own) for n, _ in node.next_functions]
            for weight in weights:
                found.leaves |= {id(t): t for t in weight or ()}
            known = any(weights) and getattr(node, "_saved_groups", 1) == 1
            if not known:
                others = (
                    n for (n, _), w in zip(node.next_functions, weights, strict=True) if not w
                )
                ahead += [(n, mixed or not any(weights)) for n in others]
        else:
            ahead += [(n, mixed) for n, _ in node.next_functions]
    return found


def _weight(node: Any, own: Collection[int]) -> list[Tensor] | None:
    """The parameters that an operand is, if it is nothing but those."""
    ahead, leaves, steps = [node], [], 0
    while ahead:
        node, steps = ahead.pop(), steps + 1
        if node is None or steps > 64:
            return None
        if hasattr(node, "variable"):
            if id(node.variable) not in own:
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
    example = running.shortened(model, running.informative(example), 1)
    precision = running.Precision(model, example)
    model, example = precision.of(model, example)
    model.eval().requires_grad_(True)
    running.draw_values(model, example)
    return _Search(model, example).found


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


class _Search:
    """The search in a copy that may be changed."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._names = {m: n for n, m in model.named_modules()}
        self._tensors = {id(t): n for n, t in _all_tensors(model)}
        self._numbers: dict[Any, tuple[tuple[str, str], ...] | str] = {}
        self.found = Found()
        self._known = {n: m for n, m in model.named_modules() if weight_dims(m) is not None}
        calls = []
        for call in self._calls():
            why = self._divide(call)
            if why is None:
                calls.append(call)
            elif why:
                self._refuse(call, why)
            if why != "":
                self.found.layers |= {self._layer_of(t) for t in call.behind.leaves.values()}
        self.found.layers &= self._known.keys()
        for together in _joined(calls):
            self._put_together(together)
        self._find_numbers()

    def _layer_of(self, leaf: Tensor) -> str:
        return _owner(self._tensors[id(leaf)])

    def _refuse(self, call: _Call, why: str) -> None:
        self.found.refused.setdefault(call.layer, why)

    def _calls(self) -> list[_Call]:
        """Calls of layers whose inputs come from an attention."""
        given: list[tuple[str, Tensor]] = []

        def cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Note a layer's input, and let gradients end there: what is before is another's."""
            if not inputs or not isinstance(inputs[0], Tensor):
                return inputs
            given.append((self._names[module], inputs[0]))
            apart = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
            return apart.clone(), *inputs[1:]

        hooks = [layer.register_forward_pre_hook(cut) for layer in self._known.values()]
        for buffer in self._buffers():
            buffer.requires_grad_(True)
        try:
            with torch.enable_grad():
                # Keeps the graph alive: nothing else holds on to what is between.
                self._outputs = running.probe(self._model, self._example)
        finally:
            for hook in hooks:
                hook.remove()
        calls = [
            _Call(name, t, _behind(t, self._tensors)) for name, t in given if t.grad_fn is not None
        ]
        return [c for c in calls if c.behind.cores]

    def _buffers(self) -> Iterator[Tensor]:
        """Buffers that may hold a part of every head."""
        for module in self._model.modules():
            if not isinstance(module, _NormBase):
                for buffer in module.buffers(recurse=False):
                    if buffer.is_floating_point():
                        yield buffer

    def _divide(self, call: _Call) -> str | None:
        """Find out what belongs to which head; else say why not, "" if there is but one head."""
        width = call.given.shape[_axis(self._model, call.layer)]
        counts = [shape[-3] for shape in call.behind.cores if len(shape) >= 4]
        counts += self._heads_by_name(call)
        counts = [n for n in dict.fromkeys(counts) if n > 1 and width % n == 0]
        if not counts:
            return ""
        for count in counts:
            size = width // count
            for columns in (
                [list(range(k * size, (k + 1) * size)) for k in range(count)],
                [list(range(k, width, count)) for k in range(count)],
            ):
                call.columns = columns
                call.touched = self._touched(call)
                if call.touched:
                    return None
        return "is an attention whose heads are mixed before they reach a layer"

    def _heads_by_name(self, call: _Call) -> list[int]:
        layer = call.layer
        while layer:
            layer = _owner(layer)
            own = vars(self._model.get_submodule(layer))
            numbers = [v for k, v in own.items() if type(v) is int and _counts(k)]
            if numbers:
                return numbers
        return []

    def _touched(self, call: _Call) -> dict[Leaf, Tensor]:
        leaves = list(call.behind.leaves.values())
        draw = torch.Generator().manual_seed(0)
        weights = (torch.rand(call.given.shape, generator=draw) + 0.5).to(call.given)
        axis = _axis(self._model, call.layer) % call.given.dim()
        rows: list[tuple[Tensor | None, ...]] = []
        for columns in call.columns:
            half = len(columns) // 2
            for part in (columns[:half], columns[half:]):
                if not part:
                    rows.append((None,) * len(leaves))
                    continue
                only = torch.zeros(call.given.shape[axis], dtype=weights.dtype)
                only[part] = 1
                shape = [-1 if d == axis else 1 for d in range(weights.dim())]
                seed = weights * only.view(shape).to(weights)
                rows.append(
                    torch.autograd.grad(
                        call.given, leaves, seed, retain_graph=True, allow_unused=True
                    )
                )
        touched: dict[Leaf, Tensor] = {}
        for i, leaf in enumerate(leaves):
            felt = torch.stack(
                [
                    torch.zeros(leaf.shape, dtype=torch.bool) if row[i] is None else (row[i] != 0)
                    for row in rows
                ]
            ).cpu()
            for dim in range(leaf.dim()):
                over = [d + 1 for d in range(leaf.dim()) if d != dim]
                along = felt.sum(over) > 0 if over else felt
                by_head = along[0::2] | along[1::2]
                if bool((by_head != by_head[0]).any()):
                    touched[self._tensors[id(leaf)], dim] = along
        return touched

    # ------------------------------------------------------------------ one group

    def _put_together(self, calls: list[_Call]) -> None:
        """Attentions that share parts of their heads, as one group of structures."""
        try:
            heads = self._heads(calls)
        except UnsupportedLayerError as why:
            self._refuse(calls[0], str(why))
        else:
            self.found.heads.append(heads)

    def _heads(self, calls: list[_Call]) -> Heads:
        of = _structures(calls)
        structures = 1 + max(k for by_head in of for k in by_head)
        parts: dict[Leaf, Table] = {}
        values: dict[Leaf, Table] = {}
        doubtful: dict[Leaf, Table] = {}
        for call, by_head in zip(calls, of, strict=True):
            for leaf, along in call.touched.items():
                if len([d for n, d in call.touched if n == leaf[0]]) > 1:
                    raise UnsupportedLayerError(
                        f"has heads of which each has rows and columns of {leaf[0]!r}"
                    )
                table, own = _positions(along, by_head, structures)
                for tables, new in ((parts, table), (values, own)):
                    old = tables.setdefault(leaf, [[] for _ in range(structures)])
                    tables[leaf] = [sorted({*a, *b}) for a, b in zip(old, new, strict=True)]
        if structures < 2 or not any(chain.from_iterable(values.values())):
            raise UnsupportedLayerError(
                "is an attention whose heads share the same values, so that none of them can go "
                "alone"
            )
        self._complete(parts, calls, doubtful)
        inputs: set[Leaf] = set()
        for call, by_head in zip(calls, of, strict=True):
            dims = weight_dims(self._known[call.layer])
            assert dims is not None
            columns: Table = [[] for _ in range(structures)]
            for k, mine in zip(by_head, call.columns, strict=True):
                columns[k] += mine
            leaf = (f"{call.layer}.weight", dims[1])
            if parts.setdefault(leaf, columns) != columns:
                raise UnsupportedLayerError(
                    f"has heads that {call.layer!r} reads in two different orders"
                )
            inputs.add(leaf)
        for (name, _), table in parts.items():
            if len(set(map(len, table))) != 1:
                raise UnsupportedLayerError(
                    f"has heads with unequal parts of {name!r}; an example with more, and more "
                    "varied, inputs may show them all"
                )
            self._require_known(name)
        owners = [
            (_owner(name), values[name, dim])
            for name, dim in values
            if any(values[name, dim])
            and _owner(name) in self._known
            and weight_dims(self._known[_owner(name)]) == (dim, 1 - dim)
            and name == f"{_owner(name)}.weight"
        ]
        if not owners:
            raise UnsupportedLayerError("is an attention whose values come from no layer")
        return Heads(owners[0][0], parts, frozenset(inputs), tuple(owners))

    def _complete(
        self, parts: dict[Leaf, Table], calls: list[_Call], doubtful: dict[Leaf, Table]
    ) -> None:
        """Fill in what has no gradient: a bias of keys, which a softmax takes no notice of."""
        sizes = {leaf: _tensor(self._model, leaf[0]).shape[leaf[1]] for leaf in parts}
        tables: dict[int, list[Table]] = {}
        for leaf, table in parts.items():
            tables.setdefault(sizes[leaf], []).append(table)
        for name, dim in list(parts):  # rows of a layer's weight are those of its bias
            layer = self._known.get(_owner(name))
            if (
                layer is not None
                and name.endswith(".weight")
                and weight_dims(layer) == (dim, 1 - dim)
            ):
                if isinstance(getattr(layer, "bias", None), Tensor):
                    parts[f"{_owner(name)}.bias", 0] = parts[name, dim]
        for module_name in {_owner(name) for name, _ in parts}:
            module = self._model.get_submodule(module_name)
            if isinstance(module, _NormBase):
                table = next(t for (n, _), t in parts.items() if _owner(n) == module_name)
                for what in ("weight", "bias", "running_mean", "running_var"):
                    if isinstance(getattr(module, what, None), Tensor):
                        parts[f"{module_name}.{what}", 0] = table
        for call in calls:
            for leaf in call.behind.leaves.values():
                name = self._tensors[id(leaf)]
                if leaf.dim() != 1 or _owner(name) in self._known:
                    continue
                mine = parts.get((name, 0), [])
                for table in tables.get(len(leaf), ()):
                    fits = all({*m} <= {*t} for m, t in zip(mine, table, strict=False))
                    if fits and (mine or not bool(leaf.detach().any())):
                        parts[name, 0] = table
                        break

    def _require_known(self, name: str) -> None:
        """Refuse a part of a module whose other numbers are not known here."""
        module = self._model.get_submodule(_owner(name))
        odd = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase))
        grouped = isinstance(module, _ConvNd) and 1 < module.groups != module.out_channels
        if odd or grouped or isinstance(module, _ConvTransposeNd):
            raise UnsupportedLayerError(
                f"has heads with parts of {_owner(name)!r} ({type(module).__name__}), from which "
                "heads cannot be taken"
            )

    # ------------------------------------------------------------------ numbers of heads

    def _find_numbers(self) -> None:
        """Which numbers shrink, for each kind of attention once."""
        kept = []
        self._outputs = None
        for buffer in self._buffers():
            buffer.requires_grad_(False)
        for heads in self.found.heads:
            kind = self._kind(heads)
            if kind not in self._numbers:
                self._numbers[kind] = self._tried(heads)
            chosen = self._numbers[kind]
            if isinstance(chosen, str):
                self.found.refused[heads.root] = chosen
            else:
                modules = self._scope(heads)
                numbers = tuple((modules[int(place)], what) for place, what in chosen)
                kept.append(replace(heads, numbers=numbers))
        self.found.heads = kept

    def _kind(self, heads: Heads) -> Any:
        modules = [self._model.get_submodule(n) for n in self._scope(heads)]
        return tuple(
            (
                type(m),
                tuple((k, v) for k, v in vars(m).items() if type(v) is int and "idx" not in k),
            )
            for m in modules
        )

    def _scope(self, heads: Heads) -> list[str]:
        """Names of the modules that may keep numbers of these heads, in order."""
        layers = {_owner(name) for name, _ in heads.parts}
        scope: list[str] = []
        for reader in sorted({_owner(name) for name, _ in heads.inputs}):
            top = _owner(reader)
            others = [n for n in layers & self._known.keys() if n != reader]
            while top and not any(n.startswith(f"{top}.") for n in others):
                top = _owner(top)
            inside = f"{top}." if top else ""
            scope += [n for n in self._names.values() if n == top or n.startswith(inside)]
        return list(dict.fromkeys([*scope, *sorted(layers)]))

    def _tried(self, heads: Heads) -> tuple[tuple[str, str], ...] | str:
        """The numbers of one attention, by the modules' places in its scope; or why there are none.

        Some of its heads are set to zero, and removed, with one choice of numbers after the other,
        until both give the same outputs.
        """
        model, example = self._model, self._example
        scope = self._scope(heads)
        dense = running.outputs(model, example)
        rounding = running.rounding(model, example, dense)
        gone = [0] if heads.count < 4 else [0, heads.count // 2]
        kept = running.parts(model)
        with _at_zero(heads.group(model), gone):
            zeroed = running.outputs(model, example)
        first = ""
        for numbers in self._choices(heads, scope):
            trial = replace(heads, numbers=tuple((scope[int(i)], what) for i, what in numbers))
            try:
                with torch.no_grad():
                    trial.remove(model, gone)
                why = running.unlike(zeroed, running.outputs(model, example), rounding, doubts=True)
                why = why and f"gives different outputs at zero and removed: its removal {why}"
            except Exception as cause:  # whatever a forward pass with a wrong number breaks on
                why = f"cannot be removed ({type(cause).__name__}: {_line(cause)})"
            finally:
                running.put_back(kept)
            if why is None:
                return numbers
            first = first or why
        return f"{first}: its heads are not all that the forward pass goes by"

    def _choices(self, heads: Heads, scope: Sequence[str]) -> Iterator[tuple[tuple[str, str], ...]]:
        """Choices of numbers to shrink, the likeliest first."""
        widths = {_tensor(self._model, name).shape[dim] for name, dim in heads.parts}
        of_heads = {len(t[0]) * heads.count for t in heads.parts.values()}
        counted: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for i, name in enumerate(scope):
            module = self._model.get_submodule(name)
            for key, value in vars(module).items():
                if type(value) is int and value > 1 and value % heads.count == 0:
                    if _counts(key) or key == "all_head_size":
                        counted.append((str(i), key))
                    elif value in widths | of_heads and name not in self._known:
                        others.append((str(i), key))
            config = vars(module).get("config")
            for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
                if type(value) is int and value % heads.count == 0 and _counts(key):
                    shared.append((str(i), f"config.{key}"))
        few = others[:8]
        some = [c for n in range(min(len(few), 2) + 1) for c in combinations(few, n)]
        some += [tuple(few)] if len(few) > 2 else []
        for more in some:
            yield (*counted, *more)
        if shared:
            for more in some:
                yield (*counted, *more, *shared)
        if counted:
            yield ()


def _counts(attribute: str) -> bool:
    """Whether an attribute's name is one for a number of heads."""
    return "head" in attribute and not re.search(
        r"dim|size|width|per_|channel|mask|index|idx|group|feature|scale", attribute
    )


class _at_zero:  # noqa: N801
    """Some structures of a group at zero, for a while."""

    def __init__(self, group: UpstreamGroup, structures: Sequence[int]) -> None:
        self._group, self._structures = group, structures

    def __enter__(self) -> None:
        self._values = [(s.parameter, s.parameter.detach().clone()) for s in self._group.shares]
        with torch.no_grad():
            for share in self._group.shares:
                at = torch.tensor([p for k in self._structures for p in share.index[k]])
                share.parameter.index_fill_(share.dim, at.to(share.parameter.device), 0)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _line(cause: BaseException) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _joined(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls by groups: those that share a part of their heads are in one."""
    groups: list[list[_Call]] = []
    for call in calls:
        own = set(call.touched) | {(f"{call.layer}.weight", -1)}
        mine = [
            g
            for g in groups
            if any(own & (set(c.touched) | {(f"{c.layer}.weight", -1)}) for c in g)
        ]
        for group in mine:
            groups.remove(group)
        groups.append([c for g in mine for c in g] + [call])
    return groups


def _structures(calls: Sequence[_Call]) -> list[list[int]]:
    """For each call the structure of each head.

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

    first: dict[tuple[Leaf, int], int] = {}
    for call, nodes in zip(calls, label, strict=True):
        for leaf, along in call.touched.items():
            by_head = along[0::2] | along[1::2]
            for position in range(by_head.shape[1]):
                mine = by_head[:, position].nonzero()[:, 0].tolist()
                if not mine or len(mine) == len(nodes):
                    continue
                one = first.setdefault((leaf, position), nodes[mine[0]])
                for head in mine:
                    parent[top(nodes[head])] = top(one)
    numbers: dict[int, int] = {}
    of = [[numbers.setdefault(top(n), len(numbers)) for n in nodes] for nodes in label]
    for by_head in of:
        counts = [by_head.count(k) for k in range(len(numbers))]
        if len(set(counts)) > 1:
            raise UnsupportedLayerError("is an attention whose heads share unequal parts")
    return of


def _positions(along: Tensor, by_head: Sequence[int], structures: int) -> tuple[Table, Table]:
    """A leaf's positions by structure: all of them, and those of values, each of one input."""
    felt = along[0::2] | along[1::2]
    once = along[0::2] ^ along[1::2]
    table: Table = [[] for _ in range(structures)]
    values: Table = [[] for _ in range(structures)]
    for position in range(felt.shape[1]):
        heads = felt[:, position].nonzero()[:, 0].tolist()
        if not heads or len(heads) == len(by_head):
            continue
        structure = by_head[heads[0]]
        table[structure].append(position)
        if bool(once[heads, position].all()):
            values[structure].append(position)
    return table, values
