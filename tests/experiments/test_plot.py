"""Plots: what is drawn is what the records and traces say, artist by artist."""

from __future__ import annotations

import math
import struct

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dpm_core import SmoothPruning
from experiments.__main__ import main
from experiments.errors import RunError
from experiments.record import CONTROLS, VARIANTS
from experiments.showing import figures, kept, norms, plot, sections
from experiments.showing.lengths import Row
from experiments.showing.norms import Sample
from experiments.showing.pairs import Difference
from tests.support.records import changed, record, save, save_trace


def colour(artist) -> str:
    drawn = artist.get_facecolor() if hasattr(artist, "get_facecolor") else artist.get_color()
    return matplotlib.colors.to_hex(drawn)


def points(line) -> list[tuple[float, float]]:
    return list(zip(*(np.asarray(v, float).tolist() for v in line.get_data()), strict=True))


def size_of_png(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


# ---------------------------------------------------------------------- files

WHAT = "accuracy", "channels", "norms"


def test_plots_of_real_runs_are_pictures(tiny_runs, tmp_path, capsys):
    assert main(["plots", str(tiny_runs.out), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = [f"tiny-digits--360-training-images-{what}.png" for what in WHAT]
    assert printed == [str(tmp_path / "plots" / name) for name in names]
    for path in (tmp_path / "plots").iterdir():
        width, height = size_of_png(path)
        assert 500 < width < 3000
        assert 300 < height < 1500
        assert path.stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == names


def test_nothing_keeps_a_figure_whether_it_was_saved_or_could_not_be_drawn(tiny_runs, tmp_path):
    before = plt.get_fignums()
    plot.plot(kept.located([tiny_runs.out]), tmp_path)
    with pytest.raises(KeyError):
        figures.draw_norms({"base": Sample.model_construct(lines={"no kind": [[]]})})
    assert plt.get_fignums() == before


def test_runs_without_traces_have_the_other_plots(tmp_path):
    paths = [save(tmp_path, record(v, 0)) for v in ("base", "sp")]
    pictures = plot.plot(kept.located(paths), tmp_path / "plots")
    assert [p.name for p in pictures] == [
        "made-up-cifar-10-accuracy.png",
        "made-up-cifar-10-channels.png",
    ]


def test_every_variant_has_a_name_and_a_colour_of_its_own():
    assert (
        set(sections.NAMES)
        == set(figures.COLOURS)
        == set(figures.STYLES)
        == set(VARIANTS + CONTROLS)
    )
    assert len(set(figures.COLOURS.values())) == len(set(sections.NAMES.values())) == 5


def test_every_experiment_has_plots_of_its_own(tmp_path):
    records = [record("base", 0), record("base", 0, config={"name": "other"}, config_hash="f")]
    runs = [(tmp_path / f"{i}" / "record.json", m) for i, m in enumerate(records)]
    names = {p.name for p in plot.plot(runs, tmp_path)}
    assert {n.removesuffix("-accuracy.png") for n in names} >= {
        "made-up-cifar-10",
        "other-cifar-10",
    }


# ---------------------------------------------------------------------- norms


@pytest.fixture
def traces(tiny_runs):
    return {
        v: torch.load(tiny_runs.paths[v].parent / "trace.pt", weights_only=True)
        for v in ("sp", "sr")
    }


@pytest.fixture
def samples(traces):
    return {v: norms.sample_norms(saved, 0, v) for v, saved in traces.items()}


def expected_lines(saved) -> dict[str, list[list[tuple[int, float]]]]:
    """All trajectories by kind, each from the start of its structure's decay."""
    starts, kinds = {}, {}
    for event in saved["events"]:
        for k, norm in zip(event["structures"], event["norms"], strict=True):
            key = (event["group"], k)
            if event["kind"] == "decay":
                starts[key] = (event["step"], norm)
                kinds[key] = "decayed in their place" if event["wave"] else "decayed to zero"
            elif event["kind"] == "release":
                kinds[key] = "released"
    lines: dict[str, list[list[tuple[int, float]]]] = {}
    for (group, k), (start, norm) in starts.items():
        line = [(start, norm)]
        line += [(s, norms[group][k]) for s, norms in saved["trace"] if s > start]
        lines.setdefault(kinds[group, k], []).append(line)
    return lines


def made_up(*norms, releases=(), refill=(), count=1):
    """A trace of structures 0 .. count - 1 that decay at step 0 with these norms at each step."""
    ks = tuple(range(count))

    def event(step, kind, structures, wave=0):
        values = tuple(norms[step] for _ in structures)
        return {
            "step": step,
            "kind": kind,
            "group": "g",
            "structures": structures,
            "norms": values,
            "wave": wave,
        }

    events = [event(0, "decay", ks)]
    events += [event(step, "release", (k,)) for step, k in releases]
    events += [event(step, "decay", (k,), wave=1) for step, k in refill]
    trace = [(step, {"g": dict.fromkeys(ks, n)}) for step, n in enumerate(norms) if step]
    return {"events": sorted(events, key=lambda e: e["step"]), "trace": trace}


def near(point, line, tolerance) -> bool:
    return any(s == point[0] and abs(n - point[1]) <= tolerance for s, n in line)


def test_sampled_trajectories_are_those_of_the_trace(traces, samples):
    for variant, saved in traces.items():
        sample, expected = samples[variant], expected_lines(saved)
        wanted = {"decayed to zero"}
        wanted |= {"released", "decayed in their place"} if variant == "sr" else set()
        assert set(sample.lines) == set(expected) == wanted
        assert sample.counts == {kind: len(lines) for kind, lines in expected.items()}
        assert (sample.variant, sample.seed) == (variant, 0)
        for kind, lines in sample.lines.items():
            assert min(len(expected[kind]), norms.LINES) / 3 < len(lines) <= norms.LINES
            for line in lines:
                assert len(line) <= norms.POINTS
                sources = [
                    whole
                    for whole in expected[kind]
                    if all(near(p, whole, 1e-3 * max(1, p[1])) for p in line)
                ]
                assert sources, (variant, kind, line)
                # Straight pieces between the points that are left miss no point by much.
                x, y = zip(*line, strict=True)
                assert any(
                    whole[-1][0] == x[-1]
                    and all(
                        abs(np.interp(s, x, y) - n) < 0.005 * max(v for _, v in whole)
                        for s, n in whole
                    )
                    for whole in sources
                )


def test_samples_are_plain_values_and_small(samples):
    texts = {variant: sample.model_dump_json() for variant, sample in samples.items()}
    assert sum(map(len, texts.values())) < 40_000
    again = {v: Sample.model_validate_json(text) for v, text in texts.items()}
    assert again == samples
    assert figures.highest(again) == figures.highest(samples) > 0


@pytest.mark.parametrize(
    "count", [norms.LINES, norms.LINES + 1, 2 * norms.LINES - 1, 5 * norms.LINES]
)
def test_no_more_lines_of_a_kind_are_sampled_than_can_be_told_apart(count):
    sample = norms.sample_norms(made_up(1.0, 0.5, count=count), 0, "sp")
    assert norms.LINES / 3 < len(sample.lines["decayed to zero"]) <= norms.LINES
    assert sample.counts == {"decayed to zero": count}


def test_a_straight_line_needs_its_ends_alone():
    values = [1 - n / 200 for n in range(201)]
    (line,) = norms.sample_norms(made_up(*values), 0, "sp").lines["decayed to zero"]
    assert line == [(0, 1.0), (200, 0.0)]


def test_a_crooked_line_has_no_more_points_than_allowed_and_keeps_its_release():
    values = [1 + math.sin(n) for n in range(400)]
    sample = norms.sample_norms(made_up(*values, releases=[(123, 0)]), 4, "sr")
    (line,) = sample.lines["released"]
    assert len(line) == norms.POINTS
    (mark,) = sample.releases
    assert mark == (123, pytest.approx(values[123], rel=1e-3))
    assert mark in line


def test_the_last_decision_about_a_structure_is_its_kind():
    # It is released at first, then chosen again, and decays to zero.
    saved = made_up(1.0, 0.5, 1.0, 0.5, 0.0, releases=[(1, 0)], refill=[(2, 0)], count=2)
    sample = norms.sample_norms(saved, 0, "sr")
    assert sample.counts == {"decayed to zero": 1, "decayed in their place": 1}
    assert sample.releases == []
    assert sample.lines["decayed in their place"][0][0] == (2, 1.0)


def test_a_trace_without_decays_is_an_empty_sample():
    sample = norms.sample_norms({"events": [], "trace": []}, 0, "sp")
    assert (sample.counts, sample.lines, sample.releases) == ({}, {}, [])
    assert figures.draw_norms({"sp": sample}).axes[0].lines[:] == []


def test_what_is_sampled_is_drawn(samples):
    figure = figures.draw_norms(samples, "title")
    assert len(figure.axes) == 2
    for axis, (variant, sample) in zip(figure.axes, samples.items(), strict=True):
        drawn: dict[str, list] = {}
        for line in axis.lines:
            if line.get_linestyle() != "None":
                drawn.setdefault(colour(line), []).append(points(line))
        assert drawn == {
            figures.KINDS[kind]: [[tuple(p) for p in line] for line in lines]
            for kind, lines in sample.lines.items()
        }
        assert sections.NAMES[variant] in axis.get_title()
        texts = {t.get_text() for t in axis.get_legend().get_texts()}
        assert texts == {f"{kind} ({n})" for kind, n in sample.counts.items()}


def test_releases_are_marked_where_they_happened(traces, samples):
    saved = traces["sr"]
    traced = dict(saved["trace"])
    everywhere = [
        (e["step"], traced[e["step"]][e["group"]][k])
        for e in saved["events"]
        if e["kind"] == "release"
        for k in e["structures"]
    ]
    sp, sr = figures.draw_norms(samples, "title").axes
    (marks,) = [line for line in sr.lines if line.get_marker() == "v"]
    assert len(points(marks)) == len(samples["sr"].lines["released"]) > 3
    for mark in points(marks):
        assert near(mark, everywhere, 1e-3)
        assert any(mark in [tuple(p) for p in ln] for ln in samples["sr"].lines["released"])
    assert colour(marks) == figures.RELEASED
    assert all(line.get_marker() in ("None", "") for line in sp.lines)


def test_one_variants_norms_have_one_panel_and_may_share_a_top(samples):
    figure = figures.draw_norms({"sp": samples["sp"]}, top=77.0)
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylim()[1] >= 77
    assert figure.axes[0].get_ylim()[0] == 0


# ---------------------------------------------------------------------- kept norms


def kept_file(tiny_runs, folder):
    """Records and norms as they are kept: one file each, no traces beside them."""
    (folder / "tiny.jsonl").parent.mkdir(parents=True, exist_ok=True)
    runs = kept.located(tiny_runs.paths.values())
    lines = [r.line() for _, r in runs]
    (folder / "tiny.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return norms.keep_norms(runs, folder / "tiny-norms.json")


def test_kept_norms_are_found_again_without_traces(tiny_runs, tmp_path, samples):
    path = kept_file(tiny_runs, tmp_path)
    assert path.stat().st_size < 40_000
    runs = kept.located([tmp_path / "tiny.jsonl"])
    assert norms.find_norms(runs, [r for _, r in runs]) == samples
    names = [f"tiny-digits--360-training-images-{what}.png" for what in WHAT]
    assert [p.name for p in plot.plot(runs, tmp_path / "plots")] == names
    # Keeping them once more, from what was kept, changes nothing.
    before = path.read_bytes()
    assert norms.keep_norms(runs, path) == path
    assert path.read_bytes() == before


def test_the_first_seed_with_norms_is_shown(tmp_path):
    runs = []
    for seed in (7, 3, 1):
        content = record("sp", seed)
        runs.append((save(tmp_path, content), content))
        if seed != 1:
            save_trace(*runs[-1], made_up(1.0, 0.0, count=seed))
    found = norms.find_norms(runs, [r for _, r in runs])
    assert found["sp"].seed == 3
    assert found["sp"].counts == {"decayed to zero": 3}


def test_kept_norms_of_another_configuration_are_not_shown(tiny_runs, tmp_path):
    kept_file(tiny_runs, tmp_path)
    runs = [
        (p, r.model_copy(update={"config_hash": "other"}))
        for p, r in kept.located([tmp_path / "tiny.jsonl"])
    ]
    assert norms.find_norms(runs, [r for _, r in runs]) == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"norms": [{}]}', '{"norms": 3}', '{"norms": [{"config_hash": 1}]}'],
)
def test_damaged_kept_norms_are_named(tmp_path, content):
    one = record("sp", 0)
    path = tmp_path / "made-up-norms.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"made-up-norms\.json holds no norms .* delete it"):
        norms.find_norms([(tmp_path / "made-up.jsonl", one)], [one])


def test_without_traces_nothing_is_kept(tmp_path):
    content = record("sp", 0)
    path = tmp_path / "made-up-norms.json"
    assert norms.keep_norms([(tmp_path / "made-up.jsonl", content)], path) is None
    assert not path.exists()


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
    """By variant: the lines of the runs, the line of their mean, and the dotted lines."""
    (axis,) = figures.draw_accuracy(members, "title").axes
    by_variant = {}
    for variant, shade in figures.COLOURS.items():
        mine = [line for line in axis.lines if colour(line) == shade]
        if mine:
            by_variant[variant] = (
                [ln for ln in mine if ln.get_alpha() is not None],
                [ln for ln in mine if ln.get_alpha() is None and ln.get_linestyle() == "-"],
                [ln for ln in mine if ln.get_linestyle() == ":"],
            )
    return by_variant


def test_every_run_has_a_faint_line_and_every_variant_its_mean(members):
    drawn = accuracy_lines(members)
    assert set(drawn) == {"base", "sp"}
    for variant, (faint, means, dotted) in drawn.items():
        curves = [CURVES[variant, seed] for seed in (0, 1)]
        assert [[list(p) for p in points(line)] for line in faint] == curves
        (mean,) = means
        expected = [
            (step, (a + b) / 2) for (step, a), (_, b) in zip(curves[0], curves[1], strict=True)
        ]
        assert points(mean) == expected
        assert "2 seeds" in mean.get_label()
        assert sections.NAMES[variant] in mean.get_label()
        # When all was gone, the mean over the runs; the removal may come later.
        (zero,) = dotted
        assert set(zero.get_xdata()) == {0 if variant == "base" else 7}


def test_the_mean_is_over_steps_that_all_runs_have(members):
    members[3] = changed(members[3], curve=[[0, 92.0], [5, 60.0], [9, 50.0], [10, 68.0]])
    _, (mean,), _ = accuracy_lines(members)["sp"]
    assert points(mean) == [(0, 91.0), (5, 55.0), (10, 67.0)]


def test_steps_count_from_the_decision():
    content = record("sp", 0, steps__decision=40, steps__zero=47, curve=CURVES["sp", 0])
    _, _, (zero,) = accuracy_lines([content])["sp"]
    assert set(zero.get_xdata()) == {7}


def test_the_accuracy_of_real_runs_is_their_curve(tiny_runs):
    members = kept.read(tiny_runs.paths.values())
    drawn = accuracy_lines(members)
    assert list(drawn) == ["base", "sp", "sr"]
    for member in members:
        (faint,), (mean,), _ = drawn[member.variant]
        assert points(faint) == member.curve
        assert points(mean) == points(faint)


# ---------------------------------------------------------------------- channels


def test_bars_are_the_channels_kept_and_the_dense_ones_behind(members):
    first = {("base", 0): 8, ("base", 1): 12, ("sp", 0): 5, ("sp", 1): 6}
    members = [
        changed(m, channels={**m.channels, "first": [16, first[m.variant, m.seed]]})
        for m in members
    ]
    (axis,) = figures.draw_channels(members, "title").axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["first", "second", "head"]
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers}
    assert heights == {"dense": [16, 32, 10], "base": [10.0, 10, 10], "+SP": [5.5, 10, 10]}
    shades = {c.get_label(): colour(c[0]) for c in axis.containers}
    assert shades["base"] == figures.COLOURS["base"]
    assert shades["+SP"] == figures.COLOURS["sp"]
    # Bars of one layer stand side by side, on its tick.
    base, sp = (next(c for c in axis.containers if c.get_label() == n) for n in ("base", "+SP"))
    for place, (left, right) in enumerate(zip(base, sp, strict=True)):
        assert left.get_x() + left.get_width() == pytest.approx(right.get_x())
        assert left.get_x() + left.get_width() == pytest.approx(place)


def test_the_bars_of_real_runs_are_their_channels(tiny_runs):
    members = kept.read(tiny_runs.paths.values())
    (axis,) = figures.draw_channels(members, "title").axes
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers}
    assert list(heights) == ["dense", "base", "+SP", "+SR"]
    for member in members:
        name = sections.NAMES[member.variant]
        assert heights[name] == [width.kept for width in member.channels.values()]
    assert heights["dense"] == [width.dense for width in members[0].channels.values()]


# ---------------------------------------------------------------------- releases, latency, MACs

RELEASES = {
    ("sr", 0): [[4, "second", 2], [4, "first", 1], [9, "second", 3]],
    ("sr", 1): [[4, "second", 4], [6, "other", 2]],
    ("random", 0): [[5, "first", 6]],
}


@pytest.fixture
def releasing():
    records = [record(variant, seed, releases=r) for (variant, seed), r in RELEASES.items()]
    return [*records, record("base", 0), record("sp", 0)]


def test_a_long_title_stays_within_the_figure_and_above_the_axes(releasing):
    title = "some-framework, some-network, a data set of a name (45,000 images) " * 3
    for draw in (
        figures.draw_accuracy,
        figures.draw_channels,
        figures.draw_releases,
        figures.draw_releases_by_group,
        figures.draw_latency,
    ):
        figure = draw(releasing, title)
        figure.draw_without_rendering()
        ((head,), (axis,)) = figure.texts, figure.axes
        at = head.get_window_extent()
        assert title in head.get_text()
        assert 0 <= at.x0 < at.x1 <= figure.bbox.x1
        assert axis.get_tightbbox().y1 <= at.y0 < at.y1 <= figure.bbox.y1


def test_releases_over_time_are_counted_up(releasing):
    (axis,) = figures.draw_releases(releasing, "title").axes
    drawn = {}
    for line in axis.lines:
        drawn.setdefault((colour(line), line.get_alpha()), []).append(dict(points(line)))
        assert line.get_drawstyle() == "steps-post"
    sr, random = figures.COLOURS["sr"], figures.COLOURS["random"]
    assert set(drawn) == {(sr, 0.25), (sr, None), (random, 0.25), (random, None)}
    assert drawn[sr, 0.25] == [{0: 0, 4: 3, 6: 3, 9: 6, 10: 6}, {0: 0, 4: 4, 6: 6, 9: 6, 10: 6}]
    assert drawn[sr, None] == [{0: 0, 4: 3.5, 6: 4.5, 9: 6, 10: 6}]
    assert drawn[random, None] == [{0: 0, 5: 6, 10: 6}]
    texts = [t.get_text() for t in axis.get_legend().get_texts()]
    assert texts == [f"{sections.NAMES['sr']} (2 seeds)", f"{sections.NAMES['random']} (1 seed)"]


def test_releases_by_group_are_means_in_the_networks_order(releasing):
    names, heights = figures.releases_by_group(releasing)
    assert names == ["first", "second", "other"]
    assert heights == {"sr": [0.5, 4.5, 1.0], "random": [6.0, 0.0, 0.0]}
    (axis,) = figures.draw_releases_by_group(releasing, "title").axes
    assert [t.get_text() for t in axis.get_xticklabels()] == names
    assert {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers} == {
        sections.NAMES[v]: values for v, values in heights.items()
    }


def test_controls_have_lines_and_bars_too(releasing):
    (axis,) = figures.draw_accuracy(releasing, "title").axes
    assert figures.COLOURS["random"] in {colour(line) for line in axis.lines}
    (axis,) = figures.draw_channels(releasing, "title").axes
    labels = [c.get_label() for c in axis.containers]
    assert labels == ["dense", "base", "+SP", "+SR", sections.NAMES["random"]]


def test_latency_is_dense_and_pruned_with_its_spread():
    members = [
        record("base", 0, latency__dense=4.0, latency__pruned=2.0),
        record("base", 1, latency__dense=6.0, latency__pruned=2.0),
        record("sr", 0, latency__dense=5.0, latency__pruned=1.5),
    ]
    (axis,) = figures.draw_latency(members, "title").axes
    dense, pruned = (c for c in axis.containers if hasattr(c, "patches"))
    assert [bar.get_width() for bar in dense] == [5.0, 5.0]
    assert [bar.get_width() for bar in pruned] == [2.0, 1.5]
    assert [colour(bar) for bar in pruned] == [figures.COLOURS["base"], figures.COLOURS["sr"]]
    ((start, end), (one, same)) = (s[:, 0] for s in dense.errorbar[2][0].get_segments())
    assert (start, end) == (pytest.approx(5 - 2**0.5), pytest.approx(5 + 2**0.5))
    assert one == same == 5.0
    assert [t.get_text() for t in axis.get_yticklabels()] == ["base", "+SR"]


def test_latency_shows_the_masked_model_where_every_run_of_a_variant_had_one():
    members = [
        record("base", 0),
        record("sp", 0, latency__masked=2.5),
        record("sr", 0, latency__masked=3.0),  # and not the other one of that variant
        record("sr", 1),
    ]
    (axis,) = figures.draw_latency(members, "title").axes
    dense, masked, pruned = (c for c in axis.containers if hasattr(c, "patches"))
    assert (len(dense), len(masked), len(pruned)) == (3, 1, 3)
    assert masked[0].get_width() == 2.5
    assert masked[0].get_hatch()
    # Between the two others of its variant.
    assert dense[1].get_y() < masked[0].get_y() < pruned[1].get_y()


def test_the_tradeoff_has_a_marker_per_variant_and_a_hollow_one_for_dense():
    first = [
        record("base", 0, macs__pruned=250, accuracy__final=80.0),
        record("base", 1, macs__pruned=350, accuracy__final=84.0),
        record("sp", 0, macs__pruned=300, accuracy__final=86.0),
    ]
    scratch = [record("base", 0, accuracy__dense=None, accuracy__final=70.0)]
    figure = figures.draw_tradeoff({"first": first, "scratch": scratch})
    (axis,) = figure.axes
    drawn = [(c[0].get_marker(), colour(c[0]), points(c[0])) for c in axis.containers]
    assert drawn == [
        ("o", figures.COLOURS["base"], [(30.0, 82.0)]),
        ("o", figures.COLOURS["sp"], [(30.0, 86.0)]),
        ("s", figures.COLOURS["base"], [(25.0, 70.0)]),
    ]
    (dense,) = [line for line in axis.lines if line.get_fillstyle() == "none"]
    assert points(dense) == [(100, 90.0)]
    assert dense.get_marker() == "o"
    # All of it, with its spread, lies within the axes.
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    assert left < 30 - 50**0.5 < 100 < right
    assert low < 70
    assert high > 90
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["base", "+SP", "first", "scratch"]


def test_the_tradeoffs_legend_lies_within_the_figure_whatever_the_names():
    variants = ("base", "sp", "sr", "random", "least-resistant")
    runs = [record(variant, 0) for variant in variants]
    names = [f"depgraph-blind-trajectory-{n}" for n in range(7)]
    figure = figures.draw_tradeoff(dict.fromkeys(names, runs), size=(5, 4))
    figure.canvas.draw()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert [t.get_text() for t in legend.get_texts()][7:] == names


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    content = record("base", 0, data="$x^{", model="a$b")
    assert len(plot.plot([(tmp_path / "r.json", content)], tmp_path)) == 2


def test_differences_are_those_of_the_pairs_and_hollow_without_an_interval():
    several = [
        record(v, s, accuracy__final=80.0 + up + s / 10, structures__released=released)
        for v, up, released in (("base", 0.0, 0), ("sp", 1.0, 0), ("sr", 2.0, 4))
        for s in (0, 1)
    ]
    last = several[-1].accuracy.final + 0.4
    several[-1] = record("sr", 1, accuracy__final=last, structures__released=4)
    alone = [record(v, 0, accuracy__final=70.0 + up) for v, up in (("base", 0.0), ("sp", -0.5))]
    asked = sections.answers([("several", several), ("alone", alone)])
    (axis,) = figures.draw_differences(asked).axes
    marks = [line for line in axis.lines if line.get_marker() not in ("None", None, "")]
    found = [
        (line.get_xdata()[0], round(line.get_ydata()[0]), line.get_fillstyle()) for line in marks
    ]
    assert [row[1:] for row in found] == [(0, "full"), (0, "full"), (1, "none")]
    assert [row[0] for row in found] == pytest.approx([1.0, 2.2, -0.5])
    (interval,) = [
        line for line in axis.lines if len(set(line.get_xdata())) == 2 and line not in marks
    ]  # that of +SP has no width
    versus = sections.minus(several, "sr", "base")
    assert interval.get_xdata() == pytest.approx([versus.low, versus.high])
    assert [t.get_text() for t in axis.get_yticklabels()] == ["several", "alone"]
    left, right = axis.get_xlim()
    assert left == -right
    assert right == pytest.approx(1.2 * 2.2)


def fine_tuned(allowed, rate, variant, decay, device, versus):
    """A row with this difference to base, of four seeds."""
    differences = {} if versus is None else {"base": versus}
    of = [sections.Summary(80.0, 1.0)] * 3
    return Row("", allowed, rate, variant, decay, device, *of, [0, 1, 2, 3], {}, differences)


def test_budgets_are_drawn_at_their_steps_and_long_decays_apart():
    def row(allowed, variant, steps, mean, low=None, high=None):
        versus = None if steps is None else Difference(4, 4, mean, 1.0, low, high, 1.0, [], [])
        decay = steps and SmoothPruning(steps)
        return fine_tuned(allowed, 0.02, variant, decay, "none", versus)

    rows = [
        row(1404, "base", None, 0.0),
        *(row(1404, "sp", 70, 0.1), row(1404, "sp", 1403, -3.0, -4.0, -2.0)),
        row(351, "base", None, 0.0),
        *(row(351, "sp", 18, 0.6, -5.0, 6.0), row(351, "sr", 18, 0.4)),
        row(351, "sp", 350, -8.0, -16.0, -0.5),
    ]
    (axis,) = figures.draw_budgets(rows).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["351", "1,404"]
    marks = {line.get_label(): line for line in axis.lines if line.get_marker() in list("os^D")}
    assert {k: list(line.get_ydata()) for k, line in marks.items()} == {
        "+SP, decay of 5% of the steps": [0.6, 0.1],
        "+SR, decay of 5% of the steps": [0.4],
        "+SP, decay of 100% of the steps": [-8.0, -3.0],
    }
    for line in marks.values():
        assert [round(x) for x in line.get_xdata()] == [0, 1][: len(line.get_xdata())]
    hollow = [k for k, line in marks.items() if line.get_fillstyle() == "none"]
    assert hollow == ["+SP, decay of 100% of the steps"]
    spans = [
        tuple(line.get_ydata())
        for line in axis.lines
        if line not in marks.values() and line.get_xdata()[0] == line.get_xdata()[1]
    ]
    assert sorted(spans) == [(-16.0, -0.5), (-5.0, 6.0), (-4.0, -2.0)]
    low, high = axis.get_ylim()
    assert low == -high
    assert high > 8


def test_budgets_have_a_panel_per_learning_rate_and_machine_and_a_line_per_shape():
    def row(rate, steps, mean, device="here", shape="linear", variant="sp", allowed=351):
        versus = Difference(4, 4, mean, 1.0, None, None, 1.0, [], [])
        decay = SmoothPruning(steps, shape)
        return fine_tuned(allowed, rate, variant, decay, device, versus)

    rows = [
        *(row(0.002, 18, 0.3), row(0.002, 18, 0.2, variant="sr"), row(0.002, 350, -1.0)),
        *(row(0.02, 18, 0.4), row(0.02, 70, 0.6), row(0.02, 18, 0.5, shape="cosine")),
        row(0.002, 35, 0.7, device="there", allowed=702),
    ]
    figure = figures.draw_budgets(rows)
    shown = {
        axis.get_title(): {
            line.get_label(): list(line.get_ydata())
            for line in axis.lines
            if line.get_marker() not in ("None", None, "") and len(line.get_ydata())
        }
        for axis in figure.axes
    }
    short, long = "+SP, linear decay of 5% of the steps", "+SP, linear decay of 100% of the steps"
    assert shown == {
        "learning rate 0.02": {
            short: [0.4],
            "+SP, linear decay of 20% of the steps": [0.6],
            "+SP, cosine decay of 5% of the steps": [0.5],
        },
        "learning rate 0.002,\nhere": {
            short: [0.3],
            "+SR, linear decay of 5% of the steps": [0.2],
            long: [-1.0],
        },
        "learning rate 0.002,\nthere": {short: [0.7]},
    }
    assert [t.get_text() for t in figure.axes[2].get_xticklabels()] == ["702"]
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    (legend,) = figure.legends
    assert sorted(t.get_text() for t in legend.get_texts()) == sorted(
        {label for panel in shown.values() for label in panel}
    )


def test_decay_lengths_are_drawn_by_share_and_a_line_per_kind():
    def row(rate, steps, mean, low=None, high=None, device="here", shape="linear", allowed=1000):
        versus = None if steps is None else Difference(4, 4, mean, 1.0, low, high, 1.0, [], [])
        decay = steps and SmoothPruning(steps, shape)
        variant = "base" if steps is None else "sp"
        return fine_tuned(allowed, rate, variant, decay, device, versus)

    rows = [
        *(row(0.02, None, 0.0), row(0.02, 20, -0.1, -0.9, 0.7), row(0.02, 400, 0.2)),
        *(row(0.002, None, 0.0), row(0.002, 100, 0.4), row(0.002, 400, -2.0, -9.0, 5.0)),
    ]
    (axis,) = figures.draw_lengths(rows).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["2%", "10%", "40%"]
    marks = {line.get_label(): line for line in axis.lines if line.get_marker() in list("os^D")}
    drawn = {
        k: [(round(x), y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for k, line in marks.items()
    }
    assert drawn == {
        "learning rate 0.02": [(0, -0.1), (2, 0.2)],
        "learning rate 0.002": [(1, 0.4), (2, -2.0)],
    }
    spans = [tuple(line.get_ydata()) for line in axis.lines if line not in marks.values()]
    assert {s for s in spans if s != (0, 0)} == {(-0.9, 0.7), (-9.0, 5.0)}
    low, high = axis.get_ylim()
    assert low == -high < -2
    apart = [*rows, row(0.02, 20, 1.0, shape="cosine"), row(0.02, 20, 2.0, device="there")]
    (axis,) = figures.draw_lengths(apart).axes
    labels = {line.get_label() for line in axis.lines if line.get_marker() in list("os^D")}
    assert labels == {
        f"learning rate {rest}"
        for rest in ("0.02, linear, here", "0.002, linear, here", "0.02, cosine, here",
                     "0.02, linear, there")
    }  # fmt: skip
    (axis,) = figures.draw_lengths([*rows[:3], row(0.02, 398, 0.3)]).axes  # 40%, too
    (line,) = [line for line in axis.lines if line.get_label() == "learning rate 0.02"]
    assert list(line.get_ydata()) == [-0.1, 0.2, 0.3]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["2%", "40%"]


def test_sections_without_any_pair_are_not_asked_for_differences():
    named = {
        "alone": [("base", 0)],
        "a pair": [("base", 0), ("sp", 0)],
        "of other seeds": [("base", 0), ("sp", 1)],
        "to chance": [("sr", 0), ("random", 0)],
    }
    found = [(name, [record(v, s) for v, s in runs]) for name, runs in named.items()]
    assert list(sections.answers(found)) == ["a pair", "to chance"]
