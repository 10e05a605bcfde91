"""Mean losses over an epoch, for the progress bar and the trackers."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class LossMeans:
    """The mean of each loss over an epoch, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the losses of one batch by name."""
        self.values = {name: value.float() for name, value in values.items()}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in self.values.items()}
        self.count += 1

    def last(self) -> dict[str, str]:
        """Returns the last batch's losses as text; the host waits for the device."""
        return {name: f"{value.item():.3g}" for name, value in self.values.items()}

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all batches of all processes. Called by every process."""
        stacked = torch.stack([value.to(accelerator.device) for value in self.sums.values()])
        means = accelerator.reduce(stacked / self.count, "mean").tolist()
        return dict(zip(self.sums, means, strict=True))
