"""What programs that start together make once: one is at it, and the others wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


def one_at_a_time(path: Path) -> FileLock:
    """Returns a lock for what is made at a path, which the operating system drops at a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def make_once(path: Path, make: Callable[[], Any]) -> None:
    """Makes what belongs at a path, unless it is there, or is once the lock is had."""
    if not path.exists():
        with one_at_a_time(path):
            if not path.exists():
                make()
