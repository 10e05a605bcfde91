"""The hooks of a tap, and what they note of a call."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ._layers import LayerSpec
from ._recorder import Batch, Capture, Forward, Recorder, StopForward

_DEEPEST = 6  # a batch is a mapping of lists of targets, say; what is deeper is no input


class Given:
    """What a model is called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        tensors: those in lists, mappings and objects too, as a batch may be. Empty while
            compiling, where tensors have no identity to compare.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.tensors: list[Tensor] = []
        self._state: list[tuple[int, int]] = []
        level = [] if is_compiling() else [*args, *kwargs.values()]
        for _ in range(_DEEPEST):
            deeper: list[Any] = []
            for value in level:
                if isinstance(value, Tensor):
                    self.tensors.append(value)  # held, so that no other tensor gets its id
                    self._state.append((id(value), 0 if value.is_inference() else value._version))
                elif isinstance(value, Mapping):
                    deeper.extend(value.values())
                elif isinstance(value, list | tuple):
                    deeper.extend(value)
                elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
                    deeper.extend(vars(value).values())
            level = deeper

    def changed(self) -> bool:
        """Whether a tensor has been written to since, or another stands in its place."""
        return Given(self.args, self.kwargs)._state != self._state

    def numbers_changed(self) -> bool:
        """Whether a tensor of numbers has; indices and labels are a model's own to mark."""
        state = zip(self.tensors, self._state, strict=True)
        return any(
            x.is_floating_point() and not x.is_inference() and x._version != version
            for x, (_, version) in state
        )

    def batch(self) -> Batch:
        """Returns what tells these tensors from others, and keeps none of them alive."""
        keys = {}
        for tensor in self.tensors:
            if tensor.is_inference() or tensor.is_nested or tensor.layout is not torch.strided:
                continue
            # Of a slice there is a new tensor each time, and what is written may be beside it.
            base = tensor if tensor._base is None else tensor._base
            written = base._version if base.numel() == tensor.numel() else 0
            where = (id(base), tensor.storage_offset(), tensor.shape, tensor.stride(), written)
            keys[where] = weakref.ref(base)
        return keys


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
        if recorder.thread and not is_compiling() and recorder.thread != get_ident():
            return
        recorder.inside = True
        if recorder.mode == "read":
            return
        if recorder.mode == "training" and not (module.training and torch.is_grad_enabled()):
            recorder.last.passed = "with gradients off" if module.training else "in eval mode"
            return
        recorder.last = Forward(armed=True)
        recorder.compiled = is_compiling()
        if not recorder.compiled and recorder.mode == "training":
            recorder.batches.append(Given(args, kwargs).batch())

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Notes the copy: it may be what is trained from now on, and nothing of it is read."""
        self.recorder.copied = True
        return super().__deepcopy__(memo)


class Disarm(_Hook):
    """After the model's forward. It does not look at the output: see `Abandon`."""

    def __call__(self, *_: Any) -> None:
        """Ends recording."""
        recorder, forward = self.recorder, self.recorder.last
        if recorder.thread and not is_compiling() and recorder.thread != get_ident():
            return
        if forward.armed:
            forward.armed, forward.ran = False, True


class Abandon(_Hook):
    """Called even when the forward raised; still armed then, because `Disarm` was not called.

    Asking whether the output is None would tell as much, but dynamo compiles the hooks of a
    compiled model as functions of their own and warns when one of them touches a tensor. Up to
    torch 2.13 a name of its own touches it: hence ``*_``, here and in `Disarm`.
    """

    def __call__(self, *_: Any) -> None:
        """Forgets what was recorded of a forward that did not end."""
        recorder = self.recorder
        if recorder.thread and not is_compiling() and recorder.thread != get_ident():
            return
        recorder.inside = False
        if recorder.last.armed:
            recorder.last = Forward()


class _Layer(_Hook):
    def __init__(self, recorder: Recorder, spec: LayerSpec) -> None:
        super().__init__(recorder)
        self.spec = spec

    def record(self, tensor: Tensor) -> None:
        """Keeps a reference to the layer's feature."""
        recorder, key = self.recorder, self.spec.text
        # Store only: an operation here would be recomputed by checkpointing, or lost by it.
        compiling = is_compiling()
        version = None if compiling or tensor.is_inference() else tensor._version
        without_grad: Literal["", "no_grad", "checkpoint"] = ""
        if recorder.mode == "training" and not torch.is_grad_enabled():
            reentrant = not compiling and _in_reentrant_checkpoint()
            without_grad = "checkpoint" if reentrant else "no_grad"
        forward = recorder.last
        earlier = forward.captures.get(key)
        calls = 1 if earlier is None else earlier.calls + 1
        forward.captures[key] = Capture(tensor, version, without_grad, calls)
        if len(forward.captures) == recorder.stop_after:
            # As at the end of a forward, so that nobody takes this for one that failed.
            forward.armed, forward.ran = False, True
            raise StopForward

    def note_outside(self) -> None:
        """Remembers that the layer ran although the model was not called."""
        # Backward runs checkpointed layers again, which is nobody's mistake.
        if not is_compiling() and torch._C._current_graph_task_id() == -1:
            self.recorder.last.outside = self.spec.text


class Output(_Layer):
    """After a tapped layer's forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Records what the layer returned."""
        recorder = self.recorder
        if recorder.thread and not is_compiling() and recorder.thread != get_ident():
            return
        if recorder.last.armed:
            plain = isinstance(output, Tensor) and not self.spec.entries
            self.record(output if plain else self.spec.select(output))
        elif not recorder.inside:
            self.note_outside()


class Input(_Layer):
    """Before a tapped layer's forward, which may change its input in place."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Records what the layer is given: by position, else by name."""
        recorder = self.recorder
        if recorder.thread and not is_compiling() and recorder.thread != get_ident():
            return
        if recorder.last.armed:
            entries = self.spec.entries
            by_name = bool(entries) and isinstance(entries[0], str)
            value: Any = kwargs if by_name or not args else args
            if not entries and args:
                value = args[0]
            self.record(self.spec.select(value))
        elif not recorder.inside:
            self.note_outside()


def register(
    recorder: Recorder,
    model: nn.Module,
    specs: Iterable[LayerSpec],
    modules: Mapping[str, nn.Module],
) -> list[RemovableHandle]:
    """Puts the hooks on a model and on its layers, which ``modules`` has by name."""
    # The order matters when a layer is the model itself: arm, capture, disarm.
    handles = [model.register_forward_pre_hook(Arm(recorder), with_kwargs=True)]
    for spec in specs:
        module = modules[spec.name]
        if spec.of_input:
            hook = Input(recorder, spec)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(Output(recorder, spec)))
    handles.append(model.register_forward_hook(Disarm(recorder)))
    handles.append(model.register_forward_hook(Abandon(recorder), always_call=True))
    return handles
