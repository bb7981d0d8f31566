"""A pretended device, to see on a CPU where a program would wait for a real one.

Tensors are marked as the device's: the ones that a test names, those created with ``device=`` or
moved with ``.to``, and whatever is computed from any of them. All others are the host's.
The device is named by a ``torch.device``, the host by the string ``"cpu"``. While the watch is
armed it notes every operation that would make the host wait for the device: reading a value, a
result whose size depends on values, or a copy in either direction other than a non-blocking one to
the device.
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

# Operations that read values, or whose result has a size that depends on them.
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
            if far and name in WAITING:
                watch.note(name)
            if name in INDEXING:
                indices = list(_tensors(args[1]))
                if any(i.dtype == torch.bool and watch.on_device(i) for i in indices):
                    watch.note(f"{name} with a mask on the device")
                if watch.on_device(args[0]) and any(not watch.on_device(i) for i in indices):
                    watch.note(f"{name} with indices on the host")
        to_host = name in WRITING and bool(far) and not watch.on_device(inputs[0])
        if to_host:
            watch.note(f"{name} from the device to the host")
        out = func(*args, **kwargs)
        if far and not to_host:
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
        far = watch.on_device(first)
        place = next(
            (a for a in (*args[1:], kwargs.get("device")) if isinstance(a, torch.device | str)),
            None,
        )
        if far and name in READING:
            watch.note(name)
        if far and name == "to" and place == "cpu" and isinstance(place, str):
            watch.note("to('cpu')")
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not (place or name == "cpu"):
            return out
        if name in ("to", "cpu") and isinstance(first, Tensor):
            back = name == "cpu" or isinstance(place, str)
            if not back and not far and not kwargs.get("non_blocking"):
                watch.note("a blocking copy to the device")
            # On a CPU both sides may be one tensor; here they are two.
            with watch.off():
                out = out.detach().clone()
            if not back:
                watch.mark([out])
        elif isinstance(place, torch.device):
            watch.mark([out])
        return out
