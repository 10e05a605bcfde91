"""Runs that any number of workers share: a lock per run, and one file of the finished ones.

The locks are the operating system's. A killed worker's are released with it, so that another takes
its run up; on many machines, the folder must be on a file system whose ``flock`` holds across them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from paper.lines import read_lines
from vid_loss.durable import write_whole

from .cells import Cell, Record, Run

SECONDS_BETWEEN_LOOKS = 1.0  # at what others have taken: it may be finished, or they be killed


class MixedRunsError(ValueError):
    """Runs of one file that were made with different things."""


class FinishedRuns:
    """A file with a JSON object per finished run.

    Args:
        path: of the file; of a table and a data set.
        made_with: what runs in one file must have in common, by field, for each of
            :func:`kind_of`.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Record]) -> None:
        self.path, self.made_with = path, made_with
        self._lock = path.with_name(f"{path.name}.lock")

    def read(self) -> list[Record]:
        """Returns the records.

        Raises:
            MixedRunsError: if a run was made with something else, other data say.
            ValueError: if a line is damaged.
        """
        records = read_lines(self.path) if self.path.exists() else []
        for record in records:
            self._check(record)
        return records

    def by_name(self) -> dict[str, Record]:
        """Returns the records by their runs' names."""
        return {record["run"]: record for record in self.read()}

    def append(self, record: Record) -> None:
        """Adds a record: it is there as a whole or not at all, whenever the worker is killed."""
        self._check(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock):
            lines = [json.dumps(line) + "\n" for line in (*self.read(), record)]
            write_whole(self.path, "".join(lines).encode())

    def others(self, field: str, own: str) -> str:
        """Returns how many runs have another value in a field, as a sentence; empty for none."""
        records = self.read()
        values = [str(record.get(field)) for record in records if record.get(field) != own]
        if not values:
            return ""
        return (
            f"{self.path}: {len(values)} of {len(records)} runs are of {field} "
            f"{', '.join(sorted(set(values)))}; the next ones are of {own}."
        )

    def _check(self, record: Record) -> None:
        for field, value in self.made_with.get(kind_of(record), {}).items():
            if record.get(field) != value:
                raise MixedRunsError(
                    f"{self.path}: expected runs with {field} {value}; got one with "
                    f"{record.get(field)}. Choose another --output."
                )


def kind_of(record: Record) -> str:
    """Returns which runs have a student in common: a model trained beforehand, or a cell's."""
    if record["pretrained"]:
        return str(record["student"])
    return "finetuned" if record["method"] == "finetuned" else "cell"


def work(
    cells: Sequence[Cell],
    finished: FinishedRuns,
    locks: Path,
    execute: Callable[[Run], Record],
    done: Callable[[Run, Record], Any] = lambda run, record: None,
) -> None:
    """Makes the runs that no other worker is at, until every cell is complete.

    A run that fails is left for the next worker.

    Args:
        cells: of which runs are made, in this order.
        finished: runs; shared by the workers.
        locks: folder of the locks; shared by the workers.
        execute: makes a run, and returns what is to be remembered of it.
        done: called after each run that this worker has made.
    """
    locks.mkdir(parents=True, exist_ok=True)
    while runs := left(cells, finished.by_name()):
        for run in runs:
            if _make(run, finished, locks, execute, done):
                break  # and look again: a run that chooses may come before the next of these
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def left(cells: Sequence[Cell], finished: Mapping[str, Record]) -> list[Run]:
    """Returns the runs that are known to be needed and not finished."""
    runs = [run for cell in cells for run in cell.wanted(finished)]
    return [run for run in runs if run.name not in finished]


def _make(
    run: Run,
    finished: FinishedRuns,
    locks: Path,
    execute: Callable[[Run], Record],
    done: Callable[[Run, Record], Any],
) -> bool:
    """Makes a run, unless another worker is at it; returns whether it is finished now."""
    lock = FileLock(locks / f"{run.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if run.name not in finished.by_name():  # by another worker, since they were looked at
            record = {"run": run.name, **execute(run)}
            finished.append(record)
            done(run, record)
    finally:
        lock.release()
    return True
