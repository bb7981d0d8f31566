"""Images on disk: larger than memory, checked, never half there; and crops of random size."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from experiments import places
from experiments.config import load as load_config
from experiments.inputs import folders, stored
from experiments.inputs.augmentation import boxes, resized_crops
from experiments.inputs.data import load
from experiments.inputs.images import DataError, Images, Rows, middle
from experiments.running import training
from tests.support import tiny
from tests.support.tiny import MINIATURE

ROOT = tiny.ROOT


def make_folder(at: Path, train: int = 12, test: int = 4, side: int = 20) -> Path:
    """Drawn images in two classes."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in ("cat", "dog"):
            (at / split / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = draw.integers(0, 256, (side, side + i % 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(at / split / label / f"{i:05}.bmp")
    return at


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "pets")


def in_memory(images: Images) -> Images:
    """The same images as plain tensors."""
    whole = {name: getattr(images, name)[:].clone() for name in ("train", "test")}
    return replace(images, **whole, mapped=False)


def loaded(folder: Path, root: Path, **settings) -> Images:
    return load(f"folder:{folder}", root, **{"size": 16, **settings})


# ---------------------------------------------------------------------- mapped and plain

PARTS = {
    "whole": {},
    "a part": {"train": 7},
    "validation": {"train": 6, "validation": 4},
    "crops": {"augmentation": "resized-crop"},
    "validation and crops": {"train": 6, "validation": 4, "augmentation": "resized-crop"},
}


@pytest.mark.parametrize("parts", PARTS)
def test_mapped_images_give_what_plain_ones_give_bit_for_bit(folder, tmp_path, parts):
    images = loaded(folder, tmp_path, **PARTS[parts])
    plain = in_memory(images)
    assert images.mapped
    assert isinstance(images.train, Rows) == ("train" in PARTS[parts])
    assert (images.digest(), images.training_digest()) == (plain.digest(), plain.training_digest())
    assert (images.size, images.channels) == ((16, 16), 3)
    for position in (0, 1, 5, 20):
        for one, other in zip(
            images.batch(4, position, 3), plain.batch(4, position, 3), strict=True
        ):
            assert torch.equal(one, other)
        assert one.shape == (4,)
    assert images.batch(4, 0, 0)[0].shape == (4, 3, 16, 16)
    assert torch.equal(images.normalize(images.test[:3]), plain.normalize(plain.test[:3]))
    assert torch.equal(images.plain(slice(2, 5)), middle(plain.train[2:5], (16, 16)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    assert training.accuracy(model, images) == training.accuracy(model, plain)


def test_a_part_is_the_part_of_the_whole(folder, tmp_path):
    whole, part = loaded(folder, tmp_path), loaded(folder, tmp_path, train=5)
    known = [image.tobytes() for image in whole.train.numpy()]
    rows = [known.index(image.numpy().tobytes()) for image in part.train[:]]
    assert part.train_labels.tolist() == whole.train_labels[rows].tolist()
    assert torch.equal(part.test, whole.test)


def test_images_that_are_looked_at_elsewhere_keep_their_hashes(folder, tmp_path):
    images = loaded(folder, tmp_path)
    assert images.to(torch.device("cpu")) is images
    moved = images.to(torch.device("meta"))
    assert (moved.digest(), moved.mapped) == (images.digest(), False)


@pytest.mark.parametrize("resident", [True, False])
def test_images_that_are_too_many_for_a_gpu_stay_on_the_host(
    folder, tmp_path, monkeypatch, cuda, resident
):
    images = loaded(folder, tmp_path, augmentation="resized-crop")
    monkeypatch.setattr("experiments.inputs.images.RESIDENT", 1.0 if resident else 0.0)
    there = images.to(cuda)
    assert there.mapped != resident
    assert there.train.device.type == ("cuda" if resident else "cpu")
    batch, labels = there.batch(4, 3, 1)
    assert (batch.device.type, labels.device.type) == ("cuda", "cuda")
    torch.testing.assert_close(batch.cpu(), images.batch(4, 3, 1)[0], atol=1e-4, rtol=1e-4)
    assert there.digest() == images.digest()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2)).to(cuda)
    training.accuracy(model, there)


@given(st.data())
@settings(max_examples=40)
def test_means_and_deviations_are_those_of_the_pixels(data):
    """As they were computed before, in double precision: not one bit of a batch may change."""
    n, side = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    seed, levels = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([1, 2, 17, 256]))
    draw = torch.Generator().manual_seed(seed)
    train = torch.randint(levels, (n, 3, side, side), generator=draw, dtype=torch.uint8)
    train[:, 1] = 255 - train[:, 1] // 3
    images = Images("x", train, torch.zeros(n), train[:1], torch.zeros(1), 2, pad=0, flip=False)
    pixels = train.double() / 255
    deviation = pixels.std((0, 2, 3), correction=min(1, pixels[:, 0].numel() - 1))
    constant = train.amax((0, 2, 3)) == train.amin((0, 2, 3))
    mean, spread = images._moments()
    assert torch.equal(mean.flatten(), pixels.mean((0, 2, 3)).float())
    assert torch.equal(spread.flatten(), torch.where(constant, 1.0, deviation).float())


# As the releases before images were mapped computed them.
KNOWN = {
    "digits": ({}, "fb2ee4d24206f250", "c91915342fbc0376", "64c196faff6fd09c"),
    "a part": ({"train": 200}, "891b5c926a1c42e6", "a873f3303f4acec2", "a1a0320759fd9730"),
    "validation": (
        {"train": 900, "validation": 300},
        "fb5401a43a0f9470",
        "1b357de563c1ef78",
        "00e7b0ee3cec79e6",
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_digits_have_the_hashes_and_batches_that_they_always_had(case):
    import hashlib

    parts, digest, training_digest, batches = KNOWN[case]
    images = load("digits", Path("unused"), **parts)
    assert (images.digest(), images.training_digest()) == (digest, training_digest)
    found = hashlib.sha256()
    for position in (0, 1, 5, 40):
        for seed in (0, 3):
            for tensor in images.batch(16, position, seed):
                found.update(tensor.contiguous().numpy().tobytes())
    assert found.hexdigest()[:16] == batches


# ---------------------------------------------------------------------- the file


def test_a_file_holds_the_images_one_after_the_other(folder, tmp_path):
    images = loaded(folder, tmp_path)
    (path,) = (tmp_path / "decoded").iterdir()
    body = b"".join(
        part[:].numpy().tobytes()
        for part in (images.train, images.train_labels, images.test, images.test_labels)
    )
    assert path.read_bytes().startswith(body)
    again = stored.hasher()
    again.update(body)
    assert images.digest() == again.hexdigest()


@pytest.mark.parametrize("where", ["first", "last", "label", "text", "length", "sha", "mark"])
def test_a_flipped_bit_anywhere_is_damage(folder, tmp_path, where):
    loaded(folder, tmp_path)
    (path,) = (tmp_path / "decoded").iterdir()
    content = bytearray(path.read_bytes())
    images = 12 * 3 * 16 * 16
    at = {
        "first": 0,
        "last": images - 1,
        "label": images,
        "text": content.index(b"digest"),
        "length": len(content) - len(stored.MARK) - 33,
        "sha": len(content) - len(stored.MARK) - 5,
        "mark": len(content) - 1,
    }[where]
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .*delete it"):
        loaded(folder, tmp_path)


def test_a_file_of_other_images_is_refused(folder, tmp_path):
    loaded(folder, tmp_path)
    loaded(folder, tmp_path, size=8)
    one, other = sorted((tmp_path / "decoded").iterdir())
    other.write_bytes(one.read_bytes())
    assert {p.name for p in (one, other)} == {p.name for p in (tmp_path / "decoded").iterdir()}
    refused = 0
    for size in (16, 8):
        try:
            loaded(folder, tmp_path, size=size)
        except DataError as error:
            assert "it is of " in str(error)  # noqa: PT017
            refused += 1
    assert refused == 1


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("how", [KeyboardInterrupt, MemoryError, SystemExit])
def test_decoding_that_is_interrupted_leaves_nothing(folder, tmp_path, monkeypatch, how):
    decode, count = folders._decode, []

    def fails(file, side):
        count.append(file)
        if len(count) == 9:
            raise how
        return decode(file, side)

    monkeypatch.setattr(folders, "_decode", fails)
    expected = how if how is not MemoryError else ValueError
    with pytest.raises(expected):
        loaded(folder, tmp_path / "root")
    assert not (tmp_path / "root").exists()
    monkeypatch.undo()
    assert len(loaded(folder, tmp_path / "root").train) == 12


@pytest.mark.slow
def test_decoding_that_is_killed_is_begun_anew(folder, tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from experiments.inputs import folders, data\n"
        "decode, count = folders._decode, []\n"
        "def slow(file, side):\n"
        "    count.append(1)\n"
        "    if len(count) == 9: print('now', flush=True); time.sleep(60)\n"
        "    return decode(file, side)\n"
        "folders._decode = slow\n"
        f"data.load('folder:{folder}', Path({str(tmp_path)!r}), size=16)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    left = [p.name for p in (tmp_path / "decoded").iterdir()]
    assert any(name.endswith(".tmp") for name in left)
    assert not any(name.endswith(".images") for name in left)
    assert len(loaded(folder, tmp_path).train) == 12
    assert [p.suffix for p in (tmp_path / "decoded").iterdir()] == [".images"]


def test_a_disk_that_is_too_full_is_known_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_decode", lambda *_: pytest.fail("an image was decoded"))
    usage = places.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage._replace(free=9000))
    with pytest.raises(OSError, match=r"about 0\.0 MB are needed"):
        loaded(folder, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_folder_that_another_process_decodes_is_waited_for(folder, tmp_path, monkeypatch):
    """And not decoded twice."""
    monkeypatch.setattr(folders, "WAIT", 0.05)
    monkeypatch.setattr(places, "PATIENCE", 0.05)
    decode, decoded = folders._decode, []

    def counted(file, side):
        decoded.append(threading.current_thread().name)
        time.sleep(0.02)
        return decode(file, side)

    monkeypatch.setattr(folders, "_decode", counted)
    threads = [threading.Thread(target=loaded, args=(folder, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 16
    assert len(set(decoded)) == 1


@pytest.mark.parametrize(("size", "side"), [(16, 18), (14, 16), (224, 256)])
def test_crops_of_random_size_are_cut_from_larger_images(tmp_path, size, side):
    at = make_folder(tmp_path / "pets", 4, 2, side=30)
    images = loaded(at, tmp_path, size=size, augmentation="resized-crop")
    assert images.train.shape[2:] == (side, side)
    assert images.test.shape[2:] == images.size == (size, size)
    # The usual evaluation: the short side to 256, and the middle of that.
    with Image.open(at / "test" / "cat" / "00000.bmp") as image:
        whole = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    start = (side - size) // 2
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    expected = expected[:, start : start + size, start : start + size]
    assert torch.equal(images.test[0], expected)


# ---------------------------------------------------------------------- crops of random size


def test_crops_are_those_of_the_boxes():
    """By torchvision's bilinear resizing, where a pixel does not reach over the crop's edge."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 6, 6, generator=draw) * 255
    images = torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 255).byte()
    size = (40, 44)
    for flip in (False, True):
        state = torch.Generator().manual_seed(1)
        found = resized_crops(images, state, size, flip)
        state = torch.Generator().manual_seed(1)
        cut = [t.tolist() for t in boxes(40, 48, 48, state)]
        mirrored = (torch.rand(40, generator=state) < 0.5).tolist() if flip else [False] * 40
        assert not flip or 8 < sum(mirrored) < 32
        for i, (top, left, high, wide) in enumerate(zip(*cut, strict=True)):
            box = int(top), int(left), int(high), int(wide)
            expected = resized_crop(images[i : i + 1].double(), *box, list(size), antialias=False)[
                0
            ]
            expected = expected.flip(2) if mirrored[i] else expected
            inner = slice(size[0] // 8, -(size[0] // 8))
            apart = (found[i].double() - expected)[:, inner, inner].abs().max()
            assert apart < 0.02  # of 255, and rounding in single precision


def test_boxes_are_drawn_as_torchvision_draws_them():
    n, side = 4000, 64
    top, left, high, wide = boxes(n, side, side, torch.Generator().manual_seed(0))
    for start, length in ((top, high), (left, wide)):
        assert bool((start >= 0).all())
        assert bool((length >= 1).all())
        assert bool((start + length <= side).all())
        assert torch.equal(start, start.round())
    torch.manual_seed(0)
    image = torch.zeros(3, side, side)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)],
        dtype=torch.float32,
    ).T
    for ours, other in (
        (high, theirs[2]),
        (wide, theirs[3]),
        (high * wide, theirs[2] * theirs[3]),
        (top / (side - high + 1), theirs[0] / (side - theirs[2] + 1)),
    ):
        # Means of two samples; five standard errors.
        error = math.sqrt((float(ours.var()) + float(other.var())) / n)
        assert abs(float(ours.mean() - other.mean())) < 5 * error
        assert float(ours.std() / other.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (30, 1), (2, 3)])
def test_odd_images_have_boxes_too(height, width):
    top, left, high, wide = boxes(50, height, width, torch.Generator().manual_seed(0))
    assert bool((top + high <= height).all() and (left + wide <= width).all())
    assert bool((high >= 1).all() and (wide >= 1).all())
    images = torch.full((50, 3, height, width), 7, dtype=torch.uint8)
    crops = resized_crops(images, torch.Generator().manual_seed(0), (4, 4), True)
    torch.testing.assert_close(crops, torch.full((50, 3, 4, 4), 7.0))


def test_crops_depend_on_seed_and_position_alone(folder, tmp_path):
    images = loaded(folder, tmp_path, augmentation="resized-crop")
    torch.manual_seed(0)
    first = images.batch(6, 3, 1)[0]
    torch.manual_seed(1)
    images.batch(6, 4, 1)
    assert torch.equal(replace(images).batch(6, 3, 1)[0], first)
    for position, seed in ((3, 2), (2, 1), (5, 1)):
        assert not torch.equal(images.batch(6, position, seed)[0], first)


def test_digits_are_cropped_but_not_mirrored():
    images = load("digits", Path("unused"), augmentation="resized-crop")
    assert images.batch(8, 0, 0)[0].shape == (8, 1, 8, 8)
    plain = load("digits", Path("unused"))
    assert images.digest() == plain.digest()
    assert not torch.equal(images.batch(8, 0, 0)[0], plain.batch(8, 0, 0)[0])
    assert torch.equal(images.batch(8, 0, 0)[1], plain.batch(8, 0, 0)[1])


def test_large_images_are_evaluated_fewer_at_a_time(folder, tmp_path):
    def most(height, width):
        test = torch.zeros(1, 3, height, width, dtype=torch.uint8).expand(1100, -1, -1, -1)
        images = Images("x", test, torch.zeros(1100), test, torch.zeros(1100), 2, pad=0, flip=False)
        parts = training._parts(1100, images)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, 1100)
        return parts[0].stop

    assert [most(8, 8), most(32, 32), most(64, 64)] == [500, 500, 500]
    assert [most(128, 128), most(224, 224)] == [125, 40]


# ---------------------------------------------------------------------- larger than memory

LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from experiments.inputs import images
from experiments.running import run as runs
from experiments.config import load
from experiments.inputs.data import load as load_data

torch.set_num_threads(1)
config, out, extra = load(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
# A run on digits first, so that all is imported that a run imports.
runs.run(runs.Request(load(Path(sys.argv[1]), data="digits"), "sp", 0, out=out / "digits"))
(used,) = [int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (used + extra, resource.RLIM_INFINITY))
record = runs.run(runs.Request(config, "sp", 0, out=out, data_root=out / "data"))
whole = load_data(config.data.name, out / "data", size=224, augmentation="resized-crop").train
try:
    held = whole.clone()
    print("no limit")
except RuntimeError:
    print(record)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_run_on_images_larger_than_memory(tmp_path):
    """Images of 224 pixels, by configuration alone: decoded, trained on, and pruned."""
    train, extra = 2000, 300 * 2**20  # a run takes half of it
    at = make_folder(tmp_path / "pets", train, 10, side=12)
    assert train * 3 * 256 * 256 > 1.2 * extra
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    layers = [nn.Conv2d(in_channels, 8, 7, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]\n"
        "    layers += [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(*layers, nn.Linear(16, num_classes))\n"
    )
    changes = {
        **MINIATURE,
        "model": f"{tmp_path / 'net.py'}:net",
        "data": {
            "name": f"folder:{at}",
            "size": 224,
            "augmentation": "resized-crop",
            "train": 240,
        },
        "dense.batch": 8,
        "dense.epochs": 1,
        "stages": {"prune": {"epochs": 1, "batch": 8, "learning_rate": 0.01}},
        "options": {"speed_up": 1.5, "steps": 8},
    }
    path = tiny.write(tmp_path / "c.toml", changes)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(tmp_path / "out"), str(extra)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.strip()
    if said == "no limit":
        pytest.skip("this system does not hold a process to RLIMIT_DATA")
    record = json.loads(Path(said).read_text())
    assert record["steps"]["total"] == 240 // 8
    assert record["config"]["data"]["augmentation"] == "resized-crop"
    assert record["model"] == load_config(path).model
