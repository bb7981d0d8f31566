"""Plots: what is drawn is what the records and traces say, artist by artist."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import matplotlib.colors
import matplotlib.pyplot as plt
import pytest
import torch

from experiments import plot, table
from experiments.__main__ import main
from tests.support.records import record, save


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def colour(artist) -> str:
    found = artist.get_facecolor() if hasattr(artist, "get_facecolor") else artist.get_color()
    return matplotlib.colors.to_hex(found)


def points(line) -> list[tuple[float, float]]:
    return list(zip(*(v.tolist() for v in map(torch.as_tensor, line.get_data())), strict=True))


def size_of_png(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


# ---------------------------------------------------------------------- files


def test_plots_of_real_runs_are_pictures(tiny_runs, tmp_path, capsys):
    assert main(["plots", str(tiny_runs.out), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["tiny-digits-accuracy.png", "tiny-digits-channels.png", "tiny-digits-norms.png"]
    assert printed == [str(tmp_path / "plots" / name) for name in names]
    for path in (tmp_path / "plots").iterdir():
        width, height = size_of_png(path)
        assert 500 < width < 3000
        assert 300 < height < 1500
        assert path.stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == names


def test_figures_are_closed_once_they_are_saved(tiny_runs, tmp_path):
    files = table.files([tiny_runs.out])
    plot.plot(list(zip(files, table.read(files), strict=True)), tmp_path)
    assert plt.get_fignums() == []


def test_runs_without_traces_have_the_other_plots(tmp_path):
    paths = [save(tmp_path, record(v, 0)) for v in ("base", "sp")]
    made = plot.plot(list(zip(paths, table.read(paths), strict=True)), tmp_path / "plots")
    assert [p.name for p in made] == [
        "made-up-cifar-10-accuracy.png",
        "made-up-cifar-10-channels.png",
    ]


def test_every_experiment_has_plots_of_its_own(tmp_path):
    made = [record("base", 0), record("base", 0, config={"name": "other"}, config_hash="f")]
    runs = [(tmp_path / f"{i}" / "record.json", m) for i, m in enumerate(made)]
    names = {p.name for p in plot.plot(runs, tmp_path)}
    assert {n.removesuffix("-accuracy.png") for n in names} >= {
        "made-up-cifar-10",
        "other-cifar-10",
    }


# ---------------------------------------------------------------------- norms


@pytest.fixture
def traces(tiny_runs):
    return {
        v: (0, torch.load(tiny_runs.paths[v].parent / "trace.pt", weights_only=True))
        for v in ("sp", "sr")
    }


def expected_lines(saved) -> dict[str, list[list[tuple[int, float]]]]:
    """Trajectories by colour: each from its structure's own start on."""
    starts, kinds = {}, {}
    for event in saved["events"]:
        for k, norm in zip(event["structures"], event["norms"], strict=True):
            key = (event["group"], k)
            if event["kind"] == "decay":
                starts[key] = (event["step"], norm)
                kinds[key] = plot.REFILLED if event["wave"] else plot.PRUNED
            elif event["kind"] == "release":
                kinds[key] = plot.RELEASED
    lines: dict[str, list[list[tuple[int, float]]]] = {}
    for (group, k), (start, norm) in starts.items():
        line = [(start, norm)]
        line += [(s, norms[group][k]) for s, norms in saved["trace"] if s > start]
        lines.setdefault(kinds[group, k], []).append(line)
    return lines


def test_trajectories_are_those_of_the_trace(traces):
    figure = plot._norms("title", traces)
    assert len(figure.axes) == 2
    for axis, (variant, (_, saved)) in zip(figure.axes, traces.items(), strict=True):
        expected = expected_lines(saved)
        wanted = {plot.PRUNED} | ({plot.RELEASED, plot.REFILLED} if variant == "sr" else set())
        assert set(expected) == wanted
        drawn: dict[str, list] = {}
        for line in axis.lines:
            if line.get_linestyle() != "None":
                drawn.setdefault(colour(line), []).append(points(line))
        assert set(drawn) == set(expected)
        for kind, lines in drawn.items():
            assert all(line in expected[kind] for line in lines), kind
            if len(expected[kind]) <= plot.LINES:
                assert len(lines) == len(expected[kind])
            else:
                assert len(lines) > plot.LINES / 3
        assert plot.NAMES[variant] in axis.get_title()


def test_no_more_lines_of_a_kind_are_drawn_than_can_be_told_apart(traces):
    events, n = [], 0
    for count in (plot.LINES, plot.LINES + 1, 2 * plot.LINES - 1, 5 * plot.LINES):
        structures = tuple(range(count))
        events = [
            {
                "step": 0,
                "kind": "decay",
                "group": "g",
                "structures": structures,
                "norms": (1.0,) * count,
                "wave": 0,
            }
        ]
        trace = [(1, {"g": dict.fromkeys(structures, 0.5)})]
        figure = plot._norms("title", {"sp": (0, {"events": events, "trace": trace})})
        n = len(figure.axes[0].lines)
        assert plot.LINES / 3 < n <= plot.LINES, count
        (text,) = figure.axes[0].get_legend().get_texts()
        assert text.get_text() == f"decayed to zero ({count})"


def test_the_legend_counts_all_structures_of_a_kind(traces):
    figure = plot._norms("title", traces)
    for axis, (_, saved) in zip(figure.axes, traces.values(), strict=True):
        expected = {kind: len(lines) for kind, lines in expected_lines(saved).items()}
        labels = {
            plot.PRUNED: "decayed to zero",
            plot.RELEASED: "released",
            plot.REFILLED: "decayed in their place",
        }
        texts = {t.get_text() for t in axis.get_legend().get_texts()}
        assert texts == {f"{labels[kind]} ({n})" for kind, n in expected.items()}


def test_releases_are_marked_where_they_happened(traces):
    saved = traces["sr"][1]
    norms = dict(saved["trace"])
    expected = sorted(
        (e["step"], norms[e["step"]][e["group"]][k])
        for e in saved["events"]
        if e["kind"] == "release"
        for k in e["structures"]
    )
    assert len(expected) > 3
    sp, sr = plot._norms("title", traces).axes
    (marks,) = [line for line in sr.lines if line.get_marker() == "v"]
    assert sorted(points(marks)) == expected
    assert colour(marks) == plot.RELEASED
    assert all(line.get_marker() in ("None", "") for line in sp.lines)


def test_one_variants_norms_have_one_panel(traces):
    figure = plot._norms("title", {"sp": traces["sp"]})
    assert len(figure.axes) == 1


# ---------------------------------------------------------------------- accuracy

CURVES = {
    ("base", 0): [[0, 90.0], [0, 10.0], [5, 40.0], [10, 60.0]],
    ("base", 1): [[0, 92.0], [0, 20.0], [5, 44.0], [10, 70.0]],
    ("sp", 0): [[0, 90.0], [5, 50.0], [7, 30.0], [10, 66.0]],
    ("sp", 1): [[0, 92.0], [5, 60.0], [7, 50.0], [10, 68.0]],
}


@pytest.fixture
def members():
    zero = {("base", 0): 0, ("base", 1): 0, ("sp", 0): 6, ("sp", 1): 8}
    return [
        record(variant, seed, curve=curve, steps__zero=zero[variant, seed], steps__removal=10)
        for (variant, seed), curve in CURVES.items()
    ]


def accuracy_lines(members):
    """Of each variant: the runs' lines, the mean's line and the dotted ones."""
    (axis,) = plot._accuracy("title", members).axes
    found = {}
    for variant, shade in plot.COLOURS.items():
        mine = [line for line in axis.lines if colour(line) == shade]
        if mine:
            found[variant] = (
                [ln for ln in mine if ln.get_alpha() is not None],
                [ln for ln in mine if ln.get_alpha() is None and ln.get_linestyle() == "-"],
                [ln for ln in mine if ln.get_linestyle() == ":"],
            )
    return found


def test_every_run_has_a_faint_line_and_every_variant_its_mean(members):
    found = accuracy_lines(members)
    assert set(found) == {"base", "sp"}
    for variant, (faint, means, dotted) in found.items():
        curves = [CURVES[variant, seed] for seed in (0, 1)]
        assert [[list(p) for p in points(line)] for line in faint] == curves
        (mean,) = means
        expected = [
            (step, (a + b) / 2) for (step, a), (_, b) in zip(curves[0], curves[1], strict=True)
        ]
        assert points(mean) == expected
        assert "2 seeds" in mean.get_label()
        assert plot.NAMES[variant] in mean.get_label()
        # When all was gone, the mean over the runs; the removal may come later.
        (zero,) = dotted
        assert set(zero.get_xdata()) == {0 if variant == "base" else 7}


def test_the_mean_is_over_steps_that_all_runs_have(members):
    members[3]["curve"] = [[0, 92.0], [5, 60.0], [9, 50.0], [10, 68.0]]
    _, (mean,), _ = accuracy_lines(members)["sp"]
    assert points(mean) == [(0, 91.0), (5, 55.0), (10, 67.0)]


def test_steps_count_from_the_decision():
    made = record("sp", 0, steps__decision=40, steps__zero=47, curve=CURVES["sp", 0])
    _, _, (zero,) = accuracy_lines([made])["sp"]
    assert set(zero.get_xdata()) == {7}


def test_the_accuracy_of_real_runs_is_their_curve(tiny_runs):
    members = [tiny_runs.record(v) for v in ("base", "sp", "sr")]
    found = accuracy_lines(members)
    assert list(found) == ["base", "sp", "sr"]
    for member in members:
        (faint,), (mean,), _ = found[member["variant"]]
        assert [list(p) for p in points(faint)] == member["curve"]
        assert points(mean) == points(faint)


# ---------------------------------------------------------------------- channels


def test_bars_are_the_channels_kept_and_the_dense_ones_behind(members):
    kept = {("base", 0): 8, ("base", 1): 12, ("sp", 0): 5, ("sp", 1): 6}
    for member in members:
        member["channels"]["first"] = [16, kept[member["variant"], member["seed"]]]
    (axis,) = plot._channels("title", members).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["first", "second", "head"]
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers}
    assert heights == {"dense": [16, 32, 10], "base": [10.0, 10, 10], "+SP": [5.5, 10, 10]}
    shades = {c.get_label(): colour(c[0]) for c in axis.containers}
    assert shades["base"] == plot.COLOURS["base"]
    assert shades["+SP"] == plot.COLOURS["sp"]
    # Bars of one layer stand side by side, on its tick.
    base, sp = (next(c for c in axis.containers if c.get_label() == n) for n in ("base", "+SP"))
    for place, (left, right) in enumerate(zip(base, sp, strict=True)):
        assert left.get_x() + left.get_width() == pytest.approx(right.get_x())
        assert left.get_x() + left.get_width() == pytest.approx(place)


def test_the_bars_of_real_runs_are_their_channels(tiny_runs):
    members = [tiny_runs.record(v) for v in ("base", "sp", "sr")]
    (axis,) = plot._channels("title", members).axes
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers}
    assert list(heights) == ["dense", "base", "+SP", "+SR"]
    for member in members:
        name = plot.NAMES[member["variant"]]
        assert heights[name] == [kept for _, kept in member["channels"].values()]
    assert heights["dense"] == [whole for whole, _ in members[0]["channels"].values()]
