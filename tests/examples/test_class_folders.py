from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="needs the examples extra")
pytest.importorskip("torch", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")

import numpy as np
from paper.datasets.class_folders import ClassFolders, read_class_folders
from PIL import Image


def write(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Writes pictures that differ, whose numbers begin somewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(first, first + count)]
    for path in paths:
        noise = np.random.default_rng([int(path.stem), *str(folder).encode()])
        pixels = noise.integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def read(root: Path, **options: int) -> ClassFolders:
    return read_class_folders(root, root.parent / "copies", side=8, show_progress=False, **options)


def names(folders: ClassFolders) -> list[set[str]]:
    return [{path.name for path in part.paths} for part in (folders.train, folders.test)]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pictures"
    write(root / "birds", 10)
    write(root / "fish", 5)
    write(root / "fish/of the sea", 5, first=5)
    return root


def test_a_fifth_of_each_class_is_for_the_test_whatever_else_is_there(root):
    before = read(root)
    assert before.classes == ("birds", "fish")
    assert before.train.labels == (0,) * 8 + (1,) * 8
    assert before.test.labels == (0,) * 2 + (1,) * 2
    assert before.left_out == ()
    write(root / "cows", 10)
    after = read(root)
    assert after.classes == ("birds", "cows", "fish")
    kept = [path for path, label in zip(*vars(after.test).values(), strict=True) if label != 1]
    assert kept == list(before.test.paths)


def test_folders_for_training_and_the_test_are_as_they_are(tmp_path):
    for part, count in (("train", 6), ("Val", 2), ("extra", 1)):
        for name in ("birds", "fish"):
            write(tmp_path / "pictures" / part / name, count)
    folders = read(tmp_path / "pictures")
    assert folders.classes == ("birds", "fish")
    assert folders.train.labels == (0,) * 6 + (1,) * 6
    assert folders.test.labels == (0, 0, 1, 1)
    (left_out,) = folders.left_out
    assert "extra: it is neither train nor Val" in left_out


def test_a_picture_for_training_and_the_test_is_for_the_test(tmp_path):
    root = tmp_path / "pictures"
    for name in ("birds", "fish"):
        write(root / "train" / name, 6)
        write(root / "test" / name, 2)
    (root / "test/fish/same.png").write_bytes((root / "train/fish/000.png").read_bytes())
    folders = read(root)
    assert folders.train.labels.count(1) == 5
    assert "same.png.png" in names(folders)[1]
    assert any("000.png: the same picture is there once more" in x for x in folders.left_out)


def test_the_same_picture_is_used_once_and_not_at_all_in_two_classes(root):
    link, other = root / "fish/link.png", root / "fish/bird.bmp"
    link.symlink_to(root / "fish/001.png")
    Image.open(root / "birds/003.png").save(other)  # the same pixels in another format
    folders = read(root)
    used = [x for part in names(folders) for x in part]
    assert sum(x in used for x in ("link.png.png", "001.png.png")) >= 1
    assert folders.train.labels.count(1) + folders.test.labels.count(1) == 10
    assert folders.train.labels.count(0) + folders.test.labels.count(0) == 9
    assert "bird.bmp.png" not in used
    once, unclear = folders.left_out
    assert "the same picture is there once more" in once
    assert f"{root}/birds/003.png, {other}: it is in several classes." in unclear


def test_bad_pictures_and_other_files_are_left_out_with_their_names(root):
    (root / "fish/empty.jpg").touch()
    (root / "fish/page.png").write_text("<html>")
    (root / "fish/notes.txt").write_text("of the fish")
    (root / "fish/.hidden.png").write_text("an index of a file system")
    write(root / "fish/.thumbnails", 3)
    write(root, 1)
    folders = read(root)
    assert folders.train.labels.count(1) + folders.test.labels.count(1) == 10
    told = "\n".join(folders.left_out)
    assert f"{root}/fish/empty.jpg: expected one that can be read" in told
    assert f"{root}/fish/page.png: expected one that can be read" in told
    assert "no pictures of a class: 1 .txt, 1 in no class folder." in told
    assert ".hidden" not in told


def test_a_class_of_too_few_is_left_out_with_its_numbers(root):
    write(root / "cows", 3)
    folders = read(root, least=8)
    assert folders.classes == ("birds", "fish")
    assert folders.left_out == ("Class cows: 2 pictures for training, 1 for the test.",)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "expected a folder with a folder of pictures for each class; got no folder"),
        ("empty", r"expected two classes or more, .*; got 0\. Left out: nothing"),
        ("one class", r"expected two classes or more, .*; got 1\."),
        (
            "no folders",
            r"expected two .*; got 0\. Left out:\n  Files that are no .* 4 in no class folder",
        ),
    ],
)
def test_a_folder_without_classes_is_named(tmp_path, kind, message):
    root = tmp_path / "pictures"
    if kind != "nothing":
        root.mkdir()
    if kind == "one class":
        write(root / "birds", 10)
    if kind == "no folders":
        write(root, 4)
    with pytest.raises(FileNotFoundError, match=rf"(?s)pictures: {message}"):
        read(root)


def test_folders_that_link_to_each_other_end(root):
    (root / "fish/birds").symlink_to(root / "birds")
    (root / "birds/fish").symlink_to(root / "fish")
    assert len(read(root).train.labels) == 16
