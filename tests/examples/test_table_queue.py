"""The queue of runs, with runs that only say that they were made."""

import signal
import threading
import time

import pytest

pytest.importorskip("optuna", reason="needs the examples extra")

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from paper.tables.items import Item
from paper.tables.queue import Worker, open_storage
from sqlalchemy.exc import IntegrityError

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(params=["journal", "database"])
def address(request, tmp_path):
    return str(tmp_path / "journal") if request.param == "journal" else f"sqlite:///{tmp_path}/db"


def storage_at(address: str) -> BaseStorage:
    """SQLite stands in for a database server, where two workers do not take runs at once."""
    if address.startswith("sqlite"):
        return RDBStorage(address)
    return open_storage(address)


def item(name: str = "cell", choices=({"mi": 1.0}, {"mi": 10.0}, {"mi": 100.0})) -> Item:
    return Item(name, choices, search_seeds=(100, 101), test_seeds=(0, 1, 2))


class Log:
    """Makes runs up, and remembers them: 10 is best on average, 100 with the first seed."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.runs, self.seconds = [], seconds

    def execute(self, of: Item, run: dict) -> dict:
        time.sleep(self.seconds)
        self.runs.append((of.name, tuple(run.items())))
        luck = 5 if run.get("mi") == 100 and run["seed"] == 100 else 0
        return {"validation": {1: 60, 10: 70, 100: 67}[run.get("mi", 1)] + luck, **run}


def work(address: str, items: list[Item], log: Log, lease: float = 60.0) -> list[dict]:
    storage = storage_at(address)
    worker = Worker(storage, items, log.execute, lease=lease)
    worker.work(lambda *_: None)
    records = worker.records()
    storage.remove_session()
    return records


def test_the_choice_of_the_best_mean_is_tested_with_every_seed(address):
    log = Log()
    records = work(address, [item()], log)
    assert len(log.runs) == 3 * 2 + 3
    assert [(r["seed"], r["mi"]) for r in records if r["stage"] == "test"] == [
        (0, 10.0),
        (1, 10.0),
        (2, 10.0),
    ]
    assert all(r["stage"] == "search" for r in records[:6])


def test_without_an_alternative_nothing_is_searched(address):
    log = Log()
    work(address, [item(choices=({},))], log)
    assert [dict(run)["stage"] for _, run in log.runs] == ["test"] * 3


def test_what_is_finished_is_not_run_again(address):
    first, second = Log(), Log()
    records = work(address, [item()], first)
    assert work(address, [item()], second) == records
    assert second.runs == []


def test_workers_share_the_runs_and_none_is_made_twice(tmp_path):
    address = str(tmp_path / "journal")
    logs = [Log(seconds=0.05), Log(seconds=0.05)]
    items = [item("a"), item("b")]
    threads = [threading.Thread(target=work, args=(address, items, log)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(log.runs for log in logs)
    runs = logs[0].runs + logs[1].runs
    assert len(runs) == len(set(runs)) == 2 * 9


def test_runs_that_two_workers_enqueued_are_made_once(address):
    study = optuna.create_study(storage=storage_at(address), study_name="cell")
    for run in item(choices=({},)).tests({}):
        for _ in range(2):
            study.enqueue_trial({}, user_attrs={"run": run})
    log = Log()
    work(address, [item(choices=({},))], log)
    assert len(log.runs) == 3
    states = [trial.state for trial in study.get_trials()]
    assert states[:4] == [TrialState.COMPLETE, TrialState.PRUNED] * 2


def test_a_run_of_a_grid_that_has_changed_is_left_out(address):
    study = optuna.create_study(storage=storage_at(address), study_name="cell")
    old = {"stage": "search", "seed": 100, "mi": 5.0}
    study.enqueue_trial({}, user_attrs={"run": old})
    first, log = Log(), Log()
    work(address, [item(choices=({"mi": 1.0}, {"mi": 10.0}))], first)
    records = work(address, [item(choices=({"mi": 1.0}, {"mi": 100.0}))], log)
    assert ("cell", tuple(old.items())) not in first.runs + log.runs
    assert len(log.runs) == 2 + 3
    assert {r["mi"] for r in records if r["stage"] == "test"} == {100.0}


def study_with_a_silent_run(storage: BaseStorage) -> optuna.Study:
    """One worker took a run, and there is no word of it any more."""
    study = optuna.create_study(storage=storage, study_name="cell")
    run = item(choices=({},)).tests({})[0]
    study.enqueue_trial({}, user_attrs={"run": run})
    study.ask()
    return study


def test_a_killed_workers_run_is_taken_up_again(address):
    study = study_with_a_silent_run(storage_at(address))
    log = Log()
    records = work(address, [item(choices=({},))], log, lease=0.4)
    assert len(log.runs) == len(records) == 3
    assert study.get_trials()[0].state == TrialState.FAIL


def test_two_workers_that_give_up_on_a_run_at_once_both_go_on(address, monkeypatch):
    storage = storage_at(address)
    study_with_a_silent_run(storage)
    give_up, raced = storage.set_trial_state_values, []

    def race(trial_id, state, values=None):
        if state == TrialState.FAIL and not raced:
            raced.append(give_up(trial_id, state, values))  # the other worker is faster
        return give_up(trial_id, state, values)

    monkeypatch.setattr(storage, "set_trial_state_values", race)
    log = Log()
    Worker(storage, [item(choices=({},))], log.execute, lease=0.4).work(lambda *_: None)
    assert raced
    assert len(log.runs) == 3
    storage.remove_session()


def test_a_run_that_is_complete_after_all_is_not_made_again(address):
    storage = storage_at(address)
    study = study_with_a_silent_run(storage)
    worker = Worker(storage, [item(choices=({},))], Log().execute, lease=0.0)
    (silent,) = study.get_trials()
    assert not worker._abandoned(study, silent)  # seen for the first time
    study.tell(0, 70.0)
    assert not worker._abandoned(study, silent)
    assert study.get_trials()[0].state == TrialState.COMPLETE
    storage.remove_session()


def test_a_living_workers_long_run_is_waited_for(address):
    storage_at(address)  # whose tables are made before two workers look for them
    slow, other = Log(seconds=3.0), Log()
    of = [Item("cell", ({},), (), (0,))]
    thread = threading.Thread(target=work, args=(address, of, slow, 2.0))
    thread.start()
    study = optuna.load_study(storage=wait_for(address), study_name="cell")
    while not study.get_trials(states=(TrialState.RUNNING,)):
        time.sleep(0.01)
    records = work(address, of, other, lease=2.0)
    thread.join()
    assert (len(slow.runs), len(other.runs), len(records)) == (1, 0, 1)


def wait_for(address: str):
    storage = storage_at(address)
    while not storage.get_all_studies():
        time.sleep(0.01)
    return storage


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_run_that_was_given_to_another_worker_is_interrupted_and_says_so(address, handler):
    previous = signal.signal(signal.SIGINT, handler)  # ignored in a shell's background
    study = optuna.create_study(storage=storage_at(address), study_name="cell")
    finished: list[dict] = []

    def execute(of: Item, run: dict) -> dict:
        study.tell(0, state=TrialState.FAIL)
        for _ in range(6000):
            time.sleep(0.01)
        finished.append(run)
        return {"validation": 0.0}

    worker = Worker(storage_at(address), [Item("cell", ({},), (), (0,))], execute, lease=0.4)
    try:
        with pytest.raises(RuntimeError, match=r"cell, .*another worker saw none.* Start this"):
            worker.work(lambda *_: None)
    finally:
        left = signal.signal(signal.SIGINT, previous)
    assert left == handler
    assert finished == []
    assert worker.records() == []


def test_a_run_that_fails_is_said_and_made_again_by_the_next_worker(address):
    def execute(of: Item, run: dict) -> dict:
        raise MemoryError("no memory left")

    one = [Item("cell", ({},), (), (0,))]
    with pytest.raises(MemoryError, match="no memory left"):
        Worker(storage_at(address), one, execute, lease=60).work(lambda *_: None)
    log = Log()
    assert len(work(address, one, log)) == len(log.runs) == 1


def test_sqlite_is_refused():
    with pytest.raises(ValueError, match="one run to two workers: name a journal"):
        open_storage("sqlite:///tables.db")


def test_a_database_whose_tables_another_worker_is_making_is_tried_again(monkeypatch):
    attempts = []

    def connect(url: str) -> str:
        attempts.append(url)
        if len(attempts) == 1:
            raise IntegrityError("create", None, ValueError("exists"))
        return "storage"

    monkeypatch.setattr(optuna.storages, "RDBStorage", connect)
    assert open_storage("postgresql://host/tables") == "storage"
