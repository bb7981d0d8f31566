"""The decay of one group, by the core and by torch-kirigami: the same norms, in which time?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from dpm_core import DecayPruningError, StructureGroup

from .arms import Settings
from .timing import Figure, figure, interleave

KIRIGAMI_FIGURES = ("decay_kirigami_ms", "decay_speed_up", "decay_norm_difference")
TARGET = 300.0
"""How many times faster than torch-kirigami the core is to be, at least."""


class OverheadError(DecayPruningError, RuntimeError):
    """The benchmark would compare unlike things. The message says which."""


def decay_of_one_group(settings: Settings) -> tuple[StructureGroup, dict[str, Figure | None]]:
    """Set all structures of the largest group to new norms, by the core and by torch-kirigami.

    Raises:
        OverheadError: the two leave different norms.
    """
    (_, groups), (their_model, their_groups) = settings.build(), settings.build()
    group, their_group = (max(some, key=lambda g: g.size) for some in (groups, their_groups))
    targets = 0.9 * group.norms()

    def core() -> None:
        group.scale_(targets / group.norms())

    title = f"{settings.model}: decay of one group"
    times = interleave([{"core": core}], 10 * settings.repeats, settings.device, title)["core"]
    figures: dict[str, Figure | None] = {"decay_core_ms": figure(times)}
    example = settings.images()[:2]
    kirigami = kirigami_decay(their_model, their_group, example, targets.tolist())
    if kirigami is None:
        return group, figures | dict.fromkeys(KIRIGAMI_FIGURES)
    kirigami()
    difference = float((group.norms() / their_group.norms() - 1).abs().max())
    if not difference <= 1e-5:
        raise OverheadError(
            f"the core and torch-kirigami leave norms that differ by {difference:.1e} of their "
            f"size in group {group.name!r} of {settings.model}; their times do not compare"
        )
    # Hundreds of times slower, so fewer calls have to do.
    repeats = max(2, settings.repeats // 4)
    theirs_ms = interleave([{"kirigami": kirigami}], repeats, settings.device, title)["kirigami"]
    core_ms = statistics.median(times)
    compared = (
        figure(theirs_ms),
        figure([ms / core_ms for ms in theirs_ms], TARGET, sign=-1),
        figure([difference]),
    )
    return group, figures | dict(zip(KIRIGAMI_FIGURES, compared, strict=True))


def kirigami_decay(
    model: nn.Module, group: StructureGroup, example: Tensor, targets: Sequence[float]
) -> Callable[[], None] | None:
    """Torch-kirigami's way to set each structure of a group of ``model`` to its target norm.

    Returns:
        A function that does it, or ``None`` where torch-kirigami is not installed.

    Raises:
        OverheadError: its groups have other elements than the structures.
    """
    try:
        from torch_kirigami import DependencyGraph, IndexSet
        from torch_kirigami.pruning import ParameterGroup
        from torch_kirigami.sparsity import set_group_norms_
    except ImportError:
        return None
    graph = DependencyGraph.build(model, args=(example,))
    names = {id(p): name for name, p in model.named_parameters()}
    axes = [graph.parameter(names[id(s.parameter)]).axis(s.dim) for s in group.slices]
    rows = zip(*(s.index.tolist() for s in group.slices), strict=True)
    # Checking the graph for each takes torch-kirigami 5 ms: seconds for a group, not for a model.
    theirs = tuple(
        ParameterGroup(
            graph,
            tuple(axis.select(IndexSet.of(at)) for axis, at in zip(axes, row, strict=True)),
        )
        for row in tqdm(rows, "torch-kirigami: groups", group.size, disable=None, leave=False)
    )
    count = sum(selection.count for g in theirs for selection in g.selections)
    if count != elements(group):
        raise OverheadError(
            f"torch-kirigami's groups hold {count} elements and the structures of {group.name!r} "
            f"{elements(group)}, so their times do not compare"
        )
    return lambda: set_group_norms_(theirs, tuple(targets))


def elements(group: StructureGroup) -> int:
    """How many numbers the structures of a group hold."""
    return sum(
        s.index.numel() * s.parameter.numel() // s.parameter.shape[s.dim] for s in group.slices
    )
