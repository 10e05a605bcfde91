"""The frozen network that is learnt from."""

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .calls import explained, inputs_of_teacher, takes
from .guards import plain_tensors
from .taps import FeatureTap, Given

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()
# What a model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def as_call(inputs: Inputs, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments that ``inputs`` stands for.

    Raises:
        TypeError: if it is none of the three forms.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    name = type(inputs).__name__
    advice = f"A model that takes a {name} as its one argument: (batch,)."
    if isinstance(inputs, DataLoader):
        advice = "Give the inputs of a batch: images, labels = next(iter(loader)), then images."
    elif hasattr(inputs, "__array__"):
        advice = "Make it a tensor: torch.as_tensor(batch)."
    elif isinstance(inputs, list):
        advice = f"A loader's batch of images and labels: give batch[0]. {advice}"
    elif isinstance(inputs, tuple):  # a named one, such as a PackedSequence, may be meant both ways
        advice += " One that takes its entries: tuple(batch)."
    raise TypeError(
        f"{source}: expected a tensor, a tuple of positional or a dict of keyword arguments; "
        f"got {name}. {advice}"
    )


def check_teacher_inputs(source: str, teacher_inputs: object) -> None:
    """Refuses what cannot make the teacher's inputs of the student's.

    Raises:
        TypeError: if it cannot be called.
    """
    if teacher_inputs is not None and not callable(teacher_inputs):
        raise TypeError(
            f"{source}, teacher_inputs: expected a function of the student's arguments; got "
            f"{type(teacher_inputs).__name__}. For example teacher_inputs=lambda images: "
            "(images - mean) / std."
        )


class Teacher:
    """A teacher and its tap: held, not registered, never trained, shared by copies.

    Args:
        model: the teacher.
        layers: specs of the layers to read.
        inputs: maps the student's arguments to the teacher's; None gives it the same.
        dtype: runs the teacher under autocast in this dtype; None leaves it as it is.

    Attributes:
        lock: held while the model is in eval mode for a call.
        beside: the device that it is on and its inputs are; None if it follows nobody.
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
        self.beside: torch.device | None = None
        self.lock = _lock_of(self.tap.model)
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
        where its loader puts it. Nothing else has the teacher's weights: what gives a student's
        away, to the meta device or as empty memory to be loaded into, moves it at most.
        """
        if not self._is_movable():
            return
        probe = torch.arange(64.0, device=self._tensors()[0].device)
        moved = fn(probe)
        if moved.is_meta:
            return
        if torch.equal(moved.to(probe), probe):  # they are exact in any dtype
            self.tap.model._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        else:
            self.tap.model.to(moved.device)

    def _is_movable(self) -> bool:
        tensors = self._tensors()
        return bool(tensors) and not (self._borrowed or any(x.is_meta for x in tensors))

    def _tensors(self) -> list[Tensor]:
        return [*self.tap.model.parameters(), *self.tap.model.buffers()]

    def stay_beside(self, given: Given) -> None:
        """From now on, moves with what it is given, if it is on one device with that."""
        here = next((x.device for x in given.tensors), None)
        if {p.device for p in self.tap.model.parameters()} == {here}:
            self.beside = here

    def follow(self, given: Given, student: nn.Module) -> None:
        """Moves to where the inputs are, if the student is there as well."""
        if self.beside is None or not given.tensors or given.tensors[0].device == self.beside:
            return
        now = given.tensors[0].device
        if now in {p.device for p in student.parameters()}:
            if self._is_movable():
                self.tap.model.to(now)
            self.beside = now

    def features(self, given: Given) -> dict[str, Tensor]:
        """Runs the teacher on the student's arguments.

        Raises:
            RuntimeError: if it changes them in place.
            TypeError: if it does not take them.
        """
        inputs = self.arguments(given.args, given.kwargs)
        try:
            features = self.run(*inputs)
        except Exception as error:
            remedy = inputs_of_teacher(self.tap.model, Given(*inputs).tensors, self.dtype)
            found = explained(
                error, "Distiller, teacher", "teacher", self.tap.model, *inputs, remedy
            )
            if found is None:
                raise
            raise found from error
        if given.changed():
            raise RuntimeError(
                "Distiller, teacher: expected its inputs as they were; it, or teacher_inputs, has "
                "changed them in place, and the student's with them. Clone them in teacher_inputs: "
                "lambda *args, **kwargs: copy.deepcopy(kwargs or args)."
            )
        return features

    @torch.no_grad()
    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Returns the teacher's arguments for the student's."""
        if self.inputs is None:
            return args, kwargs
        try:
            inputs = self.inputs(*args, **kwargs)
        except TypeError as error:
            if takes(self.inputs, args, kwargs):
                raise
            raise TypeError(
                "Distiller, teacher_inputs: expected a function of the student's arguments, "
                f"{len(args)} by position and {list(kwargs)} by name; got one that does not take "
                f"them: {error}. For example teacher_inputs=lambda images: (images - mean) / std."
            ) from error
        return as_call(inputs, "teacher_inputs")

    @torch.no_grad()
    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the teacher on arguments of its own, in eval mode and without gradients."""
        # Two threads may have one teacher, and modes are the model's. Not model.eval(), which some
        # models override to leave a part in train mode. Put back afterwards, because a part may be
        # the student's as well.
        with nullcontext() if torch.compiler.is_compiling() else self.lock:
            in_train_mode = _in_train_mode(self.tap.model)
            for module in in_train_mode:
                module.training = False
            padded = plain_tensors(self.tap.model.modules()) if self._may_nest else nullcontext()
            try:
                with self._precision(args, kwargs), padded:
                    return self.tap.read(*args, **kwargs)
            finally:
                for module in in_train_mode:
                    module.training = True

    def _precision(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[Any]:
        for parameter in self.tap.model.parameters():
            if not parameter.is_meta:  # as weights are that are loaded when they are needed
                device = parameter.device.type
                break
        else:
            tensors = Given(args, kwargs).tensors
            device = tensors[0].device.type if tensors else "cpu"
        autocast = torch.is_autocast_enabled(device)
        if self.dtype is None and not autocast:
            return nullcontext()
        dtype = self.dtype or torch.get_autocast_dtype(device)
        # Without its cache: what is cast here has no gradient, and torch 2.8 would give it to a
        # student that shares the layer and runs next.
        return torch.autocast(device, dtype=dtype, cache_enabled=False)


def _lock_of(model: nn.Module) -> Any:
    """Returns the lock of a model, the same for all who teach with it."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def _in_train_mode(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a model that are in train mode. In every step, so not by modules()."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if module.training:
            found.append(module)
        waiting.extend(module._modules.values())
    return found
