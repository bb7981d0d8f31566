"""One run, one record: one process, or several that torchrun has started."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpm_core.adapters.base import Adapter, count_macs, count_parameters
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import checksum, save_pruned
from dpm_core.errors import first_line

from ..config import Config, ConfigError, Stage
from ..errors import RunError
from ..files import FileError, load_tensors, save_tensors
from ..inputs import data, networks
from ..inputs.images import Images, full_batches
from ..inputs.starting import start_from
from ..names import LAST_SEED, check_text, folder_of
from ..places import alone_in, check, clean
from ..record import (
    CONTROLS,
    MODEL,
    RECORD,
    TRACE,
    VERSION,
    Accuracy,
    Channels,
    Latency,
    Point,
    Record,
    Release,
    Size,
    Steps,
    Structures,
    trace_of,
)
from . import checkpoint, machine
from .finished import FORCED, finished, start_anew, to_be_replaced
from .progress import Bar, Spinner
from .request import CHECKPOINT, DENSE_CHECKPOINT, Request
from .speed import speeds
from .stopping import asked_to_stop
from .training import Loop, Stopped, accuracy, steps


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
        if record_path.exists() and not (request.resume or to_be_replaced(request)):
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
    saved = None if request.force else checkpoint.load(folder / CHECKPOINT, request)

    config.network.find()  # before images are downloaded or decoded
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
            before=lambda classes, training: _check_ahead(request, classes, training),
        ).to(request.device)
    _check_images(request, images, saved)
    _check_batches(config, len(images.train))
    if saved is not None:
        checkpoint.go_on_alike(request, saved)
    model = _build(request, images.channels, images.classes)
    example = images.normalize(images.test[:2])
    networks.require_logits(config.network, model, example, images.classes)
    if saved is None:  # else the run has passed it before
        _adapter(request, images.steps_per_epoch, model, example).check()
    if ranks.first:
        _check_places(request, images, model)
        if request.force:
            start_anew(request)
        if saved is None:  # of a run that does not go on
            (folder / DENSE_CHECKPOINT).unlink(missing_ok=True)
    ranks.wait()

    with asked_to_stop() as asked, Bar(ranks.hidden) as bar:

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

    run_of = request.run_of(images.digest())
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
            "run": run_of,
        },
    )
    p = loop.progress
    save_tensors(folder / TRACE, {"trace": p.trace, "events": p.events}, trace_of(run_of))
    _record(request, images, dense, loop, adapter, example).sealed().save(record_path)
    for name in (DENSE_CHECKPOINT, CHECKPOINT, FORCED):
        (folder / name).unlink(missing_ok=True)
    return record_path


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


def _check_ahead(request: Request, classes: int, training: int) -> None:
    """Refuse what can be known to be wrong before images are decoded, which may take hours.

    Args:
        request: the run.
        classes: their number in a folder of colour images.
        training: how many images there will be to train on.

    Raises:
        ConfigError, NetworkError, CheckpointError, AdapterError: as after the decoding.
    """
    config, size = request.config, request.config.data.size
    _check_batches(config, training)
    model = _build(request, 3, classes)
    draw = torch.Generator().manual_seed(0)
    example = torch.randn(2, 3, size, size, generator=draw).to(request.device)
    networks.require_logits(config.network, model, example, classes)
    if request.ranks.count == 1:  # an adapter may ask the other processes, which are waiting
        _adapter(request, partial(full_batches, training), model, example).check()


def _trained(config: Config) -> dict[str, Stage]:
    """The stages in which there is training, by name: not of a checkpoint that stays as it is."""
    stages = {"dense": config.dense, **config.stages}
    return {name: stage for name, stage in stages.items() if stage is not None and stage.epochs}


def _check_batches(config: Config, training: int) -> None:
    """Refuse batches that are larger than all training images together.

    Raises:
        ConfigError: naming the stage.
    """
    for name, stage in _trained(config).items():
        if stage.batch > training:
            raise ConfigError(
                f"stage {name!r} has batches of {stage.batch}, more than the {training} training "
                "images; give a smaller batch"
            )


def _check_shares(config: Config, processes: int) -> None:
    """Refuse batches that do not split evenly.

    Raises:
        ConfigError: naming the stage.
    """
    for name, stage in _trained(config).items():
        if stage.batch % processes:
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
            record = Record.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # whatever reads the record reports it
        other = record.images
        beside = path.parent != request.folder and record.config_hash == request.config.hash()
        if beside and other not in (None, digest):
            raise RunError(
                f"{path} is of other images than {request.config.data.name} holds now "
                f"({other}, now {digest}), and both would be in one table; put them back, "
                "choose another --out, or delete the old runs"
            )


def _build(request: Request, channels: int, classes: int) -> nn.Module:
    config = request.config
    seed = config.dense_seed(request.seed)
    model = config.network.build(channels, classes, seed)
    if config.dense is not None and config.dense.checkpoint is not None:
        start_from(model, Path(config.dense.checkpoint).expanduser())
    return model.to(request.device)


def _adapter(
    request: Request,
    steps_per_epoch: Callable[[int], int],
    model: nn.Module,
    example: torch.Tensor,
) -> Adapter:
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
        training=config.training(steps_per_epoch),
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
    config, model = request.config, _build(request, images.channels, images.classes)
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
                f"{path} cannot be read ({first_line(cause)}); delete it, and it is trained anew"
            ) from cause
        return model
    # A run that is past its dense model keeps its checkpoint while that is trained anew.
    own, beside = CHECKPOINT, request.folder / DENSE_CHECKPOINT
    if saved is not None and saved["part"] == "framework":
        own, saved = DENSE_CHECKPOINT, checkpoint.load(beside, request)
    loop = Loop(
        model=model,
        images=images,
        seed=seed,
        stages=[("dense", config.dense)] if config.dense.epochs else [],
        adapter=None,
        curve=config.curve,
        compute=config.compute,
        ranks=request.ranks,
        save=lambda loop: checkpoint.save(request, "dense", loop, name=own),
        stop=stop,
        bar=bar,
        after=steps(config.ordered_stages(), images),
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "dense":
        checkpoint.restore(loop, saved)
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
    adapter = _adapter(request, images.steps_per_epoch, model, example)
    adapter.checked = True  # on a model of the same layers, before the dense training
    start = _start(dense)
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
        save=lambda loop: checkpoint.save(request, "framework", loop, dense=start),
        stop=stop,
        bar=bar,
        save_every=request.save_every,
    )
    if saved is not None and saved["part"] == "framework":
        checkpoint.restore(loop, saved)
        if saved.get("masked") is not None:
            loop.masked = copy.deepcopy(dense)
            before = _adapter(request, images.steps_per_epoch, loop.masked, example)
            removed = saved["masked_removed"]
            loop.masked_removed = None if removed is None else Removal(removed)
            before.lay_out(loop.masked_removed)
            loop.masked.load_state_dict(saved["masked"])
    return loop, adapter


def _start(dense: nn.Module) -> str:
    """What tells the weights that a run starts from."""
    return checksum("dense", dense.state_dict())


# ---------------------------------------------------------------------- what a record says


def _record(
    request: Request,
    images: Images,
    dense: nn.Module,
    loop: Loop,
    adapter: Adapter,
    example: torch.Tensor,
) -> Record:
    config, p, model = request.config, loop.progress, loop.model
    at_removal, fresh = p.found["at_removal"], p.found["at_removal_reestimated"]
    decision, zero, removal = p.decided_at, p.zero_at, p.removed_at
    assert at_removal is not None
    assert fresh is not None
    assert decision is not None
    assert zero is not None
    assert removal is not None
    kept = _widths(model)
    timed = speeds(
        {"dense": dense, "masked": loop.masked, "pruned": model}, example[:1], config.latency
    )
    largest = [one for one in timed if one.engine == "torch"][-1]
    return Record(
        version=VERSION,
        config=config.model_dump(mode="json"),
        config_hash=config.hash(),
        framework=config.framework,
        model=config.model,
        data=images.label,
        images=images.digest(),
        variant=request.variant,
        seed=request.seed,
        dense_seed=None if config.dense is None else config.dense_seed(request.seed),
        start=_start(dense),
        versions=machine.versions(config),
        revision=machine.revision(),
        device=machine.device_name(request.device),
        threads=torch.get_num_threads(),
        processes=request.ranks.count,
        accuracy=Accuracy(
            dense=None if config.dense is None else accuracy(dense, images),
            at_removal=at_removal,
            at_removal_reestimated=fresh,
            final=accuracy(model, images),
        ),
        macs=Size(dense=count_macs(dense, example), pruned=count_macs(model, example)),
        parameters=Size(dense=count_parameters(dense), pruned=count_parameters(model)),
        structures=Structures(
            decayed=_count(p.events, "decay", first=True),
            released=_count(p.events, "release"),
            refilled=_count(p.events, "decay", first=False),
            pruned=adapter.pruned,
        ),
        output_difference=p.found["output_difference"],
        channels={name: Channels(width, kept[name]) for name, width in _widths(dense).items()},
        releases=_releases(p.events),
        curve=[Point(step, value) for step, value in p.curve],
        steps=Steps(
            total=p.total,
            decision=decision,
            zero=zero,
            removal=removal,
            heard=p.heard,
            dense=0 if config.dense is None else steps([("dense", config.dense)], images),
        ),
        latency=Latency(**largest.model_dump(exclude={"engine"}, exclude_unset=True)),
        speeds=timed,
        seconds=p.seconds,
        loading=loop.seconds_loading / max(loop.seconds_training, 1e-9),
    )


def _count(events: list[dict[str, Any]], kind: str, first: bool | None = None) -> int:
    """Structures with such an event; of the first wave, of later ones, or of all."""
    return sum(
        len(e["structures"])
        for e in events
        if e["kind"] == kind and (first is None or (e["wave"] == 0) == first)
    )


def _releases(events: list[dict[str, Any]]) -> list[Release]:
    """When and where Self-Rectifying released."""
    start = min((e["step"] for e in events if e["kind"] == "decay"), default=0)
    return [
        Release(e["step"] - start, e["group"], len(e["structures"]))
        for e in events
        if e["kind"] == "release"
    ]


def _widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, layers)}
