"""Accuracy over processes, each sample counted once."""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader


class Accuracy(NamedTuple):
    """How many samples were classified correctly, of how many."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """The accuracy in percent; 0 without samples."""
        return 100 * self.correct / max(self.total, 1)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> Accuracy:
    """Counts correct classifications, each sample once however many processes share them.

    Args:
        accelerator: of the run.
        model: returns logits in eval mode, as DistillationModel does; left in eval mode.
        loader: prepared; batches ``(*inputs, labels)``. Samples with a negative label do not count.

    Returns:
        The number of correct ones and the total, over all processes.
    """
    model.eval()
    correct = total = 0
    for *inputs, labels in loader:
        logits = model(*inputs)
        predicted, labels = accelerator.gather_for_metrics((logits.argmax(dim=-1), labels))
        correct += int((predicted == labels).sum())
        total += int((labels >= 0).sum())
    return Accuracy(correct, total)
