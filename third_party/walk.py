"""The walk over torch-pruning's graph: which channels of which layers go together.

What this file works around, all of it in torch-pruning 1.6.1:

- A walk over the graph follows every path by itself, and carries lists of indices along each: it
  takes exponentially long where parts of channels join again, as in slices and concatenations, and
  need not end (``get_pruning_group``). What it merges does not say which channels go together. So
  the walk is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, maps, norms
from .groups import BATCH_NORMS, UnsupportedLayerError
from .maps import Meeting
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)
from torch_pruning.dependency import graph as _graph_module  # noqa: E402

WALK = 40
"""A walk may take this many steps for every edge of the graph; ours. Most take one."""
AGAIN = 4
"""A walk beyond all positions there are may come so often to each place, on average; ours."""
PAIRS = 16
"""A walk may carry this many times as many channels along every edge, on average, as the widest
layer has; ours. Where each position belongs to one channel of the root, it is once at most."""


def roots() -> tuple[Any, ...]:
    """The kinds of layers that groups are named after."""
    return (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, *heads.conv1d())


class EndlessWalkError(OverflowError):
    """A walk from layer to layer would not end.

    Attributes:
        met: see :attr:`Group.met`, so far.
    """

    def __init__(self, met: dict[tuple[Any, Any], Meeting]) -> None:
        super().__init__("the walk from layer to layer does not end")
        self.met = met


def _completed(pairs: Meeting, before: Tensor, size: int) -> Meeting:
    """Pairs, and more where of ``size`` positions that go together some have not been met.

    Args:
        pairs: what comes to a layer now.
        before: the positions that came there before.
        size: of the layer's parts that go whole.
    """
    places, channels = pairs
    parts, which = (places // size).unique(return_inverse=True)
    channel_of = torch.empty_like(parts)
    channel_of[which] = channels  # of each part any
    every = (parts[:, None] * size + torch.arange(size, device="cpu")).flatten()
    missing = ~torch.isin(every, torch.cat([before, places]))
    more = every[missing], channel_of.repeat_interleave(size)[missing]
    return joined([pairs, more])


class Group(_graph_module.Group):  # type: ignore[misc]
    """Upstream's group, which keeps what merging loses.

    Attributes:
        met: by layer, or operation, and function what has come there: which positions are which of
            the root's channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[tuple[Any, Any], Meeting] = {}

    def meeting(self, at: tuple[Any, Any]) -> Meeting:
        """One of :attr:`met`.

        Raises:
            UnsupportedLayerError: upstream does not say which channels of the root they belong to.
        """
        places, channels = self.met[at]
        if bool((channels < 0).any()):
            raise UnsupportedLayerError(
                "shares channels in a way that torch-pruning does not report, as attention heads "
                "may"
            )
        return places, channels

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """As upstream's; the index maps have to be worked out anew."""
        if idxs is not None:  # upstream makes a group of these, and prunes that one
            super().prune(idxs, record_history)
            return
        with maps.removing(self._DG, self.met):
            super().prune(None, record_history)


def _group_of(built: Any, layer: nn.Module, function: Any, idxs: Any) -> Group:
    """Upstream's ``get_pruning_group``, in steps that no path takes twice.

    What a dependency does with a pair of a position and a root's channel does not depend on others.
    So of what comes to a place only the pairs that have not been there go on, together with others
    that wait there.

    Raises:
        EndlessWalkError: it comes where nothing has a position, or does not end within bounds, see
            :data:`WALK` and :data:`PAIRS`.
        OverflowError: a reshape would make more positions than any layer has.
        UnsupportedLayerError: the layer is not in the graph.
    """
    if layer not in built.module2node:
        name = {m: n for n, m in built.model.named_modules()}.get(layer, type(layer).__name__)
        raise UnsupportedLayerError(f"{name!r} {missing(built, layer)}")
    if isinstance(layer, tp.ops.TORCH_CONV) and layer.groups == layer.out_channels > 1:
        function = tp.function.prune_depthwise_conv_out_channels
    maps.update(built)
    start = torch.tensor(
        [idxs] if isinstance(idxs, int) else list(idxs), dtype=torch.int64, device="cpu"
    )
    node = built.module2node[layer]
    first: Any = tp.dependency.Dependency(function, function, source=node, target=node)
    reached = {(node, function): _Reached(first, start, start)}
    stack, steps, pairs = [(node, function)], 0, len(start)
    # Beyond all positions there are, the channels that a layer has, and those that one puts out.
    far = lost = astray = False
    while stack:
        node, function = stack.pop()
        here = reached[node, function].leave()
        ends = tuple(map(int, here[0].aminmax())) if len(here[0]) else (0, -1)
        for dep in node.dependencies:
            if not dep.is_triggered_by(function) or maps.passes_by(dep, *ends):
                continue
            there = maps.mapped(dep, here, built.widest)
            if not len(there[0]):
                continue
            at = dep.target, dep.handler
            size = norms.together(dep.target.module, built)
            if size > 1:
                before = reached[at].all()[0] if at in reached else here[0][:0]
                there = _completed(there, before, size)
            if at not in reached:
                reached[at] = _Reached(dep, *there)
                fresh = len(there[0])
                stack.append(at)
            else:
                waiting, fresh = bool(reached[at].waiting), reached[at].add(*there)
                if fresh and not waiting:
                    stack.append(at)
            if fresh:
                steps, pairs = steps + 1, pairs + fresh
                far = far or int(there[0].max()) >= built.furthest
                lost = lost or reached[at].beyond(built)
                astray = astray or (lost and reached[at].beyond(built, roots(), made=True))
            # Positions that a layer does not have are refused anyhow, but where little is to be
            # done, other reasons may be plainer.
            most = max(10, built.edges)
            much = max(steps / WALK, pairs / (PAIRS * built.widest)) / most
            again = far and steps > AGAIN * len(reached)  # round and round, further on each time
            if much > 1 or (astray and much > 1 / WALK) or (lost and steps > most) or again:
                raise EndlessWalkError({at: there.all() for at, there in reached.items()})
    group = Group()
    group._DG = built
    for at, arrived in reached.items():
        if not any(at[0].module is parameter for parameter in built.ignored_params):
            group.met[at] = arrived.all()
            group._group.append(arrived.item())
    return group


def missing(built: Any, layer: nn.Module) -> str:
    """Why a layer is not in the graph, in words that follow its name."""
    felt = getattr(built, "felt", ())
    if any(p in felt for p in layer.parameters(recurse=False)):
        return "is not in the graph: the model uses its parameters without running the layer itself"
    return (
        "is not in the graph: no output depends on it for this example, with the weights that the "
        "model has now. If the input decides which layers run, as in a mixture of experts, give an "
        "example that runs all of them, or name it in `ignored`"
    )


class _Reached:
    """What a walk has brought to one place: pairs of a position and a root's channel.

    Args:
        dep: the dependency that the walk first came by.
        places, channels: the pairs that came first.

    Attributes:
        waiting: pairs that have not gone on from here.
    """

    def __init__(self, dep: Any, places: Tensor, channels: Tensor) -> None:
        self._dep, self._seen = dep, [(places, channels)]
        self._known = {(id(places), id(channels))}
        self._codes: Tensor | None = None
        self.waiting: list[Meeting] = [(places, channels)]

    def add(self, places: Tensor, channels: Tensor) -> int:
        """Note pairs that come here; says how many have not been here before."""
        if (id(places), id(channels)) in self._known or self._alike(places, channels):
            return 0
        if self._codes is None:
            self._codes = maps.coded(*self.all())
        fresh = ~torch.isin(maps.coded(places, channels), self._codes)
        if not bool(fresh.any()):
            return 0
        places, channels = places[fresh], channels[fresh]
        self._codes = torch.cat([self._codes, maps.coded(places, channels)])
        self._seen.append((places, channels))
        self._known.add((id(places), id(channels)))
        self.waiting.append((places, channels))
        return len(places)

    def _alike(self, places: Tensor, channels: Tensor) -> bool:
        """Whether the same came at once before, as it does by each step of a loop."""
        return any(
            len(p) == len(places) and torch.equal(p, places) and torch.equal(c, channels)
            for p, c in self._seen[:4]
        )

    def beyond(self, built: Any, kinds: tuple[Any, ...] = (), made: bool = False) -> bool:
        """Whether what came last lies beyond the channels of a layer.

        Args:
            built: the graph.
            kinds: of layers that are asked; by default all whose channels are known.
            made: whether only channels count that the layer puts out.
        """
        layer, out = self._dep.target.module, built.is_out_channel_pruning_fn(self._dep.handler)
        if not isinstance(layer, kinds or (*roots(), *BATCH_NORMS)) or (made and not out):
            return False
        pruner = built.get_pruner_of_module(layer)
        width = pruner.get_out_channels(layer) if out else pruner.get_in_channels(layer)
        return bool(self._seen[-1][0].max() >= width)

    def leave(self) -> Meeting:
        """The pairs that go on from here now."""
        going, self.waiting = self.waiting, []
        return going[0] if len(going) == 1 else joined(going)

    def all(self) -> Meeting:
        """All pairs that have come here."""
        return self._seen[0] if len(self._seen) == 1 else joined(self._seen)

    def item(self) -> Any:
        """An item of upstream's group, in which a position that came twice is the first's."""
        places, channels = (t.tolist() for t in self.all())
        once: dict[int, int] = {}
        for place, channel in zip(places, channels, strict=True):
            once.setdefault(place, channel)
        places, channels = list(once), list(once.values())
        item = tp._helpers.GroupItem(self._dep, places)
        item.root_idxs = [None if c < 0 else c for c in channels]
        return item


def joined(pairs: Iterable[Meeting]) -> Meeting:
    """Several as one."""
    places, channels = zip(*pairs, strict=True)
    return torch.cat(places), torch.cat(channels)


@contextmanager
def installed() -> Iterator[None]:
    """Let upstream take this walk for its own inside."""
    theirs = tp.DependencyGraph.get_pruning_group
    tp.DependencyGraph.get_pruning_group = _group_of
    try:
        with maps.installed():
            yield
    finally:
        tp.DependencyGraph.get_pruning_group = theirs
