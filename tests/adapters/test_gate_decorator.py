"""What is Gate-Decorator's own: turns, frozen layers, masks, selections, fine-tuning."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

from dpm_core import Hearing, Phase, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters.base import AdapterError, count_macs, count_parameters
from dpm_core.adapters.gate_decorator import GateDecoratorOptions
from dpm_core.adapters.removal import Removal
from dpm_core.third_party.gate_decorator import gated
from tests.support.frameworks import CASES, EAGER, EXAMPLE, Drive
from tests.support.snapshot import difference, refused

CASE = next(c for c in CASES if c.framework == "gate-decorator")
SETTINGS = {k: v for k, v in CASE.options.items() if k != "macs"}
OF_PARAMETERS = replace(CASE, options={**SETTINGS, "parameters": 0.75})
# Three steps an epoch: a tock is over at step 3, the first ticks at 6 and 9, a tock at 12, ...
TICKS = {3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 21, 22, 23, 24, 25, 26}


@dataclass
class Seen:
    """What a run did, step by step."""

    rates: list[float] = field(default_factory=list)
    convolutions: list[dict[str, torch.Tensor]] = field(default_factory=list)
    gates: list[torch.Tensor] = field(default_factory=list)
    masks: list[dict[str, torch.Tensor]] = field(default_factory=list)


def watched(variant: str, **settings: Any) -> tuple[Drive, Seen]:
    """A whole run, looked at after every step."""
    adapter = CASE.adapter(CASE.build(), variant, **settings)
    seen, after = Seen(), adapter.after_step

    def after_step() -> None:
        after()
        model = adapter.model
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        seen.convolutions.append({n: m.weight.detach().clone() for n, m in layers.items()})
        gates = gated(model)
        if gates:
            seen.gates.append(torch.cat([g.gate.detach().clone() for g in gates.values()]))
        seen.masks.append({n: g.mask.clone() for n, g in gates.items()})
        (rate,) = {group["lr"] for group in adapter.optimizer.param_groups}
        seen.rates.append(rate)

    adapter.after_step = after_step
    return Drive(CASE, adapter).run(), seen


def structures(drive: Drive, kind: str) -> list[tuple[str, int]]:
    return [(e.group, k) for e in drive.adapter.dpm.events if e.kind == kind for k in e.structures]


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
def test_learning_rates_are_the_methods_own(variant):
    drive, seen = watched(variant)
    tuned = drive.adapter._tuned_from
    assert 6 < tuned <= 54
    low, high = 0.01, 0.05
    for step, rate in enumerate(seen.rates[:tuned]):
        if variant == "sr":
            break  # its releases shift nothing here, but the run is longer than TICKS
        if step >= 27:
            break
        # A tock of three steps: low, high, low.
        expected = low if step in TICKS or step % 3 != 1 else high
        assert rate == pytest.approx(expected), step
    tuning = seen.rates[tuned:]
    assert len(tuning) == 60 - tuned
    assert tuning[0] == pytest.approx(low)
    assert tuning[-1] == pytest.approx(low)
    half = len(tuning) // 2
    assert tuning[: half + 1] == sorted(tuning[: half + 1])
    assert tuning[half:] == sorted(tuning[half:], reverse=True)
    assert max(tuning) > 0.8 * high


def test_convolutions_stand_still_in_ticks_and_gates_do_not():
    drive, seen = watched("base")
    tuned = drive.adapter._tuned_from
    for step in range(1, min(tuned, 27)):
        before, after = seen.convolutions[step - 1], seen.convolutions[step]
        moved = [not torch.equal(before[n], after[n]) for n in after]
        assert any(moved) == (step not in TICKS), step
        assert all(moved) == (step not in TICKS), step
        assert not torch.equal(seen.gates[step - 1], seen.gates[step])


def test_fine_tuning_goes_on_with_the_same_optimizer_started_afresh():
    adapter = CASE.adapter(
        CASE.build(), "base", options={**CASE.options, "finetune_momentum": 0.25}
    )
    drive, seen, remove = Drive(CASE, adapter), [], adapter.remove

    def look() -> Removal:
        (group,) = adapter.optimizer.param_groups
        seen.append((group["momentum"], len(adapter.optimizer.state)))
        removal = remove()
        seen.append((group["momentum"], len(adapter.optimizer.state)))
        return removal

    adapter.remove = look
    drive.run()
    parameters = list(drive.model.parameters())
    assert seen == [(0.9, len(parameters)), (0.25, 0)]
    assert adapter.optimizer is drive.optimizer
    (group,) = drive.optimizer.param_groups
    assert group["weight_decay"] == 5e-4
    assert list(map(id, group["params"])) == list(map(id, parameters))
    assert len(drive.optimizer.state) == len(parameters)


def test_attributes_of_parameters_go_on_with_gates_and_after_them():
    model = CASE.build()
    for p in model.parameters():
        p.no_decay, p.place = True, torch.arange(p.numel()).view_as(p)
    adapter = CASE.adapter(model, "base")
    before = {name: p.numel() for name, p in model.named_parameters()}
    masked: dict[str, torch.Tensor] = {}
    small: dict[str, torch.Tensor] = {}
    take_out = adapter.take_out

    def look(going: dict[str, list[int]]) -> Removal:
        assert all(p.no_decay and p.place.shape == p.shape for p in model.parameters())
        masked.update((name, p.detach().clone()) for name, p in adapter._by_place().items())
        removal = take_out(going)
        small.update((name, p.detach().clone()) for name, p in model.named_parameters())
        return removal

    adapter.take_out = look
    Drive(CASE, adapter).run()
    assert sum(p.numel() < before[name] for name, p in model.named_parameters()) > 0
    for name, p in model.named_parameters():
        assert p.no_decay
        if not name.endswith("norm.bias"):  # which is the shift times the gate
            assert torch.equal(small[name], masked[name].flatten()[p.place]), name
        else:
            weight = model.get_parameter(name.removesuffix("bias") + "weight")
            assert torch.equal(p.place, weight.place)


def test_hooks_on_gradients_go_on_with_gates_and_after_them():
    model, seen = CASE.build(), set()
    names = [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        p.register_hook(lambda g, n=name: seen.add((n, g.numel())))
    adapter = CASE.adapter(model, "base")
    before = {name: p.numel() for name, p in model.named_parameters()}
    Drive(CASE, adapter).run()
    after = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(after[name] < before[name] for name in names) > 0
    assert seen == {*before.items(), *after.items()}


# ---------------------------------------------------------------------- a user's own optimizer

GATED = ("norm", "inner_norm", "outer_norm")


def in_two_groups(model: nn.Module) -> dict[bool, list[tuple[str, nn.Parameter]]]:
    """The small ResNet's parameters by name: BatchNorms' or their gates', and all others."""
    return {
        gates: [(n, p) for n, p in model.named_parameters() if (n.split(".")[0] in GATED) == gates]
        for gates in (False, True)
    }


@pytest.mark.parametrize("kind", ["none", "warm-up", "one cycle", "decayed"])
def test_a_warm_up_does_not_lower_the_peak(kind):
    model = CASE.build()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kind == "warm-up":
        schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    elif kind == "one cycle":
        schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=90)
    elif kind == "decayed":  # by training that went before
        decay = schedules.ExponentialLR(optimizer, 0.5)
        Drive(CASE, CASE.adapter(model, "base"), optimizer=optimizer).loss().backward()
        optimizer.step()
        decay.step()
    adapter = CASE.adapter(model, "base")
    drive = Drive(CASE, adapter, optimizer=optimizer).run(1)
    assert adapter._peaks == ((0.025,) if kind == "decayed" else (0.05,))
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    drive.run()
    assert max(rates) > 0.8 * adapter._peaks[0]


def test_a_peak_of_zero_is_refused_before_gates_are_put_in():
    model = CASE.build()
    adapter = CASE.adapter(model, "sp")
    with refused(AdapterError, "learning rate is 0", "above 0", model=model):
        adapter.attach(SGD(model.parameters(), lr=0.0))
    assert not gated(model)


def test_who_trains_longer_than_was_said_does_so_at_the_last_rate():
    drive = Drive(CASE, CASE.adapter(CASE.build(), "base")).run()
    for _ in range(3):
        drive.optimizer.zero_grad()
        drive.loss().backward()
        drive.optimizer.step()
        assert drive.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(("variant", "rate"), [("base", float), ("sr", torch.tensor)])
def test_parameter_groups_keep_their_own_rates_settings_and_places(variant, rate):
    model = CASE.build()
    parts = in_two_groups(model)
    optimizer = torch.optim.SGD(
        [
            {"params": parts[False], "lr": rate(0.05), "weight_decay": 1e-3},
            {"params": parts[True], "lr": rate(0.02), "weight_decay": 0.0},
        ],
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # without any effect
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    adapter = CASE.adapter(model, variant)
    rates, before = [], adapter.before_step

    def before_step() -> None:
        before()
        rates.append([group["lr"] for group in optimizer.param_groups])
        for group, part in zip(optimizer.param_groups, in_two_groups(model).values(), strict=True):
            assert list(map(id, group["params"])) == [id(p) for _, p in part]

    adapter.before_step = before_step
    assert Drive(CASE, adapter, optimizer=optimizer).run().optimizer is optimizer
    low, high = [0.01, 0.01], [0.05, 0.02]  # a tock, and the first tick
    assert torch.allclose(torch.tensor(rates[:6]), torch.tensor([low, high, *[low] * 4]))
    tuning = rates[adapter._tuned_from :]
    assert max(tuning)[0] > 0.8 * 0.05
    for one, other in tuning:
        assert (one - 0.01) / (0.05 - 0.01) == pytest.approx((other - 0.01) / (0.02 - 0.01))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-3, 0.0]
    assert scheduler.last_epoch == len(rates) == 60
    for group, part in zip(optimizer.param_groups, in_two_groups(model).values(), strict=True):
        assert list(map(id, group["params"])) == [id(p) for _, p in part]


@pytest.mark.parametrize("lacks", ["stem.weight", "norm.weight", "outer_norm.bias", "head.bias"])
def test_an_optimizer_that_lacks_parameters_is_refused_before_gates_are_put_in(lacks):
    model = CASE.build()
    optimizer = torch.optim.Adam(p for n, p in model.named_parameters() if n != lacks)
    adapter = CASE.adapter(model, "sp")
    with refused(AdapterError, repr(lacks), model=model, optimizer=optimizer):
        adapter.attach(optimizer)
    assert not adapter.optimizers
    adapter.attach(torch.optim.Adam(model.parameters()))  # it can still be put right
    assert gated(model).keys() == set(GATED)


@pytest.mark.parametrize("held", [True, False])
def test_convolutions_that_the_user_froze_stay_frozen_and_as_they_were(held):
    model = CASE.build()
    model.inner.weight.requires_grad_(False)
    frozen = model.inner.weight.detach().clone()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if held or p.requires_grad],
        0.05,
        momentum=0.9,
        weight_decay=5e-4,
    )
    adapter = CASE.adapter(model, "sp")
    drive = Drive(CASE, adapter, optimizer=optimizer).run()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["inner.weight"]
    assert torch.equal(drive.before_removal.inner.weight, frozen)
    gone = {name: set(channels) for name, channels in adapter.removed}
    for dim, group in enumerate([{"inner"}, {"stem", "outer"}]):
        out = set().union(*(gone.get(name, set()) for name in group))
        kept = [k for k in range(frozen.shape[dim]) if k not in out]
        frozen = frozen.index_select(dim, torch.tensor(kept))
    assert torch.equal(model.inner.weight, frozen)
    assert frozen.numel() < 16 * 12 * 9
    of_model = {id(p) for p in model.parameters() if held or p.requires_grad}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == of_model


def test_a_warm_adam_keeps_its_state_but_for_the_gates_and_starts_afresh_at_the_removal():
    model = CASE.build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    warm = Drive(CASE, CASE.adapter(model, "sp"), optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        warm.loss().backward()
        optimizer.step()
    states = {n: dict(optimizer.state[p]) for n, p in in_two_groups(model)[False]}
    adapter, seen = CASE.adapter(model, "sp"), []
    adapter.attach(optimizer, warm.loss)
    parts = in_two_groups(model)
    assert {p for _, p in parts[False]} == optimizer.state.keys()
    for name, parameter in parts[False]:
        assert all(optimizer.state[parameter][k] is v for k, v in states[name].items())
    remove = adapter.remove

    def look() -> Removal:
        # Gates learn in every step, convolutions in tocks only.
        counted = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
        seen.append((adapter.clock, counted["norm.gate"], counted["stem.weight"] - 3))
        removal = remove()
        assert not optimizer.state
        return removal

    adapter.remove = look
    Drive(CASE, adapter, optimizer=optimizer).run()
    ((clock, gates, convolutions),) = seen
    assert gates == clock
    assert convolutions == sum(step not in TICKS for step in range(clock))
    assert {int(s["step"]) for s in optimizer.state.values()} == {60 - clock}


# ---------------------------------------------------------------------- gates and masks


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
def test_masks_never_recover(variant):
    _, seen = watched(variant)
    at_work = [m for m in seen.masks if m]
    for before, after in itertools.pairwise(at_work):
        assert all(bool((after[n] <= before[n]).all()) for n in after)
    assert any(bool((m == 0).any()) for m in at_work[-1].values())


def test_a_gate_is_masked_when_its_decay_is_over_and_not_before():
    drive, seen = watched("sp", smooth=SmoothPruning(5))
    pruned = {}
    for event in drive.adapter.dpm.events:
        for k in event.structures if event.kind == "prune" else ():
            pruned[event.group, k] = event.step
    assert pruned
    # `norm` belongs to the group of the stem, `inner_norm` stands alone; one channel a structure.
    names = {"stem": "norm", "outer": "norm", "inner": "inner_norm"}
    for step, masks in enumerate(seen.masks, start=1):
        for (group, k), end in pruned.items():
            if masks:
                assert bool(masks[names[group]][k] == 0) == (step >= end), (group, k, step)


def test_base_masks_at_once_what_sp_starts_to_decay():
    _, base = watched("base")
    sp = CASE.adapter(CASE.build(), "sp")
    Drive(CASE, sp).run()
    first = [e for e in sp.dpm.events if e.kind == "decay" and e.step == 6]
    assert first
    taken = sum(len(e.structures) for e in first)
    masks = base.masks[5]
    # The tied group shows in two BatchNorms.
    assert torch.equal(masks["norm"], masks["outer_norm"])
    gone = sum(int((masks[n] == 0).sum()) for n in ("norm", "inner_norm"))
    assert gone == taken
    assert all(bool((m == 1).all()) for m in base.masks[4].values())


def test_released_gates_come_back_and_the_next_selection_takes_as_many_more():
    adapter = CASE.adapter(CASE.build(), "sr", rectify=EAGER)
    asked, selected = [], adapter.decide

    def decide() -> None:
        asked.append((adapter._steps_done, adapter._released))
        selected()

    adapter.decide = decide
    drive = Drive(CASE, adapter).run()
    released = structures(drive, "release")
    assert released
    removed = {(root, k) for root, ks in adapter.removed for k in ks}
    assert not removed & set(released)
    for group, k in released:
        assert adapter.dpm.phases(group)[k] == Phase.ACTIVE
    # A release between two selections is made good by the second.
    at = [(e.step, len(e.structures)) for e in adapter.dpm.events if e.kind == "release"]
    for (before, _), (step, count) in zip([(0, 0), *asked], asked, strict=False):
        assert count == sum(n for when, n in at if before < when <= step)
    assert any(count for _, count in asked)


@pytest.mark.parametrize("max_share", [0.5, 1.0])
@pytest.mark.parametrize(("counted", "least"), [("macs", 0.1185), ("parameters", 0.5673)])
@pytest.mark.parametrize(("over", "some"), [(0.001, False), (0.05, True)])
def test_no_more_is_released_than_a_target_near_the_least_allows(
    counted, least, over, some, max_share
):
    everything = SelfRectifying(Trajectory(rate=-1, length=-1e9), max_share=max_share)
    options = {**SETTINGS, "keep": 0.25, counted: least + over}
    drive = Drive(CASE, CASE.adapter(CASE.build(), "sr", options=options, rectify=everything)).run()
    assert drive.adapter.complete
    assert bool(structures(drive, "release")) == some
    left = drive.adapter.options.target
    dense = CASE.build()
    count = {"macs": lambda m: count_macs(m, EXAMPLE), "parameters": count_parameters}[counted]
    assert count(drive.model) <= left * count(dense)


def test_a_hearing_uses_up_batches_and_no_part_of_a_tick():
    """Its batches are training steps of the stage; a tick is as long as ever."""
    rectify = SelfRectifying(Hearing(batches=2, threshold=1.0), max_share=0.4)  # releases nothing
    heard = CASE.adapter(CASE.build(), "sr", rectify=rectify)
    drive = Drive(CASE, heard).run()
    assert heard.dpm.heard > 0
    assert drive.step == 60
    # Own steps of ticks and tocks: selections fall at the ends of ticks only.
    starts = {e.step for e in heard.dpm.events if e.kind == "decay"}
    assert starts <= {6, 9, 15, 18, 24, 27, 33, 36, 42, 45}
    assert len(starts) > 1


def test_what_it_counts_is_what_the_small_model_has():
    adapter = CASE.adapter(CASE.build(), "sp")
    left, remove = [], adapter.remove

    def look() -> Removal:
        left.append(adapter._method.macs(adapter._alive()))
        return remove()

    adapter.remove = look
    drive = Drive(CASE, adapter).run()
    assert left == [count_macs(drive.model, EXAMPLE)]
    assert not gated(drive.model)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (CASE, r"0\.\d+ of the MACs are left .* 0\.6 .*more epochs"),
        (OF_PARAMETERS, r"0\.\d+ of the parameters are left .* 0\.75 .*more epochs"),
    ],
)
def test_a_target_that_is_not_met_in_time_is_an_error_with_figures(case, message):
    adapter = case.adapter(case.build(), "base", options={**case.options, "finetune_epochs": 16})
    with pytest.raises(AdapterError, match=message):
        Drive(case, adapter).run()


# ---------------------------------------------------------------------- a target of parameters


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
def test_a_target_of_parameters_is_met_by_the_last_structure_that_goes(variant):
    adapter = OF_PARAMETERS.adapter(OF_PARAMETERS.build(), variant)
    target, said, remove = int(0.75 * count_parameters(adapter.model)), [], adapter.remove

    def look() -> Removal:
        said.append(adapter._method.cost(adapter._alive()))
        return remove()

    adapter.remove = look
    drive = Drive(OF_PARAMETERS, adapter).run()
    assert said == [count_parameters(drive.model)]
    # One structure less of either kind, and it would be above.
    back = []
    for root, _ in adapter.removed:
        model = OF_PARAMETERS.build()
        plan = [(r, c[1:] if r == root else c) for r, c in adapter.removed]
        Removal([(r, c) for r, c in plan if c]).apply(model, EXAMPLE, cut=True)
        back.append(count_parameters(model))
    assert count_parameters(drive.model) <= target < max(back)
    if variant == "sr":
        assert structures(drive, "release")


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_run_with_a_target_of_parameters_is_taken_up_in_the_same_bits(variant, before):
    """Stopped right before the step in which its first structures go, or some steps after."""
    case = OF_PARAMETERS
    whole = Drive(case, case.adapter(case.build(), variant)).run()
    first = Drive(case, case.adapter(case.build(), variant)).run(stop_after=5 if before else 11)
    parts = (first.adapter, first.model, first.optimizer)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    adapter = case.adapter(case.build(), variant)
    adapter.load_state_dict(saved[0])
    adapter.model.load_state_dict(saved[1])
    second = Drive(case, adapter, first.step, case.new_optimizer(adapter))
    second.optimizer.load_state_dict(saved[2])
    second.run()
    assert difference(whole.model.state_dict(), second.model.state_dict()) is None
    assert adapter.removed == whole.adapter.removed


def test_an_impossible_target_of_parameters_is_refused_with_the_least_there_can_be():
    case, model = OF_PARAMETERS, OF_PARAMETERS.build()
    with refused(AdapterError, "parameters 0.1 is impossible", "Raise parameters", model=model):
        case.adapter(model, "sp", options={**SETTINGS, "parameters": 0.1}).check()
    least = case.build()  # an inner and an outer structure left
    kept = {"stem": range(1, 12), "inner": range(1, 16)}
    Removal([(root, list(channels)) for root, channels in kept.items()]).apply(
        least, EXAMPLE, cut=True
    )
    share = count_parameters(least) / count_parameters(model)
    for off, fine in ((1e-6, True), (-1e-6, False)):
        adapter = case.adapter(model, "sp", options={**SETTINGS, "parameters": share + off})
        if fine:
            adapter.check()
        else:
            words = (f"{share:.4f} of the parameters are left", "lower keep")
            with refused(AdapterError, *words, model=model):
                adapter.check()


def test_the_term_for_flops_is_the_same_with_a_target_of_parameters():
    """What a tick selects first depends on scores and areas, not on what the target counts."""
    first = []
    for case in (CASE, OF_PARAMETERS):
        adapter = case.adapter(case.build(), "sp", options={**case.options, "eta": 1e6})
        drive = Drive(case, adapter).run(stop_after=6)
        first.append(structures(drive, "decay"))
    assert first[0] == first[1]
    assert first[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "neither of macs and parameters"),
        ({"macs": None}, "neither of macs and parameters"),
        ({"macs": 0.5, "parameters": 0.5}, "both of macs and parameters"),
        ({"parameters": 0.0}, "parameters is 0.0; .*above 0, below 1"),
        ({"parameters": 1.0}, "parameters is 1.0; .*above 0, below 1"),
        ({"parameters": float("nan")}, "parameters is nan; .*above 0, below 1"),
        ({"macs": float("nan")}, "macs is nan; .*above 0, below 1"),
    ],
)
def test_exactly_one_target_has_to_be_given(options, word):
    with pytest.raises(AdapterError, match=word):
        GateDecoratorOptions(**options)


def test_either_target_can_be_given():
    assert GateDecoratorOptions(0.25) == GateDecoratorOptions(macs=0.25)
    options = GateDecoratorOptions(macs=None, parameters=0.25)
    assert options == GateDecoratorOptions(parameters=0.25)
    assert (options.counted, options.target) == ("parameters", 0.25)
    assert (GateDecoratorOptions(0.5).counted, GateDecoratorOptions(0.5).target) == ("macs", 0.5)


def test_a_model_without_gates_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    with pytest.raises(AdapterError, match="BatchNorm"):
        CASE.adapter(model, "sp").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.0}, "above 0, below 1"),
        ({"macs": 1.0}, "above 0, below 1"),
        ({"fraction": 0.0}, "fraction above 0"),
        ({"keep": 1.0}, "keep in"),
        ({"eta": -1.0}, "eta and strength of at least 0"),
        ({"strength": -1.0}, "eta and strength of at least 0"),
        ({"low_rate": 0.0}, "low_rate above 0"),
        ({"tick_epochs": 0}, "of at least 1"),
        ({"ticks": 0}, "of at least 1"),
        ({"finetune_epochs": 0}, "of at least 1"),
        ({"finetune_momentum": 1.0}, "finetune_momentum in"),
    ],
)
def test_odd_options_are_refused(options, message):
    with pytest.raises(AdapterError, match=message):
        GateDecoratorOptions(**{"macs": 0.5, **options})


def test_the_term_for_flops_changes_the_choice():
    """At equal areas a strong one takes from the group that has the most structures left."""
    order = {}
    for eta in (0.0, 1e6):
        adapter = CASE.adapter(CASE.build(), "sp", options={**CASE.options, "eta": eta})
        Drive(CASE, adapter).run()
        events = [e for e in adapter.dpm.events if e.kind == "decay"]
        order[eta] = [(e.step, e.group, len(e.structures)) for e in events]
    assert order[0.0] != order[1e6]
    left = {"inner": 16, "stem": 12}
    (tied,) = {g for _, g, _ in order[1e6]} - {"inner"} or {"stem"}
    left[tied] = left.pop("stem")
    for _, group, count in order[1e6]:
        assert left[group] >= max(left.values())
        left[group] -= count


def test_trajectories_are_compared_over_several_ticks():
    """Few structures a tick: with the defaults none would ever stand out of its own cohort."""
    rectify = SelfRectifying(Trajectory(rate=-1.0, length=1.0), max_share=0.4)
    adapter = CASE.adapter(CASE.build(), "sr", rectify=rectify)
    drive = Drive(CASE, adapter).run()
    assert structures(drive, "release")
