"""Images: what is loaded, what a training batch is made of, and what is refused."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from experiments.data import DataError, Images, load, mixing


def numbered(n: int = 12, height: int = 6, width: int = 5, **settings) -> Images:
    """Random images whose label is their number."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, height, width), generator=draw, dtype=torch.uint8)
    labels = torch.arange(n)
    settings = {"pad": 0, "flip": False, **settings}
    return Images("numbered", images, labels, images[:2], labels[:2], n, **settings)


# ---------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits() -> Images:
    return load("digits", Path("unused"))


def test_digits_are_images_of_8_by_8_with_labels(digits):
    assert (digits.label, digits.classes, digits.channels) == ("digits", 10, 1)
    assert digits.train.shape == (1297, 1, 8, 8)
    assert digits.test.shape == (500, 1, 8, 8)
    assert digits.train.dtype == digits.test.dtype == torch.uint8
    assert digits.train_labels.shape == (1297,)
    assert digits.test_labels.shape == (500,)
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.train.min() == 0
    assert digits.train.max() == 240
    assert (digits.pad, digits.flip) == (1, False)


def test_the_digits_are_split_and_none_is_lost_or_in_both(digits):
    from sklearn.datasets import load_digits

    bundled = load_digits()
    whole = Counter(
        (bytes((image * 15).astype("uint8").ravel()), int(label))
        for image, label in zip(bundled.images, bundled.target, strict=True)
    )
    split = Counter(
        (bytes(image.numpy().ravel()), int(label))
        for images, labels in (
            (digits.train, digits.train_labels),
            (digits.test, digits.test_labels),
        )
        for image, label in zip(images, labels, strict=True)
    )
    assert split == whole


def test_every_digit_has_its_share_of_the_test_images(digits):
    test = torch.bincount(digits.test_labels, minlength=10)
    whole = test + torch.bincount(digits.train_labels, minlength=10)
    assert ((test - whole * 500 / 1797).abs() < 1).all()


def test_digits_are_the_same_each_time_whatever_the_random_state(digits):
    np.random.seed(5)
    torch.manual_seed(5)
    again = load("digits", Path("unused"))
    assert torch.equal(again.train, digits.train)
    assert torch.equal(again.test, digits.test)
    assert torch.equal(again.train_labels, digits.train_labels)


# ---------------------------------------------------------------------- batches


def test_a_batch_depends_on_seed_and_position_alone(digits):
    first = digits.batch(64, 7, seed=3)
    torch.manual_seed(123)
    for position in (30, 2, 7):
        again = replace(digits).batch(64, position, seed=3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].shape == (64, 1, 8, 8)
    assert first[0].dtype == torch.float32
    assert first[1].dtype == torch.int64


def test_a_batch_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    numbered(pad=1, flip=True).batch(4, 0, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_positions_differ_in_order_and_augmentation():
    ordered = numbered(n=100)
    orders = {
        tuple(ordered.batch(100, position, seed)[1].tolist())
        for position in range(5)
        for seed in range(5)
    }
    assert len(orders) == 25
    shifted = numbered(n=1, pad=4)
    kinds = {seed: [shifted.batch(1, p, seed)[0] for p in range(8)] for seed in range(3)}
    for left, right in ((0, 1), (1, 2)):
        same = [torch.equal(a, b) for a, b in zip(kinds[left], kinds[right], strict=True)]
        assert sum(same) < 4
    assert len({tuple(image.flatten().tolist()) for image in kinds[0]}) > 4


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_image_comes_once_an_epoch(epoch, seed):
    images = numbered(n=12)
    seen = [images.batch(4, 3 * epoch + step, seed)[1] for step in range(3)]
    assert torch.cat(seen).sort().values.tolist() == list(range(12))


def test_epochs_come_in_fresh_orders():
    images = numbered(n=12)
    orders = {tuple(images.batch(12, epoch, 0)[1].tolist()) for epoch in range(6)}
    assert len(orders) == 6


def test_what_does_not_fill_a_batch_waits_for_another_epoch():
    images = numbered(n=12)
    assert images.steps_per_epoch(5) == 2
    left = set()
    for epoch in range(6):
        seen = torch.cat([images.batch(5, 2 * epoch + step, 0)[1] for step in range(2)]).tolist()
        assert len(set(seen)) == 10
        left.add(tuple(sorted(set(range(12)) - set(seen))))
    assert len(left) > 1


def test_images_come_with_their_own_labels():
    images = numbered()
    batch, labels = images.batch(4, 1, seed=2)
    assert torch.equal(batch, images.normalize(images.train[labels]))


def test_a_batch_beyond_the_images_is_refused():
    with pytest.raises(DataError, match="batch 13 exceeds the 12 training images"):
        numbered().steps_per_epoch(13)


def test_training_images_have_mean_0_and_deviation_1_per_channel(digits):
    coloured = numbered(n=40)
    coloured.train[:, 1] //= 3
    for images in (digits, coloured):
        normal = images.normalize(images.train).double()
        assert normal.mean((0, 2, 3)).abs().max() < 1e-5
        assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_test_images_are_normalised_like_training_images():
    images = numbered(n=40)
    images.test[:] = 255
    pixels = images.train.double() / 255
    expected = (1 - pixels.mean((0, 2, 3))) / pixels.std((0, 2, 3))
    found = images.normalize(images.test)[0, :, 0, 0].double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- mixup


def test_no_mixup_is_no_mixing():
    assert mixing(0.0, 8, 3, seed=1) == (1.0, None)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_shares_of_mixup_are_drawn_from_the_beta_distribution(alpha):
    shares = np.array([mixing(alpha, 2, position, seed=5)[0] for position in range(4000)])
    assert shares.min() >= 0
    assert shares.max() <= 1
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)). The bounds are four standard errors.
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
    fourth = ((shares - shares.mean()) ** 4).mean()
    assert abs(shares.var() - variance) < 4 * ((fourth - variance**2) / 4000) ** 0.5


def test_partners_are_the_batch_in_another_order():
    orders = [mixing(0.2, 16, position, seed=0)[1] for position in range(20)]
    assert all(order.dtype == torch.int64 for order in orders)
    assert all(order.sort().values.tolist() == list(range(16)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 20


def test_mixing_depends_on_seed_and_position_alone():
    state, python = torch.get_rng_state(), random.getstate()
    share, order = mixing(0.2, 16, 7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    torch.manual_seed(9)
    random.seed(9)
    again, other = mixing(0.2, 16, 7, seed=3)
    assert again == share
    assert torch.equal(order, other)
    others = {mixing(0.2, 16, p, seed=s)[0] for p, s in ((7, 4), (8, 3), (3, 7))}
    assert share not in others
    assert len(others) == 3


# ---------------------------------------------------------------------- augmentation


def slow_crop(image: torch.Tensor, pad: int, top: int, left: int, mirror: bool) -> torch.Tensor:
    """One crop of a zero-padded image, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            here, there = y + top - pad, x + left - pad
            if 0 <= here < height and 0 <= there < width:
                column = width - 1 - there if mirror else there
                for c in range(channels):
                    out[c, y, x] = image[c, here, column]
    return out


@pytest.mark.parametrize("flip", [False, True], ids=["crops", "crops and flips"])
def test_training_images_are_crops_of_the_zero_padded_image(flip):
    images = numbered(n=2, height=4, width=5, pad=2, flip=flip)
    kinds = {}
    for label, image in enumerate(images.train):
        for top in range(5):
            for left in range(5):
                for mirror in (False, True):
                    made = images.normalize(slow_crop(image, 2, top, left, mirror)[None])[0]
                    kinds[label, tuple(made.flatten().tolist())] = (top, left, mirror)
    assert len(kinds) == 2 * 5 * 5 * 2
    drawn = Counter()
    for position in range(500):
        batch, labels = images.batch(2, position, seed=0)
        for image, label in zip(batch, labels.tolist(), strict=True):
            drawn[kinds[label, tuple(image.flatten().tolist())]] += 1
    # Every shift comes, about equally often; half are mirrored, or none.
    shifts = Counter()
    for (top, left, _), n in drawn.items():
        shifts[top, left] += n
    assert len(shifts) == 25
    assert max(shifts.values()) < 80  # 40 expected of 1000
    mirrored = sum(n for (_, _, mirror), n in drawn.items() if mirror)
    assert 430 < mirrored < 570 if flip else mirrored == 0


def test_without_padding_and_flips_images_are_left_as_they_are():
    images = numbered()
    batch, labels = images.batch(12, 0, seed=0)
    assert torch.equal(batch, images.normalize(images.train[labels]))


# ---------------------------------------------------------------------- folders


def picture(seed: int, size: tuple[int, int], mode: str) -> Image.Image:
    draw = np.random.default_rng(seed)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))


def make_folder(at: Path, test: str = "test", kind: str = "png") -> Path:
    """Images of odd sizes, grey, coloured and with transparency, in two classes."""
    sizes = [(7, 9), (16, 16), (31, 20), (5, 40)]
    for split, n in (("train", 4), (test, 2)):
        for c, label in enumerate(("cat", "dog")):
            for i in range(n):
                mode = "L" if i % 2 else ("RGBA" if kind == "png" and c else "RGB")
                file = at / split / label / f"{i}.{kind}"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(100 * c + i, sizes[i], mode).save(file)
    return at


def load_folder(at: Path, tmp_path: Path, size: int = 16) -> Images:
    return load(f"folder:{at}", tmp_path / "root", size=size)


def test_a_folder_is_loaded_with_classes_and_labels_by_name(tmp_path):
    images = load_folder(make_folder(tmp_path / "pets"), tmp_path)
    assert images.label == "pets (folder)"
    assert (images.classes, images.channels) == (2, 3)
    assert images.train.shape == (8, 3, 16, 16)
    assert images.test.shape == (4, 3, 16, 16)
    assert images.train.dtype == torch.uint8
    assert images.train_labels.tolist() == [0] * 4 + [1] * 4
    assert images.test_labels.tolist() == [0] * 2 + [1] * 2
    assert images.train_labels.dtype == torch.int64
    assert (images.pad, images.flip) == (4, True)


def test_a_folders_images_are_the_largest_centred_square_in_colour(tmp_path):
    folder = make_folder(tmp_path / "pets")
    images = load_folder(folder, tmp_path)
    files = sorted((folder / "train").rglob("*.png"))
    assert len(files) == 8
    for i, file in enumerate(files):
        whole = Image.open(file).convert("RGB")
        side = min(whole.size)
        left, top = (whole.width - side) // 2, (whole.height - side) // 2
        square = whole.crop((left, top, left + side, top + side))
        resized = square.resize((16, 16), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        difference = (images.train[i].int() - expected.int()).abs()
        # Pixels beside the square may have a part in its outermost ones; and rounding.
        assert difference[:, 2:14, 2:14].max() <= 1, file
        assert whole.size != (16, 16) or not difference.any(), file
    grey = images.train[1]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


def test_the_test_folder_may_be_called_val(tmp_path):
    images = load_folder(make_folder(tmp_path / "pets", test="val"), tmp_path)
    assert images.test.shape == (4, 3, 16, 16)


def test_the_size_is_the_one_asked_for(tmp_path):
    folder = make_folder(tmp_path / "pets")
    assert load_folder(folder, tmp_path, size=16).train.shape[2:] == (16, 16)
    assert load_folder(folder, tmp_path, size=24).train.shape[2:] == (24, 24)


def test_a_decoded_folder_is_read_from_its_cache(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pets")
    first = load_folder(folder, tmp_path)

    def opened(*args, **kwargs):
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(Image, "open", opened)
    again = load_folder(folder, tmp_path)
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    assert again.label == first.label
    assert not list((tmp_path / "root").rglob("*.tmp"))


def change_in_size(folder: Path) -> None:
    picture(7, (50, 50), "RGB").save(folder / "train" / "cat" / "0.bmp")


def change_in_content_alone(folder: Path) -> None:
    file = folder / "train" / "cat" / "0.bmp"
    before = file.stat()
    picture(7, (7, 9), "RGB").save(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def one_more(folder: Path) -> None:
    picture(7, (7, 9), "RGB").save(folder / "train" / "cat" / "new.bmp")


def one_less(folder: Path) -> None:
    (folder / "test" / "dog" / "0.bmp").unlink()


def one_in_another_class(folder: Path) -> None:
    (folder / "train" / "cat" / "0.bmp").rename(folder / "train" / "dog" / "9.bmp")


@pytest.mark.parametrize(
    "change", [change_in_size, change_in_content_alone, one_more, one_less, one_in_another_class]
)
def test_a_changed_folder_is_decoded_anew(tmp_path, change):
    folder = make_folder(tmp_path / "pets", kind="bmp")
    load_folder(folder, tmp_path)
    change(folder)
    found = load_folder(folder, tmp_path)
    fresh = load(f"folder:{folder}", tmp_path / "another root", size=16)
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(found, name), getattr(fresh, name))


def test_two_folders_of_one_name_are_not_mixed_up(tmp_path):
    one = make_folder(tmp_path / "a" / "pets", kind="bmp")
    other = make_folder(tmp_path / "b" / "pets", kind="bmp")
    for file in other.rglob("*.bmp"):
        with Image.open(file) as image:
            flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        flipped.save(file)
    first, second = load_folder(one, tmp_path), load_folder(other, tmp_path)
    assert torch.equal(second.train[0], first.train[0].flip(1))


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_broken_image_is_refused_by_name(tmp_path, kind, share):
    folder = make_folder(tmp_path / "pets", kind=kind)
    broken = folder / "test" / "dog" / f"1.{kind}"
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="is not an image") as caught:
        load_folder(folder, tmp_path)
    assert str(broken) in str(caught.value)
    assert "remove it" in str(caught.value)
    assert not list((tmp_path / "root").rglob("*")), "a half-decoded folder was kept"


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_folder_without_train_or_test_is_refused_saying_what_is_needed(tmp_path, missing):
    folder = make_folder(tmp_path / "pets")
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"needs the folders train and test \(or val\)") as caught:
        load_folder(folder, tmp_path)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere needs the folders train and test"):
        load_folder(tmp_path / "nowhere", tmp_path)


def test_train_and_test_that_differ_in_classes_are_refused_naming_them(tmp_path):
    folder = make_folder(tmp_path / "pets")
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(DataError, match=r"differ in classes \['dog', 'wolf'\]"):
        load_folder(folder, tmp_path)


def test_a_class_without_images_is_refused_by_name(tmp_path):
    folder = make_folder(tmp_path / "pets")
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="bird"):
        load_folder(folder, tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    folder = tmp_path / "pets"
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="pets"):
        load_folder(folder, tmp_path)


@pytest.mark.parametrize("name", ["mnist", "", "Digits", "/some/path"])
def test_an_unknown_name_is_refused_naming_those_there_are(tmp_path, name):
    with pytest.raises(DataError, match="give digits, cifar10, cifar100 or folder:PATH"):
        load(name, tmp_path)


# ---------------------------------------------------------------------- CIFAR


def test_cifar_without_files_and_network_is_refused_with_the_remedy(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error: no route to host>")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path)
    words = ["cifar10", str(tmp_path), "no route to host", "folder:PATH"]
    assert [w for w in words if w not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [("cifar10", "CIFAR10", "CIFAR-10"), ("cifar100", "CIFAR100", "CIFAR-100")],
)
def test_cifar_is_taken_over_pixel_by_pixel(tmp_path, monkeypatch, name, kind, label):
    asked = []

    class Fake:
        def __init__(self, root, train, download):
            asked.append((root, train, download))
            n = 5 if train else 3
            self.data = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            self.targets = [(7 * i + n) % 10 for i in range(n)]
            self.classes = [str(i) for i in range(10)]

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    images = load(name, tmp_path)
    assert sorted(asked) == [(str(tmp_path), False, True), (str(tmp_path), True, True)]
    assert (images.label, images.classes, images.channels) == (label, 10, 3)
    assert (images.pad, images.flip) == (4, True)
    for found, labels, train in (
        (images.train, images.train_labels, True),
        (images.test, images.test_labels, False),
    ):
        fake = Fake("", train, False)
        assert found.dtype == torch.uint8
        assert found.shape == (len(fake.data), 3, 32, 32)
        assert labels.tolist() == fake.targets
        draw = random.Random(0)
        for _ in range(50):
            i, y, x, c = (draw.randrange(n) for n in fake.data.shape)
            assert found[i, c, y, x] == fake.data[i, y, x, c]


# ---------------------------------------------------------------------- parts of the training set


def test_a_part_of_the_training_images_is_fixed_balanced_and_named(digits):
    part = load("digits", Path("unused"), train=200)
    assert part.label == "digits, 200 training images"
    assert torch.equal(part.test, digits.test)
    assert torch.equal(part.train, load("digits", Path("unused"), train=200).train)
    assert part.train_labels.bincount().tolist() == pytest.approx([20] * 10, abs=2)
    larger = load("digits", Path("unused"), train=300)
    assert torch.equal(larger.train[:200], part.train)


def test_validation_images_are_training_images_that_are_not_trained_on(digits):
    made = load("digits", Path("unused"), train=900, validation=300)
    assert made.label == "digits, 900 training images, 300 for validation"
    assert (len(made.train), len(made.test)) == (900, 300)

    def names(images):
        return [image.numpy().tobytes() for image in images]

    known, held, tested = (Counter(names(i)) for i in (digits.train, made.test, digits.test))
    assert not Counter(names(made.train)) + held - known
    assert not held & (tested - known)
    assert made.test_labels.bincount().tolist() == pytest.approx([30] * 10, abs=2)


def test_without_a_number_all_other_images_are_trained_on(digits):
    made = load("digits", Path("unused"), validation=297)
    assert (len(made.train), len(made.test)) == (1000, 297)
    assert made.label == "digits, 1,000 training images, 297 for validation"


@pytest.mark.parametrize(("train", "validation"), [(1298, None), (1000, 298), (None, 1297)])
def test_more_images_than_there_are_are_refused_with_the_numbers(train, validation):
    with pytest.raises(DataError, match=r"digits has 1297 training images.*lower data.train"):
        load("digits", Path("unused"), train=train, validation=validation)


def test_a_label_is_for_folders_only():
    with pytest.raises(DataError, match="digits has a name of its own"):
        load("digits", Path("unused"), label="CIFAR-10")
