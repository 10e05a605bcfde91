"""MIT-67 in the paper's Table 2: few images of rooms, and a teacher that knows ImageNet.

    accelerate launch examples/mit67.py
    accelerate launch examples/mit67.py --demo

What is missing is fetched: 2.4 GB of rooms and 83 MB of a teacher. The demo needs no network.
"""

from pathlib import Path

from paper.datasets.archives import download, unpack
from paper.datasets.photographs import read_mit67
from paper.demo import write_mit67
from paper.program import DataSet, main

URL = "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar"
# Its authors publish no digest. This is what the dataset package vipy has of it.
DIGEST = "sha1:0b252516e746ba428b96af408d2e8162d9b08ac5"
LISTS = "http://web.mit.edu/torralba/www/"


def fetch(folder: Path) -> None:
    """Downloads the two lists and the images, and unpacks these."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("TrainImages.txt", "TestImages.txt"):
        download(LISTS + name, folder / name)
    if not (folder / "Images").exists():
        archive = folder / "indoorCVPR_09.tar"
        download(URL, archive, DIGEST)
        unpack(archive, "Images", folder / "Images")


if __name__ == "__main__":
    main(
        DataSet(
            description=__doc__.splitlines()[0],
            folder=Path("data/MIT-67"),
            read=lambda folder, settings: read_mit67(folder),
            instructions=(
                f"Fetch {URL} (2.4 GB), {LISTS}TrainImages.txt and {LISTS}TestImages.txt, unpack "
                "the archive beside the lists, and pass that folder, with Images/ in it: --data "
                "PATH"
            ),
            write=write_mit67,
            name="mit67",
            fetch=fetch,
        )
    )
