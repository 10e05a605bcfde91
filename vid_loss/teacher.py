"""The frozen network that is learnt from."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .guards import plain_tensors
from .taps import FeatureTap

_DEEPEST = 6  # a batch is a mapping of lists of targets, say; what is deeper is no input
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
    wrap = " If the model takes a list as its one argument: (images,)."
    raise TypeError(
        f"{source}: expected a tensor, a tuple of positional or a dict of keyword arguments; "
        f"got {type(inputs).__name__}.{wrap if isinstance(inputs, list) else ''}"
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
        dtype: runs the teacher under autocast in this dtype; None leaves it as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        inputs: Callable[..., Inputs] | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The user may run the teacher for other ends: nothing is kept from those forwards.
        self.tap = FeatureTap(model, layers, record="read", owner="teacher")
        self.inputs = inputs
        self.dtype = dtype
        self._borrowed = False
        self._may_nest = any(isinstance(x, nn.TransformerEncoder) for x in self.tap.model.modules())

    def stop_early(self) -> None:
        """From now on, ends each forward at the last tapped layer."""
        self.tap.stop_early()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Another tap on the same model: nothing of it is trained, so an EMA need not double it."""
        twin = copy.copy(self)
        twin.tap = copy.copy(self.tap)
        twin._borrowed = True
        return twin

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts the model, unless it belongs to another: an EMA may live on the CPU.

        A model whose weights are loaded when they are needed, as accelerate offloads them, goes
        where its loader puts it.
        """
        offloaded = any(p.is_meta for p in self.tap.model.parameters())
        if not self._borrowed and not offloaded:
            self.tap.model._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def features(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the teacher on the student's arguments.

        Raises:
            RuntimeError: if it changes them in place.
            TypeError: if it does not take them.
        """
        _held, before = _state(args, kwargs)  # held, so that no other tensor gets its id
        features = self._run_on(args, kwargs)
        if _state(args, kwargs)[1] != before:
            raise RuntimeError(
                "Distiller, teacher: expected its inputs as they were; it, or teacher_inputs, has "
                "changed them in place, and the student's with them. Clone them in teacher_inputs: "
                "lambda *args, **kwargs: copy.deepcopy(kwargs or args)."
            )
        return features

    def _run_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        args, kwargs = self.arguments(args, kwargs)
        try:
            return self.run(args, kwargs)
        except TypeError as error:
            message = _misfit(self.tap.model, args, kwargs)
            if message is None:
                raise
            raise TypeError(message) from error

    @torch.no_grad()
    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Returns the teacher's arguments for the student's."""
        if self.inputs is None:
            return args, kwargs
        return as_call(self.inputs(*args, **kwargs), "teacher_inputs")

    @torch.no_grad()
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the teacher on arguments of its own, in eval mode and without gradients."""
        # Not model.eval(), which some models override to leave a part in train mode. Put back
        # afterwards, because a part may be the student's as well.
        in_train_mode = [module for module in self.tap.model.modules() if module.training]
        for module in in_train_mode:
            module.training = False
        padded = plain_tensors(self.tap.model.modules()) if self._may_nest else nullcontext()
        try:
            with self._precision((args, kwargs)), padded:
                return self.tap.read(*args, **kwargs)
        finally:
            for module in in_train_mode:
                module.training = True

    def _precision(self, inputs: Any) -> AbstractContextManager[Any]:
        # Weights that are loaded when they are needed are on no device before.
        held = [p for p in self.tap.model.parameters() if not p.is_meta]
        device = next((x.device.type for x in held or _tensors(inputs)), "cpu")
        autocast = torch.is_autocast_enabled(device)
        if self.dtype is None and not autocast:
            return nullcontext()
        dtype = self.dtype or torch.get_autocast_dtype(device)
        # Without its cache: what is cast here has no gradient, and torch 2.8 would give it to a
        # student that shares the layer and runs next.
        return torch.autocast(device, dtype=dtype, cache_enabled=False)


def _state(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Returns the tensors in a call's arguments; which they are and how often they were changed."""
    tensors: list[Tensor] = []
    if torch.compiler.is_compiling():
        return tensors, []  # it has no such count
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        else:
            tensors.extend(_tensors(value))
    return tensors, [(id(x), 0 if x.is_inference() else x._version) for x in tensors]


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors in lists, mappings and objects that hold some, as a batch may be."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEEPEST and not isinstance(value, str | bytes | nn.Module):
        if isinstance(value, Mapping):
            entries: Iterable[Any] = value.values()
        elif isinstance(value, list | tuple):
            entries = value
        else:
            entries = vars(value).values() if hasattr(value, "__dict__") else ()
        for entry in list(entries):
            yield from _tensors(entry, depth + 1)


def _misfit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Says what to do if a model cannot be called with these arguments at all."""
    try:
        takes = inspect.signature(model.forward)
        takes.bind(*args, **kwargs)
    except TypeError as error:
        given = [type(x).__name__ for x in args] + [f"{key}=..." for key in kwargs]
        return (
            f"Distiller, teacher: expected arguments for forward{takes}; got ({', '.join(given)}), "
            f"the student's or what teacher_inputs makes of them: {error}. Map them with "
            "teacher_inputs=lambda ...: (...), or give the part of the teacher that takes them."
        )
    return None
