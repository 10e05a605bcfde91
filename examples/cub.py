"""CUB-200-2011 in the paper's Table 2: few images of birds, and a teacher that knows ImageNet.

    accelerate launch examples/cub.py
    accelerate launch examples/cub.py --demo

What is missing is fetched: 1.1 GB of birds and 83 MB of a teacher. The demo needs no network.
"""

from pathlib import Path

from paper.datasets.archives import download, unpack
from paper.datasets.photographs import read_cub
from paper.demo import write_cub
from paper.program import DataSet, main

URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
DIGEST = "md5:97eceeb196236b17998738112f37df78"


def fetch(folder: Path) -> None:
    """Downloads and unpacks the data set."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive = folder.parent / "CUB_200_2011.tgz"
    if not folder.exists():
        download(URL, archive, DIGEST)
        unpack(archive, "CUB_200_2011", folder)


if __name__ == "__main__":
    main(
        DataSet(
            description=__doc__.splitlines()[0],
            folder=Path("data/CUB_200_2011"),
            read=lambda folder, settings: read_cub(folder),
            instructions=(
                f"Fetch {URL} (1.1 GB, {DIGEST}), unpack it, and pass the folder that has "
                "images.txt in it: --data .../CUB_200_2011"
            ),
            write=write_cub,
            name="cub",
            fetch=fetch,
        )
    )
