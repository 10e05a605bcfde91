"""Files that are whole or absent, whatever kills the process or the machine."""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
_ABANDONED = 3600.0  # seconds; no file takes as long to write


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file under a name of its own, brings it to the disk and gives it its place.

    Several threads or processes may write one file: what is there is whole, and in the end of one
    of them.

    Args:
        path: the file; one that is there is replaced.
        data: its content.

    Raises:
        OSError: if that fails; nothing of it is left then, and an older file is as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def rename_folder(partial: Path, path: Path) -> None:
    """Brings all files of a folder to the disk, and renames it.

    Args:
        partial: the folder, complete.
        path: its name from now on; not there yet.
    """
    for file in partial.rglob("*"):
        _sync(file)
    _sync(partial)
    os.rename(partial, path)
    _sync(path.parent)


def remove_abandoned(folder: Path) -> None:
    """Removes what :func:`write_whole` left in processes that were killed an hour ago or more."""
    for path in folder.glob("*" + PARTIAL):
        with suppress(OSError):  # gone by now, or another user's
            if path.stat().st_mtime < time.time() - _ABANDONED:
                path.unlink()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
