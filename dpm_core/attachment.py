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

from torch.optim import Optimizer

from .errors import AttachmentError, GroupError
from .groups import StructureGroup, require_disjoint

StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""All attachments of the process, to learn of two cores that decay the same structures."""


class Attachment:
    """The hooks of one core on one optimizer; checked as a whole before anything is registered.

    It keeps the core alive as long as the optimizer lives.

    Args:
        optimizer: an optimizer, or a wrapper with the optimizer as its ``optimizer``.
        groups: the core's structure groups.
        before: called before the work of an outermost ``step``.
        after: called after it, unless it raised.
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
        before: StepHook,
        after: StepHook,
        keep: bool = True,
    ) -> None:
        inner = unwrapped(optimizer)
        self._kept = inner if keep else None
        self.groups = groups
        self._before, self._after = before, after
        self._optimizer = weakref.ref(inner)
        self._owned: list[list[int]] = []
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

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What it returns goes on to PyTorch, which takes new arguments from a hook.
        return None if self._nested(sys._getframe(1)) else self._before(optimizer, args, kwargs)

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._nested(sys._getframe(1)):
            self._after(optimizer, args, kwargs)

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
