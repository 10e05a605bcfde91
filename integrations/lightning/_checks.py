"""What a module, a Trainer and a batch must be like for the callback."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from vid_loss.cache import SAMPLE_INDEX
from vid_loss.calls import refuse_no_module
from vid_loss.checks import check_number
from vid_loss.teacher import Inputs, check_teacher_inputs


def check_arguments(teacher: Any, student: Any, head_rate: Any, teacher_inputs: Any) -> None:
    """Refuses arguments of a callback that are of another type.

    Raises:
        TypeError: if the teacher is no module, the student no name, or the inputs no function.
        ValueError: if the heads' learning rate is none.
    """
    refuse_no_module("VIDCallback, teacher", teacher)
    if not isinstance(student, str):
        got = type(student).__name__
        raise TypeError(
            f"VIDCallback, student: expected an attribute's name; got {got}. For example 'model'."
        )
    if head_rate is not None:
        remedy = "For example 5e-3; None chooses one."
        check_number("VIDCallback, head_learning_rate", head_rate, remedy)
    check_teacher_inputs("VIDCallback", teacher_inputs)


def student_of(pl_module: LightningModule, name: str) -> nn.Module:
    """Returns the attribute of a module that is its student.

    Raises:
        ValueError: if there is none.
    """
    student = dict(pl_module.named_children()).get(name)
    if student is None:
        found = [child for child, _ in pl_module.named_children()]
        raise ValueError(
            f"VIDCallback, student: expected an attribute of {type(pl_module).__name__} that is a "
            f"module; got {name!r}. There are {found}."
        )
    return student


def example_of(pl_module: LightningModule, given: Inputs | None) -> Inputs:
    """Returns the batch to size heads with: as given, or the module's.

    Raises:
        ValueError: if there is none.
    """
    example: Any = given if given is not None else pl_module.example_input_array
    if example is None:
        raise ValueError(
            "VIDCallback, example: expected a batch of the student's inputs, to size the "
            "heads; got None. Pass one, or set the module's example_input_array."
        )
    found: Inputs = example
    return found


def refuse_sharded_and_manual(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses what a loss added to ``training_step`` would not reach, or heads would drift in.

    Raises:
        ValueError: if the strategy or the module does so.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "VIDCallback: expected automatic optimization, where Lightning runs backward; got "
            f"{type(pl_module).__name__}, which runs its own. Build a Distiller in it and add "
            "distiller(images) to its loss."
        )
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        raise ValueError(
            "VIDCallback: expected one device or DDP; got "
            f"{type(trainer.strategy).__name__}, which shards what it trains. Shard a "
            "DistillationModel in the module's configure_model instead."
        )


def places_in(batch: Any) -> dict[str, Tensor]:
    """Returns the samples' places in their data set, for the distiller's cache.

    Raises:
        ValueError: if the batch does not name them.
    """
    if not (isinstance(batch, Mapping) and SAMPLE_INDEX in batch):
        got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"VIDCallback, cache: expected a dict with {SAMPLE_INDEX!r}, the rows' places in the "
            f"data set, as the batch of training_step; got {got}. Return {{'images': image, "
            f"'labels': label, {SAMPLE_INDEX!r}: index}} from the data set's __getitem__."
        )
    return {SAMPLE_INDEX: batch[SAMPLE_INDEX]}
