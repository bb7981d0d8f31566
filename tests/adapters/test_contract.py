"""What every adapter promises, whatever its framework. A new adapter adds a case, no test."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.base import AdapterError, count_macs, count_parameters
from adapters.registry import ADAPTERS
from dpm_core import (
    Hearing,
    LeastResistant,
    Phase,
    PhaseError,
    RandomRelease,
    SelfRectifying,
    SmoothPruning,
)
from tests.support import rounding
from tests.support.frameworks import CASES, EXAMPLE, Case, Drive
from tests.support.rounding import exact_outputs

VARIANTS = ("base", "sp", "sr")
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def finished(case: Case, variant: str, **settings) -> Drive:
    return Drive(case, case.adapter(case.build(), variant, **settings)).run()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_every_registered_adapter_has_a_case():
    assert {c.framework for c in CASES} == set(ADAPTERS)


def largest_step(case: Case, plan: list) -> int:
    """What the removal of a single structure takes off the dense model's MACs, at most."""
    found = []
    for root, channels in plan:
        model = case.build()
        dense = count_macs(model, EXAMPLE)
        case.adapter(model, "base").rebuild(model, EXAMPLE, [(root, channels[:1])])
        found.append(dense - count_macs(model, EXAMPLE))
    return max(found)


@cases
def test_all_variants_meet_the_same_target(case):
    dense = case.build()
    drives = {v: finished(case, v) for v in VARIANTS}
    macs = {v: count_macs(d.model, EXAMPLE) for v, d in drives.items()}
    target = count_macs(dense, EXAMPLE) * case.most_macs
    assert max(macs.values()) <= target
    if case.refills_in_group:
        assert len(set(macs.values())) == 1
        assert len({count_parameters(d.model) for d in drives.values()}) == 1
        assert len({d.adapter.pruned for d in drives.values()}) == 1
    else:
        assert min(macs.values()) > target - largest_step(case, drives["sp"].adapter.removed)
    assert drives["sp"].adapter.pruned > 0
    assert len({d.batches for d in drives.values()}) == 1


@cases
@pytest.mark.parametrize("variant", ["sp", "sr"])
def test_the_smaller_model_gives_the_zeroed_models_outputs(case, variant):
    # At each removal: the steps after it change the model.
    drive = Drive(case, case.adapter(case.exact(), variant))
    adapter, seen = drive.adapter, []
    shrink = type(adapter).remove

    def remove() -> None:
        assert adapter.dpm.count(Phase.DECAYING) == 0
        assert adapter.settled() == (len(seen) == case.removals - 1)
        large = copy.deepcopy(adapter.context.model)
        shrink(adapter)
        small = copy.deepcopy(adapter.context.model)
        assert count_macs(small, EXAMPLE) < count_macs(large, EXAMPLE)
        seen.append((exact_outputs(large, IMAGES), exact_outputs(small, IMAGES)))

    adapter.remove = remove
    drive.run()
    assert len(seen) == case.removals
    for before, after in seen:
        assert not torch.equal(before, torch.zeros_like(before))
        rounding.assert_exact(after, before)


@cases
def test_sp_decays_before_it_removes(case):
    adapter = case.adapter(case.build(), "sp", smooth=SmoothPruning(6))
    drive = Drive(case, adapter).run()
    events = list(itertools.chain(*drive.events))
    decayed = [e for e in events if e.kind == "decay"]
    pruned = [e for e in events if e.kind == "prune"]
    assert sum(len(e.structures) for e in decayed) == adapter.pruned
    started = {(e.group, k): e.step for e in decayed for k in e.structures}
    ended = {(e.group, k): e.step for e in pruned for k in e.structures}
    assert ended == {which: step + 6 for which, step in started.items()}
    assert drive.before_removal is not None


def of_kind(events: list) -> tuple[list, list, list]:
    """The structures that were released, that decayed in their place, and that decayed at all."""
    released = [(e.group, k) for e in events if e.kind == "release" for k in e.structures]
    refilled = [(e.group, k) for e in events if e.kind == "decay" and e.wave for k in e.structures]
    decayed = [(e.group, k) for e in events if e.kind == "decay" for k in e.structures]
    return released, refilled, decayed


@cases
@pytest.mark.parametrize(
    "criterion",
    [
        EAGER_CRITERION := SelfRectifying().criterion.__class__(rate=-1.0, length=-1e9),
        Hearing(batches=1, threshold=-1.0),
        RandomRelease(EAGER_CRITERION),
        LeastResistant(EAGER_CRITERION),
    ],
    ids=lambda c: type(c).__name__,
)
def test_released_structures_stay_and_others_go_in_their_place(case, criterion):
    rectify = SelfRectifying(criterion, max_share=0.4)
    adapter = case.adapter(case.build(), "sr", rectify=rectify)
    drive = Drive(case, adapter).run()
    assert len(drive.events) == case.removals
    went = 0
    for events in drive.events:
        released, refilled, decayed = of_kind(events)
        assert released
        went += len(decayed) - len(released)
        if case.refills_in_group:
            assert sorted(g for g, _ in released) == sorted(g for g, _ in refilled)
        assert not set(released) & set(refilled)
    assert went == adapter.pruned
    released, refilled, _ = of_kind(adapter.dpm.events)
    for group, k in released:
        assert adapter.dpm.phases(group)[k] == Phase.ACTIVE
    for group, k in refilled:
        assert adapter.dpm.phases(group)[k] == Phase.PRUNED


@cases
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(share=st.floats(0, 1))
def test_a_run_taken_up_from_its_state_ends_in_the_same_bits(case, variant, share):
    whole = finished(case, variant)
    stop = 1 + round(share * (whole.batches - 2))
    first = Drive(case, case.adapter(case.build(), variant)).run(stop_after=stop)
    file = io.BytesIO()
    state = {
        "adapter": first.adapter.state_dict(),
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
    }
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model = case.build()
    adapter = case.adapter(model, variant)
    adapter.restore_model(saved["adapter"])
    model.load_state_dict(saved["model"])
    second = Drive(case, adapter, stage=first.stage, step=first.step, batches=first.batches)
    stage = list(adapter.context.stages)[first.stage]
    second.optimizer = adapter.optimizer(stage)
    second.optimizer.load_state_dict(saved["optimizer"])
    adapter.load_state_dict(saved["adapter"], stage, second.optimizer, second.loss)
    second.run()
    assert_equal_weights(second.model, whole.model)
    assert [list(p) for p in adapter.removed] == [list(p) for p in whole.adapter.removed]


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_removed_can_be_repeated_on_a_dense_model(case, variant):
    drive = finished(case, variant)
    model = case.build()
    drive.adapter.rebuild(model, EXAMPLE, drive.adapter.removed)
    model.load_state_dict(drive.model.state_dict())
    assert torch.equal(outputs(model), outputs(drive.model))


@cases
def test_the_masked_model_can_be_built_again_after_the_removal(case):
    drive = finished(case, "sp")
    masked = case.build()
    state = {**drive.adapter.state_dict(), "removed": drive.removed_before}
    case.adapter(masked, "sp").restore_model(state)
    masked.load_state_dict(drive.before_removal.state_dict())
    assert torch.equal(outputs(masked), outputs(drive.before_removal))


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_stays_in_its_mode(case, variant):
    model = case.build()
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    adapter = case.adapter(model, variant)
    adapter.check()
    for stage in adapter.context.stages:
        adapter.begin(stage, adapter.optimizer(stage), lambda: torch.zeros(()))
    if adapter.due():
        adapter.remove()
    assert [m.training for m in model.modules()] == modes


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_impossible_target_is_refused_and_nothing_is_changed(case, variant):
    model = case.build()
    before = weights(model)
    adapter = case.adapter(model, variant, options={**case.options, **case.impossible})
    with pytest.raises(AdapterError, match=r"impossible.*(Lower|Raise)"):
        adapter.check()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@cases
@pytest.mark.parametrize("variant", ["sp", "sr"])
def test_a_stage_too_short_for_the_decay_is_refused(case, variant):
    short = {**case.stages, "prune": case.short}
    with pytest.raises(AdapterError, match="more epochs or shorten"):
        case.adapter(case.build(), variant, stages=short).check()
    case.adapter(case.build(), "base", stages=short).check()


@cases
def test_a_sound_request_passes_the_check_and_changes_nothing(case):
    for variant in VARIANTS:
        model = case.build()
        before = weights(model)
        case.adapter(model, variant).check()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@cases
def test_nothing_is_lost_at_the_decision(case):
    """Selection works on a copy: the real model is only decayed."""
    model = case.exact()
    adapter = case.adapter(model, "sp")
    before = exact_outputs(model, IMAGES)
    for stage in adapter.context.stages:
        adapter.begin(stage, adapter.optimizer(stage), lambda: torch.zeros(()))
    assert not adapter.due()
    assert not adapter.settled()
    rounding.assert_exact(exact_outputs(model, IMAGES), before)


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_gone_stays_gone_until_the_removal(case, variant):
    """Accuracy is measured when an adapter is settled: the removal must find the same model."""
    drive = Drive(case, case.adapter(case.build(), variant))
    adapter, seen = drive.adapter, []

    def look() -> bool:
        if adapter.settled():
            seen.append(adapter.decided)
        return False

    due = adapter.due
    adapter.due = lambda: look() or due()
    drive.run()
    assert seen
    assert all(seen)
    assert adapter.settled()


# ---------------------------------------------------------------------- refused, early


@cases
def test_an_adapter_that_nobody_has_checked_checks_by_itself(case, monkeypatch):
    checked = []

    def noted(asked, check):
        checked.append(asked)
        check()

    for asked in (True, False):
        adapter = case.adapter(case.build(), "sp")
        monkeypatch.setattr(adapter, "check", partial(noted, asked, adapter.check))
        if asked:
            adapter.check()
        stage = next(iter(adapter.context.stages))
        adapter.begin(stage, adapter.optimizer(stage), lambda: torch.zeros(()))
    assert checked == [True, False]


@cases
def test_unknown_variants_and_missing_stages_are_refused(case):
    for variant in ("SR", "Base", "", None):
        with pytest.raises(AdapterError, match="there is no variant"):
            case.adapter(case.build(), variant)
    good = case.adapter(case.build(), "sp")
    for stages, message in (({}, "needs"), ({**good.context.stages, "odd": None}, "odd")):
        context = dataclasses.replace(good.context, model=case.build(), stages=stages)
        with pytest.raises(AdapterError, match=f"the stages are.*{message}"):
            type(good)(context, good.options)


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_layers_are_refused_before_anything_is_changed(case, variant):
    model = case.build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match="frozen"):
        case.adapter(model, variant).check()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@cases
def test_the_optimizer_of_another_model_is_refused(case):
    adapter = case.adapter(case.build(), "sp")
    stage = next(iter(adapter.context.stages))
    adapter.optimizer(stage)
    of_another = torch.optim.SGD(case.build().parameters(), lr=0.1)
    with pytest.raises(AdapterError, match="optimizer is of another model"):
        adapter.begin(stage, of_another, lambda: torch.zeros(()))


@cases
def test_what_is_not_zero_is_not_removed(case):
    """As when an averaging optimizer shows other weights: nothing has changed after the refusal."""
    drive = Drive(case, case.adapter(case.exact(), "sp"))
    adapter, remove = drive.adapter, drive.adapter.remove
    refused = []

    def disturbed() -> None:
        model, optimizer = adapter.context.model, drive.optimizer
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05)
        stirred = {n: p.detach().clone() for n, p in model.named_parameters()}
        held = [id(p) for g in optimizer.param_groups for p in g["params"]]
        masked = any(n.endswith(".gate") for n in values)  # a mask silences whatever the gate is
        if not masked and case.framework != "otov2":  # there what is not zero is not in the plan
            with pytest.raises(
                (AdapterError, PhaseError), match=r"changes the outputs|exactly zero"
            ):
                remove()
            refused.append(True)
            assert adapter.removed is None
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, stirred[name])
            assert [id(p) for g in optimizer.param_groups for p in g["params"]] == held
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        adapter.remove = remove
        remove()

    adapter.remove = disturbed
    drive.run()
    assert bool(refused) == (case.framework in ("depgraph", "torch-prune"))
