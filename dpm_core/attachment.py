"""Where a core works: its hooks on optimizers, and whether those still train the groups.

PyTorch puts hooks around the ``step`` of every class of which an optimizer was ever constructed. A
``step`` that calls its parent's therefore runs them once or several times, depending on what else
happened in the process. Here only the outermost one counts.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from .errors import AttachmentError, GroupError
from .groups import StructureGroup, require_disjoint

Callback = Callable[[], object]

_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""All attachments of the process, to learn of two cores that decay the same structures."""


class Attachment:
    """Two functions that are called around every step of an optimizer, or of several.

    A core works through one. Without a core, give no groups: ``Attachment(optimizer, [], before,
    after)``. All is checked before anything is registered. What is called is kept alive as long as
    the optimizer lives.

    Several optimizers count as one: ``before`` is called when the first of them steps, ``after``
    when each has stepped once, in any order. All gradients have to be there when the first one
    steps, and stay what they are until the last one does. If a step of one is left out, the next
    round of steps is refused.

    A closure that is given to ``step`` is run before ``before`` is called, and the optimizer gets
    its loss. Optimizers that would run it several times are refused.

    Args:
        optimizer: an optimizer, a wrapper with the optimizer as its ``optimizer``, or a sequence of
            these.
        groups: the core's structure groups; none where no core is at work.
        before: called without arguments before the work of an outermost ``step``, when gradients
            are there. If it raises, the step does not happen.
        after: called without arguments after that work, unless it raised, and unless a fused
            optimizer left the step out because of a gradient scaler (of several the one that
            stepped first). To learn of that takes a wait for the device, in such steps only. Where
            ``before`` returned ``False``, it has looked for itself, and ``after`` is called in any
            case.
        keep: whether it keeps the optimizers alive, too. Not that of a copied core: where nobody
            has kept the copy of the optimizer, nobody can step it.

    Raises:
        AttachmentError: one is no optimizer that runs step hooks, or runs its closure several
            times, or is given twice; a parameter of a group is not theirs; or another core is
            attached to the same structures. Nothing was registered.
    """

    def __init__(
        self,
        optimizer: object,
        groups: Sequence[StructureGroup],
        before: Callback,
        after: Callback,
        keep: bool = True,
    ) -> None:
        optimizers = all_unwrapped(optimizer)
        self._kept = optimizers if keep else None
        self.groups = groups
        self._before, self._after = before, after
        self._optimizers = [weakref.ref(o) for o in optimizers]
        self._owned: list[list[list[int]]] = []
        self.require_owned()
        self._require_alone()
        self.restart()
        # For each optimizer that of the hook before a step, and that of the one after it.
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._removed = False
        self._running: int | None = None  # the number of the hook that is at work
        try:
            for i, one in enumerate(optimizers):
                self._handles.append(one.register_step_pre_hook(partial(self._enter, i)))
                self._handles.append(one.register_step_post_hook(partial(self._leave, i)))
        except BaseException:
            self.remove()
            raise
        _attached.add(self)

    @property
    def optimizers(self) -> list[Optimizer] | None:
        """What the hooks are on; ``None`` once one of them is gone."""
        present = [o for ref in self._optimizers if (o := ref()) is not None]
        return present if len(present) == len(self._optimizers) else None

    @property
    def several(self) -> bool:
        """Whether there are several optimizers."""
        return len(self._optimizers) > 1

    def remove(self) -> None:
        """Take the hooks away; ``before`` and ``after`` may call this, too."""
        self._removed = True
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            # PyTorch is going through the hooks where one of ours asks for this. Then only the last
            # one can be taken out, and any other does nothing from now on.
            if handle.id != self._running or not hooks or next(reversed(hooks)) == handle.id:
                handle.remove()
        self.restart()
        _attached.discard(self)

    def restart(self) -> None:
        """Forget which of several optimizers have stepped: the next one to step is the first."""
        self._stepped: set[int] = set()
        self._inside: int | None = None  # whose step has begun; still there after one that raised
        self._gradients: list[list[tuple[Tensor | None, int]]] = []
        self._overflow: Tensor | None = None
        self._looks = True  # whether it is for _leave to find out if the step was left out

    def require_owned(self) -> None:
        """Refuse optimizers that no longer train the parameters of the groups.

        As long as nothing was exchanged this compares numbers of parameters only.

        Raises:
            AttachmentError: naming the parameter.
        """
        present = [[list(map(id, g["params"])) for g in o.param_groups] for o in self._present()]
        if present == self._owned:
            return
        everyone = {number for groups in present for group in groups for number in group}
        for group in self.groups:
            for s in group.slices:
                if id(s.parameter) not in everyone:
                    raise AttachmentError(
                        f"{s.name!r} of group {group.name!r} is not a parameter of this optimizer, "
                        "so the decay would not follow its steps: the model's parameters were "
                        "exchanged after the groups were made (by a removal, say), or the "
                        "optimizer is another model's, or one of several. Build the optimizer from "
                        "the model that the groups were made from, attach to all of them "
                        "(attach([first, second])), leave the group out, or detach() and make new "
                        "groups of the model as it is"
                    )
        self._owned = present

    def maximised(self) -> set[int]:
        """``id`` of every parameter whose objective is maximised (``maximize=True``)."""
        return {
            id(p)
            for optimizer in self._present()
            for group in optimizer.param_groups
            if group.get("maximize", False)
            for p in group["params"]
        }

    def scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """``found_inf`` and ``grad_scale``, which a gradient scaler gives a fused optimizer.

        They are there while the optimizer steps, and ``None`` where there is no scaler, or where it
        does the work itself.
        """
        return _scaling(self._present()[self._inside or 0])

    def _present(self) -> list[Optimizer]:
        optimizers = self.optimizers
        if optimizers is None:
            raise AttachmentError(
                "the optimizer that was attached is gone, so no step would carry a decay out; call "
                "attach(optimizer) with the one that trains now"
            )
        return optimizers

    # ------------------------------------------------------------------ the hooks

    def _enter(
        self, i: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook before a step of optimizer ``i``; PyTorch takes new arguments from it."""
        if self._removed or self._nested(i, sys._getframe(1)):
            return None
        self._present()
        if self._inside not in (None, i):
            self.restart()  # a step of another one raised, and the loop goes on from the start
        if i in self._stepped:
            self._refuse_second(i)
        self._inside = i
        args, kwargs, served = _served(optimizer, args, kwargs)
        if self._stepped:
            self._require_same_gradients(i)
        else:
            self._require_scaled_alike(i, sys._getframe(1))
            self._overflow, _ = _scaling(optimizer)
            self._looks = self._call(self._before, self._handles[2 * i]) is not False
        if served is None:
            return None
        served.hand_on()
        return args, kwargs

    def _leave(
        self, i: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The hook after a step of optimizer ``i``."""
        if self._removed or self._nested(i, sys._getframe(1)):
            return
        self._inside = None
        self._stepped.add(i)
        if len(self._stepped) < len(self._optimizers):
            self._gradients = list(map(_gradients, self._present()))
            return
        left_out = self._looks and self._overflow is not None and bool(self._overflow)
        self.restart()
        if not left_out:
            self._call(self._after, self._handles[2 * i + 1])

    def _call(self, callback: Callback, handle: torch.utils.hooks.RemovableHandle) -> object:
        self._running = handle.id
        try:
            return callback()
        finally:
            self._running = None

    def _refuse_second(self, i: int) -> None:
        waiting = [j for j in range(len(self._optimizers)) if j not in self._stepped]
        if any(self._changed(j) for j in waiting):  # others were computed: that round is over
            self.restart()
        raise AttachmentError(
            f"{self._called(i)} steps a second time before {self._called(waiting[0])} has stepped, "
            f"so the step of all of them is not over. {_TOGETHER}"
        )

    def _require_scaled_alike(self, i: int, step: FrameType) -> None:
        """Refuse a gradient scaler that has unscaled the gradients of some of several optimizers.

        A scaler is not seen from an optimizer. Where one is at work, it is on the stack.
        """
        frame: FrameType | None = step if self.several else None
        while frame is not None and frame.f_code is not GradScaler.step.__code__:
            frame = frame.f_back
        scaler = None if frame is None else frame.f_locals["self"]
        if scaler is None or not scaler.is_enabled():
            return
        states = [scaler._per_optimizer_states.get(id(o), {}) for o in self._present()]
        unscaled = [state.get("stage") is OptState.UNSCALED for state in states]
        unscaled[i] = self.scaling()[1] is None
        for j in (j for j, one in enumerate(unscaled) if one != unscaled[i]):
            raise AttachmentError(
                f"the gradient scaler has unscaled the gradients of either {self._called(i)} or "
                f"{self._called(j)}, and decay pruning reads them together. {_TOGETHER}"
            )

    def _require_same_gradients(self, i: int) -> None:
        if self._changed(i):
            self.restart()
            raise AttachmentError(
                f"the gradients of {self._called(i)} have changed since another of the attached "
                f"optimizers stepped, when decay pruning had read them already. {_TOGETHER}"
            )

    def _changed(self, i: int) -> bool:
        """Whether an optimizer's gradients are others than after the last step of another one."""
        now = _gradients(self._present()[i])
        before = self._gradients[i]
        return len(now) != len(before) or any(
            old is not new or version != count
            for (old, version), (new, count) in zip(before, now, strict=True)
        )

    def _called(self, i: int) -> str:
        return f"{type(self._present()[i]).__name__} (number {i + 1} of those attached)"

    def _nested(self, i: int, step: FrameType) -> bool:
        """Whether the frame that runs our hooks was called, however deep, from another such one.

        Read off the stack every time: nothing is remembered that a step which raises could leave
        behind.
        """
        code, frame = step.f_code, step.f_back
        while frame is not None:
            if frame.f_code is code and any(self._hooked(i, v) for v in frame.f_locals.values()):
                return True
            frame = frame.f_back
        return False

    def _hooked(self, i: int, value: object) -> bool:
        # By the hooks and not by the object: a wrapper may share those of the optimizer inside.
        hooks = getattr(value, "_optimizer_step_pre_hooks", ()) if _is_optimizer(value) else ()
        return self._handles[2 * i].id in hooks

    # ------------------------------------------------------------------ other cores

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
            if other.optimizers is None or mine.isdisjoint(_storages(other.groups)):
                continue
            try:
                require_disjoint([*self.groups, *other.groups])
            except GroupError as cause:
                return str(cause).split(";")[0]
        return None


class _Served:
    """A closure that has run already, in the place of the original, for one step."""

    def __init__(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            self._loss = closure()
        self._optimizer, self._called = optimizer, False

    def hand_on(self) -> None:
        """The optimizer gets it now, with the weights as they are."""
        self._weights = self._look()

    def __call__(self) -> Any:
        name = type(self._optimizer).__name__
        if self._called:
            raise AttachmentError(
                f"{name} calls its closure a second time in a step, and decay pruning runs it "
                f"once, before the step; {_ANOTHER}"
            )
        if self._weights != self._look():
            raise AttachmentError(
                f"{name} changes the weights before it calls its closure (as SAM does), so the "
                f"gradients that decay pruning had from it are not those of the step; {_ANOTHER}"
            )
        self._called = True
        return self._loss

    def _look(self) -> list[tuple[int, int]]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [(p._version, p.data_ptr()) for p in parameters]


_ANOTHER = (
    "call step() without a closure, after loss.backward(), if it allows that, or take an optimizer "
    "that needs one gradient a step, such as SGD or AdamW"
)
_TOGETHER = (
    "Compute all gradients, then step each of them once. With a GradScaler call unscale_() for "
    "each first, and step either all of them or, where a gradient is not finite, none"
)


def _served(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], _Served | None]:
    """Run the closure of a step, if it has one.

    Args:
        optimizer: whose step it is.
        args: of the step; the first is the optimizer.
        kwargs: of the step.

    Returns:
        The arguments with another closure in its place, which gives the loss, and that closure.
    """

    def run(closure: Any) -> _Served:
        # Another attachment to the same optimizer may have run it.
        return closure if isinstance(closure, _Served) else _Served(optimizer, closure)

    if kwargs.get("closure") is not None:
        served = run(kwargs["closure"])
        return args, {**kwargs, "closure": served}, served
    for i, given in enumerate(args[1:], start=1):
        if callable(given):
            served = run(given)
            return (*args[:i], served, *args[i + 1 :]), kwargs, served
    return args, kwargs, None


def _scaling(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    return getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)


def _gradients(optimizer: Optimizer) -> list[tuple[Tensor | None, int]]:
    """Every gradient and how often it was written to."""
    return [
        (p.grad, 0 if p.grad is None else p.grad._version)
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def all_unwrapped(optimizer: object) -> list[Optimizer]:
    """The optimizers to attach to, from one or from a sequence of them.

    Raises:
        AttachmentError: there is none, one is no optimizer, one is given twice, or one runs its
            closure several times in a step.
    """
    given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [unwrapped(one) for one in given]
    if not optimizers:
        raise AttachmentError("no optimizer was given; attach to those that train the groups")
    if len(set(map(id, optimizers))) < len(optimizers):
        raise AttachmentError(
            "an optimizer is given twice, by itself or inside a wrapper; give each once"
        )
    for one in optimizers:
        if isinstance(one, torch.optim.LBFGS):
            raise AttachmentError(
                f"{type(one).__name__} computes gradients several times in a step, and decay "
                "pruning has to read the ones that a step is about; take an optimizer that needs "
                "one gradient a step, such as SGD or AdamW"
            )
    return optimizers


def unwrapped(optimizer: object) -> Optimizer:
    """The optimizer whose ``step`` runs PyTorch's hooks: this one, or one inside of it.

    Wrappers such as accelerate's and Lightning's are no optimizers of their own; they hand the step
    on to their ``optimizer``, or leave it out while gradients are gathered.

    Raises:
        AttachmentError: there is none.
    """
    inner = optimizer
    for _ in range(_DEEPEST):
        if _is_optimizer(inner) and hasattr(inner, "_optimizer_step_pre_hooks"):
            assert isinstance(inner, Optimizer)
            if type(inner).step is not Optimizer.step:
                # PyTorch does so for what calls super().__init__(); timm's Lookahead does not.
                inner._patch_step_function()
            if getattr(type(inner).step, "hooked", False):
                return inner
        inner = getattr(inner, "optimizer", None)
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
