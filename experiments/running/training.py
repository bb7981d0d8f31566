"""The one training loop, for dense models and every framework, and what it measures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from dpm_core import DecayPruning, DecayPruningError, Phase
from dpm_core.adapters.base import Adapter, AdapterError, new_optimizer
from dpm_core.adapters.removal import Removal
from dpm_core.third_party.running import copied, evaluating, same_draws

from ..config import Compute, Curve, Stage
from ..inputs.images import Images, mix, mixing
from .progress import Bar
from .ranks import Ranks

EVALUATION_BATCH = 500
LARGE = 64 * 64
"""Images of more pixels are evaluated fewer at a time, so that a batch takes no more memory."""
POINTS = 40
BETWEEN_CHECKS = 50
"""Steps between checks of the loss, if a check has to wait for a GPU or other processes."""


def fastest_layout(model: nn.Module, images: Tensor | None = None) -> torch.memory_format:
    """The layout in which the model convolves fastest, of those in which it runs.

    Channels-last on a GPU, and on a CPU as long as all widths are multiples of eight: with the odd
    widths of a pruned model it is slower there. Else contiguous; so, too, where the model runs on
    nothing else, as where it calls ``view()``.

    Args:
        model: it stays as it is.
        images: some of those that it gets, to try it on; without them it is not tried.
    """
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not kernels or not all(k.is_cuda or k.shape[0] % 8 == 0 for k in kernels):
        return torch.contiguous_format
    if images is not None:
        twin = in_layout(copied(model), torch.channels_last)
        # Two, as BatchNorm takes no statistics of one.
        two = images[:1].repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        try:
            with torch.no_grad(), same_draws():
                for training in (True, False):
                    twin.train(training)(two)
        except (RuntimeError, ValueError):  # what has another cause comes again in the training
            return torch.contiguous_format
    return torch.channels_last


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model with its kernels in a layout, in place."""
    anything: Any = model  # PyTorch's releases differ in what they say of this call
    return cast(nn.Module, anything.to(memory_format=layout))


def laid_out(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """The model with its kernels in the :func:`fastest_layout`, in place."""
    return in_layout(model, fastest_layout(model, images))


Norms = tuple[int, dict[str, dict[int, float]]]
"""The core's clock, and the norms at that time, by group and structure."""


def norms_now(dpm: DecayPruning) -> Norms:
    """The norms at this moment of all structures that have ever decayed."""
    followed: dict[str, list[int]] = {}
    for event in dpm.events:
        if event.kind == "decay":
            followed.setdefault(event.group, []).extend(event.structures)
    norms = {g: dpm.groups[g].norms().tolist() for g in followed}
    return dpm.clock, {g: {k: norms[g][k] for k in ks} for g, ks in followed.items()}


class Stopped(Exception):  # noqa: N818  (a request, not an error)
    """The run was asked to stop, and has saved itself."""


class DivergedError(DecayPruningError, RuntimeError):
    """Training has left the finite numbers. The message names stage and step, and the remedy."""


def learning_rate(stage: Stage, epoch: int) -> float:
    """The learning rate of an epoch, 0-based: a pure function, so a resumed run needs no state."""
    return stage.learning_rate * stage.gamma ** sum(epoch >= m for m in stage.milestones)


def steps(stages: Sequence[tuple[str, Stage]], images: Images) -> int:
    """Training steps of some stages, (name, settings), in all."""
    return sum(s.epochs * images.steps_per_epoch(s.batch) for _, s in stages if s.epochs)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the test images classified right, in percent. The model stays in its mode."""
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with evaluating(model):
        for part in _parts(len(images.test), images):
            logits = model(images.normalize(images.test[part]))
            right += (logits.argmax(1) == images.test_labels[part]).sum()
    return 100 * int(right) / len(images.test)


def reestimated(model: nn.Module, images: Images, batches: int = 20) -> nn.Module:
    """A copy whose BatchNorm running statistics are means over some training batches."""
    fresh = copy.deepcopy(model)
    parts = _parts(len(images.train), images)[:batches]
    update_bn((images.normalize(images.plain(part)) for part in parts), fresh)
    return fresh


def _parts(count: int, images: Images) -> list[slice]:
    """So many images in batches of :data:`EVALUATION_BATCH`; of large images in smaller ones."""
    pixels = images.size[0] * images.size[1]
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * LARGE // pixels))
    return [slice(start, min(count, start + batch)) for start in range(0, count, batch)]


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint.

    Attributes:
        stage: index into the run's stages.
        step: training steps done in the stage, hearings' batches among them.
        total: training steps done in all stages.
        decided_at: ``total`` when the framework began to take structures out; ``None`` before.
        zero_at: ``total`` when all that goes was zero, or removed; ``None`` before.
        removed_at: ``total`` at the latest removal; ``None`` before.
        seconds: spent so far.
        found: the accuracies at ``zero_at``, and the largest difference of outputs that a removal
            made.
        curve: (steps since the decision, test accuracy in %), with a point at ``zero_at``.
        events: what the core reported until the latest removal, with structures numbered as in the
            dense model.
        heard: batches that hearings and rankings used up until then.
        trace: norms of the structures that have decayed so far, in rounds since the latest removal:
            by the core's clock, by group and by number in the dense model. A decay gets
            :data:`POINTS` of them or more.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    decided_at: int | None = None
    zero_at: int | None = None
    removed_at: int | None = None
    seconds: float = 0.0
    found: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    heard: int = 0
    trace: list[Norms] = field(default_factory=list)


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
        compute: how the arithmetic of training steps is done.
        ranks: which of several processes this is; each trains on its share of every batch.
        save: writes a checkpoint of this loop; by default there are none.
        stop: asked after every step whether to save and stop; by default never.
        save_every: seconds between checkpoints.
        bar: shows how far the run is.
        after: steps of the run's loop that follows this one, for the bar.
        progress: where the run stands.
        optimizer: of the present stage.
        masked: the model as it was right before the latest removal, with its structures at zero;
            ``None`` before, and where they were cut at once.
        masked_removed: what earlier removals had taken from it.
        seconds_loading, seconds_training: spent in this process on batches, and on whole steps.
    """

    model: nn.Module
    images: Images
    seed: int
    stages: list[tuple[str, Stage]]
    adapter: Adapter | None = None
    curve: Curve = field(default_factory=Curve)
    save: Callable[[Loop], object] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    save_every: float = 30.0
    compute: Compute = field(default_factory=Compute)
    ranks: Ranks = field(default_factory=Ranks)
    bar: Bar = field(default_factory=Bar)
    after: int = 0
    progress: Progress = field(default_factory=Progress)
    optimizer: torch.optim.Optimizer | None = None
    masked: nn.Module | None = None
    masked_removed: Removal | None = None
    seconds_loading: float = 0.0
    seconds_training: float = 0.0

    def __post_init__(self) -> None:
        self._losses: Tensor | None = None
        self.lay_out()

    def lay_out(self) -> None:
        """Bring the model as it is now, and its optimizer's state, into the fastest layout."""
        fastest = fastest_layout(self.model, self.images.normalize(self.images.test[:1]))
        free = self.adapter is None or self.adapter.channels_last
        in_layout(self.model, fastest if free else torch.contiguous_format)
        # Layers follow their input, too: where kernels have to stay contiguous, a step on a CPU
        # takes a fifth less with images in the fastest layout. On a GPU it was not measured.
        cpu = self.images.device.type == "cpu"
        self._layout = fastest if cpu else torch.contiguous_format
        for parameter, state in ({} if self.optimizer is None else self.optimizer.state).items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def run(self) -> None:
        """Train all stages, or what is left of them.

        Raises:
            Stopped: ``stop`` said so; a checkpoint was written.
            DivergedError: in every process, where the loss, a weight or an output is NaN or
                infinite: at once in one process on a CPU, else within
                :data:`BETWEEN_CHECKS` steps; and before a removal and the end of a stage.
            AdapterError: the stages ended before the framework's target was met.
        """
        self._resumed_at, self._before = time.perf_counter(), self.progress.seconds
        self._saved_at = self._resumed_at
        self.bar.begin(steps(self.stages, self.images), self.progress.total, self.after)
        while self.progress.stage < len(self.stages):
            self._run_stage(*self.stages[self.progress.stage])
            self.progress.stage += 1
            self.progress.step = 0
            self.optimizer = None
        if self.adapter is not None and not self.adapter.complete:
            raise AdapterError(
                "training ended before the removal was due; give the stages more epochs, or "
                "shorten smooth.steps"
            )

    def next_loss(self) -> Tensor:
        """Mean loss of the model on the next training batch, or this process's share of it.

        Uses up a step. It is for hearings, which leave no gradients of parameters, so there is
        nothing to average between processes.
        """
        return self._loss(self.model)

    @property
    def _stream(self) -> int:
        """What the present stage draws from: its own, the same for all variants of a seed."""
        return 1000 * self.seed + self.progress.stage + (0 if self.adapter is None else 1)

    def _loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        p, stage, stream = self.progress, self.stages[self.progress.stage][1], self._stream
        started = time.perf_counter()
        images, labels = self.images.batch(stage.batch, p.step, stream)
        share, partners = mixing(stage.mixup, stage.batch, p.step, stream)
        others = None
        if partners is not None:
            partners = partners.to(labels.device)
            images = share * images + (1 - share) * images[partners]
            others = self.ranks.share(labels[partners])
        images, labels = self.ranks.share(images), self.ranks.share(labels)
        images = images.contiguous(memory_format=self._layout)
        self.seconds_loading += time.perf_counter() - started
        p.step += 1
        p.total += 1
        half = self.compute.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(images).float()
        loss = functional.cross_entropy(logits, labels)
        if others is not None:
            loss = share * loss + (1 - share) * functional.cross_entropy(logits, others)
        return loss

    def _run_stage(self, name: str, stage: Stage) -> None:
        p = self.progress
        per_epoch = self.images.steps_per_epoch(stage.batch)
        total = stage.epochs * per_epoch
        if self.optimizer is None:
            self._begin()
        self._forward = self._compiled()
        while True:
            self._look()
            if p.step >= total:
                self._require_finite_model()
                return
            assert self.optimizer is not None
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(stage, p.step // per_epoch)
            self.model.train()
            started = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self._loss(self._forward)
            self._watch(loss.detach())
            loss.backward()
            self.optimizer.step()
            if self.adapter is not None:
                self._follow_norms(self.adapter)
            self.seconds_training += time.perf_counter() - started
            self.bar.at(p.total, name)
            self._save_or_stop()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The present stage's optimizer, of the model as it is."""
        stage = self.stages[self.progress.stage][1]
        settings = stage.optimizer, stage.learning_rate, stage.momentum, stage.weight_decay
        if self.adapter is None:
            return new_optimizer(self.model, *settings)
        return self.adapter.new_optimizer(*settings)

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """The forward pass of training steps.

        Hearings keep the plain one: they hook modules, which compiled code would not see.
        """
        compiled: Any = torch.compile(self.model) if self.compute.compile else self.model
        return self.ranks.averaging(compiled)

    def _begin(self) -> None:
        # What the network draws itself, as dropout does: whether or not the dense model was trained
        # in this run, and the same in all processes, so that a checkpoint's state is every one's.
        torch.manual_seed(mix(self._stream, 5, 0))
        self.model.train()
        self.optimizer = self.new_optimizer()
        if self.adapter is not None:
            self.adapter.attach(self.optimizer, self.next_loss)

    def _look(self) -> None:
        """Between steps: measure, and remove what is due."""
        if self.adapter is None:
            return
        p = self.progress
        if self.adapter.decided and p.decided_at is None:
            p.decided_at = p.total
            self._measure_curve()
        if self.adapter.due:
            self._require_finite_model()
            self._remove(self.adapter)
            self._forward = self._compiled()
        if p.decided_at is None:
            return
        if p.zero_at is None and self.adapter.settled:
            self._measure_zero()
        since, last = p.total - p.decided_at, p.curve[-1][0]
        every = self.curve.every
        if since <= self.curve.until and since // every > last // every:
            self._measure_curve()

    def _measure_curve(self) -> None:
        p = self.progress
        assert p.decided_at is not None
        p.curve.append((p.total - p.decided_at, accuracy(self.model, self.images)))

    def _measure_zero(self) -> None:
        p = self.progress
        p.zero_at = p.total
        self._measure_curve()
        p.found["at_removal"] = p.curve[-1][1]
        fresh = reestimated(self.model, self.images)
        p.found["at_removal_reestimated"] = accuracy(fresh, self.images)

    def _remove(self, adapter: Adapter) -> None:
        p, probe = self.progress, self.images.normalize(self.images.test[:64])
        if adapter.dpm is not None:
            p.events += [asdict(e) for e in adapter.events()]
        p.heard = adapter.heard
        # What is not zero yet, as in DepGraph's base, is cut off: there is nothing to compare.
        zero = adapter.dpm is not None or adapter.settled
        before = outputs(self.model, probe)
        self.masked = copy.deepcopy(self.model) if zero else None
        self.masked_removed = adapter.removed
        adapter.remove()
        self.lay_out()
        p.removed_at = p.total
        largest = p.found.get("output_difference")
        if zero:
            largest = max(float((outputs(self.model, probe) - before).abs().max()), largest or 0.0)
        p.found["output_difference"] = largest

    def _follow_norms(self, adapter: Adapter) -> None:
        p, dpm = self.progress, adapter.dpm
        if dpm is None or adapter.complete or p.decided_at is None:
            return
        happened = bool(dpm.events) and dpm.events[-1].step == dpm.clock
        on_grid = dpm.clock % max(1, dpm.smooth.steps // POINTS) == 0
        if not happened and not (on_grid and dpm.count(Phase.DECAYING)):
            return
        clock, norms = norms_now(dpm)
        of = {group: adapter.numbers(group) for group in norms}
        renumbered = {g: {of[g][k]: n for k, n in by.items()} for g, by in norms.items()}
        p.trace.append((clock, renumbered))

    def _watch(self, loss: Tensor) -> None:
        """Note a step's loss; check it at once where that waits for nothing, else now and then."""
        # A sum keeps every NaN and infinity.
        self._losses = loss if self._losses is None else self._losses + loss
        waits = loss.is_cuda or self.ranks.count > 1
        if not waits or self.progress.step % BETWEEN_CHECKS == 0:
            self._require_finite_loss()

    def _require_finite_loss(self) -> None:
        losses, self._losses = self._losses, None
        # One process's share may be finite still, and all have to end together.
        if self.ranks.any(losses is not None and not bool(losses.isfinite())):
            raise self._diverged("the loss")

    def _require_finite_model(self) -> None:
        self._require_finite_loss()
        state = [bool(t.isfinite().all()) for t in self.model.state_dict().values()]
        if self.ranks.any(not all(state)):
            raise self._diverged("a weight or statistic")
        probe = outputs(self.model, self.images.normalize(self.images.test[:64]))
        if self.ranks.any(not bool(probe.isfinite().all())):
            raise self._diverged("an output")

    def _diverged(self, what: str) -> DivergedError:
        name, stage = self.stages[self.progress.stage]
        return DivergedError(
            f"training diverged: by step {self.progress.step} of stage {name!r} {what} is NaN or "
            f"infinite; lower that stage's learning_rate ({stage.learning_rate:g}) and start anew"
        )

    def _save_or_stop(self) -> None:
        now = time.perf_counter()
        self.progress.seconds = self._before + now - self._resumed_at
        stopping = self.stop()
        if stopping or now - self._saved_at >= self.save_every:
            if self.ranks.count == 1:  # others may not have come to a save by their clocks
                self._require_finite_loss()
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
