"""A data set whose random augmentation is drawn once and for all, in a few versions."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset

SAMPLE_INDEX = "sample_index"


class _Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class FixedAugmentations(Dataset[Any]):
    """A data set that draws each sample's augmentation from a few seeds, so that it comes again.

    A view of sample ``i`` is the row ``dataset[i]`` as it is drawn with Python's, NumPy's and
    torch's generators seeded by ``(seed, i, view)``: the same in every epoch, worker and order.
    Which view comes is drawn anew each time, from the generator of the program or of the worker.
    So epochs keep their length, nobody tells it of them, and the teacher runs at most ``views``
    times per sample. One view is no augmentation, only another picture. Join data sets before, as
    ``FixedAugmentations(one + other, views=4)``: the places of two would be the same.

    Args:
        dataset: with ``len()`` and rows by index, and augmentation in them. Generators of its own,
            and of the GPU, are not seeded; :class:`FeatureCache` refuses what they make.
        views: how many versions there are of each sample.
        seed: draws other versions.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no view, or the data set is empty.

    Example:
        >>> noisy = [0.0, 0.0]  # a data set with random transforms
        >>> samples = FixedAugmentations(noisy, views=4)
        >>> samples.view(1, 2)  # samples[1] is one of its four
        (0.0, 6)
    """

    def __init__(self, dataset: _Rows, *, views: int, seed: int = 0) -> None:
        _check(dataset, views, seed)
        self.dataset = dataset
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Returns a view of a sample, and its place for the cache, ``index * views + view``.

        A row that is a dict gets it under ``"sample_index"``; any other comes as ``(row, place)``.

        Raises:
            IndexError: if there is no such sample.
        """
        return self.view(index, int(torch.randint(self.views, (), device="cpu")))

    def view(self, index: int, view: int) -> Any:
        """Returns one view of a sample, as ``samples[index]`` does.

        Args:
            index: of the sample.
            view: from 0 to ``views - 1``.

        Raises:
            IndexError: if there is no such sample, or view.
        """
        index, view = range(len(self))[index], range(self.views)[view]
        with _seeded(f"{self.seed} {index} {view}"):
            row = self.dataset[index]
        place = index * self.views + view
        return {**row, SAMPLE_INDEX: place} if isinstance(row, Mapping) else (row, place)


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Seeds the generators of the CPU for the length of a block, then puts them back."""
    numpy = _numpy_random()
    generator = torch.default_generator  # torch.manual_seed would seed GPUs too
    python, of_torch = random.getstate(), generator.get_state()
    of_numpy = None if numpy is None else numpy.get_state()
    random.seed(text)
    generator.manual_seed(random.getrandbits(64))
    if numpy is not None:
        numpy.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        generator.set_state(of_torch)
        if numpy is not None:
            numpy.set_state(of_numpy)


def _numpy_random() -> Any:
    # Not looked up in sys.modules: a row's own first draw may be what imports it, unseeded.
    try:
        import numpy.random
    except ImportError:
        return None
    return numpy.random


def _check(dataset: Any, views: Any, seed: Any) -> None:
    by_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not by_index or isinstance(dataset, IterableDataset | Mapping):
        raise TypeError(
            "FixedAugmentations, dataset: expected rows by index and len(); got "
            f"{type(dataset).__name__}. A sample is known by its index: wrap the data set, not its "
            "loader or a stream."
        )
    for name, value in (("views", views), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"FixedAugmentations, {name}: expected an integer; got {value!r}. Write "
                f"{name}={4 if name == 'views' else 0}."
            )
    if views < 1:
        raise ValueError(
            f"FixedAugmentations, views: expected at least 1; got {views}. Write views=4."
        )
    if not len(dataset):
        raise ValueError(
            "FixedAugmentations, dataset: expected samples; got none. Wrap it when it is filled."
        )
