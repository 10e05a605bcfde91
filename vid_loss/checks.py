"""Checks of arguments: a pair's names, transforms and loss, and rates."""

import math
from collections.abc import Callable
from itertools import chain
from numbers import Real

import torch
from torch import Tensor, nn


def check_number(source: str, value: object, remedy: str) -> None:
    """Refuses what is no learning rate, weight or decay.

    Args:
        source: the object and the argument.
        value: to be looked at.
        remedy: what to do, such as an example.

    Raises:
        ValueError: if it is no finite number, or below 0.
    """
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{source}: expected a number, 0 or more; got {value!r}. {remedy}")


def check_names(student: object, teacher: object, name: object) -> None:
    """Refuses a pair's layers that are not named, and a name that cannot be a module's.

    Raises:
        TypeError: if a layer is no string.
        ValueError: if the pair's name is none, or taken.
    """
    for argument, layer in (("student", student), ("teacher", teacher)):
        if not isinstance(layer, str):
            raise TypeError(
                f"Pair, {argument}: expected a layer's name, such as 'layer3'; got {layer!r}. The "
                f"names are in print(vid_loss.list_layers({argument}, example))."
            )
    if name is not None and (
        not isinstance(name, str) or not name or hasattr(nn.ModuleDict(), name)
    ):
        raise ValueError(
            f"Pair {student!r} -> {teacher!r}, name: expected a name that is not empty and that "
            f"nn.ModuleDict does not use itself; got {name!r}."
        )


def check_callable(pair: object, argument: str, transform: object) -> None:
    """Refuses what is no transform, or one whose own weights nobody would train.

    Raises:
        TypeError: if it cannot be called.
        ValueError: if it is a module that has something to train.
    """
    if transform is not None and not callable(transform):
        raise TypeError(
            f"{pair}, {argument}: expected a function of the feature; got {transform!r}. For "
            "example lambda x: x[:, 1:]."
        )
    if isinstance(transform, nn.Module) and any(p.requires_grad for p in transform.parameters()):
        raise ValueError(
            f"{pair}, {argument}: expected nothing to be trained in it; got a "
            f"{type(transform).__name__}, which is in no parameters(). Make it the head: "
            "loss=functools.partial(VIDLoss, head=...)."
        )


def check_transform(
    pair: str, owner: str, transform: Callable[[Tensor], Tensor], feature: Tensor
) -> None:
    """Refuses a transform that writes to its feature, or that the student cannot learn through.

    Raises:
        ValueError: if it does one of the two.
    """
    if feature.is_inference() or not feature.is_floating_point():
        return
    before = feature._version
    with torch.enable_grad():
        followed = (feature.detach().clone().requires_grad_() * 1) if owner == "student" else None
        transformed = transform(feature if followed is None else followed)
    written = followed is not None and followed._version > 0
    if written or feature._version != before:
        raise ValueError(
            f"{pair}, {owner}_transform: expected it to leave the feature as it was, which other "
            "pairs and the model itself have too; it writes to it. Let it begin with x = x.clone()."
        )
    if followed is None or not isinstance(transformed, Tensor) or transformed.requires_grad:
        return
    raise ValueError(
        f"{pair}, student_transform: expected a result that the student learns through; got one "
        "without a gradient. Take detach(), torch.no_grad() or numpy out of it."
    )


def refuse_shared(pair: object, loss: nn.Module, losses: nn.ModuleDict) -> None:
    """Raises a ValueError if a loss that keeps something is another pair's as well.

    Args:
        pair: named in the message.
        loss: the pair's.
        losses: those of other pairs.
    """
    other = next((key for key, x in losses.items() if x is loss), None)
    if other is not None and next(chain(loss.parameters(), loss.buffers()), None) is not None:
        raise ValueError(
            f"{pair}, loss: expected a module of its own, as it keeps what it learns; got that of "
            f"{other!r} as well. Pass copy.deepcopy(loss), or what builds one: loss=VIDLoss."
        )
