"""Promise 3: a pruned structure stays exactly zero; a released one trains again."""

from __future__ import annotations

import pytest
import torch

from dpm_core import DecayPruning, Phase, SelfRectifying, SmoothPruning, Trajectory
from tests.support import oracle
from tests.support.snapshot import same_bits
from tests.support.toys import OPTIMIZERS, TOYS, Toy, make
from tests.support.twins import Twin, assert_active_as_plain, norm, structure

EVERYONE = Trajectory(rate=-1, length=-1e9)


def assert_zero(toy: Toy, doomed: dict[str, list[int]]) -> None:
    for group in toy.groups:
        for share in oracle.shares_of(group):
            rows = [i for k in doomed.get(group.name, []) for i in share.positions[k]]
            found = share.parameter.detach().index_select(share.dim, torch.tensor(rows).long())
            # +0 in every bit: a negative zero or a tiny number would be a leftover.
            assert same_bits(found, torch.zeros_like(found))


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", TOYS)
def test_a_pruned_structure_stays_exactly_zero(name: str, optimizer_name: str) -> None:
    toy = make(name)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(3)).attach(optimizer)
    for step in range(30):
        if step == 2:
            dpm.decay(toy.doomed)
        toy.train_step(optimizer, step)
        if step >= 4:
            assert_zero(toy, toy.doomed)
    assert dpm.count(Phase.PRUNED) == sum(map(len, toy.doomed.values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_pruned_structure_stays_zero_whatever_its_gradient(
    optimizer_name: str, value: float
) -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(2)).attach(optimizer)
    dpm.decay({"conv1": [1, 4]})
    for step in range(10):
        if step == 3:
            dpm.decay({"conv1": [2]})  # so that a pruned and a decaying one lie side by side
        toy.backward(optimizer, step)
        if step in (3, 5):
            toy.model.conv1.weight.grad[1] = value
            toy.model.bn1.bias.grad[4] = value
        optimizer.step()
        if step >= 2:
            assert_zero(toy, {"conv1": [1, 4]})
    assert_zero(toy, {"conv1": [1, 2, 4]})
    assert all(bool(torch.isfinite(p).all()) for p in toy.model.parameters())


def release_one(
    name: str, restore: str, optimizer_name: str = "sgd", steps: int = 4
) -> tuple[Toy, torch.optim.Optimizer, DecayPruning, Toy, list[float], int]:
    """Decay one structure up to the step that releases it.

    Returns the toy, optimizer and core after that step, the twin after the optimizer's part of
    it, and the norms at the decay's start of each slice; last the structure's number.
    """
    toy = make(name, torch.float64)
    optimizer = OPTIMIZERS[optimizer_name](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=1.0, restore=restore)
    dpm = DecayPruning(toy.groups, SmoothPruning(steps), rectify).attach(optimizer)
    k = toy.doomed[toy.groups[0].name][0]
    shares = oracle.shares_of(toy.groups[0])
    initial = [oracle.length(oracle.values([s], k)) for s in shares]
    dpm.decay({toy.groups[0].name: [k]})
    plain = Twin(name, optimizer_name, torch.float64)
    for step in range(3):
        assert dpm.phases(toy.groups[0].name)[k] == Phase.DECAYING
        toy.backward(optimizer, step)
        twin = plain.step(toy, optimizer)
        optimizer.step()
    assert dpm.phases(toy.groups[0].name)[k] == Phase.ACTIVE
    return toy, optimizer, dpm, twin, initial, k


@pytest.mark.parametrize("name", TOYS)
def test_a_released_structure_keeps_its_norm(name: str) -> None:
    toy, _, dpm, twin, _, _ = release_one(name, "keep")
    assert_active_as_plain(toy, twin, dpm)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", TOYS)
def test_a_released_structures_effect_returns_to_its_norm_at_the_start(
    name: str, optimizer_name: str
) -> None:
    toy, _, _, twin, initial, k = release_one(name, "effect", optimizer_name)
    shares, stars = (oracle.shares_of(t.groups[0]) for t in (toy, twin))
    norms = [s.batch_norm for s in shares]
    part = norms if any(norms) else [True] * len(shares)

    def effect(of: list[oracle.Share]) -> list[float]:
        return oracle.values([s for s, is_part in zip(of, part, strict=True) if is_part], k)

    before = oracle.length([n for n, is_part in zip(initial, part, strict=True) if is_part])
    assert oracle.length(effect(shares)) == pytest.approx(before, rel=1e-12)
    factor = before / oracle.length(effect(stars))
    assert effect(shares) == pytest.approx([v * factor for v in effect(stars)], rel=1e-12)
    for mine, star, is_part in zip(shares, stars, part, strict=True):
        if not is_part:
            assert oracle.values([mine], k) == oracle.values([star], k)


@pytest.mark.parametrize("restore", ["keep", "effect"])
def test_a_released_structure_trains_again(restore: str) -> None:
    toy, optimizer, dpm, _, _, k = release_one("conv", restore)
    plain = Twin("conv", "sgd", torch.float64)
    for step in range(3, 13):
        before = structure(toy, 0, k)
        toy.backward(optimizer, step)
        twin = plain.step(toy, optimizer)
        optimizer.step()
        assert_active_as_plain(toy, twin, dpm)
        assert structure(toy, 0, k) != before
    assert dpm.phases("conv1")[k] == Phase.ACTIVE
    assert [e.kind for e in dpm.events] == ["decay", "release"]


def test_the_event_of_a_release_tells_the_norm_it_had_come_to() -> None:
    _, _, dpm, _, initial, k = release_one("conv", "effect")
    event = dpm.events[-1]
    assert (event.step, event.kind, event.group, event.structures) == (3, "release", "conv1", (k,))
    # The decision falls in step 3 of 4, before that step scales: 2 of 4 were done.
    assert event.norms == pytest.approx([oracle.length(initial) / 2], rel=1e-12)


def test_releasing_one_lets_the_others_decay_to_the_end() -> None:
    toy = make("conv", torch.float64)
    optimizer = OPTIMIZERS["adam"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=0.5)
    dpm = DecayPruning(toy.groups, SmoothPruning(8), rectify).attach(optimizer)
    dpm.decay({"conv1": [0, 1, 3, 5]})
    initial = {k: norm(toy, 0, k) for k in (0, 1, 3, 5)}
    for step in range(8):
        toy.train_step(optimizer, step)
        gone = {k for e in dpm.events if e.kind == "release" for k in e.structures}
        for k in initial.keys() - gone:
            assert norm(toy, 0, k) == pytest.approx(initial[k] * (1 - (step + 1) / 8), rel=1e-12)
    assert len(gone) == 2
    assert dpm.count(Phase.PRUNED) == 2


@pytest.mark.parametrize(
    ("decayed", "share", "released"),
    [
        (6, 0.5, 0),  # nobody could take a released one's place
        (5, 0.5, 1),  # one could
        (4, 0.5, 2),
        (4, 0.25, 1),
        (3, 0.33, 0),  # rounded down
        (3, 1.0, 3),
    ],
)
def test_releases_stay_within_their_share_and_within_what_can_replace_them(
    decayed: int, share: float, released: int
) -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=share)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    dpm.decay({"conv1": list(range(decayed))})
    for step in range(4):
        toy.train_step(optimizer, step)
    assert dpm.count(Phase.PRUNED) == decayed - released
    assert sum(len(e.structures) for e in dpm.events if e.kind == "release") == released


def test_shares_and_spares_are_counted_in_each_group_by_itself() -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=0.5)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    dpm.decay({"conv1": [0, 1, 2, 3], "conv2": [0, 1, 2, 3, 4]})
    for step in range(4):
        toy.train_step(optimizer, step)
    assert (dpm.phases("conv1") == Phase.PRUNED).sum() == 2
    assert (dpm.phases("conv2") == Phase.PRUNED).sum() == 5


def test_a_released_structure_replaces_no_other() -> None:
    """It is ACTIVE, but immune: counted as a spare it would break the target."""
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=1.0, waves=2)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    dpm.decay({"conv1": [0, 1, 2, 3, 4]})
    for step in range(4):
        toy.train_step(optimizer, step)
    assert sum(len(e.structures) for e in dpm.events if e.kind == "release") == 1
    dpm.decay({"conv1": [5]}, wave=1)
    for step in range(4, 8):
        toy.train_step(optimizer, step)
    assert dpm.phases("conv1")[5] == Phase.PRUNED
    assert (dpm.phases("conv1") == Phase.PRUNED).sum() == 5


@pytest.mark.parametrize("waves", [1, 2])
def test_only_so_many_waves_are_heard(waves: int) -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=1.0, waves=waves)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    for wave in range(3):
        dpm.decay({"conv1": [wave]}, wave=wave)
        for step in range(4):
            toy.train_step(optimizer, step)
    kinds = [e.kind for e in dpm.events if e.kind != "decay"]
    assert kinds == ["release"] * waves + ["prune"] * (3 - waves)
    assert [e.wave for e in dpm.events] == [0, 0, 1, 1, 2, 2]


def released_in_each_group(**settings: object) -> list[int]:
    """How many are released where all that decays may be, under some settings of the core."""
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(EVERYONE, max_share=1.0))
    dpm.attach(optimizer)
    for name, value in settings.items():
        assert hasattr(dpm, name)
        setattr(dpm, name, value)
    dpm.decay({"conv1": [0, 1, 2, 3], "conv2": [0, 1, 2]})
    for step in range(4):
        toy.train_step(optimizer, step)
    return [
        sum(len(e.structures) for e in dpm.events if (e.kind, e.group) == ("release", name))
        for name in ("conv1", "conv2")
    ]


@pytest.mark.parametrize(
    ("limit", "released"), [(None, [2, 2]), (4, [2, 2]), (3, [1, 1]), (1, [0, 0]), (0, [0, 0])]
)
def test_a_limit_on_all_releases_is_shared_out_over_the_groups(
    limit: int | None, released: list[int]
) -> None:
    assert released_in_each_group(release_limit=limit) == released


def test_a_limit_on_all_releases_counts_those_of_before() -> None:
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning(toy.groups, SmoothPruning(4), SelfRectifying(EVERYONE, max_share=1.0))
    dpm.attach(optimizer)
    dpm.release_limit = 1
    for round_ in range(3):
        dpm.decay({"conv1": [round_]})
        for step in range(4):
            toy.train_step(optimizer, 4 * round_ + step)
    assert [e.structures for e in dpm.events if e.kind == "release"] == [(0,)]


@pytest.mark.parametrize(
    ("reserved", "released"),
    [
        ({}, [2, 2]),
        ({"conv1": 1}, [1, 2]),
        ({"conv1": 2, "conv2": 1}, [0, 1]),
        ({"conv2": 9}, [2, 0]),
    ],
)
def test_releases_leave_what_is_reserved_in_a_group(
    reserved: dict[str, int], released: list[int]
) -> None:
    assert released_in_each_group(reserved=reserved) == released


def test_shares_count_what_was_decayed_one_by_one() -> None:
    """A framework that takes a structure at a time is rectified like one that takes many."""
    toy = make("conv")
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    rectify = SelfRectifying(EVERYONE, max_share=0.5)
    dpm = DecayPruning(toy.groups, SmoothPruning(4), rectify).attach(optimizer)
    for step in range(9):
        if step < 5:
            dpm.decay({"conv1": [step]})
        toy.train_step(optimizer, step)
    released = [k for e in dpm.events if e.kind == "release" for k in e.structures]
    # A half of 1, 2, 3, 4 and 5 judged, rounded down.
    assert released == [1, 3]


def test_a_structure_is_compared_with_those_that_decayed_before_it() -> None:
    class Witness(Trajectory):
        def choose(self, evidence, limits, step):  # type: ignore[no-untyped-def]
            seen.append(float(evidence.typical))
            return super().choose(evidence, limits, step)

    seen: list[float] = []
    toy = make("conv", torch.float64)
    group = toy.groups[0]
    optimizer = OPTIMIZERS["sgd"](toy.model.parameters())
    dpm = DecayPruning([group], SmoothPruning(4), SelfRectifying(Witness(length=1e9)))
    dpm.attach(optimizer)
    sums = {0: [0.0], 1: [0.0]}
    counted = {0: 0, 1: 0}
    expected = []
    for step in range(7):
        if step in (0, 2):
            dpm.decay({group.name: [step // 2]})
        toy.backward(optimizer, step)
        for k, start in ((0, 0), (1, 2)):
            if start <= step < start + 4:
                shares = oracle.shares_of(group)
                initial = next(e.norms[0] for e in dpm.events if e.structures == (k,))
                gradient = oracle.values(shares, k, [s.parameter.grad for s in group.slices])
                sums[k].append(oracle.resistance(initial, oracle.values(shares, k), gradient))
                counted[k] += 1
        for start in (0, 2):
            if step == start + 2:  # the third of four steps is the decision
                means = [abs(sum(sums[j])) / counted[j] for j in (0, 1) if counted[j]]
                expected.append(3 * sum(means) / len(means))
        optimizer.step()
    assert seen == pytest.approx(expected, rel=1e-9)
    assert len(seen) == 2
