"""What student and teacher are fed: image sizes and normalizations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.task import DistillationTeacher
from torch import Tensor, nn

from vid_loss.teachers import Teachers


def default_data_config(student: Any) -> dict[str, Any]:
    """Returns what a timm model expects to be fed: ``input_size``, ``mean``, ``std`` and more."""
    config: dict[str, Any] = resolve_data_config(model=student)
    # A ViT that was built for another size than its configuration's takes no other.
    size = getattr(getattr(student, "patch_embed", None), "img_size", None)
    return {**config, "input_size": (student.in_chans, *(size or config["input_size"][1:]))}


def example_image(student: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Returns a black image of that size, ``(1, C, H, W)``, where the student is."""
    parameter = next(student.parameters())
    return torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)


def renormalized(
    teacher: DistillationTeacher, data_config: Mapping[str, Any], example: Tensor
) -> tuple[nn.Module, "Renormalize | None"]:
    """Returns the model that teaches, and what its images are to go through first.

    Several teachers have a normalization each, but for those that have ``inputs`` of their own.

    Args:
        teacher: as timm holds it.
        data_config: the student's ``mean`` and ``std``.
        example: an image, for its channels, device and dtype.
    """
    model: nn.Module = teacher.model
    if not isinstance(model, Teachers):
        return model, Renormalize.between(data_config, teacher, example)
    models = dict(model.named_children())
    found = {
        name: Renormalize.between(data_config, DistillationTeacher(x), example)
        for name, x in models.items()
        if name not in model.inputs
    }
    own = {name: x for name, x in found.items() if x is not None}
    return Teachers(models, inputs={**model.inputs, **own}).eval(), None


class Renormalize(nn.Module):
    """Turns images that are normalised for the student into the teacher's.

    Args:
        scale: per channel, applied first.
        shift: per channel.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    @classmethod
    def between(
        cls, data_config: Mapping[str, Any], teacher: nn.Module, example: Tensor
    ) -> "Renormalize | None":
        """Returns what the two normalizations ask for; None if they are the same.

        Args:
            data_config: the student's ``mean`` and ``std``.
            teacher: a ``DistillationTeacher``, which knows its own.
            example: an image, for its channels, device and dtype.

        Raises:
            ValueError: if they differ and are not of the images' number of channels.
        """
        mean, std = (torch.tensor(data_config[key], dtype=torch.float64) for key in ("mean", "std"))
        teacher_mean, teacher_std = (
            getattr(teacher, key).flatten().to("cpu", torch.float64)
            for key in ("mean_kd", "std_kd")
        )
        if torch.allclose(mean.float(), teacher_mean.float()) and torch.allclose(
            std.float(), teacher_std.float()
        ):
            return None
        if not len(mean) == len(teacher_mean) == example.shape[1]:
            raise ValueError(
                f"VIDTask, data_config: expected a mean for each of {example.shape[1]} channels; "
                f"got {len(mean)} for the student and {len(teacher_mean)} for the teacher."
            )
        scale, shift = std / teacher_std, (mean - teacher_mean) / teacher_std
        return cls(scale.to(example), shift.to(example))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the same images, ``(N, C, H, W)``, in the teacher's normalization."""
        return images * self.scale.to(images) + self.shift.to(images)
