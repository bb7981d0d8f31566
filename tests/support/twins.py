"""What the optimizer alone would do to the same parameters, gradients and state."""

from __future__ import annotations

import copy

import torch
from torch.optim import Optimizer

from dpm_core import DecayPruning
from tests.support import oracle
from tests.support.snapshot import bits
from tests.support.toys import OPTIMIZERS, Toy, make

# Relative error of one product or norm. bfloat16 keeps 8 bits, so rounding is off by 2^-8.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8 * 1.01}


class Twin:
    """The same toy once more, trained by an optimizer without hooks."""

    def __init__(self, name: str, optimizer_name: str, dtype: torch.dtype = torch.float32) -> None:
        self.toy = make(name, dtype)
        self.optimizer = OPTIMIZERS[optimizer_name](self.toy.model.parameters())

    def step(self, toy: Toy, optimizer: Optimizer) -> Toy:
        """The twin after the step that ``optimizer`` is about to take with ``toy``."""
        with torch.no_grad():
            for mine, theirs in zip(
                self.toy.model.parameters(), toy.model.parameters(), strict=True
            ):
                mine.copy_(theirs)
                mine.grad = None if theirs.grad is None else theirs.grad.clone()
        self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.optimizer.step()
        return self.toy


def assert_active_as_plain(toy: Toy, twin: Toy, dpm: DecayPruning) -> None:
    """ACTIVE structures and parameters of no group have the twin's bits."""
    claimed = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in toy.model.parameters()}
    for group in toy.groups:
        phases = dpm.phases(group.name).tolist()
        for share in oracle.shares_of(group):
            taken = [i for k, phase in enumerate(phases) if phase for i in share.positions[k]]
            claimed[id(share.parameter)].index_fill_(share.dim, torch.tensor(taken).long(), True)
    for (name, mine), theirs in zip(
        toy.model.named_parameters(), twin.model.parameters(), strict=True
    ):
        free = ~claimed[id(mine)]
        assert torch.equal(bits(mine)[free], bits(theirs)[free]), f"{name} of ACTIVE structures"


def structure(toy: Toy, group: int, k: int) -> list[float]:
    return oracle.values(oracle.shares_of(toy.groups[group]), k)


def norm(toy: Toy, group: int, k: int) -> float:
    return oracle.length(structure(toy, group, k))
