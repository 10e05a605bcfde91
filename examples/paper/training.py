"""Trains and tests the student of one run."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from vid_loss.integrations.accelerate import Accuracy, Progress, alone, evaluate, train

from vid_loss import Distiller
from vid_loss.cache import FeatureCache
from vid_loss.durable import write_whole

from .datasets.loaders import Loaders
from .methods import WITHOUT_TEACHER, Layers, find_layers, is_known, matching_layers, pairs_of
from .models import build_model
from .settings import Settings
from .weights import imagenet_weights, load_weights, read_weights, renormalization

HISTORY = "history.json"


class Result(NamedTuple):
    """The best accuracy on validation data, in percent, and that student's on the test data."""

    validation: float
    test: Accuracy


def train_and_test(
    accelerator: Accelerator, settings: Settings, loaders: Loaders, output: Path
) -> Result:
    """Trains a student by one method and tests the one that was best on validation data.

    The arguments are those of :func:`train_student`.
    """
    progress = train_student(accelerator, settings, loaders, output)
    return Result(progress.best_percent, test_best(accelerator, settings, loaders, output))


def train_student(
    accelerator: Accelerator,
    settings: Settings,
    loaders: Loaders,
    output: Path,
    *,
    show_progress: bool = True,
) -> Progress:
    """Trains a student by one method; what each epoch came to is in ``history.json`` then.

    Args:
        accelerator: with ``use_seedable_sampler=True`` and ``split_batches=True``.
        settings: of the run.
        loaders: of images and labels.
        output: the run's folder; a run that was stopped goes on from there.
        show_progress: whether there is a progress bar.

    Returns:
        How it went: the best accuracy on the validation data, and every epoch's diagnostics.
    """
    with alone(accelerator, output):
        _keep_settings(accelerator, settings, output)
        return _train(accelerator, settings, loaders, output, show_progress)


def _train(
    accelerator: Accelerator,
    settings: Settings,
    loaders: Loaders,
    output: Path,
    show_progress: bool,
) -> Progress:
    set_seed(settings.seed)
    student = _student(settings, loaders.classes)
    distiller = _distiller(settings, student)
    optimizer = _optimizer(settings, student, distiller)
    progress = train(
        accelerator,
        student,
        distiller,
        optimizer=optimizer,
        schedule=_schedule(settings, optimizer),
        train_loader=loaders.train,
        validation_loader=loaders.validation,
        epochs=settings.epochs,
        output=output,
        max_grad_norm=settings.max_grad_norm,
        show_progress=show_progress,
    )
    if accelerator.is_main_process:
        write_whole(output / HISTORY, json.dumps(progress.history, indent=1).encode())
    return progress


def test_best(
    accelerator: Accelerator, settings: Settings, loaders: Loaders, output: Path
) -> Accuracy:
    """Tests the student of a finished run that was best on the validation data."""
    best = build_model(settings.student, loaders.classes)
    best.load_state_dict(read_weights(output / "best.safetensors"))
    model, loader = best.to(accelerator.device), accelerator.prepare(loaders.test)
    accuracy = evaluate(accelerator, model, loader)
    accelerator.free_memory()
    return accuracy


def _built(settings: Settings, name: str, classes: int) -> nn.Module:
    model = build_model(name, classes)
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model


def _student(settings: Settings, classes: int) -> nn.Module:
    student = _built(settings, settings.student, classes)
    if settings.method == "finetuned":
        weights = _weights(settings.student, settings.student_weights)
        load_weights(student, weights, new_classifier=True)
    return student


def _optimizer(settings: Settings, student: nn.Module, distiller: Distiller | None) -> Optimizer:
    decay = settings.weight_decay
    groups = [{"params": list(student.parameters())}]
    if distiller is not None:
        groups += distiller.parameter_groups(lr=settings.lr, weight_decay=decay)
    return torch.optim.SGD(groups, settings.lr, momentum=0.9, weight_decay=decay, nesterov=True)


def _schedule(settings: Settings, optimizer: Optimizer) -> LRScheduler:
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, settings.epochs)
    # The wide residual networks' 200 epochs have steps at 60, 120 and 160.
    milestones = [round(part * settings.epochs) for part in (0.3, 0.6, 0.8)]
    return MultiStepLR(optimizer, milestones, gamma=0.2)


def _distiller(settings: Settings, student: nn.Module) -> Distiller | None:
    if settings.method in WITHOUT_TEACHER:
        return None
    teacher = _built(settings, settings.teacher, settings.teacher_classes)
    load_weights(
        teacher, _weights(settings.teacher, settings.teacher_weights), new_classifier=False
    )
    example = torch.zeros(1, 3, settings.image_size, settings.image_size)
    inputs = renormalization(teacher) if settings.teacher_weights is None else None
    pairs = pairs_of(
        settings.method,
        settings.layers or _layers(settings, student, teacher, example, inputs),
        settings.weights_of,
        temperature=settings.temperature,
        hint=settings.hint,
    )
    cache = None if settings.cache is None else FeatureCache(settings.cache / settings.method)
    return Distiller(student, teacher, pairs, example=example, teacher_inputs=inputs, cache=cache)


def _layers(
    settings: Settings,
    student: nn.Module,
    teacher: nn.Module,
    example: torch.Tensor,
    inputs: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Layers:
    """Returns the paper's layers for its own models, and what fits for others."""
    if is_known(settings.student) and is_known(settings.teacher):
        return matching_layers(settings.student, settings.teacher)
    return find_layers(student, teacher, example, inputs)


def _weights(name: str, path: Path | None) -> dict[str, torch.Tensor]:
    return imagenet_weights(name) if path is None else read_weights(path)


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
        write_whole(file, now.encode())
