"""Where a core works: its hooks on one optimizer, and whether that is still the groups' optimizer.

PyTorch puts hooks around the ``step`` of every class of which an optimizer was ever constructed. A
``step`` that calls its parent's therefore runs them once or several times, depending on what else
happened in the process. Here only the outermost one counts.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import AttachmentError, GroupError
from .groups import StructureGroup, require_disjoint

Before = Callable[[], object]
After = Callable[[], object]

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""All attachments of the process, to learn of two cores that decay the same structures."""


class Attachment:
    """Two functions that are called around every step of an optimizer.

    A core works through one. Without a core, give no groups: ``Attachment(optimizer, [], before,
    after)``. All is checked before anything is registered. What is called is kept alive as long as
    the optimizer lives.

    Args:
        optimizer: an optimizer, or a wrapper with the optimizer as its ``optimizer``.
        groups: the core's structure groups; none where no core is at work.
        before: called without arguments before the work of an outermost ``step``, when gradients
            are there. If it raises, the step does not happen.
        after: called without arguments after that work, unless it raised, and unless a fused
            optimizer left the step out because of a gradient scaler. To learn of that takes a wait
            for the device, in such steps only. Where ``before`` returned ``False``, it has looked
            for itself, and ``after`` is called in any case.
        keep: whether it keeps the optimizer alive, too. Not that of a copied core: where nobody has
            kept the copy of the optimizer, nobody can step it.

    Raises:
        AttachmentError: it is no optimizer that runs step hooks, a parameter of a group is not its
            own, or another core is attached to the same structures. Nothing was registered.
    """

    def __init__(
        self,
        optimizer: object,
        groups: Sequence[StructureGroup],
        before: Before,
        after: After,
        keep: bool = True,
    ) -> None:
        inner = unwrapped(optimizer)
        self._kept = inner if keep else None
        self.groups = groups
        self._before, self._after = before, after
        self._optimizer = weakref.ref(inner)
        self._owned: list[list[int]] = []
        self._looks = True  # whether it is for _leave to find out if the step was left out
        self.require_owned()
        self._require_alone()
        self._handle = inner.register_step_pre_hook(self._enter)
        try:
            self._handles = [self._handle, inner.register_step_post_hook(self._leave)]
        except BaseException:
            self._handle.remove()
            raise
        _attached.add(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """What the hooks are on; ``None`` once it is gone."""
        return self._optimizer()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        _attached.discard(self)

    def require_owned(self) -> None:
        """Refuse an optimizer that no longer trains the parameters of the groups.

        As long as nothing was exchanged this compares numbers of parameters only.

        Raises:
            AttachmentError: naming the parameter.
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise AttachmentError(
                "the optimizer that was attached is gone, so no step would carry a decay out; call "
                "attach(optimizer) with the one that trains now"
            )
        present = [list(map(id, group["params"])) for group in optimizer.param_groups]
        if present == self._owned:
            return
        everyone = {number for group in present for number in group}
        for group in self.groups:
            for s in group.slices:
                if id(s.parameter) not in everyone:
                    raise AttachmentError(
                        f"{s.name!r} of group {group.name!r} is not a parameter of this optimizer, "
                        "so the decay would not follow its steps: the model's parameters were "
                        "exchanged after the groups were made (by a removal, say), or the "
                        "optimizer is another model's. Build the optimizer from the model that "
                        "the groups were made from, leave the group out, or detach() and make new "
                        "groups of the model as it is"
                    )
        self._owned = present

    def maximised(self) -> set[int]:
        """``id`` of every parameter whose objective is maximised (``maximize=True``)."""
        optimizer = self.optimizer
        assert optimizer is not None
        return {
            id(p)
            for group in optimizer.param_groups
            if group.get("maximize", False)
            for p in group["params"]
        }

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """``found_inf`` and ``grad_scale``, which a gradient scaler gives a fused optimizer.

        They are there while the optimizer steps, and ``None`` where there is no scaler, or where it
        does the work itself.
        """
        optimizer = self.optimizer
        return getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._nested(sys._getframe(1)):
            return None
        # PyTorch takes new arguments from what this returns.
        served, *arguments = _serve(optimizer, args, kwargs)
        self._looks = self._before() is not False
        return None if served is None else tuple(arguments)

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested(sys._getframe(1)):
            return
        overflow, _ = self.scaling()
        if not self._looks or overflow is None or not bool(overflow):
            self._after()

    def _nested(self, step: FrameType) -> bool:
        """Whether the frame that runs our hooks was called, however deep, from another such one.

        Read off the stack every time: nothing is remembered that a step which raises could leave
        behind.
        """
        code, frame = step.f_code, step.f_back
        while frame is not None:
            if frame.f_code is code and any(map(self._hooked, frame.f_locals.values())):
                return True
            frame = frame.f_back
        return False

    def _hooked(self, value: object) -> bool:
        # By the hooks and not by the object: a wrapper may share those of the optimizer inside.
        hooks = getattr(value, "_optimizer_step_pre_hooks", ()) if _is_optimizer(value) else ()
        return self._handle.id in hooks

    def _require_alone(self) -> None:
        cause = self._claimed()
        if cause is not None:
            gc.collect()  # an optimizer that nobody can step any more is no obstacle
            cause = self._claimed()
        if cause is not None:
            raise AttachmentError(
                f"another DecayPruning is attached to the same structures ({cause}); both would "
                "decay them in every step. Call detach() on the other one, or leave these groups "
                "out"
            )

    def _claimed(self) -> str | None:
        """How another attachment overlaps with this one; ``None`` where none does."""
        mine = _storages(self.groups)
        for other in list(_attached):
            if other.optimizer is None or mine.isdisjoint(_storages(other.groups)):
                continue
            try:
                require_disjoint([*self.groups, *other.groups])
            except GroupError as cause:
                return str(cause).split(";")[0]
        return None


class _Served:
    """A closure that has run already, in the place of the original, for one step.

    Attributes:
        loss: what the closure returned.
    """

    def __init__(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            self.loss = closure()
        self._name = type(optimizer).__name__
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._values = self._look()
        self._called = False

    def __call__(self) -> Any:
        if self._called:
            raise AttachmentError(
                f"{self._name} calls its closure more than once in a step, and decay pruning runs "
                f"it once, before the step; {_CLOSURE_REMEDY}"
            )
        if self._values != self._look():
            raise AttachmentError(
                f"{self._name} changes the weights before it calls its closure (as SAM does), so "
                f"the gradients that decay pruning had from it are not those of the step; "
                f"{_CLOSURE_REMEDY}"
            )
        self._called = True
        return self.loss

    def _look(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self._parameters]


_CLOSURE_REMEDY = (
    "compute the gradients yourself and call step() without a closure, or take another optimizer, "
    "such as SGD or AdamW"
)


def _serve(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[_Served | None, tuple[Any, ...], dict[str, Any]]:
    """Run the closure of a step, if it has one, and put one in its place that gives its loss.

    Args:
        optimizer: whose step it is.
        args: of the step; the first is the optimizer.
        kwargs: of the step.

    Returns:
        The new closure, ``None`` where there was none, and the arguments with it in place.
    """
    if kwargs.get("closure") is not None:
        served = _served(optimizer, kwargs["closure"])
        return served, args, {**kwargs, "closure": served}
    for i, given in enumerate(args[1:], start=1):
        if callable(given):
            served = _served(optimizer, given)
            return served, (*args[:i], served, *args[i + 1 :]), kwargs
    return None, args, kwargs


def _served(optimizer: Optimizer, closure: Callable[[], Any]) -> _Served:
    """``closure`` after it has run; another attachment may have done that."""
    return closure if isinstance(closure, _Served) else _Served(optimizer, closure)


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer whose ``step`` runs PyTorch's hooks: this one, or one inside of it.

    Wrappers such as accelerate's and Lightning's are no optimizers of their own; they hand the step
    on to their ``optimizer``, or leave it out while gradients are gathered.

    Raises:
        AttachmentError: there is none.
    """
    found = optimizer
    for _ in range(_DEEPEST):
        if _is_optimizer(found) and hasattr(found, "_optimizer_step_pre_hooks"):
            assert isinstance(found, Optimizer)
            if getattr(type(found).step, "hooked", False):
                return found
        found = getattr(found, "optimizer", None)
    raise AttachmentError(
        f"{type(optimizer).__name__} is no torch.optim.Optimizer whose step() runs PyTorch's step "
        "hooks, and has none as its .optimizer; attach to the optimizer that it steps (one of "
        "your own calls super().__init__(params, defaults) and defines step in its class)"
    )


_DEEPEST = 8
"""How many wrappers are looked through; ours."""


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer)


def _storages(groups: Iterable[StructureGroup]) -> set[int]:
    return {s.parameter.untyped_storage().data_ptr() for g in groups for s in g.slices}
