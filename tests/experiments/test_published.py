"""Published figures: that they are the source's, their counterparts, and what is refused."""

from __future__ import annotations

import pytest

from experiments.errors import RunError
from experiments.showing import published

FIGURES = published.load()
# As printed: method, FLOPs, parameters, top-1.
SOURCE = {
    "OTOv2": """
        Baseline 100 100 93.2
        EC 65.8 37.0 93.1
        Hinge 60.9 20.0 93.6
        SCP 33.8 7.0 93.8
        OTOv2 26.5 4.8 93.4
        +SP 26.4 4.8 93.6
        +SR 25.8 4.8 93.8
    """,
    "DepGraph": """
        Baseline 100 100 93.53
        Hinge 50.0 48.73 93.69
        SCP 51.5 48.47 93.23
        ResRep 47.2 - 93.71
        SANP 48.0 - 93.81
        APIB 46.0 50.0 93.92
        SFP 47.4 - 93.66
        ASFP 47.4 - 93.32
        DepGraph 46.86 52.9 93.84
        +SP 46.32 49.69 93.96
        +SR 45.80 47.22 94.13
        without-sparse-learning 47.2 69.7 93.32
        +SP 46.7 68.1 93.62
        +SR 47.1 65.73 93.71
    """,
    "Gate-Decorator": """
        Gate-Decorator 9.86 1.98 91.50
        +SP 9.88 1.97 91.58
        +SR 9.79 1.95 91.74
    """,
}


def test_all_rows_of_all_three_tables_are_there():
    assert [b.name for b in FIGURES.benchmarks] == [*SOURCE]
    assert {b.data for b in FIGURES.benchmarks} == {"CIFAR-10"}
    assert [b.network for b in FIGURES.benchmarks] == ["VGG16-BN", "ResNet-56", "VGG16"]
    for benchmark in FIGURES.benchmarks:
        expected = [line.split() for line in SOURCE[benchmark.name].strip().splitlines()]
        assert len(benchmark.rows) == len(expected)
        for row, (method, flops, params, top1) in zip(benchmark.rows, expected, strict=True):
            assert row.method.replace(" ", "-").endswith(method)
            assert (row.flops, row.top1) == (float(flops), float(top1))
            assert row.params == (None if params == "-" else float(params))


def test_its_source_is_named_and_every_reference_is_cited():
    assert "2406.03879" in FIGURES.source
    assert "no spread" in FIGURES.note
    rows = [row for benchmark in FIGURES.benchmarks for row in benchmark.rows]
    cited = {str(row.reference) for row in rows if row.reference is not None}
    assert cited == FIGURES.references.keys() == {str(n) for n in range(1, 12)}


@pytest.mark.parametrize(
    ("framework", "sparse", "variant", "network", "top1"),
    [
        ("otov2", False, "base", "VGG16-BN", 93.4),
        ("otov2", False, "sp", "VGG16-BN", 93.6),
        ("otov2", False, "sr", "VGG16-BN", 93.8),
        ("depgraph", True, "base", "ResNet-56", 93.84),
        ("depgraph", True, "sp", "ResNet-56", 93.96),
        ("depgraph", True, "sr", "ResNet-56", 94.13),
        ("depgraph", False, "base", "ResNet-56", 93.32),
        ("depgraph", False, "sp", "ResNet-56", 93.62),
        ("depgraph", False, "sr", "ResNet-56", 93.71),
        ("gate-decorator", False, "base", "VGG16", 91.5),
        ("gate-decorator", False, "sp", "VGG16", 91.58),
        ("gate-decorator", False, "sr", "VGG16", 91.74),
    ],
)
def test_a_variant_finds_its_counterpart(framework, sparse, variant, network, top1):
    benchmark = FIGURES.benchmark(framework, sparse)
    assert benchmark.network == network
    assert benchmark.top1(framework, sparse, variant) == top1


def test_what_is_not_published_has_no_counterpart():
    assert FIGURES.benchmark("another", False) is None
    assert FIGURES.benchmark("otov2", True) is None
    for control in ("random", "least-resistant"):
        assert FIGURES.benchmarks[0].top1("otov2", False, control) is None


# ---------------------------------------------------------------------- what is refused

ROW = '{ method = "A", reference = 1, flops = 50.0, params = 40, top1 = 93.5 }'
GOOD = f"""
source = "somewhere"
note = "once"
[references]
1 = "someone"
[[benchmarks]]
name = "B"
network = "N"
data = "D"
rows = [{ROW}]
"""
TWIN = (
    '{ method = "A", flops = 50.0, top1 = 93.5, counterpart = { framework = "f", variant = "sp" } }'
)


def test_a_smallest_file_is_read(tmp_path):
    path = tmp_path / "published.toml"
    path.write_text(GOOD)
    (benchmark,) = published.load(path).benchmarks
    assert benchmark.rows[0].params == 40.0
    assert benchmark.rows[0].counterpart is None


WRONG = {
    "an unknown key": (ROW.replace("flops", "macs"), "benchmarks.0.rows.0.flops"),
    "no accuracy": (ROW.replace(", top1 = 93.5", ""), "benchmarks.0.rows.0.top1: Field required"),
    "text for a number": (ROW.replace("93.5", '"93.5%"'), "benchmarks.0.rows.0.top1"),
    "more than all": (ROW.replace("93.5", "100.1"), "less than or equal to 100"),
    "nothing left": (ROW.replace("50.0", "0"), "greater than 0"),
    "no number": (ROW.replace("93.5", "nan"), "benchmarks.0.rows.0.top1"),
    "no such reference": (ROW.replace("reference = 1", "reference = 2"), "A cites 2"),
    "no such variant": (TWIN.replace('"sp"', '"random"'), "counterpart.variant"),
    "two counterparts": (f"{TWIN}, {TWIN}", "2 rows are the counterpart of"),
    "no rows": ("", "benchmarks.0.rows"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_figures_are_refused_by_their_place(tmp_path, wrong):
    row, message = WRONG[wrong]
    path = tmp_path / "published.toml"
    path.write_text(GOOD.replace(ROW, row))
    with pytest.raises(RunError) as caught:
        published.load(path)
    assert str(caught.value).startswith(f"{path} has wrong figures: ")
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"cannot read .*No such file"):
        published.load(tmp_path / "nothing.toml")
    path = tmp_path / "published.toml"
    path.write_bytes(b"source = ")
    with pytest.raises(RunError, match="is not TOML"):
        published.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="is not TOML"):
        published.load(path)
