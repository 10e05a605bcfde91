"""The heads in the Trainer's optimizer: groups and a learning rate of their own."""

from typing import Any

from torch.optim import Optimizer
from transformers import Trainer

from vid_loss.distiller import Distiller
from vid_loss.guards import holds_all
from vid_loss.rates import head_learning_rate


def give_heads_groups(
    optimizer: Optimizer, distiller: Distiller, learning_rate: float | None
) -> None:
    """Moves the heads into groups of their own, behind the others, each with its weight decay.

    Args:
        optimizer: holds the heads among other parameters, or nothing of them.
        distiller: has the heads.
        learning_rate: theirs; :func:`~vid_loss.rates.head_learning_rate` if None.
    """
    heads = {id(parameter) for parameter in distiller.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in heads]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in heads]
        rate = learning_rate
        if rate is None:
            rate = head_learning_rate(optimizer, group["lr"])
        optimizer.add_param_group({**group, "params": moved, "lr": rate})


def refuse_optimizer_without_heads(trainer: Trainer, distiller: Distiller) -> None:
    """Raises the RuntimeError that says which line an optimizer of the user's lacks."""
    # DeepSpeed and FSDP 1 flatten the parameters that their optimizers hold.
    flattened = trainer.is_deepspeed_enabled or (
        trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
    )
    optimizer: Any = trainer.optimizer
    if not (flattened or optimizer is None or holds_all(optimizer, distiller)):
        raise RuntimeError(
            "VIDTrainer, optimizers: expected the heads in the optimizer; got one without them. "
            "Before train() add: optimizer.add_param_group({'params': "
            "trainer.distiller.parameters()}), and build your scheduler, if any, after that."
        )
