"""What the programs of the paper's Table 2 share: one method, trained and tested."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_folders import ImageFiles, ImageList
from methods import WITHOUT_TEACHER, Layers, matching_layers, pairs_of
from models import build_model
from splits import train_and_validation
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from vid_loss.integrations.accelerate_loop import Accuracy, evaluate, train
from weights import imagenet_weights, load_weights, read_weights

from vid_loss import Distiller

# torchvision's statistics of ImageNet, which its models were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORMALISE = transforms.Normalize(_MEAN, _STD)


@dataclass(frozen=True)
class Settings:
    """One run: which student learns from which teacher, how, and from how much.

    ``layers`` None means those of the paper for these models; ``images_per_class`` None means all;
    ``batch_size`` is that of all processes together. Weights None are the published ImageNet ones.
    """

    method: str
    student: str = "resnet18"
    teacher: str = "resnet34"
    layers: Layers | None = None
    weights_of: Mapping[str, float] = field(default_factory=dict)
    teacher_weights: Path | None = None
    teacher_classes: int = 1000
    student_weights: Path | None = None
    images_per_class: int | None = None
    image_size: int = 224
    seed: int = 0
    epochs: int = 100
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    max_grad_norm: float | None = None
    workers: int = 4


class Result(NamedTuple):
    """The best accuracy on validation data, in percent, and that student's on the test data."""

    validation: float
    test: Accuracy


def run_method(
    accelerator: Accelerator,
    settings: Settings,
    data: tuple[ImageList, ImageList],
    output: Path,
) -> Result:
    """Trains a student by one method and tests the one that was best on validation data.

    Args:
        accelerator: with ``use_seedable_sampler=True`` and ``split_batches=True``.
        settings: of the run.
        data: the images for training, of which a part is held out for validation, and the test's.
        output: the run's folder; a run that was stopped goes on from there.
    """
    _keep_settings(accelerator, settings, output)
    set_seed(settings.seed)
    student = build_model(settings.student, classes=1 + max(data[0].labels))
    if settings.method == "finetuned":
        load_weights(
            student, _weights(settings.student, settings.student_weights), new_classifier=True
        )
    distiller = _distiller(settings, student)
    groups = [{"params": list(student.parameters())}]
    if distiller is not None:
        groups += distiller.parameter_groups(weight_decay=settings.weight_decay)
    optimizer = torch.optim.SGD(
        groups, settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
    )
    train_loader, validation_loader, test_loader = _loaders(settings, *data)
    progress = train(
        accelerator,
        student,
        distiller,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        train_loader=train_loader,
        validation_loader=validation_loader,
        epochs=settings.epochs,
        output=output,
        max_grad_norm=settings.max_grad_norm,
    )
    best = build_model(settings.student, classes=1 + max(data[0].labels))
    best.load_state_dict(read_weights(output / "best.safetensors"))
    test = evaluate(accelerator, best.to(accelerator.device), accelerator.prepare(test_loader))
    accelerator.free_memory()
    return Result(progress.best_percent, test)


def _distiller(settings: Settings, student: nn.Module) -> Distiller | None:
    if settings.method in WITHOUT_TEACHER:
        return None
    layers = settings.layers or matching_layers(settings.student, settings.teacher)
    pairs = pairs_of(settings.method, layers, settings.weights_of)
    teacher = build_model(settings.teacher, settings.teacher_classes)
    load_weights(
        teacher, _weights(settings.teacher, settings.teacher_weights), new_classifier=False
    )
    example = torch.zeros(1, 3, settings.image_size, settings.image_size)
    inputs = renormalisation(teacher) if settings.teacher_weights is None else None
    return Distiller(student, teacher, pairs, example=example, teacher_inputs=inputs)


def renormalisation(teacher: nn.Module) -> transforms.Normalize | None:
    """Returns what turns a student's images into those that a published timm teacher has learnt.

    None if they are the same, as for all of torchvision's.
    """
    config = getattr(teacher, "pretrained_cfg", {"mean": _MEAN, "std": _STD})
    if (tuple(config["mean"]), tuple(config["std"])) == (_MEAN, _STD):
        return None
    own = zip(config["mean"], config["std"], _MEAN, _STD, strict=True)
    shifts, scales = zip(*(((m - mean) / std, s / std) for m, s, mean, std in own), strict=True)
    return transforms.Normalize(shifts, scales)


def _weights(name: str, path: Path | None) -> dict[str, torch.Tensor]:
    return imagenet_weights(name) if path is None else read_weights(path)


def _loaders(
    settings: Settings, train_images: ImageList, test_images: ImageList
) -> tuple[DataLoader[Any], DataLoader[Any], DataLoader[Any]]:
    augmented = ImageFiles(train_images, augmentation(settings.image_size))
    plain = ImageFiles(train_images, preparation(settings.image_size))
    test = ImageFiles(test_images, preparation(settings.image_size))
    chosen, held_out = train_and_validation(
        train_images.labels, settings.images_per_class, seed=settings.seed
    )
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "num_workers": settings.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    return (
        DataLoader(Subset(augmented, chosen), shuffle=True, **options),
        DataLoader(Subset(plain, held_out), **options),
        DataLoader(test, **options),
    )


def augmentation(size: int) -> transforms.Compose:
    """Returns what is done to a training image: photographs are cropped and flipped.

    Small images, which may be digits, are shifted by up to an eighth.
    """
    if size < 64:
        random = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)]
    else:
        random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*random, transforms.ToTensor(), _NORMALISE])


def preparation(size: int) -> transforms.Compose:
    """Returns what is done to an image of the validation or the test data."""
    if size < 64:
        resized = [transforms.Resize((size, size))]
    else:
        resized = [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    return transforms.Compose([*resized, transforms.ToTensor(), _NORMALISE])


def _keep_settings(accelerator: Accelerator, settings: Settings, output: Path) -> None:
    """Writes what a run is; refuses to go on with a run that was something else.

    A run that was stopped before its first checkpoint, by a missing file say, may begin anew.
    """
    file = output / "settings.json"
    now = json.dumps(asdict(settings), default=str, indent=1)
    trained = (output / "checkpoints").exists()
    if trained and file.exists() and file.read_text() != now:
        raise ValueError(
            f"{file}: expected the settings of the run that is to go on; got others. Choose "
            "another --output, or delete that folder."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(now)
