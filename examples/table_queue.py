"""Runs that many workers on many machines share: Optuna's studies as the queue.

A study is a cell of a table, a trial a run. The trials are enqueued from outside, and what each is
to do is its user attribute ``run``: Optuna chooses nothing, it hands each trial to one worker and
keeps what came of it.
"""

import _thread
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

_ATTEMPTS = 3
_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)

Run = Mapping[str, Any]  # stage, seed, and the hyper-parameters
Record = dict[str, Any]  # what is remembered of a run


@dataclass(frozen=True)
class Item:
    """A cell: hyper-parameters are chosen on validation data, then tested with other seeds.

    Args:
        name: of the study.
        choices: the grid; without an alternative, nothing is searched.
        search_seeds: each choice is run with these, and the best mean validation accuracy wins.
        test_seeds: of the runs of the winner, which alone see the test data.
        work: what a run needs to know besides.
    """

    name: str
    choices: tuple[Mapping[str, float], ...]
    search_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    work: Any = None

    def search(self) -> list[Run]:
        """Returns the runs that choose."""
        if len(self.choices) == 1:
            return []
        return [
            {"stage": "search", "seed": seed, **choice}
            for choice in self.choices
            for seed in self.search_seeds
        ]

    def tests(self, choice: Mapping[str, float]) -> list[Run]:
        """Returns the runs that test a choice."""
        return [{"stage": "test", "seed": seed, **choice} for seed in self.test_seeds]

    def possible(self) -> list[Run]:
        """Returns every run that there may be."""
        return self.search() + [run for choice in self.choices for run in self.tests(choice)]

    def wanted(self, trials: Sequence[FrozenTrial]) -> list[Run]:
        """Returns the runs that choose and, once it is known, those that test the choice."""
        choice = self.chosen(trials)
        return self.search() + ([] if choice is None else self.tests(choice))

    def chosen(self, trials: Sequence[FrozenTrial]) -> Mapping[str, float] | None:
        """Returns the choice, or None before every run that chooses is complete."""
        accuracies = {_key(run_of(t)): t.value for t in trials if t.state == TrialState.COMPLETE}
        if not {_key(run) for run in self.search()} <= accuracies.keys():
            return None
        if len(self.choices) == 1:
            return self.choices[0]
        return max(  # the first of the grid, where some are equal
            self.choices,
            key=lambda choice: mean(
                accuracies[_key({"stage": "search", "seed": seed, **choice})]
                for seed in self.search_seeds
            ),
        )


Finished = Callable[[Item, Record], None]


def open_storage(address: str) -> BaseStorage:
    """Opens Optuna's storage: a database by its URL, anything else is the path of a journal.

    Raises:
        ValueError: if the database is SQLite.
    """
    if address.startswith("sqlite"):
        raise ValueError(
            f"--storage: expected a journal's path, or the URL of a database server; got "
            f"{address!r}. SQLite locks no rows, and hands one run to two workers: name a journal."
        )
    if "://" in address:
        for _ in range(_ATTEMPTS):
            try:
                return optuna.storages.RDBStorage(address)
            except DBAPIError:  # another worker has just made the same tables
                time.sleep(1)
        return optuna.storages.RDBStorage(address)
    Path(address).parent.mkdir(parents=True, exist_ok=True)
    # This lock, unlike the default one, needs no symbolic links; both are broken after a kill.
    return JournalStorage(JournalFileBackend(address, lock_obj=JournalFileOpenLock(address)))


def run_of(trial: FrozenTrial | optuna.Trial) -> Run | None:
    """Returns what a trial is to do; None for one that Optuna made up, which nobody runs."""
    return trial.user_attrs.get("run")


class Worker:
    """Takes runs that no other worker has, until every item is done.

    A worker beats while it runs. A run whose beat no other worker has seen change for as long as a
    lease is taken for that of a killed worker: it fails, and is enqueued again. Each worker goes
    by its own clock, so those of the machines need not agree; and it needs no heartbeat of
    Optuna's, which journals do not have.

    Args:
        storage: shared by the workers.
        items: what is to be done.
        execute: does a run; returns what is to be remembered, with ``"validation"`` in percent.
        lease: seconds.
    """

    def __init__(
        self,
        storage: BaseStorage,
        items: Sequence[Item],
        execute: Callable[[Item, Run], Record],
        *,
        lease: float = 120.0,
    ) -> None:
        self.storage, self.items, self.execute, self.lease = storage, items, execute, lease
        self.studies = {
            item.name: optuna.create_study(
                storage=storage, study_name=item.name, direction="maximize", load_if_exists=True
            )
            for item in items
        }
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}

    def work(self, finished: Finished) -> None:
        """Runs what is left, and waits for what others have taken: they may be killed.

        Args:
            finished: called after each run of this worker's.
        """
        waiting = list(self.items)
        while waiting:
            waiting = [item for item in waiting if not self._advance(item)]
            if not any(self._take_and_run(item, finished) for item in waiting):
                time.sleep(min(1.0, self.lease / 4) if waiting else 0)

    def records(self) -> list[Record]:
        """Returns what is remembered of every complete run, by whichever worker.

        Runs of a grid or of a choice that is no longer the item's are left out.
        """
        found = []
        for item in self.items:
            trials = self.studies[item.name].get_trials(
                deepcopy=False, states=(TrialState.COMPLETE,)
            )
            wanted = item.wanted(trials)
            found += [t.user_attrs["record"] for t in trials if run_of(t) in wanted]
        return found

    def _advance(self, item: Item) -> bool:
        """Enqueues what an item lacks; returns whether it is done."""
        study = self.studies[item.name]
        trials = [t for t in study.get_trials(deepcopy=False) if run_of(t) is not None]
        live = [t for t in trials if t.state in _LIVE and not self._abandoned(study, t)]
        wanted = item.wanted(live)
        present = {_key(run_of(trial)) for trial in live}
        for run in wanted:
            if _key(run) not in present:
                study.enqueue_trial({}, user_attrs={"run": dict(run)})
        complete = {_key(run_of(t)) for t in live if t.state == TrialState.COMPLETE}
        return item.chosen(live) is not None and {_key(run) for run in wanted} <= complete

    def _abandoned(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if trial.state != TrialState.RUNNING:
            return False
        now, beat = time.monotonic(), trial.user_attrs.get("beat")
        name = (study.study_name, trial.number)
        seen, since = self._seen.get(name, (None, 0.0))
        if name not in self._seen or beat != seen:
            self._seen[name] = (beat, now)
            return False
        if now - since < self.lease:
            return False
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return True

    def _take_and_run(self, item: Item, finished: Finished) -> bool:
        study = self.studies[item.name]
        while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = study.ask()
            run = run_of(trial)
            if run is None:  # another worker took the last one in the meantime
                study.tell(trial, state=TrialState.FAIL)
            elif run not in item.possible() or _is_double(study, trial):
                # Of a grid that has changed, or two workers enqueued it at once.
                study.tell(trial, state=TrialState.PRUNED)
            else:
                finished(item, self._run(item, study, trial, run))
                return True
        return False

    def _run(self, item: Item, study: optuna.Study, trial: optuna.Trial, run: Run) -> Record:
        try:
            with _beating(self.storage, trial, self.lease / 4) as lost:
                record = self.execute(item, run)
        except BaseException as error:
            if lost.is_set():
                raise RuntimeError(
                    f"{item.name}, {dict(run)}: expected a sign of life every {self.lease:g} s; "
                    "another worker saw none, and does this run. Start this worker again."
                ) from error
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        trial.set_user_attr("record", record)
        study.tell(trial, record["validation"])
        return record


def _key(run: Run) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(run.items()))


def _is_double(study: optuna.Study, trial: optuna.Trial) -> bool:
    return any(
        other.number < trial.number and other.state in _LIVE and run_of(other) == run_of(trial)
        for other in study.get_trials(deepcopy=False)
    )


@contextmanager
def _beating(
    storage: BaseStorage, trial: optuna.Trial, seconds: float
) -> Iterator[threading.Event]:
    """Beats beside the run; one that was taken for abandoned is interrupted, and marked so."""
    over, lost = threading.Event(), threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(seconds):
            count += 1
            try:
                trial.set_user_attr("beat", count)
            except UpdateFinishedTrialError:
                lost.set()
                _thread.interrupt_main()
                break
            except (OSError, SQLAlchemyError, StorageInternalError):
                continue  # the next one may get through
        storage.remove_session()  # this thread's connection, if it is a database

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        over.set()
        thread.join()
