"""OTOv2's touch points: nothing is left behind, groups are what has to be zero, DHSPG defers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dpm_core.adapters.depgraph import structure_groups
from dpm_core.third_party import otov2, upstreams
from experiments.inputs import models
from tests.support import rounding
from tests.support.frameworks import EXAMPLE, batch, small_resnet
from tests.support.snapshot import difference
from tests.third_party.otov2_nets import (
    IMAGES,
    KEPT,
    LABELS,
    WAYS,
    Concatenated,
    Ended,
    stir,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REPLACED = {*otov2.STRAY, "imp", "distutils"}


def traces() -> dict[str, Any]:
    """All that upstream would change in the process."""
    return {
        "path": list(sys.path),
        "modules": {n: m for n, m in sys.modules.items() if n.split(".")[0] in REPLACED},
        "cuda": torch.Tensor.__dict__.get("cuda"),
        "optimize": getattr(torch.onnx, "_optimize_graph", None),
        "operators": dict(otov2.OPERATORS),
        "stdout": sys.stdout,
        "random": torch.get_rng_state().tolist(),
    }


def concatenated(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return stir(Concatenated(), seed)


def backward(model: nn.Module, images: torch.Tensor = IMAGES, labels: Any = LABELS) -> None:
    model.zero_grad()
    images = images.to(next(model.parameters()).dtype)
    functional.cross_entropy(model.train()(images), labels).backward()


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"variant": "sgd", "lr": 0.05, "weight_decay": 1e-3},
    "momentum": {"variant": "sgd", "lr": 0.05, "first_momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"variant": "adam", "lr": 0.01},
    "adamw": {"variant": "adamw", "lr": 0.01, "weight_decay_type": "l1_norm"},
}
PRUNING = {
    "target_group_sparsity": 0.5,
    "tolerance_group_sparsity": 0.1,
    "start_pruning_steps": 2,
    "epsilon": 0.9,
    "lmbda": 3.0,
}


def optimizer(kind: type, model: nn.Module, example=IMAGES, **settings: Any) -> Any:
    return kind(otov2.graph(model, example), **{**SETTINGS["sgd"], **PRUNING, **settings})


# ---------------------------------------------------------------------- nothing is left behind


def test_an_import_leaves_nothing_behind_and_a_users_own_modules_alone(tmp_path):
    """A user has modules of the names that upstream puts at the top level."""
    for name in ("graph", "transform"):
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    (tmp_path / "operation").mkdir()
    (tmp_path / "operation" / "__init__.py").write_text("")
    (tmp_path / "operation" / "operator.py").write_text("MINE = 'operation.operator'\n")
    code = """
import io, json, sys, types
import torch
import graph as mine, operation.operator as inner
stand_in = sys.modules["imp"] = types.ModuleType("imp")  # as if loaded before
path, had = list(sys.path), hasattr(torch.onnx, "_optimize_graph")
def top():
    names = ("graph", "operation", "assets", "transform", "optimizer", "imp", "distutils")
    return {n for n in sys.modules if n.split(".")[0] in names}
before, printed, stdout = top(), io.StringIO(), sys.stdout
sys.stdout = printed
from dpm_core.third_party import otov2
sys.stdout = stdout
report = {
    "path": sys.path == path,
    "modules": sorted(top() ^ before),
    "graph": sys.modules["graph"] is mine,
    "operation": sys.modules["operation.operator"] is inner,
    "imp": sys.modules["imp"] is stand_in,
    "cuda": "cuda" in torch.Tensor.__dict__,
    "optimize": hasattr(torch.onnx, "_optimize_graph") == had,
    "printed": printed.getvalue(),
}
import graph, transform
from operation.operator import MINE
report["mine"] = [graph.MINE, transform.MINE, MINE]
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
oto = otov2.graph(model, torch.randn(2, 3, 8, 8))
report["groups"] = [g.root for g in otov2.groups(oto, model)]
print(json.dumps(report))
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "path": True,
        "modules": [],
        "graph": True,
        "operation": True,
        "imp": True,
        "cuda": False,
        "optimize": True,
        "printed": "",
        "mine": ["graph", "transform", "operation.operator"],
        "groups": ["0"],
    }


class Interrupted(Exception):  # noqa: N818  (none that anything expects)
    pass


def interrupt(*_: Any, **__: Any) -> None:
    raise Interrupted


@pytest.mark.parametrize("fails", [None, "tracing", "grouping"])
def test_a_graph_leaves_nothing_behind(monkeypatch, capfd, caplog, fails):
    model = Ended("flatten").train()  # a flatten is written into upstream's table of operators
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    if fails == "tracing":
        monkeypatch.setattr(otov2._graph_module.Graph, "_parse_tensors_info", interrupt)
    elif fails == "grouping":
        monkeypatch.setattr(otov2._graph_module.Graph, "set_zigs", interrupt)
    before = traces()
    with caplog.at_level("INFO"), contextlib.ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(Interrupted))
        otov2.graph(model, IMAGES)
    assert difference(before, traces()) is None
    assert [m.training for m in model.modules()] == modes
    assert capfd.readouterr().out == ""
    assert any("graph constructor" in r.message for r in caplog.records)


@pytest.mark.parametrize("fails", [False, True], ids=["quietly", "after an error"])
def test_a_step_leaves_nothing_behind(monkeypatch, capfd, caplog, fails):
    model = concatenated()
    dhspg = optimizer(otov2.DHSPG, model, start_pruning_steps=0)
    backward(model)
    if fails:
        monkeypatch.setattr(otov2._DHSPG, "update_xs", interrupt)
    before = traces()
    with caplog.at_level("INFO"), contextlib.ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(Interrupted))
        dhspg.step()
    assert difference(before, traces()) is None
    assert capfd.readouterr().out == ""
    assert any("partition_groups" in r.message for r in caplog.records)


def test_a_patch_of_the_users_own_is_put_back(monkeypatch):
    def theirs(tensor):
        raise AssertionError("upstream has called it")

    monkeypatch.setattr(torch.Tensor, "cuda", theirs, raising=False)
    model = concatenated()
    dhspg = optimizer(otov2.DHSPG, model, start_pruning_steps=0)
    backward(model)
    dhspg.step()
    assert torch.Tensor.__dict__["cuda"] is theirs


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(upstreams.UpstreamError, match=r"not installed.*\[otov2\]"):
        upstreams.require("only_train_once")


def test_another_version_is_refused_before_it_is_imported(monkeypatch):
    """3.x is another product, without DHSPG."""
    monkeypatch.setattr(metadata, "version", lambda name: "3.0.2")
    monkeypatch.setattr(otov2.importlib.util, "find_spec", interrupt)
    with pytest.raises(upstreams.UpstreamError, match=r"3\.0\.2.*2\.0\.16.*\[otov2\]"):
        importlib.reload(otov2)


# ---------------------------------------------------------------------- groups


def rows(group: Any) -> dict[str, list[list[int]]]:
    """The positions of each structure in each parameter, by name."""
    return {s.name: s.index if isinstance(s.index, list) else s.index.tolist() for s in group}


def counted(size: int, offset: int = 0) -> list[list[int]]:
    return [[offset + k] for k in range(size)]


def test_a_batch_norm_after_a_concatenation_belongs_to_each_part_at_its_offset():
    model = concatenated()
    by_root = {g.root: rows(g.shares) for g in otov2.groups(otov2.graph(model, IMAGES), model)}
    assert by_root == {
        "stem": {
            "stem.weight": counted(6),
            "norm.weight": counted(6),
            "norm.bias": counted(6),
            "both.weight": counted(6),
            "both.bias": counted(6),
            "all.weight": counted(6),
            "all.bias": counted(6),
        },
        "first": {
            "first.weight": counted(4),
            "first.bias": counted(4),
            "both.weight": counted(4, 6),
            "both.bias": counted(4, 6),
            "all.weight": counted(4, 6),
            "all.bias": counted(4, 6),
        },
        "second": {
            "second.weight": counted(3),
            "second.bias": counted(3),
            "all.weight": counted(3, 10),
            "all.bias": counted(3, 10),
        },
        "last": {
            "last.weight": counted(8),
            "last.bias": counted(8),
            "last_norm.weight": counted(8),
            "last_norm.bias": counted(8),
        },
    }


NETS = {
    "concatenated": (concatenated, IMAGES),
    "small": (small_resnet, EXAMPLE),
    # Upstream sorts by numbers as text; here they have two digits, then three.
    "deep": (lambda: models.VGG((4,) * 13, 3, 5), IMAGES),
    "vgg-digits": (lambda: models.build("vgg-digits", 1, 10, seed=0), torch.randn(2, 1, 8, 8)),
    "resnet20": (lambda: models.build("resnet20", 3, 10, seed=0), torch.randn(2, 3, 32, 32)),
}
nets = pytest.mark.parametrize("name", NETS)


@nets
def test_structures_are_those_of_the_dependency_graph(name):
    """Two frameworks, two ways to the same groups: residual layers, concatenations and all."""
    build, example = NETS[name]
    model = build()
    mine = otov2.groups(otov2.graph(model, example), model)
    theirs = structure_groups(model, example)
    assert sorted(map(str, (rows(g.shares) for g in mine))) == sorted(
        str({s: g[s] for s in order(model, g)}) for g in (rows(t.slices) for t in theirs)
    )


def order(model: nn.Module, names: Any) -> list[str]:
    listed = [name for name, _ in model.named_parameters()]
    return sorted(names, key=listed.index)


@nets
def test_groups_cover_all_that_is_not_left_whole_and_overlap_nowhere(name):
    build, example = NETS[name]
    model = build()
    oto = otov2.graph(model, example)
    claimed = {n: torch.zeros(len(p), dtype=torch.int64) for n, p in model.named_parameters()}
    for group in otov2.groups(oto, model):
        for share in group.shares:
            assert share.dim == 0
            assert share.parameter is dict(model.named_parameters())[share.name]
            claimed[share.name] += torch.bincount(
                torch.tensor(share.index).flatten(), minlength=len(share.parameter)
            )
    whole = otov2.unpruned(oto)
    for parameter, times in claimed.items():
        left = parameter.rpartition(".")[0] in whole
        assert (times == (0 if left else 1)).all(), parameter


@nets
def test_groups_and_their_shares_are_in_the_models_order(name):
    build, example = NETS[name]
    model = build()
    listed = [name for name, _ in model.named_parameters()]
    oto = otov2.graph(model, example)
    groups = otov2.groups(oto, model)
    assert [g.root for g in groups] == sorted(
        (g.root for g in groups), key=lambda root: listed.index(f"{root}.weight")
    )
    for group in groups:
        names = [s.name for s in group.shares]
        assert names == order(model, names)
        assert names[0] == f"{group.root}.weight"
    for listed_by_upstream in oto._graph.params_groups():
        names = listed_by_upstream["names"]
        assert names == order(model, names)
        mine = dict(model.named_parameters())
        assert all(p is mine[n] for n, p in zip(names, listed_by_upstream["params"], strict=True))


def test_batch_norm_owns_the_structures_it_follows():
    model = concatenated()
    groups = {g.root: g for g in otov2.groups(otov2.graph(model, IMAGES), model)}
    assert groups["second"].owners == [(model.all, 1, counted(3, 10))]
    assert groups["stem"].owners == [
        (model.norm, 1, counted(6)),
        (model.both, 1, counted(6)),
        (model.all, 1, counted(6)),
    ]
    for group in groups.values():
        assert all(s.batch_norm == ("norm" in s.name or "both" in s.name or "all" in s.name)
                   for s in group.shares)  # fmt: skip
    # Without one, the layer itself does; a linear layer's channels come last.
    model = small_resnet()
    groups = {g.root: g for g in otov2.groups(otov2.graph(model, EXAMPLE), model)}
    assert groups["last"].owners == [(model.last, 1, counted(10))]
    assert groups["hidden"].owners == [(model.hidden, -1, counted(14))]


@pytest.mark.parametrize("way", KEPT)
def test_what_comes_to_the_head_channel_by_channel_is_pruned(way):
    model = Ended(way)
    oto = otov2.graph(model, IMAGES)
    assert [(g.root, g.structures) for g in otov2.groups(oto, model)] == [("conv", 7)]
    assert otov2.unpruned(oto) == {"head": "makes the network's output"}


@pytest.mark.parametrize("way", ["mean over channels", "mean over columns"])
def test_a_mean_that_mixes_channels_or_leaves_positions_is_not_taken_for_one_that_does_not(way):
    model = Ended(way)
    oto = otov2.graph(model, IMAGES)
    assert otov2.groups(oto, model) == []
    why = "feeds operators that upstream does not know: reducemean"
    assert otov2.unpruned(oto) == {
        "conv": why,
        "norm": why,
        "head": "makes the network's output",
    }


def test_every_way_to_the_head_is_tested():
    assert {*KEPT, "mean over channels", "mean over columns"} < set(WAYS)


def test_a_frozen_layer_is_left_whole():
    model = small_resnet()
    model.inner.requires_grad_(False)
    model.inner_norm.requires_grad_(False)
    oto = otov2.graph(model, EXAMPLE)
    assert [g.root for g in otov2.groups(oto, model)] == ["stem", "last", "hidden"]
    whole = otov2.unpruned(oto)
    assert whole["inner"] == whole["inner_norm"] == "is frozen"


# ---------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("kind", [otov2.DHSPG, otov2.DeferringDHSPG])
def test_hooks_run_once_a_step(kind):
    """PyTorch wraps the step of every optimizer class."""
    for _ in range(2):  # with the second one the classes are wrapped already
        model = concatenated()
        dhspg = optimizer(kind, model)
        calls: list[str] = []
        dhspg.register_step_pre_hook(lambda *_, c=calls: c.append("pre"))
        dhspg.register_step_post_hook(lambda *_, c=calls: c.append("post"))
        for _ in range(3):
            backward(model)
            dhspg.step()
        assert calls == ["pre", "post"] * 3
        assert dhspg.param_groups[0]["num_steps"] == 3


def test_every_parameter_is_the_optimizers_once():
    model = concatenated()
    dhspg = optimizer(otov2.DHSPG, model)
    owned = [id(p) for group in dhspg.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def flat(group: Any, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """A component's structures as rows, (K, elements), from a tensor for each of its shares."""
    parts = [of(s)[torch.tensor(s.index)[:, 0]].reshape(group.structures, -1) for s in group.shares]
    return torch.cat(parts, 1)


def groups_of(model: nn.Module) -> list[Any]:
    return otov2.groups(otov2.graph(model, IMAGES), model)


def zero_rows(groups: list[Any]) -> dict[str, torch.Tensor]:
    """Which structures are zero, by the root of their component."""
    return {g.root: flat(g, lambda s: s.parameter.detach()).eq(0).all(1) for g in groups}


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_proposed_is_what_upstream_zeroes_in_that_step(settings):
    """One step of both from the same state, again and again along upstream's own way."""
    base = concatenated()
    upstream, groups = optimizer(otov2.DHSPG, base, **SETTINGS[settings]), groups_of(base)
    proposed, steps = 0, 0
    for _ in range(20):
        twin = copy.deepcopy(base)
        deferring = optimizer(otov2.DeferringDHSPG, twin, **SETTINGS[settings])
        deferring.load_state_dict({**copy.deepcopy(upstream.state_dict()), "scores": {}})
        deferring.reached = upstream.reach_target_group_sparsity()
        zero = zero_rows(groups)
        for model, dhspg in ((base, upstream), (twin, deferring)):
            backward(model)
            dhspg.step()
        gone = {name: now & ~zero[name] for name, now in zero_rows(groups).items()}
        nothing = {name: torch.zeros_like(mask) for name, mask in gone.items()}
        wanted = {**nothing, **{name: mask for name, (mask, _) in deferring.wanted.items()}}
        # What was zero before is proposed as well: it counts towards the target as any other.
        assert difference(gone, {name: mask & ~zero[name] for name, mask in wanted.items()}) is None
        now = sum(int(g.sum()) for g in gone.values())
        proposed, steps = proposed + now, steps + bool(now)
        # Those proposed are not zero, and all others are upstream's, bit for bit.
        for mine, theirs in zip(groups_of(twin), groups, strict=True):
            left, right = (flat(g, lambda s: s.parameter.detach()) for g in (mine, theirs))
            mask = gone[theirs.root]
            assert left[mask].ne(0).any(1).all()
            assert torch.equal(left[~mask], right[~mask])
    assert proposed >= 3
    assert steps > 1
    assert upstream.zeros() == proposed


def test_the_ratio_of_a_proposal_is_the_projection_on_what_was_there():
    model = concatenated()
    dhspg = optimizer(otov2.DeferringDHSPG, model, start_pruning_steps=0, weight_decay=0.0)
    groups = groups_of(model)
    model.double()  # from here on, since upstream follows only graphs in single precision
    backward(model)
    before = {g.root: flat(g, lambda s: s.parameter.detach()) for g in groups}
    dhspg.step()
    assert dhspg.wanted
    for group in groups:
        if group.root not in dhspg.wanted:
            continue
        mask = dhspg.penalised_in(group.root)
        _, ratio = dhspg.wanted[group.root]
        x, hat = before[group.root], flat(group, lambda s: s.parameter.detach())
        expected = (hat * x).sum(1) / x.square().sum(1)
        if mask.any():  # they are kept in single precision
            one, other = ratio[mask], expected[mask]
            rounding.assert_rounded(one, other.to(one.dtype), other)
        assert torch.isinf(ratio[~mask]).all()
        # Upstream's half-space.
        assert torch.equal(dhspg.wanted[group.root][0], ratio < PRUNING["epsilon"])


def test_with_enough_on_their_way_upstream_penalises_no_more():
    base, twin = concatenated(), concatenated().double()
    deferring = optimizer(otov2.DeferringDHSPG, base, start_pruning_steps=0)
    base.double()
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, weight_decay=1e-3)
    deferring.reached = True
    for _ in range(3):
        for model, dhspg in ((base, deferring), (twin, plain)):
            backward(model)
            dhspg.step()
        assert deferring.wanted == {}
    for (name, p), q in zip(base.named_parameters(), twin.parameters(), strict=True):
        rounding.assert_exact(p, q, name)


def plain_scores(groups: list[Any], weight_decay: float) -> torch.Tensor:
    """Upstream's saliency of every structure, written out: OTOv2, section 3.3."""
    cosines, norms = [], []
    for group in groups:
        x = flat(group, lambda s: s.parameter.detach())
        g = flat(group, lambda s: s.parameter.grad) + weight_decay * x
        cosines.append((x * g).sum(1) / (x.norm(dim=1) * g.norm(dim=1)))
        norms.append(x.norm(dim=1) / x.shape[1])
    cosine, inverse = torch.cat(cosines), 1 / (torch.cat(norms) + 1e-6)
    return 0.5 * cosine / cosine.norm() + 0.5 * inverse / inverse.norm()


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_the_scores_that_are_kept_are_those_by_which_upstream_chose(target, tolerance):
    model = concatenated()
    sizes = {"target_group_sparsity": target, "tolerance_group_sparsity": tolerance}
    dhspg = optimizer(otov2.DeferringDHSPG, model, start_pruning_steps=0, **sizes)
    groups = groups_of(model)
    model.double()
    backward(model)
    expected = plain_scores(groups, SETTINGS["sgd"]["weight_decay"])
    assert not dhspg.partitioned
    dhspg.step()
    assert dhspg.partitioned
    scores = torch.cat(list(dhspg.scores.values()))
    rounding.assert_exact(scores, expected)
    # The highest of all; of a component that is among them whole, its lowest is spared.
    top = torch.zeros(len(scores), dtype=torch.bool)
    top[scores.topk(int(len(scores) * min(target + tolerance, 0.999))).indices] = True
    for name, mask in zip(
        dhspg.scores, top.split([len(s) for s in dhspg.scores.values()]), strict=True
    ):
        if mask.all():
            mask[dhspg.scores[name].argmin()] = False
        assert torch.equal(dhspg.penalised_in(name), mask), name
    assert dhspg.penalised() == sum(int(dhspg.penalised_in(n).sum()) for n in dhspg.scores)
    assert dhspg.structures() == len(scores) == 21


def test_structures_are_exchanged_and_upstreams_own_entries_follow():
    model = concatenated()
    dhspg = optimizer(otov2.DeferringDHSPG, model, start_pruning_steps=0)
    backward(model)
    dhspg.step()
    name = max(dhspg.zero_invariant, key=lambda n: int(dhspg.penalised_in(n).sum()))
    mask = dhspg.penalised_in(name)
    leave, enter = int(mask.nonzero()[0]), int((~mask).nonzero()[0])
    penalised = dhspg.penalised()
    dhspg.exchange(name, (leave,), [enter])
    now = dhspg.penalised_in(name)
    assert not now[leave]
    assert now[enter]
    assert dhspg.penalised() == penalised
    group = dhspg.zero_invariant[name]
    assert group["magnitude_penalize"].tolist() == now.nonzero()[:, 0].tolist()
    assert group["not_magnitude_penalize"].tolist() == (~now).nonzero()[:, 0].tolist()
    # The penalty follows: what has entered is penalised in the next step, what has left is not.
    backward(model)
    dhspg.step()
    _, ratio = dhspg.wanted[name]
    assert torch.isfinite(ratio[enter])
    assert torch.isinf(ratio[leave])


# ---------------------------------------------------------------------- its state


def trained(kind: type, settings: str, steps: int, seed: int = 0) -> tuple[nn.Module, Any]:
    model = concatenated(seed)
    dhspg = optimizer(kind, model, **SETTINGS[settings])
    for _ in range(steps):
        backward(model)
        dhspg.step()
    return model, dhspg


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [otov2.DHSPG, otov2.DeferringDHSPG])
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_state_is_taken_up_and_training_ends_in_the_same_bits(kind, settings, steps):
    model, dhspg = trained(kind, settings, steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": dhspg.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # Into one that has trained on something else: nothing of it is to stay.
    other, again = trained(kind, settings, 3, seed=1)
    again.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["model"])
    assert difference(saved["optimizer"], again.state_dict()) is None
    for _ in range(4):
        for one, its in ((model, dhspg), (other, again)):
            backward(one)
            its.step()
    assert difference(dict(model.state_dict()), dict(other.state_dict())) is None
    assert difference(dhspg.state_dict(), again.state_dict()) is None


def test_a_state_goes_by_names():
    _, dhspg = trained(otov2.DeferringDHSPG, "adam", 3)
    state = dhspg.state_dict()
    assert set(state["groups"]) == {"stem", "first", "both", "second", "all", "last", "head"}
    assert set(state["groups"]["first"]["second"]) == {"first.weight", "first.bias"}
    assert set(state["scores"]) == {"stem", "first", "second", "last"}


def cut(state: dict[str, Any], *keys: Any) -> None:
    *path, last = keys
    for key in path:
        state = state[key]
    del state[last]


def put(state: dict[str, Any], value: Any, *keys: Any) -> None:
    *path, last = keys
    for key in path:
        state = state[key]
    state[last] = value


DAMAGES = {
    "nothing": lambda s: s.clear(),
    "no groups": lambda s: cut(s, "groups"),
    "groups that are none": lambda s: put(s, 3, "groups"),
    "a component less": lambda s: cut(s, "groups", "first"),
    "a component more": lambda s: put(s, s["groups"]["first"], "groups", "more"),
    "no sparsity": lambda s: cut(s, "sparsity"),
    "a sparsity of no number": lambda s: put(s, "high", "sparsity"),
    "no count of steps": lambda s: cut(s, "groups", "first", "num_steps"),
    "a count of no number": lambda s: put(s, "3", "groups", "first", "num_steps"),
    "no learning rate": lambda s: cut(s, "groups", "head", "lr"),
    "no mask": lambda s: cut(s, "groups", "first", "mask"),
    "a mask of another size": lambda s: put(
        s, torch.zeros(5, dtype=torch.bool), "groups", "first", "mask"
    ),
    "a mask of numbers": lambda s: put(s, torch.zeros(4), "groups", "first", "mask"),
    "no buffers": lambda s: cut(s, "groups", "last", "second"),
    "a buffer of another shape": lambda s: put(
        s, torch.zeros(2), "groups", "last", "second", "last.bias"
    ),
    "a buffer of another layer": lambda s: put(
        s, torch.zeros(8), "groups", "last", "second", "last.scale"
    ),
    "a buffer of numbers": lambda s: put(s, [0.0] * 8, "groups", "last", "second", "last.bias"),
    "no scores": lambda s: cut(s, "scores"),
    "scores of a component less": lambda s: cut(s, "scores", "first"),
    "scores of another size": lambda s: put(s, torch.zeros(5), "scores", "first"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_is_changed(damage):
    _, other = trained(otov2.DeferringDHSPG, "adam", 4)
    damaged = copy.deepcopy(other.state_dict())
    DAMAGES[damage](damaged)
    _, dhspg = trained(otov2.DeferringDHSPG, "adam", 3, seed=1)
    before = copy.deepcopy(dhspg.state_dict())
    with pytest.raises(ValueError, match="no state of DeferringDHSPG for this model"):
        dhspg.load_state_dict(damaged)
    assert difference(before, dhspg.state_dict()) is None


def test_a_foreign_state_is_refused_and_nothing_is_changed():
    _, dhspg = trained(otov2.DeferringDHSPG, "adam", 3)
    before = copy.deepcopy(dhspg.state_dict())
    _, base = trained(otov2.DHSPG, "adam", 3)
    model = small_resnet()
    of_another_model = optimizer(otov2.DeferringDHSPG, model, EXAMPLE, **SETTINGS["adam"])
    images, labels = batch(0)
    backward(model, images, labels)
    of_another_model.step()
    plain = torch.optim.SGD(concatenated().parameters(), lr=0.1)
    for foreign in (base.state_dict(), of_another_model.state_dict(), plain.state_dict(), None, []):
        with pytest.raises(ValueError, match="load it with the variant and the model"):
            dhspg.load_state_dict(foreign)
        assert difference(before, dhspg.state_dict()) is None
