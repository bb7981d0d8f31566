"""Gate-Decorator: global selection by scored gates, in ticks and tocks.

``base`` masks what a tick selects at once, as the original does. For ``sp`` and ``sr`` the gates
and shifts of the selected structures decay, on through the ticks and tocks that follow, and are
masked when they are zero. Once the MACs (or the parameters, where the options say so) are down to
the target the gates are melted into a physically smaller, plain network, which is fine-tuned for
what is left of the training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpm_core import Owner, Phase, Slice, StructureGroup
from dpm_core.third_party import gate_decorator as method
from dpm_core.third_party import running, tracing

from .base import Adapter, AdapterError, Structures, Training, width_unit
from .optimizer_state import Attributes, exchange
from .removal import Removal


@dataclass(frozen=True)
class GateDecoratorOptions:
    """Settings of the framework; defaults are the original's.

    The target is ``macs`` or ``parameters``: exactly one of them has to be given.

    The optimizer's learning rate, when it is attached, is the peak of tocks and of fine-tuning;
    what it is set to later has no effect. Where a scheduler has lowered it before the optimizer's
    first step, as a warm-up does, the peak is what it was before (``initial_lr``), or what the
    scheduler leads to (OneCycleLR's ``max_lr``).

    Attributes:
        macs: share of the dense model's MACs that is left, at most; ``None``: no such target.
        fraction: share of the gates left that a tick selects: 0.005 for VGG16, 0.002 for ResNet-56.
        eta: strength of the FLOPs term, whatever the target is; both recipes have none.
        keep: share of each group that is protected in a selection.
        strength: of the tocks' penalty on gates.
        tick_epochs, tock_epochs: their lengths.
        ticks: how many lie between two tocks.
        low_rate: the learning rate of ticks, and at both ends of tocks and of fine-tuning.
        finetune_epochs: what must be left for fine-tuning; it takes all that is left.
        finetune_momentum: of its optimizer.
        ignored: names of layers whose groups are left as they are.
        parameters: share of the dense model's parameters that is left, at most (ours).
        round_to: layers that lose channels keep a multiple of so many (ours). Ticks select as
            without it; the last one takes all groups on to their next lower multiples. What was
            released is then replaced at once, in its group, by the scores of the last selection,
            and no group releases more than leave it what rounding takes.

    Raises:
        AdapterError: a value is out of its range, or not exactly one target is given.
    """

    macs: float | None = None
    fraction: float = 0.005
    eta: float = 0.0
    keep: float = 0.1
    strength: float = 1e-3
    tick_epochs: int = 1
    tock_epochs: int = 10
    ticks: int = 10
    low_rate: float = 1e-3
    finetune_epochs: int = 40
    finetune_momentum: float = 0.0
    ignored: tuple[str, ...] = ()
    parameters: float | None = None
    round_to: int | None = None

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.parameters is None):
            number = "neither" if self.macs is None else "both"
            raise AdapterError(
                f"{number} of macs and parameters is given; give one of them, the share to keep"
            )
        if not 0 < self.target < 1:
            raise AdapterError(
                f"{self.counted} is {self.target}; give the share to keep, above 0, below 1"
            )
        width_unit(self.round_to)
        if not 0 < self.fraction < 1 or not 0 <= self.keep < 1:
            raise AdapterError("give fraction above 0 and below 1, and keep in [0, 1)")
        if not (self.eta >= 0 and self.strength >= 0 and self.low_rate > 0):
            raise AdapterError("give eta and strength of at least 0, and low_rate above 0")
        if min(self.tick_epochs, self.tock_epochs, self.ticks, self.finetune_epochs) < 1:
            raise AdapterError(
                "give tick_epochs, tock_epochs, ticks and finetune_epochs of at least 1"
            )
        if not 0 <= self.finetune_momentum < 1:
            raise AdapterError("give finetune_momentum in [0, 1)")

    @property
    def counted(self) -> method.Counted:
        """What the target is a share of; the name of the option that gives it."""
        return "macs" if self.parameters is None else "parameters"

    @property
    def target(self) -> float:
        """Share of it that is left, at most."""
        share: float = getattr(self, self.counted)
        return share


class GateDecorator(Adapter):
    """See the module.

    Gates come into the model with :meth:`attach`, and in the optimizer they take the places of the
    BatchNorms' weights and biases. Fine-tuning goes on with the same optimizer, started afresh.
    """

    Options: ClassVar[type] = GateDecoratorOptions
    options: GateDecoratorOptions
    training: Training
    needs_training: ClassVar[bool] = True
    carries: ClassVar[bool] = False

    _method: Any = None  # from attach() to the removal
    _turn: Any = None
    _steps_done = 0  # of ticks and tocks, hearings' batches not among them
    _tuned_from: int | None = None  # the step of the training at which fine-tuning began
    _released = 0  # since the last selection
    _left = 1.0  # share of what the target counts, decaying structures counted as gone
    _met = False  # whether the target is, at widths that are rounded
    _ranking: Tensor | None = None  # scores of the last selection, for refills
    _peaks: tuple[float, ...] = ()  # of the optimizer's groups, when first attached

    @property
    def refills(self) -> bool:
        """Only where widths are rounded; else the next selection takes more."""
        return width_unit(self.options.round_to) > 1

    @property
    def _times(self) -> method.TickTock:
        o = self.options
        return method.TickTock(self.training.steps_per_epoch, o.tick_epochs, o.tock_epochs, o.ticks)

    @property
    def _last(self) -> int:
        """The step by which fine-tuning has to begin."""
        tuning: int = self.options.finetune_epochs * self.training.steps_per_epoch
        return self.training.steps - tuning

    def _decorated(self, model: nn.Module) -> Any:
        o = self.options
        return method.GateDecorator(
            model,
            self.example,
            fraction=o.fraction,
            eta=o.eta,
            keep=o.keep,
            strength=o.strength,
            counted=o.counted,
            round_to=width_unit(o.round_to),
            ignored=o.ignored,
            progress=self.progress,
        )

    def check(self) -> None:
        """Refuse too short a training, a model without gates, and a target no selection meets."""
        times = self._times
        needed = times.steps_per_epoch * (times.tock_epochs + times.tick_epochs)
        needed += self.decay_steps()
        if needed > self._last:
            raise AdapterError(
                f"the first tock and tick and a decay take up to {needed} steps, but before "
                f"fine-tuning the training has {self._last}; give it more epochs or shorten "
                "smooth.steps, tock_epochs or finetune_epochs"
            )
        tracing.require_plain_weights(self.model)
        gated = self._decorated(running.copied(self.model))
        for group in gated.groups:
            for name in group.members:
                own = self.model.get_submodule(name).named_parameters(prefix=name)
                self.check_trainable(group.name, own)
        least, o = gated.least() / gated.costs.dense, self.options
        if o.target < least:
            lower = "keep or round_to" if self.refills else "keep"
            raise AdapterError(
                f"{o.counted} {o.target} is impossible: with what has to stay in every group, "
                f"{least:.4f} of the {gated.costs.word} are left. Raise {o.counted}, or lower "
                f"{lower}"
            )
        super().check()

    # ------------------------------------------------------------------ the run

    def start(self) -> None:
        """Gates are put in; ticks and tocks begin."""
        if self._method is None:
            self._put_gates_in()
        self.follow()
        self._begin_step()

    def _put_gates_in(self) -> None:
        before = self._by_place()
        optimized = {p for group in self.param_groups() for p in group["params"]}
        for name, parameter in before.items():
            if parameter.requires_grad and parameter not in optimized:
                raise AdapterError(
                    f"the optimizer does not hold {name!r}, and gates take the places of "
                    "parameters in it; give it all parameters of the model that train"
                )
        self._peaks = tuple(
            _peak(group, warm=bool(optimizer.state))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        )
        if min(self._peaks) <= 0:
            raise AdapterError(
                "a parameter group's learning rate is 0, and it is the peak of tocks and "
                "fine-tuning; give it one above 0, or leave what is not to train out of the "
                "optimizer"
            )
        attributes = Attributes(before)
        self._method = self._decorated(self.model)
        attributes.finish(self._by_place(), {})
        self._hand_over(before)

    def _by_place(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name, gates and shifts by the names of what they replace."""
        gates, places = method.gated(self.model), {}
        for name, parameter in self.model.named_parameters():
            layer, _, own = name.rpartition(".")
            places[f"{layer}.{_STANDS_FOR[own]}" if layer in gates else name] = parameter
        return places

    def _hand_over(self, before: Mapping[str, nn.Parameter]) -> None:
        """Put the model's parameters into the optimizers, in place of the earlier ones."""
        now = self._by_place()
        for optimizer in self.optimizers:
            exchange(optimizer, {before[name]: now[name] for name in before})

    def groups(self) -> list[StructureGroup]:
        """Tied gates."""
        return [structure_group(g, self._method.gates) for g in self._method.groups]

    def _begin_step(self) -> None:
        """What the next step needs before its forward pass: frozen convolutions in a tick."""
        if not self.complete:
            self._turn = method.turn_at(self._steps_done, self._times)
            self._method.begin(self._turn)

    def before_step(self) -> None:
        """Scores in a tick, the penalty in a tock, and the method's own learning rates."""
        done, low = self.clock + self.heard, self.options.low_rate
        if not self.complete:
            if done >= self._last:
                left = f"{self._left:.4f} of the {self._method.costs.word} are left"
                what = "decays go on" if self._met else left
                raise AdapterError(
                    f"{what} where fine-tuning should begin, with {self.options.target} as the "
                    "target; give the training more epochs, or raise fraction"
                )
            self._method.after_backward(self._turn)
            rates = [method.learning_rate(self._turn, low, peak) for peak in self._peaks]
        else:
            if self._tuned_from is None:
                self._tuned_from = done
            length = max(1, self.training.steps - self._tuned_from)
            at = min(done - self._tuned_from, length - 1)  # who trains on does so at the last rate
            rates = [method.triangle(at, length, low, peak) for peak in self._peaks]
        for group, rate in zip(self.param_groups(), rates, strict=True):
            group["lr"] = rate

    def after_step(self) -> None:
        """Mask what has become zero; after a tick, select."""
        if self.complete:
            return
        self._steps_done += 1
        self._follow_core()
        if self._turn.kind == "tick" and self._turn.last and not self._met:
            self.decide()
            self._follow_core()
            self._measure()
        self._begin_step()

    def _follow_core(self) -> None:
        """Mask the structures that the core has pruned, and count those that it has released."""
        for event in self.new_events():
            if event.kind == "prune":
                table = self._method.table
                table.mask(table.ids(event.group, event.structures))
            elif event.kind == "release" and not self.refills:
                self._released += len(event.structures)
                self._measure()

    def decide(self) -> None:
        """A selection falls; without smoothing it is masked at once."""
        super().decide()
        if self.dpm is None:
            self._method.prune(self._target)
        self._released = 0

    def selection(self) -> Structures:
        """What the tick's scores select, and one more for each structure that was released."""
        assert self.dpm is not None
        alive, spared = self._alive(), self._by_structure(self.dpm.available) == 0
        if self.refills:
            self._ranking = self._method.scores.of_structures().cpu()
        chosen = self._method.selected(self._target, alive, spared, more=self._released)
        return dict(self._method.table.split(chosen))

    def choose(self, group: str, count: int, free: Tensor) -> Tensor:
        """What ranked lowest in the group at the last selection."""
        assert self._ranking is not None
        scores = self._ranking[self._method.table.ids(group)].where(free, torch.inf)
        return scores.argsort(stable=True)[: min(count, int(free.sum()))]

    @property
    def _target(self) -> int:
        return int(self.options.target * self._method.costs.dense)

    def _by_structure(self, what: Callable[[str], Tensor]) -> Tensor:
        """What the core reports of all structures, in the order of the method's table."""
        listed = torch.cat([what(group.name) for group in self._method.groups])
        return listed.to(running.device_of(self.example, self.model))

    def _alive(self) -> Tensor:
        """Structures that stay, as things are: decaying ones count as gone."""
        if self.dpm is None:
            alive: Tensor = self._method.table.alive()
            return alive
        return self._by_structure(self.dpm.phases) == Phase.ACTIVE

    def _measure(self) -> None:
        """Count what is left; only selections and releases change it."""
        alive = self._alive()
        self._left = self._method.cost(alive) / self._method.costs.dense
        self._met = self._left <= self.options.target and self._method.even(alive)
        if self.dpm is None:
            return
        if self.refills:
            self.dpm.reserved = {} if self._met else self._method.spare()
        elif self.rectify is not None:
            self.dpm.reserved = self._reserved(alive)

    def _reserved(self, alive: Tensor) -> dict[str, int]:
        """What releases must leave: a released structure is not selected again."""
        assert self.dpm is not None
        kept = self._method.table.kept
        free = kept(self._by_structure(self.dpm.available))
        decaying = kept(self._by_structure(self.dpm.phases) == Phase.DECAYING)
        allowed = self._method.releasable(kept(alive) - free, decaying, self._target)
        names = [group.name for group in self._method.groups]
        return dict(zip(names, (free.cpu() - allowed).clamp(min=0).tolist(), strict=True))

    @property
    def settled(self) -> bool:
        """Whether the target is met and nothing decays any more."""
        return self.complete or (self.decided and self._met and self._none_decays())

    @property
    def due(self) -> bool:
        """Whether the target is met, so that the gates can be melted."""
        return not self.complete and self.settled

    def going(self) -> Structures:
        """What is masked."""
        return dict(self._method.table.split((~self._alive()).nonzero()[:, 0]))

    def take_out(self, going: Structures) -> Removal:
        """Melt: plain BatchNorms again, without the masked structures."""
        before = self._by_place()
        attributes = Attributes(before)
        stays = self._method.survivors(self.example) if attributes.divided else {}
        removal = Removal(self._method.melt(self.example))
        attributes.finish(self._by_place(), stays)
        self._hand_over(before)
        for optimizer in self.optimizers:
            for parameter in self.model.parameters():
                optimizer.state.pop(parameter, None)
        for group in self.param_groups():
            if "momentum" in group:
                group["momentum"] = self.options.finetune_momentum
        self._method = None
        return removal

    # ------------------------------------------------------------------ saving

    def own_state(self) -> dict[str, Any]:
        """Its own progress and the scores; gates and masks are in the model."""
        return {
            "steps": self._steps_done,
            "tuned_from": self._tuned_from,
            "released": self._released,
            "ranking": self._ranking,
            "peaks": list(self._peaks),
            "scores": None if self._method is None else self._method.state_dict(),
        }

    def lay_out(self, removed: Removal | None) -> None:
        """Give the model its gates, or make it small."""
        super().lay_out(removed)
        if not self.complete:
            self._method = self._decorated(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the model its gates, or make it small."""
        super().load_state_dict(state)
        self._steps_done, self._tuned_from = state["steps"], state["tuned_from"]
        self._released, self._peaks = state["released"], tuple(state["peaks"])
        self._ranking = state.get("ranking")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self.complete:
            self.follow()
            return
        super().restore(state)
        self._method.load_state_dict(state["scores"])
        self._measure()
        self._begin_step()


def _peak(group: Mapping[str, Any], warm: bool) -> float:
    """A group's learning rate; of an optimizer that has not run, without a warm-up."""
    rate = group["lr"]
    return float(rate if warm else group.get("max_lr", group.get("initial_lr", rate)))


_STANDS_FOR = {"gate": "weight", "shift": "bias"}


def structure_group(
    group: method.GateGroup, gates: Mapping[str, method.GatedBatchNorm]
) -> StructureGroup:
    """Tied gates as the core's structure group: a structure is a gate with its shift, if any."""
    slices = [
        Slice(parameter, index, batch_norm=True, name=f"{name}.{part}")
        for name, index in group.members.items()
        for part in ("gate", "shift")
        if (parameter := getattr(gates[name], part)) is not None
    ]
    owners = [Owner(gates[name], index) for name, index in group.members.items()]
    return StructureGroup(group.name, slices, owners)
