"""Hooks on a parameter's gradient, which PyTorch has no public way to list or to take along."""

from __future__ import annotations

from torch import Tensor


def hand_on(old: Tensor, new: Tensor) -> None:
    """Let a parameter have the gradient hooks of the one whose place it takes, in their order.

    They are those of ``register_hook`` and ``register_post_accumulate_grad_hook``. Both parameters
    share them from then on, so that the handles that were given for them still remove them. Private
    names of PyTorch's, since there are no others. Hooks on the node of the graph that accumulates a
    parameter's gradient are not among them: they stay with the old one.
    """
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    if old._post_accumulate_grad_hooks:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
