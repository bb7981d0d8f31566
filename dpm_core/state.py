"""What is known of every structure, and how it is saved and restored.

The ledger lives on the host, one entry per structure, the groups' structures numbered through.
It is saved by group name, so a state survives a change in the groups' order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .errors import PhaseError, StateError
from .numbering import Numbering
from .phases import Move, Phase, after

VERSION = 1


@dataclass
class Ledger:
    """One entry per structure, on the host.

    Attributes:
        phase: int64, :class:`~dpm_core.Phase`.
        step: int64, n, decay steps done; 0 unless DECAYING.
        wave: int64, 0 for a first decision, 1 for a structure decayed in place of a released one,
            and so on.
        immune: bool, released once and never decayed again.
        initial: float64, L_init, the norm when the decay started.
        effect: float64, the norm of the part that fixes the effect, at the same time.
        resistance: float64, sum of R_k.
        gradient: float64, sum of ||g_k|| L_init.
    """

    phase: Tensor
    step: Tensor
    wave: Tensor
    immune: Tensor
    initial: Tensor
    effect: Tensor
    resistance: Tensor
    gradient: Tensor

    @classmethod
    def blank(cls, size: int) -> Ledger:
        """All structures ACTIVE."""

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device="cpu")

        return cls(
            phase=zeros(torch.int64),
            step=zeros(torch.int64),
            wave=zeros(torch.int64),
            immune=zeros(torch.bool),
            initial=zeros(torch.float64),
            effect=zeros(torch.float64),
            resistance=zeros(torch.float64),
            gradient=zeros(torch.float64),
        )

    @property
    def decaying(self) -> Tensor:
        """Numbers of the structures that are DECAYING, sorted."""
        return (self.phase == Phase.DECAYING).nonzero().flatten()

    @property
    def pruned(self) -> Tensor:
        """Numbers of the structures that are PRUNED, sorted."""
        return (self.phase == Phase.PRUNED).nonzero().flatten()

    @property
    def available(self) -> Tensor:
        """Which structures may be decayed: ACTIVE and never released; bool."""
        return (self.phase == Phase.ACTIVE) & ~self.immune

    @property
    def decayed_to_zero(self) -> Tensor:
        """Which structures are PRUNED after a decay, and were not zero from the start; bool."""
        return (self.phase == Phase.PRUNED) & (self.initial > 0)

    def start(self, numbers: Tensor, initial: Tensor, effect: Tensor, wave: int) -> Tensor:
        """Start the decay of available structures; those whose norm is zero are PRUNED at once.

        Args:
            numbers: of the structures.
            initial: L_init of each.
            effect: norm of the part that fixes the effect, of each.
            wave: of all of them.

        Returns:
            Which of them were zero, bool.
        """
        zero = initial == 0
        self.wave[numbers] = wave
        self.initial[numbers], self.effect[numbers] = initial, effect
        for sums in (self.resistance, self.gradient):
            sums[numbers] = 0
        self._move(numbers[~zero], Move.START)
        self._move(numbers[zero], Move.VANISH)
        return zero

    def advance(self, numbers: Tensor, resistance: Tensor, gradient: Tensor) -> Tensor:
        """Count a decay step, with the new sums.

        Returns:
            n of each, this step included.
        """
        self.resistance[numbers], self.gradient[numbers] = resistance, gradient
        self.step[numbers] += 1
        return self.step[numbers]

    def release(self, numbers: Tensor) -> None:
        """Make decaying structures ACTIVE again, and immune."""
        self.immune[numbers] = True
        self._move(numbers, Move.RELEASE)

    def finish(self, numbers: Tensor) -> None:
        """Make structures PRUNED whose last decay step is done."""
        self._move(numbers, Move.FINISH)

    def _move(self, numbers: Tensor, move: Move) -> None:
        self.phase[numbers] = after(self.phase[numbers], move)
        self.step[numbers] = 0

    def part(self, span: slice) -> dict[str, Tensor]:
        """Copies of one group's entries, by field."""
        return {f.name: getattr(self, f.name)[span].clone() for f in fields(self)}

    def assign(self, span: slice, part: Mapping[str, Tensor]) -> None:
        """Overwrite one group's entries with a part that has been checked."""
        for f in fields(self):
            getattr(self, f.name)[span] = part[f.name]


def require_available(ledger: Ledger, structures: Numbering, numbers: Tensor) -> None:
    """Refuse to decay structures that are not ACTIVE, or were released.

    Raises:
        PhaseError: naming the first of them.
    """
    refused = after(ledger.phase[numbers], Move.START) < 0
    if bool(refused.any()):
        bad = numbers[refused]
        phase = Phase(int(ledger.phase[bad[0]])).name
        raise PhaseError(
            f"{structures.described(bad)} cannot start to decay, being {phase} already; decay "
            "structures that available() lists"
        )
    if bool(ledger.immune[numbers].any()):
        bad = numbers[ledger.immune[numbers]]
        raise PhaseError(
            f"{structures.described(bad)} was released and is immune from then on; decay "
            "structures that available() lists"
        )


def check_header(state: Any, expected: Mapping[str, Any]) -> None:
    """Refuse a state of another version, configuration or shape.

    Args:
        state: what is to be loaded.
        expected: entry name to the value it must have here.

    Raises:
        StateError: with cause and remedy.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a state dict is a mapping, this is {type(state).__name__}")
    version = state.get("version")
    if version != VERSION:
        raise StateError(
            f"the state has version {version!r}, this release reads {VERSION}; load it with the "
            "release that wrote it"
        )
    wanted = {"version", "clock", "heard", "groups", "events", *expected}
    if set(state) != wanted:
        raise StateError(
            f"the state has entries {sorted(map(str, state))}, expected {sorted(wanted)}; it is "
            "damaged, or no DecayPruning state"
        )
    for name, value in expected.items():
        if state[name] != value:
            raise StateError(
                f"the state was saved with {name} = {state[name]!r}, here it is {value!r}; load it "
                "into a DecayPruning with the same settings"
            )
    for name in ("clock", "heard"):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise StateError(f"the state's {name} is {value!r}, not a count; it is damaged")


def check_groups(parts: Any, sizes: Mapping[str, int], steps: int) -> None:
    """Refuse group entries that do not fit these groups, or that no run could have produced.

    Args:
        parts: group name to its ledger fields.
        sizes: group name to its number of structures.
        steps: N.

    Raises:
        StateError: with cause and remedy.
    """
    if not isinstance(parts, Mapping) or set(parts) != set(sizes):
        here = set(parts) if isinstance(parts, Mapping) else set()
        raise StateError(
            f"the state is of other groups (missing here: {sorted(here - set(sizes))}, missing "
            f"there: {sorted(set(sizes) - here)}); build the groups from the same model"
        )
    blank = Ledger.blank(0)
    for name, size in sizes.items():
        part = parts[name]
        if not isinstance(part, Mapping) or set(part) != {f.name for f in fields(blank)}:
            raise StateError(f"group {name!r} of the state lacks entries; it is damaged")
        for f in fields(blank):
            value, dtype = part[f.name], getattr(blank, f.name).dtype
            if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != (size,):
                raise StateError(
                    f"group {name!r}: {f.name} is not a {dtype} tensor of {size} structures; the "
                    "state is damaged, or of a model of another width"
                )
        phase, step = part["phase"], part["step"]
        decaying = phase == Phase.DECAYING
        finite = [part[f] for f in ("initial", "effect", "resistance", "gradient")]
        norms = [part[f] for f in ("initial", "effect", "gradient")]
        sound = (
            bool(((phase >= 0) & (phase < len(Phase))).all())
            and bool(((step >= 0) & (step < steps)).all())
            and bool((decaying | (step == 0)).all())
            and bool((~decaying | (part["initial"] > 0)).all())
            and bool((part["wave"] >= 0).all())
            and not any(bool((v < 0).any()) for v in norms)
            and not bool((part["immune"] & (phase != Phase.ACTIVE)).any())
            and all(bool(torch.isfinite(v).all()) for v in finite)
        )
        if not sound:
            raise StateError(
                f"group {name!r}: phases, steps and norms contradict one another; the state is "
                "damaged"
            )
