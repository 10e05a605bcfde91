"""Archives from the network: checked before they are opened, opened inside their folder.

Programs that start together wait for the one that is at it, by a lock beside the file.
"""

import gzip
import hashlib
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import URLError
from urllib.request import Request, urlopen

from torchvision.datasets.utils import download_url

from paper.once import make_once

_MAX_BYTES = 16 * 2**30  # of an archive, unpacked: MIT-67 has 2.4 GB
_MAX_FILES = 10**6
_MAX_READ = 2**20
_SECONDS = 10  # that a server has to say how large a file is


def download(url: str, path: Path, digest: str | None = None) -> None:
    """Fetches a file, unless it is there, and checks it; says first what, and how large it is.

    Args:
        url: where it is.
        path: where it goes.
        digest: ``algorithm:hexadecimal digits``; None for a file that has none.

    Raises:
        ConnectionError: if it cannot be fetched: what to put where.
        ValueError: if what is there has another digest.
    """
    try:
        make_once(path, lambda: _fetch(url, path))
    except (URLError, OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{path}: expected a download; got {error}. Fetch {url} on a machine with a "
            "network and put it there; --demo needs no download."
        ) from error
    if digest is not None:
        check_digest(path, digest)


def _fetch(url: str, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    print(f"{path}: {_size_of(url)} from {url}", file=sys.stderr)
    download_url(url, str(path.parent), filename=partial.name)
    partial.rename(path)


def _size_of(url: str) -> str:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_SECONDS) as answer:
            size = int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):  # no network, or a server that does not say
        return "a file of unknown size"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


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

    Plain files alone, each under a path that is checked here: the ``filter`` of Pythons before
    3.11.13 and 3.12.11 can be led out of its folder by links (CVE-2025-4517).

    Args:
        archive: the file, its digest checked; with gzip or as it is.
        top: the folder's name in the archive; what else is in there is left out.
        folder: where it goes.

    Raises:
        ValueError: if a member is a link or would leave the folder, if the archive cannot be read
            to its end, or holds more than a data set of images does.
    """
    make_once(folder, lambda: _unpack(archive, top, folder))


def _unpack(archive: Path, top: str, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _opened(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= _MAX_FILES:
                    raise tarfile.ReadError(f"more than {_MAX_FILES} files")
                _unpack_member(tar, member, partial)
            _read_to_the_end(file, tar.offset)
        (partial / top).rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{archive}: expected a readable archive with {top}/ in it, whose members stay "
            f"in their folder; got {type(error).__name__}: {error}. Nothing of it is used: delete "
            "it and fetch it again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Bounded:
    """A file for tarfile to read, of which no more is read at once than is meant to be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        """Reads some bytes: a header of gigabytes would be taken into memory as one."""
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        """Goes on to a place, which in gzip means to unpack all before it."""
        if position > _MAX_BYTES:
            raise tarfile.ReadError(f"more than {_MAX_BYTES} bytes")
        return self._file.seek(position)


@contextmanager
def _opened(archive: Path) -> Iterator[_Bounded]:
    with archive.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with gzip.open(plain) if packed else nullcontext(plain) as file:
            yield _Bounded(file)


def _read_to_the_end(file: _Bounded, position: int) -> None:
    """After the last member: a mark, and in gzip a checksum of all."""
    file.seek(position)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no mark at its end")
    while file.read(_MAX_READ):
        if file.tell() > _MAX_BYTES:
            raise tarfile.ReadError(f"more than {_MAX_BYTES} bytes")


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name:
        raise tarfile.ReadError(f"the name {member.name!r}")
    if member.offset_data + member.size > _MAX_BYTES:
        raise tarfile.ReadError(f"more than {_MAX_BYTES} bytes")
    path = folder.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    source = tar.extractfile(member) if member.isreg() else None
    if source is None:
        raise tarfile.ReadError(f"{member.name!r}, which is no plain file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _MAX_READ)
