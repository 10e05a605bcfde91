"""The heads in the Trainer's optimizer: groups and a learning rate of their own."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from vid_loss.distiller import Distiller
from vid_loss.guards import holds_all
from vid_loss.optimizer import head_learning_rate


def give_heads_groups(
    optimizer: Optimizer, distiller: Distiller, learning_rate: float | None
) -> None:
    """Moves the heads into groups of their own, behind the others, each with its weight decay.

    Args:
        optimizer: holds the heads among other parameters, or nothing of them.
        distiller: has the heads.
        learning_rate: theirs; :func:`~vid_loss.optimizer.head_learning_rate` if None.
    """
    heads = {id(parameter) for parameter in distiller.parameters()}
    for parameter, own in _layerwise(optimizer).items():
        for group in own.param_groups if id(parameter) in heads else ():
            group["lr"] = _rate(own, distiller, learning_rate, group["lr"])
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in heads]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in heads]
        rate = _rate(optimizer, distiller, learning_rate, group["lr"])
        optimizer.add_param_group({**group, "params": moved, "lr": rate})


def _rate(
    optimizer: Optimizer, distiller: Distiller, given: float | None, of_student: float
) -> float:
    if given is not None:
        return given
    return head_learning_rate(optimizer, of_student, weight=distiller.largest_weight)


def _layerwise(optimizer: Any) -> dict[Tensor, Optimizer]:
    """Returns the optimizer of each parameter, where each steps in its own backward hook."""
    of_parameters = getattr(getattr(optimizer, "optimizer", optimizer), "optimizer_dict", None)
    return of_parameters or {}


def refuse_rate_beside(optimizer: Optimizer | None, rate: float | None) -> None:
    """Raises the ValueError about a rate for heads in an optimizer that is not the Trainer's."""
    if optimizer is not None and rate is not None:
        raise ValueError(
            "VIDTrainer, head_learning_rate: expected None beside an optimizer of yours, whose "
            f"groups have their own; got {rate!r}. Drop it here, and before train() give it to the "
            f"heads: trainer.distiller.add_to(optimizer, lr={rate!r})."
        )


def refuse_optimizer_without_heads(trainer: Trainer, distiller: Distiller) -> None:
    """Raises the RuntimeError that says which line an optimizer or a scheduler of one's own lacks.

    A scheduler that was built before the heads came would end in torch's own error, and late.
    """
    optimizer: Any = trainer.optimizer
    layerwise = {id(parameter) for parameter in _layerwise(optimizer)}
    held = layerwise.issuperset(map(id, distiller.parameters()))
    held = held or trainer.is_deepspeed_enabled  # which flattens what its optimizer holds
    if not (held or optimizer is None or holds_all(optimizer, distiller)):
        raise RuntimeError(
            "VIDTrainer, optimizers: expected the heads in the optimizer; got one without them. "
            "Before train() add: trainer.distiller.add_to(optimizer), and build your scheduler, if "
            "any, after that."
        )
    known = len(getattr(trainer.lr_scheduler, "base_lrs", ()))
    if not held and known and known < len(optimizer.param_groups):
        raise RuntimeError(
            f"VIDTrainer, optimizers: expected a scheduler of all {len(optimizer.param_groups)} "
            f"groups of the optimizer; got one of {known}, built before the heads were added. "
            "Before train() build another on it: trainer.lr_scheduler = ..."
        )
