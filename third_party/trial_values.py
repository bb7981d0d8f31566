"""Values with which a removal is tried out, and what a network keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dpm_core.errors import kind_and_line

from . import running
from .comparing import is_real
from .errors import AdapterError


def draw_values(model: nn.Module, example: Any, scale: float = 1.0) -> None:
    """Draw a model's weights by He's rule, times ``scale``, and its vectors from 0.5 to 1.5.

    Norms with running statistics get those of the example, but lower means: a norm that reads
    zeros then puts out positive values, which no ReLU hides.

    A network may refuse such values, or have hardly a finite output with them, as where it needs a
    positive definite matrix. Then only PyTorch's own layers get them, else none; the others keep
    theirs, moved by a hundredth if the network bears that.

    Raises:
        OwnError: the network does not run with its own values either.
    """
    own = [(p, p.clone()) for p in model.parameters() if p.is_floating_point() and p.numel()]
    layers = {p for m in model.modules() if _is_layer(m) for p in m.parameters(recurse=False)}
    everything = {p for p, _ in own}
    finite: float | None = None
    for drawn, by in ((everything, 0.0), *((d, b) for d in (layers, set()) for b in (0.01, 0.0))):
        _set_values(own, drawn, scale, by)
        try:
            now = _run_for_statistics(model, example)
            if now < 1 and finite is None:
                _set_values(own, set(), scale, 0.0)
                finite = _run_for_statistics(model, example)
                _set_values(own, drawn, scale, by)
                now = _run_for_statistics(model, example)
        except Exception as fault:
            cause = fault
            continue
        if finite is None or now >= finite / 2:
            return
    raise OwnError(
        "the network's own forward pass fails on a copy of it, with its own parameters, in "
        f"evaluation mode, on some of the example ({kind_and_line(cause)}). Give an "
        "example, or the network in a state, with which it runs"
    ) from cause


class OwnError(AdapterError):
    """A network fails by itself, whatever is removed from it."""


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


@torch.no_grad()
def _set_values(
    own: Sequence[tuple[nn.Parameter, Tensor]], drawn: set[nn.Parameter], scale: float, by: float
) -> None:
    """Draw the values of some parameters; the others get their own, moved by a share of each."""
    draw = torch.Generator().manual_seed(0)
    for parameter, value in own:
        if parameter.dim() > 1:
            size = scale * (2 / parameter[0].numel()) ** 0.5
            new = size * torch.randn(parameter.shape, generator=draw, device="cpu")
        else:
            new = torch.rand(parameter.shape, generator=draw, device="cpu") + 0.5
        parameter.copy_(new if parameter in drawn else value)
        if by and parameter not in drawn:
            noise = 2 * torch.rand(parameter.shape, generator=draw, device="cpu") - 1
            parameter.mul_(1 + by * noise.to(parameter))


def _run_for_statistics(model: nn.Module, example: Any) -> float:
    """Run a model, of which norms take the statistics; returns which share of it is finite."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    hooks = [m.register_forward_pre_hook(_take_statistics) for m in norms]
    kept = running.parts(model)
    try:
        with (
            torch.no_grad(),
            running.evaluating(model),
            running.same_draws(),
            running.as_written(),
            running.Watched(),
        ):
            found = [t for t in running.tensors(running.call(model, example)) if is_real(t)]
    finally:
        running.put_back(kept)
        for hook in hooks:
            hook.remove()
    number = sum(t.numel() for t in found)
    return sum(int(t.isfinite().sum()) for t in found) / number if number else 1.0


def settle(model: nn.Module, example: Any) -> list[str]:
    """Let a model have what it keeps from one call to the next, as after training.

    Parameters and the statistics of norms stay.

    Returns:
        Names of the attributes that keep tensors.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase)]
    values = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    before = {(n, k): v for n, m in model.named_modules() for k, v in vars(m).items()}
    for training in (True, False):
        kept = running.parts(model)
        quiet = (
            running.in_mode(model, training),
            running.same_draws(),
            running.fast_path_off(),
            running.as_written(),
        )
        try:
            with ExitStack() as stack:
                for context in (*quiet, running.Watched(average=training), torch.no_grad()):
                    stack.enter_context(context)
                running.call(model, example)
        except Exception:  # a mode that the example does not allow
            running.put_back(kept)
    with torch.no_grad():
        for buffer, value in values:
            buffer.copy_(value)
    return [
        f"{n}.{k}" if n else k
        for n, m in model.named_modules()
        for k, v in vars(m).items()
        if v is not before.get((n, k)) and running.tensors([v])
    ]


def _take_statistics(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
    x = given[0]
    over = [d for d in range(x.dim()) if d != 1]
    var = x.var(over, correction=0)
    var = torch.where(var > 1e-12 * (1 + x.square().mean(over)), var, 1.0)
    norm.get_buffer("running_mean").copy_(x.mean(over) - var.sqrt())
    norm.get_buffer("running_var").copy_(var)
