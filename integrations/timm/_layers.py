"""What timm's ``feature_info`` says of a model's layers: which to pair, where channels are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss import FeatureTap, Pair
from vid_loss.guards import undisturbed

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
    """Returns the pairs with what was left out: weights, and where ``feature_info`` knows channels.

    Args:
        pairs: a dict of student layer to teacher layer, or pairs; None matches by reduction.
        student: a timm model; run on the example, to see what is a map.
        teacher: a timm model; the same.
        example: one input image, ``(1, C, H, W)``.
        weight: for pairs that have none.

    Raises:
        ValueError: if a layer is unknown; the closest names are listed.
    """
    if pairs is None:
        pairs = match_by_reduction(student, teacher)
    elif isinstance(pairs, Mapping):
        pairs = [Pair(*layers) for layers in pairs.items()]
    if not all(isinstance(pair, Pair) for pair in pairs):
        return list(pairs)  # Distiller says what is wrong with them
    with undisturbed(student, teacher):
        students = _shapes(student, [pair.student for pair in pairs], example, "student")
        teachers = _shapes(teacher, [pair.teacher for pair in pairs], example, "teacher")
    resolved = []
    for pair in pairs:
        dims = pair.channel_dim
        if dims is None:
            # A transform's result may have its channels anywhere.
            of_student = channel_dim(student, pair.student, students[pair.student])
            of_teacher = channel_dim(teacher, pair.teacher, teachers[pair.teacher])
            dims = (
                None if pair.student_transform else of_student,
                None if pair.teacher_transform else of_teacher,
            )
        pair_weight = weight if pair.weight is None else pair.weight
        resolved.append(replace(pair, weight=pair_weight, channel_dim=dims))
    return resolved


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
