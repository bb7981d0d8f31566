"""Several processes that train one model, as ``torchrun`` starts them.

Every process decides for itself, from weights and gradients that DistributedDataParallel keeps
equal, so all come to the same decisions. That is checked in every step, before the step has changed
anything, whether anything decays or not. If processes without a decay left the check out, one that
begins to decay alone would wait for them, while they wait for its gradients. All processes read the
same figures, so all raise together, or none.

Ours, as is the tolerance :data:`NEAR`: the paper knows one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DisagreementError, first_line

NEAR = 1e-4
"""Equal weights and gradients give norms that differ by less, relatively, on unlike processors."""
PATIENCE = timedelta(minutes=10)
"""How long a process waits for another: between two steps there may be a selection, or a save."""


def digest(lines: Sequence[str]) -> float:
    """Names some lines' content: 48 bits, which a float64 holds exactly."""
    hashed = hashlib.blake2b("\n".join(lines).encode(), digest_size=6)
    return float(int.from_bytes(hashed.digest(), "big"))


class Processes:
    """All processes of PyTorch's default group.

    They talk through a group of their own, on the host: what they say never meets gradients that
    are under way, and no step waits for a device that did not wait before.

    Attributes:
        rank: the number of this process.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        with _answering():
            self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    @classmethod
    def found(cls) -> Processes | None:
        """Those that PyTorch's default group has now; ``None`` for one process alone.

        Where there are several, all have to call this.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls() if several else None

    def close(self) -> None:
        """Give the connections back."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, which have one shape; on the host."""
        summed = values.detach().cpu().clone()
        with _answering():
            dist.all_reduce(summed, group=self._group)
        return summed

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What fails in one process fails in all of them, after the block.

        Raises:
            DisagreementError: where ``what`` failed elsewhere only.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as cause:
            failure = cause
        failed = self._gather([failure is not None])[:, 0]
        if failure is not None:
            raise failure
        if bool(failed.any()):
            raise DisagreementError(f"{what} failed on {_ranks(failed > 0)}, which says why")

    def require_same(self, what: str, lines: Sequence[str], remedy: str) -> None:
        """Stop all processes where something is not the same in each.

        Args:
            what: names it in the message.
            lines: all there is to say of it.
            remedy: ends the message.

        Raises:
            DisagreementError: in every process, with the ranks that differ from rank 0, and with a
                line that only one side has.
        """
        column = self._gather([digest(lines)])[:, 0]
        differ = column != column[0]
        if bool(differ.any()):
            raise self._disagreement(differ, f"{what}: {self._unlike(differ, lines)}", remedy)

    def require_same_step(
        self, clock: int, decided: float, evidence: Sequence[float], look: Callable[[], list[str]]
    ) -> None:
        """Stop all processes where one differs in steps done, decisions, weights or gradients.

        Args:
            clock: optimizer steps so far.
            decided: the digest of what ``look`` gives.
            evidence: two sums over all decaying structures: the norms that they started from, and
                those of their gradients in this step. Equal within :data:`NEAR`.
            look: all that has been decided, line by line.

        Raises:
            DisagreementError: in every process, as :meth:`require_same`.
        """
        rows = self._gather([clock, decided, *evidence])
        if bool((differ := rows[:, 0] != rows[0, 0]).any()):
            text = f"the number of steps done ({_listed(rows[:, 0])})"
            raise self._disagreement(differ, text, GO_ON_ALIKE)
        at = f"at optimizer step {clock}"
        if bool((differ := rows[:, 1] != rows[0, 1]).any()):
            text = f"what was decided {at}: {self._unlike(differ, look())}"
            raise self._disagreement(differ, text, DECIDE_ALIKE)
        if bool((differ := _far(rows[:, 2])).any()):
            text = f"the norms that decays started from, {at} ({_listed(rows[:, 2])})"
            raise self._disagreement(differ, text, START_ALIKE)
        if bool((differ := _far(rows[:, 3])).any()):
            text = f"the gradients of decaying structures, {at} ({_listed(rows[:, 3])})"
            raise self._disagreement(differ, text, AVERAGE)

    def _gather(self, values: Sequence[float]) -> Tensor:
        """What every process gives, a row each; (count, values) float64 on the host."""
        mine = torch.tensor(values, dtype=torch.float64, device="cpu")
        rows = torch.empty(self.count, len(values), dtype=torch.float64, device="cpu")
        with _answering():
            dist.all_gather(list(rows), mine, group=self._group)
        return rows

    def _unlike(self, differ: Tensor, lines: Sequence[str]) -> str:
        """The first line that the first process that differs has and rank 0 has not, or reverse."""
        every: list[list[str]] = [[] for _ in range(self.count)]
        with _answering():
            dist.all_gather_object(every, list(lines), group=self._group)
        rank = int(differ.nonzero()[0])
        ours, theirs = every[0], every[rank]
        for line in theirs:
            if line not in ours:
                return f"{line} on rank {rank}, not on rank 0"
        for line in ours:
            if line not in theirs:
                return f"{line} on rank 0, not on rank {rank}"
        return f"the same in another order on rank {rank}"

    def _disagreement(self, differ: Tensor, what: str, remedy: str) -> DisagreementError:
        verb = "differs" if int(differ.sum()) == 1 else "differ"
        return DisagreementError(
            f"the processes of this run disagree. {_ranks(differ).capitalize()} {verb} from rank 0 "
            f"in {what}. {remedy}"
        )


DECIDE_ALIKE = (
    "Decide from what is equal in all processes, weights and averaged gradients, and never from "
    "batches, buffers or seeds of one's own"
)
GO_ON_ALIKE = "Resume all of them from one checkpoint, and let each take every step"
START_ALIKE = (
    "They hold other weights: before the first step, wrap the model in DistributedDataParallel, "
    "which gives all processes rank 0's and averages their gradients"
)
AVERAGE = (
    "They were not averaged: run the forward pass through DistributedDataParallel, and a step's "
    "last backward pass outside of no_sync()"
)


def _far(column: Tensor) -> Tensor:
    """Which of some figures are not near the first one; what is not finite is near its like."""
    return ~torch.isclose(column, column[0], rtol=NEAR, atol=0, equal_nan=True)


def _ranks(which: Tensor) -> str:
    numbers = which.nonzero().flatten().tolist()
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def _listed(column: Tensor) -> str:
    return ", ".join(f"{value:g} on rank {rank}" for rank, value in enumerate(column.tolist()))


@contextmanager
def _answering() -> Iterator[None]:
    """Say what it means when another process does not answer."""
    try:
        yield
    except RuntimeError as cause:  # gloo's own errors are of no finer type
        raise DisagreementError(
            f"another process has ended, or has not come here within {PATIENCE} "
            f"({first_line(cause)}); its own message says why. Every process has to take every step"
        ) from cause
