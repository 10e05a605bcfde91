"""What a VIDTrainer refuses before anything is built."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from vid_loss.calls import refuse_no_module
from vid_loss.checks import check_number
from vid_loss.teacher import check_teacher_inputs


def check_arguments(teacher: Any, example: Any, teacher_inputs: Any, head_rate: Any) -> None:
    """Refuses arguments that are of another type.

    Raises:
        TypeError: if the teacher is no module, the example no dict, or the inputs no function.
        ValueError: if the heads' learning rate is none.
    """
    refuse_no_module("VIDTrainer, teacher", teacher)
    if not (example is None or isinstance(example, Mapping)):
        raise TypeError(
            "VIDTrainer, example: expected a collated batch, a dict of columns; got "
            f"{type(example).__name__}. For example trainer.data_collator(rows)."
        )
    check_teacher_inputs("VIDTrainer", teacher_inputs)
    if head_rate is not None:
        remedy = "For example 5e-3; None chooses one."
        check_number("VIDTrainer, head_learning_rate", head_rate, remedy)


def refuse_closed(closed: bool) -> None:
    """Raises the RuntimeError about training with heads that are gone."""
    if closed:
        raise RuntimeError(
            "VIDTrainer, train: expected a trainer with its heads; got one after close(), which "
            "took them off. Build another VIDTrainer, whose heads are new; or a Trainer, for the "
            "student alone."
        )


def refuse_nothing_to_size(heads: object) -> None:
    """Raises the ValueError about heads that are not there as there was no batch."""
    if heads is None:
        raise ValueError(
            "VIDTrainer, example: expected a collated batch, as there is no train_dataset to "
            "size the heads with; got None. Pass one of the two."
        )


def refuse_engine(trainer: Trainer) -> None:
    """Raises the ValueError about an engine that heads cannot be trained under."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"VIDTrainer: expected one GPU a process; got {trainer.args.n_gpu}, which Trainer "
            "would use through nn.DataParallel. Start the script with torchrun or accelerate "
            "launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "VIDTrainer, fsdp: expected FSDP 2; got version 1, with which heads were not seen to "
            "work. Set fsdp_version: 2, in fsdp_config or in Accelerate's configuration."
        )


def refuse_meta(owner: str, model: nn.Module) -> None:
    """Raises the ValueError about a model without weights."""
    # Accelerate's hook loads what is offloaded when it is needed: for a forward, not for training.
    offloaded = owner == "teacher" and any(hasattr(x, "_hf_hook") for x in model.modules())
    if has_meta(model) and not offloaded:
        raise ValueError(
            f"VIDTrainer, {owner}: expected weights in memory; got a model on the meta device. "
            "Load it with from_pretrained() and without device_map='meta' or init_empty_weights()."
        )


def has_meta(model: nn.Module) -> bool:
    """Whether a model has weights that are not in memory."""
    return any(parameter.is_meta for parameter in model.parameters())
