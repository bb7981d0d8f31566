"""The one training loop, and what it measures. It serves dense models and every framework."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from adapters.base import Adapter, AdapterError

from .config import Curve, Stage
from .data import Images

EVALUATION_BATCH = 500


class Stopped(Exception):  # noqa: N818  (a request, not an error)
    """The run was asked to stop, and has saved itself."""


def optimizer_of(stage: Stage, model: nn.Module) -> torch.optim.Optimizer:
    """A new optimizer for all parameters of a model."""
    if stage.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=stage.learning_rate,
            momentum=stage.momentum,
            weight_decay=stage.weight_decay,
        )
    kind = torch.optim.Adam if stage.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)


def learning_rate(stage: Stage, epoch: int) -> float:
    """The learning rate of an epoch, 0-based: a pure function, so a resumed run needs no state."""
    return stage.learning_rate * stage.gamma ** sum(epoch >= m for m in stage.milestones)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module returns to its own."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the test images classified right, in percent. The model stays in its mode."""
    right = torch.zeros((), dtype=torch.int64, device=images.test.device)
    batches = images.test.split(EVALUATION_BATCH)
    with evaluating(model):
        for batch, labels in zip(batches, images.test_labels.split(EVALUATION_BATCH), strict=True):
            right += (model(images.normalize(batch)).argmax(1) == labels).sum()
    return 100 * int(right) / len(images.test)


def reestimated(model: nn.Module, images: Images, batches: int = 20) -> nn.Module:
    """A copy whose BatchNorm running statistics are means over some training batches."""
    fresh = copy.deepcopy(model)
    chunks = images.train[: batches * EVALUATION_BATCH].split(EVALUATION_BATCH)
    update_bn((images.normalize(c) for c in chunks), fresh)
    return fresh


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint.

    Attributes:
        stage: index into the run's stages.
        step: training steps done in the stage, hearings' batches among them.
        total: training steps done in all stages.
        decided_at: ``total`` when the framework began to take structures out; ``None`` before.
        removed_at: ``total`` at the removal; ``None`` before.
        seconds: spent so far.
        found: figures measured at the removal.
        curve: (steps since the decision, test accuracy in %), the removal's own at its step.
        events: what the core reported until the removal.
        heard: batches that hearings used up until then.
        trace: norms of the structures that ever decayed, by the core's clock, group and
            structure.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    decided_at: int | None = None
    removed_at: int | None = None
    seconds: float = 0.0
    found: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    heard: int = 0
    trace: list[tuple[int, dict[str, dict[int, float]]]] = field(default_factory=list)


@dataclass
class Loop:
    """One run's training: a dense stage, or the stages of a framework.

    Attributes:
        model: trained in place.
        images: on the model's device.
        seed: of the data order and augmentation; the same for all variants.
        stages: (name, settings) in order.
        adapter: the framework, or ``None`` for a dense model.
        curve: how densely and how long the accuracy is taken after the decision.
        save: writes a checkpoint of this loop.
        stop: asked after every step whether to save and stop.
        save_every: seconds between checkpoints.
        progress: where the run stands.
        optimizer: of the present stage.
    """

    model: nn.Module
    images: Images
    seed: int
    stages: list[tuple[str, Stage]]
    adapter: Adapter | None
    curve: Curve
    save: Callable[[Loop], None]
    stop: Callable[[], bool]
    save_every: float = 30.0
    progress: Progress = field(default_factory=Progress)
    optimizer: torch.optim.Optimizer | None = None

    def run(self) -> None:
        """Train all stages, or what is left of them.

        Raises:
            Stopped: ``stop`` said so; a checkpoint was written.
            AdapterError: the stages ended before the framework's target was met.
        """
        self._resumed_at, self._before = time.perf_counter(), self.progress.seconds
        self._saved_at = self._resumed_at
        while self.progress.stage < len(self.stages):
            self._run_stage(*self.stages[self.progress.stage])
            self.progress.stage += 1
            self.progress.step = 0
            self.optimizer = None
        if self.adapter is not None and self.adapter.removed is None:
            raise AdapterError(
                "training ended before the removal was due; give the stages more epochs, or "
                "shorten smooth.steps"
            )

    def hearing_loss(self) -> Tensor:
        """Mean loss of the next training batch, for hearings; uses up a step."""
        images, labels = self._next_batch()
        return functional.cross_entropy(self.model(images), labels)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        p, stage = self.progress, self.stages[self.progress.stage][1]
        # Every stage reads a stream of its own, the same for all variants of a seed.
        stream = 1000 * self.seed + p.stage + (0 if self.adapter is None else 1)
        batch = self.images.batch(stage.batch, p.step, stream)
        p.step += 1
        p.total += 1
        return batch

    def _run_stage(self, name: str, stage: Stage) -> None:
        p = self.progress
        per_epoch = self.images.steps_per_epoch(stage.batch)
        total = stage.epochs * per_epoch
        if self.optimizer is None:
            self._begin(name, stage)
        bar = tqdm(total=total, initial=p.step, desc=name, unit="step", disable=None, leave=False)
        with bar:
            while True:
                self._look(name, stage)
                if p.step >= total:
                    return
                assert self.optimizer is not None
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(stage, p.step // per_epoch)
                self.model.train()
                images, labels = self._next_batch()
                self.optimizer.zero_grad()
                functional.cross_entropy(self.model(images), labels).backward()
                if self.adapter is not None:
                    self.adapter.after_backward()
                self.optimizer.step()
                if self.adapter is not None:
                    self.adapter.after_step()
                    self._follow_norms(self.adapter)
                bar.update(p.step - bar.n)
                self._save_or_stop()

    def _begin(self, name: str, stage: Stage) -> None:
        self.optimizer = optimizer_of(stage, self.model)
        if self.adapter is not None:
            self.adapter.begin(name, self.optimizer, self.hearing_loss)

    def _look(self, name: str, stage: Stage) -> None:
        """Between steps: measure, and remove what is due."""
        if self.adapter is None:
            return
        p = self.progress
        if self.adapter.decided and p.decided_at is None:
            p.decided_at = p.total
            self._measure_curve()
        if self.adapter.due():
            self._remove(self.adapter)
            self._begin(name, stage)
            return
        if p.decided_at is not None:
            since, last = p.total - p.decided_at, p.curve[-1][0]
            every = self.curve.every
            if since <= self.curve.until and since // every > last // every:
                self._measure_curve()

    def _measure_curve(self) -> None:
        p = self.progress
        assert p.decided_at is not None
        p.curve.append((p.total - p.decided_at, accuracy(self.model, self.images)))

    def _remove(self, adapter: Adapter) -> None:
        p, probe = self.progress, self.images.normalize(self.images.test[:64])
        before = outputs(self.model, probe)
        adapter.remove()
        p.removed_at = p.total
        self._measure_curve()
        p.found["at_removal"] = p.curve[-1][1]
        fresh = reestimated(self.model, self.images)
        p.found["at_removal_reestimated"] = accuracy(fresh, self.images)
        if adapter.dpm is not None:
            p.events, p.heard = [asdict(e) for e in adapter.dpm.events], adapter.dpm.heard
        # Before its removal the model of `base` is whole: there is nothing to compare.
        p.found["output_difference"] = (
            None
            if adapter.dpm is None
            else float((outputs(self.model, probe) - before).abs().max())
        )

    def _follow_norms(self, adapter: Adapter) -> None:
        p, dpm = self.progress, adapter.dpm
        if dpm is None or adapter.removed is not None or p.decided_at is None:
            return
        followed: dict[str, list[int]] = {}
        for event in dpm.events:
            if event.kind == "decay":
                followed.setdefault(event.group, []).extend(event.structures)
        norms = {g: dpm.groups[g].norms().tolist() for g in followed}
        p.trace.append(
            (
                dpm.clock,
                {g: {k: norms[g][k] for k in ks} for g, ks in followed.items()},
            )
        )

    def _save_or_stop(self) -> None:
        now = time.perf_counter()
        self.progress.seconds = self._before + now - self._resumed_at
        stopping = self.stop()
        if stopping or now - self._saved_at >= self.save_every:
            self.save(self)
            self._saved_at = time.perf_counter()
        if stopping:
            raise Stopped


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs in eval mode; it stays in its own."""
    with evaluating(model):
        out: Tensor = model(images)
    return out
