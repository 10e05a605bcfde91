"""Where the channels of a feature are, told by the layer that it is of."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

# What their inputs and outputs are, whatever is around them: (N, C, L), or (N, L, C).
OF_SIGNALS = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.GroupNorm,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)
_OF_TOKENS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
# These themselves, no class made of them: many a LayerNorm2d has its channels second.
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
_SECOND = (
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
)
_WIDTHS_IN = ("in_features", "in_channels")
_WIDTHS_OUT = ("out_features", "out_channels", "embedding_dim")
_WIDTHS = ("num_features", "num_channels", "normalized_shape")
_MOST_COLORS = 4


def is_signal(
    layer: nn.Module, before: Sequence[int], shortened: Callable[[int], Tensor | None]
) -> bool:
    """Whether a feature of three dimensions is (N, C, L), by its layer, else by shorter samples.

    Args:
        layer: what the feature goes into or comes out of.
        before: its shape.
        shortened: the feature of samples that are shorter in a dimension; None if the model takes
            none.
    """
    leaves = list(layer.modules())
    signals = any(isinstance(x, OF_SIGNALS) for x in leaves)
    tokens = any(isinstance(x, _OF_TOKENS) for x in leaves)
    if signals != tokens:
        return signals
    for dim in (-1, 1):
        other = shortened(dim)
        if other is not None and other.ndim == 3:
            after = other.shape
            return before[1] == after[1] and before[2] != after[2]
    return False


def are_channels_last(
    layer: nn.Module | None, of_input: bool, shape: Sequence[int], inputs: Sequence[int]
) -> bool:
    """Whether a feature of four or five dimensions looks like (N, ..., C), where nothing says so.

    By the class of its layer; by the widths of what is in it, unless the sides are those of the
    image; then by the sides alone.

    Args:
        layer: what the feature goes into or comes out of; None if that is not known.
        of_input: whether it goes into it.
        shape: of the feature.
        inputs: shape of what the model is given.
    """
    if type(layer) in (*_LAST, *_SECOND):
        return type(layer) in _LAST
    widths = set() if layer is None else _widths(layer, of_input)
    second, last = _have_sides_of(inputs, shape)
    if (shape[1] in widths) != (shape[-1] in widths):
        return shape[-1] in widths and (last or not second)
    if second != last:
        return last
    # A head of width H on an NHWC map would train without an error, and learn nothing.
    return not second and len(shape) == 4 and shape[1] == shape[2] != shape[3]


def _widths(layer: nn.Module, of_input: bool) -> set[int]:
    """Numbers of channels that the parts of a layer are for."""
    names = (*_WIDTHS, *(_WIDTHS_IN if of_input else _WIDTHS_OUT))
    found: set[int] = set()
    for part in layer.modules():
        if any(True for _ in part.children()):
            continue
        values: list[Any] = [getattr(part, name, None) for name in names]
        found.update(x[-1] if isinstance(x, tuple) else x for x in values if x)
        if not of_input:  # of norms and scales that have no such name
            found.update(len(p) for p in part.parameters(recurse=False) if p.ndim == 1)
    return found


def _have_sides_of(inputs: Sequence[int], shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether height and width are in the image's ratio, with channels second; and with them last.

    Strides round up or down, so each side may be off by one.
    """
    if len(inputs) != 4 or len(shape) != 4:
        return False, False
    colors_last = inputs[3] <= _MOST_COLORS < inputs[1]
    height, width = inputs[1:3] if colors_last else inputs[2:]
    second, last = (
        abs(h * width - w * height) < max(height, width) and (h, w) != (1, 1)
        for h, w in (shape[2:], shape[1:3])
    )
    return second, last and shape[1] <= height
