"""One run, one record: one process, or several that torchrun has started."""

from __future__ import annotations

import copy
import json
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

import adapters.base
import dpm_core
from adapters.base import Adapter, Context, count_macs, count_parameters
from adapters.saved import SavedModelError, read, save_pruned
from third_party.upstreams import PINS, require

from . import data, models
from .config import Config, ConfigError, Control
from .files import save_json, save_tensors
from .ranks import Ranks
from .training import Loop, Progress, Stopped, accuracy, latency, outputs

Variant = Literal["base", "sp", "sr", "random", "least-resistant"]
VARIANTS: tuple[Variant, ...] = ("base", "sp", "sr")
CONTROLS: tuple[Control, ...] = ("random", "least-resistant")
"""``sr`` with the releases of a control: as many on the same schedule, but other ones."""
RECORD_VERSION = 3
ANEW = "delete it, as --force does, to start anew"  # a comparison knows no --force
CHECKPOINT_VERSION = 4
LATENCY_BATCH = 128
MODEL = "model.safetensors"


def split(variant: Variant) -> tuple[adapters.base.Variant, Control | None]:
    """What an adapter is told of a variant, and the control that chooses the releases."""
    if variant == "random" or variant == "least-resistant":
        return "sr", variant
    return variant, None


class RunError(RuntimeError):
    """A run cannot start or go on. The message says what to do."""


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
        force: throw away what is there and start anew.
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
        kind = "".join(c if c.isalnum() or c in "-_." else "-" for c in data.label or data.name)
        if data.validation is not None:
            kind += f"-validation{data.validation}"
        if self.ranks.count > 1:  # BatchNorm sees other batches, so it is another run
            kind += f"-{self.ranks.count}processes"
        return self.out / self.config.name / kind / f"{self.variant}-seed{self.seed}"


def run(request: Request) -> Path:
    """Carry a run out, from the dense model to the record.

    Returns:
        The path of the record. Beside it lie ``model.safetensors``, the pruned model, and
        ``trace.pt``, the norms of the structures that decayed.

    Raises:
        RunError: the folder holds another run, or there is nothing to resume.
        Stopped: the run was asked to stop; ``resume`` goes on.
        ConfigError, DataError, AdapterError: before any work, with cause and remedy.
        DisagreementError: in every process, where one of them has decided otherwise.
    """
    folder, config, ranks = request.folder, request.config, request.ranks
    _check_shares(config, ranks.count)
    record_path, checkpoint_path = folder / "record.json", folder / "checkpoint.pt"
    if request.force and ranks.first:
        for path in (record_path, checkpoint_path):
            path.unlink(missing_ok=True)
    ranks.wait()
    if finished(request):
        if request.resume:
            checkpoint_path.unlink(missing_ok=True)  # there, if it was killed right before this
            return record_path
        raise RunError(f"{record_path} is there already; --force throws it away and runs anew")
    saved = _checkpoint(checkpoint_path, request)

    torch.use_deterministic_algorithms(True, warn_only=True)
    with ranks.first_alone():  # downloads and decoded images are written once, then read
        images = data.load(
            config.data.name,
            request.data_root,
            size=config.data.size,
            label=config.data.label,
            train=config.data.train,
            validation=config.data.validation,
        ).to(request.device)
    model = _build(request, images)
    example = images.normalize(images.test[:2])
    try:
        outputs(model, example)
    except RuntimeError as cause:
        size = "x".join(map(str, example.shape[1:]))
        raise ConfigError(
            f"{config.model} cannot take images of {size} ({_first_line(cause)}); choose another "
            "model or larger images"
        ) from cause
    _adapter(request, images, model, example).check()

    with _asked_to_stop() as asked:

        def stop() -> bool:
            return ranks.any(asked())

        try:
            dense = _dense_model(request, images, saved, stop)
            loop, adapter = _framework_loop(request, images, dense, example, saved, stop)
            model = loop.model
            loop.run()
        except Stopped:
            ranks.wait()  # until rank 0 has saved: whoever starts processes ends all with the first
            raise
    if not ranks.first:
        return record_path

    p = loop.progress
    kept = _widths(model)
    assert adapter.removed is not None
    save_pruned(
        folder / MODEL,
        model,
        adapter.removed,
        {
            "model": config.model,
            "framework": config.framework,
            "in_channels": images.channels,
            "classes": images.classes,
            "image_size": images.train.shape[2],
        },
    )
    save_tensors(folder / "trace.pt", {"trace": p.trace, "events": p.events})
    save_json(
        record_path,
        {
            "version": RECORD_VERSION,
            "config": config.model_dump(mode="json"),
            "config_hash": config.hash(),
            "framework": config.framework,
            "model": config.model,
            "data": images.label,
            "variant": request.variant,
            "seed": request.seed,
            "dense_seed": None if config.dense is None else config.dense_seed(request.seed),
            "versions": _versions(config),
            "revision": revision(),
            "device": device_name(request.device),
            "threads": torch.get_num_threads(),
            "processes": ranks.count,
            "accuracy": {
                "dense": None if config.dense is None else accuracy(dense, images),
                "at_removal": p.found["at_removal"],
                "at_removal_reestimated": p.found["at_removal_reestimated"],
                "final": accuracy(model, images),
            },
            "macs": {"dense": count_macs(dense, example), "pruned": count_macs(model, example)},
            "parameters": {"dense": count_parameters(dense), "pruned": count_parameters(model)},
            "structures": {
                "decayed": _count(p.events, "decay", first=True),
                "released": _count(p.events, "release"),
                "refilled": _count(p.events, "decay", first=False),
                "pruned": adapter.pruned,
            },
            "output_difference": p.found["output_difference"],
            "channels": {name: [width, kept[name]] for name, width in _widths(dense).items()},
            "releases": _releases(p.events),
            "curve": p.curve,
            "steps": {
                "total": p.total,
                "decision": p.decided_at,
                "zero": p.zero_at,
                "removal": p.removed_at,
                "heard": p.heard,
                "dense": 0
                if config.dense is None
                else config.dense.epochs * images.steps_per_epoch(config.dense.batch),
            },
            "latency": {
                "batch": LATENCY_BATCH,
                **latency(
                    {"dense": dense, "masked": loop.masked, "pruned": model},
                    images.normalize(images.test[:LATENCY_BATCH]),
                ),
            },
            "seconds": p.seconds,
            "loading": loop.seconds_loading / max(loop.seconds_training, 1e-9),
        },
    )
    checkpoint_path.unlink(missing_ok=True)
    return record_path


def finished(request: Request) -> bool:
    """Whether the run's record is there.

    Raises:
        RunError: a record is there, but of another configuration.
    """
    path = request.folder / "record.json"
    if not path.exists():
        return False
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["config_hash"]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunError(f"{path} cannot be read ({cause}); --force runs anew") from cause
    if there != request.config.hash():
        raise RunError(
            f"{path} is of another configuration of this name; --force throws it away, another "
            "--out keeps both"
        )
    return True


def load_model(path: Path) -> tuple[nn.Module, torch.Tensor]:
    """The pruned model of a run, rebuilt from its file alone, in eval mode.

    Args:
        path: a run's ``model.safetensors``.

    Returns:
        The model, and an example of what it takes: random images, (4, C, H, W).

    Raises:
        RunError: the file is not there, damaged, or of another version.
    """
    try:
        saved = read(path)
        facts = saved.facts
        model = models.build(facts["model"], facts["in_channels"], facts["classes"])
        shape = (4, facts["in_channels"], facts["image_size"], facts["image_size"])
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return saved.load_into(model, example).eval(), example
    except OSError as cause:
        raise RunError(f"{path} cannot be read ({cause.strerror})") from cause
    except SavedModelError as cause:
        raise RunError(f"{path}: {cause}") from cause
    except KeyError as cause:
        raise RunError(f"{path} is no model of a run: it does not say its {cause}") from cause


def revision() -> str | None:
    """The checkout's git revision, marked where files differ from it; ``None`` outside of git."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-changed" if changed else head


# ---------------------------------------------------------------------- parts of a run


def _check_shares(config: Config, processes: int) -> None:
    """Refuse batches that do not split evenly.

    Raises:
        ConfigError: naming the stage.
    """
    for name, stage in {"dense": config.dense, **config.stages}.items():
        if stage is not None and stage.batch % processes:
            raise ConfigError(
                f"stage {name!r} has batches of {stage.batch}, which {processes} processes cannot "
                "share evenly; give a multiple, or start another number of processes"
            )


def _build(request: Request, images: data.Images) -> nn.Module:
    config = request.config
    seed = config.dense_seed(request.seed)
    model = models.build(config.model, images.channels, images.classes, seed=seed)
    return model.to(request.device)


def _adapter(
    request: Request, images: data.Images, model: nn.Module, example: torch.Tensor
) -> Adapter:
    config = request.config
    adapter = config.adapter()
    ordered = {name: config.stages[name] for name in adapter.stages if name in config.stages}
    variant, control = split(request.variant)
    context = Context(
        model=model,
        example=example,
        variant=variant,
        smooth=config.build_smooth(),
        rectify=config.rectify.build(control, request.seed),
        stages={n: s.plan(images.steps_per_epoch(s.batch)) for n, s in ordered.items()},
        progress=_Spinner(request.ranks.hidden),
    )
    return adapter(context, config.build_options())


def _dense_model(
    request: Request,
    images: data.Images,
    saved: Mapping[str, Any] | None,
    stop: Callable[[], bool],
) -> nn.Module:
    """The dense model, trained once for all variants, frameworks and seeds that start from it."""
    config, model = request.config, _build(request, images)
    seed = config.dense_seed(request.seed)
    if config.dense is None:
        return model
    name = f"{config.model}-{config.dense_hash(images.digest())}-seed{seed}.pt"
    path = request.out / "dense" / name
    if request.ranks.as_first(path.exists()):  # another run may be writing it just now
        try:
            model.load_state_dict(torch.load(path, weights_only=True, map_location=request.device))
        except Exception as cause:
            raise RunError(f"{path} cannot be read ({_first_line(cause)}); delete it") from cause
        return model
    loop = Loop(
        model=model,
        images=images,
        seed=seed,
        stages=[("dense", config.dense)],
        adapter=None,
        curve=config.curve,
        compute=config.compute,
        ranks=request.ranks,
        save=lambda loop: _save(request, "dense", loop),
        stop=stop,
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "dense":
        _restore(loop, saved)
    loop.run()
    if request.ranks.first:
        save_tensors(path, model.state_dict())
    return model


def _framework_loop(
    request: Request,
    images: data.Images,
    dense: nn.Module,
    example: torch.Tensor,
    saved: Mapping[str, Any] | None,
    stop: Callable[[], bool],
) -> tuple[Loop, Adapter]:
    """The framework's stages on a copy of the dense model, from the start or a checkpoint."""
    config, model = request.config, copy.deepcopy(dense)
    adapter = _adapter(request, images, model, example)
    loop = Loop(
        model=model,
        images=images,
        seed=request.seed,
        stages=[(name, config.stages[name]) for name in adapter.context.stages],
        adapter=adapter,
        curve=config.curve,
        compute=config.compute,
        ranks=request.ranks,
        save=lambda loop: _save(request, "framework", loop),
        stop=stop,
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "framework":
        _restore(loop, saved)
        if saved.get("masked") is not None:
            loop.masked = copy.deepcopy(dense)
            before = _adapter(request, images, loop.masked, example)
            loop.masked_removed = saved["masked_removed"]
            before.restore_model({**saved["adapter"], "removed": loop.masked_removed})
            loop.masked.load_state_dict(saved["masked"])
    return loop, adapter


def _save(request: Request, part: str, loop: Loop) -> None:
    if not request.ranks.first:
        return
    assert loop.optimizer is not None
    save_tensors(
        request.folder / "checkpoint.pt",
        {
            "version": CHECKPOINT_VERSION,
            "run": _identity(request),
            "part": part,
            "progress": asdict(loop.progress),
            "model": loop.model.state_dict(),
            "masked": loop.masked.state_dict() if loop.masked is not None else None,
            "masked_removed": loop.masked_removed,
            "optimizer": loop.optimizer.state_dict(),
            "adapter": loop.adapter.state_dict() if loop.adapter is not None else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    )


def _restore(loop: Loop, saved: Mapping[str, Any]) -> None:
    """Put a loop where :func:`_save` left it."""
    loop.progress = Progress(**saved["progress"])
    name, _ = loop.stages[loop.progress.stage]
    adapter, state = loop.adapter, saved["adapter"]
    if adapter is not None:
        adapter.restore_model(state)
        loop.lay_out()
    loop.model.load_state_dict(saved["model"])
    loop.optimizer = loop.new_optimizer()
    loop.optimizer.load_state_dict(saved["optimizer"])
    if adapter is not None:
        adapter.load_state_dict(state, name, loop.optimizer, loop.next_loss)
    torch.set_rng_state(saved["random"].cpu())
    if saved["random_cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in saved["random_cuda"]])


def _checkpoint(path: Path, request: Request) -> Mapping[str, Any] | None:
    """The checkpoint to go on from, if there is one and it is this run's."""
    if not path.exists():
        return None
    if not request.resume:
        raise RunError(f"a stopped run is in {path.parent}; --resume goes on, --force starts anew")
    try:
        saved: Mapping[str, Any] = torch.load(path, weights_only=True, map_location=request.device)
        identity, version = {"processes": 1, **saved["run"]}, saved["version"]
    except Exception as cause:
        raise RunError(f"{path} cannot be read ({_first_line(cause)}); {ANEW}") from cause
    if version != CHECKPOINT_VERSION:
        raise RunError(f"{path} was written by another release; {ANEW}")
    if identity != _identity(request):
        raise RunError(f"{path} is of another run ({identity}, here {_identity(request)}); {ANEW}")
    return saved


def _identity(request: Request) -> dict[str, Any]:
    return {
        "config": request.config.hash(),
        "variant": request.variant,
        "seed": request.seed,
        "device": request.device.type,
        "processes": request.ranks.count,
    }


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Take an interrupt or a termination as a request: the step ends, a checkpoint is written."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        for kind in previous:  # a second signal stops at once
            signal.signal(kind, signal.SIG_DFL)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGINT, signal.SIGTERM):
            previous[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


class _Spinner:
    """Progress of work between training steps, shown on a terminal only.

    Args:
        hidden: tqdm's ``disable``.
    """

    def __init__(self, hidden: bool | None) -> None:
        self._hidden = hidden
        self._bar: Any = None

    def __call__(self, what: str) -> None:
        if self._bar is None:
            self._bar = tqdm(bar_format="{desc} [{elapsed}]", disable=self._hidden, leave=False)
        self._bar.set_description_str(what)


# ---------------------------------------------------------------------- what a record says


def _count(events: list[dict[str, Any]], kind: str, first: bool | None = None) -> int:
    """Structures with such an event; of the first wave, of later ones, or of all."""
    return sum(
        len(e["structures"])
        for e in events
        if e["kind"] == kind and (first is None or (e["wave"] == 0) == first)
    )


def _releases(events: list[dict[str, Any]]) -> list[tuple[int, str, int]]:
    """When and where Self-Rectifying released: (steps since the first decay, group, how many)."""
    start = min((e["step"] for e in events if e["kind"] == "decay"), default=0)
    return [
        (e["step"] - start, e["group"], len(e["structures"]))
        for e in events
        if e["kind"] == "release"
    ]


def _widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, layers)}


def _versions(config: Config) -> dict[str, str]:
    upstream = {name: require(name) for name in PINS if config.framework in PINS[name]["adapters"]}
    return {
        "decay-pruning": dpm_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **upstream,
    }


def _first_line(cause: Exception) -> str:
    """What went wrong, without the advice that PyTorch adds over many lines."""
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def device_name(device: torch.device) -> str:
    """The processor that runs, or would run, on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{named[0]}, {len(named)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
