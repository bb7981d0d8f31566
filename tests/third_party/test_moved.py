"""What a new release of PyTorch may have moved: what the project uses and nobody promises.

Each has a line here, tried by itself, so that a release that lacks it fails by its name. A scan of
the sources holds the list complete.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dpm_core.third_party import otov2, running

ROOT = Path(__file__).parents[2]
FOLDERS = "dpm_core", "adapters", "third_party", "experiments"


def step_hooks() -> object:
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return len(optimizer._optimizer_step_pre_hooks) == 1


def forward_hooks() -> object:
    layer = nn.Identity()
    layer.register_forward_pre_hook(lambda *_: None)
    return len(layer._forward_pre_hooks) == 1


def scaler_states() -> object:
    from torch.amp.grad_scaler import OptState

    scaler = torch.amp.GradScaler("cpu")
    assert {"self"} <= set(scaler.step.__code__.co_varnames)  # it is looked for on the stack
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([parameter], 0.1)
    scaler.scale(parameter.sum())
    scaler.unscale_(optimizer)
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED


def version() -> object:
    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1)
    return tensor._version > before


def saved(*names: str) -> object:
    """What some operations keep of their inputs; each name has to be one of theirs."""
    x = torch.zeros(2, 2, requires_grad=True)
    image = torch.zeros(1, 2, 3, 3, requires_grad=True)
    nodes = [
        nn.functional.conv2d(image, torch.zeros(2, 2, 1, 1, requires_grad=True)).grad_fn,
        nn.functional.linear(x, x, x[0]).grad_fn,
        x.square().grad_fn,
        x[torch.tensor([0])].grad_fn,
    ]
    assert all(any(hasattr(node, name) for node in nodes) for name in names)
    return names


def gradient_hooks() -> object:
    """Hooks that two parameters share run on both, and their handles still remove them."""
    old, new = (nn.Parameter(torch.zeros(n)) for n in (2, 3))
    seen: list[int] = []
    handles = [
        old.register_hook(lambda gradient: seen.append(len(gradient))),
        old.register_post_accumulate_grad_hook(lambda parameter: seen.append(-len(parameter))),
    ]
    assert new._backward_hooks is new._post_accumulate_grad_hooks is None
    new._backward_hooks = old._backward_hooks
    new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    new.sum().backward()
    for handle in handles:
        handle.remove()
    new.sum().backward()
    return seen == [3, -3]


def put_out() -> object:
    """The shape of what an operation has put out."""
    x = torch.zeros(2, 3, requires_grad=True)
    return tuple((x @ x.T).softmax(-1).grad_fn._input_metadata[0].shape) == (2, 2)


def flattened() -> object:
    from torch.distributed.fsdp import _common_utils

    assert _common_utils.FSDP_FLATTENED == "_fsdp_flattened"
    return _common_utils


def foreach() -> object:
    tensors = [torch.ones(2), torch.ones(3)]
    torch._foreach_mul_(tensors, [torch.tensor(2.0), torch.tensor(0.0)])
    assert [float(n) for n in torch._foreach_norm(tensors)] == pytest.approx([8**0.5, 0])
    return tensors


def dispatch_mode() -> object:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    assert torch.ops.aten.mm in flop_registry
    assert hasattr(torch.ops.prim.device, "default")
    return TorchDispatchMode, FlopCounterMode


def start_method() -> object:
    lightning = pytest.importorskip("lightning.pytorch")
    strategy = lightning.strategies.DDPStrategy(start_method="spawn")
    assert strategy._start_method == "spawn"
    return strategy


def compiled() -> object:
    """What torch.compile wraps, a module and a method."""
    from torch._dynamo.eval_frame import OptimizedModule

    layer = nn.Identity()
    wrapped = torch.compile(layer)
    assert isinstance(wrapped, OptimizedModule)
    method = running._compiled_method(torch.compile(layer.forward))
    return wrapped._orig_mod is layer and method.__self__ is layer


USED: dict[str, Callable[[], object]] = {
    "_optimizer_step_pre_hooks": step_hooks,
    "_patch_step_function": lambda: callable(torch.optim.Optimizer._patch_step_function),
    "_forward_pre_hooks": forward_hooks,
    "_backward_hooks": gradient_hooks,
    "_post_accumulate_grad_hooks": gradient_hooks,
    "_per_optimizer_states": scaler_states,
    "_version": version,
    "_fsdp_flattened": flattened,
    "_foreach_mul_": foreach,
    "_foreach_norm": foreach,
    "_python_dispatch": dispatch_mode,
    "_overloadpacket": lambda: torch.ops.aten.mm.default._overloadpacket is torch.ops.aten.mm,
    "_schema": lambda: torch.ops.aten.native_dropout.default._schema.arguments[1].name == "p",
    "_optimize_graph": otov2._optimize_graph,
    "_BatchNorm": lambda: issubclass(nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm),
    "_NormBase": lambda: issubclass(nn.InstanceNorm2d, nn.modules.batchnorm._NormBase),
    "_ConvTransposeNd": lambda: issubclass(nn.ConvTranspose2d, nn.modules.conv._ConvTransposeNd),
    "_saved_input": lambda: saved("_saved_input"),
    "_saved_self": lambda: saved("_saved_self"),
    "_saved_mat1": lambda: saved("_saved_mat1"),
    "_saved_indices": lambda: saved("_saved_indices"),
    "_is_view": lambda: torch.zeros(2).view(1, 2)._is_view() and not torch.zeros(2)._is_view(),
    "_saved_groups": lambda: saved("_saved_groups"),
    "_input_metadata": put_out,
    "_start_method": start_method,
    "_orig_mod": compiled,
}
"""Names beginning with an underscore, and what tries them."""

OTHERS = {"_fields", "_getframe"}
"""Such names of Python that are in its documentation."""


@pytest.mark.parametrize("name", USED)
def test_what_nobody_promises_is_where_it_was(name):
    assert USED[name]()


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def private(tree: ast.AST) -> set[str]:
    """Names with an underscore that are read of something, or imported, in a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom):
            names |= set((node.module or "").split("."))
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            names |= {e.value for e in node.iter.elts if isinstance(e, ast.Constant)}
    return {n for n in names if isinstance(n, str) and n.startswith("_") and not n.startswith("__")}


def defined(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def test_no_such_name_is_missing_here():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources()]
    ours = set().union(*map(defined, trees))
    used = set().union(*map(private, trees)) - ours - OTHERS
    pinned = ""  # upstream packages are of one version, so nothing of them moves
    for package in ("torch_pruning", "only_train_once"):
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            pinned += "".join(p.read_text(errors="replace") for p in Path(folder).rglob("*.py"))
    missing = {name for name in used - set(USED) if name not in pinned}
    assert not missing, f"give each of these a line in USED: {sorted(missing)}"
