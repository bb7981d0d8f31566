"""Running a user's model on an example, so that the outputs of two runs can be compared.

That takes care: there may be several inputs, outputs may be anything that contains tensors, and a
forward pass may draw random numbers. The comparison itself is in :mod:`.comparing`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import random
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import CellType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dpm_core.errors import kind_and_line

from .errors import AdapterError


def call(model: nn.Module, example: Any) -> Any:
    """A model's outputs for an example.

    Args:
        model: as it is.
        example: a tensor, a tuple or list of positional arguments, or a mapping of arguments.
    """
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of an example with ``change`` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_tensors(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def first(example: Any, samples: int = 1) -> Any:
    """An example's first samples, taken from all tensors with as many rows as its first one."""
    rows = next((t.shape[0] for t in tensors(example) if t.dim()), 0)
    return map_tensors(example, lambda t: t[:samples] if t.dim() and t.shape[0] == rows else t)


def informative(example: Any) -> Any:
    """The example, or random numbers for a tensor of one repeated value, such as zeros."""
    if not (isinstance(example, Tensor) and example.is_floating_point() and example.numel() > 1):
        return example
    if bool((example != example.flatten()[0]).any()):
        return example
    draw = torch.Generator().manual_seed(0)
    return torch.randn(example.shape, generator=draw, device="cpu").to(example)


def shortened(model: nn.Module, example: Any, samples: int) -> Any:
    """:func:`first`, where the model takes that; else the whole example."""
    try:
        outputs(model, first(example, samples))
    except Exception:  # rows that are no samples, or inputs that have to fit one another
        return example
    return first(example, samples)


def device_of(example: Any, model: nn.Module) -> torch.device:
    """The device that an example is on; if it has no tensors, the model's."""
    for tensor in tensors(example):
        return tensor.device
    for parameter in model.parameters():
        return parameter.device
    return torch.device("cpu")


def type_of(model: nn.Module) -> torch.dtype | None:
    """The type of a model's first parameter of floating point; ``None``: it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in a model's outputs, in order, with floats and arrays as tensors.

    They are looked for in sequences, mappings (such as transformers' outputs), dataclasses and
    plain objects. What transformers keeps for the next token is no output: it has a part for every
    head, whichever there are.
    """
    return list(_tensors(outputs, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64, device="cpu")
    elif (
        isinstance(value, int | complex | str | bytes | ModuleType | type(None))
        or id(value) in seen
        or _is_cache(value)
    ):
        return
    elif type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if hasattr(value, "shape") and value.dtype.kind in "biufc":  # no numpy.iinfo
            yield torch.as_tensor(value)
    else:
        seen.add(id(value))
        for part in _parts(value):
            yield from _tensors(part, seen)


def _is_cache(value: Any) -> bool:
    """Whether something is what a model of transformers keeps for the next token."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list | set | frozenset):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    if isinstance(value, nn.Module | type) or callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())


def probe(
    model: nn.Module, example: Any, *, training: bool = False, watched: Watched | None = None
) -> Any:
    """:func:`call` without a trace: modes, buffers, attributes and draws are what they were."""
    watching = watched or Watched()
    quiet = in_mode(model, training), same_draws(), fast_path_off(), untouched(model), as_written()
    with ExitStack() as stack:
        for context in (*quiet, watching, _NoEmptyAttention()):
            stack.enter_context(context)
        return call(model, example)


class _NoEmptyAttention(TorchFunctionMode):
    """Fails where PyTorch 2.11 would end the process: it divides by the number of key heads.

    A removal that is tried out may leave none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and named.get("enable_gqa"):
            key = args[1] if len(args) > 1 else named["key"]
            if not key.shape[-3]:
                raise RuntimeError("an attention has query heads, but no key heads")
        return func(*args, **named)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model; tensors kept from a forward pass are copied without their history.

    What cannot be copied, such as locks, generators and open files, the copy shares. Weak
    references to parts of the model are to the copy's. What is compiled is not so in the copy.

    Args:
        model: of any kind.
        memo: as for :func:`copy.deepcopy`; it is filled with the copies, by the originals' ids.

    Raises:
        UncopyableError: a module, or an object with tensors, cannot be copied.
    """
    memo = {} if memo is None else memo
    kept: list[Any] = []  # ids in the memo are of objects that live
    own = set(model.modules())
    for name, module in model.named_modules():
        _require_own_forward(name, module, own)
        # What is copied: of a LightningModule, say, not its trainer; some have no such state.
        stateless = isinstance(module, torch.jit.ScriptModule) or is_parametrized(module)
        for tensor in tensors(vars(module) if stateless else module.__getstate__()):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
                kept.append(tensor)
    while True:
        trial = dict(memo)
        try:
            another = copy.deepcopy(model, trial)
        except Exception as cause:
            shared = _uncopied(cause)
            whole = isinstance(shared, nn.Module | type(None)) or id(shared) in memo
            if whole or (not isinstance(shared, Tensor) and tensors([shared])):
                raise UncopyableError(_why_not(model, shared, cause)) from cause
            memo[id(shared)] = shared.detach().clone() if isinstance(shared, Tensor) else shared
            kept.append(shared)
            continue
        break
    memo.update(trial)
    for module in another.modules():
        _turn_to_copies(module, memo)
    _REMEMBERED[another] = remembered(model)
    return another


class UncopyableError(AdapterError):
    """A model holds something that cannot be copied, so that nothing can be tried on a copy."""


def _uncopied(cause: BaseException) -> Any:
    """The innermost object that :func:`copy.deepcopy` was called with when it failed."""
    found = None
    for frame, _ in traceback.walk_tb(cause.__traceback__):
        if frame.f_code is copy.deepcopy.__code__:
            found = frame.f_locals["x"]
    return found


def _why_not(model: nn.Module, thing: Any, cause: BaseException) -> str:
    place = _path_to(model, thing)
    what = f"its {place!r} ({type(thing).__name__})" if place else f"a {type(thing).__name__} in it"
    return (
        f"the model cannot be copied, as every trial of a removal has to: {what} does not bear "
        f"copy.deepcopy ({kind_and_line(cause)}). Keep it outside of the model, or give "
        "its class a __deepcopy__ method"
    )


def _path_to(model: nn.Module, thing: Any) -> str:
    """Where an object is kept in a model's attributes; empty if it is not found."""
    seen: set[int] = set()
    ahead = list(model.named_modules())
    for name, module in ahead:
        if module is thing:
            return str(name)
    attributes: list[tuple[str, Any]] = [
        (f"{n}.{k}" if n else k, v)
        for n, m in ahead
        for k, v in vars(m).items()
        if k not in ("_modules", "_parameters", "_buffers")
    ]
    while attributes:
        path, value = attributes.pop(0)
        if value is thing:
            return path
        if id(value) in seen or isinstance(value, Tensor | nn.Module | type | str | bytes | int):
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            attributes += [(f"{path}[{k!r}]", v) for k, v in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            attributes += [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        else:
            attributes += [(f"{path}.{k}", v) for k, v in getattr(value, "__dict__", {}).items()]
    return ""


def _require_own_forward(name: str, module: nn.Module, parts: set[nn.Module]) -> None:
    """Refuse a forward pass in a closure that holds on to the model: a copy's runs the original.

    Raises:
        UncopyableError: with the module's name.
    """
    forward = vars(module).get("forward")
    if _compiled_method(forward) is not None:
        return
    cells = getattr(forward, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]
    held += [getattr(h, "__self__", None) for h in held]
    if any(isinstance(h, nn.Module) and h in parts for h in held):
        raise UncopyableError(
            f"{name or type(module).__name__!r} has a forward function that holds on to the model, "
            "so a copy, on which a removal is tried, would run the original; make it a method of "
            "the class, or give it to the module after the removal"
        )


def _compiled_method(value: Any) -> MethodType | None:
    """The method that ``torch.compile`` has wrapped."""
    method = vars(value).get("_torchdynamo_orig_callable") if callable(value) else None
    if method is not None:  # of a class of PyTorch's it is wrapped once more
        method = inspect.unwrap(method, stop=lambda f: isinstance(f, MethodType))
    return method if isinstance(method, MethodType) else None


def _turn_to_copies(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let weak references and compiled methods of a copied module be of the copy's parts."""
    for name, value in list(vars(module).items()):
        if isinstance(value, ReferenceType) and id(value()) in copies:
            vars(module)[name] = ref(copies[id(value())])
        method = _compiled_method(value) if hasattr(value, "__dict__") else None
        if method is not None and id(method.__self__) in copies:
            vars(module)[name] = MethodType(method.__func__, copies[id(method.__self__)])


# ---------------------------------------------------------------------- what is compiled


def _wrapper() -> type | tuple[()]:
    """What ``torch.compile`` puts around a module; nothing where nothing was compiled."""
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())


def as_written() -> AbstractContextManager[object]:
    """While open, what was compiled runs as it was written: it would be compiled for each trial."""
    if "torch._dynamo" not in sys.modules:  # nothing was; the import would take seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def inside(model: nn.Module) -> nn.Module:
    """A model without what ``torch.compile`` puts around it."""
    while isinstance(model, _wrapper()):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def compiled_parts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Parts that ``torch.compile`` has wrapped: their names, what has them, and as what."""
    return [
        (f"{n}.{k}" if n else k, m, k)
        for n, m in model.named_modules()
        for k, part in m._modules.items()
        if isinstance(part, _wrapper()) and not isinstance(m, _wrapper())
    ]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """A model while nothing is wrapped by ``torch.compile``, so that its names are its own."""
    model = inside(model)
    places = [(m, k, m._modules[k]) for _, m, k in compiled_parts(model)]
    for module, name, part in places:
        module._modules[name] = inside(part)  # type: ignore[arg-type]
    try:
        yield model
    finally:
        for module, name, part in places:
            module._modules[name] = part


def plain_name(name: str) -> str:
    """A name without the parts that ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def remembered(model: nn.Module) -> dict[Any, Any]:
    """What was found out about a model, or about one that it is a copy of, for whoever asks again.

    It has to be asked for by all that it depends on.
    """
    return _REMEMBERED.setdefault(model, {})


_REMEMBERED: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


Attributes = list[tuple[Any, dict[str, Any], dict[str, Any]]]
"""For each object its attributes, and the contents of those that are collections."""


def parts(model: nn.Module) -> Attributes:
    """The attributes of all modules of a model, without copies of its tensors."""
    return attributes_of(model.modules())


def attributes_of(things: Iterable[Any]) -> Attributes:
    """The attributes of some objects, without copies of what they hold."""
    return [
        (t, dict(vars(t)), {k: v.copy() for k, v in vars(t).items() if type(v) in _COLLECTIONS})
        for t in things
    ]


_COLLECTIONS = {dict, OrderedDict, list, set}


def put_back(kept: Attributes) -> None:
    """Give objects the attributes back that they had, in the same collections."""
    for thing, attributes, contents in kept:
        thing.__dict__.clear()
        thing.__dict__.update(attributes)
        for name, content in contents.items():
            collection = attributes[name]
            if not content and not collection:  # most are, such as those of hooks
                continue
            collection.clear()
            if isinstance(content, list):
                collection.extend(content)
            else:
                collection.update(content)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back whatever a forward pass changes in a model's attributes and buffers."""
    kept, buffers = parts(model), [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        put_back(kept)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # what autograd has kept stays valid
                    buffer.copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode it was in."""
    with in_mode(model, False):
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A mode for the whole model; afterwards every module is back in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    if any(mode != training for _, mode in modes):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


class Watched(TorchDispatchMode):
    """Seeds every random draw of a forward pass by its number, and notes what the pass does.

    A draw then depends on how many came before it, not on their sizes.

    Args:
        counting: whether to count floating-point operations, as PyTorch's FlopCounterMode counts
            them all together, which takes several times as long for counting them by module, too.
        average: whether dropout, and draws from common distributions, give their mean, the same
            whatever is drawn; the first ten thousand times, as a pass may draw until it has what it
            wants.

    Attributes:
        draws: shapes of what was drawn, in order, but for means.
        eps: machine epsilon of the coarsest precision that something was computed in.
        counted: floating-point operations, if they are counted: each operation's, with the
            addresses of the storages that it was given.
    """

    def __init__(self, counting: bool = False, average: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counting, self.average = counting, average
        self._means = 0
        self.counted: list[tuple[int, list[int]]] = []
        self.draws: list[torch.Size] = []
        self.eps = 0.0
        self._generators: dict[torch.Generator, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        for generator, state in self._generators.items():
            generator.set_state(state)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket) if self.counting else None
        if self.counting and formula is None and func not in _WHOLE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            _WHOLE.add(func)
        drawing = _draws(func, args, kwargs)
        mean = _mean(func, args) if drawing and self.average and self._means < 10_000 else None
        if mean is not None:
            self._means += 1
            drawing = False
            if isinstance(mean, list):  # the same operation that drops nothing
                args = mean
        if drawing:
            torch.manual_seed(len(self.draws))
            own = kwargs.get("generator")
            if isinstance(own, torch.Generator):
                self._generators.setdefault(own, own.get_state())
                own.manual_seed(len(self.draws))
        out = func(*args, **kwargs)
        if isinstance(mean, Tensor):
            out.copy_(mean)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.eps = max(self.eps, _eps(tensor.dtype))
                if drawing:
                    self.draws.append(tensor.shape)
        if formula is not None:
            given = [a for a in args if isinstance(a, Tensor) and a.layout == torch.strided]
            self.counted.append(
                (
                    formula(*args, **kwargs, out_val=out),
                    [t.untyped_storage().data_ptr() for t in given],
                )
            )
        return out


_WHOLE: set[Any] = {torch.ops.prim.device.default}
"""Operations that are no composition of others."""


def _draws(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers: an attention may, but only if it drops some."""
    if not _may_draw(operation):
        return False
    place = _dropout_at(operation)
    if place is None:
        return True
    given = operation._schema.arguments[place]
    chance = args[place] if place < len(args) else kwargs.get(given.name, given.default_value)
    return bool(chance)


@functools.cache
def _may_draw(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags


@functools.cache
def _dropout_at(operation: Any) -> int | None:
    """Which argument is the share that an operation drops out by itself; ``None``: it does not."""
    name = "p" if operation._overloadpacket is torch.ops.aten.native_dropout else "dropout"
    names = [a.name for a in operation._schema.arguments]
    return next((i for i, n in enumerate(names) if n in (name, f"{name}_p")), None)


_BERNOULLI = torch.ops.aten.bernoulli.default


def _mean(operation: Any, args: Any) -> Tensor | list[Any] | None:
    """What an operation draws on average, or its arguments with no dropout; ``None``: unknown."""
    aten, place = torch.ops.aten, _dropout_at(operation)
    if place is not None:
        return [0.0 if i == place else a for i, a in enumerate(args)]
    packet = operation._overloadpacket
    numbers = [float(a) for a in args[1:] if isinstance(a, int | float)]
    first, second = (*numbers, 0.0, 1.0)[:2] if len(numbers) != 1 else (numbers[0], 1.0)
    if isinstance(args[0], Tensor) and (packet == aten.normal or operation is _BERNOULLI):
        return args[0].clone()
    if operation is aten.bernoulli_.Tensor:
        return args[1].clone()  # type: ignore[no-any-return]
    means = {
        aten.rand: 0.5,
        aten.rand_like: 0.5,
        aten.randn: 0.0,
        aten.randn_like: 0.0,
        aten.uniform_: (first + second) / 2,
        aten.normal_: first,
        aten.bernoulli_: first if numbers else 0.5,
        aten.bernoulli: first,
        aten.exponential_: 1 / first if first else 1.0,
    }
    return (
        torch.tensor(means[packet], dtype=torch.float64, device="cpu") if packet in means else None
    )


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


@functools.cache
def _devices(_visible: str | None) -> int:
    return torch.cuda.device_count()  # asks the driver anew each time, longer than a model may run


@contextmanager
def same_draws() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace outside, and is the same each time."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(range(_devices(os.environ.get("CUDA_VISIBLE_DEVICES")))):
        random.seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


@dataclass(frozen=True)
class Outputs:
    """The outputs of a forward pass.

    Attributes:
        values: all output tensors, detached.
        draws: shapes of what the pass drew; in training mode of what has no mean there.
        eps: machine epsilon of the coarsest precision that it computed in.
    """

    values: list[Tensor]
    draws: list[torch.Size]
    eps: float


@torch.no_grad()
def outputs(model: nn.Module, example: Any, *, training: bool = False) -> Outputs:
    """A model's outputs, with the same random draws each time; the model stays as it is.

    In training mode dropout and noise are at their mean: what they draw depends on the widths.
    """
    watched = Watched(average=training)
    given = tensors(probe(model, example, training=training, watched=watched))
    values = [t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in given]
    return Outputs([t.clone() for t in values], watched.draws, watched.eps)


def outputs_in_training(model: nn.Module, example: Any) -> Outputs | None:
    """:func:`outputs` in training mode; ``None`` where the model cannot run so on the example."""
    try:
        return outputs(model, example, training=True)
    except Exception:  # a norm over a single value, say
        return None


@contextmanager
def fast_path_off() -> Iterator[None]:
    """Without attention's fast path, which computes otherwise than the one that is trained."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Precision:
    """A copy of a model in the precision that its outputs are compared in.

    That is double precision if the model runs in it, else its own.

    Args:
        model: stays as it is.
        example: of its inputs.
        samples: how many of the example are enough, where the model takes so few; ``None``: all.

    Attributes:
        double: whether it runs in double precision.
        model: the copy.
        example: in the same precision.
        outputs: of the copy, for this example.
    """

    def __init__(self, model: nn.Module, example: Any, samples: int | None = None) -> None:
        rows = example if samples is None else first(example, samples)
        try:
            self._take(model, rows, True)
        except Exception:  # rows that are no samples, or a layer that insists on its own precision
            rows = example if samples is None else shortened(model, example, samples)
            try:
                self._take(model, rows, True)
            except Exception:
                self._take(model, rows, False)

    def _take(self, model: nn.Module, example: Any, double: bool) -> None:
        self.double = double
        self.model, self.example = self.of(model), doubled(example) if double else example
        self.outputs = outputs(self.model, self.example)

    def of(self, model: nn.Module) -> nn.Module:
        """A copy of another model in this precision."""
        return copied(model).double() if self.double else copied(model)


def doubled(example: Any) -> Any:
    """An example in double precision."""
    return map_tensors(
        example,
        lambda t: (
            t.to(torch.complex128 if t.is_complex() else torch.float64)
            if t.is_floating_point() or t.is_complex()
            else t
        ),
    )
