"""What is taken out of a model, as a value: applied, joined to another, saved with the small model.

::

    removal = run.remove()                          # or Removal([("conv1", [3, 7])])
    removal.save("small.safetensors", model)
    removal.apply(another, example, optimizer)      # the same channels of another model
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_core import DecayPruning, DecayPruningError, Phase, StructureGroup
from dpm_core.attachment import unwrapped
from dpm_core.errors import kind_and_line
from dpm_core.third_party import running
from dpm_core.third_party.errors import AdapterError

from .optimizer_state import Attributes, CarryOver

Build = Callable[[nn.Module, Any], Any]
"""Gives torch-pruning's graph of a model, for an example of its inputs."""


@dataclass(frozen=True)
class Removal:
    """Channels of layers, in the order in which they go.

    Until a layer occurs a second time, all are removed together, with channels numbered as in the
    model before. A second occurrence begins a further removal: from there on channels are numbered
    as in the model that the earlier ones leave. An occurrence without channels does nothing else.

    Attributes:
        items: (layer's name, its output channels), as modules are named in the dense model, before
            ``torch.compile``. Any
            such pairs are taken; channels are kept in ascending order, and items without any are
            left out where they say nothing.
        leaves: shapes of the parameters of these layers in the model that was left, by name, where
            that is known. :meth:`save` holds the model that it is given to them.
        lacks: why the items are not all that has gone from the dense model; empty: they are, as far
            as is known. With some, :meth:`save` refuses.

    Raises:
        AdapterError: they are no such pairs, or a layer's channels are negative or listed twice.
    """

    items: tuple[tuple[str, tuple[int, ...]], ...]
    leaves: Mapping[str, torch.Size] = field(default_factory=dict, compare=False, repr=False)
    lacks: str = field(default="", compare=False, repr=False)

    def __init__(self, items: Iterable[tuple[str, Iterable[int]]] = ()) -> None:
        try:
            kept = tuple((_plain(name), tuple(sorted(map(_position, c)))) for name, c in items)
        except DecayPruningError:  # of what gives the items
            raise
        except (TypeError, ValueError) as cause:
            raise AdapterError(
                f"a removal is pairs of a layer's name and its output channels ({cause})"
            ) from cause
        for name, channels in kept:
            if not isinstance(name, str) or len(set(channels)) < len(channels):
                raise AdapterError(
                    f"a removal names {name!r} with channels {list(channels)[:8]}; give the name "
                    "of a layer, and each of its channels once"
                )
        self._set(_telling(kept), {}, "")

    def _set(self, *values: Any) -> Removal:
        for name, value in zip(("items", "leaves", "lacks"), values, strict=True):
            object.__setattr__(self, name, value)
        return self

    def leaving(self, model: nn.Module, lacks: str = "") -> Removal:
        """The same removal, with a note of the model that it has left.

        Args:
            model: without what was removed.
            lacks: see the class.
        """
        layers = dict(model.named_modules())
        named = [n for n in dict(self.items) if n in layers]
        own = ((n, layers[n].named_parameters(prefix=n)) for n in named)
        return Removal()._set(self.items, {p: t.shape for _, of in own for p, t in of}, lacks)

    @classmethod
    def of(cls, dpm: DecayPruning) -> Removal:
        """All that is PRUNED in a core whose groups bear the names of their root layers.

        Raises:
            PhaseError: something of it is not zero.
            AdapterError: a group has no slice of a ``weight`` of the layer that it is named after.
        """
        phases = {name: dpm.phases(name) for name in dpm.groups}
        gone = {name: (phase == Phase.PRUNED).nonzero()[:, 0] for name, phase in phases.items()}
        return cls((name, root_channels(dpm.groups[name], k)) for name, k in gone.items())

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        return ((name, list(channels)) for name, channels in self.items)

    def __len__(self) -> int:
        """How many items it has; a layer counts again in each later removal."""
        return len(self.items)

    def __add__(self, later: Removal) -> Removal:
        """This removal, then another one, whose channels are counted in what this one leaves."""
        if not isinstance(later, Removal):
            return NotImplemented
        if not self.items:
            return later
        both = Removal((*self, (self.items[-1][0], ()), *later))
        return both._set(both.items, later.leaves, self.lacks)

    def apply(
        self,
        model: nn.Module,
        example: Any,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        cut: bool = False,
        build: Build | None = None,
    ) -> None:
        """Make a model physically smaller, in place; parameters become new objects.

        Attributes that somebody has put on parameters, as some optimizers do, go on with the new
        ones: plain values, and tensors of the parameter's shape with what stays of them. So do
        hooks on their gradients. Lists of parameters, and dictionaries by them, are to be taken
        anew: a ``clip_grad_norm_`` of the old ones clips nothing.

        By torch-pruning's dependency graph, for every framework. The outputs for the example are
        compared before and after, on a copy first, in double precision where the model runs so.

        Args:
            model: whose channels go. What goes has to be zero.
            example: of its inputs, on its device.
            optimizer: of the model's parameters, or several, to go on with what stays of them and
                of their own states: see :mod:`dpm_core.adapters.optimizer_state`.
            cut: whether what goes may be other than zero, as in a dense model. The small model is
                then compared with a copy in which it is zero.
            build: gives torch-pruning's graph of the model, and of copies of it; ``None``: it is
                traced anew.

        Raises:
            AdapterError: the model is no module, or cannot be run on the example.
            RemovalError: the outputs would change by more than rounding.
            UnsupportedLayerError: upstream cannot remove this.
            CarryOverError: the optimizer's state cannot be divided by structure. In all cases model
                and optimizer are as they were.
        """
        from dpm_core.third_party import tracing  # only now: it loads torch-pruning

        require_model(model)
        with running.uncompiled(model) as plain:
            try:
                self._apply(plain, example, optimizer, cut, build or tracing.build)
            except Exception:
                require_example(plain, example)  # which may be all that is wrong
                raise

    def _apply(
        self,
        model: nn.Module,
        example: Any,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        cut: bool,
        by: Build,
    ) -> None:
        from dpm_core.third_party import dependency

        plan = list(self)
        several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        optimizers = [unwrapped(one) for one in several if one is not None]
        carried = [CarryOver(model, one) for one in optimizers]
        attributes = Attributes(dict(model.named_parameters()))
        needed = carried or attributes.divided
        stays = dependency.survivors(model, example, plan, by) if needed else {}
        (dependency.cut if cut else dependency.remove)(model, example, plan, by)
        attributes.finish(dict(model.named_parameters(remove_duplicate=False)), stays)
        for one in carried:
            one.finish(stays)

    def save(
        self, path: Path | str, model: nn.Module, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write the small model and what was removed: see :func:`~.saved.save_pruned`."""
        from .saved import save_pruned

        save_pruned(path, model, self, facts)

    @classmethod
    def load(cls, path: Path | str) -> Removal:
        """What was removed from the model in a file; :func:`~.saved.load_pruned` gives both.

        Raises:
            SavedModelError, OSError: as :func:`dpm_core.adapters.saved.read`.
        """
        from .saved import read

        return read(path).removal


def _telling(
    items: Iterable[tuple[str, tuple[int, ...]]],
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Without the items that have no channels, but for those at which a further removal begins."""
    kept: list[tuple[str, tuple[int, ...]]] = []
    part: set[str] = set()  # layers of the removal that is going on
    over = False
    for name, channels in items:
        over = over or name in part
        if channels:
            if over and name not in part:
                kept.append((kept[-1][0], ()))
            part = {name} if over else part | {name}
            kept.append((name, channels))
            over = False
    return tuple(kept)


def _plain(name: Any) -> Any:
    return running.plain_name(name) if isinstance(name, str) else name


def _position(value: Any) -> int:
    number = operator.index(value)
    if number < 0 or isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        raise ValueError(f"{value!r} is no channel's number")
    return number


def require_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        AdapterError: saying what it is.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise AdapterError(f"the model is {what}; give an nn.Module, as it is called in training")


def require_example(model: nn.Module, example: Any) -> None:
    """Refuse an example that the model cannot be run on; it stays in its mode.

    Raises:
        AdapterError: with the first line of the model's own error.
    """
    try:
        running.probe(model, example)
    except AdapterError:
        raise
    except Exception as cause:
        raise AdapterError(
            f"the model cannot be run on the example ({kind_and_line(cause)}); give a "
            "batch as in training, on the model's device and of its type: a tensor, several in a "
            "tuple, or a mapping of arguments"
        ) from cause


def root_channels(group: StructureGroup, structures: Sequence[int] | Tensor) -> list[int]:
    """Some structures as output channels of the layer that their group is named after.

    Raises:
        AdapterError: the group has no slice of such a layer's weight.
    """
    roots = [s.index for s in group.slices if s.name == f"{group.name}.weight"]
    if not roots:
        raise AdapterError(
            f"group {group.name!r} has no slice named '{group.name}.weight', so it does not say "
            "which channels its structures are; name groups after their root layers"
        )
    return sorted(roots[0].cpu()[torch.as_tensor(structures, device="cpu")].flatten().tolist())
