"""A pruned model as ONNX or as a program of torch.export, checked before it is kept."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import onnxruntime
import torch
from torch import Tensor, nn

from dpm_core.errors import first_line
from dpm_core.third_party.running import evaluating

from ..errors import RunError
from ..files import write
from .rebuild import load_model
from .training import outputs

INPUT = "images"
"""The name of the input."""
TOLERANCE = 1e-4
"""How far outputs may be from the model's, as a share of its largest one, or of 1 below that."""


def write_onnx(model: nn.Module, example: Tensor, file: BinaryIO) -> None:
    """Write a model as ONNX, for a batch of any size; it is not compared.

    Raises:
        RunError: the model has an operation that cannot be exported.
    """
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                file,  # type: ignore[arg-type]  # a file-like object will do
                dynamo=False,  # the other exporter needs one more package
                input_names=[INPUT],
                output_names=["logits"],
                dynamic_axes={INPUT: {0: "batch"}, "logits": {0: "batch"}},
            )
    except Exception as cause:  # tracing raises what the model does, and errors of its own
        raise RunError(f"PyTorch cannot write this model as ONNX: {first_line(cause)}") from cause


def onnx_session(
    model: nn.Module, example: Tensor, threads: int = 0
) -> tuple[bytes, onnxruntime.InferenceSession]:
    """A model as ONNX, and in onnxruntime on the CPU, where it has run batches of two sizes.

    Args:
        model: as :func:`write_onnx` takes it.
        example: (B, C, H, W), an input batch on the model's device.
        threads: of onnxruntime; 0: as many as it likes.

    Raises:
        RunError: it cannot be written as ONNX, or onnxruntime cannot run it.
    """
    buffer, options = io.BytesIO(), onnxruntime.SessionOptions()
    write_onnx(model, example, buffer)
    options.intra_op_num_threads = threads
    one = example[:1].cpu()
    try:
        session = onnxruntime.InferenceSession(
            buffer.getvalue(), options, providers=["CPUExecutionProvider"]
        )
        found = [session.run(None, {INPUT: torch.cat([one] * n).numpy()})[0] for n in (1, 2)]
    except Exception as cause:  # onnxruntime's own errors have no base in common
        raise RunError(
            f"onnxruntime cannot run this model with batches of every size ({first_line(cause)}). "
            "If it reads len(images), PyTorch has written down what that is in the example: read "
            "images.shape[0], or call flatten(1)"
        ) from cause
    if len(found[1]) != 2 * len(found[0]):
        raise RunError(
            f"as ONNX this model gives {len(found[0])} outputs for one image and {len(found[1])} "
            "for two: read images.shape[0], or call flatten(1), where it reads len(images)"
        )
    return buffer.getvalue(), session


def onnx(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write a model as ONNX, for a batch of any size, and compare both.

    Args:
        model: stays in its mode; exported as it evaluates.
        example: (B, C, H, W), an input batch on the model's device.
        path: of the file; nothing is written where the outputs differ.

    Returns:
        The largest difference of the outputs on ``example``.

    Raises:
        RunError: as :func:`onnx_session`, or onnxruntime's outputs are not the model's.
    """
    expected = outputs(model, example).cpu()
    content, session = onnx_session(model, example)
    (logits,) = session.run(None, {INPUT: example.cpu().numpy()})
    difference = _difference("ONNX", torch.from_numpy(logits), expected, path)
    write(path, lambda file: file.write(content))
    return difference


def program(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write a model as a program of ``torch.export``, for a batch of any size, and compare both.

    Args, returns and raises as :func:`onnx`; ``torch.export.load(path).module()`` reads it.
    """
    expected, buffer = outputs(model, example), io.BytesIO()
    try:
        with evaluating(model):
            exported = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            torch.export.save(exported, buffer)
    except Exception as cause:  # the exporter's own errors have no base in common
        raise RunError(f"PyTorch cannot export this model: {first_line(cause)}") from cause
    buffer.seek(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of a buffer that it only reads
        again = torch.export.load(buffer).module()(example)
    difference = _difference("the exported program", again.cpu(), expected.cpu(), path)
    write(path, lambda file: file.write(buffer.getvalue()))
    return difference


def _difference(what: str, actual: Tensor, expected: Tensor, path: Path) -> float:
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RunError(
            f"{what} gives outputs that are off by {difference:.1e}; {path} was not written. The "
            "model has an operation that this exporter renders differently"
        )
    return difference


KINDS = {"onnx": (onnx, ".onnx"), "torch": (program, ".pt2")}


def export(path: Path, kind: str = "onnx", *, allow: Collection[str] = ()) -> Path:
    """Write a run's pruned model beside its file, as ONNX or as a program of ``torch.export``.

    Args:
        path: a run's ``model.safetensors``.
        kind: one of :data:`KINDS`.
        allow: what may be imported to rebuild it, as :func:`.rebuild.load_model`.

    Raises:
        RunError: the file is no model of a run, or may not be rebuilt, or what was exported does
            not give its outputs.
        DamagedError, VersionError: as :func:`.rebuild.load_model`.
    """
    maker, suffix = KINDS[kind]
    maker(*load_model(path, allow=allow), path.with_suffix(suffix))
    return path.with_suffix(suffix)
