"""No wrong model leaves in silence: drawn networks, whose structures are set to zero and removed.

``make test`` draws 150 of them; the environment variable ``DRAWN_NETWORKS`` says how many else.
"""

from __future__ import annotations

import copy
import os
import random
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_core import DecayPruning, SmoothPruning, StructureGroup
from dpm_core.adapters import registry
from dpm_core.adapters.base import Adapter, AdapterError, Training
from dpm_core.adapters.depgraph import LeftUnprunedWarning, structure_groups
from dpm_core.adapters.removal import Removal
from dpm_core.third_party import running
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support.frameworks import EAGER
from tests.support.networks import Drawn, draw
from tests.support.snapshot import assert_unchanged, snapshot

CHUNK = 30
CHUNKS = int(os.environ.get("DRAWN_NETWORKS", "150")) // CHUNK
ALONE = 2
"""Removals of one group alone that are tried of each network; one of all groups comes on top."""
EXACT = 1e-10
"""Of the outputs' size: what zeros and removal may differ by, in double precision."""


@dataclass
class Seen:
    """What came up in some networks, to know that they test something."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


@pytest.mark.parametrize("seed", [601])  # a removal that leaves nothing of a part
def test_what_was_found_among_more_networks_stays_mended(seed):
    examine(draw(seed), Seen())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_zeroed_is_removed_or_refused(chunk):
    seen = Seen()
    examine_all(range(chunk * CHUNK, (chunk + 1) * CHUNK), seen)
    counts = seen.counts
    assert counts["networks with groups"] >= CHUNK * 0.3
    assert counts["networks with refusals"] >= CHUNK * 0.15
    assert counts["removals"] >= CHUNK
    assert counts["removals that change the outputs"] >= 0.7 * counts["removals"]
    assert counts["structures of several channels"] >= 1
    assert counts["other channels refused"] >= 1
    assert len(seen.reasons) >= 2, seen.reasons


def test_groupnorms_lose_whole_groups_or_are_refused():
    seen = Seen()
    examine_all(range(20_000, 20_000 + CHUNK), seen, norm=True, group_norm=True)
    assert seen.counts["groups with a GroupNorm"] >= CHUNK // 2
    assert seen.counts["removals that change the outputs"] >= CHUNK
    assert seen.counts["structures of several channels"] >= CHUNK // 2


def examine_all(seeds: range, seen: Seen, **settings: bool) -> None:
    for seed in seeds:
        drawn = draw(seed, **settings)
        try:
            examine(drawn, seen)
        except Exception as fault:
            fault.add_note(f"network {seed}, example {shapes(drawn.example)}:\n{drawn.model}")
            raise


def examine(drawn: Drawn, seen: Seen) -> None:
    """One network: whatever is read of it, removed from it or refused."""
    model, example, counts = drawn.model, drawn.example, seen.counts
    draws = random.Random(drawn.seed)
    before, own = snapshot(model), dict(model.named_parameters(remove_duplicate=False))
    groups, refused = read(model, example)
    assert_unchanged(before, model)
    assert all(own[n] is p for n, p in model.named_parameters(remove_duplicate=False))
    for why in refused:
        assert_names_a_layer(why, model)
        seen.reasons[reason(why)] += 1
    counts["networks"] += 1
    counts["networks with groups"] += bool(groups)
    counts["networks with refusals"] += bool(refused)
    all_or_nothing(drawn, groups, refused)
    assert_unchanged(before, model)
    if groups:
        DecayPruning(groups, SmoothPruning(2))  # no element is in two structures
    normed = {id(m.weight) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    counts["groups with a GroupNorm"] += sum(
        any(id(s.parameter) in normed for s in g.slices) for g in groups
    )
    groups = [g for g in groups if g.size > 1]
    for group in groups:
        counts["structures of several channels"] += root_index(group).shape[1] > 1
    alone = [{g.name: subset} for g in groups for subset in subsets(g.size, draws)]
    removed = draws.sample(alone, min(ALONE, len(alone)))
    if len(groups) > 1:
        removed.append({g.name: draws.choice(subsets(g.size, draws)) for g in groups})
    for chosen in removed:
        zeroed_and_removed(drawn, groups, chosen, counts)
    any_channels(drawn, draws, counts)
    assert_unchanged(before, model)


def read(model: nn.Module, example: Any) -> tuple[list[StructureGroup], list[str]]:
    """All groups of a network, and why others are refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            groups = structure_groups(model, example, skip_unsupported=True)
        except UnsupportedLayerError as why:
            return [], [str(why)]
    said = [str(w.message) for w in caught if w.category is LeftUnprunedWarning]
    return groups, [line[2:] for text in said for line in text.splitlines()[1:]]


def all_or_nothing(drawn: Drawn, groups: list[StructureGroup], refused: list[str]) -> None:
    """Without ``skip_unsupported`` a network is read whole, or refused; of one in four."""
    if drawn.seed % 4:
        return
    if refused:
        with pytest.raises(UnsupportedLayerError) as why:
            structure_groups(drawn.model, drawn.example)
        assert_names_a_layer(str(why.value), drawn.model)
    else:
        whole = structure_groups(drawn.model, drawn.example)
        assert [g.name for g in whole] == [g.name for g in groups]


def subsets(size: int, draws: random.Random) -> list[list[int]]:
    """Some structures: a single one, all but one, an uneven half."""
    every = range(size)
    some = draws.sample(every, draws.randint(1, size - 1))
    found = [[draws.randrange(size)], sorted(draws.sample(every, size - 1)), sorted(some)]
    return [list(s) for s in dict.fromkeys(map(tuple, found))]


def zeroed_and_removed(
    drawn: Drawn,
    groups: list[StructureGroup],
    chosen: dict[str, list[int]],
    counts: Counter[str],
) -> None:
    """The same structures at zero, and removed: the outputs are the same."""
    memo: dict[int, Any] = {}
    small = copy.deepcopy(drawn.model, memo)
    taken = [g for g in groups if g.name in chosen]
    with torch.no_grad():
        for group in taken:
            for share in group.slices:
                positions = share.index[chosen[group.name]].flatten()
                memo[id(share.parameter)].index_fill_(share.dim, positions, 0)
    plan = [(g.name, sorted(root_index(g)[chosen[g.name]].flatten().tolist())) for g in taken]
    fresh = drawn.inputs(drawn.seed + 1, 3)
    dense, zeroed = outputs(drawn.model, fresh), outputs(small, fresh)
    held = sum(p.numel() for p in small.parameters())
    try:
        with unchanged_if_refused(small):
            Removal(plan).apply(small, drawn.example)
    except UnsupportedLayerError as why:
        raise AssertionError(f"{plan} was accepted, and is refused: {why}") from why
    assert sum(p.numel() for p in small.parameters()) < held
    assert tied(small) == tied(drawn.model)
    off = apart(zeroed, outputs(small, fresh))
    assert off <= EXACT, f"{plan}: zeroed and removed are {off:.0e} of the outputs' size apart"
    counts["removals"] += 1
    counts["removals that change the outputs"] += apart(dense, zeroed) > 1e-6


def any_channels(drawn: Drawn, draws: random.Random, counts: Counter[str]) -> None:
    """Whatever is asked to be removed, the outputs are the same, or nothing is removed."""
    layers = {n: m for n, m in drawn.model.named_modules() if hasattr(m, "weight")}
    name = draws.choice([*layers, "none"])
    width = getattr(getattr(layers.get(name), "weight", None), "shape", (3,))[0]
    channels = draws.choices(range(-1, width + 1), k=draws.randint(0, 3))
    model = copy.deepcopy(drawn.model)
    given = outputs(model, drawn.example)
    try:
        with unchanged_if_refused(model):
            Removal([(name, channels)]).apply(model, drawn.example)
    except AdapterError:
        counts["other channels refused"] += 1
    else:
        assert apart(given, outputs(model, drawn.example)) <= 1e-7, (name, channels)


class unchanged_if_refused:  # noqa: N801
    """A model is bit for bit what it was, if what happens inside fails."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, snapshot(model)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            assert_unchanged(self.before, self.model)


# ---------------------------------------------------------------------- the adapters as wholes


LOOPS = [
    ("depgraph", {"ratio": 0.3, "skip_unsupported": True, "global_pruning": False}),
    ("depgraph", {"ratio": 0.3, "skip_unsupported": True}),
    ("torch-prune", {"amount": 0.4}),
    ("gate-decorator", {"macs": 0.8, "fraction": 0.15, "tock_epochs": 1, "ticks": 2,
                        "low_rate": 0.01, "finetune_epochs": 2}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(2))
def test_adapters_end_in_the_same_counts_or_refuse(chunk):
    ended: Counter[str] = Counter()
    for seed in range(3 * chunk, 3 * chunk + 3):
        for number, (framework, options) in enumerate(LOOPS):
            norm = framework == "gate-decorator"
            grouped = seed % 3 == 2
            plain = norm or grouped
            drawn = draw(10_000 + 4 * seed + number, plain, plain, group_norm=grouped)
            try:
                ended[framework] += ends_alike(drawn, framework, options)
            except Exception as fault:
                fault.add_note(f"network {drawn.seed}, {framework} {options}:\n{drawn.model}")
                raise
    assert ended["depgraph"] >= 2, ended
    assert ended["torch-prune"] + ended["gate-decorator"] >= 1, ended


def ends_alike(drawn: Drawn, framework: str, options: dict[str, Any]) -> bool:
    """All variants of one network end, in equal counts; or all are refused at the start."""
    if framework != "depgraph":  # the others are told what to leave, as their refusals say
        options = {**options, "ignored": left_out(drawn, framework, options)}
    ends = []
    for variant in ("base", "sp", "sr"):
        model = copy.deepcopy(drawn.model)
        before = snapshot(model)
        try:
            adapter = made(model, drawn, framework, options, variant)
            adapter.check()
        except AdapterError:
            assert_unchanged(before, model)
            ends.append(None)
            continue
        assert_unchanged(before, model)
        run(adapter, drawn)
        assert adapter.complete
        ends.append(left_of(model))
    if framework == "gate-decorator":  # refills beyond the group, so only refusals are alike
        assert len({e is None for e in ends}) == 1
    else:
        assert ends[0] == ends[1] == ends[2]
    return ends[0] is not None


def left_out(drawn: Drawn, framework: str, options: dict[str, Any]) -> tuple[str, ...]:
    """What to ignore, by following one refusal's remedy after the other."""
    ignored: list[str] = []
    for _ in range(6):
        given = {**options, "ignored": tuple(ignored)}
        try:
            made(copy.deepcopy(drawn.model), drawn, framework, given, "base").check()
        except AdapterError as why:
            named = re.search(r"[Nn]ame '(\S+)' in `ignored`", str(why))
            if named is None:
                break
            ignored.append(named[1])
        else:
            break
    assert len(set(ignored)) == len(ignored), f"the remedy does not help: {ignored}"
    return tuple(ignored)


def made(
    model: nn.Module, drawn: Drawn, framework: str, options: dict[str, Any], variant: str
) -> Adapter:
    kind = registry.load(framework)
    return kind(
        model,
        drawn.example,
        kind.Options(**options),
        None if variant == "base" else SmoothPruning(4),
        EAGER if variant == "sr" else None,
        training=Training(60 if framework == "gate-decorator" else 10, 3),
    )


def run(adapter: Adapter, drawn: Drawn) -> None:
    """The smallest loop there is; at the removal the outputs stay."""
    model, done = adapter.model, 0

    def loss() -> Tensor:
        nonlocal done
        done += 1
        found = running.tensors(running.call(model, drawn.inputs(done, 4)))
        floats = [t for t in found if t.is_floating_point() and t.requires_grad]
        return sum((t.tanh().square().mean() for t in floats), torch.zeros(()))

    optimizer = adapter.new_optimizer("sgd", 0.01, 0.9, 0.0)
    adapter.attach(optimizer, loss)
    while done < adapter.training.steps or adapter.due:
        if adapter.due:
            fresh = drawn.inputs(-1, 3)
            given = outputs(model, fresh)
            adapter.remove()
            if adapter.smooth is not None:
                assert apart(given, outputs(model, fresh)) <= EXACT
        else:
            model.train()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()


def left_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


# ---------------------------------------------------------------------- comparisons


@torch.no_grad()
def outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """A model's floating outputs, in evaluation."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = flat(model(**given) if isinstance(given, dict) else model(*given))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
    return [t for t in found if t.is_floating_point()]


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in flat(v)]
    return [value] if isinstance(value, Tensor) else []


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of outputs, of the size of each; infinite where shapes differ."""
    assert one
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    return max(
        float((a - b).abs().max() / max(float(a.abs().max()), 1e-9))
        for a, b in zip(one, other, strict=True)
    )


def tied(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [n for n in names.values() if len(n) > 1]


def root_index(group: StructureGroup) -> Tensor:
    """The root layer's channels of each structure, (K, channels)."""
    return next(s for s in group.slices if s.name == f"{group.name}.weight").index


def assert_names_a_layer(why: str, model: nn.Module) -> None:
    names = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    quoted = set(re.findall(r"'([^']+)'", why))
    assert quoted & names or "behind the input" in why or "no output of the model" in why, why
    assert "\n" not in why


def reason(why: str) -> str:
    """The kind of a refusal: its first words without names and numbers."""
    plain = re.sub(r"\S*\d\S*|'[^']*'", "#", why.partition(" (")[0])
    return " ".join(plain.split()[:14])


def shapes(example: Any) -> Any:
    parts = example.values() if isinstance(example, dict) else example
    return [tuple(p.shape) for p in parts]
