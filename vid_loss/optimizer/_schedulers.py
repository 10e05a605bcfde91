"""Learning rate schedulers that were built before the heads came into the optimizer."""

import gc
from collections.abc import Callable, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

# They multiply what each group has, whenever it came; a chain is as good as its parts, which are
# found by themselves.
_GROUP_BY_GROUP = (
    StepLR,
    MultiStepLR,
    ExponentialLR,
    PolynomialLR,
    ReduceLROnPlateau,
    ChainedScheduler,
)

# Those that torch (2.14) stops in for want of a late group's rate, and two that undo a first
# factor which a late group has not had; each with whether one lacks something for the steps to
# come. Who has given it the late group's rate by hand, or is through with it, is let alone.
_LACKS: dict[Any, Callable[[Any], bool]] = {
    LambdaLR: lambda x: _is_short(x, x.lr_lambdas),
    MultiplicativeLR: lambda x: _is_short(x, x.lr_lambdas),
    CyclicLR: lambda x: _is_short(x, x.base_lrs),
    CosineAnnealingWarmRestarts: lambda x: _is_short(x, x.base_lrs),
    CosineAnnealingLR: lambda x: _is_short(x, x.base_lrs) and x.last_epoch < x.T_max,
    OneCycleLR: lambda x: _is_short(x, x.base_lrs) and x.last_epoch < x.total_steps,
    # After its last milestone it only calls a part, which is found by itself.
    SequentialLR: lambda x: x.last_epoch < max(getattr(x, "_milestones", ()), default=0),
    SWALR: lambda x: any("swa_lr" not in group for group in x.optimizer.param_groups),
    ConstantLR: lambda x: x.factor != 1 and x.last_epoch < x.total_iters,
    LinearLR: lambda x: x.start_factor != 1 and x.last_epoch < x.total_iters,
}


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


def will_fail(schedulers: list[LRScheduler]) -> list[str]:
    """Returns the names of those that are known to fail, or to give late groups a wrong rate.

    One that has made steps may be of an earlier phase and make no more: it is in doubt only. So is
    a cosine, which may end at T_max.
    """
    kinds = [(x, _kind(x)) for x in schedulers if getattr(x, "last_epoch", 0) < 1]
    known = [(x, kind) for x, kind in kinds if kind not in (None, CosineAnnealingLR)]
    return [type(x).__name__ for x, kind in known if _LACKS[kind](x)]


def in_doubt(schedulers: list[LRScheduler]) -> list[str]:
    """Returns what is to be said of those that may fail; nothing of those that go on rightly."""
    doubts = [(type(x).__name__, _doubt(x)) for x in schedulers]
    return [f"got {name}, built before they came, {doubt}" for name, doubt in doubts if doubt]


def _doubt(scheduler: LRScheduler) -> str:
    kind = _kind(scheduler)
    if kind is None:
        right = any(_computes_as(scheduler, x) for x in _GROUP_BY_GROUP)
        return "" if right else "of which is not known whether it has a rate for them"
    if not _LACKS[kind](scheduler):
        return ""
    if kind is CosineAnnealingLR:
        return "which is right up to T_max; torch stops with an error in the step after it"
    return "which will fail or give them a wrong rate if it makes more steps"


def _kind(scheduler: LRScheduler) -> Any:
    """Returns what it is of those above; None if it is none, or steps or computes on its own."""
    as_theirs = [x for x in _LACKS if _computes_as(scheduler, x)]
    return next((x for x in as_theirs if type(scheduler).step is x.step), None)


def _computes_as(scheduler: LRScheduler, kind: Any) -> bool:
    return isinstance(scheduler, kind) and type(scheduler).get_lr is kind.get_lr


def _is_short(scheduler: Any, of_groups: Sized) -> bool:
    return len(of_groups) < len(scheduler.optimizer.param_groups)
