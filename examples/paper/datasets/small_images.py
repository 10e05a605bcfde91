"""Small images in memory: CIFAR, Fashion-MNIST, MNIST, scikit-learn's digits, clip art."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from paper.once import one_at_a_time
from paper.weights import IMAGENET_MEAN, IMAGENET_STD

from .clip_art import read_clip_art
from .idx_files import read_idx


@dataclass(frozen=True)
class Format:
    """What a data set's images are like.

    Args:
        size: height and width.
        classes: how many.
        training_images: how many.
        flips: whether a mirrored image is still of its class; a digit is not.
        source: the class of torchvision's that fetches it, if there is one.
        archive: what to fetch by hand, and where it belongs in the folder.
        padding: how far a crop may be shifted for training.
        background: what is seen beyond an image's border then, from 0 to 255.
        statistics: mean and standard deviation of each channel, from 0 to 1, that images are
            normalized with; None is those of the data set's own images.
    """

    size: int
    classes: int
    training_images: int
    flips: bool
    source: Any = None
    archive: str = ""
    padding: int = 4
    background: int = 0
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


_IDX = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    "t10k-labels-idx1-ubyte.gz"
)
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-"


def _clip_art(size: int) -> Format:
    return Format(
        size,
        21,
        800,
        True,
        archive="Debian's package openclipart-png",
        padding=size // 8,
        background=255,
        statistics=(IMAGENET_MEAN, IMAGENET_STD),  # a teacher's that has ImageNet's weights
    )


FORMATS = {
    "cifar10": Format(
        32, 10, 50_000, True, torchvision.datasets.CIFAR10, f"{_CIFAR}10-python.tar.gz, unpacked"
    ),
    "cifar100": Format(
        32, 100, 50_000, True, torchvision.datasets.CIFAR100, f"{_CIFAR}100-python.tar.gz, unpacked"
    ),
    "fashion-mnist": Format(
        28,
        10,
        60_000,
        True,
        torchvision.datasets.FashionMNIST,
        f"{_IDX} of https://github.com/zalandoresearch/fashion-mnist (Debian's package "
        "dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist)",
    ),
    "mnist": Format(
        28,
        10,
        60_000,
        False,
        torchvision.datasets.MNIST,
        f"{_IDX} of https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "digits": Format(28, 10, 898, False),
    "openclipart": _clip_art(64),
    "openclipart-96": _clip_art(96),
    "openclipart-128": _clip_art(128),
}


@dataclass(frozen=True)
class Images:
    """Images ``(N, channels, H, W)`` as bytes, and their classes ``(N,)``."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SmallImages:
    """A data set: the images for training and those for the test, and what they are like.

    The statistics are what images are normalized with: mean and standard deviation of each
    channel, from 0 to 255, both ``(channels,)``.
    """

    train: Images
    test: Images
    format: Format
    mean: Tensor
    std: Tensor


def read_small_images(
    name: str, folder: Path, *, download: bool = False, work: Path = Path("runs/pictures")
) -> SmallImages:
    """Reads a data set.

    Args:
        name: one of :data:`FORMATS`.
        folder: torchvision's root of it; for both MNISTs also the folder of the four idx files,
            compressed or not. Not read for ``digits``, which scikit-learn carries.
        download: fetches it into the folder first.
        work: folder for small copies of ``openclipart``'s pictures.

    Raises:
        FileNotFoundError: if it is not there: what to fetch, and where it goes.
        ConnectionError: if it cannot be fetched: the same.
        ValueError: if a file of it is damaged.
    """
    form = FORMATS[name]
    if download and form.source is not None and not _is_there(form.source, folder):
        _fetch(name, folder)
    if name == "digits":
        parts = _digits(form.size)
    elif name.startswith("openclipart"):
        parts = tuple(Images(*part) for part in read_clip_art(folder, work, form.size))
    elif name.startswith("cifar"):
        parts = tuple(_cifar(name, folder, train) for train in (True, False))
    else:
        parts = tuple(_idx(name, folder, part) for part in ("train", "t10k"))
    if form.statistics is not None:
        mean, std = (255 * torch.tensor(x) for x in form.statistics)
    else:
        std, mean = torch.std_mean(parts[0].pixels.float(), dim=(0, 2, 3))
    return SmallImages(*parts, form, mean, std)


def _is_there(source: Any, folder: Path) -> bool:
    if any(folder.glob("train-images-idx3-ubyte*")):  # not in the folders that torchvision makes
        return True
    if (raw := folder / source.__name__ / "raw").is_dir():  # damaged ones are named when read
        kinds = ("images-idx3", "labels-idx1")
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]
        return all((raw / name).exists() for name in names)
    try:
        for train in (True, False):
            source(folder, train=train)
    except RuntimeError:  # missing, or damaged
        return False
    return True


def _fetch(name: str, folder: Path) -> None:
    try:
        with one_at_a_time(folder / name):  # torchvision fetches nothing that is there by then
            for train in (True, False):
                FORMATS[name].source(folder, train=train, download=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{folder}: expected a download of {name}; got {reason}. Fetch {FORMATS[name].archive} "
            "on a machine with a network, and name the folder that holds it: --data PATH."
        ) from error


def _cifar(name: str, folder: Path, train: bool) -> Images:
    form = FORMATS[name]
    if not (folder / form.source.base_folder).is_dir():
        raise FileNotFoundError(_missing(name, folder / form.source.base_folder))
    try:
        found = form.source(folder, train=train)
    except RuntimeError as error:  # torchvision has compared the files' digests
        raise ValueError(
            f"{folder / form.source.base_folder}: expected {name}'s files; got damaged ones "
            f"({error}). Delete the folder and fetch {form.archive}."
        ) from error
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(found.targets))


def _idx(name: str, folder: Path, part: str) -> Images:
    raw = folder / FORMATS[name].source.__name__ / "raw"
    found = next((x for x in (folder, raw) if list(x.glob("train-images-idx3-ubyte*"))), None)
    if found is None:
        raise FileNotFoundError(_missing(name, folder))
    pixels = read_idx(found / f"{part}-images-idx3-ubyte")
    labels = read_idx(found / f"{part}-labels-idx1-ubyte")
    classes = FORMATS[name].classes
    if len(pixels) != len(labels) or int(labels.max()) >= classes:
        raise ValueError(
            f"{found / part}-labels-idx1-ubyte: expected {len(pixels)} labels below {classes}; "
            f"got {len(labels)} up to {int(labels.max())}. Fetch the files again."
        )
    return Images(pixels.unsqueeze(1), labels.long())


def _digits(size: int) -> tuple[Images, Images]:
    """Returns the two halves of scikit-learn's collection, enlarged from 8 x 8."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, (size, size), mode="bilinear").round().byte()
    targets, half = torch.from_numpy(labels).long(), len(labels) // 2
    return Images(large[:half], targets[:half]), Images(large[half:], targets[half:])


def _missing(name: str, place: Path) -> str:
    return (
        f"{place}: expected {name}; got no such files. Fetch {FORMATS[name].archive}, and name the "
        "folder that holds it: --data PATH. With a network, --download does that."
    )
