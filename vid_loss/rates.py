"""Learning rates of the heads, beside the student's."""

import math
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

# Between 2e-3 and 2e-2, which explain about as much: examples/paper/q_fit, by validation data.
HEAD_LEARNING_RATE = 5e-3


def head_learning_rate(optimizer: Optimizer | str, lr: float | None = None) -> float:
    """Returns the rate at which heads are fitted beside a student, whatever the student's is.

    Adam and its relatives move a weight by the rate itself, however large the gradient is: their
    heads have ``HEAD_LEARNING_RATE`` at least. For others it is the student's.

    Args:
        optimizer: the student's, or its name.
        lr: its rate; that of its first group if None.
    """
    # By name, because most of them are in other libraries and share no class.
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    if lr is None and not isinstance(optimizer, str):
        lr = optimizer.param_groups[0]["lr"]
    rate = float(lr or 0)
    return max(rate, HEAD_LEARNING_RATE) if "adam" in name.lower() else rate


def groups_of(
    parameters: list[nn.Parameter],
    optimizer: Optimizer | None,
    lr: float | Literal["auto"] | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Returns parameters in groups, as :meth:`~vid_loss.Distiller.parameter_groups` says."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "Distiller, parameter_groups, optimizer: expected an optimizer or None; got "
            f"{optimizer!r}. A rate is given by name: parameter_groups(lr=...)."
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        known = value in (None, "auto") if name == "lr" else False
        if not known and (not isinstance(value, int | float) or not 0 <= value < math.inf):
            raise ValueError(
                f"Distiller, parameter_groups, {name}: expected a number, 0 or more; got "
                f"{value!r}. For example lr=5e-3, weight_decay=1e-4."
            )
    if lr == "auto":
        lr = HEAD_LEARNING_RATE if optimizer is None else head_learning_rate(optimizer)
    rate = {} if lr is None else {"lr": lr}
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0, **rate}] if parameters else []
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": x, "weight_decay": decay, **rate} for x, decay in groups if x]
