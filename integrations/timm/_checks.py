"""What a VIDTask refuses before anything is built."""

from collections.abc import Iterable, Mapping
from typing import Any

from timm.utils import unwrap_model

from vid_loss.calls import refuse_no_module
from vid_loss.checks import check_number

OF_RESULT = ("loss", "output", "task_loss", "vid_loss")
_OF_CONFIG = ("input_size", "mean", "std")


def check_arguments(student: Any, teacher: Any, criterion: Any, data_config: Any) -> None:
    """Refuses arguments that are of another type.

    Raises:
        TypeError: if one is.
    """
    refuse_no_module("VIDTask, student_model", student)
    missing = [x for x in ("num_classes", "in_chans") if not hasattr(unwrap_model(student), x)]
    if missing:
        raise TypeError(
            f"VIDTask, student_model: expected a model of timm; got a {type(student).__name__} "
            f"without {' and '.join(missing)}. Set what is missing on it."
        )
    if not isinstance(teacher, str):
        refuse_no_module("VIDTask, teacher_model", teacher)
    if criterion is not None and (isinstance(criterion, type) or not callable(criterion)):
        raise TypeError(
            "VIDTask, criterion: expected a loss of the output and the target; got "
            f"{criterion!r}. For example torch.nn.CrossEntropyLoss()."
        )
    known = isinstance(data_config, Mapping) and all(x in data_config for x in _OF_CONFIG)
    if data_config is not None and not known:
        raise TypeError(
            f"VIDTask, data_config: expected a dict with {', '.join(_OF_CONFIG)}; got "
            f"{data_config!r}. For example timm.data.resolve_data_config(model=student)."
        )


def task_and_distill_weight(task: float | None, distill: float | None) -> tuple[float, float]:
    """Returns the weights of the task loss and of the sum over pairs, as timm's rule is.

    Raises:
        ValueError: if one is no number, or below 0.
    """
    example = "For example task_loss_weight=0.5, distill_loss_weight=1.0."
    for name, weight in (("task_loss_weight", task), ("distill_loss_weight", distill)):
        if weight is not None:
            check_number(f"VIDTask, {name}", weight, example)
    if distill is None and task is not None:
        if task > 1:
            raise ValueError(
                "VIDTask, task_loss_weight: expected 0 to 1 where it is given alone, as "
                f"distill_loss_weight is the rest then, 1 - task_loss_weight; got {task!r}. Give "
                "distill_loss_weight, too."
            )
        return task, 1.0 - task
    return 1.0 if task is None else task, 1.0 if distill is None else distill


def refuse_names_of_result(names: Iterable[str]) -> None:
    """Raises the ValueError about a pair whose value the task's result would have no place for."""
    for name in names:
        if name in OF_RESULT:
            raise ValueError(
                f"VIDTask, pairs: expected no pair named {name!r}, as the result has another value "
                "by that name. Choose another: Pair(..., name=)."
            )
