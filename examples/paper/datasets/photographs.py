"""CUB-200-2011 and MIT-67, read from their official folders and lists."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .pictures import read_image


@dataclass(frozen=True)
class ImageList:
    """Image files and the class of each, counted from 0."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Reads the images of a list, every one as RGB.

    Args:
        images: the list.
        transform: from a PIL image to the model's input.
    """

    def __init__(self, images: ImageList, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns an image and its class.

        Raises:
            ValueError: if the file is no image or a part of one; with its path.
        """
        return self.transform(read_image(self.images.paths[index])), self.images.labels[index]


def read_cub(root: Path) -> tuple[ImageList, ImageList]:
    """Reads CUB-200-2011's lists of training and of test images.

    Args:
        root: the folder with ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``
            and ``images/``.

    Returns:
        The images for training and those for the test.

    Raises:
        FileNotFoundError: if a list or an image is missing.
        ValueError: if a list is truncated or corrupt, or an image is empty.
    """
    names = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    split = _table(root / "train_test_split.txt")
    for file, table in (("image_class_labels.txt", labels), ("train_test_split.txt", split)):
        if table.keys() != names.keys():
            differing = sorted(table.keys() ^ names.keys(), key=int)
            raise ValueError(
                f"{root / file}: expected the {len(names)} images of images.txt; got "
                f"{len(table)}, and image {differing[0]} is in one of the two only. One of the "
                "files was truncated: unpack the archive again."
            )
    numbers = {image: _number(root / "image_class_labels.txt", x) for image, x in labels.items()}
    _check_classes(root / "image_class_labels.txt", numbers.values())
    flags = {image: _number(root / "train_test_split.txt", x) for image, x in split.items()}
    if not set(flags.values()) <= {0, 1}:
        raise ValueError(
            f"{root / 'train_test_split.txt'}: expected 0 or 1 for each image; got "
            f"{sorted(set(flags.values()))}. Unpack the archive again."
        )
    paths = {image: root / "images" / name for image, name in names.items()}
    check_images(root / "images.txt", paths.values())

    def part(flag: int) -> ImageList:
        images = [image for image in names if flags[image] == flag]
        return ImageList(
            tuple(paths[image] for image in images), tuple(numbers[image] - 1 for image in images)
        )

    return part(1), part(0)


def read_mit67(root: Path) -> tuple[ImageList, ImageList]:
    """Reads MIT-67's official lists of training and of test images.

    Args:
        root: the folder with ``TrainImages.txt``, ``TestImages.txt`` and ``Images/``.

    Returns:
        The images for training and those for the test. Classes are in alphabetical order.

    Raises:
        FileNotFoundError: if a list or an image is missing.
        ValueError: if a list is truncated or corrupt, or an image is empty.
    """
    train, test = _lines(root / "TrainImages.txt"), _lines(root / "TestImages.txt")
    both = set(train) & set(test)
    if both:
        raise ValueError(
            f"{root / 'TestImages.txt'}: expected other images than TrainImages.txt; got "
            f"{sorted(both)[0]!r} in both. Fetch the lists again."
        )
    folders = {name.split("/")[0] for name in train}
    differing = sorted(folders ^ {name.split("/")[0] for name in test})
    if differing:
        raise ValueError(
            f"{root / 'TestImages.txt'}: expected the classes of TrainImages.txt; got "
            f"{differing[0]!r} in one of the two only. One of the files was truncated: fetch "
            "the lists again."
        )
    classes = {folder: label for label, folder in enumerate(sorted(folders))}

    def part(names: list[str], source: Path) -> ImageList:
        paths = tuple(root / "Images" / name for name in names)
        check_images(source, paths)
        return ImageList(paths, tuple(classes[name.split("/")[0]] for name in names))

    return part(train, root / "TrainImages.txt"), part(test, root / "TestImages.txt")


def check_images(source: Path, paths: Iterable[Path]) -> None:
    """Looks for the images of a list, without decoding them.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is empty, or not in the list's folder.
    """
    for path in paths:
        if not path.is_relative_to(source.parent) or ".." in path.relative_to(source.parent).parts:
            raise ValueError(
                f"{source}: expected images in its own folder; got {path}. Fetch the list again."
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected an image, which {source.name} lists; got no file. The list or "
                "the folder was truncated: unpack the data set again."
            )
        if not path.stat().st_size:
            raise ValueError(
                f"{path}: expected an image; got an empty file. Unpack the data set again."
            )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a list of the data set; got no file. Check the folder."
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text; got {error}. Fetch or unpack the data set again."
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: expected a list; got an empty file. Fetch it again.")
    return names


def _table(path: Path) -> dict[str, str]:
    """Reads lines of ``number value``, in their order."""
    table: dict[str, str] = {}
    for line in _lines(path):
        number, _, value = line.partition(" ")
        if not number.isdecimal() or not value or number in table:
            raise ValueError(
                f"{path}: expected lines of a new number and a value; got {line!r}. The file is "
                "corrupt: unpack the archive again."
            )
        table[number] = value
    return table


def _number(path: Path, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(
            f"{path}: expected a number for each image; got {value!r}. The file is corrupt: "
            "unpack the archive again."
        )
    return int(value)


def _check_classes(path: Path, numbers: Iterable[int]) -> None:
    classes = sorted(set(numbers))
    if classes != list(range(1, len(classes) + 1)):
        raise ValueError(
            f"{path}: expected classes 1, 2, ... without a gap; got {classes[0]} to "
            f"{classes[-1]} in {len(classes)} classes. Unpack the archive again."
        )
