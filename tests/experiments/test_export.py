"""ONNX gives the small model's outputs, and a file that does not is never written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import nn

from dpm_core.adapters.base import structure_group
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import otov2
from experiments.config import Timing
from experiments.errors import RunError
from experiments.inputs import models
from experiments.record import MODEL
from experiments.running import export, speed
from experiments.running.run import run
from experiments.running.training import outputs
from tests.support import rounding, tiny, torchvisions
from tests.support.rounding import exact_outputs

NETWORKS = {
    "vgg-digits": (lambda: models.build("vgg-digits", 3, 10, seed=0), 16),
    "resnet20": (lambda: models.build("resnet20", 3, 10, seed=0), 16),
}
TORCHVISION = {"resnet18": 64, "resnet50": 64, "densenet": 64}


def awake(model: nn.Module) -> nn.Module:
    """BatchNorms as after training: statistics and parameters of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def pruned(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """Two fifths of each zero-invariant group at zero, and the same model without them."""
    draw = torch.Generator().manual_seed(1)
    plan = []
    for group in otov2.groups(otov2.graph(model, example), model):
        rows = torch.randperm(group.structures, generator=draw)[: 2 * group.structures // 5]
        factors = torch.ones(group.structures)
        factors[rows] = 0
        structure_group(group).scale_(factors)
        plan.append((group.root, sorted(rows.tolist())))
    small = copy.deepcopy(model)
    Removal(plan).apply(small, example)
    return model, small


def check(model: nn.Module, size: int, path) -> None:
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        zeroed, small = pruned(awake(model), example)
    expected = exact_outputs(zeroed, example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in zeroed.parameters())
    rounding.assert_exact(exact_outputs(small, example), expected)
    export.onnx(small, example, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # A batch of another size than the one it was exported with.
    (logits,) = session.run(None, {"images": example[:1].numpy()})
    rounding.assert_rounded(torch.from_numpy(logits), outputs(zeroed, example[:1]), expected[:1])


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_the_zeroed_models_outputs(name, tmp_path):
    build, size = NETWORKS[name]
    check(build(), size, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_onnx_gives_the_zeroed_models_outputs_for_torchvision(name, tmp_path):
    torch.manual_seed(0)
    model = torchvisions.BUILD[name](10)
    check(model, TORCHVISION[name], tmp_path / "model.onnx")


def test_a_model_that_comes_out_differently_is_not_written(tmp_path, monkeypatch):
    model, example = models.build("vgg-digits", 1, 10, seed=0), torch.randn(2, 1, 8, 8)
    right = export.outputs
    monkeypatch.setattr(export, "outputs", lambda *given: right(*given) + 1)
    with pytest.raises(RunError, match="was not written"):
        export.onnx(model, example, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_operation_that_cannot_be_exported_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4))
    with pytest.raises(RunError, match="adaptive_avg_pool2d"):
        export.onnx(model, torch.randn(2, 1, 8, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """Reads the number of images as a number, which tracing cannot follow."""

    def __init__(self, shape: Callable[[torch.Tensor], tuple[int, ...]]) -> None:
        super().__init__()
        self.conv, self.head, self.shape = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 10), shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.conv(x).reshape(self.shape(x)))
        return y


COUNTING = {
    "the rest": (lambda x: (len(x), -1), False),
    "all": (lambda x: (len(x), 512), False),
    "its shape": (lambda x: (x.shape[0], -1), True),
    "its size": (lambda x: (x.size(0), 512), True),
}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("case", COUNTING)
def test_what_is_written_takes_batches_of_every_size_or_is_not_written(case, batch, tmp_path):
    shape, fits = COUNTING[case]
    torch.manual_seed(0)
    model, path = Counting(shape), tmp_path / "model.onnx"
    example = torch.randn(batch, 1, 8, 8)
    both, timing = {"dense": model, "pruned": model}, Timing(batches=[1, 3])
    timed = {one.engine for one in speed.speeds(both, example[:1], timing)}
    assert timed == ({"torch", "onnxruntime"} if fits else {"torch"})
    if not fits:
        with pytest.raises(RunError, match=r"images\.shape\[0\]"):
            export.onnx(model, example, path)
        assert not list(tmp_path.iterdir())
        return
    export.onnx(model, example, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (1, 2, 5):
        images = torch.randn(n, 1, 8, 8)
        (logits,) = session.run(None, {"images": images.numpy()})
        exact = exact_outputs(model, images)
        rounding.assert_rounded(torch.from_numpy(logits), outputs(model, images), exact)


def test_an_error_of_the_models_own_in_tracing_is_told(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise KeyError("traced")
            return x.flatten(1)

    with pytest.raises(RunError, match=r"cannot write this model as ONNX: .*traced"):
        export.onnx(Stubborn(), torch.randn(2, 1, 8, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_model_stays_in_its_mode(tmp_path):
    model = models.build("vgg-digits", 1, 10, seed=0).train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    export.onnx(model, torch.randn(2, 1, 8, 8), tmp_path / "model.onnx")
    assert [m.training for m in model.modules()] == modes


def test_a_runs_model_is_exported_beside_it(tmp_path, monkeypatch):
    tiny.miniature(monkeypatch)
    with tiny.one_thread():
        record = run(tiny.request(tmp_path, "sp", tiny.MINIATURE))
        exported = export.export(record.parent / MODEL)
        program = export.export(record.parent / MODEL, "torch")
    assert (exported, program) == (record.parent / "model.onnx", record.parent / "model.pt2")
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]


@pytest.mark.parametrize("name", ["vgg-digits", "resnet20"])
def test_a_program_gives_the_models_outputs_for_any_batch(tmp_path, name):
    model = models.build(name, 3, 10, seed=0).eval()
    example = torch.randn(2, 3, 32, 32)
    assert export.program(model, example, tmp_path / "model.pt2") < 1e-4
    again = torch.export.load(tmp_path / "model.pt2").module()
    larger = torch.randn(5, 3, 32, 32)
    exact = exact_outputs(model, larger)
    rounding.assert_rounded(again(larger), outputs(model, larger), exact)


def test_a_program_that_cannot_be_exported_is_refused_and_not_written(tmp_path):
    class Branching(nn.Module):
        def forward(self, images):
            return images * 2 if images.sum() > 0 else images

    with pytest.raises(RunError, match="PyTorch cannot export this model"):
        export.program(Branching(), torch.randn(2, 3), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
