"""The gate on a BatchNorm, and putting gates into a model and out of it again."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import AdapterError
from ..groups import BATCH_NORMS

LIMIT = 10.0
"""The paper's bound on the shift, either way."""


class GateError(AdapterError):
    """The method cannot do what is asked. The message says why, and what to change."""


class GatedBatchNorm(_BatchNorm):
    """A BatchNorm of fixed scale 1, followed by a shift, a gate and a mask.

    output = gate * (normalised input + shift) * mask (arXiv 1909.08174, its GBN). All three
    go into batch_norm's own weight and bias, so the gate costs nothing per activation. Statistics,
    their count, eps, momentum, mode, device and dtype are taken from the BatchNorm.

    A weight of exactly 0 gives a gate of 0, which silences the shift: exact if the bias is 0 too,
    refused otherwise (ours). A BatchNorm without a bias has no shift (ours).

    Args:
        norm: a BatchNorm1d, 2d or 3d with a weight over C channels; left as it is.
        name: what errors call it.

    Attributes:
        gate: parameter (C,), phi; starts as the weight.
        shift: parameter (C,), or ``None``; starts as bias / weight, clamped to -10..10.
        mask: buffer (C,) of 0 and 1. A channel at 0 puts out zeros whatever its gate becomes.
        clamped: at how many channels the clamp was hit, so that the function changed (ours).
        kind: the class of ``norm``.

    Raises:
        GateError: another class than those three, no weight, a value that is not finite, or a zero
            weight beside a bias.
    """

    gate: nn.Parameter
    shift: nn.Parameter | None
    mask: Tensor

    def __init__(self, norm: _BatchNorm, name: str = "this BatchNorm") -> None:
        if type(norm) not in BATCH_NORMS:
            raise GateError(
                f"{name} is a {type(norm).__name__}; only BatchNorm1d, 2d and 3d can be gated. "
                "Name it in `ignored`"
            )
        weight, bias = norm.weight, norm.bias
        if weight is None:
            raise GateError(f"{name} has no weight to gate; name it in `ignored`")
        added = torch.zeros_like(weight) if bias is None else bias
        if not bool(torch.isfinite(weight).all() & torch.isfinite(added).all()):
            raise GateError(f"{name} has a weight or bias that is not finite; repair the model")
        lost = ((weight == 0) & (added != 0)).nonzero()[:, 0].tolist()
        if lost:
            raise GateError(
                f"{name} has weight 0 and a bias at channels {lost[:8]}: a gate of 0 would lose "
                f"the bias. Give those weights at least |bias| / {LIMIT:g}, or name it in `ignored`"
            )
        super().__init__(norm.num_features, norm.eps, norm.momentum, False, device=weight.device)
        ratio = torch.where(weight == 0, 0.0, added / weight).detach()
        self.clamped = int((ratio.abs() > LIMIT).sum())
        self.kind: type[_BatchNorm] = type(norm)
        self.gate = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        shift = None if bias is None else ratio.clamp(-LIMIT, LIMIT)
        self.register_parameter("shift", _like(shift, bias))
        self.register_buffer("mask", torch.ones_like(ratio))
        _copy_statistics(norm, self)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (PyTorch's own name)
        self.kind._check_input_dim(self, input)

    def affine_part(self) -> tuple[Tensor, Tensor | None]:
        """What a plain BatchNorm's weight and bias would be: (C,) and (C,)."""
        scale = self.gate * self.mask
        return scale, None if self.shift is None else scale * self.shift

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(B, C, ...) to the same shape, float32 or what BatchNorm takes."""
        self._check_input_dim(input)
        average = 0.0 if self.momentum is None else self.momentum
        tracked = self.track_running_stats or not self.training
        if self.training and tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a mean over all batches, as update_bn asks for
                average = 1.0 / float(self.num_batches_tracked)
        weight, bias = self.affine_part()
        return functional.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            weight,
            bias,
            self.training or self.running_mean is None,
            average,
            self.eps,
        )

    @torch.no_grad()
    def plain(self) -> _BatchNorm:
        """A BatchNorm of the original class that computes the same; masked channels are zero."""
        weight, bias = self.affine_part()
        norm = self.kind(self.num_features, self.eps, self.momentum, device=weight.device)
        norm.weight = nn.Parameter(weight, self.gate.requires_grad)
        norm.register_parameter("bias", _like(bias, self.shift))
        _copy_statistics(self, norm)
        return norm


def _like(values: Tensor | None, other: nn.Parameter | None) -> nn.Parameter | None:
    """A parameter of these values that trains if the other does; ``None`` of ``None``."""
    return None if values is None or other is None else nn.Parameter(values, other.requires_grad)


def _copy_statistics(source: _BatchNorm, to: _BatchNorm) -> None:
    """Statistics and mode; a BatchNorm without statistics stays without."""
    to.track_running_stats = source.track_running_stats
    to.train(source.training)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(source, name)
        setattr(to, name, None if value is None else value.detach().clone())


def gated(model: nn.Module) -> dict[str, GatedBatchNorm]:
    """The gated BatchNorms of a model by module name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, GatedBatchNorm)}


def decorate(
    model: nn.Module, names: Iterable[str] | None = None, *, ignored: Iterable[str] = ()
) -> dict[str, GatedBatchNorm]:
    """Replace BatchNorms by gated ones, in place. Make the optimizer afterwards.

    The model computes what it did, unless a shift hits its clamp: then a warning names the layer.

    Args:
        model: plain; every module keeps its mode.
        names: module names of the BatchNorms, such as those of :func:`tied_gates`; ``None``: all.
        ignored: names to leave out.

    Returns:
        The gated BatchNorms by module name.

    Raises:
        GateError: gates are there already, a name is no BatchNorm or shared by two places, or a
            BatchNorm cannot be gated; the model is untouched.
    """
    if gated(model):
        raise GateError("the model has gates already; undecorate(model) first")
    places = dict(model.named_modules(remove_duplicate=False))
    every = [n for n, m in places.items() if isinstance(m, _BatchNorm)]
    wanted = every if names is None else list(dict.fromkeys(names))
    unknown = sorted({*wanted, *ignored} - set(every))
    if unknown:
        raise GateError(f"{unknown} are no BatchNorms of the model; it has {every}")
    wanted = [n for n in wanted if n not in set(ignored)]
    for name in wanted:
        others = [n for n in every if n != name and places[n] is places[name]]
        if others or not name:
            raise GateError(
                f"{name!r} cannot be replaced in one place: it is the model itself or also "
                f"{others}. Name it in `ignored`"
            )
    gates = {n: GatedBatchNorm(places[n], repr(n)) for n in wanted}
    changed = {n: g.clamped for n, g in gates.items() if g.clamped}
    if changed:
        warnings.warn(
            f"shifts were clamped to {LIMIT:g}, which changes what the model computes; channels "
            f"by layer: {changed}",
            stacklevel=2,
        )
    for name, gate in gates.items():
        model.set_submodule(name, gate)
    return gates


def undecorate(model: nn.Module) -> None:
    """Put plain BatchNorms back, in place: weight = gate * mask, bias = gate * shift * mask.

    Make a new optimizer afterwards. The model computes what it did, in its mode.
    """
    for name, gate in gated(model).items():
        model.set_submodule(name, gate.plain())


def freeze(model: nn.Module) -> None:
    """A tick begins: convolutions are frozen; the rest trains (gates, shifts, linear layers).

    The gradients of convolutions are dropped, so that the optimizer leaves them as they are.
    """
    for parameter in _convolutional(model).values():
        parameter.requires_grad_(False)
        parameter.grad = None


def unfreeze(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """A tock begins, or fine-tuning: every convolution trains.

    Args:
        model: whose convolutions.
        frozen: names of parameters that the user froze, as :func:`frozen_convolutions` gives them;
            they stay frozen.
    """
    for name, parameter in _convolutional(model).items():
        parameter.requires_grad_(name not in frozen)


def frozen_convolutions(model: nn.Module) -> frozenset[str]:
    """Names of the convolutions' parameters that do not train."""
    return frozenset(n for n, p in _convolutional(model).items() if not p.requires_grad)


def _convolutional(model: nn.Module) -> dict[str, nn.Parameter]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _ConvNd)]
    return dict(p for n, layer in layers for p in layer.named_parameters(n, recurse=False))


@torch.no_grad()
def add_sparsity_gradient(gates: Iterable[GatedBatchNorm], strength: float = 1e-3) -> None:
    """Add the gradient of strength * sum |gate| to the gates' own, as a tock does.

    At a gate of 0 it is 0. Call between backward and the optimizer's step.

    Raises:
        GateError: a gate has no gradient; nothing was added.
    """
    every = list(gates)
    for gate in every:
        if gate.gate.grad is None:
            raise GateError("a gate has no gradient; call this after backward")
    for gate in every:
        assert gate.gate.grad is not None
        gate.gate.grad.add_(gate.gate.sign(), alpha=strength)
