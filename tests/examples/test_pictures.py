import os
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="needs the examples extra")
pytest.importorskip("tqdm", reason="needs the examples extra")

import numpy as np
from paper.datasets.pictures import copy_small, read_image
from PIL import Image

RED, WHITE = (200, 40, 40), (255, 255, 255)


def near(image: Image.Image, place: tuple[int, int], color: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(image.getpixel(place), color, strict=True)) < 30


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    if suffix == ".jpg" and mode in ("LA", "P", "RGBA"):
        mode = "L"
    if suffix == ".png" and mode == "CMYK":
        suffix = ".tif"
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (20, 10), (200, 200, 200)).convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_cmyk_keeps_its_colors(tmp_path):
    Image.new("RGB", (8, 8), (200, 40, 40)).convert("CMYK").save(tmp_path / "red.jpg")
    red, green, blue = read_image(tmp_path / "red.jpg").getpixel((4, 4))
    assert red > 180
    assert max(green, blue) < 60


def half_red(mode: str) -> Image.Image:
    """A picture whose left half is red and whose right half is transparent, blue underneath."""
    image = Image.new("RGBA", (16, 16), (0, 0, 200, 0))
    image.paste((*RED, 255), (0, 0, 8, 16))
    return image.convert("P") if mode == "P" else image


@pytest.mark.parametrize(
    "file", ["rgba.png", "rgba.webp", "rgba.tif", "palette.png", "of palette.gif"]
)
def test_what_is_transparent_is_white(tmp_path, file):
    image = half_red("P" if file == "palette.png" else "RGBA")
    options = {"lossless": True} if file.endswith("webp") else {}
    image.save(tmp_path / file, **options)
    assert near(read_image(tmp_path / file), (2, 8), RED)
    assert near(read_image(tmp_path / file), (13, 8), WHITE)


def test_gray_and_transparent_is_white(tmp_path):
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "gray.png")
    assert near(read_image(tmp_path / "gray.png"), (4, 4), WHITE)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_of_16_bits_keeps_its_brightness(tmp_path, suffix):
    pixels = np.full((8, 8), 100 * 257, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"gray{suffix}")
    assert near(read_image(tmp_path / f"gray{suffix}"), (4, 4), (100, 100, 100))


@pytest.mark.parametrize("file", ["moves.gif", "moves.png", "moves.webp", "pages.tif"])
def test_the_first_picture_of_an_animation_is_read(tmp_path, file):
    first, second = (Image.new("RGB", (16, 16), color) for color in (RED, WHITE))
    first.save(tmp_path / file, save_all=True, append_images=[second])
    assert near(read_image(tmp_path / file), (8, 8), RED)


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.new("RGB", (20, 10), RED).save(tmp_path / "lying.jpg", exif=exif)
    assert read_image(tmp_path / "lying.jpg").size == (10, 20)


def bomb(path: Path) -> None:
    """A PNG that says it has 400 megapixels, in a few bytes."""
    Image.new("1", (20000, 20000)).save(path)


def floats(path: Path) -> None:
    Image.new("F", (8, 8)).save(path, "TIFF")


def page(path: Path) -> None:
    path.write_text("<html>not found</html>")


def postscript(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "EPS")


def cut(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])


UNUSABLE = [bomb, floats, page, postscript, cut, Path.touch, Path.mkdir]


@pytest.mark.parametrize("write", UNUSABLE, ids=lambda write: write.__name__)
def test_what_cannot_be_read_is_named_and_leaves_no_copy(tmp_path, write):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (8, 8)).save(good)
    write(bad)
    targets = {bad: tmp_path / "copies/bad.png", good: tmp_path / "copies/good.png"}
    reasons = copy_small(targets, 8, 2, show_progress=False)
    assert list(reasons) == [bad]
    assert reasons[bad].startswith(f"Image {bad}: expected one that can be read; got ")
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 6), (8, 6)),
        ((400, 100), (128, 32)),
        ((100, 1000), (32, 128)),  # the middle of it
        ((1, 5000), (1, 4)),
        ((9600, 9600), (32, 32)),  # more than Pillow takes without a warning
    ],
)
def test_copies_are_small_and_as_wide_as_their_pictures(tmp_path, size, expected):
    Image.new("L", size, 90).save(tmp_path / "picture.png")
    target = tmp_path / "copies/deep/picture.png"
    assert copy_small({tmp_path / "picture.png": target}, 32, 1, show_progress=False) == {}
    copy = Image.open(target)
    assert (copy.mode, copy.size) == ("RGB", expected)
    assert near(copy, (0, 0), (90, 90, 90))


def test_a_picture_is_copied_once_and_again_when_it_changes(tmp_path):
    source, target = tmp_path / "picture.png", tmp_path / "copy.png"
    Image.new("RGB", (8, 8), RED).save(source)
    copy_small({source: target}, 8, 1, show_progress=False)
    written = target.stat().st_ctime_ns
    copy_small({source: target}, 8, 1, show_progress=False)
    assert target.stat().st_ctime_ns == written
    Image.new("RGB", (8, 8), WHITE).save(source)
    os.utime(source, (10**9, 10**9))
    copy_small({source: target}, 8, 1, show_progress=False)
    assert near(Image.open(target), (4, 4), WHITE)
