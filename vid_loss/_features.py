"""The teacher's features of a batch."""

from torch import Tensor

from .taps import Batch


class Features(dict[str, Tensor]):
    """Features by layer, and the batch that they are of."""

    batch: Batch | None = None
