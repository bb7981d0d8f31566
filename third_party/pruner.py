"""The touch points in torch-pruning 1.6.1's pruners: its ranking, its runs, its sparse learning.

What this file works around, all of it in that version:

- Pruners share dictionaries given as mutable defaults (``BasePruner.__init__``), so fresh ones are
  passed.
- Channels are counted and ranked one by one, except in grouped layers and heads, though removing
  one may take others along (``BasePruner._prune``). Here what goes together is ranked together.
- A layer that would lose all its channels loses none (``DependencyGraph.check_pruning_group``).
- Groups kept across a removal go stale, so they are kept as (root, indices) and fetched anew.
- Rounding takes channels and structures for the same number, asks for all of a layer that is no
  wider than what it rounds to, and ``max_pruning_ratio`` is looked at before a step only
  (``BasePruner._round_to``, ``_check_pruning_ratio``).
- Two importances sort a group's positions, and not the root's channels that these belong to
  (``GroupTaylorImportance``, ``GroupHessianImportance``).
- A group of attention heads has the inputs of the next layer as its root. A step in which global
  ranking has no head to remove fails. Heads are counted as removed even if the removal is then
  refused, as it is for the last heads of a layer.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import graph
from .groups import Plan, UnsupportedLayerError, UpstreamGroup
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
        structures, unit = current_channels // size, round_to // math.gcd(round_to, size)
        least = math.ceil(self.least(root) / unit) * unit
        left = (structures - n_pruned) // unit * unit
        if left < least:
            self.kept.add(root)
        going: int = max(structures - max(left, least), 0)
        return going


class Pruner:
    """Upstream's GroupNormPruner, free of shared defaults.

    A :class:`~dpm_core.third_party.attention.SplitAttention` loses whole heads, the share ``ratio``
    of them; heads are ranked among one another.

    Args:
        model: what to prune; it stays as it is until :meth:`run`.
        example: of its inputs, on its device.
        ratio, steps, global_pruning, normalizer, reg, isomorphic: upstream's own.
        ignored: layers that stay as they are, those of the network's outputs among them.
        importance: one of :data:`IMPORTANCES`, or a seed, to draw channels instead of ranking them.
        round_to: as upstream's; of a structure of several channels, these are counted.
        max_pruning_ratio: a layer loses no larger share of its structures. Of heads it may lose
            more by one step, as in upstream.
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
        self._sorting = importance in ("taylor", "hessian")
        self._share, self._unit = 1 - max_pruning_ratio, round_to or 1
        self._attentions = graph.attentions(model)
        parts = [(p, a) for a in self._attentions for p in (a.query, a.key, a.value)]
        tracing = graph.Tracing()
        graph.require_plain_weights(model)
        with graph.upstream(model):
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
                ignored_layers=[model.get_submodule(name) for name in ignored],
                root_module_types=list(graph.ROOTS),
                in_channel_groups={},
                out_channel_groups={},
                num_heads={part: attention.heads for part, attention in parts},
                prune_num_heads=True,
                prune_head_dims=False,
                head_pruning_ratio=ratio,
                **tracing.settings(),
            )
        self._graph = tracing.finish(self.upstream.DG)
        self.left_whole: list[str] = []
        self._enough = self._graph.check_pruning_group
        self._graph.check_pruning_group = self._checked
        reading = graph.read_built(self._graph, model, set(self.upstream.ignored_layers))
        for why in reading.refused.values():
            raise UnsupportedLayerError(why)
        self.groups = reading.groups
        self._sizes = {g.root: g.structures for g in self.groups} | dict(sizes or {})
        names = {m: n for n, m in model.named_modules()}
        self.upstream.least = lambda root: self._least(names[root])
        self.upstream.kept = set()
        self._tied = {model.get_submodule(g.root) for g in self.groups if not self._tie(g)}

    def _tie(self, group: UpstreamGroup) -> bool:
        """Let upstream rank and count the channels of a structure as one, if it can say so.

        It can where they lie as in a grouped convolution.
        """
        count, size = group.structures, len(group.members[0])
        if size > 1 and not group.heads:
            if group.members != [list(range(k, group.channels, count)) for k in range(count)]:
                return False
            self.upstream.out_channel_groups[self._model.get_submodule(group.root)] = size
        return True

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
        unit = self._unit // math.gcd(self._unit, size)
        if group.heads:
            unit = 1
        least = math.ceil(self._least(group.root) / unit) * unit
        return group.channels_of(range(least, group.structures)) if self.ranks(group) else []

    def ranks(self, group: UpstreamGroup) -> bool:
        """Whether the importance says anything about a group; upstream leaves others whole."""
        return self._scores(group) is not None

    def _by_structure(self, group: Any, **settings: Any) -> Any:
        """Upstream's importance, in which all channels of a structure get their mean."""
        scores = self._importance(self._rankable(group), **settings)
        if scores is None:
            return None
        if group[0].dep.target.module in self._tied:
            for members in graph.members(self._graph, group):
                scores[members] = scores[members].mean()
        return scores

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
        return scores.detach().cpu()[torch.tensor(group.members)].mean(1)

    def _scores(self, group: UpstreamGroup) -> Tensor | None:
        """Upstream's importance of a group's channels."""
        layer = self._model.get_submodule(group.root)
        with graph.upstream(self._model), torch.no_grad():
            whole = graph.whole(self._graph, layer, range(group.channels))
            scores: Tensor | None = self._importance(self._rankable(whole))
        return scores

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
        with graph.upstream(self._model):
            for _ in self.upstream._prune():
                raise RuntimeError("torch-pruning removes structures at a ratio of zero")
        return dict(self.upstream._scope_initial_channels)

    def count_from(self, before: Mapping[str, int]) -> None:
        """Let the ratio refer to the :meth:`counts` of the model before it was pruned."""
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
        while not reached() and up.current_step < up.iterative_steps:
            self._count_heads()
            self.left_whole.clear()
            with graph.upstream(self._model):
                for group in up.step(interactive=True):
                    if not group[0].idxs:  # all of it has to stay
                        continue
                    root, here = group[0].dep.target.module, sorted(group[0].idxs)
                    attention = graph.attention_of(self._graph, group, self._attentions)
                    if attention is not None:  # inputs and values are counted alike
                        root = attention.value
                    name = names[root]
                    before = left.setdefault(name, list(range(up.DG.get_out_channels(root))))
                    removed.setdefault(name, []).extend(before[i] for i in here)
                    gone = set(here)
                    left[name] = [c for i, c in enumerate(before) if i not in gone]
                    group.prune()
            progress(f"selecting {up.current_step}/{up.iterative_steps}")
        for name, parameter in _parameters(self._model):
            parameter.requires_grad_(trained[name])
        return [(name, sorted(channels)) for name, channels in removed.items() if channels]

    def _count_heads(self) -> None:
        """Give upstream the present numbers of heads, and keep it from asking for none."""
        up, left = self.upstream, 0
        for attention in self._attentions:
            for part in (attention.query, attention.key, attention.value):
                up.num_heads[part] = up.out_channel_groups[part] = attention.heads
            if attention.value not in up.ignored_layers and attention.value.out_features > 1:
                left += attention.heads
        ratios, step = up.per_step_head_pruning_ratio, up.current_step + 1
        if up.global_pruning and left <= int(up.initial_total_heads * (1 - ratios[step])):
            ratios[step] = 0.0

    def update_regularizer(self) -> None:
        """Upstream's, once an epoch of sparse learning."""
        with graph.upstream(self._model):
            self.upstream.update_regularizer()

    def regularize(self) -> None:
        """Upstream's, after backward."""
        self.upstream.regularize(self._model)


def _rankable(group: Any) -> Any:
    """A group without the items that upstream's importance fails on.

    It looks for rows of a convolution with one input channel to each part and several output
    channels; the same weights are in the group as that layer's output.
    """
    rankable = copy.copy(group)
    rankable._group = [
        item
        for item in group._group
        if not (
            item.dep.handler == tp.function.prune_conv_in_channels
            and 1 < item.dep.target.module.groups == item.dep.target.module.in_channels
        )
    ]
    return rankable


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
        key = zlib.crc32(f"{seed} {names[group[0].dep.target.module]}".encode())
        return torch.rand(len(group[0].idxs), generator=torch.Generator().manual_seed(key))

    return importance
