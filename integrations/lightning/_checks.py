"""What a module, a Trainer and a batch must be like for the callback."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from vid_loss.cache import SAMPLE_INDEX


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
