"""The methods of the paper's Tables 1 and 2, each a list of pairs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from vid_loss import ATLoss, FitNetLoss, KDLoss, LwFLoss, Pair
from vid_loss.matching import match_layers

TABLE_1 = ("student", "kd", "fitnet", "at", "mi", "kd+at", "kd+mi")
TABLE_2 = (
    "student",
    "finetuned",
    "lwf",
    "fitnet",
    "at",
    "mi-l",
    "mi-i",
    "lwf+fitnet",
    "mi-l+mi-i",
)

WITHOUT_TEACHER = ("student", "finetuned")


@dataclass(frozen=True)
class Layers:
    """Which layers of a student and a teacher belong together.

    Args:
        stages: (student, teacher) from shallow to deep: what MI-I, AT and FitNet read; or a pair
            that says more of them.
        classifiers: the two last linear layers: what MI-L, LwF and KD read.
    """

    stages: tuple[tuple[str, str] | Pair, ...]
    classifiers: tuple[str, str]


def is_known(name: str) -> bool:
    """Whether a model is of one of the paper's families, whose layers have known names."""
    return re.match(r"vgg9$|wrn-|(resnet|resnext|wide_resnet)\d", name) is not None


def layers_of(name: str) -> tuple[tuple[str, ...], str]:
    """Returns the stage ends of a model, from shallow to deep, and its classifier.

    The paper takes the ends of the groups of residual blocks and the max-pools. VGG-9's first
    max-pool is left out: at 224 x 224 the other four have the sizes of a ResNet's stage ends,
    56, 28, 14 and 7.

    Raises:
        ValueError: if the model is of no family of the paper's.
    """
    if name == "vgg9":
        return ("stage2", "stage3", "stage4", "stage5"), "fc"
    if name.startswith("wrn-"):
        return ("group1", "group2", "group3"), "fc"
    if is_known(name):
        return ("layer1", "layer2", "layer3", "layer4"), "fc"
    raise ValueError(
        f"layers_of, name: expected vgg9, wrn-DEPTH-WIDTH or a resnet; got {name!r}. Pass "
        "--stages STUDENT=TEACHER ... and --classifiers STUDENT=TEACHER with layers' names."
    )


def matching_layers(student: str, teacher: str) -> Layers:
    """Pairs the stages of two models of the paper's families.

    Raises:
        ValueError: if a model is of none, or they have different numbers of stages.
    """
    (student_stages, student_fc), (teacher_stages, teacher_fc) = map(layers_of, (student, teacher))
    if len(student_stages) != len(teacher_stages):
        raise ValueError(
            f"matching_layers: expected as many stages in both; got {len(student_stages)} in "
            f"{student} and {len(teacher_stages)} in {teacher}. Pass --stages STUDENT=TEACHER ..."
        )
    return Layers(tuple(zip(student_stages, teacher_stages, strict=True)), (student_fc, teacher_fc))


def find_layers(
    student: nn.Module,
    teacher: nn.Module,
    example: Tensor,
    teacher_inputs: Callable[[Tensor], Tensor] | None = None,
) -> Layers:
    """Pairs the layers of two models of whatever family, by what they do with an example.

    Args:
        student: the student.
        teacher: the teacher.
        example: images ``(N, 3, H, W)``.
        teacher_inputs: what makes the teacher's images of them.

    Raises:
        ValueError: if no layers fit, or a model's classifier is not a linear layer.
    """
    stages = match_layers(student, teacher, example, teacher_inputs=teacher_inputs)
    return Layers(tuple(stages), (_classifier(student), _classifier(teacher)))


def _classifier(model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"find_layers: expected a classifier that is a linear layer; got none in "
            f"{type(model).__name__}. Pass --stages and --classifiers STUDENT=TEACHER."
        )
    return linear[-1]


def pairs_of(
    method: str,
    layers: Layers,
    weights: Mapping[str, float] | None = None,
    *,
    temperature: float = 4.0,
    hint: int | None = None,
) -> list[Pair]:
    """Returns the pairs of a method; none for those without a teacher.

    Args:
        method: one of the tables, or any other sum of their terms, such as ``"at+mi-l"``.
        layers: of the two models.
        weights: lambda by term, such as ``{"mi-i": 10.0}``; a term without one has its loss's
            default. Each stage of a term has the whole of it.
        temperature: of KD.
        hint: which stage, from 0, is FitNet's hint; None is the middle one.

    Raises:
        ValueError: if a term of the method, or one that has a weight, is unknown, or the hint is
            no stage.
    """
    weights = weights or {}
    names = [] if method in WITHOUT_TEACHER else method.split("+")
    unknown = [name for name in names if name not in _TERMS]
    if unknown:
        raise ValueError(
            f"Method {method!r}: expected 'student', 'finetuned' or a sum of "
            f"{', '.join(_TERMS)}; got {unknown[0]!r}."
        )
    idle = [name for name in weights if name not in names]
    if idle:
        raise ValueError(
            f"Method {method!r}: expected weights of its own terms; got one of {idle[0]!r}."
        )
    options = _Options(temperature, len(layers.stages) // 2 if hint is None else hint)
    if "fitnet" in names and not 0 <= options.hint < len(layers.stages):
        raise ValueError(
            f"Method {method!r}, hint: expected one of {len(layers.stages)} stages, counted from "
            f"0; got {hint}."
        )
    return [pair for name in names for pair in _TERMS[name](layers, weights.get(name), options)]


class _Options(NamedTuple):
    temperature: float
    hint: int


def _pairs(layers: Layers) -> list[Pair]:
    return [x if isinstance(x, Pair) else Pair(*x) for x in layers.stages]


def _mi_i(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    return [replace(stage, weight=weight) for stage in _pairs(layers)]


def _mi_l(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    student, teacher = layers.classifiers
    return [Pair(f"{student}:input", teacher, weight)]


def _at(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    return [replace(stage, weight=weight, loss=ATLoss()) for stage in _pairs(layers)]


def _fitnet(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    return [replace(_pairs(layers)[options.hint], weight=weight, loss=FitNetLoss)]


def _lwf(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    student, teacher = layers.classifiers
    return [Pair(f"{student}:input", teacher, weight, LwFLoss)]


def _kd(layers: Layers, weight: float | None, options: _Options) -> list[Pair]:
    return [Pair(*layers.classifiers, weight, KDLoss(temperature=options.temperature))]


_TERMS: dict[str, Callable[[Layers, float | None, _Options], list[Pair]]] = {
    "kd": _kd,
    "lwf": _lwf,
    "fitnet": _fitnet,
    "at": _at,
    "mi-l": _mi_l,
    "mi-i": _mi_i,
    "mi": _mi_i,  # Table 1's name of it
}
