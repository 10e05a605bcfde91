"""Learning rate schedulers that were built before the heads came into the optimizer."""

import gc
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ExponentialLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

# They multiply what each group has, whenever it came; a chain is as good as its parts, which are
# found by themselves. LinearLR and ConstantLR multiply too, but undo a first factor that late
# groups have not had.
_GROUP_BY_GROUP = (
    StepLR,
    MultiStepLR,
    ExponentialLR,
    PolynomialLR,
    ReduceLROnPlateau,
    ChainedScheduler,
)


def heads_came_late(optimizer: Optimizer, heads: Mapping[int, Tensor]) -> bool:
    """Whether something has set up the optimizer's other groups for a schedule, and not theirs.

    Args:
        optimizer: that has the heads.
        heads: their parameters by identity.
    """
    without = [group for group in optimizer.param_groups if "initial_lr" not in group]
    theirs = any(id(p) in heads for group in without for p in group["params"])
    return theirs and len(without) < len(optimizer.param_groups)


def schedulers_of(optimizer: Optimizer) -> list[LRScheduler]:
    """Returns torch's schedulers of an optimizer, also of one that an engine has wrapped."""
    # type(), because isinstance asks an object for its class, which makes a lazy one load.
    schedulers = [x for x in gc.get_objects() if issubclass(type(x), LRScheduler)]
    groups = optimizer.param_groups
    return [
        x
        for x in schedulers
        if getattr(getattr(x, "optimizer", None), "param_groups", None) is groups
    ]


def cannot_go_on(schedulers: list[LRScheduler]) -> list[str]:
    """Returns the names of those that will fail, or give late groups a wrong rate."""
    return [type(x).__name__ for x in schedulers if type(x) not in _GROUP_BY_GROUP]
