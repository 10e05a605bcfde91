"""Settings of one run: which student learns from which teacher, how, and from how much."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .datasets.small_images import SmallImages
from .methods import Layers


@dataclass(frozen=True)
class Settings:
    """One run: which student learns from which teacher, how, and from how much.

    ``layers`` None means those of the paper for these models; ``images_per_class`` None means all;
    ``labels_per_class`` None means that every image has its label. ``batch_size`` is that of all
    processes together; ``steps_per_epoch`` None means a pass over the images. ``temperature`` is
    KD's and ``hint`` FitNet's stage. Weights None are the published ImageNet ones. ``folder``
    is where the images are. With a ``cache`` folder images are not augmented, and the teacher is
    asked once for each.
    ``held_out_images`` is how many images of all classes together validate, those included that
    are not drawn; None means a fifth of what is drawn.
    ``augmentation`` is that of small images.
    """

    method: str
    student: str = "resnet18"
    teacher: str = "resnet34"
    layers: Layers | None = None
    weights_of: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 4.0
    hint: int | None = None
    teacher_weights: Path | None = None
    teacher_classes: int = 1000
    student_weights: Path | None = None
    images_per_class: int | None = None
    labels_per_class: int | None = None
    held_out_images: int | None = None
    image_size: int = 224
    seed: int = 0
    epochs: int = 100
    steps_per_epoch: int | None = None
    schedule: Literal["cosine", "steps"] = "cosine"
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    max_grad_norm: float | None = None
    workers: int = 4
    channels_last: bool = False
    folder: Path | None = None
    cache: Path | None = None
    augmentation: Literal["shifts", "cuts"] = "shifts"


def small_image_settings(data: SmallImages, **given: Any) -> Settings:
    """Returns the wide residual networks' settings, with some of them changed.

    Args:
        data: the data set, whose size is that of an epoch unless ``steps_per_epoch`` is given.
        given: fields of :class:`Settings`.
    """
    defaults = {
        "method": "student",
        "student": "wrn-16-1",
        "teacher": "wrn-40-2",
        "teacher_classes": data.format.classes,
        "image_size": data.format.size,
        "schedule": "steps",
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
    }
    settings = Settings(**{**defaults, **given})
    if settings.steps_per_epoch is None:
        steps = -(-len(data.train.labels) // settings.batch_size)
        settings = replace(settings, steps_per_epoch=steps)
    return settings
