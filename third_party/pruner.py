"""The touch points in torch-pruning 1.6.1's pruners: its ranking, its runs, its sparse learning.

What this file works around, all of it in that version:

- Pruners share dictionaries given as mutable defaults (``BasePruner.__init__``), so fresh ones are
  passed.
- Every step walks through all groups anew and ranks them, though it changes a few (``_prune``).
- Channels are counted and ranked one by one, except in grouped layers and heads, though removing
  one may take others along (``BasePruner._prune``). Here what goes together is counted and ranked
  as one.
- A layer that would lose all its channels loses none (``DependencyGraph.check_pruning_group``).
- Groups kept across a removal go stale, so they are kept as (root, indices) and fetched anew.
- Rounding takes channels and structures for the same number, asks for all of a layer that is no
  wider than what it rounds to, and ``max_pruning_ratio`` is looked at before a step only
  (``BasePruner._round_to``, ``_check_pruning_ratio``).
- Two importances sort a group's positions, and not the root's channels that these belong to
  (``GroupTaylorImportance``, ``GroupHessianImportance``).
- Its importance knows no Conv1D and fails on some grouped convolutions.
- Heads are found by ``third_party.heads``, so they are counted and chosen here, as upstream does
  it: by the mean of its importance over their channels, among one another.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dpm_core.errors import kind_and_line

from . import graph, tracing, walk
from .groups import Plan, UnsupportedLayerError, UpstreamGroup, structures_in
from .heads import Heads, conv1d, owner, weight_dims
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)

IMPORTANCES: dict[str, Callable[[str], Any]] = {
    "magnitude": lambda normalizer: tp.importance.GroupMagnitudeImportance(2, "mean", normalizer),
    "taylor": lambda normalizer: tp.importance.GroupTaylorImportance("mean", normalizer),
    "hessian": lambda normalizer: tp.importance.GroupHessianImportance("mean", normalizer),
    "fpgm": lambda normalizer: tp.importance.FPGMImportance(2, "mean", normalizer),
    "lamp": lambda _: tp.importance.LAMPImportance(),
    "bn-scale": lambda normalizer: tp.importance.BNScaleImportance("mean", normalizer),
}
"""Upstream's rankings, by the normalizer. For ``taylor`` the model's parameters hold gradients, for
``hessian`` squares of gradients."""


class _Upstream(tp.pruner.GroupNormPruner):  # type: ignore[misc]
    """Upstream's pruner, whose rounding counts in structures and leaves each layer something.

    Attributes:
        least: how many structures of a group have to stay, by the group's root layer.
        kept: layers of which rounding, or ``least``, has kept more than the ranking.
    """

    least: Callable[[nn.Module], int]
    kept: set[nn.Module]

    def _is_atten_group(self, group: Any) -> Any:
        self._present = group  # whose channels are rounded next
        return super()._is_atten_group(group)

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        """How many structures go, so that a multiple of ``round_to`` channels stays."""
        root, size = self._present[0].dep.target.module, self._get_channel_groups(self._present)
        structures, unit = current_channels // size, structures_in(round_to, size)
        least = math.ceil(self.least(root) / unit) * unit
        left = (structures - n_pruned) // unit * unit
        if left < least:
            self.kept.add(root)
        going: int = max(structures - max(left, least), 0)
        return going


class Pruner:
    """Upstream's GroupNormPruner, free of shared defaults.

    Attentions lose whole heads, the share ``ratio`` of them; heads are ranked among one another.

    Args:
        model: what to prune; it stays as it is until :meth:`run`.
        example: of its inputs, on its device.
        ratio, steps, global_pruning, normalizer, reg, isomorphic: upstream's own.
        ignored: layers that stay as they are, those of the network's outputs among them.
        importance: one of :data:`IMPORTANCES`, or a seed, to draw channels instead of ranking them.
        round_to: as upstream's; of a structure of several channels, these are counted.
        max_pruning_ratio: a layer loses no larger share of its structures.
        sizes: structures that groups had in the dense model, by root, if it was pruned before.

    Attributes:
        upstream: its pruner.
        groups: what it may prune.
        left_whole: layers that the last step of :meth:`run` left as they are, as they would have
            lost all their channels.

    Raises:
        UnsupportedLayerError: naming a group that cannot be read, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        ratio: float,
        steps: int,
        global_pruning: bool,
        normalizer: str,
        reg: float,
        ignored: Collection[str],
        importance: str | int = "magnitude",
        round_to: int | None = None,
        isomorphic: bool = False,
        max_pruning_ratio: float = 1.0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._model = model
        self._importance: Any = (
            _drawn(model, importance)
            if isinstance(importance, int)
            else IMPORTANCES[importance](normalizer)
        )
        self._ranking = "random" if isinstance(importance, int) else importance
        self._sorting = importance in ("taylor", "hessian")
        self._share, self._unit = 1 - max_pruning_ratio, round_to or 1
        tracing.require_plain_weights(model)
        traced = tracing.Tracing(model, example)
        inside = {m for name in ignored for m in model.get_submodule(name).modules()}
        apart = {model.get_submodule(name) for name in traced.heads.layers}
        with tracing.upstream(model):
            self.upstream = _Upstream(
                model,
                example,
                importance=self._by_structure,
                reg=reg,
                global_pruning=global_pruning,
                pruning_ratio=ratio,
                iterative_steps=steps,
                # Rounding to 1 lets it leave what has to stay.
                round_to=round_to or (1 if max_pruning_ratio < 1 else None),
                isomorphic=isomorphic,
                max_pruning_ratio=max_pruning_ratio,
                ignored_layers=[*inside, *apart],
                root_module_types=list(walk.roots()),
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
                **traced.settings(),
            )
        self._graph = traced.finish(self.upstream.DG)
        self.left_whole: list[str] = []
        self._enough = self._graph.check_pruning_group
        self._graph.check_pruning_group = self._checked
        reading = graph.read_built(self._graph, model, inside)
        for why in reading.refused.values():
            raise UnsupportedLayerError(why)
        self.groups = reading.groups
        of_heads = (traced.heads.of(g.root) for g in self.groups if g.heads)
        self._heads: dict[str, Heads] = {h.root: h for h in of_heads if h is not None}
        self._first = {root: h.count for root, h in self._heads.items()}
        self._sizes = {g.root: g.structures for g in self.groups} | dict(sizes or {})
        names = {m: n for n, m in model.named_modules()}
        self.upstream.least = lambda root: self._least(names[root])
        self.upstream.kept = set()
        self._tied: set[nn.Module] = set()  # structures not laid out as in a grouped convolution
        for group in (g for g in self.groups if not g.heads and len(g.members[0]) > 1):
            root, count = model.get_submodule(group.root), group.structures
            self.upstream.out_channel_groups[root] = len(group.members[0])
            if group.members != [list(range(k, group.channels, count)) for k in range(count)]:
                self._tied.add(root)
        self._rank_all()
        self._wholes = _Wholes()

    @property
    def kept(self) -> list[str]:
        """Layers of which :meth:`run` left more than the ranking would have, because it has to."""
        names = {m: n for n, m in self._model.named_modules()}
        return sorted(names[root] for root in self.upstream.kept)

    def _least(self, root: str) -> int:
        """How many structures of a group have to stay."""
        # A group without a table is refused, or its channels are the network's outputs.
        return max(1, math.ceil(self._share * self._sizes.get(root, 1) - 1e-9))

    def most(self, group: UpstreamGroup) -> list[int]:
        """As many channels of a group as may go at most."""
        size = len(group.members[0])
        unit = 1 if group.heads else structures_in(self._unit, size)
        least = math.ceil(self._least(group.root) / unit) * unit
        return group.channels_of(range(least, group.structures)) if self.ranks(group) else []

    def ranks(self, group: UpstreamGroup) -> bool:
        """Whether the importance says anything about a group; upstream leaves others whole."""
        return self._scores(group) is not None

    def _by_structure(self, group: Any) -> Any:
        """Upstream's importance, in which all channels of a structure get their mean."""
        return self._wholes.scores(group, self._scores_by_structure)

    def _ask(self, group: Any) -> Tensor | None:
        """Upstream's importance of each channel of a group; ``None``: it says nothing about it.

        Raises:
            UnsupportedLayerError: it fails on the group, or gives what is no number.
        """
        try:
            scores: Tensor | None = self._importance(self._rankable(group))
        except Exception as cause:  # of whatever kind: no importance knows all layers
            what = f"fails on its layers ({kind_and_line(cause)})"
        else:
            if scores is None or len(scores) < 2 or not bool(scores.isnan().any()):
                return scores
            what = "gives NaN, as for weights or gradients that are no numbers"
        root = group[0].dep.target.module
        names = {m: n for n, m in self._model.named_modules()}
        name = names[root.of[0] if isinstance(root, _AsLinear) else root]
        raise UnsupportedLayerError(
            f"the group of {name!r} cannot be ranked: importance {self._ranking!r} {what}. Choose "
            f"another importance, or name {name!r} in `ignored` to leave it unpruned"
        )

    def require_ranking(self) -> list[UpstreamGroup]:
        """The groups that the importance says anything about, all of which it can rank.

        An importance by gradients is asked with gradients of its own, which are not kept.

        Raises:
            UnsupportedLayerError: naming a group that it cannot rank, the importance, the remedy.
        """
        kept = [(p, p.grad) for p in self._model.parameters()]
        for parameter, gradient in kept:
            if gradient is None:
                parameter.grad = parameter.new_ones(()).expand_as(parameter)
        try:
            return [g for g in self.groups if self.ranks(g)]
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def _scores_by_structure(self, group: Any) -> tuple[Any, list[list[int]]]:
        scores, together = self._ask(group), []
        if scores is not None and isinstance(group, _HeadGroup):
            scores = group.by_head(scores).repeat_interleave(group.size)
        elif scores is not None and group[0].dep.target.module in self._tied:
            together = graph.members(self._graph, group)
            for members in together:
                scores[members] = scores[members].mean()
        return scores, together

    def _rank_all(self) -> None:
        """Let upstream's regularizer know the heads, and all layers by kinds that it knows."""
        listed = [_rankable(g) for g in self.upstream._groups]
        self.upstream._groups = [
            *listed,
            *(_HeadGroup(h, self._model) for h in self._heads.values()),
        ]

    def _checked(self, group: Any) -> bool:
        """Upstream's check that a group keeps something; groups it drops silently are noted."""
        enough: bool = self._enough(group)
        if not enough:
            self.left_whole.append(self._graph._module2name[group[0].dep.target.module])
        return enough

    def importance(self, group: UpstreamGroup) -> Tensor:
        """Upstream's importance of each structure of a group, (K,) on the host."""
        scores = self._scores(group)
        assert scores is not None
        return scores.cpu()

    def _scores(self, group: UpstreamGroup) -> Tensor | None:
        """Upstream's importance of each structure of a group, (K,)."""
        if group.heads:
            return self._heads_scores(self._heads[group.root])
        layer = self._model.get_submodule(group.root)
        with tracing.upstream(self._model), torch.no_grad():
            whole = graph.whole(self._graph, layer, range(group.channels))
            scores = self._ask(whole)
        return None if scores is None else scores[torch.tensor(group.members, device="cpu")].mean(1)

    def _rankable(self, group: Any) -> Any:
        rankable = _rankable(group)
        if self._sorting:
            rankable._group = [_sorted(item) for item in rankable._group]
        return rankable

    def counts(self) -> dict[str, int]:
        """How many structures there are in each of upstream's scopes of ranking.

        Upstream counts them in a pruner's first step, which has a ratio of zero here and removes
        nothing.
        """
        with tracing.upstream(self._model):
            for _ in self.upstream._prune():
                raise RuntimeError("torch-pruning removes structures at a ratio of zero")
        return dict(self.upstream._scope_initial_channels) | self._first

    def count_from(self, before: Mapping[str, int]) -> None:
        """Let the ratio refer to the :meth:`counts` of the model before it was pruned."""
        self._first = {root: before.get(root, count) for root, count in self._first.items()}
        self.upstream._scope_initial_channels.update(before)

    def run(self, reached: Callable[[], bool], progress: Callable[[str], object]) -> Plan:
        """Upstream's own pruning, step by step until the target is reached or the steps are done.

        Args:
            reached: whether the target is; it leaves the model's weights as they are.
            progress: called with what is going on.

        Returns:
            What was removed, by the channels' positions before the run.
        """
        trained = {n: p.requires_grad for n, p in _parameters(self._model)}
        with tracing.upstream(self._model), self._wholes.during_run(self._graph):
            plan = self._run(reached, progress)
        for name, parameter in _parameters(self._model):
            parameter.requires_grad_(trained[name])
        return plan

    def _run(self, reached: Callable[[], bool], progress: Callable[[str], object]) -> Plan:
        names = {m: n for n, m in self._model.named_modules()}
        left: dict[str, list[int]] = {}
        removed: dict[str, list[int]] = {}
        up = self.upstream

        def note(name: str, before: int, here: Collection[int]) -> None:
            numbers = left.setdefault(name, list(range(before)))
            removed.setdefault(name, []).extend(numbers[i] for i in here)
            left[name] = [c for i, c in enumerate(numbers) if i not in here]

        while not reached() and up.current_step < up.iterative_steps:
            self.left_whole.clear()
            step = up.step(interactive=True)
            gone = self._heads_gone()
            for group in step:
                if not group[0].idxs:  # all of it has to stay
                    continue
                root = group[0].dep.target.module
                note(names[root], up.DG.get_out_channels(root), set(group[0].idxs))
                group.prune()
                self._wholes.forget(item.dep.target for item in group.items)
            for name, structures in gone.items():
                heads = self._heads[name]
                channels = {c for k in structures for c in heads.members[k]}
                note(name, heads.count * len(heads.members[0]), channels)
                heads.remove(self._model, structures)
                self._heads[name] = heads.without(structures)
                layers = {owner(part) for part, _ in heads.parts}
                nodes = (up.DG.module2node.get(self._model.get_submodule(n)) for n in layers)
                self._wholes.forget(node for node in nodes if node is not None)
                self._graph.maps_valid = False
            progress(f"selecting {up.current_step}/{up.iterative_steps}")
        return [(name, sorted(channels)) for name, channels in removed.items() if channels]

    def _heads_scores(self, heads: Heads) -> Tensor | None:
        """Upstream's importance of each head of an attention, (K,)."""
        group = _HeadGroup(heads, self._model)
        with torch.no_grad():
            scores = self._ask(group)
        return None if scores is None else group.by_head(scores)

    def _heads_gone(self) -> dict[str, list[int]]:
        """The heads that go in the present step; every attention keeps its best."""
        ratio = self.upstream.per_step_pruning_ratio[self.upstream.current_step]
        ranked = []
        for root, heads in self._heads.items():
            scores = self._heads_scores(heads)
            if scores is None:
                continue
            order = scores.cpu().argsort(stable=True).tolist()
            left = self._first[root] - math.ceil(ratio * self._first[root])
            if left < 1 and not self.upstream.global_pruning:
                self.left_whole.append(root)
            kept = self._least(root)
            if not self.upstream.global_pruning:
                kept = max(kept, left)
            ranked += [(float(scores[k]), root, k) for k in order[: max(0, len(order) - kept)]]
        if self.upstream.global_pruning:
            left = int(sum(self._first.values()) * (1 - ratio))
            many = sum(h.count for h in self._heads.values()) - left
            if many > len(ranked):
                self.left_whole += [root for root in self._heads if root not in self.left_whole]
            ranked = sorted(ranked, key=lambda entry: entry[0])[: max(0, many)]
        gone: dict[str, list[int]] = {}
        for _, root, k in ranked:
            gone.setdefault(root, []).append(k)
        return gone

    def update_regularizer(self) -> None:
        """Upstream's, once an epoch of sparse learning."""
        with tracing.upstream(self._model):
            self.upstream.update_regularizer()
        self._rank_all()

    def regularize(self) -> None:
        """Upstream's, after backward."""
        for group in self.upstream._groups:
            for item in group:
                if isinstance(item.dep.target.module, _AsLinear):
                    item.dep.target.module.take_gradient()
        self.upstream.regularize(self._model)


class _Wholes:
    """Whole groups and their scores, each kept until a removal touches one of its layers.

    What a group holds, and how it ranks, depends on the layers and operations in it alone.

    Upstream takes structures of several channels to lie as in a grouped convolution: first one
    channel of each structure, then another of each. During a run it is given scores in that order,
    and what it chooses is put back into the layer's own.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[nn.Module, Any], Any] = {}
        self._nodes: dict[int, set[int]] = {}
        self._scores: dict[int, Any] = {}
        self._orders: dict[nn.Module, list[int]] = {}

    @contextmanager
    def during_run(self, built: Any) -> Iterator[None]:
        """Let upstream's graph hand out what is kept, while weights stay as they are."""
        anew = built.get_pruning_group

        def group_of(layer: nn.Module, function: Any, idxs: Sequence[int]) -> Any:
            out = built.is_out_channel_pruning_fn(function)
            if not idxs or not out:
                return anew(layer, function, idxs)
            if len(idxs) != built.get_out_channels(layer):
                order = self._orders.get(layer)
                return anew(layer, function, [order[i] for i in idxs] if order else idxs)
            if (layer, function) not in self._groups:
                group = self._groups[layer, function] = anew(layer, function, idxs)
                self._nodes[id(group)] = {id(item.dep.target) for item in group.items}
            return self._groups[layer, function]

        built.get_pruning_group = group_of
        try:
            yield
        finally:
            del built.get_pruning_group
            self._groups, self._nodes, self._scores = {}, {}, {}
            self._orders = {}

    def scores(self, group: Any, rank: Callable[[Any], tuple[Any, list[list[int]]]]) -> Any:
        """A group's scores, unless they are kept.

        Args:
            group: upstream's.
            rank: gives the scores by channel, and the channels of structures that do not lie as in
                a grouped convolution.
        """
        if id(group) not in self._nodes:
            return rank(group)[0]
        if id(group) not in self._scores:
            scores, together = rank(group)
            if together:
                order = [channel for place in zip(*together, strict=True) for channel in place]
                self._orders[group[0].dep.target.module], scores = order, scores[order]
            self._scores[id(group)] = scores
        return self._scores[id(group)]

    def forget(self, changed: Iterable[Any]) -> None:
        """To be called with every node of the graph that has lost channels."""
        touched = {id(node) for node in changed}
        for key, group in list(self._groups.items()):
            if not touched.isdisjoint(self._nodes[id(group)]):
                del self._groups[key], self._nodes[id(group)]
                self._scores.pop(id(group), None)


def _rankable(group: Any) -> Any:
    """A group as upstream's importance can read it.

    It knows no Conv1D, knows BatchNorms by its own function to prune them alone, and fails where it
    looks for rows of a convolution with one input channel to each part and several output channels;
    the same weights are in the group as that layer's output.
    """
    rankable = copy.copy(group)
    rankable._group = []
    for item in group._group:
        module, handler = item.dep.target.module, item.dep.handler
        if (
            handler == tp.function.prune_conv_in_channels
            and 1 < module.groups == module.in_channels
        ):
            continue
        if isinstance(module, conv1d()):
            function = getattr(
                tp.function, f"prune_linear_{handler.__name__.split('_')[1]}_channels"
            )
            item = _item(_AsLinear(module), function, item.idxs, item.root_idxs)
        elif isinstance(module, _BatchNorm):
            function = tp.function.prune_batchnorm_out_channels
            item = _item(module, function, item.idxs, item.root_idxs)
        rankable._group.append(item)
    return rankable


class _HeadGroup(walk.Group):
    """The heads of an attention as upstream's importance and regularizer read a group.

    To these a head's channels are those of its values' layer.

    Attributes:
        heads: how many structures.
        size: of each, in channels.
    """

    def __init__(self, heads: Heads, model: nn.Module) -> None:
        super().__init__()
        self.heads, self.size = heads.count, len(heads.members[0])
        ordered = sorted(heads.parts.items(), key=lambda part: part[0][0] != f"{heads.root}.weight")
        for (name, dim), table in ordered:
            layer = model.get_submodule(owner(name))
            dims = weight_dims(layer)
            if dims is None or not name.endswith(".weight"):
                continue
            what = "out" if dim == dims[0] else "in"
            kind = "conv" if isinstance(layer, _ConvNd) else "linear"
            function = getattr(tp.function, f"prune_{kind}_{what}_channels")
            places = len(table[0])
            channels = [
                k * self.size + place * self.size // places
                for k in range(self.heads)
                for place in range(places)
            ]
            target = _AsLinear(layer) if isinstance(layer, conv1d()) else layer
            self._group.append(_item(target, function, [p for t in table for p in t], channels))

    def by_head(self, scores: Tensor) -> Tensor:
        """The mean of the channels' scores, (heads,)."""
        return scores.view(self.heads, self.size).mean(1)


def _item(layer: Any, function: Any, positions: list[int], channels: list[int]) -> Any:
    """An item of upstream's group."""
    node = tp.dependency.Node(layer, None)
    dep = tp.dependency.Dependency(function, function, node, node)
    item = tp._helpers.GroupItem(dep, positions)
    item.root_idxs = channels
    return item


class _AsLinear(nn.Linear):
    """A Conv1D as the linear layer that it is, with the same memory."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.nx, layer.nf, bias=False, device="meta")
        self.of = [layer]  # no part of this one
        self.weight = nn.Parameter(layer.weight.detach().T, layer.weight.requires_grad)
        self.take_gradient()

    def take_gradient(self) -> None:
        """Share the present gradient."""
        gradient = self.of[0].weight.grad
        self.weight.grad = None if gradient is None else gradient.T


def _sorted(item: Any) -> Any:
    """A part of a group with its positions in ascending order, the root's channels beside them."""
    order = sorted(range(len(item.idxs)), key=item.idxs.__getitem__)
    ordered = type(item)(item.dep, [item.idxs[i] for i in order])
    ordered.root_idxs = [item.root_idxs[i] for i in order]
    return ordered


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by all their names: upstream unties those that layers share."""
    return list(model.named_parameters(remove_duplicate=False))


def _drawn(model: nn.Module, seed: int) -> Callable[..., Tensor]:
    """A random importance, always the same for a layer, a channel and a seed."""
    names = {m: n for n, m in model.named_modules()}

    def importance(group: Any, **_: object) -> Tensor:
        root = group[0].dep.target.module
        name = names[root.of[0] if isinstance(root, _AsLinear) else root]
        key = zlib.crc32(f"{seed} {name}".encode())
        return torch.rand(
            len(group[0].idxs), generator=torch.Generator().manual_seed(key), device="cpu"
        )

    return importance
