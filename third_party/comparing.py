"""Whether two runs of a model give the same outputs to rounding.

A removal must not change the outputs by more. What rounding does to them depends on the network and
is measured, for each element by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .running import Outputs, outputs

TIMES = 10.0
"""Outputs may differ by this times the measured rounding: a removal regroups sums. Ours."""
FLOOR = 1e-8
"""An element of the outputs may always differ by this share of what it varies by. Ours."""
SHARE = 1e-4
"""As far as this share, rounding measured in one element is allowed in all. Ours."""
HOPELESS = 0.1
"""If rounding alone may move outputs by this share, comparing them says nothing. Ours."""

_PLACES = 1000


@dataclass(frozen=True)
class Rounding:
    """What rounding does to an output, and how much of it depends on the parameters.

    Both are measured for each element by itself: one that holds a large constant, as masked logits
    and time stamps do, says nothing of the others.

    Attributes:
        moved: how far an element moves if every parameter moves by its last digit; its own last
            digit at least.
        varies: how far it would move if every parameter moved by its whole size. That is the size
            of the element without what is constant in it; 0 if all of it is.
        size: the magnitude of each element.
    """

    moved: Tensor
    varies: Tensor
    size: Tensor

    @functools.cached_property
    def allowed(self) -> Tensor:
        """By how much rounding may change each element when a removal regroups sums.

        One measurement may happen to leave an element where it is, so the largest movement of all
        elements holds for each, as far as it is a small share of what the element varies by. What
        is small, the typical element tells.
        """
        moved, varying = TIMES * self.moved, self.varies > 0
        some = self.varies[varying]
        if not some.numel():
            return moved
        share = max(SHARE, float((moved[varying] / some).median()))
        # An element may happen to vary by little; if it is small as well, that is no chance.
        least = self.size.minimum(some.kthvalue(1 + len(some) // 10).values)
        others = (share * self.varies.maximum(least)).clamp(max=moved[varying].max())
        # What is constant here, behind a ReLU say, may vary where channels are zero.
        others = torch.where(varying, others, moved[varying].median())
        return others.maximum(moved).maximum(FLOOR * self.varies)


@torch.no_grad()
def rounding(
    model: nn.Module, example: Any, given: Outputs, *, training: bool = False
) -> list[Rounding]:
    """What rounding does to each of a model's outputs.

    Every parameter is moved, up or down, and put back: by its last digit, and by a tenth (by less
    where the model does not bear that, or puts out other infinities).

    Args:
        model: in the precision of the comparison.
        example: of its inputs.
        given: its :func:`outputs` for the example, in the same mode.
        training: the mode.
    """
    moved = _moved(model, example, 0.0, given, training)
    varied = None
    for by in _STEPS:
        varied = _moved(model, example, by, given, training)
        if varied is not None and all(map(_finite_alike, given.values, varied)):
            break
        varied = None
    found: list[Rounding] = []
    for i, value in enumerate(given.values):
        size = sizes(value)
        change = torch.zeros_like(size) if moved is None else _apart(value, moved[i])
        varies = size if varied is None else _apart(value, varied[i]) / by
        found.append(Rounding(change.maximum(size * given.eps), varies, size))
    return found


_STEPS = (0.1, 1e-3, 1e-6)


def _moved(
    model: nn.Module, example: Any, by: float, given: Outputs, training: bool
) -> list[Tensor] | None:
    """Outputs with every parameter moved by a share of it, or its last digit if that is more.

    ``None`` where the model does not run so, or gives another number of outputs.
    """
    draw = torch.Generator().manual_seed(1)
    kept = [(p, p.clone()) for p in model.parameters() if is_real(p)]
    # Each parameter takes its signs from some place of one row: drawing them all takes longer than
    # running the model.
    most = max((p.numel() for p, _ in kept), default=0)
    signs = (
        2 * torch.randint(0, 2, (most + _PLACES,), generator=draw, dtype=torch.int8, device="cpu")
        - 1
    )
    rows: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    try:
        for parameter, value in kept:
            kind = value.device, value.dtype
            if kind not in rows:
                rows[kind] = signs.to(*kind)
            place = int(torch.randint(_PLACES, (), generator=draw, device="cpu"))
            row = rows[kind][place : place + value.numel()]
            share = max(by, given.eps, torch.finfo(value.dtype).eps)
            parameter.addcmul_(value, row.view(value.shape), value=share)
        values = outputs(model, example, training=training).values
        return values if len(values) == len(given.values) else None
    except Exception:  # a network that wants a sum of one, say
        return None
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


def unlike(
    before: Outputs, after: Outputs, rounding: Sequence[Rounding], *, doubts: bool
) -> str | None:
    """How outputs differ by more than rounding, in words that follow "its removal"; or ``None``.

    Args:
        before: of the model as it was.
        after: of what should be the same.
        rounding: what rounding does to each of ``before``.
        doubts: whether to report, too, that rounding alone does too much for a comparison.
    """
    shapes = [[tuple(t.shape) for t in o.values] for o in (before, after)]
    if shapes[0] != shapes[1]:
        odd = next((p for p in zip(*shapes, strict=False) if p[0] != p[1]), shapes)
        return f"changes the shape of an output, from {odd[0]} to {odd[1]}"
    numbers = [t for t in before.values if is_real(t)]
    if numbers and not any(bool(t.isfinite().any()) for t in numbers):
        return "cannot be checked: no output of the model is finite"
    felt = not numbers
    for one, other, measured in zip(before.values, after.values, rounding, strict=True):
        if not is_real(one):
            if before.eps < 1e-12 and not torch.equal(one, other):  # else rounding may decide
                return "changes an output of whole numbers"
            continue
        if not torch.equal(one.isfinite(), other.isfinite()):
            return "makes finite outputs infinite, or infinite ones finite"
        off, allowed, varies = _apart(one, other), measured.allowed, measured.varies
        wrong = off > allowed
        if bool(wrong.any()):
            # A constant in an element is none of its size.
            large = min(float(varies[wrong].max()), size(one[wrong]))
            most = float(off[wrong].max())
            share = f"{most / large:.0e} of their size" if large > 0 else f"{most:.0e} from zero"
            drawn = before.draws != after.draws
            draws = "; the forward pass draws random numbers by its channels" if drawn else ""
            return f"changes the outputs by {share}{draws}"
        # What varies by no more than its last digits is constant.
        real = varies > 1000 * before.eps * measured.size
        hopeless = TIMES * measured.moved[real] > HOPELESS * varies[real]
        felt = felt or bool(real.any())
        if doubts and 2 * int(hopeless.sum()) > len(hopeless):
            return (
                f"cannot be checked: rounding alone may move the outputs by {allowed.max():.0e}, "
                f"and they vary by no more than {varies.max():.0e}"
            )
    if doubts and not felt:
        return "cannot be checked: what the parameters do to the outputs is lost in rounding"
    return None


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers, which rounding may change."""
    return tensor.is_floating_point() or tensor.is_complex()


def sizes(tensor: Tensor) -> Tensor:
    """The magnitude of each element; 0 where it is not finite, or no floating-point number."""
    if not is_real(tensor):
        return torch.zeros_like(tensor, dtype=torch.float32)
    small = tensor.is_floating_point() and tensor.element_size() < 4
    return torch.where(tensor.isfinite(), (tensor.float() if small else tensor).abs(), 0.0)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The difference of each element; 0 where it is not finite in both, or shapes differ."""
    if one.shape != other.shape or not is_real(one):
        return torch.zeros_like(sizes(one))
    small = one.is_floating_point() and one.element_size() < 4
    off = (one.float() - other.float() if small else one - other).abs()
    return torch.where(one.isfinite() & other.isfinite(), off, 0.0)


def _finite_alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isfinite(), other.isfinite())  # also says whether shapes differ


def size(tensor: Tensor) -> float:
    """The largest magnitude among a tensor's finite values; 0 if there are none."""
    return float(sizes(tensor).max()) if tensor.numel() else 0.0
