"""Loaders of one run: for training, for validation and for the test."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, RandomSampler

from paper.settings import Settings


class Loaders(NamedTuple):
    """What a student is trained on, what chooses its epoch, what tests it; how many classes."""

    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    classes: int


def shuffled(
    dataset: Dataset[Any], settings: Settings, options: Mapping[str, Any]
) -> DataLoader[Any]:
    """Returns a loader in random order, with as many steps per epoch as the settings say.

    A data set that is shorter than that is gone through several times.
    """
    if settings.steps_per_epoch is None:
        return DataLoader(dataset, shuffle=True, **options)
    count = settings.steps_per_epoch * settings.batch_size
    return DataLoader(dataset, sampler=RandomSampler(dataset, num_samples=count), **options)
