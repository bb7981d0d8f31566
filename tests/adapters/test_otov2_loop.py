"""OTOv2 in a loop that is written as upstream's README has it."""

from __future__ import annotations

import copy
import sys
import types

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_core import SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters.base import AdapterError, Training
from dpm_core.adapters.otov2 import OTO, OTOv2, TargetWarning
from dpm_core.third_party import otov2

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
EAGER = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.4)
PRUNING = {"target_group_sparsity": 0.5, "start_pruning_steps": 4, "epsilon": 0.95, "lmbda": 2.0}
VARIANTS = {
    "base": (None, None),
    "sp": (SmoothPruning(5), None),
    "sr": (SmoothPruning(5), EAGER),
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        train_on(model, optimizer, number)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step, with a batch by its number."""
    model.train()
    draw = torch.Generator().manual_seed(number)
    images = torch.randn(16, 1, 8, 8, generator=draw)
    labels = torch.randint(5, (16,), generator=draw)
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(EXAMPLE.double())


def test_upstreams_readme_runs_as_it_stands(tmp_path):
    from only_train_once import OTO  # as it stands there; by now it is ours

    model = net()
    before = list(sys.modules), torch.onnx.export, torch.Tensor.__dict__.get("cuda")
    oto = OTO(model=model, dummy_input=EXAMPLE[:1])
    optimizer = oto.dhspg(variant="sgd", lr=0.1, weight_decay=1e-4, **PRUNING)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.5)
    for _ in range(40):
        train(model, optimizer, 1)
        scheduler.step()
    assert float(optimizer.compute_group_sparsity_omega()[0]) >= 0.49
    assert optimizer.compute_norm_group_partitions()[2:] == (15, 13)
    statistics = model[1].running_var.clone()
    oto.compress(compressed_model_path=str(tmp_path))
    assert torch.equal(model[1].running_var, statistics)
    small, full = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (oto.compressed_model_path, oto.full_model_path)
    )
    given = {small.get_inputs()[0].name: EXAMPLE[:1].numpy()}
    expected = model.eval()(EXAMPLE[:1]).detach().numpy()
    for session in (small, full):
        assert abs(session.run(None, given)[0] - expected).max() < 1e-5
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("*.onnx"))]
    assert sizes[0] < 0.8 * sizes[1]  # compressed, full
    assert oto.compute_num_params(compressed=True) < oto.compute_num_params()
    assert torch.onnx.export is before[1]
    assert torch.Tensor.__dict__.get("cuda") is before[2]
    assert not {*otov2.STRAY, "imp", "distutils"} & ({*sys.modules} - {*before[0]})


def test_without_smoothing_upstream_trains_as_it_does_by_itself():
    models = []
    for taken_over in (False, True):
        model = net()
        oto = OTO(model, EXAMPLE)
        optimizer = oto.dhspg(variant="sgd", lr=0.1, **PRUNING)
        if taken_over:
            OTOv2.of(oto, optimizer)
        train(model, optimizer, 20)
        models.append(model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_loop_of_ones_own_ends_small(variant, kind):
    model = net()
    oto = OTO(model, EXAMPLE)
    settings = {"lr": 0.1 if kind == "sgd" else 0.01, **PRUNING}
    if kind != "sgd":
        settings["lmbda"] = 20.0
    optimizer = oto.dhspg(variant=kind, tolerance_group_sparsity=0.1, **settings)
    run = OTOv2.of(oto, optimizer, *VARIANTS[variant])
    for _ in range(60):
        train(model, optimizer, 1)
    assert run.settled
    released = sum(len(e.structures) for e in run.events() if e.kind == "release")
    assert bool(released) == (variant == "sr")
    before = outputs(model)
    run.remove()
    assert torch.allclose(outputs(model), before, rtol=1e-10, atol=1e-12)
    left = model[0].out_channels + model[3].out_channels
    assert left == 14 if variant != "base" else left <= 14
    assert run.complete
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    with pytest.raises(AdapterError, match="DHSPG is of the model before the removal"):
        optimizer.step()


def test_with_its_length_known_the_target_is_met_in_time():
    model = net()
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(
        variant="sgd", lr=0.01, target_group_sparsity=0.5, start_pruning_steps=2, epsilon=0.1
    )
    run = OTOv2.of(oto, optimizer, SmoothPruning(4), training=Training(20))
    train(model, optimizer, 19)
    assert not run.due
    train(model, optimizer, 1)
    assert run.due
    run.remove()
    assert model[0].out_channels + model[3].out_channels == 14


def test_the_end_may_come_too_early():
    model = net()
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(variant="sgd", lr=0.1, **PRUNING)
    run = OTOv2.of(oto, optimizer, SmoothPruning(20))
    with pytest.raises(AdapterError, match="no structure is zero yet"):
        run.remove()
    train(model, optimizer, 12)
    with pytest.raises(AdapterError, match="structures still decay"):
        run.remove()

    model = net()
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(variant="sgd", lr=0.1, **PRUNING)
    run = OTOv2.of(oto, optimizer)
    train(model, optimizer, 4)
    with torch.no_grad():  # one structure at zero, of 28
        for parameter in (*model[0].parameters(), *model[1].parameters()):
            parameter[3] = 0
    before = outputs(model)
    with pytest.warns(TargetWarning, match="0.5 is not reached: 0.036"):
        run.remove()
    assert model[0].out_channels == 15
    assert torch.allclose(outputs(model), before, rtol=1e-10, atol=1e-12)


def test_what_is_not_from_here_or_comes_too_late_is_refused():
    model = net()
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(variant="sgd", lr=0.1, **PRUNING)
    with pytest.raises(AdapterError, match=r"import OTO from dpm_core\.adapters\.otov2"):
        OTOv2.of(types.SimpleNamespace(), optimizer, SmoothPruning(5))
    with pytest.raises(AdapterError, match=r"SGD does not choose.*give the optimizer of this OTO"):
        OTOv2.of(oto, torch.optim.SGD(model.parameters(), 0.1), SmoothPruning(5))
    foreign = OTO(net(), EXAMPLE).dhspg(variant="sgd", lr=0.1, **PRUNING)
    with pytest.raises(AdapterError, match="of another model"):
        OTOv2.of(oto, foreign, SmoothPruning(5))
    train(model, optimizer, 8)
    with pytest.raises(AdapterError, match="chosen already what goes; take it over before"):
        OTOv2.of(oto, optimizer, SmoothPruning(5))
    with pytest.raises(AdapterError, match="give model and dummy_input"):
        OTO().initialize(model)


@pytest.mark.parametrize("divisible", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_of_ones_own_goes_on_from_a_checkpoint_in_the_same_bits(variant, divisible):
    length, settings = 30, {**PRUNING, "group_divisible": divisible}

    def start(**saved) -> tuple[nn.Module, torch.optim.Optimizer, OTOv2]:
        model = net()
        oto = OTO(model, EXAMPLE)
        optimizer = oto.dhspg(variant="sgd", lr=0.1, **settings)
        if saved:
            model.load_state_dict(saved.pop("model"))
        training = Training(length)
        return model, optimizer, OTOv2.of(
            oto, optimizer, *VARIANTS[variant], training=training, **saved
        )  # fmt: skip

    def go_on(model, optimizer, run, first: int) -> None:
        for number in range(first, length):
            train_on(model, optimizer, number)
        run.remove()

    model, optimizer, run = start()
    saved = []
    for number in range(length):
        saved.append(
            copy.deepcopy(
                {
                    "model": model.state_dict(),
                    "optimizer_state": optimizer.state_dict(),
                    "state": run.state_dict(),
                }
            )
        )
        train_on(model, optimizer, number)
    last = {"optimizer_state": optimizer.state_dict(), "model": copy.deepcopy(model.state_dict())}
    run.remove()
    assert len(model[0].weight) < 16
    for stop in (2, 7, 12, 25):
        other = start(**saved[stop])
        go_on(*other, stop)
        assert other[2].removed == run.removed
        for name, value in model.state_dict().items():
            assert torch.equal(value, other[0].state_dict()[name]), (stop, name)
    with pytest.raises(AdapterError, match=r"run that was over.*load_pruned"):
        start(**last, state=run.state_dict())
    with pytest.raises(AdapterError, match=r"give it state= and optimizer_state="):
        start()[2].load_state_dict(saved[7]["state"])
    with pytest.raises(AdapterError, match="going on takes both"):
        start(model=saved[7]["model"], state=saved[7]["state"])
    with pytest.raises(AdapterError, match="no state of"):
        start(**{**saved[7], "optimizer_state": {"groups": {}}})
