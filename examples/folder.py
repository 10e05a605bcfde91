"""Your own pictures, a folder per class: a student with and without a teacher that knows ImageNet.

    accelerate launch examples/folder.py --data FOLDER
    accelerate launch examples/folder.py --demo

FOLDER has a folder of pictures for each class, or train/ and test/ with these in them.
"""

import hashlib
import sys
from pathlib import Path

from accelerate import PartialState
from paper.datasets.class_folders import ClassFolders, read_class_folders
from paper.datasets.photographs import ImageList
from paper.demo import write_class_folders
from paper.program import DataSet, main
from paper.settings import Settings

SHOWN = 10


def read(folder: Path, settings: Settings) -> tuple[ImageList, ImageList]:
    """Reads a folder; says what is left out of it."""
    root = folder.resolve()
    copies = Path("runs", "pictures", f"{root.name}-{hashlib.sha256(bytes(root)).hexdigest()[:8]}")
    found = read_class_folders(
        root,
        copies,
        side=2 * settings.image_size,
        least=settings.images_per_class or 3,
        workers=settings.workers,
        show_progress=PartialState().is_main_process,
    )
    if PartialState().is_main_process:
        tell(found, copies / "left-out.txt")
    return found.train, found.test


def tell(found: ClassFolders, file: Path) -> None:
    """Prints the classes and what was left out, all of which is in a file, too."""
    told = "".join(f"{x}\n" for x in found.left_out)
    file.write_bytes(told.encode(errors="surrogateescape"))
    shown = [f"Left out: {x}" for x in found.left_out[:SHOWN]]
    more = [f"... and more: {file}"] if len(found.left_out) > SHOWN else []
    for line in [*shown, *more, f"Classes: {', '.join(found.classes)}"]:
        print(line.encode(errors="replace").decode(), file=sys.stderr)


if __name__ == "__main__":
    main(
        DataSet(
            description=__doc__.splitlines()[0],
            folder=None,
            read=read,
            instructions=(
                "Make a folder for each class and put its pictures in it: --data FOLDER is the "
                "folder that these are in."
            ),
            write=write_class_folders,
        )
    )
