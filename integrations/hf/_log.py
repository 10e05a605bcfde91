"""The parts of the training loss, for the Trainer's own log."""

from typing import Any

import torch
from torch import Tensor

from vid_loss.distiller import Distiller


class LossMeans:
    """Means of the parts of the loss since the last log.

    They stay on the device, and cross ranks only when a loss is logged. Weighted as the Trainer
    weighs its own: ``task_loss + transfer_loss`` is its ``loss``.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0.0

    def add(self, task: Tensor, distiller: Distiller, share: float) -> None:
        """Adds the values of one forward.

        Args:
            task: its part of the step's task loss.
            distiller: has its transfer terms.
            share: which part of an optimizer step it is.
        """
        # The terms are float32, whatever FSDP's output_dtype makes of the loss itself.
        terms = {name: share * x.to(task.device) for name, x in distiller.terms.items()}
        transfer = torch.stack([distiller.weights[name] * x for name, x in terms.items()]).sum()
        values = {"task_loss": task.detach().float(), "transfer_loss": transfer}
        for name, value in {**values, **{f"transfer/{k}": x for k, x in terms.items()}}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += share

    def take(self, accelerator: Any) -> dict[str, float]:
        """Returns the means over the optimizer steps and the ranks, and starts anew."""
        if not self.sums:
            return {}
        device = accelerator.device
        stacked = torch.stack([value.to(device) for value in self.sums.values()]) / self.steps
        means = accelerator.reduce(stacked, reduction="mean").tolist()
        logs = dict(zip(self.sums, means, strict=True))
        self.sums, self.steps = {}, 0.0
        return logs


def transferred(distiller: Distiller) -> dict[str, float]:
    """Returns what each VIDLoss pair transferred in this process's last batch."""
    return distiller.metrics()
