"""What every adapter promises, whatever its framework. A new adapter adds a case, no test."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from dpm_core import (
    AttachmentError,
    ConfigurationError,
    DecayPruningError,
    Exchange,
    Hearing,
    LeastResistant,
    Phase,
    PhaseError,
    RandomRelease,
    SelfRectifying,
    SmoothPruning,
)
from dpm_core.adapters import registry
from dpm_core.adapters.base import Adapter, AdapterError, Training, count_macs, count_parameters
from dpm_core.adapters.registry import ADAPTERS
from dpm_core.adapters.removal import Removal
from tests.support import rounding
from tests.support.frameworks import (
    CASES,
    EAGER,
    EXAMPLE,
    Case,
    Drive,
    bias_less,
    check_once,
    until_removed,
)
from tests.support.rounding import exact_outputs, in_double
from tests.support.snapshot import assert_unchanged, difference, snapshot

VARIANTS = ("base", "sp", "sr")
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@dataclass
class Around:
    """What was the case at a removal, and the models before and after it."""

    decaying: int
    settled: bool
    large: torch.nn.Module
    small: torch.nn.Module


@dataclass
class Followed(Drive):
    """A run, and what was the case on its way."""

    decided_when_settled: list[bool] = field(default_factory=list)
    removals: list[Around] = field(default_factory=list)

    def __post_init__(self) -> None:
        adapter = self.adapter
        after, shrink = adapter.after_step, adapter.remove

        def after_step() -> None:
            after()
            if adapter.settled:
                self.decided_when_settled.append(adapter.decided)

        def remove() -> Removal:
            decaying = 0 if adapter.dpm is None else adapter.dpm.count(Phase.DECAYING)
            settled, large = adapter.settled, copy.deepcopy(adapter.model)
            removal = shrink()
            self.removals.append(Around(decaying, settled, large, copy.deepcopy(adapter.model)))
            return removal

        adapter.after_step, adapter.remove = after_step, remove


@functools.cache
def ended(name: str, variant: str, exact: bool = False) -> Followed:
    """A run of a case from start to end, for all tests that look at it; not to be changed."""
    case = next(c for c in CASES if c.name == name)
    model = case.exact() if exact else case.build()
    drive = Followed(case, case.adapter(model, variant))
    drive.run()
    return drive


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def attached(case: Case, adapter: Adapter) -> torch.optim.Optimizer:
    """The optimizer that an adapter is attached to, without any training."""
    check_once(adapter)
    optimizer = case.new_optimizer(adapter)
    adapter.attach(optimizer, lambda: torch.zeros(()))
    return optimizer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_every_registered_adapter_has_a_case():
    assert {c.framework for c in CASES} == set(ADAPTERS)


def largest_step(case: Case, removal: Removal) -> int:
    """What the smallest removal from a layer takes off the dense model's MACs, at most."""
    found, count = [], case.options.get("round_to", 1)
    for root, channels in removal:
        model = case.build()
        dense = count_macs(model, EXAMPLE)
        Removal([(root, channels[:count])]).apply(model, EXAMPLE, cut=True)
        found.append(dense - count_macs(model, EXAMPLE))
    return max(found)


@cases
def test_all_variants_meet_the_same_target(case):
    dense = case.build()
    drives = {v: ended(case.name, v) for v in VARIANTS}
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
    assert len({d.step for d in drives.values()}) == 1


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_that_lose_channels_keep_a_multiple(case, variant):
    if "round_to" not in case.options:
        pytest.skip("widths fall as they may")
    dense, small = case.build(), ended(case.name, variant).model
    lost = False
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            before, after = (len(m.get_submodule(name).weight) for m in (dense, small))
            assert after == before or after % case.options["round_to"] == 0, name
            lost |= after < before
    assert lost


@cases
@pytest.mark.parametrize("variant", ["sp", "sr"])
def test_the_smaller_model_gives_the_zeroed_models_outputs(case, variant):
    # At each removal: the steps after it change the model.
    removals = ended(case.name, variant, case.computes).removals
    assert len(removals) == case.removals
    for number, at in enumerate(removals):
        assert at.decaying == 0
        assert at.settled == (number == case.removals - 1)
        example = EXAMPLE.to(next(at.large.parameters()).dtype)
        assert count_macs(at.small, example) < count_macs(at.large, example)
        before, after = exact_outputs(at.large, IMAGES), exact_outputs(at.small, IMAGES)
        assert not torch.equal(before, torch.zeros_like(before))
        rounding.assert_exact(after, before)


@pytest.mark.parametrize("case", [c for c in CASES if c.name == c.framework], ids=lambda c: c.name)
def test_batchnorms_without_a_bias_end_without_one(case):
    case = replace(case, build=bias_less)
    drive = Followed(case, case.adapter(case.exact(), "sr"))
    model = drive.run().model
    (at,) = drive.removals
    rounding.assert_exact(exact_outputs(at.small, IMAGES), exact_outputs(at.large, IMAGES))
    assert model.state_dict().keys() == bias_less().state_dict().keys()
    assert count_parameters(model) < count_parameters(bias_less())


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_removes_what_decayed_there(case, variant, cuda):
    drive = Drive(case, case.adapter(case.build().to(cuda), variant)).run()
    assert drive.adapter.complete
    assert {p.device.type for p in drive.model.parameters()} == {"cuda"}
    assert count_macs(drive.model, EXAMPLE.to(cuda)) <= case.most_macs * count_macs(
        case.build(), EXAMPLE
    )


@cases
def test_sp_decays_before_it_removes(case):
    drive = ended(case.name, "sp")
    assert drive.adapter.smooth == SmoothPruning(6)
    events = list(itertools.chain(*drive.events))
    decayed = [e for e in events if e.kind == "decay"]
    pruned = [e for e in events if e.kind == "prune"]
    assert sum(len(e.structures) for e in decayed) == drive.adapter.pruned
    started = {(e.group, k): e.step for e in decayed for k in e.structures}
    gone = {(e.group, k): e.step for e in pruned for k in e.structures}
    assert gone == {which: step + 6 for which, step in started.items()}
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
        EAGER.criterion,
        Hearing(batches=1, threshold=-1.0),
        RandomRelease(EAGER.criterion),
        LeastResistant(EAGER.criterion),
    ],
    ids=lambda c: type(c).__name__,
)
def test_released_structures_stay_and_others_go_in_their_place(case, criterion):
    rectify = SelfRectifying(criterion, max_share=0.4)
    if rectify == EAGER:
        drive = ended(case.name, "sr")
    else:
        drive = Drive(case, case.adapter(case.build(), "sr", rectify=rectify)).run()
    adapter = drive.adapter
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


@pytest.mark.parametrize("case", [c for c in CASES if c.refills_in_group], ids=lambda c: c.name)
def test_an_exchange_decays_what_it_heard_to_be_the_cheapest(case):
    """Whatever the framework's own ranking says; what was released is worth more."""
    rectify = SelfRectifying(Exchange(batches=1), max_share=0.4)
    adapter, pairs = case.adapter(case.build(), "sr", rectify=rectify), []
    after = adapter.after_step

    def look() -> None:
        dpm = adapter.dpm
        now = [e for e in dpm.events if e.step == dpm.clock]
        for release in (e for e in now if e.kind == "release"):
            group, worth = release.group, dpm.worth(release.group)
            (instead,) = (e.structures for e in now if e.group == group and e.wave)
            free = dpm.available(group).index_fill(0, torch.tensor(instead), True)
            pairs.append((worth, release.structures, instead, free))
        after()

    adapter.after_step = look
    drive = Drive(case, adapter).run()
    for worth, released, instead, free in pairs:
        assert len(instead) == len(released)
        cheapest = worth.masked_fill(~free, torch.inf).argsort(stable=True)[: len(instead)]
        assert set(instead) == set(cheapest.tolist())
        assert worth[list(released)].min() > worth[list(instead)].max()
    assert len(pairs) >= case.removals
    assert adapter.pruned == ended(case.name, "sp").adapter.pruned
    assert count_macs(drive.model, EXAMPLE) <= count_macs(case.build(), EXAMPLE) * case.most_macs


@functools.cache
def saved_at_every_step(name: str, variant: str) -> dict[int, bytes]:
    """A run's states by the steps that were done; saving them changes nothing of where it ends."""
    case, whole = next(c for c in CASES if c.name == name), ended(name, variant)
    drive, states = Drive(case, case.adapter(case.build(), variant)), {}
    while drive.step < whole.step:
        drive.run(stop_after=drive.step + 1)  # or a few more, where a decision reads batches
        state = {
            "run": drive.adapter.state_dict(),
            "model": drive.model.state_dict(),
            "optimizer": drive.optimizer.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        states[drive.step] = file.getvalue()
    assert_equal_weights(drive.model, whole.model)
    return states


@cases
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", [0, 1])
def test_a_run_taken_up_from_its_state_ends_in_the_same_bits(case, variant, half):
    whole, states = ended(case.name, variant), saved_at_every_step(case.name, variant)
    steps = sorted(states)[:-1]
    middle = len(steps) // 2  # a step of each half, others for each case and variant
    stop = random.Random(f"{case.name}, {variant}").choice(
        steps[middle:] if half else steps[:middle]
    )
    saved = torch.load(io.BytesIO(states[stop]), weights_only=True)

    model = case.build()
    adapter = case.adapter(model, variant)
    adapter.load_state_dict(saved["run"])
    model.load_state_dict(saved["model"])
    second = Drive(case, adapter, stop, case.new_optimizer(adapter))
    second.optimizer.load_state_dict(saved["optimizer"])
    adapter.attach(second.optimizer, second.loss)
    assert difference(adapter.state_dict(), saved["run"]) is None
    second.run()
    assert_equal_weights(second.model, whole.model)
    assert adapter.removed == whole.adapter.removed
    assert adapter.pruned == whole.adapter.pruned


@cases
def test_what_has_happened_can_still_be_read_after_the_removal(case):
    drive = ended(case.name, "sr")
    assert drive.adapter.events() == drive.events[-1]


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_removed_can_be_repeated_on_a_dense_model(case, variant):
    drive = ended(case.name, variant)
    model = case.build()
    drive.adapter.removed.apply(model, EXAMPLE, cut=True)
    model.load_state_dict(drive.model.state_dict())
    assert torch.equal(outputs(model), outputs(drive.model))


@cases
def test_the_masked_model_can_be_built_again_after_the_removal(case):
    drive = ended(case.name, "sp")
    masked = case.build()
    case.adapter(masked, "sp").lay_out(drive.removed_before)
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
    attached(case, adapter)
    if adapter.due:
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
        before = snapshot(model)
        case.adapter(model, variant).check()
        assert_unchanged(before, model)


@cases
def test_nothing_is_lost_at_the_decision(case):
    """Selection works on a copy: the real model is only decayed."""
    model = case.exact()
    adapter = case.adapter(model, "sp")
    before, random = exact_outputs(model, IMAGES), torch.get_rng_state()
    attached(case, adapter)
    assert torch.equal(torch.get_rng_state(), random)
    assert not adapter.due
    assert not adapter.settled
    rounding.assert_exact(exact_outputs(model, IMAGES), before)


@cases
def test_the_length_of_the_training_need_not_be_known(case):
    """Unless a framework plans by it, and says so at once."""
    kind = registry.load(case.framework)
    given = case.build(), EXAMPLE, kind.Options(**case.options), SmoothPruning(6), EAGER
    if kind.needs_training or case.removals > 1:
        with pytest.raises(AdapterError, match=r"training=Training\("):
            kind(*given)
        return
    adapter = kind(*given)
    before, after = until_removed(adapter)
    rounding.assert_exact(after, before)
    assert adapter.complete


@cases
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_gone_stays_gone_until_the_removal(case, variant):
    """Accuracy is measured when an adapter is settled: the removal must find the same model."""
    drive = ended(case.name, variant)
    assert drive.decided_when_settled
    assert all(drive.decided_when_settled)
    assert drive.adapter.settled


# ---------------------------------------------------------------------- refused, early


def test_a_test_is_spared_a_check_only_if_the_like_has_passed():
    case = CASES[0]

    def checks(change=lambda model: None) -> bool:
        adapter, times = case.adapter(case.build(), "sp"), []
        change(adapter.model)
        check = adapter.check
        adapter.check = lambda: (times.append(1), check())
        check_once(adapter)
        assert adapter.checked
        return bool(times)

    first = next(case.build().parameters())
    checks()
    assert not checks()
    for change in (
        lambda model: next(model.parameters()).data.add_(1),
        lambda model: model.train(not model.training),
        lambda model: setattr(model, "number", 3),
        lambda model: model.register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "forward", model.forward),
        lambda model: setattr(model, "kept", first),
    ):
        assert checks(change)
    assert not checks()


@cases
@pytest.mark.parametrize("asked", [True, False])
def test_an_adapter_that_nobody_has_checked_checks_by_itself(case, asked, monkeypatch):
    adapter, check, times = case.adapter(case.build(), "sp"), None, []
    check = adapter.check
    monkeypatch.setattr(adapter, "check", lambda: (times.append(1), check()))
    if asked:
        adapter.check()
    adapter.attach(case.new_optimizer(adapter), lambda: torch.zeros(()))
    assert times == [1]


@cases
def test_what_contradicts_itself_is_refused(case):
    kind, model = registry.load(case.framework), case.build()
    options, refills = kind.Options(**case.options), case.adapter(model, "base").refills
    with pytest.raises(AdapterError, match="takes back decays"):
        kind(model, EXAMPLE, options, None, SelfRectifying(), training=Training(99, 3))
    with pytest.raises(AdapterError, match="takes a "):
        kind(model, EXAMPLE, case.options, training=Training(99, 3))
    with pytest.raises(AdapterError, match="training is 99; give Training"):
        kind(model, EXAMPLE, options, training=99)
    for settings, message in (
        ((6,), r"give SmoothPruning\(6\)"),
        ((SmoothPruning(6), True), "rectify is True"),
        ((SmoothPruning(6), Hearing()), r"give SelfRectifying\(Hearing"),
        ((SelfRectifying(), SmoothPruning(6)), "changed places"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            kind(model, EXAMPLE, options, *settings, training=Training(99, 3))
    for other in (None, type(model), model.state_dict()):
        with pytest.raises(AdapterError, match=r"the model is .*give an nn\.Module"):
            kind(other, EXAMPLE, options, training=Training(99, 3))
    for other in (None, "images", EXAMPLE[:, :2], EXAMPLE.double(), (EXAMPLE, 1), {"y": EXAMPLE}):
        with pytest.raises(AdapterError, match=r"cannot be run on the example .*give a batch"):
            kind(model, other, options, training=Training(99, 3))
    rectified = model, EXAMPLE, options, SmoothPruning(6)
    if refills:

        class Chooseless(kind):
            choose = Adapter.choose

        with pytest.raises(AdapterError, match=r"choose\(\)"):
            Chooseless(*rectified, SelfRectifying(), training=Training(99, 3))
    else:
        with pytest.raises(AdapterError, match="exchange"):
            kind(*rectified, SelfRectifying(Exchange()), training=Training(99, 3))
    if not kind.learns_sparse:
        with pytest.raises(AdapterError, match="no sparse learning"):
            kind(model, EXAMPLE, options, training=Training(99, 3, Training(9, 3)))


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
@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_a_copy_of_an_adapter_at_work_is_refused_by_its_own_name(case, how):
    drive = Drive(case, case.adapter(case.build(), "sp"))
    drive.run(3)
    with pytest.raises(AdapterError, match=r"attached cannot be copied or pickled.*state_dict\(\)"):
        how((drive.model, drive.optimizer, drive.adapter))


@cases
def test_a_hearing_without_a_loss_names_what_attach_takes(case):
    adapter = case.adapter(case.build(), "sr", rectify=SelfRectifying(Hearing(1)))
    adapter.training = replace(adapter.training, steps=999)
    with pytest.raises(DecayPruningError, match=r"give attach\(optimizer, loss") as raised:
        adapter.attach(case.new_optimizer(adapter))
    assert "model=" not in str(raised.value)


@cases
def test_the_optimizer_of_another_model_is_refused(case):
    adapter = case.adapter(case.build(), "sp")
    with pytest.raises(AdapterError, match="optimizer is of another model"):
        adapter.attach(torch.optim.SGD(case.build().parameters(), lr=0.1))
    assert not adapter.optimizers
    attached(case, adapter)


class Wrapper:
    """As accelerate's or Lightning's: no optimizer of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str):
        return getattr(self.optimizer, name)


class Both:
    """Two optimizers as a user's loop steps them."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.both = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


@cases
def test_two_optimizers_end_in_the_same_bits_as_one(case):
    if case.framework == "otov2":
        pytest.skip("the framework is an optimizer")
    adapter = case.adapter(case.build(), "sr")
    parameters = list(adapter.model.parameters())
    settings = {"lr": case.learning_rate, "momentum": case.momentum, "weight_decay": 5e-4}
    matrices = torch.optim.SGD([p for p in parameters if p.dim() > 1], **settings)
    vectors = torch.optim.SGD([p for p in parameters if p.dim() < 2], **settings)
    drive = Drive(case, adapter, optimizer=Both(matrices, vectors))
    adapter.attach([Wrapper(matrices), vectors], drive.loss)
    assert_equal_weights(drive.run().model, ended(case.name, "sr").model)


@cases
def test_a_failed_attach_leaves_nothing_attached(case):
    adapter = case.adapter(case.exact(), "sr", rectify=SelfRectifying(Hearing(batches=1)))
    optimizer = case.new_optimizer(adapter)
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    with pytest.raises((AttachmentError, AdapterError), match=r"needs .* loss|attach\(.*loss\)"):
        adapter.attach(optimizer)
    assert not any(hooks)
    assert not adapter.optimizers
    adapter.attach(optimizer, lambda: torch.zeros(()))
    assert all(hooks)


@cases
def test_a_state_of_something_else_is_refused(case):
    adapter = case.adapter(case.build(), "sp")
    for state in ({}, {"decided": False}, {**adapter.state_dict(), "version": 1}, None):
        with pytest.raises(AdapterError, match="another release"):
            adapter.load_state_dict(state)
    attached(case, adapter)
    with pytest.raises(AdapterError, match="before attach"):
        adapter.load_state_dict(adapter.state_dict())


@cases
def test_a_state_of_other_settings_is_refused(case):
    variants = ("base", "sp", "sr")
    for one in variants:
        state = Drive(case, case.adapter(case.build(), one)).run(stop_after=4).adapter.state_dict()
        for other in variants:
            adapter = case.adapter(case.build(), other)
            if other == one:
                adapter.load_state_dict(state)
                continue
            before = copy.deepcopy(adapter.model.state_dict())
            with pytest.raises(AdapterError, match=r"(smooth|rectify) = "):
                adapter.load_state_dict(state)
            assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())
    options = {**case.options, **case.impossible}
    with pytest.raises(AdapterError, match=f"{next(iter(case.impossible))} = .*construct"):
        case.adapter(case.build(), "sr", options=options).load_state_dict(state)


@contextmanager
def default_type() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@cases
def test_pytorchs_default_type_and_device_are_without_effect(case):
    ended = []
    for context in (nullcontext(), default_type(), torch.device("meta")):
        model = in_double(case.build())
        with context:
            Drive(case, case.adapter(model, "sr")).run()
        ended.append(model.state_dict())
    for other in ended[1:]:
        assert difference(ended[0], other) is None


@cases
def test_nothing_is_removed_before_its_time_or_twice(case):
    adapter = case.adapter(case.build(), "sp")
    with pytest.raises(AdapterError, match="nothing to remove yet"):
        adapter.remove()
    done = ended(case.name, "sp").adapter
    with pytest.raises(AdapterError, match="all is removed"):
        done.remove()


@cases
def test_what_is_not_zero_is_not_removed(case):
    """As when an averaging optimizer shows other weights: nothing has changed after the refusal."""
    drive = Drive(case, case.adapter(case.exact(), "sp"))
    adapter, remove = drive.adapter, drive.adapter.remove
    refused = []

    def disturbed() -> Removal:
        model, optimizer = adapter.model, drive.optimizer
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
        return remove()

    adapter.remove = disturbed
    drive.run()
    assert bool(refused) == (case.framework in ("depgraph", "torch-prune"))


@cases
def test_a_state_is_passed_on_by_an_adapter_that_was_not_attached(case):
    """Trainers save before they train: before the start, and between loading and going on."""
    fresh = case.adapter(case.build(), "sr")
    other = case.adapter(case.build(), "sr")
    other.load_state_dict(fresh.state_dict())
    for adapter in (fresh, other):
        attached(case, adapter)
    assert difference(other.state_dict(), fresh.state_dict()) is None
    half = Drive(case, case.adapter(case.build(), "sr")).run(stop_after=3)
    state = half.adapter.state_dict()
    loaded = case.adapter(case.build(), "sr")
    loaded.load_state_dict(state)
    assert difference(loaded.state_dict(), state) is None
