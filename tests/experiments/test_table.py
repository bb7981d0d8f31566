"""Tables: means and spreads against known numbers, their Markdown, and what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest

from experiments import table
from experiments.__main__ import main
from experiments.run import RECORD_VERSION, RunError
from tests.support.records import record, save

FINAL = {"base": [80.0, 82.0, 84.0], "sp": [81.0, 85.0, 86.0], "sr": [83.0]}
REMOVAL = {"base": [10.0, 10.0, 13.0], "sp": [60.0, 61.0, 62.0], "sr": [64.5]}
REESTIMATED = {"base": [40.0, 50.0, 60.0], "sp": [70.0, 70.0, 70.0], "sr": [71.0]}
MACS = {"base": [250, 250, 250], "sp": [240, 250, 260], "sr": [200]}
DECAYED = {"base": [0, 0, 0], "sp": [30, 30, 30], "sr": [30]}
RELEASED = {"base": [0, 0, 0], "sp": [0, 0, 0], "sr": [4]}


@pytest.fixture
def records():
    made = []
    for variant, finals in FINAL.items():
        for seed, final in enumerate(finals):
            made.append(
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
    return made[::-1]  # in any order


def mean(values):
    return sum(values) / len(values)


def spread(values):
    """The standard deviation of a sample."""
    if len(values) == 1:
        return None
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def test_rows_are_means_and_sample_deviations_over_seeds(records):
    rows = table.rows(records)
    assert [row["variant"] for row in rows] == ["base", "sp", "sr"]
    for row in rows:
        variant = row["variant"]
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
        assert row.keys() == {"variant", "seeds", *expected}
        assert row["seeds"] == list(range(n))
        for name, values in expected.items():
            assert row[name]["mean"] == pytest.approx(mean(values)), name
            assert row[name]["spread"] == pytest.approx(spread(values)), name


def test_known_numbers():
    made = [record("sp", s, accuracy__final=f) for s, f in enumerate([2.0, 4.0, 4.0, 6.0])]
    (row,) = table.rows(made)
    assert row["final"] == {"mean": 4.0, "spread": pytest.approx(1.632993161855452)}


def test_one_seed_has_no_spread():
    (row,) = table.rows([record("sr", 5)])
    assert row["seeds"] == [5]
    assert row["final"] == {"mean": 85.0, "spread": None}
    assert "±" not in table.markdown([record("sr", 5)])


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_shows_title_variants_and_figures(records):
    text = table.markdown(records)
    title, blank, *rest = text.splitlines()
    assert title == "depgraph, vgg16-bn, CIFAR-10 (made-up); dense 91.00%"
    assert blank == ""
    header, rule, *rows = cells(text)
    assert header == [*table.HEADER]
    assert all(set(cell) == {"-"} for cell in rule)
    assert rows == [
        ["base", "11.0 ± 1.7", "50.0 ± 10.0", "82.00 ± 2.00", "25.0", "21.0", "-", "3"],
        ["+SP", "61.0 ± 1.0", "70.0 ± 0.0", "84.00 ± 2.65", "25.0", "21.0", "0.0 of 30", "3"],
        ["+SR", "64.5", "71.0", "83.00", "20.0", "20.0", "4.0 of 30", "1"],
    ]
    assert len(rest) == 5


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
    assert len(table.sections(records + other)) == 2
    assert [len(members) for _, members in table.sections(records + other)] == [len(records), 1]


def test_the_dense_figure_is_a_mean_over_seeds_not_over_runs(records):
    # Seed 0 has three runs, seeds 1 and 2 two each.
    assert "dense 91.00%" in table.markdown(records)


def test_runs_without_a_dense_model_are_said_to_start_from_scratch(tmp_path):
    made = [record("sp", s, accuracy__dense=None) for s in range(2)]
    assert table.rows(made) == table.rows([record("sp", s) for s in range(2)])
    for one in made:
        save(tmp_path, one)
    title, *_ = table.markdown(table.read([tmp_path])).splitlines()
    assert title == "depgraph, vgg16-bn, CIFAR-10 (made-up); from scratch"


def test_records_of_different_configurations_under_one_name_are_refused(records):
    records[0]["config_hash"] = "another"
    with pytest.raises(RunError, match=r"different configurations.*delete.*--out") as caught:
        table.markdown(records)
    assert "made-up" in str(caught.value)


# ---------------------------------------------------------------------- reading


def test_records_are_found_below_folders_and_as_files(tmp_path):
    made = [save(tmp_path / "a" / "b", record("sp", s)) for s in range(2)]
    apart = save(tmp_path / "elsewhere", record("base", 0))
    (tmp_path / "a" / "table.json").write_text("[]")
    (tmp_path / "a" / "model.pt").write_bytes(b"")
    found = table.read([tmp_path / "a", apart])
    assert [(r["variant"], r["seed"]) for r in found] == [("sp", 0), ("sp", 1), ("base", 0)]
    assert table.files([tmp_path / "a", apart]) == [*made, apart]


DAMAGED = {
    "nothing": b"",
    "half": b'{"version": 2, "acc',
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "no version": b"{}",
    "another program's": b'{"name": "record"}',
    "nothing but the version": json.dumps({"version": RECORD_VERSION}).encode(),
    "no seed": json.dumps({k: v for k, v in record().items() if k != "seed"}).encode(),
    "no final accuracy": json.dumps(record(accuracy={"dense": 90.0, "at_removal": 1.0})).encode(),
    "no step at which nothing was left": json.dumps(
        record(steps={k: v for k, v in record()["steps"].items() if k != "zero"})
    ).encode(),
    "accuracy of no number": json.dumps(
        record(accuracy={"dense": "high", "at_removal": None})
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
    path = save(tmp_path, record(version=version))
    with pytest.raises(
        RunError, match=f"version {version}, this release reads {RECORD_VERSION}"
    ) as caught:
        table.read([tmp_path])
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
    for made in records:
        save(tmp_path, made)
    assert main(["table", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(table.markdown(table.read([tmp_path])) + "\n\n")
    assert printed.splitlines()[-1] == str(tmp_path / "table.json")
    (section,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert section["title"] == "depgraph, vgg16-bn, CIFAR-10 (made-up)"
    assert section["rows"] == table.rows(records)


def test_a_table_is_made_of_the_records_named(tmp_path, capsys):
    path = save(tmp_path, record("sp", 1))
    save(tmp_path, record("base", 0))
    assert main(["table", str(path), "--out", str(tmp_path / "out")]) == 0
    assert [row[0] for row in cells(capsys.readouterr().out)[2:]] == ["+SP"]
    assert (tmp_path / "out" / "table.json").exists()


def test_the_table_of_real_runs_shows_what_their_records_say(tiny_runs):
    text = table.markdown(table.read([tiny_runs.out]))
    assert text.startswith("depgraph, vgg-digits, digits (tiny); dense ")
    rows = {row[0]: row for row in cells(text)[2:]}
    assert list(rows) == ["base", "+SP", "+SR"]
    for name, variant in (("base", "base"), ("+SP", "sp"), ("+SR", "sr")):
        made = tiny_runs.record(variant)
        macs = 100 * made["macs"]["pruned"] / made["macs"]["dense"]
        assert rows[name][3:5] == [f"{made['accuracy']['final']:.2f}", f"{macs:.1f}"]
