"""The touch points in only_train_once 2.0.16 (OTOv2): its graph, its groups, its DHSPG optimizer.

What this file works around, all of it in that version, with the place in upstream's code:

- ``imp`` and ``distutils`` are imported (``__init__``, ``graph/graph``, ``transform/transforms``);
  Python 3.12 has neither. Stand-ins are there while upstream is imported.
- Its folder is appended to ``sys.path`` and top-level modules ``graph``, ``operation``,
  ``transform`` and ``assets`` are imported (``optimizer/dhspg``, ``zig/zig`` and others). They are
  gone afterwards, and a module of the user's of such a name is put back.
- ``torch.onnx._optimize_graph`` has moved in PyTorch (``graph/graph``, ``build``), and ``.cuda()``
  is called whatever the device (``optimizer/dhspg``); both are patched while upstream runs.
- It prints (``graph/graph``, ``zig/zig``, ``optimizer/dhspg``); here that is logging.
- Operators it does not know are written into a global table (``graph/graph``, ``build``), which is
  put back; a flatten and a mean over all positions are among the unknown ones, so that the
  component before them is never pruned. Here upstream is given them as known.
- Parameters of a component are a set (``graph/connected_component``), components are sorted by an
  id that depends on memory addresses (``zig/zig``, ``merge_connected_components``), and momentum
  is saved by position: another process would end in other bits. Here both are put into the model's
  order, and the state is saved by names.
- ``OTO`` leaves the model in eval mode.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import math
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from .groups import Share, UnsupportedLayerError, UpstreamGroup
from .running import device_of, evaluating
from .upstreams import require

require("only_train_once")

log = logging.getLogger(__name__)

STRAY = ("assets", "graph", "operation", "optimizer", "transform")
"""What upstream imports at the top level."""


def _stand_ins() -> dict[str, types.ModuleType]:
    names = ("imp", "distutils", "distutils.version")
    modules = {name: types.ModuleType(name) for name in names}
    modules["distutils.version"].LooseVersion = Version  # type: ignore[attr-defined]
    return modules


@contextmanager
def _importable() -> Iterator[None]:
    """Import upstream inside; afterwards ``sys`` is as before, except for ``only_train_once``."""
    spec = importlib.util.find_spec("only_train_once")
    assert spec is not None
    assert spec.origin is not None
    replaced = {*STRAY, "imp", "distutils"}

    def present() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in replaced]

    hidden, path = {name: sys.modules.pop(name) for name in present()}, list(sys.path)
    sys.modules.update(_stand_ins())
    sys.path.insert(0, str(Path(spec.origin).parent))
    try:
        yield
    finally:
        for name in present():
            del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:] = path


with _importable():
    import only_train_once
    from only_train_once.graph import graph as _graph_module
    from only_train_once.optimizer import dhspg as _dhspg_module

OPERATORS: dict[str, Any] = _graph_module.OP_DICT
_OTO: Any = only_train_once.OTO
_DHSPG: Any = _dhspg_module.DHSPG
# PyTorch wraps a class's step once it has an instance; called inside ours, hooks would run twice.
_STEP = inspect.unwrap(_DHSPG.step)
_LINEAR = _dhspg_module.GROUP_TYPE["linear"]
"""Components of this type and above have zero-invariant groups."""


class _Log(io.TextIOBase):
    """What upstream prints, as log lines."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def _optimize_graph() -> Any:
    for place in ("torch.onnx._internal.torchscript_exporter.utils", "torch.onnx.utils"):
        with contextlib.suppress(ImportError):
            function = getattr(importlib.import_module(place), "_optimize_graph", None)
            if function is not None:
                return function
    raise ImportError(
        f"torch {torch.__version__} has no _optimize_graph where only_train_once needs it; install "
        "a version that pyproject.toml asks for"
    )


@contextmanager
def running(device: torch.device) -> Iterator[None]:
    """Run upstream inside: its prints are logged; ``.cuda()``, and a default device, is ``device``.

    Patches the whole process, so that upstream must not run in two threads at once.
    """

    def cuda(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor.to(device)

    before = torch.Tensor.__dict__.get("cuda")
    torch.Tensor.cuda = cuda  # type: ignore[assignment,method-assign]
    try:
        chosen = torch.get_default_device().type != "cpu"
        with contextlib.redirect_stdout(_Log()), device if chosen else contextlib.nullcontext():
            yield
    finally:
        if before is None:
            del torch.Tensor.cuda
        else:
            torch.Tensor.cuda = before  # type: ignore[method-assign]


class OTO(_OTO):  # type: ignore[misc]
    """Upstream's ``OTO``, to be used as its README has it, on today's PyTorch and on any device.

    ::

        from dpm_core.third_party.otov2 import OTO  # from then on also: from only_train_once ...

        oto = OTO(model, dummy_input)
        optimizer = oto.dhspg(variant="sgd", lr=0.1, target_group_sparsity=0.7)

    Args:
        model: stays in its mode.
        dummy_input: of its inputs, on its device: a tensor, several in a tuple or list, or by name.
    """

    def initialize(self, model: nn.Module | None = None, dummy_input: Any = None) -> None:
        """Trace the model; upstream's first half of the constructor."""
        if model is None or dummy_input is None:
            raise UnsupportedLayerError("OTO traces the model: give model and dummy_input")
        given = tuple(dummy_input) if isinstance(dummy_input, list) else dummy_input
        with evaluating(model), self._at_work(model, given):
            super().initialize(model, given)
            for node in self._graph.nodes.values():
                if _keeps_channels(node):
                    node.op = _graph_module.Operator(name=node.op.name, zero_invariant=True)

    def partition_zigs(self) -> None:
        """Find the zero-invariant groups; upstream's second half of the constructor."""
        with evaluating(self._model), self._at_work(self._model, self._dummy_input):
            super().partition_zigs()
        _put_in_order(self, self._model)

    def dhspg(self, lr: float = 0.1, **settings: Any) -> DHSPG:
        """Upstream's optimizer, with upstream's settings by their names."""
        self._optimizer = DHSPG(self, lr=lr, **settings)
        return self._optimizer

    def compress(self, *given: Any, **settings: Any) -> None:
        """Upstream's small model, an ONNX file beside one of the full size; see its own."""
        with (
            evaluating(self._model),
            self._at_work(self._model, self._dummy_input),
            _statistics_at_zero(self, self._model),
            _exporting(),
        ):
            super().compress(*given, **settings)

    def compute_flops(self, compressed: bool = False, verbose: bool = False) -> Any:
        """Upstream's."""
        with self._at_work(self._model, self._dummy_input):
            return super().compute_flops(compressed, verbose)

    @staticmethod
    @contextmanager
    def _at_work(model: nn.Module, example: Any) -> Iterator[None]:
        operators, had = dict(OPERATORS), hasattr(torch.onnx, "_optimize_graph")
        if not had:
            torch.onnx._optimize_graph = _optimize_graph()  # type: ignore[attr-defined]
        try:
            with running(device_of(example, model)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            OPERATORS.clear()
            OPERATORS.update(operators)
            if not had:
                del torch.onnx._optimize_graph  # type: ignore[attr-defined]


only_train_once.OTO = OTO  # for the import that stands in upstream's README


def graph(model: nn.Module, example: Any) -> OTO:
    """Upstream's ``OTO`` of a model: its graph, partitioned into zero-invariant groups.

    Args:
        model: stays in its mode.
        example: of its inputs, on its device: a tensor, or several in a tuple or list, or by name.
    """
    return OTO(model, example)


@contextmanager
def _statistics_at_zero(oto: OTO, model: nn.Module) -> Iterator[None]:
    """Upstream takes a structure for zero only where its running statistics are, too."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for group in groups(oto, model):
            gone = (group_norms(group) == 0).nonzero()[:, 0].tolist()
            for share in group.shares:
                layer = model.get_submodule(share.name.rpartition(".")[0])
                if not share.batch_norm or not share.name.endswith(".weight"):
                    continue
                at = [p for k in gone for p in share.index[k]]
                for buffer in (layer.running_mean, layer.running_var):
                    if isinstance(buffer, Tensor):
                        kept.append((buffer, buffer.clone()))
                        buffer[at] = 0
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@torch.no_grad()
def group_norms(group: UpstreamGroup) -> Tensor:
    """The largest magnitude in each of a group's structures, (K,)."""
    most = torch.zeros(group.structures, device="cpu")
    for share in group.shares:
        rows = share.parameter.movedim(share.dim, 0)[
            torch.tensor(share.index, device="cpu")
        ].flatten(1)
        most = torch.maximum(most, rows.abs().amax(1).float().cpu())
    return most


@contextmanager
def _exporting() -> Iterator[None]:
    """Upstream's exporter was the one that keeps a graph's parameters apart and by their names."""
    export = torch.onnx.export

    def by_names(model: Any, given: Any, path: Any, **settings: Any) -> Any:
        import onnx

        done = export(
            model, given, path, **settings, dynamo=False, keep_initializers_as_inputs=True
        )
        written = onnx.load(path)
        names = {tensor.name for tensor in written.graph.initializer}
        inputs = [i for i in written.graph.input if i.name not in names]
        del written.graph.input[:]
        written.graph.input.extend(inputs)
        onnx.save(written, path)
        return done

    torch.onnx.export = by_names  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.onnx.export = export


def _keeps_channels(node: Any) -> bool:
    """Whether a flatten or mean that upstream does not know leaves channels apart, in dimension 1.

    A mean's axes are not in the node, so its shapes decide. Where they mislead, the trial that
    precedes every run refuses the model.
    """
    shape, given = node.output_shape, node.input_shape[0] if node.input_shape else None
    if not shape or not given:
        return False
    if node.op.name == "flatten":
        return bool(node.op_params.get("axis") == 1)
    if node.op.name != "reducemean":
        return False
    rest = len(given) - 2 if node.op_params.get("keepdims", 1) else 0
    return bool(shape == [*given[:2], *[1] * rest])


def _put_in_order(oto: Any, model: nn.Module) -> None:
    """Make upstream return its parameter groups in the model's order."""
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    stems = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    upstream = oto._graph.params_groups

    def params_groups(epsilon: Any = ()) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = list(upstream(epsilon=epsilon))
        first: dict[str, int] = {}
        for group in groups:
            group["names"] = sorted(group["names"], key=order.__getitem__)
            group["params"] = [oto._graph.params_grad[name] for name in group["names"]]
            group["shapes"] = [p.shape for p in group["params"]]
            first[group["cc_id"]] = order[group["names"][0]]
            layers = [name.rpartition(".")[0] for name in group["names"]]
            stem = (layer for layer in layers if isinstance(model.get_submodule(layer), stems))
            group["root"] = next(stem, layers[0])  # ours: what the component is called
        for group in groups:
            group["auxiliary_ccs"].sort(key=lambda entry: (first[entry[0]], entry[1]))
        return sorted(groups, key=lambda group: first[group["cc_id"]])

    oto._graph.params_groups = params_groups


# ---------------------------------------------------------------------- groups


def groups(oto: Any, model: nn.Module) -> list[UpstreamGroup]:
    """The zero-invariant groups of each connected component that upstream may prune.

    Args:
        oto: what :func:`graph` returned.
        model: the model that it was given.

    Raises:
        UnsupportedLayerError: a component's parameters disagree on its number of structures, or
            upstream lists a parameter twice.
    """
    listed = oto._graph.params_groups()
    for name, times in Counter(name for group in listed for name in group["names"]).items():
        if times > 1:
            raise UnsupportedLayerError(
                f"upstream has {name!r} in {times} components, as where a layer runs more than "
                "once, so its optimizer cannot be constructed; prune this model with DepGraph"
            )
    names = {group["cc_id"]: group["names"] for group in listed}
    parameters = dict(model.named_parameters())
    tables = []
    for group in listed:
        if group["group_type"] < _LINEAR:
            continue
        size, root = group["num_groups"], group["root"]
        table = UpstreamGroup(root, [[k] for k in range(size)])
        norms: dict[tuple[str, int], None] = {}
        producers: dict[tuple[str, int], None] = {}
        places = [(name, 0) for name in group["names"]]
        places += [(n, offset) for cc, offset in group["auxiliary_ccs"] for n in names[cc]]
        for name, offset in places:
            layer, parameter = name.rpartition(".")[0], parameters[name]
            norm = isinstance(model.get_submodule(layer), nn.modules.batchnorm._BatchNorm)
            if offset == 0 and name in group["names"] and parameter.shape[0] != size:
                raise UnsupportedLayerError(
                    f"upstream's component of {root!r} has {size} structures, but {name!r} has "
                    f"{parameter.shape[0]} rows: its groups do not fit this model"
                )
            index = [[offset + k] for k in range(size)]
            table.shares.append(Share(name, parameter, 0, norm, index))
            (norms if norm else producers)[layer, offset] = None
        for layer, offset in norms or producers:
            module = model.get_submodule(layer)
            index = [[offset + k] for k in range(size)]
            table.owners.append((module, -1 if isinstance(module, nn.Linear) else 1, index))
        tables.append(table)
    return tables


def unpruned(oto: Any) -> dict[str, str]:
    """Layers that upstream leaves whole, by name, and why."""
    graph, reasons = oto._graph, {}
    for component in graph.connected_components.values():
        if component.type >= _LINEAR or not component.params:
            continue
        if component.contain_output_nodes(graph.output_nodes):
            why = "makes the network's output"
        elif component.contain_non_zero_invariant_nodes():
            odd = {n.op.name for n in component.nodes.values() if not n.is_zero_invariant()}
            why = f"feeds operators that upstream does not know: {', '.join(sorted(odd))}"
        elif component.is_auxilary():
            continue  # pruned with the components before its concatenation
        else:
            why = "is frozen"
        for name in sorted(component.params):
            reasons[name.rpartition(".")[0]] = why
    return reasons


def most(size: int, unit: int) -> int:
    """How many of a component's structures may go, so that a multiple of ``unit`` is left."""
    return size - unit if size > unit else 0


def blocks(scores: Mapping[str, Tensor], unit: int, wanted: int) -> dict[str, Tensor]:
    """Choose structures to go, so that every component keeps a multiple of them (ours).

    A component loses none, or as many as lead to a multiple, and then block after block, each of
    the structures that rank highest. Of all components' next blocks that with the highest mean
    score is taken, until enough structures are.

    Args:
        scores: by component, (K,); the highest go first.
        unit: what a component that loses structures keeps a multiple of, and that many at least.
        wanted: how many are to go at least; all that may, where that is fewer.

    Returns:
        By component, which go, (K,) bool: fewer than ``unit`` beyond ``wanted``.
    """
    order = {name: s.argsort(descending=True, stable=True) for name, s in scores.items()}
    ranked: list[tuple[float, str, int]] = []
    for name, s in scores.items():
        start, going, score = 0, most(len(s), unit), math.inf
        while start < going:
            end = start + (len(s) % unit or unit if start == 0 else unit)
            # No block goes before those that it stands behind, however their means are rounded.
            score = min(score, float(s[order[name][start:end]].mean()))
            ranked.append((score, name, end))
            start = end
    counts = dict.fromkeys(scores, 0)
    for _, name, end in sorted(ranked, key=lambda block: -block[0]):  # of equal ones the first
        if sum(counts.values()) >= wanted:
            break
        counts[name] = end
    return {
        name: torch.zeros_like(s, dtype=torch.bool).index_fill(0, order[name][: counts[name]], True)
        for name, s in scores.items()
    }


# ---------------------------------------------------------------------- the optimizer


class DHSPG(_DHSPG):  # type: ignore[misc]
    """Upstream's optimizer as it is, on any device, and saved by names.

    Args:
        oto: what :func:`graph` returned.
        settings: upstream's own, by upstream's own names.

    Attributes:
        round_to: components of which structures go keep a multiple of so many. Ours: upstream's
            ``group_divisible`` rounds what stays either way, so that its target may be missed, and
            ends the penalty where enough structures are zero, whatever the widths. Set it before
            G_p is chosen.
        pending: with that, how many structures of G_p were not zero after the last step.
    """

    round_to: int = 1
    pending: int = 0

    def __init__(self, oto: Any, **settings: Any) -> None:
        given = oto._graph.params_groups(epsilon=settings.get("epsilon", 0.0))
        self.device = given[0]["params"][0].device
        with running(self.device):
            super().__init__(given, **settings)

    def step(self, closure: Any = None) -> Any:
        """Upstream's step."""
        with running(self.device):
            return _STEP(self, closure)

    def compute_group_sparsity_omega(self) -> Any:
        """Upstream's share of structures at zero, and the sum of all norms."""
        if self.round_to > 1 and self.partitioned:
            self.pending = self._pending()
        with running(self.device):
            return super().compute_group_sparsity_omega()

    def _pending(self) -> int:
        left = torch.zeros((), dtype=torch.int64, device=self.device)
        for group in self.zero_invariant.values():
            x = torch.cat(self.get_xs_grads(group, require_grad=False)[0], dim=1)
            left += (x[group["magnitude_penalize_bool"]] != 0).any(1).sum()
        return int(left)

    def reach_target_group_sparsity(self) -> bool:
        """Whether enough structures are zero: upstream asks this before it penalises."""
        if self.round_to > 1 and self.partitioned:
            return self.pending == 0
        return bool(super().reach_target_group_sparsity())

    def partition_groups(self) -> None:
        """Upstream's choice of G_p; where widths are rounded, in whole blocks by its scores."""
        super().partition_groups()
        if self.round_to > 1:
            share = self.target_group_sparsity * self.structures()
            chosen = blocks(self.saliency(), self.round_to, math.ceil(share - 1e-9))
            for name, group in self.zero_invariant.items():
                self._set_mask(group, chosen[name])
            self.pending = self._pending()

    def saliency(self) -> dict[str, Tensor]:
        """What upstream ranks structures by in :meth:`partition_groups`; the highest go first.

        Source: OTOv2, arXiv 2303.06862, saliency score: half the cosine between weights and
        gradient, half the inverse of the mean magnitude, each normalised over all structures.

        Returns:
            (K,) by component.
        """
        cosines, magnitudes = [], []
        for group in self.zero_invariant.values():
            x, gradient = (torch.cat(t, dim=1) for t in self.get_xs_grads(group))
            cosines.append(functional.cosine_similarity(-x, -gradient))
            magnitudes.append(torch.norm(x, dim=1) / x.shape[1])
        scores = functional.normalize(torch.cat(cosines), dim=0)
        scores = scores + functional.normalize(1 / (torch.cat(magnitudes) + 1e-6), dim=0)
        sizes = [len(c) for c in cosines]
        return dict(zip(self.zero_invariant, (scores / 2).split(sizes), strict=True))

    def compute_norm_group_partitions(self) -> Any:
        """Upstream's sums of norms, and counts, in G_p and outside."""
        with running(self.device):
            return super().compute_norm_group_partitions()

    @property
    def partitioned(self) -> bool:
        """Whether G_p, the structures to be penalised, has been chosen."""
        return bool(self.param_groups[0]["partitoned"])

    @property
    def zero_invariant(self) -> dict[str, dict[str, Any]]:
        """The parameter groups with zero-invariant groups, by their root layer's name."""
        return {g["root"]: g for g in self.param_groups if g["group_type"] >= _LINEAR}

    def structures(self) -> int:
        """How many structures there are."""
        return sum(group["num_groups"] for group in self.zero_invariant.values())

    def penalised(self) -> int:
        """How many structures are in G_p."""
        return sum(group["num_groups_g_p"] for group in self.zero_invariant.values())

    def zeros(self) -> int:
        """How many structures were zero after the last step."""
        return round(float(self.curr_group_sparsity) * self.structures())

    # Upstream's own entries of a parameter group that a step changes.
    _COUNTS = ("num_steps", "partitoned", "num_groups_g_p", "num_groups_g_np")
    _BUFFERS = ("first", "second")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, by the names of parameters."""
        saved: dict[str, Any] = {"sparsity": float(self.curr_group_sparsity), "groups": {}}
        if self.round_to > 1:
            saved["pending"] = self.pending
        for i, group in enumerate(self.param_groups):
            entry: dict[str, Any] = {name: group[name] for name in (*self._COUNTS, "lr")}
            entry["mask"] = group.get("magnitude_penalize_bool")
            for kind in self._BUFFERS:
                entry[kind] = {
                    name: group[key]
                    for j, name in enumerate(group["names"])
                    if (key := self._buffer(kind, i, j)) in group
                }
            saved["groups"][group["root"]] = entry
        return saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, after checking that it fits.

        Raises:
            ValueError: it is of another model, or damaged. Nothing was assigned.
        """
        try:
            sound = self._fits(state)
        except (AttributeError, KeyError, TypeError):
            sound = False
        if not sound:
            raise ValueError(
                f"this is no state of {type(self).__name__} for this model; load it with the "
                "variant and the model it was saved for"
            )
        self.curr_group_sparsity = np.asarray(state["sparsity"], dtype=np.float32)
        self.pending = state.get("pending", 0)
        for i, group in enumerate(self.param_groups):
            entry = state["groups"][group["root"]]
            group.update({name: entry[name] for name in (*self._COUNTS, "lr")})
            if entry["mask"] is not None:
                self._set_mask(group, entry["mask"].to(self.device))
            else:
                group.pop("magnitude_penalize_bool", None)
            for kind in self._BUFFERS:
                for j, name in enumerate(group["names"]):
                    key, like = self._buffer(kind, i, j), group["params"][j]
                    group.pop(key, None)
                    if name in entry[kind]:
                        group[key] = entry[kind][name].to(like.device, like.dtype).clone()

    def _fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has the entries of this optimizer's own. It may raise if not."""
        groups = {group["root"]: group for group in self.param_groups}
        entries = state["groups"]
        return (
            entries.keys() == groups.keys()
            and isinstance(state["sparsity"], float)
            and (self.round_to == 1) == ("pending" not in state)
            and isinstance(state.get("pending", 0), int)
            and all(
                set(entry) == {*self._COUNTS, *self._BUFFERS, "lr", "mask"}
                and all(isinstance(entry[name], int) for name in self._COUNTS)
                and isinstance(entry["lr"], float | int)
                and (entry["mask"] is None or self._is_mask(entry["mask"], groups[root]))
                and all(
                    value.shape == dict(zip(group["names"], group["shapes"], strict=True))[name]
                    for group in [groups[root]]
                    for kind in self._BUFFERS
                    for name, value in entry[kind].items()
                )
                for root, entry in entries.items()
            )
        )

    @staticmethod
    def _is_mask(mask: Tensor, group: dict[str, Any]) -> bool:
        return bool(mask.dtype == torch.bool and mask.shape == (group["num_groups"],))

    @staticmethod
    def _buffer(kind: str, i: int, j: int) -> str:
        return f"grad_{kind}_moment_buffer_group_{i}_param_{j}"

    @staticmethod
    def _set_mask(group: dict[str, Any], mask: Tensor) -> None:
        """Put some structures of a component into G_p; all of upstream's entries follow."""
        group["magnitude_penalize_bool"] = mask
        group["magnitude_penalize"] = mask.nonzero()[:, 0].cpu().numpy()
        group["not_magnitude_penalize"] = (~mask).nonzero()[:, 0].cpu().numpy()
        group["num_groups_g_p"] = len(group["magnitude_penalize"])
        group["num_groups_g_np"] = len(group["not_magnitude_penalize"])


class DeferringDHSPG(DHSPG):
    """Reports which structures upstream would zero in a step, and leaves them as they are.

    Attributes:
        reached: whether enough structures are zero or on their way; upstream's penalty then ends.
        wanted: after a step, for each component whose projection ran: which of its structures
            upstream would have zeroed, (K,) bool, and their <x_hat, x> / ||x||^2, (K,).
        scores: the saliency by which G_p was chosen, (K,) for each component; the highest go first.
    """

    def __init__(self, oto: Any, **settings: Any) -> None:
        super().__init__(oto, **settings)
        self._start()

    @classmethod
    def of(cls, optimizer: DHSPG) -> DeferringDHSPG:
        """An optimizer that is at work already, which from now on is one of this class.

        Raises:
            UnsupportedLayerError: it has chosen G_p, by scores that it did not keep.
        """
        if isinstance(optimizer, DeferringDHSPG):
            return optimizer
        if optimizer.partitioned:
            raise UnsupportedLayerError(
                "DHSPG has chosen already what goes; take it over before its step "
                f"{optimizer.partition_step + 1}, best where it is constructed"
            )
        optimizer.__class__ = cls
        assert isinstance(optimizer, DeferringDHSPG)
        optimizer._start()
        return optimizer

    def _start(self) -> None:
        self.reached = False
        self.wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self.scores: dict[str, Tensor] = {}
        self._projected: tuple[Tensor, Tensor] | None = None

    def compute_grad_variant(self) -> None:
        """Upstream's first act in a step.

        The step itself is left to the base class: PyTorch wraps the step of every optimizer class,
        so a step that calls its base's step would run every hook twice.
        """
        self.wanted = {}
        super().compute_grad_variant()

    def reach_target_group_sparsity(self) -> bool:
        """Upstream asks this before it penalises."""
        return self.reached

    def _pending(self) -> int:
        return 0  # nothing here asks

    def half_space_project(
        self, hat_x: Tensor, x: Tensor, epsilon: float, upper_group_sparsity: float
    ) -> Tensor:
        """Let upstream project in one dimension, and note what it zeroed.

        It uses nothing of a row but <x_hat, x> and ||x||. A row of a single number with the same
        two values gives the same decision, without a copy of all rows.
        """
        norm = torch.linalg.vector_norm(x, dim=1)
        there = norm > 0
        along = torch.where(there, torch.linalg.vecdot(hat_x, x) / norm, 0.0)
        short = along.unsqueeze(1).clone()
        projected = super().half_space_project(
            short, norm.unsqueeze(1), epsilon, upper_group_sparsity
        )
        # What is zero from the start goes first: it counts towards the target as any other.
        self._projected = projected[:, 0] == 0, torch.where(there, along / norm, -torch.inf)
        return hat_x

    def update_xs(self, group: dict[str, Any], xs: list[Tensor], new: Tensor) -> None:
        """Upstream's update, which knows the component that was projected."""
        if self._projected is not None:
            mask = group["magnitude_penalize_bool"]
            wanted = torch.zeros_like(mask)
            ratio = torch.full(mask.shape, torch.inf, device=mask.device)
            wanted[mask], ratio[mask] = self._projected[0], self._projected[1].to(ratio.dtype)
            self.wanted[group["root"]] = wanted, ratio
            self._projected = None
        super().update_xs(group, xs, new)

    def partition_groups(self) -> None:
        """The base class's choice of G_p; the scores that it ranked by are kept for refills."""
        super().partition_groups()
        self.scores = self.saliency()

    def penalised_in(self, component: str) -> Tensor:
        """Which structures of a component are in G_p, (K,) bool on the host."""
        mask: Tensor = self.zero_invariant[component]["magnitude_penalize_bool"]
        return mask.cpu()

    def exchange(self, component: str, leave: Sequence[int], enter: Sequence[int]) -> None:
        """Take structures out of G_p, and others in."""
        group = self.zero_invariant[component]
        mask = group["magnitude_penalize_bool"].clone()
        mask[list(leave)] = False
        mask[list(enter)] = True
        self._set_mask(group, mask)

    def state_dict(self) -> dict[str, Any]:
        """The base class's state, and the scores."""
        return {**super().state_dict(), "scores": dict(self.scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The base class's state, and the scores."""
        super().load_state_dict(state)
        self.scores = {name: s.to(self.device) for name, s in state["scores"].items()}

    def _fits(self, state: Mapping[str, Any]) -> bool:
        sizes = {name: (group["num_groups"],) for name, group in self.zero_invariant.items()}
        shapes = {name: tuple(score.shape) for name, score in state["scores"].items()}
        return shapes in ({}, sizes) and super()._fits(state)
