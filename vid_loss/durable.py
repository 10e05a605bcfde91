"""Files that are whole or absent, whatever kills the process or the machine."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PARTIAL = ".partial"
_TAKEN: set[tuple[int, Path]] = set()


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file beside its place, brings it to the disk and renames it.

    Several threads or processes may write one file: each in its turn, and whole. Not on Windows,
    nor where there are no locks.

    Args:
        path: the file; one that is there is replaced.
        data: its content.

    Raises:
        OSError: if that fails; nothing of it is left then, and an older file is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    file = _open_locked(partial)  # until it has its name, or is gone
    try:
        file.truncate(0)  # what a killed writer left
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        _close_on_windows(file)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            _close_on_windows(file)
        partial.unlink(missing_ok=True)
        raise
    finally:
        file.close()
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
    """Removes what :func:`write_whole` left in processes that were killed."""
    for path in folder.glob("*" + PARTIAL):
        try:
            with path.open("r+b") as file:
                # Else its writer is alive, or it has its name by now and this is another's.
                if _lock(file, wait=False) and _is_at(file, path):
                    path.unlink()
        except OSError:  # gone by now, another user's, or open on Windows, which removes none such
            continue


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Takes a file's lock for a block, if no other process has it; this one may take it twice.

    It is this process's own: a kill ends it, whatever goes on in processes that were forked.

    Args:
        path: the file, which is left there, empty.

    Yields:
        Whether no other has it, as far as is known: not on Windows, and not where nothing can be
        written.
    """
    own = (os.getpid(), path.absolute())
    if own in _TAKEN:  # whoever closes the file a second time would give it back
        yield True
        return
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except (ImportError, OSError):
        yield True
        return
    with file:
        free = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's is inherited
        except OSError as error:
            free = error.errno not in (errno.EACCES, errno.EAGAIN)  # or there are no locks here
        if free:
            _TAKEN.add(own)
        try:
            yield free
        finally:
            if free:
                _TAKEN.discard(own)


def _open_locked(path: Path) -> IO[bytes]:
    """Makes a file that others leave alone until it is closed."""
    while True:
        file = path.open("ab")  # which leaves it as it is: another may be at it
        _lock(file, wait=True)
        try:
            if _is_at(file, path):
                return file
        except FileNotFoundError:
            pass
        file.close()  # it was removed before it was locked


def _is_at(file: IO[bytes], path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def _close_on_windows(file: IO[bytes]) -> None:
    """Closes a file where none that is open can be renamed or removed."""
    if os.name != "posix":
        file.close()


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Locks a file until it is closed; False if another holds it, or there are no locks here."""
    try:
        import fcntl
    except ImportError:
        return not wait  # Windows needs none to tell: it removes no open file
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
