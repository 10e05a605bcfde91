"""The losses of one step, from the features of its pairs."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .losses.together import Prediction, nll_of_pairs
from .losses.vid import joins
from .pairs import Pair


class OfStep(NamedTuple):
    """A pair that has a weight, and its features as the loss takes them."""

    name: str
    pair: Pair
    loss: nn.Module
    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    finite: Tensor | None  # whether the teacher's feature is, where the host does not look


def terms_of(pairs: Iterable[OfStep]) -> dict[str, Tensor]:
    """Returns the loss of each pair, unweighted; 0 where the teacher's feature is not finite.

    Those of VIDLoss are computed together.
    """
    together = [(x, x.loss) for x in pairs if joins(x.loss)]
    parts: list[Prediction] = [
        x.pair.call(loss.predict, x.student, x.teacher, x.mask) for x, loss in together
    ]
    finite = [x.finite for x, _ in together]
    values = nll_of_pairs([loss for _, loss in together], parts, finite)
    terms = {x.name: value for (x, _), value in zip(together, values, strict=True)}
    for x in pairs:
        if x.name not in terms:
            teacher = x.teacher if x.finite is None else torch.where(x.finite, x.teacher, 0)
            terms[x.name] = x.pair.term(x.loss, x.student, teacher, x.mask)
        if x.finite is not None:
            terms[x.name] = torch.where(x.finite, terms[x.name], 0)
    return {x.name: terms[x.name] for x in pairs}
