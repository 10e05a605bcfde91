"""What a run refuses before anything is trained or written."""

import math
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from vid_loss import Distiller
from vid_loss.calls import refuse_no_module
from vid_loss.guards import holds_all

OF_HISTORY = ("task", "validation")


def check_models(student: Any, distiller: Any) -> None:
    """Refuses what cannot be trained, and pairs with the name of something else in the history.

    Raises:
        TypeError: if the student is no module, or the distiller no Distiller.
        ValueError: if a pair has such a name.
    """
    refuse_no_module("train, student", student)
    if distiller is None:
        return
    if not isinstance(distiller, Distiller):
        raise TypeError(
            f"train, distiller: expected a Distiller or None; got {type(distiller).__name__}. "
            "Build one: Distiller(student, teacher, pairs, example=images)."
        )
    for name in OF_HISTORY:
        if name in distiller.pairs:
            raise ValueError(
                f"train, distiller: expected no pair named {name!r}, as the history has another "
                "value by that name. Choose another: Pair(..., name=)."
            )


def check_optimization(
    accelerator: Accelerator, optimizer: Any, schedule: Any, distiller: Distiller | None
) -> None:
    """Refuses an optimizer without the heads, and an order of samples that does not resume.

    Raises:
        TypeError: if one is of another type.
        ValueError: if it is so.
    """
    if not accelerator.use_seedable_sampler:
        raise ValueError(
            "train, accelerator: expected an order of samples that resumes; got another. Pass "
            "Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))."
        )
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"train, optimizer: expected an optimizer; got {optimizer!r}. For example "
            "torch.optim.SGD(student.parameters(), lr=0.1)."
        )
    if isinstance(schedule, type) or not hasattr(schedule, "step"):
        raise TypeError(
            f"train, schedule: expected a scheduler of the optimizer; got {schedule!r}. For "
            "example torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)."
        )
    if distiller is not None and not holds_all(optimizer, distiller):
        raise ValueError(
            "train, optimizer: expected the distiller's parameters too; got one without them. "
            "Add: distiller.add_to(optimizer)"
        )


def check_steps(epochs: Any, task_loss: Any, max_grad_norm: Any) -> None:
    """Refuses numbers and a loss that steps cannot be taken with.

    Raises:
        TypeError: if the loss is no function.
        ValueError: if a number is none, or out of range.
    """
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"train, epochs: expected a whole number, 0 or more; got {epochs!r}.")
    if isinstance(task_loss, type) or not callable(task_loss):
        raise TypeError(
            "train, task_loss: expected a function of the student's output and the labels; got "
            f"{task_loss!r}. For example torch.nn.CrossEntropyLoss()."
        )
    number = isinstance(max_grad_norm, int | float) and not math.isnan(max_grad_norm)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):
        raise ValueError(
            f"train, max_grad_norm: expected a number above 0, or None not to clip; got "
            f"{max_grad_norm!r}."
        )


def check_loaders(train: Any, validation: Any, processes: int) -> None:
    """Refuses loaders that have no batch, as one with ``drop_last`` of few samples.

    Args:
        train: the one of training.
        validation: that of validation.
        processes: how many share the batches of each.

    Raises:
        TypeError: if one is no loader, or that of training does not know how many batches it has.
        ValueError: if one has none.
    """
    for name, loader in (("train_loader", train), ("validation_loader", validation)):
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"train, {name}: expected a torch.utils.data.DataLoader; got "
                f"{type(loader).__name__}."
            )
        try:
            batches = len(loader)
        except TypeError:  # of an IterableDataset without a length
            if loader is validation:
                continue
            raise TypeError(
                "train, train_loader: expected one that knows how many batches it has; got one of "
                f"{type(loader.dataset).__name__}, which has no length. Give it a __len__."
            ) from None
        if not batches:
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"train, {name}: expected a batch or more{each}; got none. Take a smaller "
                "batch_size, drop_last=False or more samples."
            )


def folder_of(output: Any) -> Path:
    """Returns a run's folder as a path.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(output, str | os.PathLike) or not str(output):
        raise TypeError(
            f"train, output: expected the name of a folder; got {output!r}. For example "
            "output='runs/1'."
        )
    return Path(output)
