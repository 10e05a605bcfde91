"""Runs that only say that they were made, and workers of them."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("filelock", reason="needs the examples extra")

from paper.tables.cells import Cell, Run, cells_of
from paper.tables.grids import GRIDS
from paper.tables.plans import plan_of
from paper.tables.workers import FinishedRuns, work

MADE_WITH = {"cell": {"data": "abc", "epochs": 10}, "teacher": {"data": "abc"}}
MADE = {"student": "small", "pretrained": False, "method": "mi", **MADE_WITH["cell"]}
SEARCHES, TESTS = 3 * 2, 3  # of a method with three choices
FIRST, BEST, LAST = (choice["mi"] for choice in GRIDS["mi"])
ANOTHER = 5.0  # of a grid of an earlier revision


def cells(*methods: str) -> list[Cell]:
    return cells_of(replace(plan_of("1a", "small"), methods=methods, regimes=(10,)))


def record_of(run: Run) -> dict:
    """The lambda in the middle is the best on average, the last with the first seed."""
    luck = 5 if run.choice.get("mi") == LAST and run.seed == 100 else 0
    validation = {ANOTHER: 99, FIRST: 60, BEST: 70, LAST: 67}[run.choice.get("mi", FIRST)] + luck
    return {**MADE, "stage": run.stage, "seed": run.seed, **run.choice, "validation": validation}


class Log:
    """Makes runs up, and remembers them."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.runs, self.seconds = [], seconds

    def execute(self, run: Run) -> dict:
        self.runs.append(run.name)
        time.sleep(self.seconds)
        return record_of(run)


def finished_in(folder: Path) -> FinishedRuns:
    return FinishedRuns(folder / "table.jsonl", MADE_WITH)


def work_in(folder: Path, of: list[Cell], log: Log) -> list[dict]:
    work(of, finished_in(folder), folder / "locks", log.execute)
    return finished_in(folder).read()


def in_thread(folder: Path, of: list[Cell], log: Log) -> threading.Thread:
    thread = threading.Thread(target=work_in, args=(folder, of, log))
    thread.start()
    return thread


def wait_until(happened) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end, "it did not happen within five minutes"
        time.sleep(0.01)
