"""How the heads come into the student's optimizer, at a learning rate of their own."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vid_loss.checks import check_number
from vid_loss.losses import VIDLoss

# What explains about as much as any, on validation data (examples/paper/q_fit): Adam's rates from
# 2e-3 to 2e-2, and those of RMSprop, Lion, LAMB and MADGRAD. Others would have more of them, but
# with none is a fine-tuning rate enough. SGD moves a weight by rate times lambda: from 0.3 to 3 on
# images, of which a wide text encoder wants the higher ones; from 9 on heads swing, and explain
# less. A small lambda may be raised later, and clipped gradients do not shrink with it: below the
# default it raises no rate.
HEAD_LEARNING_RATE = 5e-3
SGD_HEAD_STEP = 0.9
_SGD = ("sgd", "momentum", "nesterov")  # timm's names of it
_WRAPPED = ("optimizer", "base_optimizer", "_base_optimizer")  # Accelerate, SAM, timm's Lookahead


def head_learning_rate(
    optimizer: Optimizer | str,
    lr: float | None = None,
    *,
    weight: float = VIDLoss.default_weight,
) -> float:
    """Returns the rate at which heads are fitted beside a student, whatever the student's is.

    Most optimizers move a weight by the rate itself, however large the gradient is, as Adam does:
    their heads have ``HEAD_LEARNING_RATE`` at least. SGD's step grows with lambda: its heads have
    ``SGD_HEAD_STEP / weight`` at least, and for weights up to the default 0.3.

    Args:
        optimizer: the student's, or its name.
        lr: its rate; that of its first group if None.
        weight: lambda; of several pairs, the largest.
    """
    if lr is None and not isinstance(optimizer, str):
        lr = optimizer.param_groups[0]["lr"]
    least = HEAD_LEARNING_RATE
    names = [name.lower() for name in _names_of(optimizer)]
    if any(sgd in name for sgd in _SGD for name in names if "sign" not in name):
        least = SGD_HEAD_STEP / max(weight, VIDLoss.default_weight)
    return max(float(lr or 0), least)


def _names_of(optimizer: Optimizer | str) -> list[str]:
    """Returns what an optimizer is called: most are in other libraries and share no class."""
    if isinstance(optimizer, str):
        return [optimizer]
    inside = (getattr(optimizer, name, None) for name in _WRAPPED)
    wrapped = next((x for x in inside if isinstance(x, Optimizer)), None)
    return [x.__name__ for x in type(optimizer).__mro__] if wrapped is None else _names_of(wrapped)


class TrainedHeads(nn.Module):
    """Heads that the student's optimizer trains.

    Attributes:
        weights: lambda of each pair by name.
        own_rate: the learning rate that the heads were given; None if they were given none.
    """

    weights: dict[str, float]
    own_rate: float | None = None

    @property
    def largest_weight(self) -> float:
        """The largest lambda."""
        return max(self.weights.values(), default=0.0)

    def add_to(
        self,
        optimizer: Optimizer,
        *,
        lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Adds the heads' parameters to the student's optimizer, at a rate of their own.

        A student that is fine-tuned with Adam at 5e-5 keeps what it knows; a head starts at random,
        and at that rate would not be fitted in thousands of steps. A scheduler is built after this.

        Args:
            optimizer: the student's.
            lr: as for :meth:`parameter_groups`.
            weight_decay: as for :meth:`parameter_groups`.

        Raises:
            TypeError: if it is no optimizer.
            ValueError: if it has them already, or an option is out of range.
        """
        if not hasattr(optimizer, "add_param_group"):
            raise TypeError(
                "Distiller, add_to: expected the student's optimizer, one of torch's; got "
                f"{optimizer!r}. {_instead_of(optimizer)}"
            )
        groups, rate = self._groups(optimizer, lr, weight_decay)
        there = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in there for group in groups for p in group["params"]):
            raise ValueError(
                "Distiller, add_to: expected an optimizer without the heads; got one that has them "
                "already. Add them once."
            )
        for group in groups:
            optimizer.add_param_group(group)
        self.own_rate = rate

    def parameter_groups(
        self,
        optimizer: Optimizer | None = None,
        *,
        lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Returns the heads' parameters in groups for an optimizer, with a rate of their own.

        For one that is built from them; :meth:`add_to` gives them to one that is there::

            groups = [{"params": student.parameters()}, *distiller.parameter_groups()]
            optimizer = torch.optim.AdamW(groups, lr=5e-5)

        Args:
            optimizer: what they are for; None if it is yet to be built.
            lr: their learning rate. None is :func:`head_learning_rate` of the optimizer, and
                ``HEAD_LEARNING_RATE`` without one.
            weight_decay: the decay of weight matrices; norms, biases and variances have none.

        Returns:
            One group, or two if there is a decay. With an ``lr_scale`` if the optimizer's have
            one, with which loops and timm's scheduler multiply the rate that they set.
        """
        groups, rate = self._groups(optimizer, lr, weight_decay)
        if self.own_rate is None:  # who only looks at them changes nothing
            self.own_rate = rate
        return groups

    def _groups(
        self, optimizer: Optimizer | None, lr: float | None, weight_decay: float
    ) -> tuple[list[dict[str, Any]], float | None]:
        """Returns the groups, and the heads' rate; None if there are no heads."""
        weight = self.largest_weight
        groups = _groups_of(list(self.parameters()), optimizer, lr, weight_decay, weight)
        if not groups:
            return [], None
        rate = groups[0]["lr"]
        scaled = {} if optimizer is None else _scaled(optimizer, rate)
        return [{**group, **scaled} for group in groups], rate


def _instead_of(optimizer: object) -> str:
    """Says what to do with what is no optimizer of torch's."""
    inner = [
        name for name, x in getattr(optimizer, "__dict__", {}).items() if isinstance(x, Optimizer)
    ]
    if inner:
        return f"It holds one: distiller.add_to(optimizer.{inner[0]})"
    if hasattr(optimizer, "step"):
        return (
            "One of another library takes list(distiller.parameters()) as a group more when it is "
            "built."
        )
    return "One that is yet to be built takes distiller.parameter_groups() beside its own groups."


def _groups_of(
    parameters: list[nn.Parameter],
    optimizer: Optimizer | None,
    lr: float | None,
    weight_decay: float,
    weight: float,
) -> list[dict[str, Any]]:
    """Returns parameters in groups, as :meth:`TrainedHeads.parameter_groups` says."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "Distiller, parameter_groups, optimizer: expected an optimizer or None; got "
            f"{optimizer!r}. A rate is given by name: parameter_groups(lr=...)."
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None or name != "lr":
            source = f"Distiller, parameter_groups, {name}"
            check_number(source, value, "For example lr=5e-3, weight_decay=1e-4.")
    if lr is None:
        lr = HEAD_LEARNING_RATE
        if optimizer is not None:
            lr = head_learning_rate(optimizer, weight=weight)
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0, "lr": lr}] if parameters else []
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": x, "weight_decay": decay, "lr": lr} for x, decay in groups if x]


def _scaled(optimizer: Optimizer, rate: float) -> dict[str, float]:
    """Returns what a group has for its rate beside others that have an ``lr_scale``.

    Those are at the optimizer's rate until the first step, or have been multiplied already.
    """
    scaled = [group for group in optimizer.param_groups if "lr_scale" in group]
    base = float(getattr(optimizer, "defaults", {}).get("lr") or 0)
    if not scaled:
        return {}
    if not base:
        return {"lr_scale": 1.0}
    multiplied = any(
        group["lr_scale"] != 1 and math.isclose(group["lr"], base * group["lr_scale"])
        for group in scaled
    )
    return {"lr": rate if multiplied else base, "lr_scale": rate / base}
