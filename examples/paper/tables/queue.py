"""Runs that many workers on many machines share: Optuna's studies as the queue.

A study is a cell of a table, a trial a run. The trials are enqueued from outside, and what each is
to do is its user attribute ``run``: Optuna chooses nothing, it hands each trial to one worker and
keeps what came of it.
"""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .items import Item, Run, key_of, run_of

_ATTEMPTS = 3
_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)

Record = dict[str, Any]  # what is remembered of a run
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
        present = {key_of(run_of(trial)) for trial in live}
        for run in wanted:
            if key_of(run) not in present:
                study.enqueue_trial({}, user_attrs={"run": dict(run)})
        complete = {key_of(run_of(t)) for t in live if t.state == TrialState.COMPLETE}
        return item.chosen(live) is not None and {key_of(run) for run in wanted} <= complete

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
        try:
            told = study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        except UpdateFinishedTrialError:  # by another worker, since tell() looked at its state
            return False
        return told.state == TrialState.FAIL  # and not complete after all

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
            trial.set_user_attr("record", record)
            study.tell(trial, record["validation"])
        except BaseException as error:
            if lost.is_set() or isinstance(error, UpdateFinishedTrialError):
                raise RuntimeError(
                    f"{item.name}, {dict(run)}: expected a sign of life every {self.lease:g} s; "
                    "another worker saw none, and does this run. Start this worker again."
                ) from error
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        return record


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
        with _interruptible():
            yield lost
    finally:
        over.set()
        thread.join()


@contextmanager
def _interruptible() -> Iterator[None]:
    """A worker that a shell has started in the background ignores interrupts; not within this."""
    if threading.current_thread() is not threading.main_thread():
        yield  # whose signals are another's to handle
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
