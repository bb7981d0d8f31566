"""The touch points in torch-pruning 1.6.1: its dependency graph, and its groups as index tables.

What this file works around, all of it in that version:

- Building a graph leaves the model in eval mode. It follows gradients, and silently misses frozen
  layers, so all layers train while it is built. It unpacks an example of one sample into the
  model's arguments, so it is given a forward pass of ours. It fails at outputs that are no tensors
  (``graph._trace``).
- A layer whose output is returned *and* used further does not look like an output.
- GRU and RNN are taken for operations element by element, and an LSTM is traced inside; here each
  of them is traced as one piece.
- A linear layer's output may be a view (that of a sequence is, in PyTorch up to 2.14). An operation
  in place, such as a ReLU's, takes its place in autograd's graph, and upstream misses the layer.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import heads, norms, running, walk
from .groups import BATCH_NORMS, Plan, Share, UnsupportedLayerError, UpstreamGroup, named
from .upstreams import require
from .walk import EndlessWalkError, Meeting, joined, roots

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)

from .rewriting import Rewritten  # noqa: E402


class TraceError(UnsupportedLayerError):
    """Upstream cannot follow the channels through a network."""


def is_pruner(thing: object) -> bool:
    """Whether it is one of upstream's pruners, or is derived from one."""
    return isinstance(thing, tp.pruner.BasePruner)


# ---------------------------------------------------------------------- building the graph


@contextmanager
def upstream(model: nn.Module) -> Iterator[None]:
    """Let upstream read or prune a model inside, with the workarounds; explain its errors.

    Raises:
        TraceError: upstream fails; the message says where.
    """
    try:
        with (
            running.evaluating(model),
            _all_trainable(model),
            torch.enable_grad(),
            _quiet(),
            walk.installed(),
        ):
            yield
    except UnsupportedLayerError:
        raise
    except Exception as cause:
        where = _place(cause, model)
        if where is None:  # the network's own forward pass, say
            raise
        raise TraceError(_untraced(cause, where)) from cause


def _untraced(cause: BaseException, where: str) -> str:
    return (
        f"torch-pruning cannot follow the channels {where} ({type(cause).__name__}: {cause}). "
        "Reshapes other than flattens, such as a channel shuffle, are not known to it; prune "
        "this network by another framework, or write that part of it in other layers"
    )


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(model: nn.Module, example: Any) -> Any:
    """Upstream's dependency graph of a model, which stays in its mode.

    Raises:
        UnsupportedLayerError: upstream cannot trace the network; the message says where, and why.
    """
    require_plain_weights(model)
    tracing = Tracing(model, example)
    with upstream(model):
        built = tp.DependencyGraph().build_dependency(
            model, example, verbose=False, **tracing.settings()
        )
    return tracing.finish(built)


class Tracing:
    """How a model is run while upstream traces it, and which tensors it puts out.

    Attributes:
        heads: those of the model, which upstream cannot follow.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.heads = heads.find(model, example)
        self._norms = norms.of(model)
        self._put_out: list[Any] = []
        self._numbers: list[Any] = []
        self._ran: set[nn.Module] = set()

    def settings(self) -> dict[str, Any]:
        """Upstream's arguments, the same for its graph and for its pruners."""
        return {
            "forward_fn": self._forward,
            "output_transform": self._traceable,
            "customized_pruners": dict.fromkeys(_RECURRENT, _RecurrentPruner())
            | dict.fromkeys(heads.conv1d(), _Conv1DPruner())
            | self._norms,
        }

    def finish(self, built: Any) -> Any:
        """Note on the graph its outputs, which layers have heads, and what the outputs feel."""
        built.put_out, built.heads = set(self._put_out), self.heads
        built.counted = heads.Found()
        built.ran, built.felt = self._ran, _felt([*self._put_out, *self._numbers])
        return built

    def _forward(self, model: nn.Module, example: Any) -> Any:
        layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        own = {m: m.__dict__.get("forward") for m in layers}
        for layer in layers:
            layer.forward = _in_one_piece(layer.forward)
        noting = [register_module_forward_pre_hook(lambda module, _given: self._ran.add(module))]
        # Behind upstream's own hooks, which note the output itself.
        noting += [
            model.get_submodule(name).register_forward_hook(lambda _layer, _given, y: y.clone())
            for name in self.heads.hidden
        ]
        try:
            eager = running.as_written()
            with running.same_draws(), running.untouched(model), eager, running.Watched():
                rewritten = Rewritten(model)
                with rewritten:
                    outputs = running.call(model, example)
            self._numbers += rewritten.numbers
            return outputs
        finally:
            for hook in noting:
                hook.remove()
            for layer, forward in own.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _traceable(self, outputs: Any) -> list[Tensor]:
        """The outputs that upstream can trace, each once."""
        traceable = {t.grad_fn: t for t in running.tensors(outputs) if t.grad_fn is not None}
        if not traceable and torch.is_inference_mode_enabled():
            raise UnsupportedLayerError(
                "channels cannot be traced within torch.inference_mode(), which keeps no "
                "gradients; do this outside of it"
            )
        if not traceable:
            raise UnsupportedLayerError(
                "no output of the model depends on its parameters, so its channels cannot be "
                "traced; return the tensors that the loss is made of, without detaching them"
            )
        self._put_out += traceable
        return list(traceable.values())


def _felt(put_out: Iterable[Any]) -> set[Any]:
    """The parameters that some outputs depend on, by autograd's nodes."""
    ahead = list(put_out)
    seen = set(ahead)
    while ahead:
        fresh = {node for node, _ in ahead.pop().next_functions if node is not None} - seen
        seen |= fresh
        ahead += fresh
    return {node.variable for node in seen if hasattr(node, "variable")}


class _Piece(torch.autograd.Function):
    """Makes one node of autograd's graph of whatever runs inside."""

    @staticmethod
    def forward(_ctx: Any, run: Callable[..., Any], given: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in running.tensors(run(given)))

    @staticmethod
    def backward(_ctx: Any, *_gradients: Any) -> Any:
        raise RuntimeError("this graph is for tracing only")


def _in_one_piece(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer's forward pass, with all outputs coming from one node."""

    def run(given: Any, state: Any = None) -> Any:
        if isinstance(given, PackedSequence):
            return forward(given, state)
        piece: Any = _Piece
        out, *states = piece.apply(lambda x: forward(x, state), given)
        return out, tuple(states) if len(states) == 2 else states[0]

    return run


_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


class _RecurrentPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Inputs of a recurrent layer can go; its hidden units cannot."""

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        keep = [i for i in range(layer.input_size) if i not in gone]
        for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            if hasattr(layer, name):
                left = self._prune_parameter_and_grad(getattr(layer, name), keep, 1)
                setattr(layer, name, left)
        layer.input_size = len(keep)
        return layer

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        raise UnsupportedLayerError("hidden units of a recurrent layer cannot be removed")

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        return layer.input_size

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


class _Conv1DPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Of transformers' Conv1D, a linear layer with a transposed weight."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.nf) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.nf = len(keep)
        return layer  # type: ignore[no-any-return]

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.nx) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        layer.nx = len(keep)
        return layer  # type: ignore[no-any-return]

    def get_out_channels(self, layer: Any) -> int:
        return len(layer.weight[0])

    def get_in_channels(self, layer: Any) -> int:
        return len(layer.weight)


def _place(cause: Exception, model: nn.Module) -> str | None:
    """Where in the graph upstream failed: at a layer, or at an operation behind layers."""
    names = _names(model)
    nodes: list[Any] = []
    for frame, _ in traceback.walk_tb(cause.__traceback__):
        nodes += [v for v in frame.f_locals.values() if isinstance(v, tp.dependency.Node)][:1]
    if not nodes:
        return None
    ahead, seen, layers = [nodes[-1]], set(), set()
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.module in names:
            layers.add(names[node.module])
        else:
            ahead += node.inputs
    kind = nodes[-1].module
    if kind in names:
        return f"at {names[kind]!r}"
    behind = _listed(sorted(layers)) or "the input"
    operation = type(kind).__name__.strip("_").removesuffix("Op").lower()
    return f"through the {operation} behind {behind}"


def _listed(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return ", ".join(map(repr, layers[:4])) + more


# ---------------------------------------------------------------------- weights of their own


def require_plain_weights(model: nn.Module) -> None:
    """Refuse layers whose weight is worked out anew in every pass, by a hook of the old kind.

    Such a weight is no parameter; a model that holds one cannot even be copied.

    Raises:
        UnsupportedLayerError: naming layer and remedy.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedLayerError(
                f"{name!r} has no shape yet: run the model once on the example first"
            )
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for kind, what, remedy in _HOOKS:
                if isinstance(hook, kind):
                    raise UnsupportedLayerError(
                        f"{name!r} has {what}, so its weight is worked out anew in every pass and "
                        f"cannot be decayed or removed in part; call {remedy} on it first"
                    )


_HOOKS: list[tuple[type, str, str]] = [
    (WeightNorm, "weight normalisation", "torch.nn.utils.remove_weight_norm(layer)"),
    (SpectralNorm, "spectral normalisation", "torch.nn.utils.remove_spectral_norm(layer)"),
    (BasePruningMethod, "a mask of torch.nn.utils.prune", "prune.remove(layer, 'weight')"),
]


def _require_no_parametrization(name: str, module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        weights = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise UnsupportedLayerError(
            f"involves {name!r}, whose {weights} is parametrized: what is trained is not what is "
            "removed. Call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') "
            "on it first"
        )


# ---------------------------------------------------------------------- reading the groups


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
    return read_built(build(model, example), model, left)


def ignored_layers(model: nn.Module, ignored: Collection[str | nn.Module]) -> set[nn.Module]:
    """The layers to ignore, which are given as names or as layers, with all that is in them.

    Raises:
        UnsupportedLayerError: one is no layer of the model.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    names = _names(model)
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
    names = _names(model)
    apart = {model.get_submodule(name) for name in built.heads.layers}
    with upstream(model):
        for root, group, cause in _walks(reading.graph, apart | set(inside)):
            name = names[root]
            if cause is not None:
                where = _place(cause, model) or "on from there"
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
                too = f"; {_listed(listed)} would lose channels, too" if listed else ""
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
    build: Callable[[nn.Module, Any], Any] = build,
) -> dict[str, UpstreamGroup]:
    """The groups that some layers belong to, by the layers' names, whatever their root is.

    Raises:
        UnsupportedLayerError: naming a layer whose group cannot be read, and why.
    """
    built = build(model, example)
    with upstream(model):
        return dict(_tables(built, model, roots))


def _tables(built: Any, model: nn.Module, of: Iterable[str]) -> Iterator[tuple[str, UpstreamGroup]]:
    names, kinds = _names(model), getattr(built, "roots", roots())
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


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {m: n for n, m in model.named_modules()}


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
            _require_no_parametrization(names[node.module], node.module)
    producers: list[tuple[nn.Module, int, list[list[int]]]] = []
    norms: list[tuple[nn.Module, int, list[list[int]]]] = []
    for node, meetings in rows.items():
        module = node.module
        if isinstance(module, nn.Parameter):
            name = built._param_to_name[module]
            index = _by_structure(meetings, of, len(tied), name)
            _add(table, _share(name, module, node.pruning_dim % module.dim(), False, index))
            continue
        if module not in names:
            continue  # an operation between layers
        if _customised(built, module):
            index = _by_structure(meetings, of, len(tied), names[module])
            for share in _probed(built, node, index, names[module]):
                _add(table, share)
            producers.append((module, 1 if _any_conv(rows) else -1, index))
            continue
        kind = _kind(built, module, names[module])
        if kind is None:
            continue
        dims, norm = kind
        index = _by_structure(meetings, of, len(tied), names[module])
        for attribute, dim in dims.items():
            parameter = getattr(module, attribute)
            if parameter is not None:
                name = f"{names[module]}.{attribute}"
                _add(table, _share(name, parameter, dim, norm, index))
        source = isinstance(module, roots()) and not _depthwise(node.module)
        if source and sum(map(len, index)) != _width(module):
            raise UnsupportedLayerError(_partly(built, module, sum(map(len, index)), names))
        last = isinstance(module, (nn.Linear, nn.Embedding, *heads.conv1d()))
        (norms if norm else producers).append((module, -1 if last else 1, index))
    table.owners = norms or producers
    return table


def _partly(built: Any, layer: Any, tied: int, names: Mapping[nn.Module, str]) -> str:
    """Why a group has only some of a layer's channels, told by a walk from all of them."""
    width, what = _width(layer), names[layer]
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
    names, why = _names(model), f"is one structure: its {group.channels} channels only go together"
    with upstream(model):
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
        if int(channels.max()) >= count:
            raise UnsupportedLayerError("has channels beyond its root's")
        if (node, handler) == (root.target, root.handler):
            places, channels = torch.cat([places, places]), torch.cat([places, channels])
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
        raise _uneven("its root")
    return label.argsort(stable=True).view(len(sizes), -1).tolist()


def _parts(built: Any, node: Any, handler: Any) -> tuple[int, int]:
    """How many parts a layer divides these channels into, and how many channels it has."""
    module = node.module
    if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
        return 1, 0
    pruner = built.get_pruner_of_module(module)
    if isinstance(pruner, type(tp.ops.DummyPruner())) or _depthwise(module):
        return 1, 0
    if built.is_out_channel_pruning_fn(handler):
        return pruner.get_out_channel_groups(module), pruner.get_out_channels(module)
    return pruner.get_in_channel_groups(module), pruner.get_in_channels(module)


def _customised(built: Any, module: nn.Module) -> bool:
    """Whether a pruner of the user's own takes channels from a layer that is not known here."""
    return type(module) in built.CUSTOMIZED_PRUNERS and not isinstance(module, _KNOWN)


_KNOWN = (
    _ConvNd,
    nn.Linear,
    nn.Embedding,
    _BatchNorm,
    _InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.RNNBase,
)


def _any_conv(nodes: Iterable[Any]) -> bool:
    return any(isinstance(node.module, _ConvNd) for node in nodes)


def _probed(built: Any, node: Any, index: list[list[int]], name: str) -> list[Share]:
    """The parts in a group of a layer's parameters, read off what its own pruner takes of copies.

    Each element of a copy's parameters is its own position. The binary digits of a channel's number
    say in which trials it goes; so a few trials tell which rows go with which channel.

    Raises:
        UnsupportedLayerError: a channel takes something else than whole rows along one dimension.
    """
    layer, own = node.module, dict(node.module.named_parameters())
    number = {p: i + 1 for i, p in enumerate(sorted(p for places in index for p in places))}
    codes = {
        n: [torch.zeros(size, dtype=torch.int64, device="cpu") for size in p.shape]
        for n, p in own.items()
    }
    for bit in range(len(number).bit_length()):
        trial = running.copied(layer)
        for parameter in trial.parameters():
            parameter.grad = None
            parameter.data = (
                torch.arange(parameter.numel(), device="cpu").view(parameter.shape).double()
            )
        handler = built.get_pruner_of_module(layer).prune_out_channels
        handler.__self__.pruning_dim = node.pruning_dim
        handler(trial, [p for p, code in number.items() if code >> bit & 1])
        for what, parameter in trial.named_parameters():
            left = positions(f"{name}.{what}", parameter.detach().long(), own[what].shape)
            for code, kept in zip(codes[what], left, strict=True):
                taken = torch.ones_like(code)
                taken[kept] = 0
                code += taken << bit
    shares = []
    for what, by_dim in codes.items():
        touched = [dim for dim, code in enumerate(by_dim) if bool(code.any())]
        if not touched:
            continue
        if len(touched) > 1:
            raise UnsupportedLayerError(
                f"involves {name!r}, of whose {what!r} a channel takes rows and columns at once"
            )
        rows: dict[int, list[int]] = {}
        for row, code in enumerate(by_dim[touched[0]].tolist()):
            rows.setdefault(code, []).append(row)
        taken_by = [[r for p in places for r in rows.get(number[p], [])] for places in index]
        if len({len(t) for t in taken_by}) > 1 or not set(rows) <= {0, *number.values()}:
            raise _uneven(repr(f"{name}.{what}"))
        shares.append(
            _share(f"{name}.{what}", own[what], touched[0], False, list(map(sorted, taken_by)))
        )
    return shares


def positions(name: str, codes: Tensor, shape: torch.Size) -> list[Tensor]:
    """What is left of a tensor along each dimension, of which each element was its own position.

    Raises:
        UnsupportedLayerError: that is not whole rows and columns.
    """
    if codes.dim() == len(shape) and codes.numel():
        strides = [shape[d + 1 :].numel() for d in range(len(shape))]
        index = []
        for d, stride in enumerate(strides):
            line = codes.movedim(d, 0).reshape(codes.shape[d], -1)[:, 0]
            index.append(line // stride % shape[d])
        expected = torch.zeros((), dtype=torch.int64, device="cpu")
        for here, stride in zip(index, strides, strict=True):
            expected = expected[..., None] + here * stride
        if torch.equal(expected, codes):
            return index
    raise UnsupportedLayerError(
        f"what the removal leaves of {name!r}, {tuple(codes.shape)} of {tuple(shape)}, is nothing, "
        "or is not whole rows and columns of it; leave the channels out of the plan that lead there"
    )


def _width(layer: Any) -> int:
    if isinstance(layer, heads.conv1d()):
        return int(layer.nf)
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels


def _by_structure(
    meetings: Iterable[Meeting], of: Tensor, structures: int, layer: str
) -> list[list[int]]:
    """A layer's positions by structure, equally many for each, in ascending order.

    Raises:
        UnsupportedLayerError: structures have unequal numbers of positions.
    """
    places, channels = joined(meetings)
    size = int(places.max()) + 1
    pairs = (of[channels] * size + places).unique()  # by structure, then by position
    counts = (pairs // size).bincount(minlength=structures)
    if bool((counts != counts[0]).any()):
        raise _uneven(repr(layer))
    return (pairs % size).view(structures, -1).tolist()  # type: ignore[no-any-return]


def _uneven(layer: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"gives its structures unequal shares of {layer}, as where one half of a split is added to "
        "something and the other is not"
    )


def _share(name: str, parameter: Tensor, dim: int, norm: bool, index: list[list[int]]) -> Share:
    """One parameter's part in a group, after a check that the parameter has the positions."""
    if not parameter.is_floating_point():
        raise UnsupportedLayerError(
            f"holds {name!r}, which is {parameter.dtype}: only real numbers decay"
        )
    last = max(map(max, index))
    if last >= parameter.shape[dim]:
        raise UnsupportedLayerError(
            f"reaches position {last} of {name!r}, which has {parameter.shape[dim]}: torch-pruning "
            "takes its channels for others on their way"
        )
    return Share(name, parameter, dim, norm, index)


def _add(table: UpstreamGroup, share: Share) -> None:
    """Add a share to a group; a parameter that two layers share is added once."""
    for other in table.shares:
        if other.parameter is share.parameter:
            if (other.dim, other.index) == (share.dim, share.index):
                return
            raise UnsupportedLayerError(
                f"holds one parameter as {other.name!r} and as {share.name!r}, of which a "
                "structure has different parts"
            )
    table.shares.append(share)


def _kind(built: Any, module: nn.Module, name: str) -> tuple[dict[str, int], bool] | None:
    """By attribute the dimension of the output positions; and whether the layer is a norm.

    ``None`` where nothing has to be zero for the output to be zero.

    Raises:
        UnsupportedLayerError: a channel of zeros does not equal a removed one in this layer.
    """
    if isinstance(module, _ConvTransposeNd):
        if module.groups == 1:
            return {"weight": 1, "bias": 0}, False
        if _depthwise(module) and module.groups == module.in_channels:
            return {"weight": 0, "bias": 0}, False
        why = "whose parts torch-pruning cannot take channels from"
    elif isinstance(module, (_ConvNd, nn.Linear)):
        return {"weight": 0, "bias": 0}, False
    elif isinstance(module, heads.conv1d()):
        return {"weight": 1, "bias": 0}, False
    elif isinstance(module, nn.Embedding):
        return {"weight": 1}, False
    elif norms.needs_telling(module) and not norms.is_told(module, built):
        raise UnsupportedLayerError(
            f"involves {name!r} ({type(module).__name__}), of which torch-pruning by itself takes "
            "no channels, as it has no bias, or tracks statistics"
        )
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        if module.affine:
            return {"weight": 0, "bias": 0}, True
        if not module.track_running_stats:
            return None
        why = "which has no weight and bias, so it shifts zeros by its running mean"
    elif norms.loses_whole_groups(module, built) and module.num_groups > 1:
        return ({"weight": 0, "bias": 0}, True) if module.affine else None
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        why = "whose mean and variance are over several channels, those of zeros among them"
    elif isinstance(module, nn.PReLU) or not any(True for _ in module.parameters()):
        return None  # zero in, zero out
    else:
        why = "whose output channels cannot be set to zero one by one"
    raise UnsupportedLayerError(
        f"involves {name!r} ({type(module).__name__}), {why}: a channel of zeros does not equal a "
        "removed one"
    )


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
        with upstream(model):
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
