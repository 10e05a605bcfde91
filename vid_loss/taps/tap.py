"""Named layers -> features, by forward hooks."""

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._hooks import Abandon, Arm, Capture, Disarm, Input, Output, Recorder
from ._layers import LayerSpec, find_layer, unwrap


class FeatureTap:
    """Reads the features of named layers while a model runs.

    A layer is a name of ``model.named_modules()``: its output. ``"fc:input"`` is what goes in
    (the first positional argument), ``"encoder[0]"`` and ``'encoder["hidden"]'`` one entry of a
    tuple or mapping, ``""`` the model itself. Hooks stay until :meth:`close`, the end of a
    ``with`` block or the end of the tap's life, and are inert in every copy of the model.

    Args:
        model: the model; a ``torch.compile`` or data-parallel wrapper is looked through.
        layers: specs of the layers.
        train_only: record only forwards in train mode with gradients on.
        owner: what messages call the model.

    Attributes:
        recorder: what the hooks write to; ``recorder.enabled = False`` lets forwards pass.

    Raises:
        TypeError: if a spec is not a string.
        ValueError: if a spec cannot be read or names no layer; the closest names are listed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with FeatureTap(model, ["0", "2:input"]) as tap:
        ...     _ = model(torch.zeros(4, 2))
        ...     features = tap.collect()
        >>> {name: tuple(feature.shape) for name, feature in features.items()}
        {'0': (4, 3), '2:input': (4, 3)}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        train_only: bool = False,
        owner: str = "model",
    ) -> None:
        self.model = unwrap(model)
        self.owner = owner
        self.specs = {text: LayerSpec.parse(text) for text in layers}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for spec in self.specs.values():
            find_layer(spec.name, modules, owner)
        self.recorder = Recorder(train_only)
        self._handles = self._register(modules)
        # A tap that is dropped must not leave its hooks behind. The handles know neither tap nor
        # recorder, so this keeps nothing alive.
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def _register(self, modules: Mapping[str, nn.Module]) -> list[RemovableHandle]:
        # The order matters when a layer is the model itself: arm, capture, disarm.
        recorder = self.recorder
        handles = [self.model.register_forward_pre_hook(Arm(recorder))]
        for spec in self.specs.values():
            module = modules[spec.name]
            if spec.of_input:
                hook = Input(recorder, spec)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(Output(recorder, spec)))
        handles.append(self.model.register_forward_hook(Disarm(recorder)))
        abandon = Abandon(recorder)
        handles.append(self.model.register_forward_hook(abandon, always_call=True))
        return handles

    @property
    def closed(self) -> bool:
        """Whether the hooks are gone."""
        return not self._finalizer.alive

    def collect(self) -> dict[str, Tensor]:
        """Takes the features of the last recorded forward, and forgets them.

        Returns:
            The feature of each layer, by its spec.

        Raises:
            RuntimeError: if the tap is closed, no forward was recorded, or a layer was not
                reached, was reached twice, was changed in place afterwards, or was recorded
                without its gradient (reentrant checkpointing).
        """
        recorder = self.recorder
        captures, calls, ran = recorder.captures, recorder.calls, recorder.ran
        recorder.clear()
        if not ran:
            raise RuntimeError(self._nothing_recorded())
        for text in self.specs:
            self._check(text, captures.get(text), calls.get(text, 0))
        return {text: captures[text].tensor for text in self.specs}

    def _nothing_recorded(self) -> str:
        if self.closed:
            return f"The {self.owner}'s tap is closed. Build a new one."
        when = " in train mode with gradients on" if self.recorder.train_only else ""
        return (
            f"The {self.owner} has not run forward{when} since its features were last taken. "
            "Call it on the batch first, once for each loss; in evaluation use the task loss "
            "alone. If it was compiled and run before it was tapped, compile it again."
        )

    def _check(self, text: str, capture: Capture | None, calls: int) -> None:
        layer = f"Layer {text!r} of the {self.owner}"
        if capture is None:
            raise RuntimeError(
                f"{layer} was not reached in the last forward. Tap a layer that this input runs "
                "through as a module (checkpointing may call its children instead). Compile the "
                "model after it was tapped; if models of one class are compiled in one process, "
                "set torch._dynamo.config.skip_nnmodule_hook_guards = False before."
            )
        if calls > 1:
            raise RuntimeError(
                f"{layer} was reached {calls} times in one forward, so which call is meant is not "
                "clear. Tap a layer around it, or give each call a module of its own."
            )
        if capture.version is not None and capture.tensor._version != capture.version:
            raise RuntimeError(
                f"{layer} was changed in place after it was read, so its feature is lost. "
                f"{self._inplace_advice(text)}"
            )
        if self.recorder.train_only and not (capture.grad_enabled or capture.tensor.requires_grad):
            raise RuntimeError(
                f"{layer} was read without its gradient, inside a reentrant checkpoint. Use "
                "gradient checkpointing with use_reentrant=False, or tap the checkpoint's end."
            )

    def _inplace_advice(self, text: str) -> str:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        names = list(modules)
        for name in names[names.index(self.specs[text].name) + 1 :]:
            if getattr(modules[name], "inplace", False):
                return f"The next in-place layer is {name!r}: tap that, or set inplace=False."
        return "Tap the layer that changes it, or make that operation not in place."

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recorder.clear()

    def close(self) -> None:
        """Removes the hooks and forgets what was recorded. Closing twice is fine."""
        self._finalizer()
        self.recorder.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureTap":
        """A copy taps the copy of its model, unless it is closed."""
        model, train_only = copy.deepcopy(self.model, memo), self.recorder.train_only
        twin = FeatureTap(model, self.specs, train_only=train_only, owner=self.owner)
        if self.closed:
            twin.close()
        return twin

    def __enter__(self) -> "FeatureTap":
        """Returns the tap, to be closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the tap."""
        self.close()


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
