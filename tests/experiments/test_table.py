"""Tables: means and spreads against known numbers, their Markdown, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict

import pytest
from scipy import stats

from experiments.__main__ import main
from experiments.errors import RunError
from experiments.record import VERSION as RECORD_VERSION
from experiments.showing import kept, published, sections, table
from experiments.showing.pairs import Difference, detectable
from tests.support.records import STAGE, changed, content, of, record, save

FINAL = {"base": [80.0, 82.0, 84.0], "sp": [81.0, 85.0, 86.0], "sr": [83.0]}
REMOVAL = {"base": [10.0, 10.0, 13.0], "sp": [60.0, 61.0, 62.0], "sr": [64.5]}
REESTIMATED = {"base": [40.0, 50.0, 60.0], "sp": [70.0, 70.0, 70.0], "sr": [71.0]}
MACS = {"base": [250, 250, 250], "sp": [240, 250, 260], "sr": [200]}
DECAYED = {"base": [0, 0, 0], "sp": [30, 30, 30], "sr": [30]}
RELEASED = {"base": [0, 0, 0], "sp": [0, 0, 0], "sr": [4]}
TITLE = "depgraph, vgg16-bn, CIFAR-10 (made-up)"


@pytest.fixture
def records():
    listed = []
    for variant, finals in FINAL.items():
        for seed, final in enumerate(finals):
            listed.append(
                record(
                    variant,
                    seed,
                    accuracy__final=final,
                    accuracy__at_removal=REMOVAL[variant][seed],
                    accuracy__at_removal_reestimated=REESTIMATED[variant][seed],
                    accuracy__dense=90.0 + seed,
                    macs__pruned=MACS[variant][seed],
                    parameters__pruned=100 + 5 * seed,
                    structures__decayed=DECAYED[variant][seed],
                    structures__released=RELEASED[variant][seed],
                )
            )
    return listed[::-1]  # in any order


def mean(values):
    return sum(values) / len(values)


def spread(values):
    """The standard deviation of a sample."""
    if len(values) == 1:
        return None
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def test_rows_are_means_and_sample_deviations_over_seeds(records):
    rows = sections.rows(records)
    assert [row.variant for row in rows] == ["base", "sp", "sr"]
    for row in rows:
        variant = row.variant
        n = len(FINAL[variant])
        expected = {
            "final": FINAL[variant],
            "at_removal": REMOVAL[variant],
            "at_removal_reestimated": REESTIMATED[variant],
            "macs": [100 * m / 1000 for m in MACS[variant]],
            "parameters": [20.0, 21.0, 22.0][:n],
            "released": RELEASED[variant],
            "decayed": DECAYED[variant],
        }
        assert vars(row).keys() == {"variant", "seeds", "difference", "published", *expected}
        assert row.seeds == list(range(n))
        for name, values in expected.items():
            assert getattr(row, name).mean == pytest.approx(mean(values)), name
            assert getattr(row, name).spread == pytest.approx(spread(values)), name


def test_known_numbers():
    finals = [record("sp", s, accuracy__final=f) for s, f in enumerate([2.0, 4.0, 4.0, 6.0])]
    (row,) = sections.rows(finals)
    assert (row.final.mean, row.final.spread) == (4.0, pytest.approx(1.632993161855452))


def test_one_seed_has_no_spread():
    (row,) = sections.rows([record("sr", 5)])
    assert row.seeds == [5]
    assert row.final == sections.Summary(85.0, None)
    assert "±" not in table.markdown([record("sr", 5)])


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_shows_title_variants_and_figures(records):
    text = table.markdown(records)
    title, blank, *rest = text.splitlines()
    assert title == f"{TITLE}; dense 91.00% after 40 steps, then 10 steps"
    assert blank == ""
    header, rule, *rows = cells(text)
    assert header == [
        "paper (ResNet-56, CIFAR-10), %" if name == "paper" else name for name in table.HEADER
    ]
    assert all(set(cell) == {"-"} for cell in rule)
    # +SP minus base: 1, 3 and 2 points. Student's t with 2 degrees of freedom: 4.303 and 1.061.
    assert rows == [
        [
            *("base", "25.0", "21.0", "82.00 ± 2.00", "-", "-"),
            *("11.0 ± 1.7", "50.0 ± 10.0", "-", "93.32", "3"),
        ],
        [
            *("+SP", "25.0", "21.0", "84.00 ± 2.65", "+2.00 [-0.48, +4.48]", "3.10"),
            *("61.0 ± 1.0", "70.0 ± 0.0", "0.0 of 30", "93.62 (+0.3)", "3"),
        ],
        [
            *("+SR", "20.0", "20.0", "83.00", "+3.00", "-"),
            *("64.5", "71.0", "4.0 of 30", "93.71 (+0.39)", "1"),
        ],
    ]
    assert rest[5:] == [
        "",
        "- +SR minus +SP: +2.00 points, 1 pair",
        "- +SP minus base by seed: +1.00 (0), +3.00 (1), +2.00 (2)",
        "",
        "One pair is too few to speak about 0.3 points.",
    ]


def test_the_columns_are_aligned(records):
    lines = [line for line in table.markdown(records).splitlines() if line.startswith("|")]
    places = {tuple(m.start() for m in re.finditer(r"\|", line)) for line in lines}
    assert len(places) == 1
    assert len(places.pop()) == len(table.HEADER) + 1


def test_experiments_stand_apart(records):
    other = [record("sp", 0, data="digits", config={"name": "digital"}, config_hash="f")]
    text = table.markdown(records + other)
    assert "CIFAR-10 (made-up)" in text
    assert "depgraph, vgg16-bn, digits (digital); dense 90.00%" in text
    assert len(sections.sections(records + other)) == 2
    assert [len(members) for _, members in sections.sections(records + other)] == [len(records), 1]


def test_the_dense_figure_is_a_mean_over_seeds_not_over_runs(records):
    # Seed 0 has three runs, seeds 1 and 2 two each.
    assert "dense 91.00%" in table.markdown(records)


def test_runs_without_a_dense_model_are_said_to_start_from_scratch(tmp_path):
    untrained = [record("sp", s, accuracy__dense=None) for s in range(2)]
    assert sections.rows(untrained) == sections.rows([record("sp", s) for s in range(2)])
    for one in untrained:
        save(tmp_path, one)
    title, *_ = table.markdown(kept.read([tmp_path])).splitlines()
    assert title == f"{TITLE}; from scratch, 10 steps"


def test_records_of_different_configurations_under_one_name_are_refused(records):
    records[0] = changed(records[0], config_hash="another")
    with pytest.raises(RunError, match=r"different configurations.*delete.*--out") as caught:
        table.markdown(records)
    assert "made-up" in str(caught.value)


def test_records_of_different_numbers_of_processes_are_not_mixed(records, tmp_path):
    records[:-1] = [changed(later, processes=1) for later in records[:-1]]
    assert len(sections.sections(records)) == 1  # a record that does not say so is of one process
    records[0] = changed(records[0], processes=2)
    titles = {title: len(members) for title, members in sections.sections(records)}
    assert titles == {f"{TITLE}, 2 processes": 1, TITLE: len(records) - 1}
    (path,) = kept.keep(records[1:], tmp_path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"different numbers of processes"):
        kept.keep(records[:1], tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("count", ["two", None, 1.5])
def test_a_number_of_processes_that_is_none_is_refused(tmp_path, count):
    save(tmp_path, content() | {"processes": count})
    with pytest.raises(RunError, match=r"is no record .*processes"):
        kept.read([tmp_path])


def test_two_records_of_one_run_are_refused(records):
    with pytest.raises(RunError, match=r"made-up.* has 2 records of sp, seed 1; give only one"):
        table.markdown([*records, record("sp", 1)])


OF_TWO_NETWORKS = [
    *(record("base", seed, start=f"network {seed}") for seed in range(2)),
    record("sp", 0, start="network 0"),
    record("sp", 1, start="network 1 of another machine"),
    record("random", 1),
]


@pytest.mark.parametrize("order", [1, -1])
def test_runs_of_a_seed_from_different_weights_are_no_pair(tmp_path, order):
    runs = OF_TWO_NETWORKS[::order]
    with pytest.raises(RunError, match=r"(base and sp|sp and base) of seed 1 .* different weights"):
        table.markdown(runs)
    # Earlier releases do not say where their runs started.
    silent = [changed(r, start=None) if r.variant == "sp" else r for r in runs]
    assert len(sections.sections(silent)) == 1
    (path,) = kept.keep([r for r in runs if r.variant != "sp"], tmp_path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"seed 1 started from different weights"):
        kept.keep([r for r in runs if r.variant == "sp"], tmp_path)
    assert path.read_bytes() == before
    # The whole pair, carried out anew, takes the old one's place.
    base = record("base", 1, start="network 1 of another machine")
    kept.keep([base, *(r for r in runs if r.variant == "sp")], tmp_path)
    assert len(kept.read([path])) == 5


# ---------------------------------------------------------------------- pairs


def runs(finals, **changes):
    return [
        record(variant, seed, accuracy__final=final, **changes)
        for variant, by_seed in finals.items()
        for seed, final in by_seed.items()
    ]


PAIRED = {
    "base": {0: 80.0, 1: 81.0, 2: 82.0},
    "sp": {0: 81.0, 1: 81.5, 2: 84.0},
    "sr": {0: 81.0, 2: 83.5, 9: 10.0},
    "random": {0: 81.5, 1: 82.0, 2: 83.0},
    "least-resistant": {0: 79.0},
}


def test_differences_are_paired_by_seed():
    rows = {row.variant: row for row in sections.rows(runs(PAIRED)[::-1])}
    assert list(rows) == [*PAIRED]
    assert rows["base"].difference is None
    assert rows["sr"].seeds == [0, 2, 9]
    assert rows["sr"].final.mean == pytest.approx((81 + 83.5 + 10) / 3)
    sr = rows["sr"].difference
    assert (sr.pairs, sr.mean) == (2, pytest.approx(1.25))  # seed 9 is no pair
    for variant in ("sp", "sr", "random"):
        shared = sorted(PAIRED[variant].keys() & PAIRED["base"].keys())
        one, other = ([PAIRED[v][s] for s in shared] for v in (variant, "base"))
        interval = stats.ttest_rel(one, other).confidence_interval(0.95)
        versus = rows[variant].difference
        assert (versus.low, versus.high) == pytest.approx((interval.low, interval.high))
    alone = Difference(1, 1, -1.0, None, None, None, None, [0], [-1.0])
    assert rows["least-resistant"].difference == alone
    json.dumps([asdict(row) for row in rows.values()], allow_nan=False)


SHARED = {"base": [80.0, 81.0, 82.0, 83.0], "sp": [80.5, 82.0, 82.0, 83.5]}


def sharing(networks, finals=SHARED):
    """Runs whose pair s starts from the dense network s modulo ``networks``."""
    return [
        record(
            v, s, accuracy__final=a, accuracy__dense=90.0 + s % networks, dense_seed=s % networks
        )
        for v, by_seed in finals.items()
        for s, a in enumerate(by_seed)
    ]


def test_pairs_that_share_a_dense_network_count_as_their_mean():
    members = sharing(2)
    versus = {row.variant: row for row in sections.rows(members)}["sp"].difference
    # +0.5 and 0 of network 0, +1 and +0.5 of network 1: means of 0.25 and 0.75.
    interval = stats.ttest_1samp([0.25, 0.75], 0).confidence_interval(0.95)
    assert (versus.pairs, versus.networks, versus.mean) == (4, 2, 0.5)
    assert (versus.low, versus.high) == pytest.approx((interval.low, interval.high))
    assert sections.dense(members) == [90.0, 91.0]
    text = table.markdown(members)
    assert text.startswith(f"{TITLE}; 2 dense networks at 90.50% after 40 steps, then 10 steps")
    assert cells(text)[3][-1] == "4"
    assert text.splitlines()[-1].startswith("4 pairs of 2 networks are too few to speak about")
    assert "by the spread of the networks: " in text.splitlines()[-1]


def test_several_pairs_of_one_network_have_a_mean_and_no_interval():
    members = sharing(1)
    versus = {row.variant: row for row in sections.rows(members)}["sp"].difference
    assert (versus.pairs, versus.networks, versus.mean, versus.low) == (4, 1, 0.5, None)
    text = table.markdown(members)
    assert "; 1 dense network at 90.00% after" in text
    assert cells(text)[3][4:6] == ["+0.50", "-"]
    assert text.splitlines()[-1] == (
        "4 pairs of 1 network are too few to speak about 0.3 points: what another network would "
        "do, they do not tell."
    )


@pytest.mark.parametrize("start", ["every seed its own", "from scratch", "an older record"])
def test_without_a_shared_network_every_pair_stands_for_itself(start):
    members = sharing(4)
    if start == "from scratch":
        members = [changed(one, dense_seed=None) for one in members]
    elif start == "an older record":
        members = [
            of({k: v for k, v in one.content().items() if k != "dense_seed"}) for one in members
        ]
    versus = {row.variant: row for row in sections.rows(members)}["sp"].difference
    interval = stats.ttest_rel(SHARED["sp"], SHARED["base"]).confidence_interval(0.95)
    assert (versus.pairs, versus.networks) == (4, 4)
    assert (versus.low, versus.high) == pytest.approx((interval.low, interval.high))


def test_sr_is_compared_with_its_controls_and_with_sp():
    contrasts = sections.contrasts(runs(PAIRED))
    assert [other for other, _ in contrasts] == ["random", "least-resistant", "sp"]
    assert [d.pairs for _, d in contrasts] == [2, 1, 2]
    assert [d.mean for _, d in contrasts] == pytest.approx([0.0, 2.0, -0.25])
    assert sections.contrasts(runs({"sr": {0: 1.0}, "sp": {1: 1.0}, "base": {0: 1.0}})) == []


def test_one_table_has_all_differences_beside_what_is_published():
    alone = [changed(r, framework="torch-prune") for r in runs({"base": {0: 80.0}})]
    ours = runs(PAIRED, structures__released=5)
    cells = [("ours", ours), ("shared", sharing(1)), ("other", alone)]
    shown = table.differences(sections.answers(cells))
    found = {row.variant: row.difference for row in sections.rows(runs(PAIRED))}
    paper = published.load().benchmark("depgraph", sparse=False)
    start, sp, sr = (paper.top1("depgraph", False, v) for v in ("base", "sp", "sr"))
    chance = dict(sections.contrasts(runs(PAIRED)))["random"]
    assert list(shown.header) == [
        *("experiment", "+SP minus base", "+SR minus base", "+SR minus random release", "pairs")
    ]
    assert shown.rows == [
        [
            "ours",
            f"{found['sp'].interval} ({sp - start:+.2g})",
            f"{found['sr'].interval} ({sr - start:+.2g}), 2 pairs",
            f"{chance.interval}, 2 pairs",
            "3 pairs",
        ],
        ["shared", f"+0.50 ({sp - start:+.2g})", "-", "-", "4 pairs of 1 network"],
    ]


def test_a_control_of_its_own_is_set_against_the_variants_of_another_section():
    control = sharing(2, {"base": [81.0, 82.0, 83.0, 85.0]})
    lines = table.across(control, sharing(2))
    finals = [r.accuracy.final for r in control]
    for line, (variant, others) in zip(lines, SHARED.items(), strict=True):
        apart = [one - other for one, other in zip(finals, others, strict=True)]
        # Pairs 0 and 2 start from network 0, 1 and 3 from network 1.
        means = [(apart[0] + apart[2]) / 2, (apart[1] + apart[3]) / 2]
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        shown = f"{sum(means) / 2:+.2f} [{low:+.2f}, {high:+.2f}] points, 4 pairs of 2 networks"
        assert line == f"base minus {sections.NAMES[variant]} of made-up: {shown}"
    elsewhere = [changed(r, start="one") for r in control]
    assert table.across(elsewhere, [changed(r, start="another") for r in sharing(2)]) == []
    assert table.across([record("base", 9)], sharing(2)) == []


def test_variants_without_a_base_are_set_against_that_of_another_rectifier():
    def of(name, variant, gain, **config):
        return [
            record(variant, s, config={"name": name, **config}, accuracy__final=80.0 + gain[s])
            for s in range(3)
        ]

    released = {"rectify": {"rate": 0.0}}
    mine = [*of("o", "sr", (2, 3, 5), **released), *of("o", "random", (1, 1, 1), **released)]
    others = [*of("whole", "base", (0, 0, 1)), *of("whole", "sr", (7, 7, 7))]
    low, high = stats.ttest_1samp([2, 3, 4], 0).confidence_interval(0.95)
    assert table.across(mine, others) == [
        f"+SR minus base of whole: +3.00 [{low:+.2f}, {high:+.2f}] points, 3 pairs",
        *table.across(mine[3:], others),
    ]
    longer = {"stages": {"prune": {"epochs": 9, "learning_rate": 0.1}}}
    assert table.across(mine, of("longer", "base", (0, 0, 0), **longer)) == []
    assert table.across(mine, mine) == table.across(others, mine) == []


def test_a_rectifier_that_released_nothing_says_so_in_place_of_a_difference():
    finals = {"base": {0: 80.0, 1: 81.0}, "sp": {0: 81.0, 1: 83.0}, "sr": {0: 81.0, 1: 83.0}}
    (sp,) = [row for row in sections.rows(runs(finals)) if row.variant == "sp"]
    (line,) = table.differences(sections.answers([("one", runs(finals))])).rows
    assert line[2:4] == ["released nothing", "-"]
    assert line[1].startswith(sp.difference.interval)
    one = runs(finals, structures__released=1)
    (line,) = table.differences(sections.answers([("one", one)])).rows
    assert line[2].startswith("+1.50 [")


def test_a_criterion_that_is_not_the_default_stands_behind_the_name():
    def named(name, **rectify):
        return [record(v, 0, config={"name": name, "rectify": rectify}) for v in ("base", "sp")]

    found = sections.sections([*named("one", criterion="exchange"), *named("two", rate=0.0)])
    assert sorted(sections.short_names(found)) == ["one (exchange)", "two"]


def test_controls_have_rows_and_lines_of_their_own():
    text = table.markdown(runs(PAIRED))
    rows = {row[0]: row for row in cells(text)[2:]}
    assert list(rows) == ["base", "+SP", "+SR", "random release", "least resistant"]
    assert [row[-1] for row in rows.values()] == ["3", "3", "2 of 3", "3", "1"]
    assert rows["random release"][-2] == rows["least resistant"][-2] == "-"
    assert rows["least resistant"][4:6] == ["-1.00", "-"]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- +SR minus random release: +0.00 [-6.35, +6.35] points, 2 pairs, 7.04 detectable",
        "- +SR minus least resistant: +2.00 points, 1 pair",
        "- +SR minus +SP: -0.25 [-3.43, +2.93] points, 2 pairs, 3.52 detectable",
        "- +SP minus base by seed: +1.00 (0), +0.50 (1), +2.00 (2)",
        "- +SR minus base by seed: +1.00 (0), +1.50 (2)",
        "- random release minus base by seed: +1.50 (0), +1.00 (1), +1.00 (2)",
    ]


def test_a_difference_of_nearly_nothing_has_no_minus():
    members = runs({"base": {0: 80.0}, "sp": {0: 79.999}})
    assert cells(table.markdown(members))[3][4] == "+0.00"


def test_without_base_there_are_no_pairs():
    text = table.markdown(runs({"sp": {0: 80.0, 1: 81.0}}))
    (row,) = cells(text)[2:]
    assert row[4:6] == ["-", "-"]
    assert row[-1] == "0 of 2"
    assert text.splitlines()[-1].startswith("| +SP")


def many(pairs, spread):
    """Differences of +SP to base of 0.5 points on average, with a known standard deviation."""
    deviations = [spread * math.sqrt((pairs - 1) / pairs) * (-1) ** seed for seed in range(pairs)]
    return runs(
        {
            "base": dict.fromkeys(range(pairs), 80.0),
            "sp": {seed: 80.5 + d for seed, d in enumerate(deviations)},
        }
    )


@pytest.mark.parametrize(
    ("pairs", "spread", "small"),
    [(2, 1.0, True), (24, 0.1, True), (26, 1.0, True), (26, 0.1, False), (90, 0.9, False)],
)
def test_a_section_says_when_it_is_too_small_for_the_effect_looked_for(pairs, spread, small):
    text = table.markdown(many(pairs, spread))
    last = text.splitlines()[-1]
    assert (f"{pairs} pairs are too few to speak about 0.3 points" in last) == small
    assert (f"{detectable(pairs, spread):.2f} points)" in last) == small
    assert ("too few" in text) == small


@pytest.mark.parametrize(
    ("changes", "header", "shown"),
    [
        (
            {"config": {"name": "s", "stages": {"sparse": STAGE, "prune": STAGE}}},
            "ResNet-56",
            "94.13 (+0.29)",
        ),
        ({"config": {"name": "s", "stages": {"prune": STAGE}}}, "ResNet-56", "93.71 (+0.39)"),
        ({"config": {"name": "s"}}, "ResNet-56", "93.71 (+0.39)"),
        ({"framework": "otov2"}, "VGG16-BN", "93.8 (+0.4)"),
        ({"framework": "gate-decorator"}, "VGG16", "91.74 (+0.24)"),
    ],
)
def test_published_accuracies_stand_beside_their_framework(changes, header, shown):
    top, _, row = cells(table.markdown([record("sr", 0, **changes)]))
    assert top[-2] == f"paper ({header}, CIFAR-10), %"
    assert row[-2] == shown


def test_a_framework_that_nothing_is_published_of_has_none():
    members = [record("sr", 0, framework="another")]
    top, _, row = cells(table.markdown(members))
    assert (top[-2], row[-2]) == ("paper", "-")
    assert sections.rows(members)[0].published is None


# ---------------------------------------------------------------------- reading


def test_records_are_found_below_folders_and_as_files(tmp_path):
    saved = [save(tmp_path / "a" / "b", record("sp", s)) for s in range(2)]
    apart = save(tmp_path / "elsewhere", record("base", 0))
    (tmp_path / "a" / "table.json").write_text("[]")
    (tmp_path / "a" / "model.pt").write_bytes(b"")
    read = kept.read([tmp_path / "a", apart])
    assert [(r.variant, r.seed) for r in read] == [("sp", 0), ("sp", 1), ("base", 0)]
    assert kept.files([tmp_path / "a", apart]) == [*saved, apart]


def lines(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_kept_records_are_read_line_by_line_beside_those_of_runs(tmp_path):
    many = lines(tmp_path / "kept.jsonl", *(json.dumps(content("sp", s)) for s in range(2)))
    own = save(tmp_path / "a", record("base", 0))
    assert kept.files([tmp_path]) == [own, many]
    assert kept.read([tmp_path]) == [record("base", 0), record("sp", 0), record("sp", 1)]
    assert kept.read([many]) == [record("sp", 0), record("sp", 1)]
    assert [path for path, _ in kept.located([tmp_path])] == [own, many, many]
    assert [one for _, one in kept.located([tmp_path])] == kept.read([tmp_path])


@pytest.mark.parametrize("text", ['{"version": 3, "acc', "", "[1]", "{}"])
def test_a_damaged_line_is_refused_by_file_and_number(tmp_path, text):
    good = json.dumps(content())
    path = lines(tmp_path / "kept.jsonl", good, text, good)
    with pytest.raises(RunError) as caught:
        kept.read([tmp_path])
    assert str(caught.value).startswith(f"{path}, line 2, is no record (")


def test_a_line_of_another_version_is_refused_by_file_and_number(tmp_path):
    path = lines(tmp_path / "k.jsonl", json.dumps(content()), json.dumps(content(version=2)))
    with pytest.raises(RunError) as caught:
        kept.read([path])
    assert (
        str(caught.value) == f"{path}, line 2, has version 2, this release reads {RECORD_VERSION}"
    )


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_file_of_kept_records_is_refused(tmp_path, content):
    (tmp_path / "k.jsonl").write_bytes(content)
    with pytest.raises(RunError, match="line 1, is no record"):
        kept.read([tmp_path])


def test_a_file_of_kept_records_that_is_no_text_or_not_there_is_refused(tmp_path):
    path = tmp_path / "k.jsonl"
    with pytest.raises(RunError, match=r"k\.jsonl is no record .*No such file"):
        kept.read([path])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"k\.jsonl is no record"):
        kept.read([path])


# ---------------------------------------------------------------------- keeping


OTHER = {"config": {"name": "other"}, "config_hash": "f"}


def test_records_are_kept_by_configuration_variant_and_seed(tmp_path):
    order = [(v, s) for v in ("base", "sp", "sr", "random", "least-resistant") for s in (0, 2, 10)]
    members = [record(v, s) for v, s in sorted(order)[::-1]] + [record("sp", 0, **OTHER)]
    paths = kept.keep(members, tmp_path / "kept")
    assert paths == [tmp_path / "kept" / "made-up.jsonl", tmp_path / "kept" / "other.jsonl"]
    assert [(r.variant, r.seed) for r in kept.read(paths[:1])] == order
    assert kept.read(paths[1:]) == members[-1:]
    text = paths[0].read_text(encoding="utf-8")
    assert text.count("\n") == len(order)
    assert " " not in text
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["made-up.jsonl", "other.jsonl"]


def test_keeping_adds_to_what_is_kept_and_replaces_the_same_run(tmp_path):
    kept.keep([record("sr", 0), record("base", 1, seconds=1.0)], tmp_path)
    (path,) = kept.keep([record("base", 1, seconds=2.0), record("base", 0)], tmp_path)
    there = [(r.variant, r.seed, r.seconds) for r in kept.read([path])]
    assert there == [("base", 0, 1.0), ("base", 1, 2.0), ("sr", 0, 1.0)]
    before = path.read_bytes()
    kept.keep(kept.read([path]), tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [{"config_hash": "another"}, {"data": "digits"}])
def test_keeping_refuses_to_mix_and_writes_nothing(tmp_path, change):
    (path,) = kept.keep([record("base", 0)], tmp_path)
    before = path.read_bytes()
    early = {"config": {"name": "early"}, "config_hash": "e"}  # would be written first
    with pytest.raises(RunError, match=r"made-up\.jsonl.*different.*delete.*another name"):
        kept.keep([record("sp", 0, **change), record("sp", 0, **early)], tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["made-up.jsonl"]


@pytest.mark.parametrize(
    "twin", [record("sp", 0), record("sp", 1, config_hash="another")], ids=["run", "configuration"]
)
def test_records_that_contradict_one_another_are_not_kept(tmp_path, twin):
    with pytest.raises(RunError, match="made-up"):
        kept.keep([record("sp", 0), twin], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_damaged_file_of_kept_records_is_left_as_it_is(tmp_path):
    path = lines(tmp_path / "made-up.jsonl", "half a reco")
    with pytest.raises(RunError, match="line 1, is no record"):
        kept.keep([record()], tmp_path)
    assert path.read_text() == "half a reco\n"


# ---------------------------------------------------------------------- damage


DAMAGED = {
    "nothing": b"",
    "half": b'{"version": 3, "acc',
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "no version": b"{}",
    "another program's": b'{"name": "record"}',
    "nothing but the version": json.dumps({"version": RECORD_VERSION}).encode(),
    "no seed": json.dumps({k: v for k, v in content().items() if k != "seed"}).encode(),
    "no final accuracy": json.dumps(content(accuracy={"dense": 90.0, "at_removal": 1.0})).encode(),
    "no step at which nothing was left": json.dumps(
        content(steps={k: v for k, v in content()["steps"].items() if k != "zero"})
    ).encode(),
    "no latency": json.dumps({k: v for k, v in content().items() if k != "latency"}).encode(),
    "releases without their number": json.dumps(content(releases=[[3, "g"]])).encode(),
    "accuracy of no number": json.dumps(
        content(accuracy={"dense": "high", "at_removal": None})
    ).encode(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_record_is_refused_by_name(tmp_path, capsys, damage):
    save(tmp_path, record("base", 0))
    path = tmp_path / "x" / "record.json"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[damage])
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {path} is no record")
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", [1, RECORD_VERSION + 1])
def test_a_record_of_another_version_is_refused(tmp_path, version):
    path = save(tmp_path, content(version=version))
    with pytest.raises(
        RunError, match=f"version {version}, this release reads {RECORD_VERSION}"
    ) as caught:
        kept.read([tmp_path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
@pytest.mark.parametrize("command", ["table", "plots"])
def test_where_no_runs_are_the_remedy_is_named(tmp_path, capsys, command, there):
    out = tmp_path / "runs"
    if there:
        out.mkdir()
    assert main([command, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: no records were found")
    assert "make demo" in printed.err
    assert printed.out == ""


def test_the_command_prints_the_table_and_last_the_path_of_its_figures(tmp_path, capsys, records):
    for one in records:
        save(tmp_path, one)
    assert main(["table", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(table.markdown(kept.read([tmp_path])) + "\n\n")
    assert printed.splitlines()[-1] == str(tmp_path / "table.json")
    (section,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert section["title"] == TITLE
    assert section["rows"] == [asdict(row) for row in sections.rows(records)]


def test_a_table_is_made_of_the_records_named(tmp_path, capsys):
    path = save(tmp_path, record("sp", 1))
    save(tmp_path, record("base", 0))
    assert main(["table", str(path), "--out", str(tmp_path / "out")]) == 0
    assert [row[0] for row in cells(capsys.readouterr().out)[2:]] == ["+SP"]
    assert (tmp_path / "out" / "table.json").exists()


def test_the_table_of_real_runs_shows_what_their_records_say(tiny_runs):
    text = table.markdown(kept.read([tiny_runs.out]))
    assert text.startswith("depgraph, vgg-digits, digits, 360 training images (tiny); dense ")
    rows = {row[0]: row for row in cells(text)[2:]}
    assert list(rows) == ["base", "+SP", "+SR"]
    for name, variant in (("base", "base"), ("+SP", "sp"), ("+SR", "sr")):
        one = tiny_runs.record(variant)
        macs = 100 * one["macs"]["pruned"] / one["macs"]["dense"]
        assert rows[name][1] == f"{macs:.1f}"
        assert rows[name][3] == f"{one['accuracy']['final']:.2f}"


def test_the_report_is_a_command_and_its_page_is_named(tmp_path, capsys):
    save(tmp_path, record("sp", 1))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_nothing_published_stands_beside_a_ranking_that_knows_nothing():
    def column(**config):
        shown = table.markdown([record("base", 0, framework="depgraph", config=config)])
        return [cell.strip() for cell in shown.split("\n")[4].split("|")][10]

    assert column(name="a", stages={"prune": STAGE}, options={"importance": "magnitude"}) != "-"
    assert column(name="a", stages={"prune": STAGE}, options={"importance": "random"}) == "-"
