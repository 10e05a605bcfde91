"""Archives from the network: checked before they are opened, opened inside their folder."""

import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets.utils import download_url


def download(url: str, path: Path, digest: str | None = None) -> None:
    """Fetches a file, unless it is there, and checks it.

    Args:
        url: where it is.
        path: where it goes.
        digest: ``algorithm:hexadecimal digits``; None for a file that has none.

    Raises:
        ConnectionError: if it cannot be fetched: what to put where.
        ValueError: if what is there has another digest.
    """
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            download_url(url, str(path.parent), filename=partial.name)
        except (URLError, OSError, RuntimeError) as error:
            raise ConnectionError(
                f"{path}: expected a download; got {error}. Fetch {url} on a machine with a "
                "network and put it there; --demo needs no download."
            ) from error
        partial.rename(path)
    if digest is not None:
        check_digest(path, digest)


def check_digest(path: Path, digest: str) -> None:
    """Compares a file with its published digest.

    Raises:
        ValueError: if it is another file, or a part of it.
    """
    algorithm, _, expected = digest.partition(":")
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    if hashed.hexdigest() != expected:
        raise ValueError(
            f"{path}: expected {algorithm} {expected}; got {hashed.hexdigest()}. The file is "
            "truncated or another one: delete it and fetch it again."
        )


def unpack(archive: Path, top: str, folder: Path) -> None:
    """Unpacks one top folder of a tar archive; it is complete as soon as it exists.

    Args:
        archive: the file, its digest checked.
        top: the folder's name in the archive; what else is in there is left out.
        folder: where it goes.

    Raises:
        ValueError: if a member would leave the folder, or the archive cannot be read.
    """
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / top).rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{archive}: expected a readable archive with {top}/ in it, whose members stay "
            f"in their folder; got {type(error).__name__}: {error}. Nothing of it is used: delete "
            "it and fetch it again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
