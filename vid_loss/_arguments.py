"""Checks of what a Distiller is built with, before anything is hooked."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .cache import checked_cache
from .calls import refuse_no_module
from .pairs import Pair
from .taps import Given, unwrap
from .teacher import check_teacher_inputs


def check_models(student: Any, teacher: Any, given: Given) -> None:
    """Refuses what cannot be student and teacher.

    Raises:
        TypeError: if one is no module; the teacher may be None.
        ValueError: if they are the same, or one is on the meta device and its inputs are not.
    """
    for owner, model in (("student", student), ("teacher", teacher)):
        if model is None and owner == "teacher":
            continue
        refuse_no_module(f"Distiller, {owner}", model)
    if unwrap(teacher) is unwrap(student):
        raise ValueError(
            "Distiller, teacher: expected another model than the student; got the same. "
            "For self-distillation pass copy.deepcopy(student)."
        )
    elsewhere = any(x.is_meta for x in given.tensors)
    for owner, model in (("student", student), ("teacher", teacher)):
        if model is None or elsewhere or not any(p.is_meta for p in model.parameters()):
            continue
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):  # of accelerate
            raise ValueError(
                f"Distiller, {owner}: expected weights in memory; got a model on the meta device. "
                "Load it without init_empty_weights(), device_map or torch.device('meta')."
            )


def check_options(
    teacher_inputs: Any, teacher_dtype: Any, stop_teacher: Any, cache: Any, *, offline: bool
) -> None:
    """Refuses options that are of another type, or that are for a teacher where there is none.

    Raises:
        TypeError: if one is of another type.
        ValueError: if there is no teacher for it.
    """
    check_teacher_inputs("Distiller", teacher_inputs)
    floating = isinstance(teacher_dtype, torch.dtype) and teacher_dtype.is_floating_point
    if teacher_dtype is not None and not floating:
        name = str(teacher_dtype).removeprefix("torch.")
        known = name if name in ("float16", "float32", "float64") else "bfloat16"
        raise TypeError(
            "Distiller, teacher_dtype: expected a floating-point torch.dtype or None; got "
            f"{teacher_dtype!r}. Write teacher_dtype=torch.{known}."
        )
    if not isinstance(stop_teacher, bool):
        raise TypeError(
            f"Distiller, stop_teacher: expected True or False; got {stop_teacher!r}. It has no "
            "layer to be named: the teacher ends at the last one that a pair reads."
        )
    checked_cache(cache)
    given = {
        "teacher_inputs": teacher_inputs is not None,
        "teacher_dtype": teacher_dtype is not None,
        "stop_teacher": stop_teacher,
        "cache": cache is not None,
    }
    if offline and any(given.values()):
        names = ", ".join(name for name, x in given.items() if x)
        raise ValueError(
            f"Distiller, {names}: expected none of them without a teacher, whose features are "
            "given. Drop them."
        )


def checked_features(features: Any, pairs: Iterable[Pair]) -> Mapping[str, Tensor]:
    """Returns features from elsewhere, of the layers that the pairs name.

    Raises:
        TypeError: if they are no mapping of names to tensors.
        ValueError: if one is missing.
    """
    names = sorted({pair.teacher for pair in pairs})
    if features is None:
        raise TypeError(
            "Distiller, teacher: expected an nn.Module; got None. If its features come from "
            "elsewhere, give those of the example: Distiller(student, None, pairs, example=..., "
            f"teacher_features={{{names[0]!r}: tensor}})."
        )
    if not isinstance(features, Mapping) or not all(
        isinstance(x, Tensor) for x in features.values()
    ):
        raise TypeError(
            f"Distiller, teacher_features: expected a dict of {names} to tensors; got "
            f"{_described(features)}. Name them as the pairs do: {{{names[0]!r}: tensor}}."
        )
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(
            f"Distiller, teacher_features: expected also {missing}; got {sorted(features)}. Name "
            "them as the pairs do."
        )
    return {name: features[name].detach() for name in names}


def _described(features: Any) -> str:
    if isinstance(features, Mapping):
        return str({name: type(x).__name__ for name, x in features.items()})
    return type(features).__name__
