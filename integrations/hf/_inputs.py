"""Which part of a Hugging Face batch each of the two models is called with."""

import inspect
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from vid_loss.taps import unwrap
from vid_loss.teacher import Inputs

_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def arguments_of(function: Callable[..., Any]) -> dict[str, bool]:
    """Returns the named arguments of a function, and whether each has to be given."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind in _BY_NAME}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def without_labels(
    model: nn.Module, batch: Mapping[str, Any], label_names: Collection[str]
) -> dict[str, Any]:
    """Returns a batch for a forward that is not asked for its loss.

    Labels stay if the forward demands them. A decoder's input is made of them, as the forward
    itself would do it.
    """
    model = unwrap(model)
    required = arguments_of(model.forward)
    inputs = {k: x for k, x in batch.items() if k not in label_names or required.get(k, False)}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift and "labels" in batch and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs


class Columns:
    """Which columns of a batch go to which model.

    Args:
        teacher: the teacher; without ``teacher_inputs`` it gets the columns that its forward
            names, but for labels.
        teacher_inputs: called with the columns that it names; returns the teacher's inputs.

    Attributes:
        label_names: the columns that are labels.
        teacher_only: columns that the student is not given.
        batch: the batch in hand, which the teacher is called on.
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_inputs: Callable[..., Inputs] | None,
    ) -> None:
        self.teacher = teacher
        self.teacher_inputs = teacher_inputs
        self.label_names = {"labels", "label", "label_ids"}
        self.teacher_only: set[str] = set()
        self.batch: Mapping[str, Any] = {}

    def keep_for_teacher(self, of_student: Collection[str]) -> list[str]:
        """Finds the columns that the teacher names and the student does not, and returns them."""
        named = arguments_of(self.teacher_inputs or unwrap(self.teacher).forward)
        self.teacher_only = set(named) - set(of_student) - self.label_names
        return sorted(self.teacher_only)

    def for_student(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the batch without what only the teacher needs."""
        return {name: value for name, value in batch.items() if name not in self.teacher_only}

    def for_teacher(self, **_: Any) -> Inputs:
        """Returns the teacher's inputs of the batch in hand, whatever the student was given.

        Raises:
            ValueError: if an argument that the teacher needs is missing.
        """
        if self.teacher_inputs is not None:
            inputs: Inputs = _call_by_name(self.teacher_inputs, self.batch)
            return inputs
        arguments = arguments_of(unwrap(self.teacher).forward)
        batch = without_labels(self.teacher, self.batch, self.label_names)
        if arguments:
            batch = {name: value for name, value in batch.items() if name in arguments}
        missing = [name for name, required in arguments.items() if required and name not in batch]
        if missing or not batch:
            raise ValueError(
                f"VIDTrainer, teacher: expected a batch with {missing or [*arguments]}, which its "
                f"forward takes; got {list(self.batch)}. Pass teacher_inputs=, for example "
                "teacher_inputs=lambda pixel_values, **_: (pixel_values,)."
            )
        return batch


def _call_by_name(function: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
    if not takes_any(function):
        names = arguments_of(function)
        batch = {name: value for name, value in batch.items() if name in names}
    return function(**batch)


def first_batch(dataset: Any, collate: Callable[[list[Any]], Any]) -> Mapping[str, Any]:
    """Returns a collated batch of a dataset's first rows; random states stay as they were.

    Raises:
        TypeError: if the collator makes no dict.
        ValueError: if the dataset is empty.
    """
    with _same_random_states():
        rows = _first_rows(dataset, 2)
        if not rows:
            raise ValueError(
                "VIDTrainer, train_dataset: expected a row to size the heads with; got none. "
                "Pass example=, a collated batch, or another train set."
            )
        batch = collate(rows)
    if not isinstance(batch, Mapping):
        raise TypeError(
            "VIDTrainer, data_collator: expected it to make a dict of model arguments; got "
            f"{type(batch).__name__}. Return {{'pixel_values': ..., 'labels': ...}}."
        )
    return batch


def _first_rows(dataset: Any, count: int) -> list[Any]:
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    return list(islice(iter(dataset), count))


@contextmanager
def _same_random_states() -> Iterator[None]:
    """Puts the random states back that a dataset and a collator draw from."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
