"""The tables that have keys of the project's own: images, arithmetic, training, curve, timing."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..inputs.images import Augmentation
from ..names import LARGEST, Text

LARGEST_IMAGE = 1024
"""Pixels to a side."""

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class Table(BaseModel):
    """A table of a configuration: its keys and no others, of these types and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Table):
    """Which images; ``--data`` overrides the name."""

    name: str = "digits"
    label: Text | None = None
    """What tables and plots call a folder's images; by default the folder's name."""
    size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] = 32
    """Height and width that a folder's images are brought to."""
    train: Count | None = None
    """Train on so many of the training images, always the same, equally many of each class."""
    augmentation: Augmentation = "shift"
    """How training images are varied: ``shift``, or ``resized-crop``, as on ImageNet; half of them
    are mirrored besides, but not digits."""
    validation: Count | None = None
    """Set so many of the other training images apart, and measure on them, not on the test images:
    for choosing settings; ``--validation`` overrides it."""


class Compute(Table):
    """How the arithmetic is done. Meant for GPUs; a CPU takes the settings, too."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: forward passes of training under autocast; parameters stay float32."""
    compile: bool = False
    """Compile forward and backward passes of training steps with ``torch.compile``."""


class Stage(Table):
    """One stretch of training."""

    epochs: Count
    batch: Count = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Rate
    milestones: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Epochs after which the learning rate is multiplied by ``gamma``."""
    gamma: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Decay = 5e-4
    mixup: Decay = 0.0
    """Alpha of mixup; 0 for none."""

    @model_validator(mode="after")
    def _bounded(self) -> Stage:
        try:
            last = self.learning_rate * self.gamma ** len(self.milestones)
        except OverflowError:
            last = math.inf
        if last > LARGEST:
            raise ValueError("gamma raises the learning rate beyond all measure; give less than 1")
        return self


class Dense(Stage):
    """Training of the dense model, or where its weights come from."""

    epochs: Annotated[int, Field(ge=0)] = 0
    """0: the checkpoint as it is."""
    learning_rate: Rate = 0.1
    checkpoint: Text | None = None
    """A file of weights that training starts from: safetensors, or a ``state_dict`` that
    ``torch.save`` wrote."""
    seeds: Count | None = None
    """Train so many dense models, and let runs share them: seed s starts from model s modulo
    ``seeds``. By default every seed has its own; with a checkpoint there is one for all."""

    @model_validator(mode="after")
    def _begun(self) -> Dense:
        if self.epochs == 0 and self.checkpoint is None:
            raise ValueError("epochs: give 1 or more, or a checkpoint to start from")
        if self.epochs and "learning_rate" not in self.model_fields_set:
            raise ValueError("learning_rate: Field required")
        return self


class Curve(Table):
    """The accuracy curve around removal, in steps of the stage in which decisions fall."""

    every: Count = 5
    until: Annotated[int, Field(ge=0)] = 100


class Timing(Table):
    """What is timed of the dense, the masked and the small model in the end."""

    batches: Annotated[list[Annotated[int, Field(ge=1, le=10**6)]], Field(min_length=1)] = [1, 128]
    """Sizes of batches. Tables and plots show the largest, in PyTorch."""
    onnxruntime: bool = True
    """Whether onnxruntime is timed beside PyTorch, where runs are on a CPU."""
