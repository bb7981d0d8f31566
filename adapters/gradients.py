"""Gradients of training batches, for a framework that ranks by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpm_core import GradientError
from dpm_core.processes import Processes
from dpm_core.third_party import running


def mean_gradients(
    model: nn.Module, loss: Callable[[], Tensor], batches: int, *, squared: bool = False
) -> dict[str, Tensor]:
    """The mean gradient of some batches' losses, by each parameter.

    Nothing is updated: parameters, gradients, buffers and random states stay as they are. In
    several processes each reads its share of every batch, and gradients are averaged before they
    are squared, so that all get what one process would.

    Args:
        model: in its mode.
        loss: runs the model on the next training batch and returns the mean loss. Inside of
            DistributedDataParallel: the model itself, not the wrapper.
        batches: how many times ``loss`` is run.
        squared: give the mean of the gradients' squares instead.

    Returns:
        By each parameter's name a tensor of its shape; zero where no loss depends on it.

    Raises:
        GradientError: a loss, or a gradient, is not finite, or no loss depends on a parameter.
        DisagreementError: one of these in another process.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, requires_grad=False) for n, p in model.named_parameters()}
    processes = Processes.found()
    try:
        with running.untouched(model), running.same_draws(), torch.enable_grad():
            for _ in range(batches):
                for name, gradient in _gradients(parameters, loss, processes).items():
                    sums[name] += gradient.square() if squared else gradient
    finally:
        if processes is not None:
            processes.close()
    return {name: total / batches for name, total in sums.items()}


def _gradients(
    parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor], processes: Processes | None
) -> dict[str, Tensor]:
    """The gradient of the next batch's loss, averaged over all processes."""
    if processes is None:
        return _own(parameters, loss)
    with processes.together("a ranking by gradients"):
        own = _own(parameters, loss)
    means = processes.total(torch.cat([g.flatten().cpu() for g in own.values()])) / processes.count
    parts = means.split([g.numel() for g in own.values()])
    return {n: m.view(g.shape).to(g) for (n, g), m in zip(own.items(), parts, strict=True)}


def _own(parameters: dict[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    value = loss()
    if not bool(value.isfinite()):
        raise GradientError(
            f"the loss of a ranking by gradients is {float(value.detach())}; the model has "
            "diverged, or the closure is at fault. Lower the learning rate or check the closure"
        )
    found: tuple[Tensor | None, ...] = ()
    if value.requires_grad:
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    if all(gradient is None for gradient in found):
        raise GradientError(
            "the loss of a ranking by gradients does not depend on the model's parameters; the "
            "closure must run the adapter's model and return its loss, not detached"
        )
    pairs = zip(parameters.items(), found, strict=True)
    gradients = {n: torch.zeros_like(p) if g is None else g.detach() for (n, p), g in pairs}
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise GradientError(
                f"the gradient of {name!r} has values that are not finite, so nothing can be "
                "ranked by it; lower the learning rate, or check the model"
            )
    return gradients
