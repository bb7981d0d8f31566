"""Half precision: parameters follow their schedule, and sums are made in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from dpm_core import (
    DecayPruning,
    Hearing,
    Owner,
    SelfRectifying,
    Slice,
    SmoothPruning,
    StructureGroup,
)
from dpm_core.hearing import Objective, gate_derivatives
from tests.support import oracle
from tests.support.toys import OPTIMIZERS, Toy, make
from tests.support.twins import Twin, norm, structure

STEPS = 5
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
SMALLEST = {torch.float16: 2**-24, torch.bfloat16: 0.0}  # the grid below the normal numbers
by_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def mixed(dtype: torch.dtype) -> Toy:
    """As networks are cast in practice: BatchNorm stays in float32."""
    toy = make("conv")
    for module in toy.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
    toy.model.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
    toy.model.bn1.register_forward_hook(lambda _m, _a, out: out.to(dtype))
    toy.model.bn2.register_forward_hook(lambda _m, _a, out: out.to(dtype))
    return toy


@by_dtype
@pytest.mark.parametrize("optimizer_name", ["nesterov", "adamw"])
@pytest.mark.parametrize("name", ["conv", "flatten", "strided", "mixed"])
def test_parameters_follow_the_schedule_within_their_own_precision(
    name: str, optimizer_name: str, dtype: torch.dtype
) -> None:
    toy = mixed(dtype) if name == "mixed" else make(name, dtype)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(STEPS)).attach(optimizer)
    plain = Twin("conv" if name == "mixed" else name, optimizer_name, dtype)
    if name == "mixed":
        plain.toy = mixed(dtype)
        plain.optimizer = OPTIMIZERS[optimizer_name](plain.toy.model.parameters())
    for settings in optimizer.param_groups:
        if "eps" in settings:
            settings["eps"] = 1e-4  # PyTorch's default is zero in float16
    toy.train_step(optimizer, 0)
    first = {(i, k): norm(toy, i, k) for i, g in enumerate(toy.groups) for k in toy.doomed[g.name]}
    dpm.decay(toy.doomed)
    for n in range(1, STEPS + 1):
        toy.backward(optimizer, n)
        twin = plain.step(toy, optimizer)
        optimizer.step()
        for (i, k), initial in first.items():
            star = structure(twin, i, k)
            expected = oracle.smooth(star, initial, n, STEPS)
            grid = SMALLEST[dtype]
            close = pytest.approx(expected, rel=ROUNDING[dtype] * 1.01, abs=grid + 1e-30)
            assert structure(toy, i, k) == close
            target = initial * (1 - n / STEPS)
            lost = grid * math.sqrt(len(star))
            assert norm(toy, i, k) == pytest.approx(target, rel=ROUNDING[dtype], abs=lost)


@pytest.mark.parametrize(
    ("dtype", "size", "slope"),
    [
        (torch.float16, 300.0, 300.0),  # a square of either is infinite in float16
        (torch.float16, 20.0, 2.0**-14),  # sums are, or squares are nothing
        (torch.float16, 2.0**-13, 2.0**-13),
        (torch.bfloat16, 3.0, 1.0),  # a sum of ones stops at 256 in bfloat16
    ],
)
@pytest.mark.parametrize("vectors", [False, True], ids=["matrix", "vectors"])
def test_norms_and_evidence_are_summed_in_float32(
    dtype: torch.dtype, size: float, slope: float, vectors: bool
) -> None:
    draw = torch.Generator().manual_seed(3)
    shape = (3 * 700,) if vectors else (3, 700)

    def values(scale: float) -> Tensor:
        return ((torch.rand(shape, generator=draw) + 0.5) * scale).to(dtype)

    parameter = nn.Parameter(values(size))
    part = Slice.whole(parameter, per_structure=700 if vectors else 1)
    group = StructureGroup("rows", [part])
    optimizer = SGD([parameter], lr=0.0)
    dpm = DecayPruning([group], SmoothPruning(8), SelfRectifying()).attach(optimizer)
    shares = oracle.shares_of(group)
    first = [oracle.length(oracle.values(shares, k)) for k in range(3)]
    # No order in which 700 squares are added up in float32 is farther off.
    single = 700 * 2**-24
    assert group.norms().tolist() == pytest.approx(first, rel=single)
    dpm.decay({"rows": [0, 2]})
    resistance, bound = {0: 0.0, 2: 0.0}, {0: 0.0, 2: 0.0}
    for _ in range(4):
        parameter.grad = values(slope)
        for k in resistance:
            x, g = oracle.values(shares, k), oracle.values(shares, k, [parameter.grad])
            resistance[k] += oracle.resistance(first[k], x, g)
            bound[k] += oracle.length(g) * first[k]
        optimizer.step()
    found = dpm.state_dict()["groups"]["rows"]
    for k in resistance:
        # The schedule gives ||x|| to the rounding of x.
        assert float(found["gradient"][k]) == pytest.approx(bound[k], rel=single)
        assert float(found["resistance"][k]) == pytest.approx(resistance[k], rel=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [*ROUNDING, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_a_hearing_in_half_precision_hears_what_one_in_float64_does(
    dtype: torch.dtype, autocast: bool
) -> None:
    """Of 512 samples, each has so small a share in the mean that float16 would lose it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight.mul_(2.0**-12)
    images, labels = torch.randn(512, 4), torch.randint(3, (512,))
    found = []
    for kind in (dtype, torch.float64):
        half = autocast and kind != torch.float64
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        net.load_state_dict(model.state_dict())
        net.to(torch.float32 if half else kind)
        group = StructureGroup(
            "hidden", [Slice.whole(net[0].weight)], [Owner(net[0], torch.arange(6))]
        )

        def loss(net: nn.Module = net, half: bool = half) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=half and dtype != torch.float32):
                out = net(images.to(next(net.parameters()).dtype))
            return nn.functional.cross_entropy(out.to(torch.float64), labels)

        found.append(gate_derivatives(Objective(net, loss), [group], [torch.arange(6)], 2, 1e-3))
    assert Hearing().gate == 1e-3
    (mean, square), (exact_mean, exact_square) = found
    spread = float(exact_square.sqrt().max())
    assert (mean - exact_mean).abs().max() <= 0.02 * spread
    torch.testing.assert_close(square, exact_square, rtol=0.05, atol=0)
