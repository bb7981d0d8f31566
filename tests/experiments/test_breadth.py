"""The table of networks of torchvision and timm: what is measured of one, how rows are kept."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from dpm_core.adapters.depgraph import DepGraph
from experiments.errors import RunError
from experiments.inputs.networks import NetworkError
from experiments.measuring import breadth, networks, prunable
from experiments.measuring.breadth import main
from experiments.measuring.breadth_page import markdown
from experiments.measuring.collecting import collect, in_process, read
from experiments.measuring.networks import Candidate
from experiments.measuring.prunable import awake, failure
from tests.support import rounding
from tests.support.frameworks import EXAMPLE, Mixed, Shuffled

WORKS = Candidate("mixed", 8, Mixed)
FAILS = Candidate("shuffled", 8, Shuffled)


@pytest.fixture(scope="module")
def row():
    return prunable.measure(WORKS)


def test_a_network_that_works_meets_its_target_with_equal_outputs(row):
    assert (row["outcome"], row["message"]) == ("works", "")
    sp, sr = row["variants"]["sp"], row["variants"]["sr"]
    assert sp["pruned"] == sp["decayed"] == sr["pruned"] == sr["decayed"] > 10
    assert sp["macs"] == sr["macs"] < row["macs"]
    assert (sp["released"], sr["released"] > 0) == (0, True)
    for figures in (sp, sr):
        assert figures["difference"] < rounding.EXACT
        assert figures["moved"] > 1e-3
    assert row["skipped"] == {}
    assert row["parameters"] == sum(p.numel() for p in Mixed().parameters())


def test_what_makes_a_network_hard_is_listed(row):
    expected = ["grouped", "depthwise", "concatenation", "flatten of several positions"]
    assert row["traits"] == [*expected, "shared modules"]


def test_a_network_that_upstream_cannot_follow_fails_with_layers_and_reason():
    row = prunable.measure(FAILS)
    assert row["outcome"] == "fails"
    assert row["traits"] == ["concatenation", "split"]
    assert "behind 'aside.0', 'stem'" in row["message"]
    assert "channel shuffle" in row["message"]


def test_a_difference_of_one_weight_is_seen(monkeypatch):
    whole = DepGraph.remove

    def remove(self):
        whole(self)
        with torch.no_grad():
            self.model.hidden.weight[0, 0] *= 1.01

    monkeypatch.setattr(DepGraph, "remove", remove)
    row = prunable.measure(WORKS)
    assert row["outcome"] == "fails"
    assert row["message"].startswith("sp: outputs differ by")


def test_outputs_that_do_not_depend_on_images_show_nothing(monkeypatch):
    class Deaf(Mixed):
        def forward(self, x):
            return super().forward(torch.ones_like(x))

    row = prunable.measure(Candidate("deaf", 8, Deaf))
    assert "the same for all images" in row["message"]


def test_figures_that_are_not_right_fail():
    good = {"pruned": 5, "decayed": 5, "macs": 9, "difference": 1e-14, "moved": 0.5}
    good["rounding"] = 1e-13
    assert failure({"sp": good, "sr": good}) == ""
    for changes, message in (
        ({"pruned": 4}, "4 of 5"),
        ({"pruned": 0, "decayed": 0}, "0 of 0"),
        ({"difference": 1e-4}, "differ by 1.0e-04"),
        ({"difference": float("nan")}, "differ by nan"),
        ({"difference": 1e-4, "rounding": 9e-5}, "differ by 1.0e-04"),
        ({"rounding": 0.1}, "rounding moves the outputs by 1.0e-01"),
        ({"moved": 0.0}, "shows nothing"),
        ({"macs": 8}, "unlike amounts"),
    ):
        assert message in failure({"sp": good, "sr": {**good, **changes}})


def test_no_parameter_of_a_network_that_is_awake_is_constant():
    class Asleep(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 5)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            x = self.norm(self.conv(x)) * self.scale
            return self.head(functional.relu(x).mean((2, 3)))

    model = awake(Asleep())
    assert all(p.unique().numel() > 1 for p in model.parameters())
    assert float(model.scale.detach().min()) >= 0.5
    assert prunable.outputs(model, EXAMPLE).std() > 0.01


# ---------------------------------------------------------------------- many networks


def made_up(name: str, **changes) -> dict:
    """A row as :func:`collect` keeps it."""
    figures = {"decayed": 7, "released": 0, "pruned": 7, "macs": 50, "difference": 2e-14}
    figures["rounding"] = 3e-13
    row = {
        "network": name,
        "parameters": 1_500_000,
        "size": 64,
        "traits": ["grouped"],
        "macs": 100,
        "variants": {v: {**figures, "moved": 1.0} for v in ("sp", "sr")},
        "skipped": {},
        "outcome": "works",
        "message": "",
        "seconds": 3.2,
        "versions": {"torch": "2"},
        "revision": None,
        "device": "none",
        "threads": 1,
    }
    row["variants"]["sr"]["released"] = 2
    return {**copy.deepcopy(row), **changes}


def test_rows_are_kept_as_they_come_the_small_first_and_the_rest_goes_on(tmp_path):
    path, names = tmp_path / "models.jsonl", ["vgg11", "squeezenet1_1", "resnet18"]
    asked = []

    def run(name):
        asked.append(name)
        if name == "resnet18":
            raise KeyboardInterrupt
        return made_up(name)

    with pytest.raises(KeyboardInterrupt):
        collect(names, path, 50e6, run)
    assert asked == ["squeezenet1_1", "resnet18"]
    assert [r["network"] for r in read(path)] == ["squeezenet1_1"]

    rows = collect(names, path, 50e6, made_up)
    assert [r["network"] for r in rows] == ["resnet18", "squeezenet1_1", "vgg11"]
    assert rows[2]["outcome"] == "not run"
    assert rows[2]["message"] == "more than 50 M parameters"
    assert rows == read(path)

    # What was not run is tried again; what works is not.
    again = []
    collect(names, path, 1e9, lambda name: again.append(name) or made_up(name))
    assert again == ["vgg11"]


def test_a_row_that_is_measured_anew_stays_until_the_new_one_is_there(tmp_path):
    path, names = tmp_path / "models.jsonl", ["squeezenet1_1", "resnet18"]
    collect(names, path, 1e9, made_up)
    kept = read(path)

    def stop(name):
        raise KeyboardInterrupt

    for run, asked, error in ((stop, names, KeyboardInterrupt), (made_up, ["no"], RunError)):
        with pytest.raises(error):
            collect(asked, path, 1e9, run, anew=True)
        assert read(path) == kept
    again = []
    collect(names, path, 1e9, lambda name: again.append(name) or made_up(name), anew=True)
    assert again == names


class Ends(str):
    """A name that ends the process in which a network is looked for by it."""

    def startswith(self, *of):
        if multiprocessing.parent_process() is not None:
            os._exit(7)
        return False


def test_a_process_that_takes_too_long_or_ends_is_reported_as_that():
    row = in_process("squeezenet1_1", 0.01)
    assert (row["outcome"], row["message"]) == ("not run", "not done within 0.01 seconds")
    row = in_process(Ends("squeezenet1_1"), 300)
    assert row["outcome"] == "fails"
    assert "exit code 7" in row["message"]


class Lasts(str):
    """A name whose network never comes."""

    def startswith(self, *of):
        if multiprocessing.parent_process() is not None:
            os.write(1, b"asked\n")
            time.sleep(3600)
        return False


def test_no_process_is_left_behind_whatever_ends_the_one_that_waits():
    waits = (
        "from experiments.measuring.collecting import in_process\n"
        "from tests.experiments.test_breadth import Lasts\n"
        "in_process(Lasts('squeezenet1_1'), 3600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "asked\n"
    process.kill()
    # The others hold the same pipe: it ends with the last of them.
    assert process.communicate(timeout=120) == ("", None)


@pytest.mark.slow
def test_a_network_of_torchvision_is_measured_in_a_process():
    row = in_process("squeezenet1_1", 300)
    assert (row["outcome"], row["traits"]) == ("works", ["concatenation"])


def test_all_networks_are_torchvisions_and_timms_and_others_are_refused():
    names = networks.networks()
    assert len([n for n in names if not n.startswith("timm:")]) >= 80
    assert {"resnet18", "vit_b_16", "swin_t", "googlenet"} <= set(names)
    assert networks.size_of("resnet18") == 11_689_512
    with pytest.raises(RunError, match="no classification network 'fcn_resnet50'"):
        networks.network("fcn_resnet50")


def test_of_timm_the_smallest_network_of_every_family_is_listed():
    timm = pytest.importorskip("timm")
    names = [n.removeprefix("timm:") for n in networks.networks() if n.startswith("timm:")]
    families = [f for f in timm.list_modules() if timm.list_models(module=f)]
    listed = [[n for n in names if n in timm.list_models(module=f)] for f in families]
    assert [f for f, of in zip(families, listed, strict=True) if len(of) != 1] == []
    assert len(names) == len(families) >= 60
    with pytest.raises(NetworkError, match="timm has no network 'resnet0'"):
        networks.network("timm:resnet0")


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm:test_vit", 64), ("timm:vit_tiny_patch14_dinov2", 56), ("timm:resnet10t", 64)],
)
def test_a_network_of_timm_is_built_for_small_images(name, size):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name.removeprefix("timm:")):
        pytest.skip("not in this version")
    found = networks.network(name)
    assert found.size == size
    assert found.build()(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_without_timm_its_networks_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkError, match=r"timm cannot be imported .*; install it"):
        networks.network("timm:resnet18")


# ---------------------------------------------------------------------- the page


def cells(text: str, name: str) -> list[str]:
    (line,) = (ln for ln in text.splitlines() if ln.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_works_what_fails_and_why():
    failing = made_up("bad")
    failing["variants"]["sr"]["difference"] = 0.25
    unlike = made_up("unlike", outcome="fails", message=prunable.UNLIKE)
    unlike["variants"]["sr"]["macs"] = 51
    failing |= {"outcome": "fails", "message": "sr: outputs differ"}
    untraced = made_up("lost", outcome="fails", message="at 'stem':\ntoo odd", variants={})
    large = {"network": "huge", "parameters": 9e8, "seconds": 0.0, "outcome": "not run"}
    large |= {k: made_up("huge")[k] for k in ("versions", "revision", "device", "threads")}
    large["message"] = "more than 1 M parameters"
    left = made_up("vit", skipped={"embed": "'norm' is a LayerNorm", "other": "the same"})
    text = markdown([failing, made_up("good"), large, untraced, left, unlike], ["late", "later"])
    assert "2 of 6 networks work, 3 fail, 1 were not run, 2 more are" in text
    assert cells(text, "unlike")[6:8] == ["no", "no"]
    assert "late, later" in text.splitlines()
    good = "good grouped 1.5 64 7 50.0 yes yes 2 2e-14 3e-13 3 0"
    assert cells(text, "good") == good.split()
    assert cells(text, "bad")[6:10] == ["yes", "no", "2", "2e-01"]
    assert cells(text, "lost")[6:8] == ["no", "no"]
    assert cells(text, "huge")[6:8] == ["not run", "not run"]
    assert cells(text, "vit")[-1] == "2"
    assert "0 of 0 networks work, 0 fail, 0 were not run." in text
    for line in (
        "- bad: sr: outputs differ",
        "- lost: at 'stem': too odd",
        "- huge: more than 1 M parameters",
        "- vit (2): 'norm' is a LayerNorm",
    ):
        assert line in text.splitlines()


def test_timms_networks_have_a_table_of_their_own():
    rows = [
        made_up("resnet18"),
        made_up("timm:resnet10t"),
        made_up("timm:vit", skipped={"a": "why"}),
    ]
    first, second = markdown(rows, ["vgg11", "timm:swin"]).split("## The smallest network of every")
    assert "1 of 1 networks work, 0 fail, 0 were not run, 1 more are" in first
    assert cells(first, "resnet18")[6] == "yes"
    assert "vgg11" in first.splitlines()
    assert "2 of 2 networks work, 0 fail, 0 were not run, 1 more are" in second
    assert cells(second, "resnet10t")[6] == "yes"
    assert "swin" in second.splitlines()
    assert "- vit (1): why" in second.splitlines()


@pytest.mark.parametrize("asked", [["--networks", "resnet18"], ["--render"]])
def test_the_command_writes_the_table_from_what_is_there(tmp_path, capsys, asked):
    records, out = tmp_path / "models.jsonl", tmp_path / "models.md"
    records.write_text(json.dumps(made_up("resnet18")) + "\n")
    arguments = [*asked, "--records", str(records), "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert cells(out.read_text(), "resnet18")[6] == "yes"
    assert "vgg11" in out.read_text()  # is still to be measured
    records.write_text('{"network": "resnet18"}\n')
    assert main(arguments) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_kept_table_is_that_of_the_kept_records():
    rows = read(breadth.RECORDS)
    names = [row["network"] for row in rows]
    assert names == sorted(set(names) & set(networks.networks()))
    missing = [name for name in networks.networks() if name not in names]
    assert breadth.TABLE.read_text(encoding="utf-8") == markdown(rows, missing)


def test_a_network_that_takes_no_images_gets_a_row_and_one_with_few_positions_its_smallest_size():
    row = in_process("no such network", 300)
    assert row["outcome"] == "fails"
    assert row["message"] == "torchvision has no classification network 'no such network'"
    pytest.importorskip("timm")
    assert networks.network("timm:pit_ti_224").size == 64
