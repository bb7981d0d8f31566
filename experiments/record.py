"""What a run leaves as its record: one class writes it, reads it and says what is in it.

A record is JSON. Records of earlier releases lack some keys: what is read is written again as it
was, key by key and digit by digit.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .config import Control, Settings
from .files import save_text, vouched, vouches
from .names import Seed, Text, one_line
from .refusals import described

Variant = Literal["base", "sp", "sr", "random", "least-resistant"]
Timed = Literal["dense", "masked", "pruned"]
"""The models whose passes are timed."""
VARIANTS: tuple[Variant, ...] = ("base", "sp", "sr")
CONTROLS: tuple[Control, ...] = ("random", "least-resistant")
"""``sr`` with the releases of a control: as many on the same schedule, but other ones."""
ORDER: tuple[Variant, ...] = VARIANTS + CONTROLS
"""The order of tables and kept records."""
VERSION: Final = 3
RECORD, MODEL, TRACE = "record.json", "model.safetensors", "trace.pt"
"""The files of a run: this, the pruned model, and the norms of what decayed."""


class RecordError(ValueError):
    """A text is no record. The message says why, in one line, without the file's name."""


class RecordVersionError(RecordError):
    """A record is of another release. The message says of which version."""


# Beyond these bounds sums overflow, and pictures are too large to be drawn. A whole number stays
# one, so that what was read is written as it was.
Number = Annotated[int, Field(ge=0, le=10**15)]
Whole = Annotated[int, Field(ge=1, le=10**15)]
Width = Annotated[int, Field(ge=0, le=10**9)]
Amount = Annotated[int | float, Field(ge=0, le=1e15)]
Duration = Annotated[int | float, Field(gt=0, le=1e15)]
Percent = Annotated[int | float, Field(ge=0, le=100)]
MOST_LAYERS = 1000


class Part(BaseModel):
    """A part of a record: its keys and no others, of these types and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Accuracy(Part):
    """Top-1, in percent; ``dense`` is ``None`` where a run starts untrained."""

    dense: Percent | None
    at_removal: Percent
    at_removal_reestimated: Percent
    """With BatchNorm's statistics taken anew."""
    final: Percent


class Size(Part):
    """MACs of one image, or parameters."""

    dense: Whole
    pruned: Number

    @property
    def left(self) -> float:
        """What is left, in percent of the dense network's."""
        return 100 * self.pruned / self.dense


class Structures(Part):
    """How many decayed in the first wave, were released, decayed in place of those, were pruned."""

    decayed: Number
    released: Number
    refilled: Number
    pruned: Number


class Steps(Part):
    """Training steps: in all, until the decision, until all that goes is zero, until the removal.

    ``heard``: batches of hearings, which count as steps. ``dense``: of the dense training.
    """

    total: Number
    decision: Number
    zero: Number
    removal: Number
    heard: Number
    dense: Number


class Latency(Part):
    """Median milliseconds of a forward pass, measured side by side.

    ``masked``: the model right before the removal, with its structures at zero; earlier releases
    did not measure it.
    """

    batch: Whole
    dense: Duration
    masked: Duration | None = None
    pruned: Duration


class Speed(Part):
    """Median milliseconds of a forward pass of a batch, measured side by side, in one engine."""

    engine: Literal["torch", "onnxruntime"]
    batch: Whole
    dense: Duration
    masked: Duration | None = None
    pruned: Duration

    @property
    def gain(self) -> float:
        """How many times faster than the dense model the small one is."""
        return self.dense / self.pruned


class Channels(NamedTuple):
    """Output channels of one layer."""

    dense: Width
    kept: Width


class Release(NamedTuple):
    """So many structures of a group that Self-Rectifying released at once."""

    step: Number
    """Since the first decay."""
    group: Text
    structures: Number


class Point(NamedTuple):
    """A point of the accuracy curve."""

    step: Number
    """Since the decision."""
    accuracy: Percent


class Record(Part):
    """One finished run."""

    version: Literal[3] = VERSION
    config: dict[str, Any]
    """The configuration as the run's release wrote it; :attr:`settings` reads it."""
    config_hash: Text
    framework: Text
    model: Text
    data: Text
    """What tables call the images."""
    images: Text | None = None
    """A hash of the images; not in records of earlier releases."""
    variant: Variant
    seed: Seed
    dense_seed: Seed | None = None
    """Of the dense network; ``None`` without one. Earlier releases do not say it: every seed had
    its own."""
    start: Text | None = None
    """SHA-256 of the weights that the run started from: the dense network's, or initial ones. Not
    in records of earlier releases."""
    versions: dict[Text, Text]
    revision: Text | None
    """Of the checkout, in git."""
    device: Text
    threads: Whole
    processes: Whole = 1
    """Earlier releases do not say it, and had one."""
    accuracy: Accuracy
    macs: Size
    parameters: Size
    structures: Structures
    output_difference: int | float | None
    """The largest, between the model before and after the removal."""
    channels: Annotated[dict[Text, Channels], Field(min_length=1, max_length=MOST_LAYERS)]
    """By layer: convolutions and linear layers."""
    releases: Annotated[list[Release], Field(max_length=10**6)]
    curve: Annotated[list[Point], Field(min_length=1, max_length=10**6)]
    """Accuracy around the removal."""
    steps: Steps
    latency: Latency
    speeds: Annotated[list[Speed], Field(max_length=1000)] | None = None
    """By engine and batch; ``latency`` is PyTorch's of the largest. Not in records of earlier
    releases."""
    seconds: Amount
    """Of the framework's stages."""
    loading: Amount
    """Seconds of making batches, as a share of the seconds of training."""
    sha256: Text | None = None
    """Of all else, see :func:`experiments.files.vouched`; not in records of earlier releases. A
    record has both this and ``images``, or neither: so none can lose only one of them."""

    @field_validator("config")
    @classmethod
    def _known(cls, config: dict[str, Any]) -> dict[str, Any]:
        Settings.model_validate_json(json.dumps(config), strict=True)
        return config

    @model_validator(mode="after")
    def _drawable(self) -> Record:
        if len({release.group for release in self.releases}) > MOST_LAYERS:
            raise ValueError(f"releases: more than {MOST_LAYERS} groups")
        return self

    @cached_property
    def settings(self) -> Settings:
        """The configuration, with this release's defaults for what its own did not know."""
        return Settings.model_validate_json(json.dumps(self.config), strict=True)

    @property
    def name(self) -> str:
        """The configuration's."""
        return self.settings.name

    @property
    def network(self) -> int:
        """The seed of the dense network that the run started from, or of its initial weights."""
        return self.seed if self.dense_seed is None else self.dense_seed

    @property
    def run(self) -> dict[str, Any]:
        """What the model and the trace beside the record have to name as their run."""
        return run_of(self.config_hash, self.variant, self.seed, self.images)

    def milliseconds(self, of: Timed) -> float | None:
        """A model's ``latency``, ``None`` where there is none.

        None of the dense model in records without ``speeds``: it was measured in the slower of two
        layouts there, unless its run had trained it, which the record does not say.
        """
        if of == "dense" and self.speeds is None:
            return None
        value: float | None = getattr(self.latency, of)
        return value

    def kept_promise(self, speed: Speed) -> float:
        """What share of the saving in MACs arrives as a saving of time."""
        return speed.gain * self.macs.pruned / self.macs.dense

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read a record.

        Raises:
            RecordError: it is none, was changed since it was written, or is of another version.
        """
        try:
            content = json.loads(text, parse_float=_finite, parse_constant=_finite)
            version = content["version"]
            if version != VERSION:
                raise RecordVersionError(f"has version {version!r}, this release reads {VERSION}")
            record = cls.model_validate_json(text)
        except RecordVersionError:
            raise
        except ValidationError as cause:
            raise RecordError(described(cause)[0]) from cause
        except KeyError as cause:
            raise RecordError(f"it has no {cause}") from cause
        except RecursionError as cause:
            raise RecordError("it is nested too deeply") from cause
        except (ValueError, TypeError) as cause:
            raise RecordError(one_line(str(cause))) from cause
        if record.model_fields_set & {"images", "sha256"} and not vouches(record.content()):
            raise RecordError("its checksum is another one: it was changed")
        return record

    def content(self) -> dict[str, Any]:
        """Plain values, as JSON has them: those that were given or read, and no defaults."""
        return self.model_dump(mode="json", exclude_unset=True)

    def sealed(self) -> Record:
        """This record with the checksum of all else in it."""
        rest = {key: value for key, value in self.content().items() if key != "sha256"}
        return self.model_copy(update={"sha256": vouched(rest)["sha256"]})

    def line(self) -> str:
        """The record as one line of JSON, as kept records are written."""
        return json.dumps(self.content(), separators=(",", ":"), allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the record into a file of its own, atomically."""
        save_text(path, json.dumps(self.content(), indent=1, allow_nan=False) + "\n")


def run_of(config_hash: str, variant: str, seed: int, images: str | None) -> dict[str, Any]:
    """What a run's model and trace name as their run, in JSON's values."""
    return {"config_hash": config_hash, "variant": variant, "seed": seed, "images": images}


def trace_of(run: dict[str, Any]) -> dict[str, Any]:
    """What a run's ``trace.pt`` names as its content."""
    return {"kind": "trace", "run": run}


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
