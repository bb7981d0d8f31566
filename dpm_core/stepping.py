"""The work around one optimizer step: gradients are read before it, norms are set after it.

No loop here is over structures, and :func:`_to_host` is the one place that waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .decay import SmoothPruning
from .errors import GradientError, GroupError
from .groups import require_fit
from .numbering import Numbering
from .releases import Sums
from .state import Ledger
from .table import SliceTable, zero_


@dataclass
class Subset:
    """Some structures, and a table of their groups.

    Attributes:
        names: of the groups.
        table: of all structures of these groups.
        numbers: of the subset's structures over all groups.
        local: of the same structures in the table.
    """

    names: list[str]
    table: SliceTable
    numbers: Tensor
    local: Tensor

    @cached_property
    def diagonals(self) -> list[Tensor | None]:
        """Of these structures, for norms and products of the table."""
        return self.table.diagonals(self.local)


@dataclass
class Reading:
    """What a step read from the device, on the host.

    Attributes:
        squares: square norms of gradients, (C,), as all that follows of the decaying structures;
            ``None`` where nothing decays.
        norms: of the weights.
        dots: products of gradients and weights; ``None`` where they were not asked for.
        squares_at_zero: square norms of the gradients of structures that became zero in the last
            step; ``None`` where there are none.
        skipped: whether a fused optimizer leaves this step out.
        unit: by how much gradients are scaled.
    """

    squares: Tensor | None = None
    norms: Tensor | None = None
    dots: Tensor | None = None
    squares_at_zero: Tensor | None = None
    skipped: bool = False
    unit: float = 1.0

    @property
    def finite(self) -> bool:
        """Whether all gradients are."""
        rows = [row for row in (self.squares, self.squares_at_zero) if row is not None]
        return all(bool(torch.isfinite(row).all()) for row in rows)


class Stepping:
    """Puts decaying structures on their schedule, and holds pruned ones at zero.

    Args:
        structures: the structures of all groups.
        ledger: what is known of them.
        smooth: the decay.
        new_zeros: numbers of the structures that became zero in the last step.

    Attributes:
        decaying: the structures that are DECAYING; ``None`` where there are none.
    """

    def __init__(
        self,
        structures: Numbering,
        ledger: Ledger,
        smooth: SmoothPruning,
        new_zeros: Tensor | None = None,
    ) -> None:
        self._structures, self._ledger, self._smooth = structures, ledger, smooth
        self.decaying: Subset | None = None
        self._new_zeros = None if new_zeros is None else self._subset(new_zeros)
        self._norms: Tensor | None = None  # of the structures of decaying's table, on the device
        self.refresh()

    @property
    def idle(self) -> bool:
        """Whether nothing decays and nothing is PRUNED."""
        return self.decaying is None and self._zero_table is None

    @property
    def new_zeros(self) -> Tensor | None:
        """Numbers of the structures that became zero in the last step."""
        return None if self._new_zeros is None else self._new_zeros.numbers

    def refresh(self) -> None:
        """Rebuild what depends on who decays and who is pruned; after every change of phase."""
        numbers = self._ledger.decaying
        self.decaying = self._subset(numbers, self.decaying) if numbers.numel() else None
        self._norms = None
        self._zeros: list[tuple[Tensor, int, Tensor]] = []
        self._zero_table: SliceTable | None = None
        pruned = self._ledger.pruned
        if pruned.numel():
            zeros = self._subset(pruned)
            self._zero_table = zeros.table
            self._zeros = zeros.table.positions(zeros.local)

    def follow(self) -> None:
        """Notice where storage, type or device of parameters was exchanged.

        Raises:
            GroupError: a parameter has another shape, or cannot be decayed any more.
        """
        tables = [part.table for part in (self.decaying, self._new_zeros) if part is not None]
        if self._zero_table is not None:
            tables.append(self._zero_table)
        if all(table.fits() for table in tables):
            return
        require_fit(self._structures.groups.values())
        self.decaying = self._norms = None
        if self._new_zeros is not None:
            self._new_zeros = self._subset(self._new_zeros.numbers)
        self.refresh()

    def start_norms(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of structures whose decay is to start: of all, and of what fixes the effect.

        Returns:
            Both float64 (n,), on the host.

        Raises:
            GroupError: a parameter is frozen.
            GradientError: a norm is not finite.
        """
        groups = self._structures.groups_of(numbers)
        for group in groups:
            for s in group.slices:
                if not s.parameter.requires_grad:
                    raise GroupError(
                        f"{s.name!r} of group {group.name!r} is frozen (requires_grad is False), "
                        "but the structure would decay while training goes on; unfreeze it, or "
                        "leave the group out"
                    )
        tables = [SliceTable([g.slices for g in groups])]
        tables.append(SliceTable([g.effect_slices for g in groups]))
        squares = [table.square_norms(table.parameters()) for table in tables]
        norms = torch.stack(squares).sqrt().to("cpu", torch.float64)
        norms = norms[:, torch.searchsorted(self._structures.all_of(groups), numbers)]
        if not bool(torch.isfinite(norms).all()):
            bad = numbers[~torch.isfinite(norms).all(0)]
            raise GradientError(
                f"the norm of {self._structures.described(bad)} is not finite; the model has "
                "diverged. Lower the learning rate, or go back to an earlier checkpoint"
            )
        return norms[0], norms[1]

    # ------------------------------------------------------------------ before the step

    def read(
        self, overflow: Tensor | None, scale: Tensor | None, maximised: set[int] | None
    ) -> Reading:
        """Read what the step has to know, in one wait for the device, or in none.

        Args:
            overflow: ``found_inf`` of a fused optimizer under a gradient scaler.
            scale: its ``grad_scale``.
            maximised: ``id`` of the parameters whose objective is maximised; ``None`` where
                products of gradients and weights are not needed.

        Raises:
            GradientError: a gradient is sparse.
        """
        decaying, zeros = self.decaying, self._new_zeros
        rows: list[Tensor] = []
        if decaying is not None:
            rows += self._evidence(decaying, maximised)
        if zeros is not None:
            rows.append(zeros.table.square_norms(self._gradients(zeros)))
        scaled = overflow is not None or (scale is not None and bool(rows))
        if scaled:
            like = rows[0] if rows else torch.as_tensor(overflow, dtype=torch.float32)
            base = torch.zeros(1, dtype=like.dtype, device=like.device)
            rows.append(base + (1.0 if scale is None else scale))
            rows.append(base + (0.0 if overflow is None else overflow))
        if not rows:
            return Reading()
        host = list(_to_host(torch.cat(rows)).double().split([len(row) for row in rows]))
        reading = Reading()
        if scaled:
            reading.skipped, reading.unit = bool(host.pop()), float(host.pop())
        if zeros is not None:
            reading.squares_at_zero = host.pop()[zeros.local]
        if decaying is not None:
            reading.squares, reading.norms, *dots = (row[decaying.local] for row in host)
            reading.dots = dots[0] if dots else None
        return reading

    def sums(self, reading: Reading) -> Sums | None:
        """The evidence of all decaying structures, this step's included.

        Returns:
            ``None`` where nothing decays.

        Raises:
            GradientError: a gradient or a weight is not finite.
        """
        if self._new_zeros is not None and reading.squares_at_zero is not None:
            self._require_gradients_at_zero(self._new_zeros.numbers, reading.squares_at_zero)
            self._new_zeros = None
        if self.decaying is None or reading.squares is None or reading.norms is None:
            return None
        numbers, ledger, called = self.decaying.numbers, self._ledger, self._structures
        squares, unit = reading.squares / reading.unit**2, reading.unit
        dots = torch.zeros_like(squares) if reading.dots is None else reading.dots / unit
        if not bool(torch.isfinite(reading.norms).all()):
            bad = numbers[~torch.isfinite(reading.norms)]
            raise GradientError(
                f"the weights of {called.listed(bad)} are not finite any more. This step changed "
                "nothing: go back to an earlier checkpoint, and lower the learning rate"
            )
        sound = torch.isfinite(squares) & torch.isfinite(dots)
        if not bool(sound.all()):
            raise GradientError(
                f"the gradient of {called.described(numbers[~sound])} is not finite. Nothing was "
                "changed: skip this step (optimizer.zero_grad()), clip gradients, or lower the "
                "learning rate"
            )
        initial, step = ledger.initial[numbers], ledger.step[numbers]
        # ||x_k|| is the norm of the step before: L_init / ||x_k|| depends on the schedule alone.
        stretch = 1 / self._smooth.norm(torch.ones_like(initial), step)
        return Sums(
            numbers,
            ledger.resistance[numbers] - dots * stretch,
            ledger.gradient[numbers] + squares.sqrt() * initial,
        )

    def _evidence(self, decaying: Subset, maximised: set[int] | None) -> list[Tensor]:
        """Rows over all structures of the table, on the device.

        Returns:
            Square norms of gradients, norms of weights, and, if asked for, the products of both, by
            the sign of what is minimised.
        """
        table, gradients = decaying.table, self._gradients(decaying)
        diagonals = decaying.diagonals
        if self._norms is None:
            self._norms = table.square_norms(table.parameters(), diagonals).sqrt()
        if maximised is None:
            return [table.square_norms(gradients, diagonals), self._norms]
        weights = table.parameters()
        if maximised:
            weights = [
                -w if w is not None and id(s.parameter) in maximised else w
                for w, s in zip(weights, table.slices, strict=True)
            ]
        squares, dots = table.square_norms_and_dots(weights, gradients, diagonals)
        return [squares, self._norms, dots]

    def _gradients(self, subset: Subset) -> list[Tensor | None]:
        gradients = subset.table.gradients()
        for g in gradients:
            if g is not None and g.layout != torch.strided:
                raise self._sparse_gradient(subset.names)
        return gradients

    def _sparse_gradient(self, names: list[str]) -> GradientError:
        name, s = next(
            (name, s)
            for name in names
            for s in self._structures.groups[name].slices
            if s.parameter.grad is not None and s.parameter.grad.layout != torch.strided
        )
        return GradientError(
            f"{s.name!r} of group {name!r} has a sparse gradient, whose share in a structure "
            "cannot be read; switch sparse gradients off for its module"
        )

    def _require_gradients_at_zero(self, numbers: Tensor, squares: Tensor) -> None:
        """Refuse a model whose gradients are not finite with a structure at zero, at once.

        Args:
            numbers: of the structures that became zero in the last step.
            squares: the square norms of their gradients.
        """
        bad = numbers[~torch.isfinite(squares)]
        if bad.numel():
            raise GradientError(
                f"the gradient of {self._structures.listed(bad)} is not finite in the first step "
                "after the norm became exactly zero. This step changed nothing: either the model "
                "divides by that norm (as weight_norm does: give a slice of the magnitude, "
                "original0, and none of the direction, original1), or it has diverged. Go back to "
                "an earlier checkpoint"
            )

    # ------------------------------------------------------------------ after the step

    def carry_out(
        self, sums: Sums, released: Tensor | None, restore: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Set the norms of decaying structures that are not released, and count the step.

        Args:
            sums: what :meth:`sums` gave.
            released: which of these structures are released, (C,) bool; ``None``: none.
            restore: whether the effect of those returns to what it was.

        Returns:
            Numbers of the structures that are released, the norms that their decay had come to,
            and numbers of those whose last decay step this was.
        """
        decaying, ledger, numbers = self.decaying, self._ledger, sums.numbers
        assert decaying is not None
        kept = torch.ones_like(numbers, dtype=torch.bool) if released is None else ~released
        step = ledger.advance(numbers, sums.resistance, sums.gradient)
        target = self._smooth.norm(ledger.initial[numbers], step)
        self._norms = _set_norms(
            decaying.table, decaying.local[kept], target[kept], decaying.diagonals
        )
        done = kept & (step == self._smooth.steps)
        if bool(done.any()):
            self._new_zeros = Subset(
                decaying.names, decaying.table, numbers[done], decaying.local[done]
            )
            ledger.finish(numbers[done])
        gone = numbers[~kept]
        if gone.numel():
            if restore:
                self._restore(gone)
            ledger.release(gone)
        left = self._smooth.norm(ledger.initial[gone], step[~kept] - 1)
        return gone, left, numbers[done]

    def _restore(self, released: Tensor) -> None:
        """Bring the effect of released structures back to its norm at the decay's start."""
        groups = self._structures.groups_of(released)
        table = SliceTable([g.effect_slices for g in groups])
        local = torch.searchsorted(self._structures.all_of(groups), released)
        effect = self._ledger.effect[released]
        # What had no effect at the start keeps the one that training has given it.
        _set_norms(table, local[effect > 0], effect[effect > 0])

    def zero(self) -> None:
        """Write exact zeros into what is PRUNED."""
        zero_(self._zeros)

    def _subset(self, numbers: Tensor, before: Subset | None = None) -> Subset:
        """Some structures with a table of their groups: the one from before, where it will do."""
        groups = self._structures.groups_of(numbers)
        names = [g.name for g in groups]
        same = before is not None and before.names == names and before.table.fits()
        table = before.table if before and same else SliceTable([g.slices for g in groups])
        local = torch.searchsorted(self._structures.all_of(groups), numbers)
        return Subset(names, table, numbers, local)


def _set_norms(
    table: SliceTable,
    structures: Tensor,
    norms: Tensor,
    diagonals: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Scale some structures of a table to given norms, and all others by exactly one.

    A structure that the optimizer made zero has no direction to grow in, and stays zero. One that
    is not finite stays what it is, and the next step refuses it.

    Args:
        table: of the structures.
        structures: their numbers in the table, (n,) on the host.
        norms: float64 (n,) on the host.
        diagonals: of these structures and perhaps others; ``None``: of all.

    Returns:
        The norms of the structures with ``diagonals`` before, (size,) on the device.
    """
    target = torch.full((table.size,), -1.0, dtype=torch.float64, device="cpu")
    target[structures] = norms
    wanted = target.to(device=table.device, dtype=table.dtype, non_blocking=True)
    before = table.square_norms(table.parameters(), diagonals).sqrt()
    scaled = (wanted >= 0) & (before > 0) & torch.isfinite(before)
    table.scale_(torch.where(scaled, wanted / before, 1.0), diagonals)
    return before


def _to_host(values: Tensor) -> Tensor:
    """Wait for the device and bring values over; the one place on the step path that does."""
    return values.cpu()
