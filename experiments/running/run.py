"""One run, one record: one process, or several that torchrun has started."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

import dpm_core
from dpm_core.adapters.base import Adapter, count_macs, count_parameters
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import (
    DamagedError,
    checksum,
    read,
    save_pruned,
)
from dpm_core.third_party.upstreams import PINS, require

from ..config import Config, ConfigError, Control
from ..errors import RunError
from ..files import FileError, load_tensors, save_json, save_tensors, save_text, vouches
from ..inputs import data, networks
from ..inputs.images import Images
from ..inputs.starting import start_from
from ..names import LAST_SEED, check_text, folder_of
from ..places import alone_in, check, clean
from .progress import Bar, Spinner
from .ranks import Ranks
from .training import Loop, Progress, Stopped, accuracy, latency, steps

Variant = Literal["base", "sp", "sr", "random", "least-resistant"]
VARIANTS: tuple[Variant, ...] = ("base", "sp", "sr")
CONTROLS: tuple[Control, ...] = ("random", "least-resistant")
"""``sr`` with the releases of a control: as many on the same schedule, but other ones."""
RECORD_VERSION = 3
ANEW = "delete it to start anew"  # not --force: a comparison resumes, and knows none
CHECKPOINT_VERSION = 6
CHECKPOINT, DENSE_CHECKPOINT = "checkpoint.pt", "dense-checkpoint.pt"
"""A run's own, and one for its dense model, if that is lost later and has to be trained anew."""
LATENCY_BATCH = 128
MODEL, TRACE, RECORD = "model.safetensors", "trace.pt", "record.json"
FORCED = ".forced"
"""A file that names the record which a forced run is to replace; the record stays until then."""
ASKING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)  # not all are on Windows
]
"""Signals that ask to save and stop. A run that was started to outlive its terminal goes on."""


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


def run(request: Request) -> Path:
    """Carry a run out, from the dense model to the record.

    Returns:
        The path of the record. Beside it lie ``model.safetensors``, the pruned model, and
        ``trace.pt``, the norms of the structures that decayed.

    Raises:
        RunError: another run is in the folder, or one that takes ``resume`` or ``force``.
        BusyError: another process carries this run out.
        Stopped: the run was asked to stop; ``resume`` goes on, with as many threads.
        DivergedError: training left the finite numbers; there is no record of such a network.
        ConfigError, DataError, AdapterError: before any work, with cause and remedy.
        OSError: a file or folder cannot be written; before any work, if that can be known then.
        DisagreementError: in every process, where one of them has decided otherwise.
    """
    _check_seed(request)
    _check_shares(request.config, request.ranks.count)
    if _there(request):
        return request.folder / RECORD
    with alone_in(request.folder) if request.ranks.first else nullcontext():
        # Another process may have finished it just now.
        if request.ranks.as_first(request.ranks.first and _there(request)):
            return request.folder / RECORD
        return _carry_out(request)


def _there(request: Request) -> bool:
    """Whether the run is finished, and its record is what was asked for.

    Raises:
        RunError: it is finished, or its model is gone, and neither ``resume`` nor ``force`` says
            what to do with the record; or the record is of another run.
    """
    record_path = request.folder / RECORD
    if request.force:
        return False
    if not finished(request):
        if record_path.exists() and not (request.resume or _to_be_replaced(request)):
            raise RunError(
                f"{record_path} is there, but its {MODEL} is gone or damaged; --resume makes both "
                "anew"
            )
        return False
    if not request.resume:
        raise RunError(f"{record_path} is there already; --force replaces it by a new run's")
    if request.ranks.first:  # they are there if it was killed right before this
        for name in (DENSE_CHECKPOINT, CHECKPOINT, FORCED):
            (request.folder / name).unlink(missing_ok=True)
    return True


def _carry_out(request: Request) -> Path:
    folder, config, ranks = request.folder, request.config, request.ranks
    record_path = folder / RECORD
    saved = None if request.force else _checkpoint(folder / CHECKPOINT, request)

    config.network.find()  # before images are decoded, which may take hours
    torch.use_deterministic_algorithms(True, warn_only=True)
    # What is read before it is written would show as NaN, at the price of writing all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with ranks.first_alone():  # downloads and decoded images are written once, then read
        images = data.load(
            config.data.name,
            request.data_root,
            size=config.data.size,
            label=config.data.label,
            train=config.data.train,
            validation=config.data.validation,
            augmentation=config.data.augmentation,
        ).to(request.device)
    _check_images(request, images, saved)
    if saved is not None:
        _go_on_alike(request, saved)
    model = _build(request, images)
    example = images.normalize(images.test[:2])
    networks.require_logits(config.network, model, example, images.classes)
    if saved is None:  # else the run has passed it before
        _adapter(request, images, model, example).check()
    if config.dense is not None:
        images.steps_per_epoch(config.dense.batch)
    if ranks.first:
        _check_places(request, images, model)
        if request.force:
            _start_anew(request)
        if saved is None:  # of a run that does not go on
            (folder / DENSE_CHECKPOINT).unlink(missing_ok=True)
    ranks.wait()

    with _asked_to_stop() as asked, Bar(ranks.hidden) as bar:

        def stop() -> bool:
            return ranks.any(asked())

        try:
            dense = _dense_model(request, images, saved, stop, bar)
            loop, adapter = _framework_loop(request, images, dense, example, saved, stop, bar)
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
            **config.network.facts(),
            "framework": config.framework,
            "in_channels": images.channels,
            "classes": images.classes,
            "image_size": images.size[0],
            "run": _run_of(request, images),
        },
    )
    of = trace_of(_run_of(request, images))
    save_tensors(folder / TRACE, {"trace": p.trace, "events": p.events}, of)
    save_json(
        record_path,
        {
            "version": RECORD_VERSION,
            "config": config.model_dump(mode="json"),
            "config_hash": config.hash(),
            "framework": config.framework,
            "model": config.model,
            "data": images.label,
            "images": images.digest(),
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
                "dense": 0 if config.dense is None else steps([("dense", config.dense)], images),
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
        vouch=True,
    )
    for name in (DENSE_CHECKPOINT, CHECKPOINT, FORCED):
        (folder / name).unlink(missing_ok=True)
    return record_path


def finished(request: Request) -> bool:
    """Whether record and model of the run are there, and no forced run is to replace them.

    Raises:
        RunError: a record is there, but damaged or of another run or configuration.
        VersionError: the model was saved by a later release.
    """
    path = request.folder / RECORD
    if not path.exists() or _to_be_replaced(request):
        return False
    # A comparison resumes, and knows no --force.
    anew = f"delete {path.parent}" if request.resume else "--force runs anew"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        there = record["config_hash"], record["variant"], record["seed"]
        if not sound(record):
            raise ValueError("its checksum is another one")
    except IsADirectoryError as cause:
        raise RunError(f"{path} is a folder, and in the way; move it") from cause
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise RunError(f"{path} cannot be read ({cause}); {anew}") from cause
    if there[0] != request.config.hash():
        raise RunError(
            f"{path} is of another configuration of this name; {anew}, or keep both by another "
            "--out"
        )
    if there[1:] != (request.variant, request.seed):
        raise RunError(f"{path} is of {there[1]}, seed {there[2]}; put it back where it belongs")
    try:
        run_of = read(request.folder / MODEL).facts.get("run")
    except (OSError, DamagedError):
        return False
    if run_of is not None and run_of != run_of_record(record):
        raise RunError(
            f"{request.folder / MODEL} is of another run than {path.name} beside it ({run_of}); "
            f"put both back where they belong, or {anew}"
        )
    return True


def sound(record: Mapping[str, Any]) -> bool:
    """Whether a record is as it was written; in records of earlier releases it cannot be checked.

    A record has both ``images`` and a checksum, or neither: so none can lose only one of them.
    """
    if "images" not in record and "sha256" not in record:
        return True
    return "images" in record and vouches(record)


def run_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The run that the model and the trace beside a record have to name as theirs."""
    names = ("config_hash", "variant", "seed", "images")
    return {name: record.get(name) for name in names}


def trace_of(run_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's ``trace.pt`` names as its content."""
    return {"kind": "trace", "run": dict(run_of)}


def _replaces(request: Request) -> str:
    """The content of :data:`FORCED` while the request's run is to replace the present record."""
    path = request.folder / RECORD
    content = path.read_bytes() if path.is_file() else b""
    return f"{hashlib.sha256(content).hexdigest()} {request.config.hash()}\n"


def _to_be_replaced(request: Request) -> bool:
    try:
        content = (request.folder / FORCED).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return content == _replaces(request)


def _start_anew(request: Request) -> None:
    """Note that the old record is to be replaced, and remove the old checkpoint."""
    if (request.folder / RECORD).exists():
        save_text(request.folder / FORCED, _replaces(request))
    (request.folder / CHECKPOINT).unlink(missing_ok=True)


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


def _check_seed(request: Request) -> None:
    if not 0 <= request.seed <= LAST_SEED:
        raise RunError(f"the seed is {request.seed}; give 0 to {LAST_SEED}")


def _check_places(request: Request, images: Images, model: nn.Module) -> None:
    """Refuse what would otherwise fail only after the training.

    Raises:
        ConfigError: the images' label cannot be shown.
        OSError: a folder cannot take what is to be written.
    """
    try:
        check_text(images.label)
    except ValueError as cause:
        raise ConfigError(f"data.label: {cause}; give another label") from cause
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # A checkpoint: the model, masked and not, with its optimizer's state, beside the one before.
    names = (RECORD, CHECKPOINT, DENSE_CHECKPOINT, MODEL, TRACE, FORCED)
    needed = 6 * size
    if request.config.dense is not None:
        dense = _dense_path(request, images)
        clean(dense.parent)
        check(dense.parent, [dense.name])
        needed += 0 if dense.exists() else size
    check(request.folder, names, needed)


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


def _check_images(request: Request, images: Images, saved: Mapping[str, Any] | None) -> None:
    """Refuse images that are not those of the run's beginning, or not those of the runs beside it.

    Raises:
        RunError: naming the run, or the record, that is of other images.
    """
    digest = images.digest()
    if saved is not None and saved["images"] != digest:
        raise RunError(
            f"{request.folder} was started on images that are no longer those of "
            f"{request.config.data.name} ({saved['images']}, now {digest}); put them back, or "
            f"delete {request.folder / CHECKPOINT} to start anew"
        )
    for path in sorted(request.folder.parent.glob("*/record.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            other, of = record.get("images"), record["config_hash"]
        except (OSError, ValueError, AttributeError, KeyError, RecursionError):
            continue  # whatever reads the record reports it
        beside = path.parent != request.folder and of == request.config.hash()
        if beside and other not in (None, digest):
            raise RunError(
                f"{path} is of other images than {request.config.data.name} holds now "
                f"({other}, now {digest}), and both would be in one table; put them back, "
                "choose another --out, or delete the old runs"
            )


def _run_of(request: Request, images: Images) -> dict[str, Any]:
    return {
        "config_hash": request.config.hash(),
        "variant": request.variant,
        "seed": request.seed,
        "images": images.digest(),
    }


def _build(request: Request, images: Images) -> nn.Module:
    config = request.config
    seed = config.dense_seed(request.seed)
    model = config.network.build(images.channels, images.classes, seed)
    if config.dense is not None and config.dense.checkpoint is not None:
        start_from(model, Path(config.dense.checkpoint).expanduser())
    return model.to(request.device)


def _adapter(request: Request, images: Images, model: nn.Module, example: torch.Tensor) -> Adapter:
    config = request.config
    variant = request.variant
    control = variant if variant in CONTROLS else None
    rectify = config.rectify.build(control, request.seed)
    return config.adapter()(
        model,
        example,
        config.build_options(),
        None if variant == "base" else config.smooth,
        None if variant in ("base", "sp") else rectify,
        training=config.training(images.steps_per_epoch),
        seed=request.seed if config.draw_by_seed else 0,
        progress=Spinner(request.ranks.hidden),
    )


def _dense_path(request: Request, images: Images) -> Path:
    config = request.config
    seed = config.dense_seed(request.seed)
    start = config.dense_hash(images.training_digest())
    name = f"{folder_of(config.model)}-{start}-seed{seed}.pt"
    return request.out / "dense" / name


def _dense_model(
    request: Request,
    images: Images,
    saved: Mapping[str, Any] | None,
    stop: Callable[[], bool],
    bar: Bar,
) -> nn.Module:
    """The dense model, trained once for all variants, frameworks and seeds that start from it."""
    config, model = request.config, _build(request, images)
    seed = config.dense_seed(request.seed)
    if config.dense is None:
        return model
    path = _dense_path(request, images)
    of = {"kind": "dense model", "name": path.name}
    if request.ranks.as_first(path.exists()):  # another run may be writing it just now
        try:
            model.load_state_dict(load_tensors(path, of, request.device))
        except (FileError, RuntimeError) as cause:
            raise RunError(
                f"{path} cannot be read ({_first_line(cause)}); delete it, and it is trained anew"
            ) from cause
        return model
    # A run that is past its dense model keeps its checkpoint while that is trained anew.
    own, beside = CHECKPOINT, request.folder / DENSE_CHECKPOINT
    if saved is not None and saved["part"] == "framework":
        own, saved = DENSE_CHECKPOINT, _checkpoint(beside, request)
    loop = Loop(
        model=model,
        images=images,
        seed=seed,
        stages=[("dense", config.dense)] if config.dense.epochs else [],
        adapter=None,
        curve=config.curve,
        compute=config.compute,
        ranks=request.ranks,
        save=lambda loop: _save(request, "dense", loop, name=own),
        stop=stop,
        bar=bar,
        after=steps(config.ordered_stages(), images),
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "dense":
        _restore(loop, saved)
    loop.run()
    if request.ranks.first:
        save_tensors(path, model.state_dict(), of)
        beside.unlink(missing_ok=True)
    return model


def _framework_loop(
    request: Request,
    images: Images,
    dense: nn.Module,
    example: torch.Tensor,
    saved: Mapping[str, Any] | None,
    stop: Callable[[], bool],
    bar: Bar,
) -> tuple[Loop, Adapter]:
    """The framework's stages on a copy of the dense model, from the start or a checkpoint."""
    config, model = request.config, copy.deepcopy(dense)
    adapter = _adapter(request, images, model, example)
    adapter.checked = True  # on a model of the same layers, before the dense training
    start = checksum("dense", dense.state_dict())
    if saved is not None and saved["part"] == "framework" and saved["dense"] != start:
        raise RunError(
            f"{request.folder} was started from another dense model than the one in "
            f"{request.out / 'dense'}, which was trained anew or replaced; put the old one back, "
            f"or delete {request.folder / CHECKPOINT} to start anew"
        )
    loop = Loop(
        model=model,
        images=images,
        seed=request.seed,
        stages=config.ordered_stages(),
        adapter=adapter,
        curve=config.curve,
        compute=config.compute,
        ranks=request.ranks,
        save=lambda loop: _save(request, "framework", loop, dense=start),
        stop=stop,
        bar=bar,
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "framework":
        _restore(loop, saved)
        if saved.get("masked") is not None:
            loop.masked = copy.deepcopy(dense)
            before = _adapter(request, images, loop.masked, example)
            removed = saved["masked_removed"]
            loop.masked_removed = None if removed is None else Removal(removed)
            before.lay_out(loop.masked_removed)
            loop.masked.load_state_dict(saved["masked"])
    return loop, adapter


def _save(
    request: Request, part: str, loop: Loop, *, name: str = CHECKPOINT, dense: str | None = None
) -> None:
    """Write a checkpoint; ``dense`` names the dense model that the framework started from."""
    if not request.ranks.first:
        return
    assert loop.optimizer is not None
    save_tensors(
        request.folder / name,
        {
            "version": CHECKPOINT_VERSION,
            "run": _identity(request),
            "images": loop.images.digest(),
            "threads": torch.get_num_threads(),
            "made_with": _computed_with(request),
            "dense": dense,
            "part": part,
            "progress": asdict(loop.progress),
            "model": loop.model.state_dict(),
            "masked": loop.masked.state_dict() if loop.masked is not None else None,
            "masked_removed": None if loop.masked_removed is None else list(loop.masked_removed),
            "optimizer": loop.optimizer.state_dict(),
            "adapter": loop.adapter.state_dict() if loop.adapter is not None else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        {"kind": "checkpoint"},
    )


def _computed_with(request: Request) -> dict[str, str]:
    return {"torch": str(torch.__version__), "device": device_name(request.device)}


def _go_on_alike(request: Request, saved: Mapping[str, Any]) -> None:
    """Set what rounding depends on as in a checkpoint, and print what cannot be set."""
    lines = []
    if saved["threads"] != torch.get_num_threads():  # sums are split among threads
        torch.set_num_threads(saved["threads"])
        lines.append(f"going on with --threads {saved['threads']}, as the run was started")
    for name, now in _computed_with(request).items():
        if (before := saved["made_with"][name]) != now:
            started = f"the run was started with {name} {before!r}"
            lines.append(f"{started}: with {now!r} bits may differ")
    if request.ranks.first:
        for line in lines:
            tqdm.write(line, sys.stderr)


def _restore(loop: Loop, saved: Mapping[str, Any]) -> None:
    """Bring a loop to the point where :func:`_save` saved it."""
    loop.progress = Progress(**saved["progress"])
    adapter = loop.adapter
    if adapter is not None:
        adapter.load_state_dict(saved["adapter"])
        loop.lay_out()
    loop.model.load_state_dict(saved["model"])
    loop.optimizer = loop.new_optimizer()
    loop.optimizer.load_state_dict(saved["optimizer"])
    if adapter is not None:
        adapter.attach(loop.optimizer, loop.next_loss)
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
        saved: Mapping[str, Any] = load_tensors(path, {"kind": "checkpoint"}, request.device)
        identity, version = saved["run"], saved["version"]
    except (FileError, KeyError, TypeError) as cause:
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
        for kind in ASKING:
            left_alone = kind not in (signal.SIGINT, signal.SIGTERM)
            if not (left_alone and signal.getsignal(kind) == signal.SIG_IGN):
                previous[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


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
        **networks.version(config.network),
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
