"""Whether all processes of a run are at the same step with the same decisions.

How they exchange what is compared is in :mod:`dpm_core.processes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .numbering import Numbering
from .phases import Phase
from .processes import DECIDE_ALIKE, Processes, digest
from .state import Ledger


class Agreement:
    """Compares the processes of a run in every step; does nothing where there is one alone.

    Args:
        structures: the structures of all groups.
        ledger: what is known of them.
        settings: lines that have to be the same in all processes.

    Attributes:
        processes: of the run, from the first step on; ``None`` for one alone.
    """

    def __init__(self, structures: Numbering, ledger: Ledger, settings: Sequence[str]) -> None:
        self.processes: Processes | None = None
        self._structures, self._ledger, self._settings = structures, ledger, settings
        self._digest: float | None = None  # of all decisions, once it is asked for

    def decisions_changed(self) -> None:
        """To be called after every change of phases."""
        self._digest = None

    def close(self) -> None:
        """Give the connections back."""
        if self.processes is not None:
            self.processes.close()
            self.processes = None

    def require_same_step(
        self, clock: int, numbers: Tensor | None = None, squares: Tensor | None = None
    ) -> None:
        """Stop all processes where one differs in steps done, decisions, weights or gradients.

        Args:
            clock: optimizer steps so far.
            numbers: of the decaying structures; ``None`` where nothing decays.
            squares: the square norms of their gradients, (numbers,).

        Raises:
            DisagreementError: in every process.
        """
        if self.processes is None:
            self.processes = Processes.found()
            if self.processes is None:
                return
            groups = self._structures.groups.values()
            lines = [f"{group.name!r} with {group.size} structures" for group in groups]
            self.processes.require_same(
                "groups and settings", [*lines, *self._settings], "Give all of them the same"
            )
        if self._digest is None:
            self._digest = digest(self._decisions(clock))
        sums = [0.0, 0.0]
        if numbers is not None and squares is not None:
            initial = self._ledger.initial[numbers]
            sums = [float(initial.sum()), float(squares.sqrt().sum())]
        look = partial(self._decisions, clock)
        self.processes.require_same_step(clock, self._digest, sums, look)

    def require_same_release(self, clock: int, released: Tensor) -> None:
        """Stop all processes where they would not release the same structures now.

        Args:
            clock: optimizer steps so far.
            released: numbers of the structures.

        Raises:
            DisagreementError: in every process.
        """
        if self.processes is not None:
            called = self._structures.called
            lines = [f"the release of {called(number)}" for number in released.tolist()]
            what = f"what is released at optimizer step {clock}"
            self.processes.require_same(what, lines, DECIDE_ALIKE)

    def _decisions(self, clock: int) -> list[str]:
        """All that was decided so far, a line for each structure that it touched."""
        ledger = self._ledger
        touched = ((ledger.phase != Phase.ACTIVE) | ledger.immune).nonzero().flatten()
        columns = (ledger.phase, ledger.step, ledger.wave)
        rows = torch.stack([touched, *(column[touched] for column in columns)])
        state = {Phase.ACTIVE: "was released", Phase.PRUNED: "is PRUNED"}
        return [
            f"{self._structures.called(number)} "
            + state.get(Phase(phase), f"is DECAYING since step {clock - step}")
            + f" (wave {wave})"
            for number, phase, step, wave in rows.T.tolist()
        ]
