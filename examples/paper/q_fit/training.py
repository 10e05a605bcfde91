"""The training of q_fit's teachers and students."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, default_collate

from paper.once import make_once
from vid_loss import Distiller
from vid_loss.cache import FixedAugmentations

from .tasks import TASKS, Inputs, Places, Task


@cache
def load_task(name: str, places: Places) -> Task:
    """Returns a task; its data are read once per process."""
    return TASKS[name](places)


def prepare_teacher(name: str, places: Places, steps: int | None) -> None:
    """Trains a task's teacher on all but the validation samples, unless that was done before.

    Programs that start together wait for the one that is at it.
    """
    task, file = load_task(name, places), _teacher_file(name, places, steps)
    make_once(file, lambda: _train_teacher(task, steps, file))


def _train_teacher(task: Task, steps: int | None, file: Path) -> None:
    torch.manual_seed(0)
    teacher, (_, batch_size, lr) = task.teacher(), task.teaching
    samples = (training_labels(task) >= 0).nonzero().flatten()
    optimizer = AdamW(teacher.parameters(), lr=lr)
    for _ in train(teacher, task, samples, optimizer, steps or task.teaching.steps, batch_size):
        pass
    aside = file.with_name(file.name + ".partial")
    torch.save(teacher.state_dict(), aside)
    aside.rename(file)


def trained_teacher(name: str, places: Places, steps: int | None) -> nn.Module:
    """Returns what :func:`prepare_teacher` has trained."""
    teacher = load_task(name, places).teacher()
    teacher.load_state_dict(torch.load(_teacher_file(name, places, steps)))
    return teacher


def _teacher_file(name: str, places: Places, steps: int | None) -> Path:
    steps = steps or load_task(name, places).teaching.steps
    return places.work / f"teacher-{name}-{steps}.pt"


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, dtype: torch.dtype) -> float:
    """Returns the accuracy on the validation samples in percent."""
    model.eval()
    correct = 0
    for chosen in task.validation.split(250):
        logits = _logits(model, inputs_of(task, chosen, dtype))
        correct += int((logits.argmax(1) == task.labels[chosen]).sum())
    return 100 * correct / len(task.validation)


def train(
    model: nn.Module,
    task: Task,
    samples: Tensor,
    optimizer: Optimizer,
    steps: int,
    batch_size: int,
    distiller: Distiller | None = None,
    views: FixedAugmentations | None = None,
) -> Iterator[None]:
    """Trains, and stops after every step for whoever wants to look; on views if there are any."""
    dtype = next(model.parameters()).dtype
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = None if distiller is None or task.augmented else _features(task, samples, distiller)
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(samples))[:batch_size]
        place = None
        if views is None:
            inputs = inputs_of(task, samples[batch], dtype, augmented=True)
        else:
            inputs = default_collate([views[i] for i in batch.tolist()])
            place = inputs.pop("sample_index")
        loss = F.cross_entropy(_logits(model, inputs).float(), task.labels[samples[batch]])
        if distiller is not None:
            features = None if kept is None else {k: x[batch] for k, x in kept.items()}
            loss = loss + distiller(**inputs, teacher_features=features, sample_index=place)
        optimizer.zero_grad()
        loss.backward()
        if task.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, task.max_grad_norm)
        optimizer.step()
        schedule.step()
        yield


class AugmentedSamples(Dataset[Inputs]):
    """Some samples of a task, one by one, each augmented anew when it is read."""

    def __init__(self, task: Task, samples: Tensor, dtype: torch.dtype) -> None:
        self.task, self.samples, self.dtype = task, samples, dtype

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Inputs:
        one = self.samples[index : index + 1]
        inputs = inputs_of(self.task, one, self.dtype, augmented=True)
        return {name: x[0] for name, x in inputs.items()}


def _features(task: Task, samples: Tensor, distiller: Distiller) -> dict[str, Tensor]:
    """Returns the teacher's features of all samples, by layer."""
    dtype = next(distiller.student.parameters()).dtype
    found = [distiller.teacher_features(**inputs_of(task, x, dtype)) for x in samples.split(50)]
    return {layer: torch.cat([x[layer] for x in found]) for layer in found[0]}


def training_labels(task: Task) -> Tensor:
    """Returns the labels, with -1 for the validation samples: these are drawn by nobody."""
    return task.labels.index_fill(0, task.validation, -1)


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def inputs_of(
    task: Task, samples: Tensor, dtype: torch.dtype, *, augmented: bool = False
) -> Inputs:
    """Returns the models' inputs of some samples, in their precision."""
    inputs = task.inputs(samples, augmented)
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
