"""The teacher's features of a batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .taps import batch_of


class Features(dict[str, Tensor]):
    """Features by layer, and the batch that they are of."""

    def __init__(
        self, features: Mapping[str, Tensor], args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__(features)
        self.batch = batch_of(args, kwargs)


def device_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Returns where the first tensor among a model's inputs is."""
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return None if first is None else first.device
