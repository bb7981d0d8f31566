"""The table of decay lengths: pairs across configurations, and what is refused."""

from __future__ import annotations

import json

import pytest
from scipy import stats

from experiments.__main__ import main
from experiments.errors import RunError
from experiments.showing import lengths, sections
from experiments.showing.kept import read
from tests.support.records import changed, record, save


def tried(
    variant, seed, final, steps=10, rate=0.02, epochs=6, validation=100, shape="linear", **more
):
    config = {
        "name": f"pilot-{epochs}-{rate}-{steps}",
        "stages": {"prune": {"epochs": epochs, "learning_rate": rate}},
        "smooth": {"steps": steps, "shape": shape},
        "data": {"validation": validation},
    }
    return record(
        variant,
        seed,
        config=config,
        accuracy__final=final,
        steps__total=100 * epochs,
        config_hash=f"{epochs}{rate}{steps}{shape}",
        dense_seed=seed % 2,
        **more,
    )


def steps(row):
    return row.decay and row.decay.steps


RUNS = [
    *(tried("base", s, 80.0 + s) for s in range(4)),
    *(tried("sp", s, 80.5 + s, steps=40) for s in range(3)),
    *(tried("sp", s, 81.0 + 2 * s) for s in range(4)),
    *(tried("sp", s, 70.0, rate=0.002) for s in range(2)),
    tried("base", 0, 85.0, epochs=12),
]


def test_a_decay_is_paired_with_the_base_of_its_own_fine_tuning():
    rows = lengths.rows(RUNS[::-1])
    shown = [(r.allowed, r.learning_rate, r.variant, steps(r), r.share) for r in rows]
    assert shown == [
        (600, 0.02, "base", None, None),
        (600, 0.02, "sp", 10, 1 / 60),
        (600, 0.02, "sp", 40, 1 / 15),
        (600, 0.002, "sp", 10, 1 / 60),
        (1200, 0.02, "base", None, None),
    ]
    assert [r.final.mean for r in rows] == [81.5, 84.0, 81.5, 70.0, 85.0]
    # Seeds 0 and 2 are of network 0, 1 and 3 of network 1: +1 and +3, +2 and +4 points.
    ten = rows[1].difference
    interval = stats.ttest_1samp([2.0, 3.0], 0).confidence_interval(0.95)
    assert (ten.pairs, ten.networks, ten.mean) == (4, 2, 2.5)
    assert (ten.low, ten.high) == pytest.approx((interval.low, interval.high))
    assert (rows[2].difference.pairs, rows[2].difference.mean) == (3, 0.5)
    assert [r.difference for r in (rows[0], rows[3], rows[4])] == [None] * 3


def test_settings_of_later_releases_keep_no_runs_apart():
    """Where they are as they were, and nobody could set them otherwise."""
    later = [
        changed(r, config={**r.config, "model_options": {}, "draw_by_seed": False})
        if r.variant == "sp"
        else r
        for r in RUNS
    ]
    assert lengths.rows(later) == lengths.rows(RUNS)


def test_shapes_and_machines_are_kept_apart_and_told_where_there_are_several(tmp_path):
    """A base run serves decays of any shape, and those of its own machine alone."""
    others = [
        *(tried("sp", s, 82.0 + s, shape="cosine") for s in range(3)),
        *(tried("base", s, 70.0, device="other machine") for s in range(2)),
        *(tried("sp", s, 73.0, device="other machine") for s in range(4)),
    ]
    rows = lengths.rows([*others, *RUNS])
    found = [
        (r.device, r.decay.steps, r.decay.shape, r.difference.mean) for r in rows if r.difference
    ]
    here = RUNS[0].device
    assert found == [
        *((here, 10, "linear", 2.5), (here, 40, "linear", 0.5), (here, 10, "cosine", 2.0)),
        ("other machine", 10, "linear", 3.0),
    ]
    kept = tmp_path / "kept.jsonl"
    lengths.keep([*others, *RUNS], kept)
    assert len(kept.read_text().splitlines()) == len(others) + len(RUNS)
    lines = lengths.table([*others, *RUNS]).markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert set(cells[0]) - set(lengths.HEADER) == {*lengths.OF_SHAPES, *lengths.OF_MACHINES}
    assert [(c[5], c[-1] == "other machine") for c in cells[2:]].count(("cosine", False)) == 1
    assert all(len(c) == len(cells[0]) for c in cells)


def test_the_table_says_what_there_is():
    lines = lengths.table(RUNS).markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(lengths.HEADER)
    removal = f"{RUNS[0].accuracy.at_removal:.1f} ({RUNS[0].accuracy.at_removal_reestimated:.1f})"
    assert cells[2] == ["600", "0.02", "base", "-", "-", removal, "81.50 ± 1.29", "-", "4", "-"]
    assert cells[4] == [
        *("600", "0.02", "+SP", "40", "7", removal),
        *("81.50 ± 1.00", "+0.50 [+0.50, +0.50]", "3", "2"),
    ]
    assert cells[5][7:] == ["-", "2", "-"]
    assert cells[6][0] == "1,200"


def allowed(*arguments, **more):
    return tried(*arguments, **more, validation=None)


BUDGETS = [
    *(allowed("base", s, 60.0 + s, epochs=e) for s in range(2) for e in (1, 4)),
    *(allowed("sp", s, 61.0 + s, epochs=1, steps=5) for s in range(2)),
    *(allowed("sr", s, 62.0 + 2 * s, epochs=1, steps=5) for s in range(2)),
    *(allowed("random", s, 60.0 + s, epochs=1, steps=5) for s in range(2)),
    *(allowed("sp", s, 40.0 + s, epochs=e, steps=100 * e) for s in range(2) for e in (1, 4)),
]


def test_a_decays_worth_is_told_by_the_steps_there_are_from_test_images(tmp_path, capsys):
    kept = tmp_path / "budgets.jsonl"
    runs = [save(tmp_path / str(i), r) for i, r in enumerate(BUDGETS)]
    assert main(["budgets", *map(str, runs), "--out", str(kept)]) == 0
    assert capsys.readouterr().out == lengths.markdown(BUDGETS) + "\n"
    assert len(kept.read_text().splitlines()) == len(BUDGETS)
    found = [
        (r.allowed, r.variant, steps(r), r.difference and r.difference.mean)
        for r in lengths.rows(BUDGETS[::-1])
    ]
    assert found == [
        *((100, "base", None, None), (100, "sp", 5, 1.0), (100, "sr", 5, 2.5)),
        (100, "random", 5, 0.0),
        *((100, "sp", 100, -20.0), (400, "base", None, None), (400, "sp", 400, -20.0)),
    ]


def test_decays_of_one_share_are_counted_over_all_numbers_of_steps_network_by_network():
    gains = {(100, 0): 1.0, (100, 1): -0.5, (100, 2): 0.6, (400, 0): 0.2, (400, 3): 2.1}
    others = [
        # Another share, rate, machine or network, one number of steps alone, no base.
        *(allowed("sp", 0, 90.0, epochs=e, steps=50) for e in (1, 4)),
        *(allowed(v, 0, 90.0, epochs=1, steps=5, rate=0.002) for v in ("base", "sp")),
        *(allowed(v, 0, 90.0, epochs=1, steps=5, device="other") for v in ("base", "sp")),
        *(allowed("sp", 0, 90.0, epochs=e, steps=10 * e, device="other") for e in (2, 8)),
    ]
    elsewhere = [allowed(v, 0, 90.0, epochs=4, steps=20) for v in ("base", "sp")]
    others += [changed(r, config={**r.config, "model": "vgg11"}) for r in elsewhere]
    runs = [
        *(allowed("base", s, 70.0, epochs=e) for s in range(4) for e in (1, 4)),
        *(
            allowed("sp", s, 70.0 + g, epochs=n // 100, steps=n // 20)
            for (n, s), g in gains.items()
        ),
        *(allowed("sr", s, 75.0, epochs=e, steps=5 * e) for s in range(2) for e in (1, 4)),
        *(allowed("random", s, 74.0 - s, epochs=e, steps=5 * e) for s in range(2) for e in (1, 4)),
        *others,
    ]
    # Seeds 0 and 2 start from network 0, 1 and 3 from network 1.
    means = [(1.0 + 0.6 + 0.2) / 3, (-0.5 + 2.1) / 2]
    least, most = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    of = "linear decays of 5% of 100 and 400 steps, learning rate 0.02, none"
    three, four = (f"{n} pairs of 2 networks" for n in (3, 4))
    short, far = stats.ttest_1samp([(4.0 + 4.8) / 2, 5.5], 0).confidence_interval(0.95)
    below, above = stats.ttest_1samp([(3.0 + 3.8) / 2, 3.5], 0).confidence_interval(0.95)
    (text,) = lengths.markdown(runs).split(lengths.table(runs).markdown())[1:]
    lines = [line.removeprefix("- ") for line in text.strip().splitlines()]
    assert lines == [
        f"+SP minus base, {of}: +0.70 [{least:+.2f}, {most:+.2f}], 5 pairs of 2 networks",
        f"+SR minus base, {of}: +5.00 [+5.00, +5.00], {four}",
        f"+SR minus random release, {of}: +1.50 [-4.85, +7.85], {four}",
        f"+SR minus +SP, {of}: +4.95 [{short:+.2f}, {far:+.2f}], {three}",
        f"random release minus base, {of}: +3.50 [-2.85, +9.85], {four}",
        f"random release minus +SP, {of}: +3.45 [{below:+.2f}, {above:+.2f}], {three}",
    ]
    alone = [r for r in runs if r.steps.total == 100]
    assert lengths.markdown(alone) == lengths.table(alone).markdown()
    # At a glance: those that +SR was run with, the lowest learning rate first.
    low = [
        allowed(v, s, 70.0 + g + s / 10, epochs=e, steps=5 * e, rate=0.002)
        for v, g in (("base", 0.0), ("sp", 1.0), ("sr", 3.0), ("random", 0.5))
        for s in range(2)
        for e in (1, 2)
    ]
    long = [
        allowed("sp", s, 9.0, epochs=e, steps=100 * e, rate=0.002) for s in (0, 1) for e in (1, 2)
    ]
    asked = lengths.answers([*runs, *low, *long])
    of = f"{runs[0].framework}-{runs[0].model}"
    first, second = f"{of}, 100 to 200 steps at 0.002", f"{of}, 100 to 400 steps at 0.02"
    assert list(asked) == [first, second]
    assert {pair: (d.mean, d.counted) for pair, d in asked[first].differences.items()} == {
        ("sp", "base"): (pytest.approx(1.0), four),
        ("sr", "base"): (pytest.approx(3.0), four),
        ("sr", "random"): (pytest.approx(2.5), four),
    }
    assert list(asked[second].differences) == [("sp", "base"), ("sr", "base"), ("sr", "random")]
    assert asked[second].differences["sp", "base"].low == pytest.approx(least)
    assert asked[first].published == sections.gains([low[0]]) != {}


def test_releases_are_set_against_as_many_by_chance():
    by_variant = {r.variant: r for r in lengths.rows(BUDGETS) if steps(r) in (None, 5)}
    versus = by_variant["sr"].differences["random"]
    assert (versus.pairs, versus.mean) == (2, 2.5)
    means = {v: {o: d.mean for o, d in row.differences.items()} for v, row in by_variant.items()}
    assert means == {
        "base": {},
        "sp": {"base": 1.0},
        "sr": {"base": 2.5, "random": 2.5, "sp": 1.5},
        "random": {"base": 0.0, "sp": -1.0},
    }
    assert [v for v, row in by_variant.items() if row.released] == ["sr", "random"]
    lines = lengths.table(BUDGETS).markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [*lengths.HEADER, *lengths.OF_RELEASES]
    (sr,) = [line for line in cells if line[2] == "+SR"]
    assert sr[-2] == versus.interval
    assert sr[-1] == by_variant["sr"].released.text(1)


def test_runs_are_kept_once_and_the_table_is_printed_from_them(tmp_path, capsys):
    kept = tmp_path / "lengths.jsonl"
    runs = [save(tmp_path / str(i), r) for i, r in enumerate(RUNS)]
    assert main(["lengths", *map(str, runs[:5]), "--out", str(kept)]) == 0
    assert main(["lengths", *map(str, runs[3:]), "--out", str(kept)]) == 0
    assert len(kept.read_text().splitlines()) == len(RUNS)
    capsys.readouterr()
    assert main(["lengths", "--out", str(kept)]) == 0
    assert capsys.readouterr().out == lengths.table(RUNS).markdown() + "\n"
    before = kept.read_bytes()
    again = save(tmp_path / "again", tried("base", 0, 10.0))
    assert main(["lengths", str(again), "--out", str(kept)]) == 0
    assert len(kept.read_text().splitlines()) == len(RUNS)
    assert kept.read_bytes() != before


def without_fine_tuning(variant, validation):
    return changed(
        tried(variant, 0, 80.0, validation=validation),
        config={
            **tried(variant, 0, 80.0, validation=validation).config,
            "stages": {"train": {"epochs": 6, "learning_rate": 0.02}},
        },
    )


@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [
        ("lengths", tried("sr", 0, 80.0), "seed 0 is neither base nor sp"),
        ("lengths", tried("sp", 0, 80.0, validation=None), "measured on test images"),
        ("lengths", without_fine_tuning("sp", 100), "no stage 'prune'"),
        ("budgets", tried("sp", 0, 80.0), "measured on validation images"),
        ("budgets", without_fine_tuning("sr", None), "no stage 'prune'"),
    ],
)
def test_other_runs_are_refused_and_nothing_is_written(tmp_path, command, wrong, message, capsys):
    kept = tmp_path / "lengths.jsonl"
    chosen = command == "lengths"
    right = RUNS if chosen else BUDGETS
    lengths.keep(right, kept, chosen=chosen)
    before = kept.read_bytes()
    with pytest.raises(RunError, match=message):
        lengths.keep([changed(right[0], seed=9), wrong], kept, chosen=chosen)
    assert main([command, str(save(tmp_path, wrong)), "--out", str(kept)]) == 2
    assert message in capsys.readouterr().err
    assert kept.read_bytes() == before


def test_runs_of_a_seed_from_different_weights_are_kept_apart_by_machines_only(tmp_path):
    kept = tmp_path / "lengths.jsonl"
    base, other = tried("base", 0, 80.0, start="one"), tried("sp", 0, 81.0, start="another")
    lengths.keep([base], kept)
    before = kept.read_bytes()
    with pytest.raises(RunError, match="base and sp of seed 0 started from different weights"):
        lengths.keep([other], kept)
    assert kept.read_bytes() == before
    lengths.keep([changed(other, device="other"), tried("sp", 0, 81.0, start="one")], kept)
    means = [row.difference and row.difference.mean for row in lengths.rows(read([kept]))]
    assert means == [None, 1.0, None]


def test_kept_lines_are_whole_records(tmp_path):
    lengths.keep(RUNS, tmp_path / "kept.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert sorted(lines, key=str) == sorted((r.content() for r in RUNS), key=str)
