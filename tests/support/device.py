"""A pretended device, to see on a CPU where a program would wait for a real one.

Tensors are marked as the device's: the ones that a test names, those made with an explicit
``device=`` or brought over with ``.to(device)``, and whatever is computed from any of them. All
others are the host's. While the watch is armed it notes every operation that would make the host
wait for the device: reading a value, a result whose size depends on values, or a copy in either
direction other than a non-blocking one to the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

# What looks at values, or makes a result whose size depends on them.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave",
    "_is_all_true",
    "_is_any_true",
    "histc",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
WRITING = {"copy_", "index_put_", "_index_put_impl_", "masked_scatter_"}
# Python-level calls that leave no operation behind on a CPU.
READING = {"tolist", "cpu", "numpy", "__array__"}


class Watch:
    """Marks, counts and notes; ``with watch:`` switches marking on, ``arm`` the noting."""

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        self._marked = WeakIdKeyDictionary()
        self.armed = False
        self.waits: list[str] = []
        self.operations: Counter[str] = Counter()
        self.mark(on_device)
        self._modes = (_Functions(self), _Operations(self))
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._stack = ExitStack()
        for mode in self._modes:
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def mark(self, tensors: Iterable[Tensor]) -> None:
        for t in tensors:
            self._marked[t] = True

    def on_device(self, value: object) -> bool:
        return isinstance(value, Tensor) and value in self._marked

    def arm(self, *_: Any) -> None:
        self.armed = True

    def disarm(self, *_: Any) -> None:
        self.armed = False

    def note(self, what: str) -> None:
        if self.armed:
            self.waits.append(what)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Neither mark nor note what happens inside."""
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield


def _tensors(value: object) -> Iterator[Tensor]:
    return (t for t in tree_iter(value) if isinstance(t, Tensor))


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        name = func.overloadpacket.__name__
        inputs = list(_tensors((args, kwargs)))
        far = [t for t in inputs if watch.on_device(t)]
        if watch.armed:
            watch.operations[name] += 1
            if far and name in WAITING and not (name == "repeat_interleave" and len(inputs) == 0):
                watch.note(name)
            if name in INDEXING:
                indices = list(_tensors(args[1]))
                if any(i.dtype == torch.bool and watch.on_device(i) for i in indices):
                    watch.note(f"{name} with a mask on the device")
                if watch.on_device(args[0]) and any(not watch.on_device(i) for i in indices):
                    watch.note(f"{name} with indices on the host")
            if name in WRITING and inputs[0].dim() and not watch.on_device(inputs[0]) and far:
                watch.note(f"{name} from the device to the host")
        out = func(*args, **kwargs)
        if far:
            watch.mark(_tensors(out))
        return out


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in READING and watch.on_device(first):
            watch.note(name)
        out = func(*args, **kwargs)
        if name in ("to", "cuda") and isinstance(first, Tensor):
            given = [*args[1:], kwargs.get("device")]
            if any(isinstance(a, torch.device | str) for a in given) and not watch.on_device(first):
                if not kwargs.get("non_blocking"):
                    watch.note("a blocking copy to the device")
                # On a CPU it may be the very same tensor, which stays the host's.
                with watch.off():
                    out = out.clone()
                watch.mark([out])
        elif kwargs.get("device") is not None and isinstance(out, Tensor):
            watch.mark([out])
        return out
