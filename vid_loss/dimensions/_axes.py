"""Looks, once, which dimension of a feature is the batch and which the channels."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vid_loss.losses.layouts import to_layout
from vid_loss.pairs import Pair

from ._channels import are_channels_last, is_signal

Call = tuple[tuple[Any, ...], dict[str, Any]]
_Features = Mapping[str, Tensor]
_Trial = Callable[[int], _Features | None]  # a run on a part of the example along a dimension


class Side(NamedTuple):
    """One of the two models, and what it made of the example."""

    owner: Literal["student", "teacher"]
    model: nn.Module | None  # None where features come from elsewhere
    features: Mapping[str, Tensor]
    read: Callable[..., Mapping[str, Tensor]]  # of a call's arguments

    def layer(self, pair: Pair) -> str:
        """The pair's layer of this model."""
        return pair.student if self.owner == "student" else pair.teacher

    def transform(self, pair: Pair) -> Any:
        """What the pair does to this model's feature first."""
        return pair.student_transform if self.owner == "student" else pair.teacher_transform

    def channel_dim(self, pair: Pair) -> int | None:
        """Where the pair says that the channels are."""
        dims = pair.channel_dim
        return dims[self.owner == "teacher"] if isinstance(dims, tuple) else dims

    def module(self, pair: Pair) -> nn.Module | None:
        """The module of the pair's layer; None if it says nothing of what the loss is given."""
        if self.model is None or self.transform(pair) is not None:
            return None
        return self.model.get_submodule(self.layer(pair).partition(":")[0].partition("[")[0])

    def shape(self, pair: Pair, features: Mapping[str, Tensor]) -> torch.Size:
        """The shape of this model's feature as the pair's loss is given it."""
        feature, transform = features[self.layer(pair)], self.transform(pair)
        feature = feature if transform is None else transform(feature)
        return to_layout(feature, self.channel_dim(pair)).shape

    def read_safely(self, call: Call) -> Mapping[str, Tensor] | None:
        """What it makes of another call; None if it is not made for that."""
        try:
            return self.read(*call[0], **call[1])
        except Exception:  # any that the user's model has
            return None


def check_axes(
    pairs: Mapping[str, Pair], side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses features whose batch is not the first dimension, and signals taken for tokens.

    Where sizes leave it open, the model runs on another number of samples, or on shorter ones. One
    with layers whose sequences come first also runs on a part of the example: its own inputs may be
    ``(L, N, C)``.

    Args:
        pairs: by name.
        side: one of the models.
        args: the example's positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: if a pair's feature has another order; it says what to write.
    """
    call: Call = (args, kwargs)
    first = next((x for x in _tensors(call) if x.ndim), torch.empty(0))
    image = next((x for x in _tensors(call) if x.ndim == 4), first)

    @cache
    def resized(axis: int) -> _Features | None:
        size = first.shape[axis]
        return side.read_safely(_resized(call, size, axis)) if size else None

    @cache
    def shortened(dim: int) -> _Features | None:
        return side.read_safely(_shortened(call, dim))

    axis = _batch_axis(side, first, resized)
    shapes = {name: side.shape(pair, side.features) for name, pair in pairs.items()}
    open_ = [name for name, shape in shapes.items() if _batch_is_open(shape, first.shape[axis])]
    if open_:
        others = resized(axis)
        for name in open_ if others is not None else ():
            _check_batch(pairs[name], side, shapes[name], side.shape(pairs[name], others or {}))
    for name, pair in pairs.items():
        if side.channel_dim(pair) is None:
            _check_channels(pair, side, shapes[name], image.shape, shortened)


def _check_channels(
    pair: Pair, side: Side, shape: torch.Size, inputs: torch.Size, shortened: _Trial
) -> None:
    layer, module = side.layer(pair), side.module(pair)

    def shorter(dim: int) -> Tensor | None:
        others = shortened(dim)
        return None if others is None else others[layer]

    if len(shape) == 3 and module is not None and is_signal(module, shape, shorter):
        looks, otherwise = "a signal (N, C, L)", (1, -1, "tokens (N, L, C)")
    elif len(shape) > 3 and are_channels_last(module, ":input" in layer, shape, inputs):
        # Of maps, of volumes and of series with several variables alike.
        looks, otherwise = "channels last, (N, ..., C)", (-1, 1, "channels second, (N, C, ...)")
    else:
        return
    dim, other, what = otherwise
    raise ValueError(
        f"{pair}, channel_dim: expected to know where the channels of the {side.owner}'s "
        f"{tuple(shape)} are: it looks like {looks}. Pass channel_dim={dim} for that, or "
        f"channel_dim={other} for {what}."
    )


def _batch_axis(side: Side, first: Tensor, resized: _Trial) -> int:
    """Returns which dimension of the inputs is the batch: 1 for a model of (L, N, C), else 0."""
    if (
        first.ndim < 2
        or first.is_meta
        or side.model is None
        or all(getattr(module, "batch_first", True) for module in side.model.modules())
    ):
        return 0
    # Both runs, whatever the first says: a sharded model has to run as often in each process.
    rows, columns = (_are_samples(side, first.shape[dim], resized(dim)) for dim in (0, 1))
    return int(columns and not rows)


def _are_samples(side: Side, size: int, others: _Features | None) -> bool:
    """Whether a part of the inputs gave the same part of each feature, as a part of a batch does.

    What is left out of a batch changes nothing in the others.
    """
    return others is not None and all(
        any(_is_part(others[layer], x, size, dim) for dim in range(min(x.ndim, 2)))
        for layer, x in side.features.items()
    )


def _is_part(part: Tensor, whole: Tensor, size: int, dim: int) -> bool:
    if whole.shape[dim] != size or part.ndim != whole.ndim:
        return False
    if size == 1:
        expected, part = whole, part.narrow(dim, 0, 1)
    else:
        expected = whole.narrow(dim, size // 2, size - size // 2)
    close = 1e-3 * float(whole.abs().max())
    return part.shape == expected.shape and torch.allclose(part, expected, rtol=0, atol=close)


def _batch_is_open(shape: torch.Size, size: int) -> bool:
    """Whether the batch may be another dimension than the first, for all that one size tells."""
    return len(shape) > 2 and (shape[0] != size or (len(shape) == 3 and shape[1] == size))


def _check_batch(pair: Pair, side: Side, shape: torch.Size, other: torch.Size) -> None:
    if len(shape) != len(other) or shape[0] != other[0]:
        return
    moved = [dim for dim in range(1, len(shape)) if shape[dim] != other[dim]]
    if len(moved) == 1:
        raise ValueError(
            f"{pair}, {side.owner} feature: expected the batch as its first dimension; got shape "
            f"{tuple(shape)}, where it is dimension {moved[0]}. Move it: "
            f"{side.owner}_transform=lambda x: x.transpose(0, {moved[0]})."
        )


def _resized(call: Call, size: int, axis: int) -> Call:
    """The call with the later half of its samples, or with its one sample twice.

    Args:
        call: arguments of the model.
        size: how many samples there are.
        axis: along which dimension; tensors that have so many along the first alone, such as a mask
            ``(N, L)`` beside inputs ``(L, N, C)``, have them there.
    """

    def resize(x: Tensor) -> Tensor:
        dim = axis if x.ndim > axis and x.shape[axis] == size else 0
        if not x.ndim or x.shape[dim] != size:
            return x
        if size == 1:
            return torch.cat([x, x], dim)
        return x.narrow(dim, size // 2, size - size // 2)  # of a causal model, not the first half

    return _mapped(call[0], resize), _mapped(call[1], resize)


def _shortened(call: Call, dim: int) -> Call:
    """The call with half of each sample along a dimension."""

    def shorten(x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[dim] < 2:
            return x
        return x.narrow(dim, 0, (x.shape[dim] + 1) // 2)

    return _mapped(call[0], shorten), _mapped(call[1], shorten)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(x, change) for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(x, change) for x in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from _tensors(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
