"""Runs of two processes: against one process, against one another, stopped, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_core import DisagreementError
from dpm_core.adapters import torch_prune
from dpm_core.adapters.base import AdapterError
from experiments.config import ConfigError
from experiments.errors import RunError
from experiments.inputs import data, folders, models
from experiments.inputs.images import DataError
from experiments.running import run as run_module
from experiments.running.ranks import Averaging, Ranks
from experiments.running.rebuild import load_model
from experiments.running.run import run
from experiments.running.training import Stopped
from tests.support import forked, rounding, tiny
from tests.support.frameworks import CASES, small_resnet
from tests.support.ranks import COUNT, two
from tests.support.ranks import Ranks as Pair
from tests.support.rounding import in_double
from tests.support.snapshot import assert_says, difference, says
from tests.support.tiny import GONE, MINIATURE

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE = {"epochs": 4, "batch": 40, "learning_rate": 0.05, "milestones": [2]}
PLAIN = {
    **MINIATURE,
    "model": "plain",
    "stages": {"prune": {**STAGE, "mixup": 0.3}},
}
HEARING = {"criterion": "hearing", "threshold": -1.0, "batches": 2, "max_share": 0.3}
GATES = {
    "macs": 0.6,
    "fraction": 0.4,
    "low_rate": 0.005,
    "tock_epochs": 1,
    "ticks": 2,
    "finetune_epochs": 2,
}
DHSPG = {
    "target_group_sparsity": 0.5,
    "tolerance_group_sparsity": 0.0,
    "start_epoch": 1,
    "epsilon": 0.95,
    "lmbda": 4.0,
}
FRAMEWORKS = {
    "depgraph": MINIATURE,
    "torch-prune": {"options": {"amount": 0.5}, "stages": {"prune": STAGE}},
    "gate-decorator": {
        "options": GATES,
        "rectify.max_share": 0.5,
        "stages": {"prune": {**STAGE, "epochs": 24}},
    },
    "otov2": {
        "options": DHSPG,
        "dense": GONE,
        "stages": {"prune": {**STAGE, "epochs": 8, "milestones": [5], "momentum": 0.0}},
    },
}


def of(framework: str) -> dict[str, Any]:
    """The miniature run of a framework."""
    own = dict(FRAMEWORKS[framework])
    common = {k: v for k, v in MINIATURE.items() if k != "options.steps" or "options" not in own}
    return {**common, "framework": framework, **own}


class Plain(nn.Module):
    """No BatchNorm, so that a sample's loss does not depend on the rest of the batch."""

    rows: ClassVar[set[int]] = set()
    """Images that training steps and hearings have seen at a time."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            Plain.rows.add(len(x))
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with two() as started:
        yield started


def carry_out(
    rank: int,
    out: Path,
    variant: str,
    changes: str | dict[str, Any],
    count: int = COUNT,
    stop: tuple[int, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A miniature run; returns what one process has at its end.

    Args:
        changes: to the tiny configuration, or a framework's name.
        stop: (rank, step): which of the processes is asked to stop after which of its steps.
    """
    Plain.rows.clear()
    changes = of(changes) if isinstance(changes, str) else changes
    loops: list[Any] = []
    build = run_module._framework_loop

    def built(*args: Any) -> Any:
        loops.append(build(*args))
        return loops[-1]

    with pytest.MonkeyPatch.context() as patch, tiny.one_thread():
        tiny.miniature(patch)
        # In double precision: what is decided, and when, must not depend on rounding.
        patch.setitem(models.MODELS, "plain", lambda *sizes: in_double(Plain(*sizes)))
        patch.setattr(run_module, "_framework_loop", built)
        wanted = tiny.request(out, variant, changes, ranks=Ranks(rank, count), **settings)
        asked = tiny.asked_when(lambda step: (rank, step) == stop) if stop else nullcontext()
        with asked:
            record = run(wanted)
    (loop, adapter), progress = loops[0], loops[0][0].progress
    return {
        "record": record,
        "model": {name: p.detach() for name, p in loop.model.named_parameters()},
        "decisions": [
            (e["step"], e["kind"], e["group"], e["structures"], e["wave"]) for e in progress.events
        ],
        "removed": list(adapter.removed),
        "rows": set(Plain.rows),
        "steps": (progress.total, progress.decided_at, progress.removed_at, progress.heard),
    }


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(result["record"].read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- two against one


@pytest.mark.parametrize("criterion", ["trajectory", "hearing"])
def test_two_processes_and_one_decide_release_and_end_alike(pair, tmp_path, criterion):
    changes = PLAIN | ({"rectify": HEARING} if criterion == "hearing" else {})
    alone = carry_out(0, tmp_path / "one", "sr", changes, 1)
    left, right = pair.results(carry_out, tmp_path / "two", "sr", changes)
    assert {kind for _, kind, *_ in alone["decisions"]} == {"decay", "release", "prune"}
    for key in ("decisions", "removed", "steps"):
        assert left[key] == right[key] == alone[key], key
    # The removal is tried on two rows of the example, in training mode, too.
    assert [result["rows"] - {2} for result in (alone, left, right)] == [{40}, {20}, {20}]
    assert (alone["steps"][-1] > 0) == (criterion == "hearing")
    for name, p in alone["model"].items():
        rounding.assert_exact(left["model"][name], p, name)
    assert figures(alone)["processes"] == 1
    assert figures(left)["processes"] == 2
    for key in ("structures", "channels", "macs", "parameters", "releases"):
        assert figures(left)[key] == figures(alone)[key], key


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("variant", ["base", "sr"])
def test_every_framework_trains_one_model_in_two_processes(
    pair, tmp_path, miniature, framework, variant
):
    left, right = pair.results(carry_out, tmp_path, variant, framework)
    # Not one bit of difference: gradients were averaged in every step, frozen layers or not.
    assert difference(left["model"], right["model"]) is None
    for key in ("decisions", "removed", "steps"):
        assert left[key] == right[key], key
    assert left["removed"]
    assert figures(left)["structures"]["pruned"] > 0
    assert (figures(left)["structures"]["released"] > 0) == (variant == "sr")
    small, example = load_model(left["record"].parent / "model.safetensors")
    assert small(example).shape == (4, 10)
    assert len(list(tmp_path.rglob("record.json"))) == 1
    assert not list(tmp_path.rglob("checkpoint.pt"))


# ---------------------------------------------------------------------- stopped, refused


def test_all_stop_when_one_is_asked_and_go_on_in_the_same_bits(pair, tmp_path):
    changes = {**MINIATURE, "rectify": HEARING}
    whole, _ = pair.results(carry_out, tmp_path / "whole", "sr", changes)
    for error in pair.run(carry_out, tmp_path / "parts", "sr", changes, COUNT, (1, 2)):
        assert type(error) is Stopped
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1
    parts, _ = pair.results(resume, tmp_path / "parts", changes)
    tiny.assert_same_bits(parts["record"], whole["record"])


def resume(rank: int, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    for stop in ((0, 13), (1, 5)):  # among decays, and after the removal
        with pytest.raises(Stopped):
            carry_out(rank, out, "sr", changes, stop=stop, resume=True)
    return carry_out(rank, out, "sr", changes, resume=True)


def test_runs_of_one_and_of_two_processes_lie_side_by_side(pair, tmp_path):
    alone = carry_out(0, tmp_path, "base", MINIATURE, 1)
    before = alone["record"].read_bytes()
    both, _ = pair.results(carry_out, tmp_path, "base", MINIATURE)
    assert alone["record"].read_bytes() == before
    assert both["record"].parts[-3:] == ("digits-2processes", "base-seed0", "record.json")
    assert [figures(run)["processes"] for run in (alone, both)] == [1, 2]


def test_a_checkpoint_of_another_number_of_processes_is_refused(pair, tmp_path):
    for error in pair.run(carry_out, tmp_path, "sp", MINIATURE, COUNT, (0, 6)):
        assert type(error) is Stopped
    (saved,) = tmp_path.rglob("checkpoint.pt")
    checkpoint = Path(str(saved).replace("-2processes", ""))
    checkpoint.parent.mkdir(parents=True)
    saved.rename(checkpoint)
    with pytest.raises(RunError, match=r"'processes': 2.*here.*'processes': 1.*delete it"):
        carry_out(0, tmp_path, "sp", MINIATURE, 1, resume=True)
    assert checkpoint.exists()


def test_batches_that_do_not_split_are_refused_before_any_work(tmp_path, miniature):
    changes = {**MINIATURE, "stages": {"prune": {**STAGE, "batch": 41}}}
    with says(ConfigError, "'prune'", "batches of 41", "2 processes", "multiple"):
        run(tiny.request(tmp_path, "base", changes, ranks=Ranks(0, 2)))
    with says(ConfigError, "'dense'", "batches of 40", "3 processes"):
        run(tiny.request(tmp_path, "base", MINIATURE, ranks=Ranks(1, 3)))
    assert not list(tmp_path.iterdir())


def remove_something_else(rank: int, out: Path) -> str:
    """Rank 1 alone removes something else, in ``base``, where no core is at work."""
    masked = torch_prune.masked
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch_prune, "masked", lambda g, *a: g.size - 1 - masked(g, *a).flip(0))
        try:
            carry_out(rank, out, "base", "torch-prune")
        except DisagreementError as error:
            return str(error)
    return "no error"


def test_a_process_that_would_remove_something_else_stops_all(pair, tmp_path):
    said = pair.results(remove_something_else, tmp_path)
    assert said[0] == said[1]
    assert "Rank 1 differs from rank 0 in what is removed: structure" in said[0]
    assert not list(tmp_path.rglob("record.json"))


# ---------------------------------------------------------------------- parts


def decoded(rank: int, root: Path, images: Path, fails: bool) -> tuple[int, Any]:
    """How many files a process decoded, and its images then, or its error."""
    ranks, files, decode = Ranks(rank, COUNT), [], folders._decode

    def counted(file: Path, size: int) -> np.ndarray:
        files.append(file)
        time.sleep(0.1)  # the others would come by in this time
        return decode(file, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "_decode", counted)
        try:
            with ranks.first_alone():
                return len(files), data.load(
                    f"folder:{images}{'x' * fails}", root, size=8
                ).train.clone()
        except DataError as error:
            return len(files), str(error)
        finally:
            assert bool(files) == (rank == 0 and not fails)


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_decoded_by_one_process_and_read_by_the_others(pair, tmp_path, fails):
    from PIL import Image

    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "pets" / split / kind
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(kind) * 20, 9, 90)).save(folder / "one.png")
    (_, left), (_, right) = pair.results(decoded, tmp_path / "root", tmp_path / "pets", fails)
    if fails:
        assert left == right
        assert "needs the folders train and test" in left
    else:
        assert torch.equal(left, right)
        assert len(list((tmp_path / "root" / "decoded").iterdir())) == 1


def thawed(rank: int) -> list[dict[str, Tensor]]:
    """Gradients of steps in which layers are frozen, thawed and replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    forward, gradients = Averaging(model), []
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()
    for frozen in (True, False, False, True, None):
        if frozen is None:
            model[1] = nn.Linear(6, 3).double()
        model[0].requires_grad_(frozen is False)
        model.zero_grad()
        forward(x.chunk(COUNT)[rank]).square().mean().backward()
        mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        model(x).square().mean().backward()  # of the whole batch, by no wrapper
        for name, p in model.named_parameters():
            if p.requires_grad:
                rounding.assert_exact(mine.pop(name), p.grad, name)
        assert not mine
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return gradients


def test_gradients_are_averaged_whatever_is_frozen_or_new(pair):
    left, right = pair.results(thawed)
    assert [len(step) for step in left] == [2, 4, 4, 2, 2]
    assert difference(left, right) is None


def test_one_process_has_it_all_and_waits_for_nobody():
    ranks, model, batch = Ranks(), nn.Linear(2, 2), torch.randn(4, 2)
    assert ranks.averaging(model) is model
    assert torch.equal(ranks.share(batch), batch)
    assert (ranks.any(True), ranks.any(False), ranks.as_first(True)) == (True, False, True)
    assert (ranks.first, ranks.hidden) == (True, None)
    with ranks.first_alone():
        ranks.wait()


@pytest.mark.parametrize("command", ["compare", "table"])
def test_other_commands_are_for_one_process(tmp_path, command, monkeypatch, capsys):
    from experiments.__main__ import main

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, who in (("0", "error"), ("1", "error on rank 1")):
        monkeypatch.setenv("RANK", rank)
        assert main([command, str(tiny.PATH), "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said == f"{who}: {command} is for one process; only run takes several\n"


def refused(rank: int) -> list[str]:
    """Adapters' messages about a model that is wrapped, or sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    case, said = next(case for case in CASES if case.name == "depgraph"), []
    sharded = small_resnet()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (COUNT,)))
    for model in (DistributedDataParallel(small_resnet()), sharded):
        with pytest.raises(AdapterError) as caught:
            case.adapter(model, "base")
        said.append(str(caught.value))
    return said


def test_adapters_refuse_what_is_wrapped_or_sharded(pair):
    for wrapped, sharded in pair.results(refused):
        assert_says(ValueError(wrapped), "DistributedDataParallel", ".module", "wrap it anew")
        assert_says(ValueError(sharded), "'stem.weight'", "FSDP", "prune before")


# ---------------------------------------------------------------------- torchrun


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [forked.python(), "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "experiments", "run", str(tiny.PATH)]
    command += ["--variant", "sr", "--seed", "0", "--out", str(out), "--device", "cpu", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT
    )


@pytest.mark.slow
def test_processes_of_torchrun_stop_when_terminated_and_go_on(tmp_path):
    folder = tmp_path / "tiny" / "digits-2processes" / "sr-seed0"
    process = start(tmp_path, "--save-every", "0")
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert printed == ""
    assert errors.count("stopped; the same command with --resume goes on") == 1
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "record.json").exists()

    last = start(tmp_path, "--resume")
    printed, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert printed.strip() == str(folder / "record.json")
    assert json.loads((folder / "record.json").read_text())["processes"] == 2
