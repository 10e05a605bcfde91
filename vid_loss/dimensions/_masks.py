"""Which mask the loss of each pair is given."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vid_loss.calls import takes
from vid_loss.losses.layouts import kind_of
from vid_loss.pairs import Pair

from ._moves import changed, moved_with
from ._padding import (
    flattened,
    flattened_pairs,
    for_no_pair,
    is_of,
    mask_of_decoder,
    of_other_positions,
    padding_counts,
)

_USUAL = "attention_mask"
_PADDING = "key_padding_mask"  # torch's own, which is set where nothing counts
_Read = Callable[..., Mapping[str, Tensor]]


class Masks:
    """The mask of each pair in a call: its own, or the batch's if that is of its positions.

    Args:
        pairs: by name.
        student_features: of an example, by layer.
        teacher_features: the same of the teacher.
        names: of the student's positional parameters.

    Attributes:
        own: pairs with a mask of their own.
        place: of ``attention_mask`` among positional arguments; beyond all if it is not there.
        unlike: pairs that the batch's ``attention_mask`` is not for, as :meth:`compare` found.
    """

    def __init__(
        self,
        pairs: Mapping[str, Pair],
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        names: Sequence[str] = (),
    ) -> None:
        self._pairs = dict(pairs)
        self._names = list(names)
        self.place = self._names.index(_USUAL) if _USUAL in self._names else sys.maxsize
        self._shapes = {
            name: pair.prepare(
                student_features[pair.student], teacher_features[pair.teacher], first=True
            )[0].shape
            for name, pair in pairs.items()
        }
        kinds = {name: kind_of(shape) for name, shape in self._shapes.items()}
        self._default = {name: kinds[name] for name, pair in pairs.items() if pair.mask is None}
        self.own = [name for name, pair in pairs.items() if pair.mask]
        for pair in pairs.values():
            if isinstance(pair.mask, str) and pair.mask.endswith(_PADDING):
                raise ValueError(
                    f"{pair}, mask: expected what is set where tokens count; got {pair.mask!r}, "
                    f"which is set at the others. Write mask=lambda *_, {pair.mask}, **__: "
                    f"~{pair.mask}."
                )
        self.unlike: set[str] = set()
        self._flattened: dict[str, str] = {}  # pairs to be warned of, and what their mask is

    def of(
        self, given: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Returns the masks of a call, by pair.

        Args:
            given: the call's ``token_mask``: ``(N, L)`` for tokens, ``(N, H, W)`` for maps.
            args: the student's positional arguments.
            kwargs: its keyword arguments.

        Raises:
            TypeError: if a mask is no tensor.
            ValueError: if a pair's mask is not there, or the given one is for no pair.
        """
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"Distiller, token_mask: expected a tensor; got {type(given).__name__}. Pass "
                "torch.as_tensor(...)."
            )
        mask = self._usual(args, kwargs) if given is None else given
        masks: dict[str, Tensor] = {}
        if mask is not None:
            kind = "tokens" if mask.ndim == 2 else "map"
            if self._flattened and kind == "tokens":
                self._warn_of_flattened()
            without = self.unlike if given is None else ()
            names = [name for name, x in self._default.items() if x == kind and name not in without]
            masks = {name: _in_layout(mask, self._shapes[name]) for name in names}
            if given is not None and not masks:
                raise ValueError(for_no_pair(given, kind))
        for name in self.own:
            mask = _own_mask(self._pairs[name], args, kwargs)
            if mask is not None:
                masks[name] = _in_layout(mask, self._shapes[name])
        return masks

    def _usual(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Returns the ``(N, L)`` attention mask among a call's arguments, if there is one."""
        mask = args[self.place] if len(args) > self.place else kwargs.get(_USUAL)
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def compare(
        self,
        features: Mapping[str, Tensor],
        read: _Read,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Finds out which features have the positions of the example's ``attention_mask``.

        Text and images may go through one model, or an encoder and a decoder. What the mask is of
        is moved on by a position: a feature that does not change has others, whatever its length.
        A pair whose padding will count is warned of.

        Args:
            features: of the student, by layer.
            read: runs the student, and returns its features.
            args: the example's positional arguments.
            kwargs: its keyword arguments.
        """
        if len(args) > self.place:  # by name, as what else moves with it is known
            args, kwargs = (), {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask = self._usual(args, kwargs)
        names = [name for name, kind in self._default.items() if kind == "tokens"]
        shapes = {name: self._shapes[name] for name in self._default}
        self._flattened = dict.fromkeys(flattened_pairs(shapes, args, kwargs), _USUAL)
        padding = next((name for name in kwargs if name.endswith(_PADDING)), None)
        if mask is None and padding:
            if names:
                pairs = ", ".join(map(str, (self._pairs[name] for name in names)))
                warnings.warn(padding_counts(pairs, padding), stacklevel=4)
            self._flattened = dict.fromkeys(self._flattened, f"~{padding}")
            self._warn_of_flattened()
        if mask is None or not (names or self._flattened):
            return
        masked, decoded = moved_with(mask)
        of_mask = changed(features, read, args, kwargs, masked)
        of_decoder = changed(features, read, args, kwargs, decoded)
        for name in names:
            layer = self._pairs[name].student
            if of_mask is not None and layer not in of_mask:
                self.unlike.add(name)
            elif self._shapes[name][1] != mask.shape[1] or layer in (of_decoder or ()):
                self.unlike.add(name)
                found = of_other_positions(self._pairs[name], mask, self._shapes[name])
                warnings.warn(found, stacklevel=4)
        self._place_flattened(mask, kwargs, of_mask, of_decoder)

    def _place_flattened(
        self,
        mask: Tensor,
        kwargs: Mapping[str, Any],
        of_mask: set[str] | None,
        of_decoder: set[str] | None,
    ) -> None:
        """Tells which mask the flattened pairs are of, and forgets those that are of none."""
        layers = {name: self._pairs[name].student for name in self._flattened}
        for name, layer in layers.items():
            if layer in (of_decoder or ()):
                self._flattened[name] = mask_of_decoder(kwargs)
            elif not is_of(mask, self._shapes[name], layer, of_mask):
                del self._flattened[name]

    def _warn_of_flattened(self) -> None:
        if not torch.compiler.is_compiling():
            for name, mask in self._flattened.items():
                found = flattened(self._pairs[name], self._shapes[name], mask)
                warnings.warn(found, stacklevel=5)
            self._flattened = {}


def _own_mask(pair: Pair, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if isinstance(pair.mask, str):
        if pair.mask not in kwargs:
            raise ValueError(
                f"{pair}, mask: expected {pair.mask!r} among the keyword arguments of the call; "
                f"got {list(kwargs)}. Write distiller(**batch), also beside teacher_features=."
            )
        mask = kwargs[pair.mask]
    else:
        function: Any = pair.mask
        try:
            mask = function(*args, **kwargs)
        except TypeError as error:
            if takes(function, args, kwargs):
                raise
            raise TypeError(
                f"{pair}, mask: expected a function of the student's arguments, {len(args)} by "
                f"position and {list(kwargs)} by name; got one that does not take them: {error}. "
                "Let it end with *_, **__."
            ) from error
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise TypeError(
        f"{pair}, mask: expected a tensor, (N, L) for tokens or (N, H, W) for maps, or None; got "
        f"{type(mask).__name__}. Make one of it: mask=lambda ...: torch.as_tensor(...)."
    )


def _in_layout(mask: Tensor, shape: torch.Size) -> Tensor:
    """Returns ``(N, 1, H, W)`` as ``(N, H, W)``; that of a signal, a map of height 1, likewise."""
    if len(shape) == 4 and mask.ndim == 4 and mask.shape[1] == 1:
        return mask.squeeze(1)
    return mask.unsqueeze(1) if len(shape) == 4 and shape[2] == 1 and mask.ndim == 2 else mask
