"""The heads of a Hugging Face student, sized from one batch."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from vid_loss.distiller import Distiller
from vid_loss.matching import match_layers
from vid_loss.pairs import Pair

from ._inputs import Columns

logger = logging.getLogger(__name__)


def build_distiller(
    student: nn.Module,
    columns: Columns,
    batch: Mapping[str, Any],
    pairs: Mapping[str, str] | Sequence[Pair] | None,
    *,
    mask_of: Callable[[Mapping[str, Any]], Tensor | None],
    log_match: bool,
    **options: Any,
) -> Distiller:
    """Builds the transfer terms from a batch of which either model is given its own columns.

    Args:
        student: the model that is trained.
        columns: know the teacher, and what it is called with.
        batch: a collated batch; moved to the student's device.
        pairs: as in :class:`~vid_loss.Distiller`; None matches layers.
        mask_of: returns a batch's padding mask.
        log_match: whether this process says what was matched.
        **options: those of :class:`~vid_loss.Distiller`.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`~vid_loss.Distiller`.
    """
    for owner, model in (("model", student), ("teacher", columns.teacher)):
        _refuse_meta(owner, model)
    device = next(student.parameters()).device
    batch = send_to_device(dict(batch), device)
    move_teacher(columns.teacher, device)
    if pairs is None:
        pairs = match_layers(
            student,
            columns.teacher,
            columns.for_sizing(student, batch),
            teacher_inputs=lambda **_: columns.for_teacher(batch),
        )
        if log_match:
            # What nobody chose should be seen: transformers hides INFO by default.
            logger.warning("VIDTrainer, pairs: none were given; matched:\n%s", pairs)
    # The heads take their mask from the keyword that a Distiller knows, whatever made it.
    example = {"batch": batch, "attention_mask": mask_of(batch)}
    with _called_on_batches(student, columns):
        return Distiller(
            student,
            columns.teacher,
            pairs,
            example=example,
            teacher_inputs=columns.for_teacher,
            **options,
        )


@contextmanager
def _called_on_batches(student: nn.Module, columns: Columns) -> Iterator[None]:
    """Has the student pick its columns from a whole batch, for the length of a block."""

    def pick(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, columns.for_sizing(student, kwargs["batch"])

    handle = student.register_forward_pre_hook(pick, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


def _refuse_meta(owner: str, model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"VIDTrainer, {owner}: expected weights in memory; got a model on the meta device. "
            "Load it with from_pretrained() and without device_map='meta' or init_empty_weights()."
        )


def move_teacher(teacher: nn.Module, device: torch.device) -> None:
    """Moves a teacher; what is spread over devices or quantised stays where it is."""
    if getattr(teacher, "hf_device_map", None) is None and not hasattr(teacher, "hf_quantizer"):
        teacher.to(device)
