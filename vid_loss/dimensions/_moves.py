"""Which layers change with the inputs that have a mask's positions: what the mask is of."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Moves = Callable[[str, Tensor, Mapping[str, Any]], bool]  # by name, tensor and what it is in


def moved_with(mask: Tensor) -> tuple[Moves, Moves]:
    """Returns what tells the inputs that have the mask's positions, and those of its decoder."""

    def masked(name: str, tensor: Tensor, _: Mapping[str, Any]) -> bool:
        return tensor.shape[:2] == mask.shape and "mask" not in name

    def decoded(name: str, tensor: Tensor, siblings: Mapping[str, Any]) -> bool:
        # Labels become a decoder's inputs; no feature of another model changes with them.
        is_decoded = name == "labels" or name.startswith("decoder_")
        return is_decoded and siblings.get("attention_mask") is mask

    return masked, decoded


def changed(
    features: Mapping[str, Tensor],
    read: Callable[..., Mapping[str, Tensor]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    moves: Moves,
) -> set[str] | None:
    """Returns the layers that change when some inputs do; None if that cannot be found out.

    Args:
        features: of the example, by layer.
        read: runs the model on inputs, and returns the same of them.
        args: the example's positional arguments.
        kwargs: its keyword arguments.
        moves: tells the inputs that are moved, each by a position.
    """
    moved: list[bool] = []

    def move(value: Any, name: str, siblings: Mapping[str, Any]) -> Any:
        if isinstance(value, Tensor):
            if value.ndim < 2 or not moves(name, value, siblings):
                return value
            rolled = value.roll(1, 1)
            moved.append(not torch.equal(rolled, value))
            return rolled
        if isinstance(value, Mapping):
            return {key: move(x, str(key), value) for key, x in value.items()}
        return value

    others = [move(x, "", {}) for x in args]
    named = move(kwargs, "", {})
    if not any(moved):
        return None
    try:
        found = read(*others, **named)
    except Exception:  # any that the user's model has for inputs that it was not made for
        return None
    return {layer for layer, x in features.items() if not torch.equal(x, found[layer])}
