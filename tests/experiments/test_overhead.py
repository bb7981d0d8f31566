"""The overhead benchmark measures what it says it does; no test asks how fast the core is."""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_core import Phase, StructureGroup
from experiments.measuring import kirigami, overhead, timing
from experiments.measuring.arms import FRAMEWORKS, Settings, decaying_slices, make_arms
from tests.support import rounding


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier tests may have loaded PyTorch's compiler, which hooks every module's registrations.

    torch-kirigami, with which the benchmark compares, refuses to work beside such hooks.
    """
    for kind in ("buffer", "module", "parameter"):
        name = f"torch.nn.modules.module._global_{kind}_registration_hooks"
        monkeypatch.setattr(name, OrderedDict())


TINY = ["--models", "vgg-digits", "--image-size", "8", "--channels", "1", "--batch", "4"]
TINY += ["--repeats", "2", "--device", "cpu", "--threads", "1"]
FIGURES = {
    "step_plain_ms",
    "step_idle_ms",
    "step_decaying_ms",
    "optimizer_plain_ms",
    "optimizer_idle_ms",
    "optimizer_decaying_ms",
    "idle_over_plain",
    "idle_over_plain_of_medians",
    "idle_over_plain_by_hooks",
    "decaying_over_plain",
    "decaying_over_plain_of_medians",
    "decaying_over_plain_by_hooks",
    "hooks_idle_ms",
    "hooks_decaying_ms",
    "hooks_decaying_over_floor",
    "floor_ms",
    "decay_core_ms",
    "decay_kirigami_ms",
    "decay_speed_up",
    "decay_norm_difference",
    "setup_graph_ms",
    "setup_trial_ms",
    "setup_selection_ms",
}
STEPS = {f for f in FIGURES if not f.startswith(("decay_", "setup_"))}
# Differences of two noisy times, or of two norms: finite, but of either sign, or zero.
SIGNED = {"hooks_idle_ms", "hooks_decaying_ms", "hooks_decaying_over_floor"}
SIGNED |= {"idle_over_plain_by_hooks", "decaying_over_plain_by_hooks", "decay_norm_difference"}


def exact_norms(group: StructureGroup) -> torch.Tensor:
    """A group's norms in double precision."""
    squares = torch.zeros(group.size, dtype=torch.float64)
    for s in group.slices:
        along = s.parameter.detach().double().movedim(s.dim, 0)
        squares += along[s.index.flatten()].reshape(group.size, -1).square().sum(1)
    return squares.sqrt()


@pytest.fixture
def tiny() -> Settings:
    return Settings("vgg-digits", 4, 1, 8, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_writes_every_figure_and_prints_the_path_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_kirigami")
    out = tmp_path / "deep" / "overhead.json"
    assert overhead.main([*TINY, "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out)
    content = json.loads(out.read_text())
    assert content["settings"] == {"batch": 4, "channels": 1, "image_size": 8, "repeats": 2}
    assert content["machine"]["threads"] == 1
    ((model, by_framework),) = content["models"].items()
    assert model == "vgg-digits"
    assert list(by_framework) == list(FRAMEWORKS)
    for framework, result in by_framework.items():
        assert f"{model} in {framework}" in printed
        assert set(result["figures"]) >= STEPS
        # 32 + 32 + 64 + 64 + 128 + 128 channels, in every framework.
        assert (result["structures"], result["decaying"]) == (448, {"idle": 0, "decaying": 224})
    result = by_framework["depgraph"]
    assert set(result["figures"]) == FIGURES
    for name, figure in result["figures"].items():
        assert name in printed
        assert figure["lower"] <= figure["median"] <= figure["upper"], name
        assert all(math.isfinite(figure[k]) for k in ("lower", "median", "upper")), name
        assert name in SIGNED or figure["lower"] > 0, name
    assert {n: f["target"] for n, f in result["figures"].items() if "target" in f} == {
        **{f"idle_over_plain{kind}": 1.01 for kind in ("", "_of_medians", "_by_hooks")},
        **{f"decaying_over_plain{kind}": 1.03 for kind in ("", "_of_medians", "_by_hooks")},
        "decay_speed_up": 300,
    }
    # 128 rows of 128 x 3 x 3 (or 64 x 3 x 3) weights, a bias, and two of the BatchNorm.
    group = result["decayed_group"]
    assert group["structures"] == 128
    assert group["elements"] in (128 * (128 * 9 + 3), 128 * (64 * 9 + 3))
    assert result["figures"]["decay_norm_difference"]["median"] <= 1e-5


def test_arms_are_what_they_say(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "experiments.measuring.arms.DECAY_STEPS", 100
    )  # three of a million are hard to see
    arms = make_arms(tiny)
    decaying, idle = arms["decaying"].dpm, arms["idle"].dpm
    assert arms["plain"].dpm is None
    assert decaying is not None
    assert idle is not None
    assert decaying.rectify is not None
    initial = {name: exact_norms(group) for name, group in decaying.groups.items()}
    single = {name: group.norms() for name, group in decaying.groups.items()}
    for _ in range(3):
        for arm in arms.values():
            arm.step()

    # A step of plain training, whether DPM is attached or not.
    pairs = zip(arms["plain"].model.parameters(), arms["idle"].model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert idle.count(Phase.ACTIVE) == sum(g.size for g in idle.groups.values())
    assert idle.clock == decaying.clock == 3
    for name, group in decaying.groups.items():
        half = decaying.phases(name) == Phase.DECAYING
        assert int(half.sum()) == group.size // 2
        target = initial[name][half] * 0.97
        rounding.assert_rounded(
            exact_norms(group)[half].float(), single[name][half] * 0.97, target, "norms"
        )


@pytest.mark.parametrize("framework", ["otov2", "gate-decorator"])
def test_the_other_frameworks_arms_take_their_own_step(tiny: Settings, framework: str) -> None:
    arms = make_arms(replace(tiny, framework=framework))
    for _ in range(3):
        for arm in arms.values():
            arm.step()
    plain, idle = arms["plain"].model, arms["idle"].model
    pairs = zip(plain.parameters(), idle.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    names = {type(arm.optimizer).__name__ for arm in arms.values()}
    assert names == ({"DHSPG", "DeferringDHSPG"} if framework == "otov2" else {"SGD"})
    if framework == "otov2":  # the penalty is at work, and the half-space is not left
        assert arms["plain"].optimizer.penalised() > 0
        assert arms["plain"].optimizer.zeros() == 0
    decaying = arms["decaying"].dpm
    assert decaying is not None
    assert decaying.count(Phase.DECAYING) == 224


def test_floor_covers_what_decays(tiny: Settings) -> None:
    arm = make_arms(tiny)["decaying"]
    arm.step()
    slices, gradients = decaying_slices(arm)
    assert arm.dpm is not None
    squares = 0.0
    for name, group in arm.dpm.groups.items():
        squares += float(exact_norms(group)[arm.dpm.phases(name) == Phase.DECAYING].square().sum())
    assert sum(float(s.double().square().sum()) for s in slices) == pytest.approx(squares, rel=1e-9)
    assert [s.shape for s in slices] == [g.shape for g in gradients]
    assert all(t.is_contiguous() for t in [*slices, *gradients])


def test_kirigami_sets_the_norms_that_were_asked_for(tiny: Settings) -> None:
    pytest.importorskip("torch_kirigami")
    (model, (group, *_)), example = tiny.build(), tiny.images()[:2]
    factors, exact, single = torch.linspace(0.1, 2, group.size), exact_norms(group), group.norms()
    targets = factors * single
    decay = kirigami.kirigami_decay(model, group, example, targets.tolist())
    assert decay is not None
    decay()
    norms = exact_norms(group).float()
    rounding.assert_rounded(norms / factors, single, exact, "norms")


def test_other_norms_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kirigami, "kirigami_decay", lambda *_: lambda: None)
    out = tmp_path / "overhead.json"
    assert overhead.main([*TINY, "--out", str(out)]) == 2
    assert "do not compare" in capsys.readouterr().err
    assert not out.exists()


def test_without_kirigami_its_figures_are_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_kirigami", None)
    out = tmp_path / "overhead.json"
    assert overhead.main([*TINY, "--frameworks", "depgraph", "--out", str(out)]) == 0
    assert ".[dev]" in capsys.readouterr().out
    figures = json.loads(out.read_text())["models"]["vgg-digits"]["depgraph"]["figures"]
    assert [name for name, f in figures.items() if f is None] == [*kirigami.KIRIGAMI_FIGURES]


@pytest.mark.parametrize(
    ("values", "target", "sign", "met"),
    [
        ([1.0, 1.02, 9.0], 1.02, 1, True),
        ([1.0, 1.03, 1.04], 1.02, 1, False),
        ([299.0], 300, -1, False),
        ([300.0], 300, -1, True),
    ],
)
def test_a_target_is_met_by_the_median(
    values: list[float], target: float, sign: int, met: bool
) -> None:
    assert timing.figure(values, target, sign)["met"] is met


def test_works_take_turns() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "aAbc"}
    turns = [{"a": work["a"], "A": work["A"]}, {"b": work["b"]}, {"c": work["c"]}]
    measured = timing.interleave(turns, 3, torch.device("cpu"), "test")
    assert {name: len(times) for name, times in measured.items()} == dict.fromkeys("aAbc", 3)
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == timing.WARM_UP + 3
    assert sorted(rounds[-3:]) == ["aAbc", "bcaA", "caAb"]


@pytest.mark.parametrize(
    "wrong",
    [["--models", "alexnet"], ["--frameworks", "nni"], ["--repeats", "1"], ["--batch", "x"]],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(wrong)
    assert wrong[1] in capsys.readouterr().err
