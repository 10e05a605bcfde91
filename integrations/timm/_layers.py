"""What timm's ``feature_info`` says of a model's layers: which to pair, where channels are."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss import FeatureTap, Pair, match_layers
from vid_loss.guards import undisturbed
from vid_loss.matching import TokensToGrid

# Before it there is a stem: no group of blocks ends there, and its maps are the largest.
_LEAST_REDUCTION = 4
# As many as a ResNet has groups of blocks.
_MOST_PAIRS_AT_ONE_REDUCTION = 4


def match_by_reduction(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Pairs the layers at which student and teacher have reduced their input alike.

    That is the end of each stage in hierarchical models. Where one reduction has several layers,
    as in a ViT, up to four are taken from each model, evenly spread and with the last of them.

    Args:
        student: a timm model.
        teacher: a timm model.

    Raises:
        ValueError: if a model has no ``feature_info``, or they have no reduction in common.
    """
    students, teachers = _by_reduction(student, "student"), _by_reduction(teacher, "teacher")
    pairs = [
        Pair(*layers)
        for reduction in sorted(students.keys() & teachers.keys())
        for layers in zip(*_spread(students[reduction], teachers[reduction]), strict=True)
    ]
    if not pairs:
        raise ValueError(
            f"VIDTask, pairs: expected layers of one reduction; got {students} in the student and "
            f"{teachers} in the teacher. Name the pairs: {{'student_layer': 'teacher_layer'}}."
        )
    return pairs


def _by_reduction(model: nn.Module, owner: str) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for entry in _feature_info(model):
        if entry["module"] and entry["reduction"] >= _LEAST_REDUCTION:
            layers.setdefault(entry["reduction"], []).append(entry["module"])
    if not layers:
        raise ValueError(
            f"VIDTask, pairs: expected a {owner} with timm's feature_info; got "
            f"{type(model).__name__}. Name the pairs: {{'student_layer': 'teacher_layer'}}."
        )
    return layers


def _spread(*lists: list[str]) -> list[list[str]]:
    count = min(_MOST_PAIRS_AT_ONE_REDUCTION, *map(len, lists))
    return [[layers[len(layers) * (i + 1) // count - 1] for i in range(count)] for layers in lists]


def _feature_info(model: nn.Module) -> Sequence[Mapping[str, Any]]:
    info: Any = getattr(model, "feature_info", None) or []
    entries: Sequence[Mapping[str, Any]] = getattr(info, "info", info)
    return entries


def resolve_pairs(
    pairs: Mapping[str, str] | Sequence[Pair] | None,
    student: nn.Module,
    teacher: nn.Module,
    *,
    example: Tensor,
    weight: float | None,
) -> list[Pair]:
    """Returns the pairs with what was left out: weights, channels, tokens as a grid beside a map.

    Args:
        pairs: a dict of student layer to teacher layer, or pairs; None matches by reduction, and a
            ViT with a CNN by relative depth.
        student: a timm model; run on the example, to see what is a map.
        teacher: a timm model; the same.
        example: one input image, ``(1, C, H, W)``.
        weight: for pairs that have none.

    Raises:
        ValueError: if a layer is unknown; the closest names are listed.
    """
    if pairs is None:
        pairs = _matched(student, teacher, example)
    elif isinstance(pairs, Mapping):
        pairs = [Pair(*layers) for layers in pairs.items()]
    given: Any = pairs
    pairs = list(given) if isinstance(given, Iterable) else []
    if not pairs or not all(isinstance(pair, Pair) for pair in pairs):
        found: list[Pair] = given  # it is not: Distiller says what is wrong with it
        return found
    with undisturbed(student, teacher):
        students = _shapes(student, [pair.student for pair in pairs], example, "student")
        teachers = _shapes(teacher, [pair.teacher for pair in pairs], example, "teacher")
    return [
        replace(
            _as_maps(
                pair,
                (student, teacher),
                (students[pair.student], teachers[pair.teacher]),
                example,
            ),
            weight=weight if pair.weight is None else pair.weight,
        )
        for pair in pairs
    ]


def _matched(student: nn.Module, teacher: nn.Module, example: Tensor) -> Sequence[Pair]:
    """Matches by reduction, but a ViT has one only: with a CNN, by relative depth."""
    ranks = set()
    for model, owner in ((student, "student"), (teacher, "teacher")):
        for entry in _feature_info(model)[-1:]:
            with undisturbed(model):
                ranks.add(len(_shapes(model, [entry["module"]], example, owner)[entry["module"]]))
    if ranks == {3, 4}:
        return match_layers(student, teacher, example)
    return match_by_reduction(student, teacher)


def _as_maps(
    pair: Pair, models: Sequence[nn.Module], shapes: Sequence[torch.Size], example: Tensor
) -> Pair:
    """Says where the channels of each feature are, and makes tokens a grid where a map is met."""
    layers, transforms = (
        (pair.student, pair.teacher),
        [pair.student_transform, pair.teacher_transform],
    )
    # A transform's result may have its channels anywhere.
    dims = [
        None if transform else channel_dim(model, layer, shape)
        for model, layer, shape, transform in zip(models, layers, shapes, transforms, strict=True)
    ]
    for i in range(2):
        if not any(transforms) and (len(shapes[i]), len(shapes[1 - i])) == (3, 4):
            transforms[i] = _grid(models[i], shapes[i], example)
    return replace(
        pair,
        channel_dim=(dims[0], dims[1]) if pair.channel_dim is None else pair.channel_dim,
        student_transform=transforms[0],
        teacher_transform=transforms[1],
    )


def _grid(model: Any, shape: torch.Size, example: Tensor) -> TokensToGrid | None:
    """Returns what makes a map of square patches' tokens; None if they are no grid."""
    leading = getattr(model, "num_prefix_tokens", 0)
    patches = max(shape[1] - leading, 0)
    image_height, image_width = example.shape[-2:]
    height = math.isqrt(patches * image_height // image_width)
    width = height * image_width // image_height
    return TokensToGrid(leading, height, width) if height * width == patches > 0 else None


def _shapes(
    model: nn.Module, layers: Sequence[str], example: Tensor, owner: str
) -> dict[str, torch.Size]:
    with FeatureTap(model, layers, owner=owner) as tap:
        tap.model(example)
        return {layer: feature.shape for layer, feature in tap.collect().items()}


def channel_dim(model: nn.Module, layer: str, shape: torch.Size) -> int | None:
    """Returns where a map of a timm model has its channels, None where there is no question.

    Args:
        model: a timm model.
        layer: a layer of it, at or inside one that ``feature_info`` lists.
        shape: the shape of its feature.

    Example:
        >>> import timm
        >>> swin = timm.create_model("swin_tiny_patch4_window7_224")
        >>> channel_dim(swin, "layers.1", torch.Size((1, 28, 28, 192)))
        -1
    """
    if len(shape) != 4:
        return None
    for entry in _feature_info(model):
        stage, channels = entry["module"], entry["num_chs"]
        inside = layer.startswith((f"{stage}.", f"{stage}:"))
        if (layer == stage or inside) and shape[1] != shape[3] and channels in (shape[1], shape[3]):
            return 1 if channels == shape[1] else -1
    return -1 if getattr(model, "output_fmt", None) == "NHWC" else None
