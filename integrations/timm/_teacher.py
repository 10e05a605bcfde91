"""A timm teacher: a model, a name, or a name and a local checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, load_state_dict
from timm.task import DistillationTeacher
from torch import Tensor, nn


def resolved_teacher(
    teacher: str | nn.Module,
    path: str | None,
    student: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> DistillationTeacher:
    """Returns a teacher as timm holds one, with nothing to train.

    Args:
        teacher: a model, a ``DistillationTeacher``, or a model's name.
        path: a local checkpoint for the teacher that is named.
        student: says how many classes and channels a teacher by name has.
        device: of the teacher.
        dtype: of the teacher.
    """
    if path is not None:
        teacher = load_teacher(teacher, path, student).to(device, dtype)
    found: Any = teacher
    if not isinstance(teacher, DistillationTeacher):
        found = DistillationTeacher(
            teacher,
            num_classes=student.num_classes,
            in_chans=student.in_chans,
            device=device,
            dtype=dtype,
        )
    return found.requires_grad_(False)


def load_teacher(name: str | nn.Module, path: str, student: Any) -> nn.Module:
    """Builds the model ``name`` with the weights of a local file, its EMA's if it has them.

    Nothing is downloaded. The teacher has as many classes as the checkpoint, which need not be
    the student's.

    Args:
        name: a timm model's name.
        path: a checkpoint of timm's train script, a ``state_dict`` or a safetensors file.
        student: says how many channels the images have.

    Raises:
        TypeError: if the teacher is a model already.
        ValueError: if there is no such file, or its weights are another model's.
    """
    if not isinstance(name, str):
        raise TypeError(
            "VIDTask, teacher_pretrained_path: expected teacher_model to be a name; got "
            f"{type(name).__name__}. Load the weights into it yourself."
        )
    if not Path(path).is_file():
        raise ValueError(f"Teacher {name!r}: expected a checkpoint; there is no file {path!r}.")
    state = load_state_dict(path)
    model: nn.Module = timm.create_model(
        name, num_classes=_num_classes(name, state, student.num_classes), in_chans=student.in_chans
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Teacher {name!r}: expected its weights in {path!r}; got another model's. Name the "
            f"model that the checkpoint was trained as. ({error})"
        ) from error
    return model


def _num_classes(name: str, state: Mapping[str, Tensor], default: int) -> int:
    config = get_pretrained_cfg(name, allow_unregistered=True)
    classifier = config.classifier if config else None
    # Distilled models have two classifiers, alike in size.
    weight = state.get(f"{classifier[0] if isinstance(classifier, tuple) else classifier}.weight")
    return default if weight is None else len(weight)
