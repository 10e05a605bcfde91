"""The idx files of MNIST and Fashion-MNIST, compressed or not."""

import gzip
import tempfile
from pathlib import Path

from torch import Tensor
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor


def read_idx(path: Path) -> Tensor:
    """Reads an idx file.

    Args:
        path: without ``.gz``, which is tried too.

    Returns:
        The bytes, in the shape that the file names.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file is truncated or corrupt; with its path.
    """
    compressed = path.with_name(path.name + ".gz")
    found = path if path.exists() else compressed
    try:
        if found is path:
            return read_sn3_pascalvincent_tensor(str(path))
        with tempfile.NamedTemporaryFile() as plain:  # torchvision reads plain files only
            plain.write(gzip.decompress(compressed.read_bytes()))
            plain.flush()
            return read_sn3_pascalvincent_tensor(plain.name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: expected it or {compressed.name}; got neither. Fetch the data set again."
        ) from error
    # Each of gzip, zlib and torchvision's reader has errors of its own for damaged bytes.
    except Exception as error:
        raise ValueError(
            f"{found}: expected an idx file that can be read to its end; got "
            f"{type(error).__name__}: {error}. Fetch the file again."
        ) from error
