"""The losses of several pairs at once.

On a GPU each operation on some hundred numbers is a launch, and among processes each sum of them
is a wait. The channels of all pairs, end to end, take as many as those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vid_loss.guards import several_processes

from ._group import Group, Selected

if TYPE_CHECKING:
    from .vid import VIDLoss


class Together:
    """A step's VID pairs: added one by one, computed together.

    Only what is alike is: pairs of other options or devices form a group of their own.
    """

    def __init__(self) -> None:
        self._groups: dict[object, Group] = {}
        self._several = several_processes()

    def add(
        self,
        name: str,
        loss: VIDLoss,
        selected: Selected,
        *,
        flagged: bool = False,
        named: Callable[[Exception, Tensor, Tensor], Exception] | None = None,
    ) -> None:
        """Takes one more pair.

        Args:
            name: the pair's.
            loss: its loss.
            selected: what :meth:`VIDLoss.select` returned.
            flagged: whether :meth:`nll` will be told if the teacher's feature is finite, where no
                host looks. If it is not, the batch changes no estimate of the pair and its
                gradient is 0, whatever its value.
            named: makes the pair's own error of one that its head, or what it says, has led to,
                from the two features.
        """
        scale, variance, target = loss.scale, loss.running_var, selected.target
        joined = self._several and loss.training
        kind = (
            *(loss.training, loss.standardize, loss.trained_var is None, scale.mean.device),
            *(variance.momentum, variance.floor, loss.reduction, scale.mean.dtype),
            *(joined or selected.mask is None, flagged),
        )
        if (group := self._groups.get(kind)) is None:
            group = self._groups[kind] = Group(loss, joined)
        count: Any = target.numel() // max(len(scale.mean), 1)
        if selected.mask is not None:
            count = selected.mask.sum()
        elif joined:  # in another process it may be one that a mask decides
            count = torch.full((), count, device=target.device)
        group.may_be_empty |= isinstance(count, Tensor) or not count
        group.pairs.append((loss.head, selected, named))
        group.names.append(name)
        group.counts.append(count)
        group.divisors.append(count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        if loss.reduction == "none":
            samples = max(len(target), 1)
            per_sample = count / samples if selected.mask is None else selected.mask.sum(1)
            group.per_sample.append(per_sample)
        group.left_out.append(selected.left_out)
        group.sizes.append(len(scale.mean))
        group.positions.append(scale.positions)
        group.means.append(scale.mean)
        group.variances.append(scale.var)
        group.residuals.append(variance.var)
        if loss.trained_var is not None:
            group.trained.append(loss.trained_var())

    def nll(self, infinite: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns ``-log q(t|s)`` of each pair by name; in train mode estimates are updated first.

        To be called once: what was added is freed as it is used.

        Args:
            infinite: flags, ``()``, of the pairs that were added as flagged.
        """
        values: dict[str, Tensor] = {}
        for group in self._groups.values():
            values |= group.nll(infinite or {})
        return values
