"""Workers that share a table's runs, with runs that only say that they were made."""

import json
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("filelock", reason="needs the examples extra")

from _table_work import (
    ANOTHER,
    BEST,
    FIRST,
    MADE,
    SEARCHES,
    TESTS,
    Log,
    cells,
    finished_in,
    in_thread,
    record_of,
    wait_until,
    work_in,
)
from paper.tables import workers
from paper.tables.cells import Run
from paper.tables.workers import MixedRunsError, work


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LOOKS", 0.02)


def test_the_choice_of_the_best_mean_is_tested_with_every_seed_after_the_search(tmp_path):
    log = Log()
    records = work_in(tmp_path, cells("mi"), log)
    assert len(log.runs) == SEARCHES + TESTS
    assert [record["stage"] for record in records] == ["search"] * SEARCHES + ["test"] * TESTS
    tested = [(record["seed"], record["mi"]) for record in records if record["stage"] == "test"]
    assert tested == [(0, BEST), (1, BEST), (2, BEST)]


def test_of_equal_choices_the_first_is_tested(tmp_path):
    (cell,) = cells("mi")
    finished = {run.name: {"validation": 50.0} for run in cell.searches()}
    assert cell.chosen(finished) == {"mi": FIRST}
    finished.popitem()
    assert cell.chosen(finished) is None
    assert cell.wanted(finished) == cell.searches()


def test_without_an_alternative_nothing_is_searched(tmp_path):
    records = work_in(tmp_path, cells("student"), Log())
    assert [record["stage"] for record in records] == ["test"] * TESTS


def test_what_is_finished_is_not_run_again(tmp_path):
    first, second = Log(), Log()
    records = work_in(tmp_path, cells("mi", "student"), first)
    assert work_in(tmp_path, cells("mi", "student"), second) == records
    assert second.runs == []


def test_more_seeds_or_methods_add_what_is_missing_and_other_lines_stay(tmp_path):
    work_in(tmp_path, cells("student"), Log())
    (cell,) = cells("student")
    more = [replace(cell, plan=replace(cell.plan, test_seeds=(0, 1, 2, 3)))]
    log = Log()
    records = work_in(tmp_path, more + cells("mi"), log)
    assert len(log.runs) == 1 + SEARCHES + TESTS
    assert len(records) == TESTS + len(log.runs)


def test_workers_share_the_runs_and_none_is_made_twice(tmp_path):
    logs = [Log(seconds=0.05), Log(seconds=0.05)]
    threads = [in_thread(tmp_path, cells("mi", "at"), log) for log in logs]
    for thread in threads:
        thread.join()
    assert all(log.runs for log in logs)
    runs = logs[0].runs + logs[1].runs
    assert len(runs) == len(set(runs)) == 2 * (SEARCHES + TESTS)


def test_a_living_workers_run_is_waited_for(tmp_path):
    (cell,) = cells("student")
    of = [replace(cell, plan=replace(cell.plan, test_seeds=(0,)))]
    slow, other = Log(seconds=0.5), Log()
    thread = in_thread(tmp_path, of, slow)
    wait_until(lambda: slow.runs)
    records = work_in(tmp_path, of, other)
    thread.join()
    assert (len(slow.runs), other.runs, len(records)) == (1, [], 1)


def work_without_end(folder: Path) -> None:
    def execute(run: Run) -> dict:
        (folder / "taken").write_text(run.name)
        time.sleep(600)
        return {}

    work(cells("student"), finished_in(folder), folder / "locks", execute)


def test_a_killed_workers_run_is_taken_up_by_a_waiting_one(tmp_path):
    killed = multiprocessing.get_context("spawn").Process(target=work_without_end, args=[tmp_path])
    killed.start()
    try:
        wait_until((tmp_path / "taken").exists)
        log = Log()
        thread = in_thread(tmp_path, cells("student"), log)
        wait_until(lambda: len(finished_in(tmp_path).read()) == TESTS - 1)
        time.sleep(0.2)
        taken = (tmp_path / "taken").read_text()
        assert taken not in log.runs  # while its worker lives
    finally:
        killed.kill()
        killed.join()
    thread.join(timeout=300)
    assert log.runs[-1] == taken
    assert len(log.runs) == len(finished_in(tmp_path).read()) == TESTS


def test_a_run_that_fails_is_said_and_made_again_by_the_next_worker(tmp_path):
    def execute(run: Run) -> dict:
        raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        work(cells("student"), finished_in(tmp_path), tmp_path / "locks", execute)
    log = Log()
    assert len(work_in(tmp_path, cells("student"), log)) == len(log.runs) == TESTS


def test_a_run_of_a_grid_that_has_changed_is_no_choice(tmp_path):
    (cell,) = cells("mi")
    old = Run(cell, "search", 100, {"mi": ANOTHER})
    finished_in(tmp_path).append({"run": old.name, **record_of(old)})
    log = Log()
    records = work_in(tmp_path, [cell], log)
    assert len(log.runs) == SEARCHES + TESTS
    assert {record["mi"] for record in records if record["stage"] == "test"} == {BEST}


def test_a_worker_that_is_killed_while_it_writes_leaves_the_file_whole(tmp_path, monkeypatch):
    (cell,) = cells("student")
    finished, runs = finished_in(tmp_path), cell.tests({})
    finished.append({"run": runs[0].name, **record_of(runs[0])})
    written = finished.path.read_text()

    def die(*_: object) -> None:
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            finished.append({"run": runs[1].name, **record_of(runs[1])})
    assert finished.path.read_text() == written
    assert len(work_in(tmp_path, [cell], Log())) == TESTS


def test_records_that_workers_add_at_once_are_all_there(tmp_path):
    def add(worker: int) -> None:
        for index in range(20):
            finished_in(tmp_path).append({"run": f"{worker}-{index}", **MADE})

    threads = [threading.Thread(target=add, args=[worker]) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished_in(tmp_path).by_name()) == 60


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "xyz"}, "table.jsonl: expected runs with data abc; got one with xyz"),
        ({"epochs": 20}, "expected runs with epochs 10; got one with 20. Choose another --output"),
        ({"data": "xyz", "pretrained": True, "student": "teacher"}, "data abc; got one with xyz"),
    ],
)
def test_runs_made_with_something_else_are_named_and_not_mixed(tmp_path, changed, message):
    record = {"run": "one", **MADE, **changed}
    finished = finished_in(tmp_path)
    with pytest.raises(MixedRunsError, match=message):
        finished.append(record)
    assert finished.read() == []
    finished.path.write_text(json.dumps(record) + "\n")
    log = Log()
    with pytest.raises(MixedRunsError, match=message):
        work_in(tmp_path, cells("student"), log)
    assert log.runs == []


def test_runs_of_another_revision_are_named(tmp_path):
    finished = finished_in(tmp_path)
    for revision in ("new", "old", "older"):
        finished.append({"run": revision, "revision": revision, **MADE})
    said = finished.others("revision", "new")
    assert "table.jsonl: 2 of 3 runs are of revision old, older; the next ones are of new" in said
    assert finished_in(tmp_path / "empty").others("revision", "new") == ""


def test_a_run_that_another_worker_finished_since_they_were_listed_is_not_made(tmp_path):
    work_in(tmp_path, cells("student"), Log())
    finished, log = finished_in(tmp_path), Log()
    now, looks = finished.by_name, []
    finished.by_name = lambda: now() if looks else looks.append(1) or {}
    work(cells("student"), finished, tmp_path / "locks", log.execute)
    assert log.runs == []
