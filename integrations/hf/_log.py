"""The parts of the training loss, for the Trainer's own log."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LossMeans:
    """Means of the parts of the loss since the last log.

    They stay on the device, and cross ranks only when a loss is logged. Weighted as the Trainer
    weighs its own: ``task_loss + transfer_loss`` is its ``loss``.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0.0

    def add(
        self,
        task: Tensor,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        share: float,
        steps_since: int | None,
    ) -> None:
        """Adds the values of one batch.

        Args:
            task: its part of the step's task loss.
            terms: its transfer terms by pair, float32 whatever FSDP's output_dtype makes of the
                loss itself.
            weights: the weights of the pairs.
            share: which part of an optimizer step it is.
            steps_since: optimizer steps since the last log, this one included, for the Trainer's
                rule: a loss that is not finite counts as their mean. None takes it as it is.
        """
        values = {
            "task_loss": task.detach().float(),
            "transfer_loss": torch.zeros((), device=task.device),
        }
        for name, term in terms.items():
            value = share * term.to(task.device)
            values["transfer_loss"] = values["transfer_loss"] + weights[name] * value
            values[f"transfer/{name}"] = value
        if steps_since is not None:
            finite = torch.isfinite(values["task_loss"] + values["transfer_loss"])
            for name, value in values.items():
                mean = self.sums[name] / steps_since if name in self.sums else 0.0
                values[name] = torch.where(finite, value, mean)
        for name, value in values.items():
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
