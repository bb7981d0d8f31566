"""What one run is to do, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..names import folder_of
from ..record import Variant, run_of
from .ranks import Ranks

CHECKPOINT, DENSE_CHECKPOINT = "checkpoint.pt", "dense-checkpoint.pt"
"""A run's own, and one for its dense model, if that is lost later and has to be trained anew."""


@dataclass(frozen=True)
class Request:
    """What one run is to do.

    Attributes:
        config: the checked configuration.
        variant: base, sp, sr or a control.
        seed: of initial weights, data order and augmentation; where dense models are shared
            (``dense.seeds``), those of the dense model are of its own seed.
        out: where all runs are kept; this one gets a folder of its own in it.
        data_root: where downloads and decoded folders are kept.
        device: where to train.
        resume: go on from a checkpoint.
        force: start anew; an old record is replaced when the new one is complete, an old checkpoint
            is removed when the new run is known to be possible.
        save_every: seconds between checkpoints; 0 writes one after every step.
        ranks: this process among those that carry the run out together.
    """

    config: Config
    variant: Variant
    seed: int
    out: Path = Path("runs")
    data_root: Path = Path("data")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume: bool = False
    force: bool = False
    save_every: float = 30.0
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def folder(self) -> Path:
        """This run's own folder."""
        data = self.config.data
        kind = folder_of(data.label or data.name)
        if data.validation is not None:
            kind += f"-validation{data.validation}"
        if self.ranks.count > 1:  # BatchNorm sees other batches, so it is another run
            kind += f"-{self.ranks.count}processes"
        return self.out / self.config.name / kind / f"{self.variant}-seed{self.seed}"

    def run_of(self, images: str) -> dict[str, Any]:
        """What the run's model and trace name as their run.

        Args:
            images: their hash.
        """
        return run_of(self.config.hash(), self.variant, self.seed, images)
