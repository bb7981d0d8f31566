"""The processes of one run, as ``torchrun`` starts them. One process alone is the same with one.

All of them have the same model and images and draw the same batches; each trains on its share, and
DistributedDataParallel averages the gradients. What is written and shown is rank 0's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=2)
"""How long a process waits for another: rank 0 downloads and decodes images for all."""


def started() -> Ranks:
    """This process among those that ``torchrun`` has started; one alone without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Meet the other processes, if there are any, and part in the end.

    Args:
        device: the kind of device; of GPUs every process takes one of its own.
    """
    ranks = started()
    if ranks.count == 1:
        yield ranks, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield ranks, device
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        number: its rank, from 0.
        count: how many processes there are.
    """

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.number == 0

    @property
    def hidden(self) -> bool | None:
        """Tqdm's ``disable``: one bar for all processes, and on a terminal only."""
        return None if self.first else True

    def share(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that all processes have; ``count`` divides its rows."""
        return whole.chunk(self.count)[self.number]

    def averaging(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model's forward pass in training: in several processes gradients are averaged."""
        return model if self.count == 1 else Averaging(model)

    def any(self, flag: bool) -> bool:
        """Whether any process says so; every process has to ask."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def as_first(self, flag: bool) -> bool:
        """What rank 0 says; every process has to ask."""
        return self.any(flag and self.first)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.any(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 go through a block before the others do."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()


class Averaging:
    """A model's forward pass whose gradients come out averaged over all processes.

    DistributedDataParallel handles the parameters that are trained when it is constructed. A new
    one is constructed when others are trained: after a removal, and when a framework freezes layers
    or thaws them. It starts by sending the parameters and buffers of rank 0 to all processes. The
    buffers (BatchNorm's running statistics) are sent again before every forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained: list[nn.Parameter] = []
        self._wrapped: nn.Module | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits; as the model's own."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        known = len(trained) == len(self._trained)
        known = known and all(p is q for p, q in zip(trained, self._trained, strict=True))
        if self._wrapped is None or not known:
            self._wrapped = None  # the old one lets go of its parameters first
            self._wrapped = DistributedDataParallel(self._model)
            self._trained = trained
        logits: Tensor = self._wrapped(images)
        return logits
