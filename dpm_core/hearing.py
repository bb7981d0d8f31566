"""A hearing: the loss's per-sample derivative by a gate on each decaying structure.

Ours, not the paper's. Nothing is updated: parameters, gradients, buffers and random state are
what they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import GradientError, GroupError
from .groups import StructureGroup
from .processes import Processes


@dataclass(frozen=True)
class Objective:
    """What a hearing runs.

    Attributes:
        model: its buffers (BatchNorm's running statistics) are put back after a hearing.
        loss: runs the model on the next training batch and returns the mean loss over its samples.

    In several processes each runs its own share of the batches. The model is best the one inside
    DistributedDataParallel: the wrapper has nothing to do here, as no parameter gets a gradient.
    Where it is the wrapper, it is set not to wait for any.
    """

    model: nn.Module
    loss: Callable[[], Tensor]


def gate_derivatives(
    objective: Objective,
    groups: Sequence[StructureGroup],
    gated: Sequence[Tensor],
    batches: int,
    gate: float,
    processes: Processes | None = None,
    read: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gate the given structures to ``gate`` and read the gates' derivatives over some batches.

    A gate multiplies a structure's output at its owners, once per sample, so that one backward
    pass gives the derivative of every sample.

    Args:
        objective: the model and its loss.
        groups: the groups whose gates are read; each needs owners.
        gated: for each group, the numbers of its decaying structures, int64 on the host.
        batches: how many times ``objective.loss`` is run.
        gate: the gates' value, above zero.
        processes: among which the samples are shared out; ``None`` for one process.
        read: for each group, the numbers of the structures whose gates are read, if not those in
            ``gated``; one that is not among those has a gate of one.

    Returns:
        Mean and mean square, over all samples of all processes, of the derivative of a sample's
        loss by the gate, for the structures read of all groups in order, float64 on the device; in
        several processes on the host.

    Raises:
        GroupError: a group has no owners, an owner is not called, or its output is not what its
            index says.
        GradientError: a loss is not finite, or does not depend on the structures, or not on one
            call of an owner.
        DisagreementError: one of these in another process.
    """
    read = gated if read is None else read
    with nullcontext() if processes is None else processes.together("a hearing"):
        summed, samples = _sums(objective, groups, gated, batches, gate, read)
    if processes is not None:
        samples = int(processes.total(torch.tensor(samples, device="cpu")))
        summed = processes.total(summed)
    mean, square = summed / samples
    return mean, square


def _sums(
    objective: Objective,
    groups: Sequence[StructureGroup],
    gated: Sequence[Tensor],
    batches: int,
    gate: float,
    read: Sequence[Tensor],
) -> tuple[Tensor, int]:
    """Sum and sum of squares over this process's samples, (2, C), and how many samples."""
    for group in groups:
        if not group.owners:
            raise GroupError(
                f"group {group.name!r} has no owners, so a hearing cannot gate its structures; "
                "give StructureGroup(owners=[Owner(module, index)]), or use Trajectory()"
            )
    sums: list[Tensor] = []
    samples = 0
    model = objective.model
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
    with _untouched(model), torch.enable_grad(), alone, _uncompiled():
        for _ in range(batches):
            with _gates(groups, gated, read, gate) as gates:
                loss = objective.loss()
                called = list(gates)
                # Checkpointed layers run anew in the backward pass, and have to meet gates there.
                derivatives = _derivatives(loss, groups, called)
            size = len(called[0].z)
            per_sample = [
                torch.zeros(size, len(numbers), dtype=torch.float64, device=loss.device)
                for numbers in read
            ]
            for one, derivative in zip(called, derivatives, strict=True):
                per_sample[one.group] += derivative.double()[:, one.index].sum(2)
            batch = torch.cat(per_sample, dim=1)
            sums.append(torch.stack([batch.sum(0), batch.square().sum(0)]))
            samples += size
    return torch.stack(sums).sum(0), samples


@dataclass(frozen=True)
class _Gate:
    """A gate in one call of an owner.

    Attributes:
        group: the number of the group.
        owner: the number of the owner among the group's.
        z: (samples, positions), what the output was multiplied by.
        index: the positions of each structure that is read, on the gate's device.
    """

    group: int
    owner: int
    z: Tensor
    index: Tensor


def _derivatives(
    loss: Tensor, groups: Sequence[StructureGroup], gates: Sequence[_Gate]
) -> tuple[Tensor, ...]:
    """The derivative of every sample's loss by each gate, all of which the loss has to reach."""
    if not bool(torch.isfinite(loss)):
        raise GradientError(
            f"the loss of a hearing is {float(loss.detach())}; the model has diverged, or "
            "its closure is at fault. Lower the learning rate or check the closure"
        )
    called = {(gate.group, gate.owner) for gate in gates}
    for number, group in enumerate(groups if gates else ()):
        for i, owner in enumerate(group.owners):
            if (number, i) not in called:
                raise GroupError(
                    f"{_owner(groups, number, i)} was not called by the forward pass of a hearing, "
                    f"so its gates were not used ({type(owner.module).__name__} runs in no batch, "
                    "in some only, by another call than module(x), or inside of what was compiled "
                    "or traced); name a module as the owner that every forward pass calls, or use "
                    "Trajectory()"
                )
    derivatives: tuple[Tensor | None, ...] = ()
    if gates and loss.requires_grad:
        try:
            # The loss is a mean over samples; a sample's own loss counts in full, and from the
            # start, or a large batch's derivatives would vanish in half precision.
            size = torch.full_like(loss, len(gates[0].z))
            zs = [g.z for g in gates]
            derivatives = torch.autograd.grad(loss, zs, size, allow_unused=True)
        except RuntimeError as cause:
            if "checkpoint" not in str(cause).lower():
                raise
            raise GradientError(
                f"a hearing cannot read its gates through activation checkpointing ({cause}); use "
                "checkpoint(..., use_reentrant=False), or Trajectory()"
            ) from cause
    if all(derivative is None for derivative in derivatives):
        raise GradientError(
            "the loss of a hearing does not depend on the decaying structures; the closure "
            "must run the model that the groups were made from and return its loss, not "
            "detached"
        )
    reached: list[Tensor] = []
    for gate, derivative in zip(gates, derivatives, strict=True):
        if derivative is None:
            raise GradientError(
                f"the loss of a hearing does not depend on a call of "
                f"{_owner(groups, gate.group, gate.owner)}, so its gate was not used: it ran "
                "without gradients (torch.no_grad(), or activation checkpointing with "
                "use_reentrant=True), or its output goes nowhere. Use checkpoint(..., "
                "use_reentrant=False), name another module as the owner, or use Trajectory()"
            )
        reached.append(derivative)
    return tuple(reached)


def _owner(groups: Sequence[StructureGroup], number: int, i: int) -> str:
    group = groups[number]
    which = f"owner {i} ({type(group.owners[i].module).__name__})"
    return f"{which} of group {group.name!r}"


@contextmanager
def _gates(
    groups: Sequence[StructureGroup],
    gated: Sequence[Tensor],
    read: Sequence[Tensor],
    value: float,
) -> Iterator[list[_Gate]]:
    """While open, multiply owners' outputs by fresh gates and list each."""
    gates: list[_Gate] = []

    def hook_for(
        number: int, i: int, dim: int, closed: Tensor, listed: Tensor, highest: int
    ) -> Callable[..., Tensor]:
        def multiply(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            sound = isinstance(output, Tensor) and -output.dim() < dim < output.dim() and dim != 0
            if not sound:
                raise GroupError(
                    f"an owner of group {groups[number].name!r} does not return a tensor with its "
                    f"structures along dim {dim}; name another module as the owner"
                )
            gated_here, read_here = closed.to(output.device), listed.to(output.device)
            along = dim % output.dim()
            if highest >= output.shape[along] or (gates and len(gates[0].z) != len(output)):
                raise GroupError(
                    f"an owner of group {groups[number].name!r} returns shape "
                    f"{tuple(output.shape)}, which has not the batch in dimension 0, or no "
                    f"position {highest} in dimension {dim}; correct the owner's index or dim"
                )
            wide = torch.promote_types(output.dtype, torch.float32)  # the derivative's, too
            z = output.new_ones(output.shape[0], output.shape[along], dtype=wide)
            z[:, gated_here.reshape(-1)] = value
            z.requires_grad_()
            gates.append(_Gate(number, i, z, read_here))
            shape = [output.shape[d] if d in (0, along) else 1 for d in range(output.dim())]
            return (output * z.view(shape)).to(output.dtype)

        return multiply

    handles = [
        owner.module.register_forward_hook(
            hook_for(number, i, owner.dim, index[closed], index[listed], int(index.max()))
        )
        for number, (group, closed, listed) in enumerate(zip(groups, gated, read, strict=True))
        for i, owner in enumerate(group.owners)
        for index in [owner.index.cpu()]
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> AbstractContextManager[object]:
    """While open, what was compiled runs as it was written, and so meets the gates."""
    if "torch._dynamo" not in sys.modules:  # nothing was; the import would take seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers and random state back to what they were."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, b in model.named_buffers():
                    b.copy_(buffers[name])
