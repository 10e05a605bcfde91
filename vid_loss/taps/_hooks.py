"""The hooks of a tap, and what they write to."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ._batches import Batches, batch_of
from ._layers import LayerSpec

Mode = Literal["always", "training", "read"]


class Capture(NamedTuple):
    """A feature, and what must still hold when it is used."""

    tensor: Tensor
    version: int | None  # None where torch keeps no version: compiled, or in inference mode
    without_grad: Literal["", "no_grad", "checkpoint"]  # what turned them off in training
    calls: int


class Complete(Exception):
    """Raised out of a model's forward when its last tapped layer has been read."""


class Recorder:
    """What the hooks write to.

    It knows no module, so that hooks keep neither a tap nor a model alive.

    Attributes:
        mode: which forwards are recorded.
        stop_after: end the forward with :class:`Complete` when so many layers have been read.
        copied: whether the model has been deep-copied since it was tapped.
        compiled: whether the last forward was a compiled one.
        armed: whether a forward is being recorded.
        inside: whether the model is running, recorded or not.
        ran: whether a recorded forward has ended.
        passed: why the last forward was not recorded, in words.
        outside: a tapped layer that ran while the model did not.
        captures: the features of the last recorded forward.
        batches: what the last recorded forwards were given.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.stop_after: int | None = None
        self.copied = False
        self.compiled = False
        self.inside = False
        self.batches = Batches()
        self.clear()

    def clear(self) -> None:
        """Forgets the last forward."""
        self.armed = False
        self.ran = False
        self.passed = ""
        self.outside = ""
        self.captures: dict[str, Capture] = {}

    def record(self, key: str, tensor: Tensor) -> None:
        """Keeps a reference to a layer's feature."""
        # Store only: an operation here would be recomputed by checkpointing, or lost by it.
        compiling = torch.compiler.is_compiling()
        version = None if compiling or tensor.is_inference() else tensor._version
        without_grad: Literal["", "no_grad", "checkpoint"] = ""
        if self.mode == "training" and not torch.is_grad_enabled():
            reentrant = not compiling and _in_reentrant_checkpoint()
            without_grad = "checkpoint" if reentrant else "no_grad"
        earlier = self.captures.get(key)
        calls = 1 if earlier is None else earlier.calls + 1
        self.captures[key] = Capture(tensor, version, without_grad, calls)
        if len(self.captures) == self.stop_after:
            # As at the end of a forward, so that nobody takes this for one that failed.
            self.armed, self.ran = False, True
            raise Complete

    def note_outside(self, key: str) -> None:
        """Remembers that a layer ran although the model was not called."""
        # Backward runs checkpointed layers again, which is nobody's mistake.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self.outside = key


def _in_reentrant_checkpoint() -> bool:
    """Whether gradients are off because torch's checkpoint turned them off, not the model."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        inside_checkpoint = frame.f_globals.get("__name__") == "torch.utils.checkpoint"
        if inside_checkpoint and frame.f_code.co_name == "forward":
            return True
    return False


def _inert(*_: Any) -> None:
    """What a hook becomes in a copy of its model."""


def _load_inert() -> Callable[..., None]:
    return _inert


class UncopiedHook:
    """A hook that does nothing in a copy, a pickle or an EMA of its model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _load_inert, ()


class _Hook(UncopiedHook):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder


class Arm(_Hook):
    """Before the model's forward. Only what happens inside one is recorded."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Starts recording, unless this forward is not one to record."""
        recorder = self.recorder
        recorder.inside = True
        if recorder.mode == "read":
            return
        if recorder.mode == "training" and not (module.training and torch.is_grad_enabled()):
            recorder.passed = "with gradients off" if module.training else "in eval mode"
            return
        recorder.clear()
        recorder.armed = True
        recorder.compiled = torch.compiler.is_compiling()
        if not recorder.compiled and recorder.mode == "training":
            recorder.batches.add(batch_of(args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Notes the copy: it may be what is trained from now on, and nothing of it is read."""
        self.recorder.copied = True
        return super().__deepcopy__(memo)


class Disarm(_Hook):
    """After the model's forward. It does not look at the output: see `Abandon`."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends recording."""
        recorder = self.recorder
        if recorder.armed:
            recorder.armed = False
            recorder.ran = True


class Abandon(_Hook):
    """Called even when the forward raised; still armed then, because `Disarm` was not called.

    Asking whether the output is None would tell as much, but dynamo compiles the hooks of a
    compiled model as functions of their own and warns when one of them touches a tensor.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forgets what was recorded of a forward that did not end."""
        self.recorder.inside = False
        if self.recorder.armed:
            self.recorder.clear()


class _Layer(_Hook):
    def __init__(self, recorder: Recorder, spec: LayerSpec) -> None:
        super().__init__(recorder)
        self.spec = spec


class Output(_Layer):
    """After a tapped layer's forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Records what the layer returned."""
        if self.recorder.armed:
            self.recorder.record(self.spec.text, self.spec.select(output))
        elif not self.recorder.inside:
            self.recorder.note_outside(self.spec.text)


class Input(_Layer):
    """Before a tapped layer's forward, which may change its input in place."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Records what the layer is given: by position, else by name."""
        if self.recorder.armed:
            entries = self.spec.entries
            by_name = bool(entries) and isinstance(entries[0], str)
            value: Any = kwargs if by_name or not args else args
            if not entries and args:
                value = args[0]
            self.recorder.record(self.spec.text, self.spec.select(value))
        elif not self.recorder.inside:
            self.recorder.note_outside(self.spec.text)


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Puts back each module's ``forward`` after one that ends early.

    transformers 4.57 replaces it for the length of a call, to record hidden states, and does not
    put it back when an exception comes through.
    """
    own = [(vars(module), vars(module).get("forward")) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, forward in own:
            attributes.pop("forward", None)
            if forward is not None:
                attributes["forward"] = forward
