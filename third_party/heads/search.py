"""The search for heads: which parts of a network belong to one head each.

A layer behind attention reads some columns from each head. Gradients from these alone say which
rows of queries, keys and values, and which positions of other parameters, are a head's. All is done
on a copy with drawn weights, so values do not matter; a part that no gradient shows, as the bias of
keys, is added by what it lies beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import running, trial_values
from ..groups import UnsupportedLayerError
from .behind import Behind, Source, behind
from .numbers import kept_numbers, says_how_many
from .structures import (
    Found,
    Heads,
    Leaf,
    Table,
    all_names,
    channel_axis,
    owner,
    tensor_of,
    weight_dims,
)


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
        # Small, or a softmax may choose one of its inputs, and have no gradient.
        trial_values.draw_values(drawn, few, 0.5)
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
    for name, names in all_names(model).items():
        tensor = tensor_of(model, name)
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
    behind: Behind
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
        self.found.heads, uncounted = kept_numbers(model, example, self.found.heads)
        for heads, cause in uncounted:
            self._refuse(heads.root, sorted(heads.layers & self._layers.keys()), cause)

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
        outputs: dict[Any, Source] = {}
        views: list[tuple[str, Tensor, Any]] = []

        def cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Note a layer's input, and let gradients end there: what is before is another's."""
            if not inputs or not isinstance(inputs[0], Tensor):
                return inputs
            given.append((self._names[module], inputs[0]))
            apart = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
            return apart.clone(), *inputs[1:]

        def note(module: nn.Module, _inputs: object, output: object) -> object:
            name = f"{self._names[module]}.weight"
            axis, rows = channel_axis(module), self._rows(name)
            weight: Any = module.weight
            if isinstance(output, Tensor) and output.shape[axis] == weight.shape[rows]:
                dims = {axis % output.dim(): (name, rows)}
                outputs[output.grad_fn] = Source(output, dims, True)
            if not isinstance(output, Tensor) or not output._is_view():
                return None
            if self._names[module] in self.found.hidden:
                return output.clone()
            views.append((self._names[module], output, output.grad_fn))
            return None

        hooks = [m.register_forward_pre_hook(cut) for m in self._layers.values()]
        hooks += [m.register_forward_hook(note) for m in self._layers.values()]
        try:
            with torch.enable_grad():  # kept, as nothing else may hold on to what is between
                watched = running.Watched()
                self._outputs = running.probe(self._model, self._example, watched=watched)
        finally:
            for hook in hooks:
                hook.remove()
        hidden = {name for name, output, node in views if output.grad_fn is not node}
        if hidden:
            self.found.hidden |= hidden
            return self._calls()
        self._eps = watched.eps
        traced = [(n, t) for n, t in given if t.grad_fn is not None]
        calls = [_Call(n, t, behind(t, self._tensors, outputs)) for n, t in traced]
        return [c for c in calls if c.behind.cores]

    def _divide(self, call: _Call) -> bool:
        """Find out what belongs to which head; false if nothing tells heads apart.

        Too fine a division does no harm: what a head shares with another ties them.
        """
        width = call.given.shape[channel_axis(self._layers[call.layer])]
        counts = [*self._heads_by_gradients(call, width), *self._heads_by_name(call)]
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

    def _heads_by_gradients(self, call: _Call, width: int) -> list[int]:
        """The numbers of heads in the attentions behind a layer.

        Windows, blocks and samples lie along an attention's leading dimensions, too, in any order,
        or in one with the heads. But a column depends on one head, in all windows.
        """
        nodes = [*call.behind.products, *call.behind.cores]
        edges = [GradientEdge(node, 0) for node in nodes]

        def met(columns: Sequence[int]) -> list[int]:
            gradients = self._gradients(call, columns, edges)
            felt = (g if g is None else (g != 0).reshape(*g.shape[:-2], -1) for g in gradients)
            return [0 if f is None else int(f.any(-1).sum()) for f in felt]

        # Several, as few of a column's values may get through a ReLU.
        one = map(max, zip(*(met([c]) for c in (0, width // 2, width - 1)), strict=True))
        every = met(range(width))
        return [of // n for of, n in zip(every, one, strict=True) if n and of > n and of % n == 0]

    def _heads_by_name(self, call: _Call) -> list[int]:
        """The numbers of heads that a module around a layer keeps."""
        layer = call.layer
        while layer:
            layer = owner(layer)
            own = vars(self._model.get_submodule(layer))
            numbers = [v for k, v in own.items() if type(v) is int and says_how_many(k)]
            if numbers:
                return sorted(numbers, reverse=True)
        return []

    def _touched(self, call: _Call) -> dict[Leaf, Tensor]:
        sources = call.behind.sources
        tensors = [source.tensor for source in sources]
        lines: dict[Leaf, list[Tensor]] = {}
        for row, part in enumerate(p for columns in call.columns for p in _halves(columns)):
            gradients = self._gradients(call, part, tensors)
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

    def _gradients(
        self, call: _Call, columns: Sequence[int], of: Sequence[Tensor] | Sequence[GradientEdge]
    ) -> tuple[Tensor | None, ...]:
        """Gradients from some columns of a layer's input, with drawn weights."""
        draw = torch.Generator().manual_seed(0)
        weights = (torch.rand(call.given.shape, generator=draw, device="cpu") + 0.5).to(call.given)
        axis = channel_axis(self._layers[call.layer]) % weights.dim()
        only = torch.tensor(columns, dtype=torch.int64, device=weights.device)
        seed = torch.zeros_like(weights)
        seed.index_copy_(axis, only, weights.index_select(axis, only))
        return torch.autograd.grad(call.given, of, seed, retain_graph=True, allow_unused=True)

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
            (owner(name), table)
            for (name, dim), table in values.items()
            if all(table) and self._rows(name) == dim and owner(name) in mixed
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
        dims = weight_dims(self._layers.get(owner(name), nn.Identity()))
        return -1 if dims is None or not name.endswith(".weight") else dims[0]

    def _complete(self, parts: dict[Leaf, Table], calls: Sequence[_Call]) -> None:
        """Add what no gradient shows: a bias of keys, of which a softmax takes no notice, say."""
        for (name, dim), table in list(parts.items()):
            layer = self._model.get_submodule(owner(name))
            if self._rows(name) == dim or isinstance(layer, _NormBase):
                for what in ("bias", "weight", "running_mean", "running_var"):
                    tensor = getattr(layer, what, None)
                    if isinstance(tensor, Tensor) and (what != "weight" or tensor.dim() == 1):
                        parts[f"{owner(name)}.{what}", 0] = table
        bare = {n: t for (n, _), t in parts.items() if tensor_of(self._model, n).dim() == 1}
        for source in (s for call in calls for s in call.behind.sources if not s.layer):
            name, leaf = source.leaves[0][0], source.tensor
            for other, table in bare.items():
                beside = owner(other) == owner(name) and owner(name) not in self._layers
                if beside and leaf.dim() == 1 and len(leaf) == len(tensor_of(self._model, other)):
                    parts.setdefault((name, 0), table)

    def _require_known(self, name: str) -> None:
        """Refuse parts of a module whose other numbers are not known here."""
        module = self._model.get_submodule(owner(name))
        odd = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RNNBase, _ConvTransposeNd))
        split = isinstance(module, _ConvNd) and 1 < module.groups != module.out_channels
        if odd or split or name not in self._tensors.values():
            raise UnsupportedLayerError(
                f"has heads with parts of {owner(name)!r} ({type(module).__name__}), from which "
                "they cannot be taken"
            )


def _halves(columns: list[int]) -> tuple[list[int], list[int]]:
    half = len(columns) // 2
    return columns[:half], columns[half:]


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
