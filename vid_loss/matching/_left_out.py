"""What is not paired although it could be, so that this can be said."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from vid_loss.guards import undisturbed
from vid_loss.taps import FeatureTap, unwrap
from vid_loss.teacher import Inputs, as_call

from ._stages import Stages, backbones, of_batch, stages_of, token_groups
from ._table import Layer, LayerTable

_Span = tuple[int, int]  # the first and the last call


def frozen_layers(student: nn.Module, example: Inputs, layers: Iterable[str]) -> set[str]:
    """Returns those of the layers that nothing trained is in or before; none if all are such."""
    student = unwrap(student)
    if all(parameter.requires_grad for parameter in student.parameters()):
        return set()
    args, kwargs = as_call(example, "match_layers, example")
    tap = FeatureTap(student, layers, owner="student")
    with tap, undisturbed(student), torch.enable_grad():
        features = tap.read(*args, **kwargs)
    frozen = {layer for layer, feature in features.items() if not feature.requires_grad}
    return frozen if len(frozen) < len(features) else set()


def other_parts(stages: Stages, table: LayerTable) -> Iterator[str]:
    """Yields the first and last layer of each part that has stages or blocks beside the chosen.

    Another tower, that of the words beside that of the images, an encoder beside its decoder, or
    what comes after a backbone.
    """
    if not stages.ends:
        return
    taken = [(end.begin, end.last) for end in stages.ends]
    if stages.kind == "map":  # and what is between the ends
        taken = [(min(taken)[0], max(last for _, last in taken))]
    least = sum(end.size for end in stages.ends) / 10
    for part, spans in sorted(_parts(stages, table), key=lambda part: part[1][0]):
        large = len(part) > 1 and sum(layer.size for layer in part) > least
        if large and not _overlap(spans, taken):
            taken += spans
            yield f"{part[0].name} to {part[-1].name}"


def _parts(stages: Stages, table: LayerTable) -> Iterator[tuple[Sequence[Layer], list[_Span]]]:
    """Yields stages of what takes the image, and blocks, each with what they may not overlap."""
    layers = of_batch(table)
    for begin, last in backbones(table):
        inside = [layer for layer in layers if begin < layer.begin <= last]
        yield stages_of(inside, stages.image).ends, [(begin, last)]
    for group in token_groups(layers):
        if group[0].is_block:
            yield group, [(layer.begin, layer.last) for layer in group]


def _overlap(spans: Sequence[_Span], others: Sequence[_Span]) -> bool:
    return any(begin <= end and start <= last for begin, last in spans for start, end in others)
