"""Which decaying structures are released: Self-Rectifying, from what a step knows of them.

The criteria (:mod:`dpm_core.rectify`) see evidence and limits; here both are gathered from the
ledger, and a hearing is run for the criteria that need one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .errors import AttachmentError, ConfigurationError, PhaseError
from .events import Event
from .groups import StructureGroup
from .hearing import Objective, gate_derivatives
from .numbering import Numbering, integers
from .phases import Phase
from .processes import Processes
from .rectify import Evidence, SelfRectifying, require_choice
from .state import Ledger

Refill = Callable[[str, int, Tensor], Sequence[int] | Tensor]
"""``choose(group, count, free)``: which structures decay in place of ``count`` released ones."""


@dataclass
class Sums:
    """Decaying structures and their evidence, the present step's included; all (C,).

    Attributes:
        numbers: of all decaying structures.
        resistance: sum of R_k.
        gradient: sum of ||g_k|| L_init.
    """

    numbers: Tensor
    resistance: Tensor
    gradient: Tensor


@dataclass
class Choice:
    """What was decided in a step.

    Attributes:
        released: which of all decaying structures are released; bool.
        batches: how many batches a hearing ran.
        worth: of all structures by that hearing, (size,), if the criterion exchanges.
    """

    released: Tensor
    batches: int = 0
    worth: Tensor | None = None


class Releases:
    """Decides on releases.

    Args:
        structures: the structures of all groups.
        ledger: what is known of them.
        rectify: criterion, share and waves.
        steps: N.
        worth: from an earlier hearing.

    Attributes:
        objective: what hearings run; ``None`` where none was given.
        worth: of all structures by the last hearing of an exchange. Not saved: it serves the step
            in which it was computed.

    Raises:
        ConfigurationError: N is too small for the criterion.
    """

    def __init__(
        self,
        structures: Numbering,
        ledger: Ledger,
        rectify: SelfRectifying,
        steps: int,
        worth: Tensor | None = None,
    ) -> None:
        self.objective: Objective | None = None
        self.worth = worth
        self._structures, self._ledger = structures, ledger
        self._rectify, self._steps = rectify, steps
        self._decision = rectify.decision_step(steps)

    def objective_of(
        self, model: nn.Module | None, loss: Callable[[], Tensor] | None
    ) -> Objective | None:
        """What hearings are to run; ``None`` for a criterion without.

        Raises:
            AttachmentError: there is no model or no loss, or a group has no owners.
        """
        criterion = self._rectify.criterion
        if not criterion.batches:
            return None
        if model is None or loss is None:
            lacks = [n for n, v in (("model", model), ("loss", loss)) if v is None]
            raise AttachmentError(
                f"{type(criterion).__name__} runs a hearing, for which attach() lacks "
                f"{' and '.join(lacks)}: give attach(optimizer, "
                f"{', '.join(f'{n}={n}' for n in lacks)}); loss is a function that runs the model "
                "on the next batch"
            )
        for group in self._structures.groups.values():
            if not group.owners:
                raise AttachmentError(
                    f"group {group.name!r} has no owners, so a hearing cannot gate its "
                    "structures; give StructureGroup(owners=...), or use Trajectory()"
                )
        return Objective(model, loss)

    def choose(
        self,
        sums: Sums,
        clock: int,
        limit: int | None,
        reserved: Mapping[str, int],
        maximised: set[int],
        processes: Processes | None,
    ) -> Choice | None:
        """Decide on the structures whose decision falls in this step; changes nothing.

        Args:
            sums: of the decaying structures.
            clock: optimizer steps so far.
            limit: how many structures may be released in the whole run; ``None``: any number.
            reserved: by group, how many available structures have to be left.
            maximised: ``id`` of the parameters whose objective is maximised.
            processes: of the run, if there are several.

        Returns:
            The choice; ``None`` where no decision falls now.

        Raises:
            ConfigurationError: the criterion chose what it must not.
            AttachmentError: a hearing's loss has no sign for a group.
            GradientError: as :func:`~dpm_core.hearing.gate_derivatives`, as are GroupError and
                DisagreementError.
        """
        ledger, every = self._ledger, sums.numbers
        due = ledger.step[every] + 1 == self._decision
        due &= ledger.wave[every] < self._rectify.waves
        choice = Choice(torch.zeros_like(due))
        if not bool(due.any()):
            return None
        numbers, criterion = every[due], self._rectify.criterion
        groups, cohort = self._structures.group_of[numbers].unique(return_inverse=True)
        limits = self._limits(numbers, groups, limit, reserved)
        derivative = fisher = worth = free_worth = None
        if criterion.batches:
            if not bool((limits > 0).any()):
                return choice
            mean, square = self._hear(every, maximised, processes)
            choice.batches = criterion.batches
            derivative, fisher = mean[numbers], square[numbers]
            if criterion.exchanges:
                choice.worth = square / 2 - mean
                worth, free_worth = choice.worth[numbers], self._free_worth(choice.worth, groups)
        evidence = Evidence(
            cohort,
            sums.resistance[due],
            sums.gradient[due],
            self._typical(sums)[groups][cohort],
            derivative,
            fisher,
            worth,
            free_worth,
        )
        chosen = criterion.choose(evidence, limits.clone(), clock)
        names = [self._structures.names[i] for i in groups.tolist()]
        choice.released[due] = require_choice(criterion, chosen, cohort, limits, names)
        return choice

    def worth_of(self, group: str) -> Tensor | None:
        """See :meth:`~dpm_core.DecayPruning.worth`."""
        return None if self.worth is None else self.worth[self._structures.span(group)].clone()

    def replacements(self, release: Event, free: Tensor, refill: Refill) -> Tensor:
        """The structures that decay in place of released ones.

        Args:
            release: of some structures of one group.
            free: which structures of the group may be decayed, (K,) bool.
            refill: chooses, unless the criterion does by worth.

        Returns:
            Their numbers in the group.

        Raises:
            ConfigurationError: ``refill`` chose what it must not.
        """
        count, worth = len(release.structures), self.worth_of(release.group)
        if self._rectify.criterion.exchanges and worth is not None:
            cheapest = worth.argsort(stable=True)  # NaN last
            return cheapest[free[cheapest]][:count]
        chosen = refill(release.group, count, free.clone())
        return _require_refill(release.group, chosen, count, free)

    def _limits(
        self, numbers: Tensor, groups: Tensor, limit: int | None, reserved: Mapping[str, int]
    ) -> Tensor:
        """How many structures of each group may be released now; (G,) int64.

        Args:
            numbers: of the structures whose decision falls now.
            groups: (G,), the groups that they are of.
            limit: how many may be released in the whole run.
            reserved: by group, how many available structures have to be left.
        """
        immune, per_group = self._ledger.immune, self._structures.per_group
        decided = per_group(self._decided().index_fill(0, numbers, True))
        allowed = (self._rectify.max_share * decided + 1e-9).long()
        # A released structure must be replaceable, or the target could not be met.
        spare = per_group(self._ledger.available)
        if reserved:
            spare = spare - torch.tensor(
                [reserved.get(n, 0) for n in self._structures.names], device="cpu"
            )
        limits = torch.minimum(allowed - per_group(immune), spare)
        limits = limits[groups].clamp(min=0)
        if limit is not None:
            left = max(0, limit - int(immune.sum()))
            if int(limits.sum()) > left:  # every group gives up the same share
                limits = limits * left // limits.sum()
        return limits

    def _decided(self) -> Tensor:
        """Which structures have had their decision, in a wave that has one; (size,) bool."""
        ledger = self._ledger
        past = (ledger.phase == Phase.DECAYING) & (ledger.step >= self._decision)
        return ledger.immune | (
            (past | ledger.decayed_to_zero) & (ledger.wave < self._rectify.waves)
        )

    def _typical(self, sums: Sums) -> Tensor:
        """Mean |resistance| of each group's structures that have decayed, over a decision's steps.

        Those that were released or pruned before are among them, so that a framework that decays
        few structures at a time has something to compare them with.
        """
        ledger, structures = self._ledger, self._structures
        resistance, steps = ledger.resistance.clone(), torch.zeros_like(ledger.step)
        steps[ledger.immune] = self._decision
        steps[ledger.decayed_to_zero] = self._steps
        steps[sums.numbers] = ledger.step[sums.numbers] + 1
        resistance[sums.numbers] = sums.resistance
        decayed = steps > 0
        total = torch.zeros(len(structures.names), dtype=torch.float64, device="cpu")
        mean = (resistance[decayed] / steps[decayed]).abs()
        total.index_add_(0, structures.group_of[decayed], mean)
        return self._decision * total / structures.per_group(decayed).clamp_min(1)

    def _free_worth(self, worth: Tensor, groups: Tensor) -> Tensor:
        """The worth of the structures that could decay instead, as :class:`Evidence` has it."""
        free, group_of = self._ledger.available, self._structures.group_of
        lists = [worth[free & (group_of == g)].sort().values for g in groups]
        return pad_sequence(lists, batch_first=True, padding_value=math.inf)

    def _hear(
        self, decaying: Tensor, maximised: set[int], processes: Processes | None
    ) -> tuple[Tensor, Tensor]:
        """Run a hearing.

        The derivative is of what is minimised: minus that of an objective which is maximised.

        Returns:
            Mean and mean square of the derivative by each structure's gate, over all samples,
            (size,) float64 on the host, NaN for structures whose gates were not read.
        """
        assert self.objective is not None
        structures, criterion = self._structures, self._rectify.criterion
        groups = structures.groups_of(decaying)
        signs = _signs(groups, maximised)
        gated = [structures.within(g.name, decaying) for g in groups]
        read, numbers = gated, decaying
        if criterion.exchanges:
            read, numbers = (
                [torch.arange(g.size, device="cpu") for g in groups],
                structures.all_of(groups),
            )
        means = gate_derivatives(
            self.objective, groups, gated, criterion.batches, criterion.gate, processes, read
        )
        derivatives = torch.full((2, structures.size), math.nan, dtype=torch.float64, device="cpu")
        derivatives[:, numbers] = torch.stack(means).cpu()
        derivatives[0, numbers] *= signs.repeat_interleave(
            torch.tensor([len(r) for r in read], device="cpu")
        )
        return derivatives[0], derivatives[1]


def _require_refill(group: str, chosen: object, count: int, free: Tensor) -> Tensor:
    """What a refill chose, int64 (n,) on the host.

    Raises:
        ConfigurationError: it is no list of free structures, each once, or more than ``count``.
    """
    try:
        numbers = integers(group, chosen)
    except PhaseError as cause:
        raise ConfigurationError(f"refill returned no choice. {cause}") from cause
    here = (numbers >= 0) & (numbers < free.numel())
    if numbers.numel() > count:
        fault = f"{numbers.numel()} structures, where {count} were released"
    elif not bool(here.all()) or not bool(free[numbers].all()):
        fault = "structures that are not free"
    elif numbers.unique().numel() != numbers.numel():
        fault = "a structure twice"
    else:
        return numbers
    raise ConfigurationError(
        f"refill chose {fault}, for group {group!r}: {numbers.tolist()}; return at most as many as "
        "its second argument says, each once, of those that its third one allows"
    )


def _signs(groups: list[StructureGroup], maximised: set[int]) -> Tensor:
    """For each group, -1 where the optimizer maximises the loss by it, else 1; (groups,)."""
    signs = []
    for group in groups:
        kinds = {id(s.parameter) in maximised for s in group.slices}
        if len(kinds) > 1:
            raise AttachmentError(
                f"the optimizer maximises by some parameters of group {group.name!r} and "
                "minimises by others, so a hearing's loss has no sign for it; give them one "
                "setting of maximize, or use Trajectory()"
            )
        signs.append(-1.0 if kinds.pop() else 1.0)
    return torch.tensor(signs, dtype=torch.float64, device="cpu")
