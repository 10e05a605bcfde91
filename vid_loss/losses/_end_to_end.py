"""Several vectors laid end to end, so that one operation serves them all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# All numbers or all tensors: one that a mask decides is not read, since the host would wait for it.
Counts = Sequence[Any]


class EndToEnd:
    """Joins vectors of certain lengths, and takes them apart again.

    Args:
        lengths: of the vectors, in their order.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def join(self, vectors: Sequence[Tensor]) -> Tensor:
        """Returns one vector; a single one as it is."""
        return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))

    def split(self, joined: Tensor) -> Sequence[Tensor]:
        """Returns the vectors, views of the joined one."""
        return (joined,) if len(self.lengths) == 1 else torch.split_with_sizes(joined, self.lengths)

    def times(self, joined: Tensor, factors: Counts) -> Tensor:
        """Returns the joined vectors, each multiplied by a number of its own."""
        return self.join(torch._foreach_mul(list(self.split(joined)), list(factors)))

    def over(self, vectors: Sequence[Tensor], divisors: Counts) -> Tensor:
        """Returns the vectors joined, each divided by a number of its own, 1 at least."""
        return self.join(torch._foreach_div(list(vectors), [_at_least_1(x) for x in divisors]))

    def store(self, *joined: Tensor, into: Sequence[Tensor]) -> None:
        """Copies joined vectors back into where their parts came from.

        Args:
            *joined: one behind the other.
            into: all parts of the first, then of the second, and so on.
        """
        parts = [part for vector in joined for part in self.split(vector)]
        torch._foreach_copy_(list(into), parts)


def _at_least_1(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
