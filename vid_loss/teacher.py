"""The frozen network that is learnt from."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tap import FeatureTap

# What a model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def as_call(inputs: Inputs, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments that ``inputs`` stands for.

    Raises:
        TypeError: if it is none of the three forms.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise TypeError(
        f"{source}: expected a tensor, a tuple of positional or a dict of keyword arguments; "
        f"got {type(inputs).__name__}."
    )


def mask_in(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the ``(N, L)`` attention mask among keyword arguments, if there is one."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Teacher:
    """A teacher and its tap: held, not registered, never trained, shared by copies.

    Args:
        model: the teacher.
        layers: specs of the layers to read.
        inputs: maps the student's arguments to the teacher's; None gives it the same.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], inputs: Callable[..., Inputs] | None
    ) -> None:
        self.model = model
        self.tap = FeatureTap(model, layers, owner="teacher")
        # The user may run the teacher for other ends: nothing is kept from those forwards.
        self.tap.enabled = False
        self.inputs = inputs
        self._parts = tuple(self.tap.model.modules())
        self._borrowed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Nothing of it is trained, so an EMA need not double it."""
        shared = copy.copy(self)
        shared._borrowed = True
        return shared

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts the model, unless it belongs to another: an EMA may live on the CPU."""
        if not self._borrowed:
            self.tap.model._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @torch.no_grad()
    def features(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the teacher on the student's arguments, in eval mode and without gradients."""
        if self.inputs is not None:
            args, kwargs = as_call(self.inputs(*args, **kwargs), "teacher_inputs")
        for module in self._parts:
            # Not model.eval(), which some models override to leave a part in train mode.
            if module.training:
                module.training = False
        self.tap.enabled = True
        try:
            self.model(*args, **kwargs)
        finally:
            self.tap.enabled = False
        return self.tap.collect()
