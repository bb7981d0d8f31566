"""Images: what is loaded, what a training batch consists of, and what is refused."""

from __future__ import annotations

import io
import os
import random
import shutil
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.inputs import folders
from experiments.inputs.data import load
from experiments.inputs.images import DataError, Images, mixing
from tests.support.damage import damaged


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


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_constant_channel_is_shifted_only(level):
    images = numbered(n=40)
    plain = images.normalize(images.train)
    images = replace(images, test=images.test.clone())
    images.train[:, 2] = level
    images.test[:, 2] = 255 - level
    normal = images.normalize(images.train)
    assert torch.equal(normal[:, :2], plain[:, :2])
    assert normal[:, 2].abs().max() < 1e-6
    expected = torch.full_like(images.test[:, 2], (255 - 2 * level) / 255, dtype=torch.float32)
    torch.testing.assert_close(images.normalize(images.test)[:, 2], expected)


def test_a_single_training_image_of_one_pixel_is_normalised_to_zero():
    images = numbered(n=2, height=1, width=1)
    one = replace(images, train=images.train[:1], train_labels=images.train_labels[:1])
    assert not one.normalize(one.train).any()


def test_test_images_are_normalised_like_training_images():
    images = numbered(n=40)
    images.test[:] = 255
    pixels = images.train.double() / 255
    expected = (1 - pixels.mean((0, 2, 3))) / pixels.std((0, 2, 3))
    normalised = images.normalize(images.test)[0, :, 0, 0].double()
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)


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
                    cropped = images.normalize(slow_crop(image, 2, top, left, mirror)[None])[0]
                    kinds[label, tuple(cropped.flatten().tolist())] = (top, left, mirror)
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


def change_in_content_with_the_old_date(folder: Path) -> None:
    file = folder / "train" / "cat" / "0.bmp"
    before = file.stat()
    time.sleep(0.02)  # the clock of file systems ticks some hundred times a second
    picture(7, (7, 9), "RGB").save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def one_more(folder: Path) -> None:
    picture(7, (7, 9), "RGB").save(folder / "train" / "cat" / "new.bmp")


def one_less(folder: Path) -> None:
    (folder / "test" / "dog" / "0.bmp").unlink()


def one_in_another_class(folder: Path) -> None:
    (folder / "train" / "cat" / "0.bmp").rename(folder / "train" / "dog" / "9.bmp")


@pytest.mark.parametrize(
    "change",
    [
        change_in_size,
        change_in_content_alone,
        change_in_content_with_the_old_date,
        one_more,
        one_less,
        one_in_another_class,
    ],
)
def test_a_changed_folder_is_decoded_anew(tmp_path, change):
    folder = make_folder(tmp_path / "pets", kind="bmp")
    load_folder(folder, tmp_path)
    change(folder)
    images = load_folder(folder, tmp_path)
    fresh = load(f"folder:{folder}", tmp_path / "another root", size=16)
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(images, name), getattr(fresh, name))


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
    with pytest.raises(DataError, match=r"1 of 12 files are not images that can be used") as caught:
        load_folder(folder, tmp_path)
    assert f"test/dog/1.{kind}: " in str(caught.value)
    assert "convert them, or remove them" in str(caught.value)
    assert not list((tmp_path / "root").rglob("*")), "a half-decoded folder was kept"


# ---------------------------------------------------------------------- kinds of images


def png(
    pixels: np.ndarray, bits: int, palette: np.ndarray | None = None, side: int | None = None
) -> bytes:
    """A PNG file, grey or coloured, with alpha or a palette; its header claims ``side`` as size."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    colour = 3 if palette is not None else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = pixels.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8).reshape(height, -1)
    elif bits == 8:
        packed = rows.astype(np.uint8)
    else:
        one_each = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
        packed = np.packbits(one_each.reshape(height, -1), axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    sides = [(side or n).to_bytes(4, "big") for n in (width, height)]
    header = b"".join(sides) + bytes([bits, colour, 0, 0, 0])
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if palette is not None:
        file += chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    return file + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def only(content: bytes, tmp_path: Path, name: str = "x.png", size: int = 8) -> torch.Tensor:
    """One image as a folder's images come, (3, size, size)."""
    path = tmp_path / name
    path.write_bytes(content)
    return torch.from_numpy(folders._decode(path, size).copy()).int()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(
        [(1, b) for b in (1, 2, 4, 8, 16)]
        + [(c, b) for c in (2, 3, 4) for b in (8, 16)]
        + [("palette", b) for b in (1, 2, 4, 8)]
    ),
    seed=st.integers(0, 2**32 - 1),
    highest=st.sampled_from([1.0, 0.5, 0.01]),
)
def test_drawn_images_of_all_depths_are_what_an_independent_decoding_says(
    tmp_path, kind, seed, highest
):
    channels, bits = kind
    draw = np.random.default_rng(seed)
    most = 2**bits - 1
    if channels == "palette":
        palette = draw.integers(0, 256, (2**bits, 3))
        pixels = draw.integers(0, 2**bits, (8, 8))
        decoded, expected = only(png(pixels, bits, palette), tmp_path), palette[pixels]
    else:
        pixels = draw.integers(0, max(1, int(highest * most)) + 1, (8, 8, channels))
        decoded = only(png(pixels[..., 0] if channels == 1 else pixels, bits), tmp_path)
        colours = pixels[..., [0, 0, 0]] if channels < 3 else pixels[..., :3]  # without alpha
        expected = colours * 255 / most
    distance = (decoded.permute(1, 2, 0).numpy() - expected).__abs__().max()
    # Pillow drops the lower 8 of 16 bits of colours; what is ours is rounded.
    assert distance <= (0.5 if channels == 1 or bits < 16 else 1.0)


def saved_as(image: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "JPEG2000", "PNG"])
def test_sixteen_bits_are_rounded_to_eight_in_every_format(tmp_path, kind):
    grey = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    decoded = only(saved_as(Image.fromarray(grey), kind), tmp_path)
    expected = np.round(grey / 257)
    assert all(np.array_equal(channel.numpy(), expected) for channel in decoded)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "16 bits"])
def test_photographs_are_turned_the_right_way_up(tmp_path, kind, orientation):
    draw = np.random.default_rng(1)
    grey = draw.integers(0, 256, (8, 8))
    exif = Image.Exif()
    exif[0x112] = orientation
    if kind == "16 bits":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    else:
        image = Image.fromarray(np.stack([grey] * 3, 2).astype(np.uint8))
    how = {"lossless": True} if kind == "WEBP" else {}
    content = saved_as(image, "PNG" if kind == "16 bits" else kind, exif=exif, **how)
    # EXIF 2.32, tag Orientation: where the stored first row and first column are to be.
    upright = {
        1: grey,
        2: grey[:, ::-1],
        3: grey[::-1, ::-1],
        4: grey[::-1],
        5: grey.T,
        6: grey.T[:, ::-1],
        7: grey[::-1, ::-1].T,
        8: grey.T[::-1],
    }[orientation]
    assert np.array_equal(only(content, tmp_path)[0].numpy(), upright)


def grey_of(mode: str) -> Image.Image:
    pixels = np.random.default_rng(2).integers(0, 200, (8, 8)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "TIFF"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("1", "BMP"), ("P", "PNG")],
)
def test_other_modes_are_converted_to_colour(tmp_path, mode, kind):
    image = grey_of(mode)
    how = {"lossless": True} if kind == "WEBP" else {}
    decoded = only(saved_as(image, kind, **how), tmp_path)
    expected = (grey_of("1") if mode == "1" else grey_of("L")).convert("L")
    assert np.array_equal(decoded[1].numpy(), np.asarray(expected))


def frames(kind: str) -> bytes:
    images = [grey_of("L"), grey_of("L").rotate(90)]
    return saved_as(images[0], kind, save_all=True, append_images=images[1:])


WRONG = {
    "float": (lambda: saved_as(Image.new("F", (8, 8), 0.5), "TIFF"), "floating-point"),
    "32 bits": (lambda: saved_as(Image.new("I", (8, 8), 70_000), "TIFF"), "mode I, whose range"),
    "an animation": (lambda: frames("GIF"), "2 frames"),
    "pages": (lambda: frames("TIFF"), "2 frames"),
    "a bomb": (lambda: png(np.ones((1, 1)), 8, side=40_000), "decompression bomb"),
    "nothing": (lambda: b"", "cannot identify"),
    "text": (lambda: b"notes on these images", "cannot identify"),
    "cut off": (lambda: png(np.ones((8, 8)), 8)[:-30], "truncated"),
    "no longer checked": (lambda: png(np.ones((8, 8)), 8).replace(b"IDAT", b"IDAX"), ""),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_used_is_counted_and_named(tmp_path, kind):
    content, words = WRONG[kind]
    folder = make_folder(tmp_path / "pets")
    for at in ("train/cat/wrong.png", "test/dog/wrong"):  # whatever its name ends with
        (folder / at).write_bytes(content())
    with pytest.raises(DataError, match=r"pets: 2 of 14 files are not images") as caught:
        load_folder(folder, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert [
        w for w in ("train/cat/wrong.png: ", "test/dog/wrong: ", words) if w not in message
    ] == []
    assert not (tmp_path / "root").exists()


def test_many_wrong_files_are_counted_and_some_named(tmp_path):
    folder = make_folder(tmp_path / "pets")
    for i in range(9):
        (folder / "train" / "dog" / f"x{i}.txt").write_bytes(b"?")
    with pytest.raises(DataError, match=r"9 of 21 files.*x0\.txt.*x1\.txt.*x2\.txt.*and 6 more\)"):
        load_folder(folder, tmp_path)


def test_images_are_known_by_their_content_and_hidden_files_are_passed_over(tmp_path):
    folder = make_folder(tmp_path / "pets")
    plain = load_folder(folder, tmp_path)
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "0")
    for at in (".DS_Store", "train/.DS_Store", "train/cat/._0.png", "test/dog/Thumbs.db"):
        (folder / at).write_bytes(b"?")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "notes.txt").write_text("beside the classes nothing is read")
    images = load_folder(folder, tmp_path)
    assert images.digest() == plain.digest()


def test_images_beside_the_class_folders_are_refused_by_name(tmp_path):
    folder = make_folder(tmp_path / "pets")
    for name in ("b.png", "a.JPG"):
        (folder / "train" / name).write_bytes(b"?")
    with pytest.raises(
        DataError, match=r"has 2 images outside of its class folders \(a\.JPG, b\.png"
    ):
        load_folder(folder, tmp_path)


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("train/cat/loop", "train"),
        ("train/cat/loop", "train/cat"),
        ("train/cat/loop", "."),
        ("train/wolf", "train/dog"),
        ("test/dog/more", "train/dog"),
    ],
)
def test_a_folder_that_is_met_twice_is_refused_by_name(tmp_path, link, to):
    folder = make_folder(tmp_path / "pets")
    (folder / link).symlink_to(folder / to, target_is_directory=True)
    with pytest.raises(DataError, match=r"one and the same folder.*remove the link") as caught:
        load_folder(folder, tmp_path)
    assert str(folder / link) in str(caught.value)


def test_test_images_that_are_the_training_images_are_refused(tmp_path):
    folder = make_folder(tmp_path / "pets")
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to("train", target_is_directory=True)
    with pytest.raises(DataError, match="one and the same folder"):
        load_folder(folder, tmp_path)


def test_class_folders_may_be_links_and_have_folders_in_them(tmp_path):
    folder = make_folder(tmp_path / "pets")
    plain = load_folder(folder, tmp_path)
    (folder / "train" / "cat").rename(tmp_path / "cats")
    (folder / "train" / "cat").symlink_to(tmp_path / "cats", target_is_directory=True)
    (tmp_path / "cats" / "z").mkdir()
    (tmp_path / "cats" / "3.png").rename(tmp_path / "cats" / "z" / "3.png")
    assert load_folder(folder, tmp_path).digest() == plain.digest()


@pytest.mark.parametrize("what", ["link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, what):
    folder = make_folder(tmp_path / "pets")
    path = folder / "train" / "cat" / "x.png"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("x.png" if "itself" in what else "nowhere")
    with pytest.raises(DataError, match=r"1 of 13 files.*train/cat/x\.png: is no file"):
        load_folder(folder, tmp_path)


def test_names_that_are_no_text_are_read(tmp_path):
    folder = make_folder(tmp_path / "pets")
    plain = load_folder(folder, tmp_path)
    cats = os.fsencode(folder / "train" / "cat")
    os.rename(cats + b"/3.png", cats + b"/3\xff.png")
    assert load_folder(folder, tmp_path).digest() == plain.digest()


def test_one_class_is_refused(tmp_path):
    folder = make_folder(tmp_path / "pets")
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "dog")
    with pytest.raises(DataError, match=r"has the classes \['cat'\]; it takes two folders or more"):
        load_folder(folder, tmp_path)


def test_images_that_change_while_they_are_decoded_are_refused(tmp_path, monkeypatch):
    folder, decode = make_folder(tmp_path / "pets"), folders._decode

    def slow(file, side):
        one_more_image = folder / "train" / "cat" / "0.png"
        picture(9, (9, 9), "RGB").save(one_more_image)
        return decode(file, side)

    monkeypatch.setattr(folders, "_decode", slow)
    with pytest.raises(DataError, match=r"changed while it was read; run again"):
        load_folder(folder, tmp_path)
    assert not (tmp_path / "root").exists()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_cache_is_refused_with_the_remedy(tmp_path_factory, draw):
    tmp_path = tmp_path_factory.mktemp("damaged")
    folder = make_folder(tmp_path / "pets")
    first = load_folder(folder, tmp_path)
    (cache,) = (tmp_path / "root" / "decoded").iterdir()
    cache.write_bytes(damaged(draw, cache.read_bytes()))
    with pytest.raises(
        DataError, match=r"cannot be read.*delete it, and the images are decoded anew"
    ):
        load_folder(folder, tmp_path)
    cache.unlink()
    assert load_folder(folder, tmp_path).digest() == first.digest()


def test_the_order_is_that_of_torchvisions_image_folders(tmp_path):
    folder = make_folder(tmp_path / "pets")
    for at in ("a/b/1.png", "a/1.png", "a.b/1.png", "B/1.png", "a/b.c/1.png", "10.png", "9.png"):
        file = folder / "train" / "cat" / at
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(len(at), (8, 8), "RGB").save(file)
    classes = folders._classes(folder / "train", {})
    expected = torchvision.datasets.ImageFolder(str(folder / "train"))
    assert list(classes) == expected.classes
    listed = [(str(f), i) for i, of in enumerate(classes.values()) for f in of]
    assert listed == expected.samples


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
    for pixels, labels, train in (
        (images.train, images.train_labels, True),
        (images.test, images.test_labels, False),
    ):
        fake = Fake("", train, False)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (len(fake.data), 3, 32, 32)
        assert labels.tolist() == fake.targets
        draw = random.Random(0)
        for _ in range(50):
            i, y, x, c = (draw.randrange(n) for n in fake.data.shape)
            assert pixels[i, c, y, x] == fake.data[i, y, x, c]


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
    parted = load("digits", Path("unused"), train=900, validation=300)
    assert parted.label == "digits, 900 training images, 300 for validation"
    assert (len(parted.train), len(parted.test)) == (900, 300)

    def names(images):
        return [image.numpy().tobytes() for image in images]

    known, apart, tested = (Counter(names(i)) for i in (digits.train, parted.test, digits.test))
    assert not Counter(names(parted.train)) + apart - known
    assert not apart & (tested - known)
    assert parted.test_labels.bincount().tolist() == pytest.approx([30] * 10, abs=2)


def test_without_a_number_all_other_images_are_trained_on(digits):
    images = load("digits", Path("unused"), validation=297)
    assert (len(images.train), len(images.test)) == (1000, 297)
    assert images.label == "digits, 1,000 training images, 297 for validation"


@pytest.mark.parametrize(("train", "validation"), [(1298, None), (1000, 298), (None, 1297)])
def test_more_images_than_there_are_are_refused_with_the_numbers(train, validation):
    with pytest.raises(DataError, match=r"digits has 1297 training images.*lower data.train"):
        load("digits", Path("unused"), train=train, validation=validation)


def test_a_label_is_for_folders_only():
    with pytest.raises(DataError, match="digits has a name of its own"):
        load("digits", Path("unused"), label="CIFAR-10")
