"""Pruned models on disk: what comes back, what is refused, and what a killed process leaves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_core.adapters import saved
from dpm_core.adapters.depgraph import DepGraph, DepGraphOptions
from dpm_core.adapters.removal import Removal
from dpm_core.adapters.saved import (
    DamagedError,
    MismatchError,
    SavedModelError,
    VersionError,
    load_pruned,
    read,
    save_pruned,
)
from experiments.inputs.models import build
from tests.support import forked
from tests.support.damage import each_bit_flipped

EXAMPLE = torch.zeros(2, 3, 8, 8)
REMOVALS = {
    "vgg-digits": Removal([("features.0", [1, 5, 6]), ("features.7", range(0, 64, 3))]),
    "resnet20": Removal(
        [("conv1", [0, 3]), ("layer2.0.conv1", [7]), ("layer3.0.conv2", [1, 2, 60])]
    ),
}
ROOT = Path(__file__).parents[2]


def dense(name: str, seed: int = 0) -> nn.Module:
    """A network whose buffers are no longer those of a new one."""
    model = build(name, 3, 10, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8, generator=draw))
    return model


def pruned(name: str, seed: int = 0) -> nn.Module:
    model = dense(name, seed)
    REMOVALS[name].apply(model, EXAMPLE, cut=True)
    return model


class Small(nn.Module):
    """Few bytes, and one of each: convolution, BatchNorm, a buffer, a frozen and a half tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([1.5, float("nan")], dtype=torch.bfloat16))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


SMALL_REMOVAL = Removal([("conv", [1])])
SMALL_EXAMPLE = torch.zeros(2, 1, 2, 2)


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
    SMALL_REMOVAL.apply(model, SMALL_EXAMPLE, cut=True)
    return model


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape
        and left[n].dtype == right[n].dtype
        and torch.equal(saved._bytes(left[n]), saved._bytes(right[n]))
        for n in left
    )


def untouched(model: nn.Module):
    """A snapshot of a model; called, it says that nothing is another object, value or mode."""
    objects = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    values, modes = copy.deepcopy(model), {n: m.training for n, m in model.named_modules()}

    def check() -> None:
        assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == objects
        assert same_bits(model, values)
        assert {n: m.training for n, m in model.named_modules()} == modes

    return check


# ---------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("name", REMOVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit(tmp_path, name, dtype):
    model = pruned(name).to(dtype)
    save_pruned(tmp_path / "m", model, REMOVALS[name])
    again = build(name, 3, 10, seed=1).to(dtype)
    assert load_pruned(tmp_path / "m", again, EXAMPLE.to(dtype)) is again
    assert same_bits(model, again)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again.eval()(x))


def test_a_reloaded_model_stays_in_its_mode_and_trains(tmp_path):
    save_pruned(tmp_path / "m", pruned("vgg-digits"), REMOVALS["vgg-digits"])
    again = build("vgg-digits", 3, 10)
    again.features[1].eval()
    load_pruned(tmp_path / "m", again, EXAMPLE)
    assert again.training
    assert not again.features[1].training
    again.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_layouts_do_not_matter(tmp_path, layout):
    model = pruned("vgg-digits").to(memory_format=layout)
    other = torch.contiguous_format if layout is torch.channels_last else torch.channels_last
    save_pruned(tmp_path / "m", model, REMOVALS["vgg-digits"])
    again = build("vgg-digits", 3, 10).to(memory_format=other)
    assert same_bits(load_pruned(tmp_path / "m", again, EXAMPLE), model)


def test_views_of_larger_tensors_are_saved_as_they_look(tmp_path):
    model = small()
    pool = torch.randn(4, 6)
    model.head.weight = nn.Parameter(pool.T[1:3, 1:3])  # strided, and not at its storage's start
    model.head.bias = nn.Parameter(pool[1, 1:3])  # overlaps with it, and is no tie
    save_pruned(tmp_path / "m", model, SMALL_REMOVAL)
    assert same_bits(load_pruned(tmp_path / "m", Small(), SMALL_EXAMPLE), model)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.inner, self.encode, self.decode = nn.Linear(4, 7), nn.Linear(7, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 5)
        if tied:
            self.last.weight = self.decode.weight

    def forward(self, x):
        return self.last(self.decode(self.encode(self.inner(x).relu()).relu()).relu())


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    removal, example = Removal([("inner", [0, 4])]), torch.randn(2, 4)
    model = Tied()
    removal.apply(model, example, cut=True)
    assert model.last.weight is model.decode.weight
    save_pruned(tmp_path / "m", model, removal)
    assert len(safetensors.torch.load_file(tmp_path / "m")) == len(model.state_dict()) - 1
    again = load_pruned(tmp_path / "m", Tied(), example)
    assert same_bits(again, model)
    assert again.last.weight is again.decode.weight


def test_tied_layers_do_not_take_two_different_tensors(tmp_path):
    removal, example = Removal([("inner", [0, 4])]), torch.randn(2, 4)
    model = Tied(tied=False)
    removal.apply(model, example, cut=True)
    save_pruned(tmp_path / "m", model, removal)
    again = Tied()
    check = untouched(again)
    with pytest.raises(MismatchError, match="shares"):
        load_pruned(tmp_path / "m", again, example)
    check()


def test_several_removals_are_reloaded_from_their_sum(tmp_path):
    model, removed = dense("resnet20"), Removal()
    for channels in ([0, 3], [0, 1], [11]):
        removal = Removal([("conv1", channels), ("layer3.1.conv1", channels)])
        removal.apply(model, EXAMPLE, cut=True)
        removed += removal
    save_pruned(tmp_path / "m", model, removed)
    assert same_bits(load_pruned(tmp_path / "m", build("resnet20", 3, 10), EXAMPLE), model)


def test_facts_and_removal_can_be_read_without_a_model(tmp_path):
    facts = {"model": "vgg-digits", "classes": 10, "list": [1, None, "ä"]}
    save_pruned(tmp_path / "new" / "m", pruned("vgg-digits"), REMOVALS["vgg-digits"], facts)
    found = read(tmp_path / "new" / "m")
    assert found.facts == facts
    assert found.removal == REMOVALS["vgg-digits"]


def test_a_model_on_a_gpu(tmp_path, cuda):
    model = pruned("resnet20").to(cuda)
    save_pruned(tmp_path / "m", model, REMOVALS["resnet20"])
    on_host = load_pruned(tmp_path / "m", build("resnet20", 3, 10), EXAMPLE)
    assert same_bits(on_host, model)
    there = load_pruned(tmp_path / "m", build("resnet20", 3, 10).to(cuda), EXAMPLE.to(cuda))
    assert same_bits(there, model)
    assert {t.device.type for t in there.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_text(tmp_path, kind):
    path = kind(tmp_path / "folder" / "small.safetensors")
    save_pruned(path, small(), SMALL_REMOVAL)
    assert same_bits(load_pruned(path, Small(), SMALL_EXAMPLE), small())
    assert read(path).removal == Removal.load(path) == SMALL_REMOVAL
    saved.write(path, lambda file: file.write(b"else"))
    assert Path(path).read_bytes() == b"else"


def test_what_is_on_the_dense_models_parameters_stays_on_those_that_are_loaded(tmp_path):
    save_pruned(tmp_path / "m", small(), SMALL_REMOVAL)
    model, seen = Small(), []
    for name, p in model.named_parameters():
        p.no_decay, p.place = True, torch.arange(p.numel()).view_as(p)
        p.register_hook(lambda g, n=name: seen.append((n, g.shape)))
    load_pruned(tmp_path / "m", model, SMALL_EXAMPLE)
    model(torch.randn(2, 1, 2, 2)).sum().backward()
    assert sorted(seen) == sorted((n, p.shape) for n, p in model.named_parameters())
    assert all(p.no_decay and p.place.shape == p.shape for p in model.parameters())
    assert model.conv.bias.place.tolist() == [0, 2]


# ---------------------------------------------------------------------- what is refused


def test_nothing_is_written_where_saving_is_refused(tmp_path):
    path, model = tmp_path / "m", small()
    save_pruned(path, model, SMALL_REMOVAL)
    before = path.read_bytes()
    with pytest.raises(SavedModelError, match=r"'stem'.*no layer"):
        save_pruned(path, model, Removal([("stem", [0])]))
    with pytest.raises(SavedModelError, match="facts"):
        save_pruned(path, model, SMALL_REMOVAL, {"when": object()})
    with pytest.raises(SavedModelError, match="facts"):
        save_pruned(path, model, SMALL_REMOVAL, {"accuracy": float("nan")})
    for odd in (
        torch.ones(2, dtype=torch.complex128),
        torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(),
    ):
        twin = copy.deepcopy(model)
        twin.register_buffer("odd", odd)
        with pytest.raises(SavedModelError):
            save_pruned(path, twin, SMALL_REMOVAL)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(SavedModelError, match="_extra_state"):
        save_pruned(path, Extra(2, 2), Removal())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def runs(count: int, model: nn.Module) -> list[DepGraph]:
    """As many runs of the framework alone, one after the other."""
    made = []
    for _ in range(count):
        run = DepGraph(model, EXAMPLE, DepGraphOptions(ratio=0.25))
        run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        run.remove()
        made.append(run)
    return made


def test_a_removal_is_saved_with_the_model_that_it_has_left(tmp_path):
    model, path = build("vgg-digits", 3, 10), tmp_path / "m"
    first, second = runs(2, model)
    whole = first.removed + second.removed
    for removal, other in (
        (first.removed, build("vgg-digits", 3, 10)),
        (first.removed, model),
        (whole, build("vgg-digits", 3, 10)),
    ):
        with pytest.raises(SavedModelError, match=r"the removal has left.*sum of all"):
            removal.save(path, other)
    with pytest.raises(SavedModelError, match=r"no removal to save.*None before"):
        save_pruned(path, model, None)
    assert not path.exists()
    whole.save(path, model)
    assert same_bits(load_pruned(path, build("vgg-digits", 3, 10), EXAMPLE), model)


def test_a_removal_that_is_not_all_is_named_as_a_cause_when_loading(tmp_path):
    """What cannot be known when saving: the second of two runs alone, a hand-written removal."""
    model, path = build("vgg-digits", 3, 10), tmp_path / "m"
    _, second = runs(2, model)
    small = copy.deepcopy(model)
    by_hand = Removal(second.removed)
    for removal, of in ((second.removed, small), (by_hand, build("vgg-digits", 3, 10))):
        removal.save(path, of)
        dense = build("vgg-digits", 3, 10)
        check = untouched(dense)
        with pytest.raises(MismatchError, match=r"second of two runs.*sum of all removals"):
            load_pruned(path, dense, EXAMPLE)
        check()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: build("resnet20", 3, 10), "of another model"),
        (lambda: build("vgg-digits", 3, 7), r"'classifier.\w+' has shape"),
        (lambda: build("vgg-digits", 3, 10).half(), "torch.float32 in the file"),
        (lambda: build("vgg-digits", 1, 10), "cannot be removed from this one"),
        (lambda: pruned("vgg-digits"), r"has shape|cannot be removed"),
    ],
)
def test_a_model_that_the_file_does_not_fit_is_left_as_it_was(tmp_path, other, message):
    save_pruned(tmp_path / "m", pruned("vgg-digits"), REMOVALS["vgg-digits"])
    model = other()
    model.eval()
    check = untouched(model)
    with pytest.raises(MismatchError, match=message):
        load_pruned(tmp_path / "m", model, EXAMPLE)
    check()


def test_a_removal_beyond_the_layer_is_refused(tmp_path):
    save_pruned(tmp_path / "m", pruned("vgg-digits"), Removal([("features.0", [1, 5, 32])]))
    model = build("vgg-digits", 3, 10)
    check = untouched(model)
    with pytest.raises(MismatchError):
        load_pruned(tmp_path / "m", model, EXAMPLE)
    check()


def test_a_later_version_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "VERSION", 2)
    save_pruned(tmp_path / "m", small(), SMALL_REMOVAL)
    monkeypatch.undo()
    model = Small()
    check = untouched(model)
    with pytest.raises(VersionError, match=r"version 2.*up to 1; take a later"):
        load_pruned(tmp_path / "m", model, SMALL_EXAMPLE)
    check()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04 a pickle in a zip", b'{"__metadata__": {}}'],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(DamagedError, match="damaged, or no pruned model"):
        read(tmp_path / "m")


def test_another_safetensors_file_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "bare")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other", {"format": "pt"})
    for name in ("bare", "other"):
        with pytest.raises(DamagedError, match="no pruned model"):
            read(tmp_path / name)


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "m", Small(), SMALL_EXAMPLE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sound file's bytes, and a place for damaged ones."""
    path = tmp_path_factory.mktemp("written") / "m"
    save_pruned(path, small(), SMALL_REMOVAL, {"note": "ä"})
    return path.read_bytes(), path


def test_wherever_it_is_cut_off_it_is_refused(written):
    content, path = written
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(DamagedError):
            read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DamagedError):
        read(path)


def test_cut_off_files_leave_the_model_as_it_was(written):
    content, path = written
    model = Small()
    check = untouched(model)
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            load_pruned(path, model, SMALL_EXAMPLE)
    check()


def test_every_flipped_bit_is_refused(written):
    content, path = written
    for _ in each_bit_flipped(path, content):
        with pytest.raises((DamagedError, VersionError)):
            read(path)
    assert read(path).removal == SMALL_REMOVAL


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_stretches_are_refused(written, data):
    content, path = written
    start = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(min_size=1, max_size=40))
    kept = data.draw(st.integers(start, min(len(content), start + 60)))
    altered = content[:start] + new + content[kept:]
    path.write_bytes(altered)
    try:
        found = read(path)
    except (DamagedError, VersionError):
        return
    path.write_bytes(content)
    assert found.removal == read(path).removal
    again = Small()
    path.write_bytes(altered)
    assert same_bits(load_pruned(path, again, SMALL_EXAMPLE), small())


def test_nothing_in_the_file_is_code(written):
    content, _ = written
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert set(header["__metadata__"]) == {"format", "version", "description", "sha256"}
    assert json.loads(header["__metadata__"]["description"])["plan"] == [["conv", [1]]]


def test_what_is_equal_has_equal_bytes(tmp_path):
    facts = [{"a": 1, "b": {"x": [1], "y": "ä"}}, {"b": {"y": "ä", "x": [1]}, "a": 1}]
    made = set()
    for n in range(12):  # the library's order of four entries is drawn anew each time
        save_pruned(tmp_path / "m", small(), SMALL_REMOVAL, facts[n % 2])
        made.add((tmp_path / "m").read_bytes())
    assert len(made) == 1
    assert read(tmp_path / "m").facts == facts[0]
    # It is a safetensors file like any other.
    assert safetensors.torch.load_file(tmp_path / "m").keys() == small().state_dict().keys()


# ---------------------------------------------------------------------- a killed process

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from dpm_core.adapters import saved
from dpm_core.adapters.removal import Removal

torch.set_num_threads(1)
folder, mode = Path(sys.argv[1]), sys.argv[2]
path = folder / "m"

def model(value):
    size = 30 if mode == "lines" else 300
    made = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    for p in made.parameters():
        nn.init.constant_(p, value)
    return made

def whole():
    # The value all tensors have in common with the facts; torn files raise.
    found = saved.read(path)
    (value,) = {v for t in found.tensors.values() for v in t.unique().tolist()}
    assert found.facts == {"value": value}
    return value

old, new = model(1.0), model(2.0)
seen, killed = [], 0
draw = random.Random(0)

def at_line(stop):
    # Ends the process at the n-th line executed in the module.
    count = 0
    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != saved.__file__:
            return None
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

def save(value):
    saved.save_pruned(path, {1.0: old, 2.0: new}[value], Removal(), {"value": value})

started = time.perf_counter()
save(1.0)
usual = time.perf_counter() - started
for turn in range(1, 10_000 if mode == "lines" else int(sys.argv[3]) + 1):
    if mode == "lines" and whole() != 1.0:
        save(1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if mode == "lines":
            at_line(turn)
            save(2.0)
            os._exit(0)
        while True:
            for value in (2.0, 1.0):
                save(value)
                os.write(writer, b".")
    if mode == "random":
        for _ in range(draw.randrange(3)):
            os.read(reader, 1)
        time.sleep(draw.uniform(0, 1.5 * usual))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    seen.append(whole())
    killed += os.WIFSIGNALED(status)
    if mode == "lines" and not os.WIFSIGNALED(status):
        break
left = len(list(folder.iterdir())) - 1
print(json.dumps({"seen": seen, "killed": killed, "left": left}))
"""


def killed(folder: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [forked.python(), "-c", KILLED, str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_at_every_line_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    found = killed(tmp_path, "lines")
    assert found["killed"] == len(found["seen"]) - 1 > 50
    switch = found["seen"].index(2.0)
    assert found["seen"] == [1.0] * switch + [2.0] * (len(found["seen"]) - switch)
    assert 0 < switch < found["killed"]
    assert found["left"] > 0  # some were killed with the temporary file half written


@pytest.mark.slow
def test_killed_at_any_time_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    found = killed(tmp_path, "random", "100")
    assert found["killed"] == 100
    assert set(found["seen"]) == {1.0, 2.0}
    assert found["left"] > 5
