"""Debian's clip art as a data set: coloured pictures of 21 classes, in memory."""

from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .class_folders import read_class_folders
from .photographs import ImageList

# Folders of the package openclipart-png that show things, with 28 pictures or more.
FOLDERS = (
    "animals/birds",
    "animals/bugs",
    "animals/mammals",
    "buildings/homes",
    "computer/hardware",
    "food/beverages",
    "food/breads_and_carbs",
    "food/desserts",
    "food/fruit",
    "food/meats_and_eggs",
    "people/bodypart",
    "plants/flowers",
    "recreation/holiday",
    "recreation/music",
    "recreation/party",
    "recreation/sports",
    "recreation/toys",
    "tools/weapons",
    "transportation/boating",
    "transportation/roadsigns",
    "transportation/vehicles",
)
_TEST_SHARE = 0.25  # of each class


def read_clip_art(root: Path, work: Path, size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Reads the pictures for training and those for the test, and the class of each.

    A picture is shrunk until it fits into a square, and lies on white.

    Args:
        root: the folder with ``animals/``, ``food/`` and so on.
        work: folder of what is kept: small copies, since some pictures have 169 megapixels.
        size: height and width.

    Returns:
        Twice the pixels ``(N, 3, size, size)`` as bytes, and the labels.

    Raises:
        FileNotFoundError: if a folder of a class is missing.
    """
    missing = [folder for folder in FOLDERS if not (root / folder).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{root / missing[0]}: expected openclipart; got no such folder. Fetch Debian's "
            "package openclipart-png, and pass --data /usr/share/openclipart/png."
        )
    classes = work / "classes"  # one beside the other, as the reader of class folders wants them
    classes.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        _link(classes / Path(folder).name, (root / folder).resolve())
    found = read_class_folders(
        classes, work / "copies", side=size, test_share=_TEST_SHARE, show_progress=False
    )
    return tuple(_tensors(part, size) for part in (found.train, found.test))


def _link(link: Path, folder: Path) -> None:
    """Makes a link, or points it at another folder; other workers may do the same by now."""
    if link.is_symlink() and link.readlink() == folder:
        return
    new = link.with_name(f".{link.name}-{uuid4().hex}")  # hidden: it is no class
    new.symlink_to(folder, target_is_directory=True)
    new.replace(link)


def _tensors(images: ImageList, size: int) -> tuple[Tensor, Tensor]:
    pixels = []
    for path in images.paths:
        with Image.open(path) as image:
            square = ImageOps.pad(image.convert("RGB"), (size, size), color="white")
        pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(pixels), torch.tensor(images.labels)
