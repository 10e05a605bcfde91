"""Weights of which DeepSpeed's ZeRO 3 has left each process a part, as it loads a model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def whole(model: nn.Module) -> AbstractContextManager[Any]:
    """Returns a context in which a model can run before DeepSpeed's engine has it."""
    parts = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return gathered


def refuse_partitioned_teacher(teacher: nn.Module) -> None:
    """Raises the ValueError about a teacher that no engine will put together for a forward."""
    of_engine = hasattr(teacher, "ds_id")  # as its modules have then
    if not of_engine and any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        raise ValueError(
            "VIDTrainer, teacher: expected its weights; got parts of them, as from_pretrained() "
            "leaves of any model once there are TrainingArguments with ZeRO 3. Load the teacher "
            "before TrainingArguments(...)."
        )
