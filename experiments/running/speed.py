"""How long forward passes take: of the dense, the masked and the small model, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Timing
from ..errors import RunError
from ..record import Speed
from .training import laid_out, outputs

ROUNDS, FEWEST = 15, 5
ENOUGH = 10.0
"""Seconds, after which no more than :data:`FEWEST` rounds are measured."""

Models = Mapping[str, nn.Module | None]


def speeds(models: Models, image: Tensor, timing: Timing) -> list[Speed]:
    """Times of PyTorch, and on a CPU of onnxruntime, for every size of a batch.

    Args:
        models: ``dense``, ``masked`` if there is one, and ``pruned``.
        image: (1, C, H, W), of the models' device and kind; its values do not matter.
        timing: what to measure.

    Returns:
        PyTorch's in ascending order of the batches, then onnxruntime's; without these where a model
        cannot be exported.
    """
    batches = [image.expand(n, -1, -1, -1).contiguous() for n in sorted(timing.batches)]
    measured = [Speed(engine="torch", batch=len(b), **latency(models, b)) for b in batches]
    if timing.onnxruntime and not image.is_cuda:
        from .export import onnx_session  # only now: onnxruntime takes a while to load

        threads = torch.get_num_threads()
        try:
            sessions = {
                name: onnx_session(model, image, threads)[1]
                for name, model in models.items()
                if model is not None
            }
        except RunError:  # such as an operation that ONNX does not know; exporting it says why
            return measured
        for b in batches:
            passes = {name: _running(session, b) for name, session in sessions.items()}
            measured.append(Speed(engine="onnxruntime", batch=len(b), **_side_by_side(passes)))
    return measured


def latency(models: Models, images: Tensor) -> dict[str, float]:
    """Median time of PyTorch's forward pass in milliseconds, by model, without those not there.

    Each gets its fastest layout (:func:`.training.laid_out`).
    """
    there = {name: laid_out(model, images) for name, model in models.items() if model is not None}

    def passing(model: nn.Module) -> Callable[[], object]:
        def forward() -> None:
            outputs(model, images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        return forward

    return _side_by_side({name: passing(model) for name, model in there.items()})


def _side_by_side(passes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each.

    They take turns, so that a busy machine slows all alike: their ratio is the figure to trust.
    """
    spent: dict[str, list[float]] = {name: [] for name in passes}
    began = time.perf_counter()
    for turn in range(ROUNDS + 2):
        for name, forward in passes.items():
            started = time.perf_counter()
            forward()
            if turn >= 2:  # the first passes allocate, and choose algorithms
                spent[name].append(1000 * (time.perf_counter() - started))
        if turn >= FEWEST + 1 and time.perf_counter() - began > ENOUGH:
            break
    return {name: statistics.median(times) for name, times in spent.items()}


def _running(session: Any, images: Tensor) -> Callable[[], object]:
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)
