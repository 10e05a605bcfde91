"""Where a model's stages end, read off its layers' shapes and nesting."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ._table import Layer, LayerTable

Size = tuple[int, int]


class _Map(NamedTuple):
    layer: Layer
    size: Size
    pools: bool  # lowers the resolution, without weights


@dataclass(frozen=True)
class Stages:
    """The layers of a model whose features are worth learning from, in their order.

    Attributes:
        kind: ``"map"`` for ends of stages that have a resolution, ``"tokens"`` for blocks that
            return ``(N, L, C)``.
        ends: one layer a stage or block; empty if the model has neither.
        image: height and width of the model's input; None if it is no image.
    """

    kind: Literal["map", "tokens"]
    ends: tuple[Layer, ...]
    image: Size | None

    @property
    def unit(self) -> str:
        """What one of the ends is the end of, in words."""
        return "stage" if self.kind == "map" else "block"

    def by_size(self) -> dict[Size, Layer]:
        """The ends of map stages by height and width."""
        return {map_layout(end.shape, self.image)[0]: end for end in self.ends}


def find_stages(table: LayerTable) -> Stages:
    """Finds the ends of a model's stages, maps or tokens, whichever hold most of its weights.

    Map stages are cut where the resolution changes: after a pooling layer, and before a block or
    convolution that changes it. Tokens come from the largest set of like blocks side by side.
    Signals (N, C, L) are maps of height 1. What a detector or segmenter adds to its backbone, the
    innermost part with stages that takes the image, is left out.
    """
    shape = table.input_shape
    layers = of_batch(table)
    image = (shape[2], shape[3]) if len(shape) == 4 else None
    if image is None and shape and any(layer.is_signal for layer in layers):
        layers, image = [_as_map(layer) for layer in layers], (1, shape[-1])
    whole = stages_of(layers, image)
    for begin, last in backbones(table):
        inside = [layer for layer in layers if begin < layer.begin <= last]
        stages = stages_of(inside, image)
        # A first stage takes the image as well, and may have some blocks.
        if len(stages.ends) > max(1, len(whole.ends) / 2):
            return stages
    return whole


def of_batch(table: LayerTable) -> list[Layer]:
    """The layers with as many samples as the model is given."""
    return [layer for layer in table if layer.shape[:1] == table.input_shape[:1]]


def backbones(table: LayerTable) -> list[tuple[int, int]]:
    """The first and last calls of what takes the image itself, the innermost first."""
    largest = max((layer.size for layer in table), default=0)
    spans = {
        (layer.begin, layer.last)
        for layer in table
        if layer.is_block
        and len(layer.input_shape) == 4
        and layer.input_shape == table.input_shape
        and layer.size * 10 > largest  # a stem is no backbone
    }
    return sorted(spans, reverse=True)


def stages_of(layers: Sequence[Layer], image: Size | None) -> Stages:
    blocks = _token_blocks(layers)
    segments = _map_segments(_trunk(layers, image), image) if image else []
    mapped = sum(part.layer.size for segment in segments for part in segment)
    if mapped < sum(block.size for block in blocks) or (blocks and _only_embeds(segments)):
        is_image = image is not None and image[0] > 1
        usable = tuple(block for block in blocks if not block.note)
        return Stages("tokens", usable, image if is_image else None)
    ends: dict[Size, Layer] = {}
    for segment in segments:
        end = _end_of(segment)
        if end is not None:
            ends[segment[-1].size] = end
    return Stages("map", tuple(ends.values()), image)


def _as_map(layer: Layer) -> Layer:
    """A signal (N, C, L) as a map (N, C, 1, L)."""
    if not layer.is_signal:
        return layer
    shapes = [
        (*shape[:2], 1, *shape[2:]) if len(shape) == 3 else shape
        for shape in (layer.shape, layer.input_shape)
    ]
    return replace(layer, shape=shapes[0], input_shape=shapes[1])


def map_layout(shape: Sequence[int], image: Size | None) -> tuple[Size, int | None]:
    """Returns height and width of a map and where its channels are, by the image's aspect ratio.

    Returns:
        ``(height, width), channel_dim``: None for the second dimension, -1 for the last.
        A size of (0, 0) says that the shape is not that of a map, or has a single position.
    """
    if len(shape) == 4 and image is not None:
        _, second, third, last = shape
        for size, channel_dim in (((third, last), None), ((second, third), -1)):
            # Strides round up or down, so each side may be off by one.
            skew = abs(size[0] * image[1] - size[1] * image[0])
            if skew < max(image) and size != (1, 1) and size[0] <= image[0]:
                return size, channel_dim
    return (0, 0), None


def _trunk(layers: Sequence[Layer], image: Size | None) -> list[_Map]:
    """The outermost layers that keep one resolution, or change it once, in their order."""
    trunk: list[_Map] = []
    passed = -1
    for layer in layers:
        size, _ = map_layout(layer.shape, image)
        if layer.begin <= passed or size == (0, 0):
            continue
        before, _ = map_layout(layer.input_shape, image)
        inside = {
            map_layout(other.shape, image)[0]
            for other in layers
            # Only what goes from map to map: a table of position biases is square as well.
            if layer.begin < other.begin <= layer.last
            and other.size
            and not _is_side_branch(other, size, image)
            and map_layout(other.input_shape, image)[0] != (0, 0)
        }
        if inside <= {before, size, (0, 0)}:
            trunk.append(_Map(layer, size, pools=before != size and not layer.size))
            passed = layer.last
    return trunk


def _is_side_branch(layer: Layer, size: Size, image: Size | None) -> bool:
    """Whether a layer reduces the map for itself, as attention to fewer positions does (PVT)."""
    return not layer.is_block and map_layout(layer.shape, image)[0] < size


def _map_segments(trunk: Sequence[_Map], image: Size | None) -> list[list[_Map]]:
    segments: list[list[_Map]] = [[]]
    size = image
    for part in trunk:
        if part.size != size and not part.pools:
            segments.append([])
        segments[-1].append(part)
        if part.pools:
            segments.append([])
        size = part.size
    # A stem is no stage where there are stages of blocks.
    staged = [segment for segment in segments if any(part.layer.is_block for part in segment)]
    return staged or [segment for segment in segments if any(x.layer.size for x in segment)]


def _only_embeds(segments: Sequence[Sequence[_Map]]) -> bool:
    """Whether there is no map but that of a patch embedding."""
    weighted = [part.layer for segment in segments for part in segment if part.layer.size]
    return len(weighted) <= 1 and not any(layer.is_block for layer in weighted)


def _end_of(segment: Sequence[_Map]) -> Layer | None:
    """The pooling that ends it; else its last block, which a norm or activation may follow."""
    usable = [part for part in segment if not part.layer.note and part.size == segment[-1].size]
    if not usable:
        return None
    blocks = [part for part in usable if part.layer.is_block]
    return (blocks or usable)[-1].layer if not usable[-1].pools else usable[-1].layer


def _token_blocks(layers: Sequence[Layer]) -> list[Layer]:
    """The children of one module that share class and shape, where the most weights are."""

    def rank(group: list[Layer]) -> tuple[bool, bool, int, int]:
        # A model of one block has no group; what wraps all blocks is as large as they are.
        size = sum(layer.size for layer in group)
        return group[0].is_block, len(group) > 1, size, len(group)

    return max(token_groups(layers), key=rank, default=[])


def token_groups(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers from tokens to tokens, those of one parent, class and shape together."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Layer]] = {}
    for layer in layers:
        # From tokens to tokens: embeddings of a large vocabulary outweigh a few blocks.
        is_tokens = len(layer.shape) == 3 and layer.is_signal is False
        if is_tokens and len(layer.input_shape) > 2 and layer.size:
            key = layer.path.rpartition(".")[0], layer.type, layer.shape
            groups.setdefault(key, []).append(layer)
    return list(groups.values())
