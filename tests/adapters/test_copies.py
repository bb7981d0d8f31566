"""Models that are compiled, and models that hold what cannot be copied."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from dpm_core import SmoothPruning
from dpm_core.adapters.base import AdapterError
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions, structure_groups
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import load_pruned
from dpm_core.third_party import running
from tests.support.snapshot import refused

EXAMPLE = torch.randn(4, 6)
HALF = DepGraphOptions(ratio=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def eager(thing: Any) -> Any:
    """Compiled without code generation, which takes a minute."""
    return torch.compile(thing, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def part_in_place(model: Net) -> nn.Module:
    model.body.compile(backend="eager")
    return model


def method(model: Net) -> nn.Module:
    model.forward = eager(model.forward)
    return model


def method_of_a_part(model: Net) -> nn.Module:
    model.body.forward = eager(model.body.forward)  # of a class of PyTorch's own
    return model


def part(model: Net) -> nn.Module:
    model.body = eager(model.body)
    return model


def layer(model: Net) -> nn.Module:
    model.body[2] = eager(model.body[2])
    return model


SERVED = {"model": eager, "in place": in_place}
SERVED |= {"part in place": part_in_place, "method": method, "its method": method_of_a_part}
WRAPPED = {"part": part, "layer": layer, "all": lambda m: eager(part(layer(m)))}


def pruned(run: DepGraph, model: nn.Module) -> DepGraph:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    run.attach(optimizer)
    while not run.complete:
        optimizer.zero_grad()
        model(EXAMPLE).square().sum().backward()
        optimizer.step()
        if run.due:
            run.remove()
    return run


@pytest.mark.parametrize("how", SERVED)
def test_a_compiled_model_is_pruned_by_its_own_names(how, tmp_path):
    plain = Net()
    expected = pruned(DepGraph(plain, EXAMPLE, HALF, SmoothPruning(3)), plain)
    model = SERVED[how](Net())
    run = pruned(DepGraph(model, EXAMPLE, HALF, SmoothPruning(3)), model)
    assert run.removed == expected.removed
    assert sorted(run.dpm.groups) == ["body.0", "body.2"]
    run.removed.save(tmp_path / "small.safetensors", model)
    for again in (Net(), *(make(Net()) for make in SERVED.values())):
        load_pruned(tmp_path / "small.safetensors", again, EXAMPLE)
        torch.testing.assert_close(again(EXAMPLE), plain(EXAMPLE))


def test_a_pruner_of_a_compiled_model_is_refused():
    model = Net()
    own, of_compiled = (
        tp.pruner.BasePruner(
            m,
            EXAMPLE,
            tp.importance.MagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=[model.head],
        )
        for m in (model, eager(model))
    )
    with refused(AdapterError, "BasePruner was constructed of a compiled model", model=model):
        DepGraph(of_compiled, SmoothPruning(3), example=EXAMPLE)
    run = pruned(DepGraph(own, SmoothPruning(3), example=EXAMPLE), eager(model))
    assert sorted(name for name, _ in run.removed) == ["body.0", "body.2"]


@pytest.mark.parametrize("how", WRAPPED)
def test_compiled_parts_are_refused_by_name_and_served_in_files(how, tmp_path):
    model = WRAPPED[how](Net())
    with refused(AdapterError, "torch.compile wraps the part 'body", ".compile()", model=model):
        DepGraph(model, EXAMPLE, HALF, SmoothPruning(3))
    removal = Removal([("body.0", [1, 2]), ("body._orig_mod.2._orig_mod", [5])])
    assert [name for name, _ in removal] == ["body.0", "body.2"]
    removal.apply(model, EXAMPLE, torch.optim.Adam(model.parameters()), cut=True)
    assert running.compiled_parts(model)  # it is compiled as before
    removal.save(tmp_path / "small.safetensors", model)
    for again in (Net(), WRAPPED[how](Net())):
        load_pruned(tmp_path / "small.safetensors", again, EXAMPLE)
        torch.testing.assert_close(again(EXAMPLE), model(EXAMPLE))


def test_what_torchscript_has_made_is_refused():
    model = torch.jit.trace(Net(), EXAMPLE)
    with refused(AdapterError, "prune it before torch.jit", model=model):
        DepGraph(model, EXAMPLE, HALF)


# ---------------------------------------------------------------------- what cannot be copied


class Holding:
    """Something with a lock inside of it."""

    def __init__(self) -> None:
        self.lock, self.count = threading.RLock(), 0


HOLDING = Holding()
THINGS: dict[str, Callable[[Net], Any]] = {
    "lock": lambda m: threading.Lock(),
    "condition": lambda m: threading.Condition(),
    "generator": lambda m: (k for k in range(3)),
    "random numbers": lambda m: torch.Generator(),
    "file": lambda m: open(__file__),  # noqa: SIM115
    "module": lambda m: torch,
    "view": lambda m: {"a": 1}.keys(),
    "object": lambda m: Holding(),
    "nested": lambda m: {"a": [Holding(), (threading.Lock(), m.body)]},
    "reference": lambda m: weakref.ref(m.body),
    "proxy": lambda m: weakref.proxy(HOLDING),
    "set of references": lambda m: weakref.WeakSet([m.body]),
    "closure": lambda m: lambda x: m.body(x),
    "method": lambda m: m.forward,
    "bound": lambda m: functools.partial(m.forward),
    "history": lambda m: [{"kept": m.head.weight * 2}],
}


@pytest.mark.parametrize("what", THINGS)
def test_what_a_model_holds_besides_is_no_obstacle(what):
    plain, model = Net(), Net()
    model.body.thing = thing = THINGS[what](model)
    copied = running.copied(model)
    own = {id(p) for p in model.parameters()}
    assert own.isdisjoint(id(p) for p in copied.parameters())
    if what == "reference":
        assert copied.body.thing() is copied.body
    if what == "method":
        assert copied.body.thing.__self__ is copied
    torch.testing.assert_close(copied(EXAMPLE), model(EXAMPLE))
    if what == "nested":  # one of them to the end
        expected = pruned(DepGraph(plain, EXAMPLE, HALF, SmoothPruning(3)), plain)
        run = pruned(DepGraph(model, EXAMPLE, HALF, SmoothPruning(3)), model)
        assert run.removed == expected.removed
    assert model.body.thing is thing


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("a handle of a device")


def test_a_layer_that_cannot_be_copied_is_named():
    model = Net()
    model.body[2] = Stubborn(8, 8)
    with refused(running.UncopyableError, "'body.2' (Stubborn)", "__deepcopy__", model=model):
        DepGraph(model, EXAMPLE, HALF, SmoothPruning(3)).check()


def test_a_forward_pass_that_a_copy_would_not_have_is_refused():
    model = Net()
    own = model.forward
    model.forward = lambda x: own(x).float()
    with refused(running.UncopyableError, "'Net' has a forward function", "a method", model=model):
        DepGraph(model, EXAMPLE, HALF, SmoothPruning(3)).check()


def test_groups_of_a_compiled_model_have_its_own_names():
    groups = structure_groups(eager(Net()), EXAMPLE)
    assert sorted(g.name for g in groups) == ["body.0", "body.2"]


def test_an_average_inside_the_module_goes_through_the_same_removal():
    module = nn.Module()
    module.net = Net().double()
    module.ema = torch.optim.swa_utils.AveragedModel(module.net, avg_fn=lambda a, p, n: 0.9 * a + p)
    example = EXAMPLE.double()
    run = DepGraph(module.net, example, HALF, SmoothPruning(3))
    optimizer = torch.optim.SGD(module.net.parameters(), 0.05)
    run.attach(optimizer)
    while not run.due:
        optimizer.zero_grad()
        module.net(example).square().sum().backward()
        optimizer.step()
        module.ema.update_parameters(module.net)
    zeroed = running.copied(module.ema.module)
    run.dpm.zero_in(zeroed, module.net)
    removal = run.remove()
    with pytest.raises(RuntimeError):
        module.ema.update_parameters(module.net)
    removal.apply(module.ema.module, example, cut=True)
    torch.testing.assert_close(module.ema(example), zeroed(example))
    module.ema.update_parameters(module.net)
