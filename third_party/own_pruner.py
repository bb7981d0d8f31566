"""The touch points in a pruner of torch-pruning 1.6.1 that its user has constructed.

Facts this file answers, all of that version. A step counts itself, and the heads that it takes,
before it is known to succeed and before they are gone. It computes all importances before it hands
out the first group, so that groups can be had without being removed; their indices are then those
of the model as it is. It drops a group of which nothing would be left without a word. A group that
involves attention is ranked by the inputs of the layer behind
(``_downstream_node_as_root_if_attention``). Which channels go together because of
``out_channel_groups`` or ``num_heads`` stands in no group: the step repeats its indices. The
example is not kept, but autograd keeps what the first layers read. The list of groups that
regularization goes by is not renewed by a removal.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpm_core.errors import kind_and_line

from . import dependency, graph, heads, maps, running, tracing
from .errors import AdapterError
from .groups import Plan, UnsupportedLayerError, UpstreamGroup
from .heads import Found
from .maps import Meeting
from .upstreams import require

require("torch-pruning")
import torch_pruning as tp  # noqa: E402  (only after its version is known)

_OBDC: Any = tp.pruner.importance.OBDCImportance
_PARTS = ("num_heads", "out_channel_groups")
"""What a step brings up to date at once, though the channels go later."""
_COUNTED = (*_PARTS, "_scope_initial_channels")
"""What a step changes besides its number."""

Ranked = tuple[nn.Module, bool]
"""Where a group is ranked: a layer, and whether by its outputs (or by its inputs)."""


@dataclass
class Decision:
    """What a pruner takes out in one step.

    Attributes:
        structures: by the group's root.
        scores: the importance that each structure was ranked by, (K,) on the host, by the root.
        dropped: roots of groups that upstream leaves as they are, as they would lose everything.
    """

    structures: dict[str, list[int]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


@dataclass
class _Table:
    """A group, and the structure at each position that it is ranked by."""

    group: UpstreamGroup
    structure_at: list[int]


class OwnPruner:
    """A pruner as its user constructed it, whose steps are decided here and removed later.

    Args:
        upstream: the pruner. Its model stays as it is until channels are taken out.
        adapt: called with the model, and with copies of it, when channels have gone. ``None``: the
            numbers of heads that :mod:`.heads` knows are brought up to date.

    Attributes:
        upstream: the pruner.
        model: its model.
        refused: why groups that it may prune cannot decay, by their root.
        with_heads: roots of the groups that lose whole heads.

    Raises:
        AdapterError: it is no pruner of torch-pruning, or one of a compiled model.
    """

    def __init__(self, upstream: Any, adapt: Callable[[nn.Module], object] | None = None) -> None:
        if not tracing.is_pruner(upstream):
            raise AdapterError(
                f"{type(upstream).__name__} is no pruner of torch-pruning; give one derived from "
                "torch_pruning.pruner.BasePruner, as you constructed it"
            )
        if running.inside(upstream.model) is not upstream.model:
            raise AdapterError(
                f"{type(upstream).__name__} was constructed of a compiled model, in which upstream "
                "may miss layers; construct it of the model that torch.compile was given"
            )
        self.upstream, self.model = upstream, upstream.model
        tracing.require_plain_weights(self.model)
        self._graph: Any = upstream.DG
        self._graph.heads = self._graph.counted = Found()  # the user's settings say which
        self._adapt = adapt
        self.refused: dict[str, str] = {}
        self.with_heads: set[str] = set()
        self._tables: dict[Ranked, _Table] = {}
        self._later: dict[str, dict[nn.Module, int]] = {}  # of _PARTS, when the channels have gone

    @property
    def name(self) -> str:
        """What kind of pruner it is."""
        return type(self.upstream).__name__

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return int(self.upstream.current_step)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return int(self.upstream.iterative_steps)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        if not hasattr(self._graph, "put_out"):
            self._graph.put_out = set()
        try:
            with tracing.upstream(self.model):
                yield
        finally:
            maps.forget(self._graph)  # whoever prunes meanwhile does not say so

    # ------------------------------------------------------------------ groups

    def unseen(self) -> dict[str, str]:
        """Layers that the pruner's graph lacks, so that it cannot prune them, and why, by name."""
        built, up = self._graph, self.upstream
        there = [m for m in (*built.module2node, *up.ignored_layers) if isinstance(m, nn.Module)]
        known = {inner for module in there for inner in module.modules()}
        return {
            name: f"{name!r} keeps all its channels, as the graph that {self.name} was constructed "
            "with lacks it: the example does not run it, or what it returns is written to in "
            "place, as by ReLU(inplace=True). Give an example that runs it, or write a copy there"
            for name, module in self.model.named_modules()
            if isinstance(module, tuple(up.root_module_types)) and module not in known
        }

    def groups(self) -> list[UpstreamGroup]:
        """The groups of the model as it is that the pruner may prune; see :attr:`refused`.

        Raises:
            UnsupportedLayerError: upstream stumbles over one; the message says where.
        """
        up, names = self.upstream, {m: n for n, m in self.model.named_modules()}
        self.refused, self.with_heads, self._tables = {}, set(), {}
        with self._at_work():
            for group in self._all():
                ranked = self._as_ranked(group)
                if ranked is None or not self._may_prune(ranked):
                    continue
                root = names[group[0].dep.target.module]
                try:
                    self._require_inside(group)
                    attention, parts = up._is_atten_group(ranked)
                    if attention and self._prunes_heads(parts):
                        self.with_heads.add(root)
                    at, ties = self._ties(group, ranked)
                    table = graph._table(self._graph, group, names, ties)
                    of = table.structure_of()
                    entry = _Table(table, [of[c] for c in at])
                    self._tables[self._key(ranked)] = entry
                except UnsupportedLayerError as why:
                    self.refused[root] = remedy(root, str(why))
        tables = [t.group for t in self._tables.values()]
        for root, shared in graph._overlapping(tables).items():
            self.refused[root] = remedy(root, shared)
        return tables

    def _all(self) -> list[Any]:
        """Upstream's groups that are not ignored, with all their channels."""
        up = self.upstream
        try:
            return list(
                up.DG.get_all_groups(
                    ignored_layers=up.ignored_layers, root_module_types=up.root_module_types
                )
            )
        except Exception as cause:  # of a layer's own pruner, say
            place = tracing.place(cause, self.model)
            if place is not None:  # what is around says so
                raise
            raise AdapterError(
                f"{self.name} cannot list its groups ({kind_and_line(cause)})"
            ) from cause

    def _key(self, group: Any) -> Ranked:
        return (
            group[0].dep.target.module,
            self._graph.is_out_channel_pruning_fn(group[0].dep.handler),
        )

    def _require_inside(self, group: Any) -> None:
        for item in group.items:
            node = item.dep.target
            if self._graph.is_out_channel_pruning_fn(item.dep.handler) and graph._leaves(
                self._graph, node
            ):
                raise UnsupportedLayerError("makes the network's output, which would lose channels")

    def _may_prune(self, group: Any) -> bool:
        """Whether the target of a group, as upstream finds it, is above nothing."""
        up, built = self.upstream, self._graph
        attention, parts = up._is_atten_group(group)
        whole = attention and self._prunes_heads(parts)
        if attention and not up.prune_head_dims and not whole:
            return False
        for item in group.items:
            dep = item.dep
            for module, function in (
                (dep.source.module, dep.trigger),
                (dep.target.module, dep.handler),
            ):
                if module in up._layer_to_scope and built.is_out_channel_pruning_fn(function):
                    return bool(up.get_target_pruning_ratio(module, up.iterative_steps) > 0)
        return bool(up.per_step_pruning_ratio[-1] > 0)

    def _prunes_heads(self, parts: list[nn.Module]) -> bool:
        up = self.upstream
        ratios = up.head_pruning_ratio_dict.get(parts[0], up.per_step_head_pruning_ratio)
        return bool(up.prune_num_heads and ratios[-1] > 0)

    def _ties(self, group: Any, ranked: Any) -> tuple[list[int], list[Meeting]]:
        """The root's channel at each position that a group is ranked by, and which go together.

        Raises:
            UnsupportedLayerError: what the pruner takes at a time are no disjoint structures.
        """
        up = self.upstream
        places, channels = group.meeting((ranked[0].dep.target, ranked[0].dep.handler))
        count = int(places.max()) + 1
        if len(places.unique()) != count:
            raise UnsupportedLayerError("is ranked by a part of a layer's channels")
        at = torch.zeros(count, dtype=torch.int64, device="cpu")
        at[places] = channels
        attention, parts = up._is_atten_group(ranked)
        together = up._get_channel_groups(ranked)
        if attention and self._prunes_heads(parts):
            counts = {up.num_heads[part] for part in parts}
            if len(counts) > 1:
                raise UnsupportedLayerError(
                    "is attention in which several heads of queries share one of keys and values, "
                    "so no head can go alone"
                )
            if up.prune_head_dims:
                raise UnsupportedLayerError(
                    "would lose whole heads and a part of each, which overlap (set prune_head_dims "
                    "to False, or head_pruning_ratio to 0)"
                )
            return at.tolist(), [(places // (count // counts.pop()), channels)]
        if together > 1:
            if count % together:
                raise UnsupportedLayerError(
                    f"has {count} channels in {together} groups of channels, which do not divide "
                    "them"
                )
            return at.tolist(), [(places % (count // together), channels)]
        return at.tolist(), []

    def require_ranking(self) -> None:
        """Refuse groups that an importance of upstream's fails on, before a step asks it.

        One by gradients is asked with gradients of its own where the model has none yet. What an
        importance gathers in the training (``OBDCImportance``, ``ActivationImportance``) may be to
        come, and one that is no class of upstream's is asked in its step alone.

        Raises:
            AdapterError: naming a group, the importance, and the remedy.
        """
        up, importance = self.upstream, self.upstream.importance
        if not isinstance(importance, tp.importance.Importance) or (
            isinstance(importance, _OBDC) and not importance.steps
        ):
            return
        kept, ranked = [(p, p.grad) for p in self.model.parameters()], 0
        for parameter, gradient in kept:
            if gradient is None:
                parameter.grad = parameter.new_ones(()).expand_as(parameter)
        try:
            with self._at_work(), running.same_draws(), torch.no_grad():
                for group in map(self._as_ranked, self._all()):
                    if group is None or self._key(group) not in self._tables:
                        continue
                    root = self._graph._module2name[group[0].dep.target.module]
                    try:
                        ranked += up.estimate_importance(group) is not None
                    except Exception as cause:
                        raise AdapterError(
                            f"{self._importance} fails at the group of {root!r} "
                            f"({kind_and_line(cause)}); give {self.name} another "
                            "importance, or put the layer into its ignored_layers"
                        ) from cause
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
        if not ranked and isinstance(importance, tp.importance.BNScaleImportance):
            raise AdapterError(
                f"{self._importance} ranks no group of layers; give {self.name} another importance"
            )

    def _as_ranked(self, group: Any) -> Any:
        """A group as upstream ranks it: by the layer behind, where attention is involved."""
        if self.upstream._is_atten_group(group)[0]:
            group = self.upstream._downstream_node_as_root_if_attention(group)
        return group

    # ------------------------------------------------------------------ the decision

    def decide(self) -> Decision:
        """What the pruner's next step takes out; the model stays as it is, and the step is counted.

        Raises:
            AdapterError: upstream stumbles over a layer, ranks nothing, or selects channels
                without those that go with them. The pruner is as it was.
        """
        up = self.upstream
        kept = {name: dict(getattr(up, name)) for name in _COUNTED}
        number, own = up.current_step, vars(up).get("estimate_importance")
        scores: dict[Ranked, Tensor] = {}
        asked: list[str] = []

        def estimate(group: Any, *given: Any, **named: Any) -> Any:
            asked.append(self._graph._module2name[group[0].dep.target.module])
            found = ranking(group, *given, **named)
            if found is not None:
                if len(found) < len(group[0].idxs):
                    raise AdapterError(
                        f"{self._importance} gives {len(found)} scores for the "
                        f"{len(group[0].idxs)} channels of {asked[-1]!r}; it has to give one for "
                        "each"
                    )
                scores[self._key(group)] = found.detach().float().cpu()
            return found

        decision = Decision()
        enough, ranking = self._graph.check_pruning_group, up.estimate_importance
        grouped = self._graph.get_pruning_group

        def group_of(layer: nn.Module, function: Any, idxs: list[int]) -> Any:
            out = self._graph.is_out_channel_pruning_fn(function)
            channels = (self._graph.get_out_channels if out else self._graph.get_in_channels)(layer)
            if channels is not None and max(idxs, default=0) >= channels:
                if len(idxs) < channels:
                    raise AdapterError(
                        f"{self._importance} gives more scores than the {channels} channels of "
                        f"{self._graph._module2name[layer]!r}, as behind a flatten; take another "
                        "importance, or put the layer into the pruner's ignored_layers"
                    )
                idxs = list(range(channels))  # upstream will leave it whole
            return grouped(layer, function, idxs)

        def checked(group: Any) -> bool:
            stays: bool = enough(group)
            if not stays:
                decision.dropped.append(self._graph._module2name[group[0].dep.target.module])
            return stays

        up.estimate_importance, self._graph.check_pruning_group = estimate, checked
        self._graph.get_pruning_group = group_of
        try:
            with self._at_work(), _fisher_stays(up.importance):
                for group in up.step(interactive=True):
                    self._note(decision, group)
            if asked and not scores:
                raise AdapterError(f"{self._importance} ranks no group of layers{self._hint()}")
        except BaseException as cause:
            up.current_step = number
            for name, before in kept.items():
                getattr(up, name).clear()
                getattr(up, name).update(before)
            if not isinstance(cause, Exception) or isinstance(cause, AdapterError):
                raise
            at = f" at the group of {asked[-1]!r}" if asked else ""
            raise AdapterError(
                f"{self.name} cannot take its step: {self._importance} fails{at} "
                f"({kind_and_line(cause)}){self._hint()}"
            ) from cause
        finally:
            del up.estimate_importance, self._graph.check_pruning_group
            del self._graph.get_pruning_group
            if own is not None:
                up.estimate_importance = own
        for name in _PARTS:
            now, before = getattr(up, name), kept[name]
            self._later[name] = {m: n for m, n in now.items() if before.get(m) != n}
            now.clear()
            now.update(before)
        for key, found in scores.items():
            if key in self._tables:
                table = self._tables[key]
                of = torch.tensor(table.structure_at, device="cpu")
                total = found.new_zeros(table.group.structures).scatter_add_(0, of, found)
                decision.scores[table.group.root] = total / of.bincount()
        return decision

    @property
    def _importance(self) -> str:
        importance = self.upstream.importance
        return getattr(importance, "__name__", type(importance).__name__)

    def _hint(self) -> str:
        importance = self.upstream.importance
        if isinstance(importance, _OBDC) and not importance.steps:
            return (
                "; it has no sums of gradients yet: run its _prepare_model(model, pruner), "
                "backward passes and its step() before, as torch-pruning's examples do"
            )
        if any(p.grad is not None for p in self.model.parameters()):
            return ""
        return (
            "; the model has no gradients: if the importance needs them, run backward() before "
            "attach(), or give first=1, so that the decision falls in the first step"
        )

    def _note(self, decision: Decision, group: Any) -> None:
        """One group of a step, as structures."""
        name = self._graph._module2name[group[0].dep.target.module]
        table = self._tables.get(self._key(group))
        if table is None:
            raise AdapterError(
                f"{self.name} takes channels of {name!r}, whose group was not to be pruned; give "
                "its layers a ratio of 0, or put them into its ignored_layers"
            )
        positions = set(group[0].idxs)
        chosen = sorted({table.structure_at[p] for p in positions})
        whole = {p for p, k in enumerate(table.structure_at) if k in set(chosen)}
        if whole != positions:
            raise AdapterError(
                f"{self.name} takes channels {sorted(positions)[:8]} of {name!r} without "
                f"{sorted(whole - positions)[:8]}, which go with them; rank them as one by its "
                "out_channel_groups"
            )
        before = decision.structures.setdefault(table.group.root, [])
        before[:] = sorted({*before, *chosen})

    def decide_all(self, example: Any, progress: Callable[[str], object] = str) -> Decision:
        """What the pruner's remaining steps take out, each from what those before it leave.

        The model stays as it is, and all steps are counted. Structures are numbered as they are
        now; those that would stay have the scores of the last step.

        Args:
            example: of the model's inputs, on its device.
            progress: called before every step but the first.

        Raises:
            AdapterError: as :meth:`decide`.
        """
        if self.steps - self.step < 2:
            return self.decide()
        up, decision = self.upstream, Decision()
        before = {name: dict(getattr(up, name)) for name in _COUNTED}
        left = {t.group.root: list(range(t.group.structures)) for t in self._tables.values()}
        size, kept = {root: len(numbers) for root, numbers in left.items()}, self._state_of_all()
        try:
            while self.step < self.steps:
                step = self.decide()
                plan: Plan = []
                tables = {t.group.root: t.group for t in self._tables.values()}
                for root, scores in step.scores.items():
                    decision.scores[root] = scores.new_full((size[root],), torch.inf)
                    decision.scores[root][left[root]] = scores
                for root, gone in step.structures.items():
                    plan.append((root, tables[root].channels_of(gone)))
                    taken = decision.structures.get(root, []) + [left[root][k] for k in gone]
                    decision.structures[root] = sorted(taken)
                    left[root] = [n for k, n in enumerate(left[root]) if k not in set(gone)]
                decision.dropped = sorted({*decision.dropped, *step.dropped})
                if plan and self.step < self.steps:
                    progress(f"step {self.step + 1} of {self.steps} of {self.name}")
                    with self.removal(plan):
                        dependency.take_out(self.model, example, plan, self.build)
                    self.groups()
            counted = {name: dict(getattr(up, name)) for name in _COUNTED}
            for name, later in self._later.items():
                counted[name].update(later)
        finally:
            running.put_back(kept)
            self.groups()
        up.current_step = self.steps
        for name in _PARTS:
            now = counted[name]
            self._later[name] = {m: n for m, n in now.items() if before[name].get(m) != n}
        up._scope_initial_channels.update(counted["_scope_initial_channels"])
        return decision

    def _state_of_all(self) -> running.Attributes:
        """Whatever a removal changes: of model, pruner, importance and graph."""
        nodes = list(self._graph.module2node.values())
        things = [*self.model.modules(), self.upstream, self._graph, *nodes]
        things += [d for node in nodes for d in node.dependencies]
        things += [n.module for n in nodes if not isinstance(n.module, nn.Parameter)]
        if hasattr(self.upstream.importance, "__dict__"):
            things.append(self.upstream.importance)
        return running.attributes_of({id(thing): thing for thing in things}.values())

    # ------------------------------------------------------------------ removal

    def build(self, model: nn.Module, example: Any = None) -> Any:
        """The pruner's graph; of a copy of its model one of the same layers by name.

        The copy's own operations between layers can be changed without touching the pruner's.
        """
        built = self._graph
        names: dict[Any, str] = {m: n for n, m in self.model.named_modules()}
        own = {p: n for n, p in self.model.named_parameters()}
        layers = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stand_ins: dict[Any, Any] = {}
        nodes: dict[Any, Any] = {}

        def layer(module: Any) -> Any:
            if module in names:
                return layers[names[module]]
            if module in own:
                return parameters[own[module]]
            if module not in stand_ins:
                stand_ins[module] = copy.copy(module)
                for key, value in vars(module).items():
                    if isinstance(value, list):  # upstream changes them in place
                        setattr(stand_ins[module], key, list(value))
            return stand_ins[module]

        def node(given: Any) -> Any:
            if given not in nodes:
                nodes[given] = copy.copy(given)
            return nodes[given]

        twin = copy.copy(built)
        twin.module2node = {layer(m): node(n) for m, n in built.module2node.items()}
        done: set[Any] = set()
        while len(done) < len(nodes):
            for given in [n for n in nodes if n not in done]:
                done.add(given)
                here = nodes[given]
                here.module = layer(given.module)
                here.inputs = [node(n) for n in given.inputs]
                here.outputs = [node(n) for n in given.outputs]
                here.dependencies = [copy.copy(d) for d in given.dependencies]
                for dep in here.dependencies:
                    dep.source, dep.target = node(dep.source), node(dep.target)
                    dep.index_mapping = list(dep.index_mapping)
        twin.model = model
        twin._module2name = {
            layer(m): n for m, n in built._module2name.items() if m in names or m in own
        }
        twin._param_to_name = {layer(p): n for p, n in built._param_to_name.items() if p in own}
        twin.unwrapped_parameters = [
            (layer(p), dim) for p, dim in built.unwrapped_parameters if p in own
        ]
        twin.ignored_params = [layer(p) for p in built.ignored_params if p in own]
        twin.IGNORED_LAYERS_IN_TRACING = [layer(m) for m in built.IGNORED_LAYERS_IN_TRACING]
        twin._pruning_history = []
        twin.put_out = getattr(built, "put_out", set())
        twin.heads, twin.counted = built.heads, built.counted
        if self._adapt is None and example is not None and self.upstream.prune_num_heads:
            twin.counted = heads.find(model, example)
        twin.roots = tuple(self.upstream.root_module_types)
        twin.maps_valid, twin.adapt = False, self._adapt
        return twin

    @contextmanager
    def removal(self, plan: Plan) -> Iterator[None]:
        """While the model loses some channels: afterwards the pruner knows it as it is then."""
        up, built = self.upstream, self._graph
        with self._at_work():
            wholes = [graph.whole(built, self.model.get_submodule(n), c) for n, c in plan]
            taken = dependency.gathered(built, self.model, plan)
        yield
        for whole in wholes:
            if isinstance(up.importance, _OBDC):
                up.importance.adjust_fisher(whole, list(whole[0].idxs))
            root = built._module2name[whole[0].dep.target.module]
            built._pruning_history.append([root, True, list(whole[0].idxs)])
        layers = set(self.model.modules())
        with maps.removing(built, *(whole.met for whole in wholes)):
            for dep, positions in taken:
                module = dep.target.module
                if isinstance(module, nn.Parameter):
                    self._exchange(module)
                elif module not in layers:  # an operation between layers
                    dep(positions)
        for name, later in self._later.items():
            getattr(up, name).update(later)
        self._later = {}
        with self._at_work(), torch.no_grad():
            up.update_regularizer()

    def _exchange(self, old: nn.Parameter) -> None:
        """A bare parameter is another object now."""
        built = self._graph
        name = built._param_to_name.pop(old)
        new = self.model.get_parameter(name)
        built._param_to_name[new] = name
        built._module2name[new] = built._module2name.pop(old)
        built.module2node[new] = built.module2node.pop(old)
        built.module2node[new].module = new
        built.unwrapped_parameters[:] = [
            (new, entry[1]) if entry[0] is old else entry for entry in built.unwrapped_parameters
        ]

    # ------------------------------------------------------------------ going on

    def state(self) -> dict[str, Any]:
        """What the pruner counts, for one that is constructed anew."""
        up, names = self.upstream, {m: n for n, m in self.model.named_modules()}
        return {
            "step": up.current_step,
            "scopes": dict(up._scope_initial_channels),
            "heads": {names[m]: h for m, h in up.num_heads.items() if m in names},
            "later": {
                name: {names[m]: n for m, n in later.items()} for name, later in self._later.items()
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the pruner count on from :meth:`state`."""
        up = self.upstream
        up.current_step = state["step"]
        up._scope_initial_channels.update(state["scopes"])
        for name, count in state["heads"].items():
            layer = self.model.get_submodule(name)
            up.num_heads[layer] = up.out_channel_groups[layer] = count
        self._later = {
            name: {self.model.get_submodule(layer): n for layer, n in later.items()}
            for name, later in state["later"].items()
        }


def remedy(root: str, why: str) -> str:
    """What a refusal says of a group, and what to do."""
    return (
        f"the group of {root!r} {why}. Put its layers into the pruner's ignored_layers, or give "
        "them a ratio of 0"
    )


@contextmanager
def _fisher_stays(importance: Any) -> Iterator[None]:
    """Upstream would cut its sums of gradients now; they are cut when the channels go."""
    if not isinstance(importance, _OBDC):
        yield
        return
    importance.adjust_fisher = lambda *_: None
    try:
        yield
    finally:
        del importance.adjust_fisher


def traced_example(pruner: Any) -> Any:
    """An input that a pruner's model runs on, as autograd has kept it since the pruner traced it.

    It is what the first layer has read, and so the example only where that reads it as it comes;
    but any input that the model runs on will do.

    Returns:
        ``None`` if there is none.
    """
    for node in pruner.DG.module2node.values():
        for kind in ("_saved_input", "_saved_mat1", "_saved_self", "_saved_indices"):
            with contextlib.suppress(Exception):  # not kept, or no input of the model
                found = getattr(node.grad_fn, kind, None)
                if isinstance(found, Tensor) and not found.requires_grad:
                    running.outputs(pruner.model, found)
                    return found
    return None
