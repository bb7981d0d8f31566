"""A whole configuration, and the hashes that tell runs and dense models apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from dpm_core import SmoothPruning
from dpm_core.adapters import registry
from dpm_core.adapters.base import Adapter, AdapterError, Training

from ..inputs.networks import Network
from ..inputs.starting import digest
from ..names import Name, Text, faults
from .classes import built
from .earlier import as_before
from .rectify import Rectify
from .tables import Compute, Curve, Data, Dense, Stage, Table, Timing


class Settings(Table):
    """What a configuration says, whether or not this machine could run it, as records keep it."""

    name: Name
    framework: str
    model: Text
    """A built-in network's name, or what is imported for it: :mod:`experiments.inputs.networks`."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function that builds the network; none for a built-in one."""
    model_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of the file that ``model`` names, if it names one; :func:`load` fills it in, or checks it."""
    data: Data = Data()
    dense: Dense | None = None
    """Training of the dense model, before the framework starts; without it, it starts untrained."""
    stages: dict[str, Stage]
    """The framework's stages, by name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The framework's own settings."""
    draw_by_seed: bool = False
    """Whether what a framework draws, as DepGraph's ``importance = "random"``, differs from seed to
    seed; by default all runs draw alike."""
    smooth: SmoothPruning = SmoothPruning()
    """The decay, as the core has it."""
    rectify: Rectify = Rectify()
    curve: Curve = Curve()
    compute: Compute = Compute()
    latency: Timing = Timing()

    def hash(self) -> str:
        """A hash of the configuration's content: 16 hex digits."""
        text = json.dumps(as_before(self.model_dump(mode="json")), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Config(Settings):
    """One experiment: a framework on a network on images, for all variants."""

    @field_validator("data")
    @classmethod
    def _there(cls, data: Data) -> Data:
        name = data.name
        if name in ("digits", "cifar10", "cifar100"):
            return data
        kind, _, path = name.partition(":")
        if kind != "folder" or not path:
            raise ValueError(
                f"data.name: unknown data {name!r}; give digits, cifar10, cifar100 or folder:PATH"
            )
        try:
            Path(path).expanduser()
        except RuntimeError as cause:
            raise ValueError(
                f"data.name: there is no such user as in {name!r}; give the whole path"
            ) from cause
        return data

    @model_validator(mode="after")
    def _known(self) -> Config:
        # Values under [options] have no limits of their own, as other keys have.
        if wrong := list(faults(self.model_dump())):
            raise ValueError("; ".join(wrong))
        self.network.check()
        self.network.require_hash()
        try:
            adapter = self.adapter()
        except AdapterError as cause:
            raise ValueError(f"framework: {cause}") from cause
        known = [*(["sparse"] if adapter.learns_sparse else []), "prune"]
        unknown = sorted(set(self.stages) - set(known))
        if unknown:
            raise ValueError(
                f"{self.framework} has no stage {unknown[0]!r}; its stages are: {', '.join(known)}"
            )
        if "prune" not in self.stages:
            raise ValueError(f"{self.framework} needs the stage 'prune': [stages.prune]")
        self.build_options()
        self.rectify.build().decision_step(self.smooth.steps)
        return self

    @property
    def network(self) -> Network:
        """How the network is built."""
        return Network(self.model, self.model_options, self.model_sha256)

    def ordered_stages(self) -> list[tuple[str, Stage]]:
        """The framework's stages in the order in which they are trained."""
        return [(name, self.stages[name]) for name in ("sparse", "prune") if name in self.stages]

    def training(self, steps_per_epoch: Callable[[int], int]) -> Training:
        """The lengths of the stages, as an adapter has to know them.

        Args:
            steps_per_epoch: by the size of a batch.
        """
        lengths: dict[str, Training] = {}
        for name, stage in self.ordered_stages():
            per_epoch = steps_per_epoch(stage.batch)
            lengths[name] = Training(stage.epochs * per_epoch, per_epoch)
        return replace(lengths["prune"], sparse=lengths.get("sparse"))

    def adapter(self) -> type[Adapter]:
        """The framework's adapter."""
        return registry.load(self.framework)

    def build_options(self) -> Any:
        """The framework's own settings, as its adapter defines them."""
        return built(self.adapter().Options, self.options, "options")

    def dense_seed(self, seed: int) -> int:
        """The seed of the model that a run of this seed starts from: of its weights and training.

        Args:
            seed: of the run.
        """
        if self.dense is None:
            return seed
        shared = self.dense.seeds
        if shared is None and self.dense.checkpoint is not None:
            shared = 1
        return seed if shared is None else seed % shared

    def dense_hash(self, images: str) -> str:
        """A hash of all that the dense model depends on, so that variants and frameworks share it.

        Args:
            images: a hash of the training images, or what stands for it.

        Raises:
            CheckpointError: the checkpoint to start from cannot be read.
        """
        dense = self.dense and self.dense.model_dump(mode="json", exclude={"seeds", "checkpoint"})
        if dense and self.dense and self.dense.checkpoint is not None:
            dense["checkpoint"] = digest(Path(self.dense.checkpoint).expanduser())
        parts: list[Any] = [
            self.model,
            images,
            self.data.size,
            self.compute.model_dump(mode="json"),
            dense,
        ]
        later = {
            "model_options": self.model_options or None,
            "model_sha256": self.model_sha256,
            "augmentation": None if self.data.augmentation == "shift" else "resized-crop",
        }
        if any(later.values()):
            parts.append(later)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
