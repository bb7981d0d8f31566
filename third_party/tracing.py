"""torch-pruning 1.6.1's dependency graph of a network: how it is built, and what it cannot follow.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import heads, norms, running, walk
from .groups import UnsupportedLayerError
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)

from .rewriting import Rewritten  # noqa: E402


class TraceError(UnsupportedLayerError):
    """Upstream cannot follow the channels through a network."""


def is_pruner(thing: object) -> bool:
    """Whether it is one of upstream's pruners, or is derived from one."""
    return isinstance(thing, tp.pruner.BasePruner)


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
        where = place(cause, model)
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


def place(cause: Exception, model: nn.Module) -> str | None:
    """Where in the graph upstream failed: at a layer, or at an operation behind layers."""
    names = names_of(model)
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
    behind = listed(sorted(layers)) or "the input"
    operation = type(kind).__name__.strip("_").removesuffix("Op").lower()
    return f"through the {operation} behind {behind}"


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's first name."""
    return {m: n for n, m in model.named_modules()}


def listed(layers: Sequence[str]) -> str:
    """The first few names, for a message."""
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


def require_no_parametrization(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weight is worked out anew in every pass, by a parametrization.

    Raises:
        UnsupportedLayerError: its message follows "the group of ...".
    """
    if parametrize.is_parametrized(module):
        weights = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise UnsupportedLayerError(
            f"involves {name!r}, whose {weights} is parametrized: what is trained is not what is "
            "removed. Call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') "
            "on it first"
        )
