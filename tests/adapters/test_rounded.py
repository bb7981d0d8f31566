"""Widths that are multiples: ``round_to`` in OTOv2, Gate-Decorator and torch-prune."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_core import Exchange, Phase, SelfRectifying, SmoothPruning, Trajectory
from dpm_core.adapters.base import AdapterError, Training, count_macs, count_parameters
from dpm_core.adapters.otov2 import OTO, OTOv2, TargetWarning
from dpm_core.third_party import gate_decorator, otov2
from tests.support import rounding
from tests.support.frameworks import (
    EXAMPLE,
    ROUNDED,
    Case,
    Drive,
    batch,
    mixed,
    small_resnet,
)
from tests.support.rounding import exact_outputs

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))
CASES = {case.framework: case for case in ROUNDED}
SOME = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every layer."""
    layers = (nn.Conv2d, nn.Linear)
    return {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, layers)}


def require_multiples(dense: nn.Module, small: nn.Module, round_to: int) -> None:
    after = widths(small)
    for name, before in widths(dense).items():
        assert after[name] == before or after[name] % round_to == 0, (name, before, after[name])


def asked(framework: str, share: float) -> dict[str, object]:
    """Options with a target that leaves about as much."""
    if framework == "otov2":
        return {"target_group_sparsity": round(1 - share, 3)}
    if framework == "torch-prune":
        return {"amount": round(1 - share, 3)}
    return {"macs": share}


def meets(framework: str, share: float, dense: nn.Module, drive: Drive) -> bool:
    if framework == "gate-decorator":
        return count_macs(drive.model, EXAMPLE) <= share * count_macs(dense, EXAMPLE)
    gone = {root: len(channels) for root, channels in drive.adapter.removed}
    if framework == "otov2":
        whole = sum(g.size for g in drive.large.values())
        return sum(gone.values()) >= (1 - share) * whole - 1e-6
    return all(gone.get(n, 0) >= round((1 - share) * g.size) for n, g in drive.large.items())


@pytest.mark.parametrize("framework", CASES)
@SOME
@given(st.data())
def test_drawn_targets_are_met_at_multiples_in_every_variant(framework, data):
    """Also where many are released, more than once, and an exchange chooses what goes instead."""
    case: Case = CASES[framework]
    build = data.draw(st.sampled_from([small_resnet, mixed]), "network")
    if framework == "otov2":
        build = small_resnet  # upstream cannot follow the other one
    round_to = data.draw(st.sampled_from([2, 3, 4, 6, 8]), "round_to")
    share = data.draw(st.sampled_from([0.55, 0.7, 0.85]), "share")
    variant = data.draw(st.sampled_from(["base", "sp", "sr"]), "variant")
    criterion = data.draw(
        st.sampled_from([Trajectory(rate=-1.0, length=-1e9), Exchange(batches=1)]), "criterion"
    )
    most = data.draw(st.sampled_from([0.2, 0.9]), "max_share")
    options = {**case.options, **asked(framework, share), "round_to": round_to}
    dense = build()
    model = rounding.in_double(build()) if case.computes else build()
    adapter = case.adapter(
        model,
        variant,
        smooth=SmoothPruning(4),
        rectify=SelfRectifying(criterion, max_share=most),
        stages={"prune": 70 if framework == "gate-decorator" else 40},
        options=options,
    )
    try:
        adapter.check()
    except AdapterError as refusal:
        if "impossible" not in str(refusal):
            raise
        return
    drive, seen = Drive(case, adapter), []
    remove = adapter.remove

    def compared():
        drive.large = dict(adapter.grouped())
        before = exact_outputs(adapter.model, IMAGES)
        removal = remove()
        if variant != "base":  # there what goes need not be zero
            rounding.assert_exact(exact_outputs(adapter.model, IMAGES), before)
        seen.append(removal)
        return removal

    adapter.remove = compared
    drive.run()
    assert len(seen) == 1
    require_multiples(dense, drive.model, round_to)
    assert meets(framework, share, dense, drive)


# ---------------------------------------------------------------------- OTOv2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_blocks_are_whole_rank_highest_and_are_no_more_than_needed(data):
    unit = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=4))
    values = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])
    scores = {
        str(i): torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
        for i, n in enumerate(sizes)
    }
    wanted = data.draw(st.integers(0, sum(sizes)))
    chosen = otov2.blocks(scores, unit, wanted)
    counts = {name: int(mask.sum()) for name, mask in chosen.items()}
    for name, mask in chosen.items():
        left = len(mask) - counts[name]
        assert counts[name] == 0 or (left % unit == 0 and left >= unit)
        if counts[name]:
            assert scores[name][mask].min() >= scores[name][~mask].max()
    most = sum(otov2.most(n, unit) for n in sizes)
    assert min(wanted, most) <= sum(counts.values()) < max(wanted, 1) + unit
    if wanted == 0:
        assert not any(counts.values())


class Dead(nn.Module):
    """Some channels are zero from the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.other, self.second = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 64, 5)
        with torch.no_grad():
            for layer in (self.conv, self.norm):
                layer.weight[2:13] = 0
                layer.bias[2:13] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.second(self.other(x))).flatten(1))


@pytest.mark.parametrize("variant", ["base", "sp", "sr"])
@pytest.mark.parametrize("round_to", [None, 4])
def test_structures_that_are_zero_from_the_start_go_with_the_others(variant, round_to):
    case = CASES["otov2"]
    options = {**case.options, "target_group_sparsity": 0.4, "round_to": round_to}
    drive = Drive(case, case.adapter(Dead(), variant, options=options)).run()
    assert drive.adapter.complete
    require_multiples(Dead(), drive.model, round_to or 1)
    assert sum(len(c) for _, c in drive.adapter.removed) >= 0.4 * 28


@pytest.mark.parametrize("smooth", [None, SmoothPruning(3)])
def test_upstreams_own_loop_rounds_by_group_divisible(smooth):
    model, draw = small_resnet(), iter(range(1000))
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(
        variant="sgd",
        lr=0.05,
        target_group_sparsity=0.4,
        lmbda=4.0,
        epsilon=0.95,
        group_divisible=4,
    )
    run = OTOv2.of(oto, optimizer, smooth, training=Training(40))
    assert run.options.round_to == 4
    while not run.due:
        images, labels = batch(next(draw))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    run.remove()
    require_multiples(small_resnet(), model, 4)
    assert run.pruned >= math.ceil(0.4 * (12 + 16 + 10 + 14))


def test_a_loop_that_ends_early_still_leaves_multiples():
    model = small_resnet()
    oto = OTO(model, EXAMPLE)
    optimizer = oto.dhspg(
        variant="sgd", lr=0.05, target_group_sparsity=0.6, lmbda=4.0, epsilon=0.9, group_divisible=4
    )
    run = OTOv2.of(oto, optimizer)
    with pytest.raises(AdapterError, match=r"zero yet|nothing to remove"):
        run.remove()
    for step in range(40):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if sum(map(len, run.going().values())):
            break
    assert not run.settled
    with pytest.warns(TargetWarning, match="not reached"):
        run.remove()
    require_multiples(small_resnet(), model, 4)


# ---------------------------------------------------------------------- Gate-Decorator


@SOME
@given(st.data())
def test_the_last_selection_takes_no_more_than_rounding_needs(data):
    """Against a search by hand, structure by structure."""
    round_to = data.draw(st.sampled_from([1, 2, 3, 4, 5]))
    share = data.draw(st.sampled_from([0.5, 0.7, 0.9]))
    counted = data.draw(st.sampled_from(["macs", "parameters"]))
    decorated = gate_decorator.GateDecorator(
        small_resnet(), EXAMPLE, fraction=0.15, counted=counted, round_to=round_to
    )
    target = int(share * decorated.costs.dense)
    if decorated.least() > target:
        return
    seed = data.draw(st.integers(0, 99))
    decorated.scores.total.copy_(
        torch.rand(len(decorated.scores.total), generator=torch.Generator().manual_seed(seed)) + 0.1
    )
    scores, group = decorated.scores.of_structures(), decorated.table.group
    sizes = decorated.costs.sizes.tolist()

    def rounded(kept: list[int]) -> list[int]:
        return [k if k == n else k // round_to * round_to for k, n in zip(kept, sizes, strict=True)]

    while decorated.cost() > target:
        alive = decorated.table.alive()
        kept = decorated.table.kept(alive).tolist()
        chosen = decorated.selected(target)
        gone = [int(group[k]) for k in chosen]
        after = [k - gone.count(g) for g, k in enumerate(kept)]
        for count in range(1, len(gone) + 1):
            left = [k - gone[:count].count(g) for g, k in enumerate(kept)]
            if int(decorated.costs.of(torch.tensor(rounded(left)))) <= target:
                assert after == rounded(left)
                assert len(gone) == sum(kept) - sum(rounded(left))
                break
        else:
            assert int(decorated.costs.of(torch.tensor(rounded(after)))) > target
        for g, k in enumerate(sizes):  # the lowest of each group
            ours = chosen[group[chosen] == g]
            mine = ((group == g) & alive).index_fill(0, ours, False)
            if len(ours) and bool(mine.any()):
                assert scores[ours].max() <= scores[mine].min(), k
        decorated.table.mask(chosen)
    assert rounded(after) == after
    assert decorated.even(decorated.table.alive())


@pytest.mark.parametrize("target", ["macs", "parameters"])
def test_either_target_is_met_at_multiples(target):
    case = CASES["gate-decorator"]
    options = {k: v for k, v in case.options.items() if k != "macs"} | {target: 0.65}
    drive = Drive(case, case.adapter(small_resnet(), "sp", options=options)).run()
    dense = small_resnet()
    require_multiples(dense, drive.model, 4)
    count = count_parameters if target == "parameters" else lambda m: count_macs(m, EXAMPLE)
    assert count(drive.model) <= 0.65 * count(dense)


def test_what_was_released_is_replaced_in_its_group_by_the_last_scores():
    case = CASES["gate-decorator"]
    rectify = SelfRectifying(Trajectory(rate=-1.0, length=-1e9), max_share=0.5)
    adapter = case.adapter(small_resnet(), "sr", rectify=rectify)
    asked_for, choose = [], adapter.choose

    def noted(group, count, free):
        chosen = choose(group, count, free)
        scores = adapter._ranking[adapter._method.table.ids(group)]
        assert len(chosen) == count
        rest = free.index_fill(0, chosen, False)
        assert not bool(rest.any()) or scores[chosen].max() <= scores[rest].min()
        asked_for.append((group, count))
        return chosen

    adapter.choose = noted
    drive = Drive(case, adapter).run()
    events = drive.adapter.dpm.events
    released = [(e.group, len(e.structures)) for e in events if e.kind == "release"]
    assert released == asked_for != []
    assert adapter.dpm.count(Phase.DECAYING) == 0
    require_multiples(small_resnet(), drive.model, 4)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize("framework", CASES)
@pytest.mark.parametrize("wrong", [0, -8])
def test_rounding_to_nothing_is_refused(framework, wrong):
    case = CASES[framework]
    with pytest.raises(AdapterError, match=f"round_to is {wrong}; give at least 1"):
        case.adapter(small_resnet(), "sp", options={**case.options, "round_to": wrong})


@pytest.mark.parametrize("framework", CASES)
def test_a_target_that_no_multiple_meets_is_refused_before_anything_is_changed(framework):
    case = CASES[framework]
    options = {**case.options, **asked(framework, 0.3), "round_to": 8}
    with pytest.raises(AdapterError, match=r"impossible.*round_to"):
        case.adapter(small_resnet(), "sp", options=options).check()
