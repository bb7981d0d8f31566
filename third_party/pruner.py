"""The touch points in torch-pruning 1.6.1's pruners: its ranking, its runs, its sparse learning.

What this file works around, all of it in that version:

- Pruners share dictionaries given as mutable defaults (``BasePruner.__init__``), so fresh ones are
  passed.
- Channels are counted and ranked one by one, except in grouped layers and heads, though removing
  one may take others along (``BasePruner._prune``). Here what goes together is ranked together.
- A layer that would lose all its channels loses none (``DependencyGraph.check_pruning_group``).
- Groups kept across a removal go stale, so they are kept as (root, indices) and fetched anew.
- Heads are found by ``third_party.heads``, so they are counted and chosen here, as upstream does
  it: by the mean of its importance over their channels, among one another.
- Its importance knows no Conv1D and fails on some grouped convolutions.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import graph
from .groups import Plan, UnsupportedLayerError, UpstreamGroup
from .heads import Heads, conv1d, weight_dims
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)


class Pruner:
    """Upstream's GroupNormPruner with the group magnitude (p = 2), free of shared defaults.

    Attentions lose whole heads, the share ``ratio`` of them; heads are ranked among one another.

    Args:
        model: what to prune; it stays as it is until :meth:`run`.
        example: of its inputs, on its device.
        ratio, steps, global_pruning, normalizer, reg: upstream's own.
        ignored: layers that stay as they are, those of the network's outputs among them.
        drawn: a seed, to draw channels instead of ranking them.

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
        drawn: int | None = None,
    ) -> None:
        self._model = model
        importance: Any = tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
        if drawn is not None:
            importance = _drawn(model, drawn)
        self._importance = importance
        graph.require_plain_weights(model)
        tracing = graph.Tracing(model, example)
        inside = {m for name in ignored for m in model.get_submodule(name).modules()}
        apart = {model.get_submodule(name) for name in tracing.heads.layers}
        with graph.upstream(model):
            self.upstream = tp.pruner.GroupNormPruner(
                model,
                example,
                importance=self._by_structure,
                reg=reg,
                global_pruning=global_pruning,
                pruning_ratio=ratio,
                iterative_steps=steps,
                ignored_layers=[*inside, *apart],
                root_module_types=list(graph.roots()),
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
                **tracing.settings(),
            )
        self._graph = tracing.finish(self.upstream.DG)
        self.left_whole: list[str] = []
        self._enough = self._graph.check_pruning_group
        self._graph.check_pruning_group = self._checked
        reading = graph.read_built(self._graph, model, inside)
        for why in reading.refused.values():
            raise UnsupportedLayerError(why)
        self.groups = reading.groups
        of_heads = (tracing.heads.of(g.root) for g in self.groups if g.heads)
        self._heads: dict[str, Heads] = {h.root: h for h in of_heads if h is not None}
        self._first = {root: h.count for root, h in self._heads.items()}
        self._tied = {
            model.get_submodule(g.root) for g in self.groups if not g.heads and not self._tie(g)
        }
        self._rank_all()

    def _tie(self, group: UpstreamGroup) -> bool:
        """Let upstream rank and count the channels of a structure as one, if it can say so.

        It can where they lie as in a grouped convolution.
        """
        count, size = group.structures, len(group.members[0])
        if size > 1:
            if group.members != [list(range(k, group.channels, count)) for k in range(count)]:
                return False
            self.upstream.out_channel_groups[self._model.get_submodule(group.root)] = size
        return True

    def _by_structure(self, group: Any, **settings: Any) -> Any:
        """Upstream's importance, in which all channels of a structure get their mean."""
        scores = self._importance(_rankable(group), **settings)
        if isinstance(group, _HeadGroup):
            return (
                scores.view(group.heads, -1)
                .mean(1, keepdim=True)
                .expand(group.heads, group.size)
                .flatten()
            )
        if group[0].dep.target.module in self._tied:
            for members in graph.members(self._graph, group):
                scores[members] = scores[members].mean()
        return scores

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
        if group.heads:
            return self._heads_scores()[group.root]
        layer = self._model.get_submodule(group.root)
        with graph.upstream(self._model), torch.no_grad():
            whole = graph.whole(self._graph, layer, range(group.channels))
            scores: Tensor = self._importance(_rankable(whole))
        return scores.detach().cpu()[torch.tensor(group.members)].mean(1)

    def counts(self) -> dict[str, int]:
        """How many structures there are in each of upstream's scopes of ranking.

        Upstream counts them in a pruner's first step, which has a ratio of zero here and removes
        nothing.
        """
        with graph.upstream(self._model):
            for _ in self.upstream._prune():
                raise RuntimeError("torch-pruning removes structures at a ratio of zero")
        return dict(self.upstream._scope_initial_channels) | self._first

    def count_from(self, before: Mapping[str, int]) -> None:
        """Let the ratio refer to the :meth:`counts` of the model before it was pruned."""
        self._first = {root: before.get(root, count) for root, count in self._first.items()}
        self.upstream._scope_initial_channels.update(before)

    def run(self, reached: Callable[[], bool], progress: Callable[[str], object]) -> Plan:
        """Upstream's own pruning, step by step until the target is reached or the steps are done.

        Returns:
            What was removed, by the channels' positions before the run.
        """
        names = {m: n for n, m in self._model.named_modules()}
        trained = {n: p.requires_grad for n, p in _parameters(self._model)}
        left: dict[str, list[int]] = {}
        removed: dict[str, list[int]] = {}
        up = self.upstream

        def note(name: str, before: int, here: Collection[int]) -> None:
            numbers = left.setdefault(name, list(range(before)))
            removed.setdefault(name, []).extend(numbers[i] for i in here)
            left[name] = [c for i, c in enumerate(numbers) if i not in here]

        while not reached() and up.current_step < up.iterative_steps:
            self.left_whole.clear()
            with graph.upstream(self._model):
                step = up.step(interactive=True)
                gone = self._heads_gone()
                for group in step:
                    root = group[0].dep.target.module
                    note(names[root], up.DG.get_out_channels(root), set(group[0].idxs))
                    group.prune()
            for name, structures in gone.items():
                heads = self._heads[name]
                channels = {c for k in structures for c in heads.members[k]}
                note(name, heads.count * len(heads.members[0]), channels)
                heads.remove(self._model, structures)
                self._heads[name] = heads.without(structures)
                self._graph.maps_valid = False
            progress(f"selecting {up.current_step}/{up.iterative_steps}")
        for name, parameter in _parameters(self._model):
            parameter.requires_grad_(trained[name])
        return [(name, sorted(channels)) for name, channels in removed.items() if channels]

    def _heads_scores(self) -> dict[str, Tensor]:
        """Upstream's importance of all heads, (K,) on the host, by their groups' roots."""
        groups = {root: _HeadGroup(heads, self._model) for root, heads in self._heads.items()}
        scores = {root: self._by_structure(g).view(g.heads, -1) for root, g in groups.items()}
        return {root: of.mean(1).detach().cpu() for root, of in scores.items()}

    def _heads_gone(self) -> dict[str, list[int]]:
        """The heads that go in the present step; every attention keeps its best."""
        ratio = self.upstream.per_step_pruning_ratio[self.upstream.current_step]
        ranked = []
        for root, scores in self._heads_scores().items():
            order = scores.argsort(stable=True).tolist()
            left = self._first[root] - math.ceil(ratio * self._first[root])
            if left < 1 and not self.upstream.global_pruning:
                self.left_whole.append(root)
            kept = 1 if self.upstream.global_pruning else max(left, 1)
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
        with graph.upstream(self._model):
            self.upstream.update_regularizer()
        self._rank_all()

    def regularize(self) -> None:
        """Upstream's, after backward."""
        self.upstream.regularize(self._model)


def _rankable(group: Any) -> Any:
    """A group as upstream's importance can read it.

    It knows no Conv1D, and fails where it looks for rows of a convolution with one input channel to
    each part and several output channels; the same weights are in the group as that layer's output.
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
        rankable._group.append(item)
    return rankable


class _HeadGroup(graph._Group):
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
            layer = model.get_submodule(name.rpartition(".")[0])
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
        self._parameters["weight"] = nn.Parameter(
            layer.weight.detach().T, layer.weight.requires_grad
        )
        if layer.weight.grad is not None:
            self.weight.grad = layer.weight.grad.T


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by all their names: upstream unties those that layers share."""
    return list(model.named_parameters(remove_duplicate=False))


def _drawn(model: nn.Module, seed: int) -> Callable[..., Tensor]:
    """A random importance, always the same for a layer, a channel and a seed."""
    names = {m: n for n, m in model.named_modules()}

    def importance(group: Any, **_: object) -> Tensor:
        key = zlib.crc32(f"{seed} {names[group[0].dep.target.module]}".encode())
        return torch.rand(len(group[0].idxs), generator=torch.Generator().manual_seed(key))

    return importance
