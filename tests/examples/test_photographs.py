from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")

import numpy as np
from paper.datasets.photographs import ImageFiles, read_cub, read_mit67
from paper.demo import Digits, write_cub, write_mit67
from PIL import Image
from torchvision.transforms.functional import to_tensor

CLASSES, IMAGES_EACH = 3, 4


def miniature() -> Digits:
    """Three classes of four images, the last of each class for the test."""
    count = CLASSES * IMAGES_EACH
    images = np.random.default_rng(0).integers(0, 17, size=(count, 8, 8)).astype(float)
    labels = [i // IMAGES_EACH for i in range(count)]
    return Digits(images, labels, [i % IMAGES_EACH < IMAGES_EACH - 1 for i in range(count)])


@pytest.fixture
def cub(tmp_path):
    write_cub(tmp_path, miniature())
    return tmp_path


@pytest.fixture
def mit67(tmp_path):
    write_mit67(tmp_path, miniature())
    return tmp_path


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_last_line(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_cub_is_read_with_its_split(cub):
    train, test = read_cub(cub)
    assert train.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert test.labels == (0, 1, 2)
    assert [path.parent.name for path in test.paths] == ["001.digit", "002.digit", "003.digit"]


def test_mit67_is_read_with_its_lists(mit67):
    train, test = read_mit67(mit67)
    assert train.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert test.labels == (0, 1, 2)
    assert [path.parent.name for path in test.paths] == ["class0", "class1", "class2"]


def test_names_may_have_spaces(mit67):
    (mit67 / "Images/class0/0001.png").rename(mit67 / "Images/class0/a room.png")
    replace(mit67 / "TrainImages.txt", "class0/0001.png", "class0/a room.png")
    assert read_mit67(mit67)[0].paths[0].name == "a room.png"


CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


@pytest.mark.parametrize("file", CUB_FILES)
def test_a_missing_cub_list_is_named(cub, file):
    (cub / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read_cub(cub)


@pytest.mark.parametrize("file", ["image_class_labels.txt", "train_test_split.txt"])
def test_a_cub_list_that_ends_early_is_named(cub, file):
    drop_last_line(cub / file)
    with pytest.raises(ValueError, match=rf"{file}: expected the 12 images .* got 11.* image 12"):
        read_cub(cub)


@pytest.mark.parametrize("file", CUB_FILES)
def test_an_empty_cub_list_is_named(cub, file):
    (cub / file).write_text("")
    with pytest.raises(ValueError, match=f"{file}: expected a list; got an empty file"):
        read_cub(cub)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("images.txt", "2 001", "x 001", "images.txt: expected lines of a new number"),
        ("images.txt", "2 001", "1 001", "images.txt: expected lines of a new number"),
        ("image_class_labels.txt", "1 1", "1", "labels.txt: expected lines of a new number"),
        ("image_class_labels.txt", "1 1", "1 one", "labels.txt: expected a number .* 'one'"),
        ("image_class_labels.txt", "12 3", "12 5", "labels.txt: expected classes 1, 2, .* 1 to 5"),
        ("train_test_split.txt", "1 1", "1 7", r"split.txt: expected 0 or 1 .* \[0, 1, 7\]"),
    ],
)
def test_a_corrupt_cub_list_is_named(cub, file, old, new, message):
    replace(cub / file, old, new)
    with pytest.raises(ValueError, match=message):
        read_cub(cub)


def test_a_list_that_is_no_text_is_named(cub):
    (cub / "images.txt").write_bytes(b"1 \xff\xfe\n")
    with pytest.raises(ValueError, match=r"images.txt: expected text"):
        read_cub(cub)


@pytest.mark.parametrize("file", ["TrainImages.txt", "TestImages.txt"])
def test_a_missing_mit67_list_is_named(mit67, file):
    (mit67 / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read_mit67(mit67)


def test_a_mit67_list_cut_in_a_line_is_named(mit67):
    cut(mit67 / "TestImages.txt", -6)
    with pytest.raises(FileNotFoundError, match=r"class2/001: .* which TestImages.txt lists"):
        read_mit67(mit67)


def test_a_mit67_list_without_a_class_is_named(mit67):
    drop_last_line(mit67 / "TestImages.txt")
    with pytest.raises(ValueError, match=r"TestImages.txt: .*'class2' in one of the two only"):
        read_mit67(mit67)


@pytest.mark.parametrize("name", ["class0/../../../outside.png", "/etc/hostname"])
@pytest.mark.parametrize("data", ["cub", "mit67"])
def test_a_list_that_leaves_its_folder_is_named(request, data, name):
    root = request.getfixturevalue(data)
    (root.parent / "outside.png").write_bytes(b"image")
    if data == "cub":
        replace(root / "images.txt", "001.digit/0001.png", name)
        read = read_cub
    else:
        for file in ("TrainImages.txt", "TestImages.txt"):  # a class of its own, in both
            (root / file).write_text((root / file).read_text() + f"{name}{file[:2]}\n")
        read = read_mit67
    with pytest.raises(ValueError, match=r".txt: expected images in its own folder; got "):
        read(root)


def test_an_image_for_both_training_and_test_is_named(mit67):
    replace(mit67 / "TestImages.txt", "class0/0004.png", "class0/0001.png")
    with pytest.raises(ValueError, match=r"'class0/0001.png' in both"):
        read_mit67(mit67)


def test_a_missing_image_is_named(cub):
    (cub / "images/002.digit/0005.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"002.digit/0005.png: expected an image"):
        read_cub(cub)


def test_an_empty_image_is_named(mit67):
    (mit67 / "Images/class1/0005.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class1/0005.png: .* got an empty file"):
        read_mit67(mit67)


@pytest.mark.parametrize("damage", ["truncated", "no image"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_unreadable_image_stops_with_its_path(cub, damage, suffix):
    path = cub / f"images/001.digit/0001{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if damage == "truncated":
        cut(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"<html>not found</html>")
    replace(cub / "images.txt", "0001.png", path.name)
    files = ImageFiles(read_cub(cub)[0], to_tensor)
    with pytest.raises(ValueError, match=f"Image .*0001{suffix}: expected one that can be read"):
        files[0]
    assert files[1][0].shape == (3, 8, 8)
