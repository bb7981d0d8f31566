"""What an adapter is: the translation between one pruning framework and the core.

An adapter's author reads this file and one adapter. An adapter is made for one run of one variant
on one model. The training loop owns batches, loss and progress; it calls the adapter at fixed
points of every step and knows nothing of the framework behind it:

    adapter.begin(stage, optimizer, loss)       once a stage, with the stage's optimizer
    for each step:
        loss.backward()
        adapter.after_backward()
        optimizer.step()
        adapter.after_step()
        if adapter.due():                       also asked once before the first step
            adapter.remove()                    then a new optimizer, and begin() again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpm_core import DecayPruning, SelfRectifying, SmoothPruning

Variant = Literal["base", "sp", "sr"]
Plan = list[tuple[str, list[int]]]
"""What is removed: (layer's name, positions of its output in the dense model), in order."""


class AdapterError(ValueError):
    """A framework cannot do what is asked of it. The message says why, and what to change."""


@dataclass
class Context:
    """What an adapter is made from.

    Attributes:
        model: the dense model; the adapter works on it in place.
        example: one input batch of any size, on the model's device.
        variant: ``base`` is the framework alone, ``sp`` decays, ``sr`` decays and rectifies.
        smooth: the decay's settings, for ``sp`` and ``sr``.
        rectify: the rectifier's settings, for ``sr``.
        stages: optimizer steps of each training stage, in order.
        steps_per_epoch: optimizer steps in one pass over the training data.
        progress: called now and then during long work outside the training steps, with what is
            going on.
    """

    model: nn.Module
    example: Tensor
    variant: Variant
    smooth: SmoothPruning
    rectify: SelfRectifying
    stages: Mapping[str, int]
    steps_per_epoch: int
    progress: Callable[[str], object] = str

    def decay_steps(self) -> int:
        """Training steps from a decision until all is zero, replacements and hearings included."""
        if self.variant == "base":
            return 0
        needed = self.smooth.steps
        if self.variant == "sr":
            heard = self.rectify.decision_step(needed) + self.rectify.criterion.batches
            needed += self.rectify.waves * heard
        return needed


class Adapter(ABC):
    """One run of one framework.

    Attributes:
        context: what the adapter was made from.
        dpm: the core at work, or ``None`` before it is needed and for ``base``.
        decided: whether the framework has begun to take structures out.
        removed: what :meth:`remove` took away, or ``None`` before.
        pruned: how many structures that were.
    """

    Options: ClassVar[type]
    """A frozen dataclass: the framework's own settings, checked in its ``__post_init__``."""
    stages: ClassVar[Mapping[str, bool]]
    """Training stages the framework knows, in order, and whether each is required."""

    def __init__(self, context: Context, options: Any) -> None:
        self.context = context
        self.options = options
        self.dpm: DecayPruning | None = None
        self.decided = False
        self.removed: Plan | None = None
        self.pruned = 0

    @abstractmethod
    def check(self) -> None:
        """Refuse, before any training, a target or a model that cannot be served.

        Raises:
            AdapterError: with cause and remedy.
        """

    @abstractmethod
    def begin(
        self, stage: str, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
    ) -> None:
        """A stage starts, or goes on with a new optimizer after a removal or a resume.

        Args:
            stage: one of :attr:`stages`.
            optimizer: of the model's present parameters.
            loss: runs the model on the next training batch and returns the mean loss; for
                hearings. Each call uses up one training step of the stage.
        """

    def after_backward(self) -> None:
        """Gradients are there, the optimizer has not stepped."""
        return

    def after_step(self) -> None:
        """The optimizer has stepped: replace what was released."""
        return

    @abstractmethod
    def due(self) -> bool:
        """Whether everything that is to go is zero (``base``: decided), so removal can follow."""

    @abstractmethod
    def remove(self) -> None:
        """Make the model physically smaller, in place, and say in :attr:`removed` what went."""

    @staticmethod
    @abstractmethod
    def shrink(model: nn.Module, example: Tensor, plan: Plan) -> None:
        """Repeat a removal on a freshly built dense model, in place, as on reloading."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer."""

    @abstractmethod
    def load_state_dict(
        self,
        state: Mapping[str, Any],
        stage: str,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], Tensor],
    ) -> None:
        """Take up a run in the middle of a stage; replaces :meth:`begin`.

        Where the state says that the removal is done, the model is small already.
        """


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for one sample.

    Counted by PyTorch's own FlopCounterMode on the model as it is; the model stays in its mode.
    """
    training = {m: m.training for m in model.modules()}
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with torch.no_grad(), counter:
            model(example[:1])
    finally:
        for module, mode in training.items():
            module.training = mode
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements."""
    return sum(p.numel() for p in model.parameters())
