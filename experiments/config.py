"""TOML configurations, checked whole before any work: names, types, ranges, targets."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    RootModel,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from dpm_core import (
    ConfigurationError,
    Criterion,
    DecayPruningError,
    Exchange,
    Hearing,
    LeastResistant,
    RandomRelease,
    SelfRectifying,
    SmoothPruning,
    Trajectory,
)
from dpm_core.adapters import registry
from dpm_core.adapters.base import Adapter, AdapterError, Training

from .inputs.images import Augmentation
from .inputs.networks import Network, NetworkError, fingerprint
from .inputs.starting import digest
from .names import LARGEST, Name, Text, faults, one_line

LARGEST_IMAGE = 1024
"""Pixels to a side."""


class ConfigError(DecayPruningError, ValueError):
    """A configuration cannot be run. The message names the key and what it may be."""


LATER: tuple[tuple[str, str, Any], ...] = (
    ("dense", "seeds", None),
    ("dense", "checkpoint", None),
    ("smooth", "shape", "linear"),
    ("", "model_options", {}),
    ("", "model_sha256", None),
    ("", "draw_by_seed", False),
    ("data", "augmentation", "shift"),
    ("rectify", "gate", None),
    ("", "latency", {"batches": [1, 128], "onnxruntime": True}),
)
"""Keys that earlier releases did not know: their table, and the value that they have unless given.

Hashes go without those that have it, so that they are the earlier releases'."""


def as_before(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's plain values without the keys of :data:`LATER` that say nothing new."""
    left = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for name, key, default in LATER:
        table = left.get(name) if name else left
        if table and key in table and table[key] == default:
            del table[key]
    return left


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Control = Literal["random", "least-resistant"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class Data(_Table):
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


class Compute(_Table):
    """How the arithmetic is done. Meant for GPUs; a CPU takes the settings, too."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: forward passes of training under autocast; parameters stay float32."""
    compile: bool = False
    """Compile forward and backward passes of training steps with ``torch.compile``."""


class Stage(_Table):
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


def settings_of(kind: type) -> dict[str, Any]:
    """A dataclass's settings with their defaults; ``MISSING`` for one that has none."""
    defaults = {}
    for field in fields(kind):
        if field.init:
            made = field.default_factory
            defaults[field.name] = field.default if made is MISSING else made()
    return defaults


_Kind = TypeVar("_Kind")


def built(kind: type[_Kind], given: Mapping[str, Any], at: str, **built_before: Any) -> _Kind:
    """A dataclass of settings from a table, by the types, limits and defaults that it has itself.

    Args:
        kind: the dataclass.
        given: what the table says.
        at: the table's name.
        built_before: settings that are no plain values.

    Raises:
        ValueError: naming the key.
    """
    known = settings_of(kind)
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{at}.{unknown[0]} is unknown; there are: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    lines = [
        f"{at}.{key}: Field required"
        for key, default in known.items()
        if default is MISSING and key not in {*given, *built_before}
    ]
    for key, value in given.items():
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(kind)[key])
            values[key] = adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as cause:
            lines += described(cause, f"{at}.{key}")
        except (PydanticUserError, NameError) as cause:
            reason = str(cause).splitlines()[0]
            raise ValueError(
                f"{at}: {kind.__name__} has a type that none can be of ({reason})"
            ) from cause
    if lines:
        raise ValueError("; ".join(lines))
    try:
        return kind(**values, **built_before)
    except (DecayPruningError, ValueError) as cause:
        raise ValueError(_of_key(at, str(cause))) from cause


def _of_key(key: str, message: str) -> str:
    """The message of an error under a key; a class of settings is named as the table that it is."""
    last = key.rpartition(".")[2]
    message = re.sub(r"^[A-Z]\w*\.(?=\w+ )", f"{last}.", message)
    if key and message.startswith(f"{last}."):
        return key.removesuffix(last) + message
    return f"{key}: {message}" if key else message


def described(error: ValidationError, prefix: str = "") -> list[str]:
    """What is wrong, a line for each key; ``prefix`` is the table that was checked."""
    lines = []
    for e in error.errors(include_url=False):
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + list(e["loc"]))
        if e["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key"
        else:
            message = e["msg"].removeprefix("Value error, ")
        lines.append(one_line(_of_key(key, message)))
    return lines


CRITERIA: dict[str, type[Criterion]] = {
    "trajectory": Trajectory,
    "hearing": Hearing,
    "exchange": Exchange,
}
"""The core's criteria, as ``[rectify]`` names them."""
DEFAULT = next(n for n, kind in CRITERIA.items() if isinstance(SelfRectifying().criterion, kind))
"""The name of the core's default."""


class Rectify(RootModel[dict[str, Any]]):
    """Self-Rectifying: ``criterion``, its settings and the core's others, in one table.

    Which keys there are, of what types, within what limits and with what defaults, say
    :class:`~dpm_core.SelfRectifying` and the criteria themselves. A key that is ``None`` is not
    given: a configuration that is written down names all of them.
    """

    model_config = ConfigDict(frozen=True)

    root: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _buildable(self) -> Rectify:
        self.build()
        return self

    @model_serializer
    def _whole(self) -> dict[str, Any]:
        own = (key for kind in CRITERIA.values() for key in settings_of(kind))
        shared = {k: v for k, v in settings_of(SelfRectifying).items() if k != "criterion"}
        return {"criterion": DEFAULT, **dict.fromkeys(own), **shared, **self.root}

    def build(self, control: Control | None = None, seed: int = 0) -> SelfRectifying:
        """The core's settings.

        Args:
            control: release as many as the criterion would, but at random or the least resistant.
            seed: of the random control.

        Raises:
            ValueError: a key, a type or a value is wrong. The message names the key.
        """
        given = {key: value for key, value in self.root.items() if value is not None}
        name = given.pop("criterion", DEFAULT)
        if not isinstance(name, str) or name not in CRITERIA:
            *others, last = map(repr, CRITERIA)
            raise ValueError(f"rectify.criterion is {name!r}; give {', '.join(others)} or {last}")
        kind = CRITERIA[name]
        for key in given:
            if any(key in settings_of(k) for k in CRITERIA.values()) and key not in settings_of(
                kind
            ):
                raise ValueError(f"rectify.{key} is no setting of the criterion {name!r}")
        own = {key: given.pop(key) for key in settings_of(kind) if key in given}
        criterion = built(kind, own, "rectify")
        if control == "random":
            criterion = RandomRelease(criterion, seed)
        elif control == "least-resistant":
            criterion = LeastResistant(criterion)
        return built(SelfRectifying, given, "rectify", criterion=criterion)


class Curve(_Table):
    """The accuracy curve around removal, in steps of the stage in which decisions fall."""

    every: Count = 5
    until: Annotated[int, Field(ge=0)] = 100


class Timing(_Table):
    """What is timed of the dense, the masked and the small model in the end."""

    batches: Annotated[list[Annotated[int, Field(ge=1, le=10**6)]], Field(min_length=1)] = [1, 128]
    """Sizes of batches. Tables and plots show the largest, in PyTorch."""
    onnxruntime: bool = True
    """Whether onnxruntime is timed beside PyTorch, where runs are on a CPU."""


class Settings(_Table):
    """What a configuration says, whether or not this machine could run it, as records keep it."""

    name: Name
    framework: str
    model: Text
    """A built-in network's name, or what is imported for it; see :mod:`.inputs.networks`."""
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


def _plain(value: object) -> dict[str, str]:
    """TOML's dates and times, which no key takes, in a form that is refused under their key."""
    return {type(value).__name__: str(value)}


def load(path: Path, *, data: str | None = None, validation: int | None = None) -> Config:
    """Read and check a configuration.

    Args:
        path: a TOML file.
        data: takes the place of the configuration's ``data.name``, and of its label.
        validation: takes the place of the configuration's ``data.validation``.

    Raises:
        ConfigError: the file cannot be read, or a key, a type, a range or a target is wrong.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{path} is not TOML: it is not UTF-8 ({cause.reason})") from cause
    except ValueError as cause:  # of a number with thousands of digits, too
        raise ConfigError(f"{path} is not TOML: {cause}") from cause
    except RecursionError as cause:
        raise ConfigError(f"{path} is nested too deeply to be a configuration") from cause
    table = raw.get("data", {})
    if isinstance(table, dict):
        raw["data"] = table = dict(table)
        if data is not None and table.get("name") != data:
            table.pop("label", None)
            table["name"] = data
        if validation is not None:
            table["validation"] = validation
    if wrong := list(faults(raw)):  # not all of it can be written as JSON
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    _name_file(raw, path)
    try:
        # Strict JSON mode takes lists for tuples and whole numbers for floats, and nothing else.
        return Config.model_validate_json(json.dumps(raw, default=_plain), strict=True)
    except ValidationError as cause:
        raise ConfigError(f"{path}: " + "; ".join(described(cause))) from cause
    except (AdapterError, ConfigurationError, ImportError) as cause:
        raise ConfigError(f"{path}: {cause}") from cause


def _name_file(raw: dict[str, Any], path: Path) -> None:
    """Put the SHA-256 of a network's own file into a configuration, or check the one in it.

    Raises:
        ConfigError: the file cannot be read, or is another one.
    """
    try:
        sha256 = fingerprint(str(raw.get("model", "")))
    except NetworkError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    if sha256 is not None and raw.setdefault("model_sha256", sha256) != sha256:
        raise ConfigError(
            f"{path}: model_sha256: {raw['model'].rpartition(':')[0]} has another one, {sha256}; "
            "put the right file there, or leave model_sha256 out"
        )
