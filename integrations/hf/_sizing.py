"""The first rows of a train set, to size heads with; whoever trains on it finds it as it was."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

_DEEPEST = 4  # a function in a collator in another; what is deeper is found nowhere
_GENERATORS = torch.Generator, np.random.Generator, np.random.RandomState, random.Random


class FirstRows:
    """The first rows of a data set that are looked at before training.

    Args:
        dataset: with rows by index, in a pass, or a mapping of several data sets.
        count: how many rows to take.
        collate: makes a batch of them.

    Attributes:
        batch: the collated rows.

    Raises:
        TypeError: if the collator makes no dict.
        ValueError: if the dataset is empty.
    """

    def __init__(self, dataset: Any, count: int, collate: Callable[[list[Any]], Any]) -> None:
        self._taken: Iterator[Any] | None = None
        with _same_random_states(dataset, collate):
            rows = self._take(dataset, count)
            if not rows:
                raise ValueError(
                    "VIDTrainer, train_dataset: expected a row to size the heads with; got none. "
                    "Pass example=, a collated batch, or another train set."
                )
            batch = _collated(rows, collate)
        if not isinstance(batch, Mapping):
            raise TypeError(
                "VIDTrainer, data_collator: expected it to make a dict of model arguments; got "
                f"{type(batch).__name__}. Return {{'pixel_values': ..., 'labels': ...}}, or pass "
                "example=, what the model is called with."
            )
        self.batch = batch

    def _take(self, dataset: Any, count: int) -> list[Any]:
        if isinstance(dataset, Mapping):
            return self._take(next(iter(dataset.values()), []), count)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return [dataset[index] for index in range(min(count, len(dataset)))]
        with _same_random_states(dataset):
            rows = list(islice(iter(dataset), count))
        again = iter(dataset)
        next_rows = list(islice(again, count))
        if not _equal(rows, next_rows):
            # It goes on where the pass before has left it: what was taken would be missing.
            self._taken = chain(rows, next_rows, again)
        return rows

    def put_back(self, dataset: Any) -> Any:
        """Returns the dataset, with the rows in front if they have gone from it."""
        taken, self._taken = self._taken, None
        return dataset if taken is None else _Continued(dataset, taken)


class _Continued(IterableDataset[Any]):
    """A data set whose first pass has begun."""

    def __init__(self, dataset: Any, first_pass: Iterator[Any]) -> None:
        self.dataset = dataset
        self.first_pass: Iterator[Any] | None = first_pass

    def __iter__(self) -> Iterator[Any]:
        # A loader's worker has a copy of the data set, and of no pass.
        if self.first_pass is None or get_worker_info() is not None:
            return iter(self.dataset)
        first_pass, self.first_pass = self.first_pass, None
        return first_pass

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet: the object is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _collated(rows: list[Any], collate: Callable[[list[Any]], Any]) -> Any:
    try:
        return collate(rows)
    except Exception as error:
        raise ValueError(
            f"VIDTrainer, data_collator: expected it to make a batch of the first {len(rows)} rows "
            f"of train_dataset, to size the heads with; got {type(error).__name__}: {error}. Pass "
            "example=, a collated batch; to evaluate alone, leave train_dataset out."
        ) from error


@contextmanager
def _same_random_states(*owners: Any) -> Iterator[None]:
    """Puts the random states back that a dataset and a collator draw from, and their own."""
    python, numpy = random.getstate(), np.random.get_state()
    restore = [put for owner in owners for put in _own_states(owner, set())]
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for put in restore:
            put()


def _own_states(owner: Any, seen: set[int], depth: int = 0) -> Iterator[Callable[[], Any]]:
    """Yields what puts each random generator back that an object, or a part of it, keeps."""
    if id(owner) in seen or depth > _DEEPEST:
        return
    seen.add(id(owner))
    if isinstance(owner, torch.Generator):
        yield partial(owner.set_state, owner.get_state())
    elif isinstance(owner, np.random.Generator):
        yield partial(setattr, owner.bit_generator, "state", owner.bit_generator.state)
    elif isinstance(owner, np.random.RandomState):
        yield partial(owner.set_state, owner.get_state())
    elif isinstance(owner, random.Random):
        yield partial(owner.setstate, owner.getstate())
    elif not isinstance(owner, type | ModuleType | Tensor):
        attributes = dict(getattr(owner, "__dict__", {}))
        yield from (partial(_forget, owner, key) for key, x in attributes.items() if x is None)
        for part in [*attributes.values(), *_parts(owner)]:
            yield from _own_states(part, seen, depth + 1)


def _forget(owner: Any, name: str) -> None:
    """Drops a generator that was made at its first use, to be made anew."""
    if isinstance(getattr(owner, name), _GENERATORS):
        setattr(owner, name, None)


def _parts(owner: Any) -> list[Any]:
    """Returns what a function, a bound method or a partial calls and reads."""
    if isinstance(owner, partial):
        return [owner.func, *owner.args, *owner.keywords.values()]
    if isinstance(owner, MethodType):
        return [owner.__self__, owner.__func__]
    if not isinstance(owner, FunctionType):
        return []
    read = inspect.getclosurevars(owner)
    return [*read.nonlocals.values(), *read.globals.values()]


def _equal(one: Any, other: Any) -> bool:
    """Whether two lists of rows are the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)
