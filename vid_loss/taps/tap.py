"""Named layers -> features, by forward hooks."""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vid_loss.guards import own_forwards

from . import _causes
from ._hooks import register
from ._layers import LayerSpec, check_arguments, find_layer, unwrap
from ._places import ways_to
from ._recorder import Batch, Forward, Mode, Recorder, StopForward


class FeatureTap:
    """Reads the features of named layers while a model runs.

    A layer is a name of ``model.named_modules()``: its output. ``"fc:input"`` is what goes in
    (the first positional argument), ``"encoder[0]"`` and ``'encoder["hidden"]'`` one entry of a
    tuple or mapping, ``""`` the model itself. Hooks stay until :meth:`close`, the end of a
    ``with`` block or the end of the tap's life, and are inert in every copy of the model.

    Args:
        model: the model; a ``torch.compile`` or data-parallel wrapper is looked through.
        layers: specs of the layers.
        record: which forwards are recorded: all, those in ``"training"``, that is in train mode
            with gradients on, or only those that :meth:`read` makes. It makes one that is recorded
            in each case.
        owner: what messages call the model.

    Attributes:
        model: the model, without any wrapper.
        specs: the layers by what they were given as, in their order.

    Raises:
        TypeError: if a spec is not a string, or the model is TorchScript, which takes no hooks.
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
        record: Mode = "always",
        owner: str = "model",
    ) -> None:
        check_arguments(model, layers, record, owner)
        self._given = model
        self.model = unwrap(model)
        self.owner = owner
        self.specs = {text: LayerSpec.parse(text) for text in layers}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        tapped = {spec.name: find_layer(spec.name, modules, owner) for spec in self.specs.values()}
        _causes.refuse_scripted({"": self.model, **tapped}, owner)
        self._tapped = tapped
        self._ways = ways_to(self.model, tapped)
        self._complete = False  # whether one forward has reached every layer
        self._recorder = Recorder(record)
        self._handles = register(self._recorder, self.model, self.specs.values(), tapped)
        # A tap that is dropped must not leave its hooks behind. The handles know neither tap nor
        # recorder, so this keeps nothing alive.
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    @property
    def closed(self) -> bool:
        """Whether the hooks are gone."""
        return not self._finalizer.alive

    @property
    def reached(self) -> bool:
        """Whether the last recorded forward has reached any of the layers."""
        return bool(self._recorder.last.captures)

    def stop_early(self) -> None:
        """From now on, has :meth:`read` end the model's forward at the last tapped layer.

        With an exception that its callers do not see. It is for a tap that records nothing else.

        Raises:
            ValueError: if the tap records forwards of others, which would be ended as well.
        """
        if self._recorder.mode != "read":
            raise ValueError(
                'FeatureTap, stop_early: expected a tap with record="read"; got '
                f"{self._recorder.mode!r}, which would end the forwards of others."
            )
        self._recorder.stop_after = len(self.specs)

    def read(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Runs the model as it is, in its mode, and takes the features of that forward.

        Args:
            *args: positional inputs of the model.
            **kwargs: keyword inputs of the model.

        Returns:
            The feature of each layer, by its spec.

        Raises:
            RuntimeError, TypeError: as :meth:`collect`.
        """
        recorder = self._recorder
        stops = recorder.stop_after is not None and not torch.compiler.is_compiling()
        recorder.thread = None if torch.compiler.is_compiling() else get_ident()
        mode, recorder.mode = recorder.mode, "always"
        try:
            with own_forwards(self.model) if stops else nullcontext():
                self._given(*args, **kwargs)
        except StopForward:  # not suppress(), which the compiler of torch 2.8 lacks
            pass
        finally:
            recorder.mode, recorder.thread = mode, None
        if not recorder.last.ran and not self.closed:
            raise RuntimeError(_causes.silent_hooks(self.owner))
        return self.collect()

    def collect(self, batch: Batch | None = None, *, unchanged: bool = True) -> dict[str, Tensor]:
        """Takes the features of the last recorded forward, and forgets them.

        Args:
            batch: what that forward should have been given, as :class:`Given` tells it.
            unchanged: whether it should be as it was then.

        Returns:
            The feature of each layer, by its spec.

        Raises:
            RuntimeError: if the tap is closed, no forward was recorded, the batch is known to be
                that of an earlier one, or a layer was replaced or wrapped, was not reached, was
                reached twice, was changed in place afterwards, or was recorded without its
                gradient.
            TypeError: if a feature is a nested tensor, which has no shape.
        """
        recorder = self._recorder
        eager = not (torch.compiler.is_compiling() or recorder.compiled)
        if batch and eager and recorder.last.ran and batch.keys() - recorder.batches[-1].keys():
            self._refuse_other(batch, unchanged)  # whose features there are, may still ask for them
        forward, recorder.last = recorder.last, Forward()
        if not forward.ran:
            raise RuntimeError(self._nothing_recorded(forward))
        if not torch.compiler.is_compiling():
            for holder, key, module in self._ways:
                if holder._modules.get(key) is not module:
                    self._look_for_displaced()
                    break
        features = {}
        for text, spec in self.specs.items():
            capture = forward.captures.get(text)
            if capture is None:
                compiled = recorder.compiled
                raise RuntimeError(
                    _causes.unreached(self.model, self.owner, spec, compiled, self._complete)
                )
            tensor = features[text] = capture.tensor
            if (
                capture.calls > 1
                or (capture.version is not None and tensor._version != capture.version)
                or (capture.without_grad and not tensor.requires_grad)
            ):
                raise RuntimeError(_causes.unusable(self.model, self.owner, spec, capture))
            if tensor.is_nested:
                raise TypeError(_causes.nested(text, self.owner))
        self._complete = True
        return features

    def _nothing_recorded(self, forward: Forward) -> str:
        if self.closed:
            return f"The {self.owner}'s tap is closed. Build a new Distiller or tap."
        return _causes.nothing_recorded(self.owner, self._recorder, forward)

    def _look_for_displaced(self) -> None:
        """Raises if a tapped layer is no longer what was asked for; notes where the others are."""
        for spec in self.specs.values():
            message = _causes.displaced(self.model, self.owner, spec, self._tapped[spec.name])
            if message is not None:
                raise RuntimeError(message)
        self._ways = ways_to(self.model, self._tapped)

    def _refuse_other(self, batch: Batch, unchanged: bool) -> None:
        if unchanged and self._recorder.has_changed(batch):
            raise RuntimeError(_causes.changed_in_place(self.owner))
        if self._recorder.has_passed(batch):
            raise RuntimeError(
                f"The {self.owner} has run forward on another batch since it ran on this one, "
                f"whose features are gone. Call distiller(...) right after each {self.owner}(...), "
                f"or run the {self.owner} once on torch.cat of the batches. If the teacher is to "
                "see this one all the same, give it a clone."
            )

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._recorder.last = Forward()

    def close(self) -> None:
        """Removes the hooks and forgets what was recorded. Closing twice is fine."""
        self._finalizer()
        self._recorder.last = Forward()

    def __copy__(self) -> "FeatureTap":
        """A copy is another tap on the same model, unless it is closed."""
        return self._on(self._given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureTap":
        """A deep copy taps the copy of its model, unless it is closed."""
        return self._on(copy.deepcopy(self.model, memo))

    def _on(self, model: nn.Module) -> "FeatureTap":
        twin = FeatureTap(model, self.specs, record=self._recorder.mode, owner=self.owner)
        twin._recorder.stop_after = self._recorder.stop_after
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
