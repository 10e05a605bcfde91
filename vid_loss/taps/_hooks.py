"""The hooks of a tap, and what they write to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._layers import LayerSpec


class Capture(NamedTuple):
    """A feature, and what must still hold when it is used."""

    tensor: Tensor
    version: int | None  # None where torch keeps no version: compiled, or in inference mode
    grad_enabled: bool


class Complete(Exception):
    """Raised out of a model's forward when its last tapped layer has been read."""


class Recorder:
    """What the hooks write to.

    It knows no module, so that hooks keep neither a tap nor a model alive.

    Attributes:
        stop_after: end the forward with :class:`Complete` when so many layers have been read.
    """

    def __init__(self, train_only: bool) -> None:
        self.train_only = train_only
        self.stop_after: int | None = None
        self.enabled = True
        self.armed = False
        self.ran = False
        self.captures: dict[str, Capture] = {}
        self.calls: dict[str, int] = {}

    def clear(self) -> None:
        """Forgets the last forward."""
        self.armed = False
        self.ran = False
        self.captures = {}
        self.calls = {}

    def record(self, key: str, tensor: Tensor) -> None:
        """Keeps a reference to a layer's feature."""
        # Store only: an operation here would be recomputed by checkpointing, or lost by it.
        untracked = torch.compiler.is_compiling() or tensor.is_inference()
        version = None if untracked else tensor._version
        self.captures[key] = Capture(tensor, version, torch.is_grad_enabled())
        self.calls[key] = self.calls.get(key, 0) + 1
        if len(self.captures) == self.stop_after:
            # As at the end of a forward, so that nobody takes this for one that failed.
            self.armed, self.ran = False, True
            raise Complete


def _inert(*_: Any) -> None:
    """What a hook becomes in a copy of its model."""


def _load_inert() -> Callable[..., None]:
    return _inert


class _Hook:
    """A hook that does not follow its model into a copy, a pickle or an EMA."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _load_inert, ()


class Arm(_Hook):
    """Before the model's forward. Only what happens inside one is recorded."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Starts recording, unless this forward is not one to record."""
        recorder = self.recorder
        if recorder.enabled and (
            not recorder.train_only or (module.training and torch.is_grad_enabled())
        ):
            recorder.clear()
            recorder.armed = True


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
        # Backward runs checkpointed layers again: by then the recorder is not armed.
        if self.recorder.armed:
            self.recorder.record(self.spec.text, self.spec.select(output))


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
