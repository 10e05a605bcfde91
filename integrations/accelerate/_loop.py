"""A training loop on Accelerate: one process or many, DDP or FSDP2, mixed precision."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vid_loss import DistillationModel, Distiller
from vid_loss.subsets import labeled_cross_entropy

from ._checkpoints import alone, export_student, load_checkpoint, save_checkpoint
from ._checks import check_loaders, check_models, check_optimization, check_steps, folder_of
from ._evaluation import evaluate
from ._means import LossMeans

TaskLoss = Callable[[Any, Tensor], Tensor]
_Sample = tuple[list[Any], Tensor, dict[str, Tensor]]

_STEPS_BETWEEN_DISPLAYS = 10  # reading a loss makes the host wait for the device


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: how many epochs are done.
        best_epoch: the last epoch with the best accuracy on validation data; 0 before any.
        best_percent: that accuracy.
        history: for each epoch the mean task loss, each pair's mean loss by name (unweighted,
            over all processes), the variance of the teacher's feature that each VIDLoss pair
            explains (in the last batches) and the accuracy on validation data in percent.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_percent: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)

    def record(self, epoch: Mapping[str, float]) -> None:
        """Adds what one more epoch came to."""
        self.epoch += 1
        self.history.append(dict(epoch))
        # A few validation images often tie, and the later epoch has been trained for longer.
        if epoch["validation"] >= self.best_percent:
            self.best_epoch, self.best_percent = self.epoch, epoch["validation"]


class _Alone(nn.Module):
    """A student without a teacher, with the outputs of DistillationModel."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._no_split_modules = getattr(student, "_no_split_modules", None)

    def forward(self, *inputs: Any) -> Any:
        output = self.student(*inputs)
        if not self.training:
            return output
        return output, torch.zeros((), device=next(self.parameters()).device)


def train(
    accelerator: Accelerator,
    student: nn.Module,
    distiller: Distiller | None,
    *,
    optimizer: Optimizer,
    schedule: LRScheduler,
    train_loader: DataLoader[Any],
    validation_loader: DataLoader[Any],
    epochs: int,
    output: str | os.PathLike[str],
    task_loss: TaskLoss = labeled_cross_entropy,
    max_grad_norm: float | None = None,
    show_progress: bool = True,
) -> Progress:
    """Trains a student, and resumes where the same call was stopped.

    Every epoch ends with a checkpoint in ``output/checkpoints`` and the plain student in
    ``output/last.safetensors``; ``output/best.safetensors`` is the one that was best on validation
    data. Called again with the same ``output``, it goes on after the last checkpoint that is whole
    and reaches the parameters that it would have reached. The last two are kept. Call
    ``accelerate.utils.set_seed`` before building anything, with the same seed in every process.

    Args:
        accelerator: with ``DataLoaderConfiguration(use_seedable_sampler=True)``; says how to
            train: precision, gradient accumulation, DDP or FSDP2, trackers.
        student: the model to train, not prepared.
        distiller: the transfer terms, built with this student; None trains it alone.
        optimizer: of the student's parameters and the distiller's, not prepared.
        schedule: of that optimizer, stepped once an epoch.
        train_loader: batches ``(*inputs, labels)``, not prepared. Labels of samples without one
            are ``-100``. Drop the last batch if it must not weigh more than the others. For a
            distiller with a cache ``((*inputs, labels), sample_index)``, which is what
            ``StackDataset(dataset, range(len(dataset)))`` gives.
        validation_loader: batches ``(*inputs, labels)`` of what the best epoch is chosen on.
        epochs: how many epochs there are in all.
        output: folder of the run, on storage that every process sees.
        task_loss: of the student's output and the labels.
        max_grad_norm: clips the gradient of student and heads together to this norm.
        show_progress: False leaves the progress bar to a caller that has many runs.

    Returns:
        The progress, after the last epoch. The accelerator has forgotten what it prepared.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the order of the samples would not survive a resume, the distiller's
            parameters are not in the optimizer, a loader has no batch, another number of
            processes wrote the checkpoint, or another run is writing there.
    """
    check_models(student, distiller)
    check_optimization(accelerator, optimizer, schedule, distiller)
    check_steps(epochs, task_loss, max_grad_norm)
    check_loaders(train_loader, validation_loader, processes=1)
    output = folder_of(output)
    with alone(accelerator, output), _forgetting(accelerator):
        if distiller is not None:
            distiller.to(accelerator.device)  # and the teacher, which no engine knows of
        model, optimizer, batches, validation_batches = accelerator.prepare(
            _Alone(student) if distiller is None else DistillationModel(student, distiller),
            optimizer,
            train_loader,
            validation_loader,
        )
        check_loaders(batches, validation_batches, accelerator.num_processes)
        progress = _resume(accelerator, schedule, output)
        steps = len(batches)
        hidden = not (show_progress and accelerator.is_main_process)
        with tqdm(
            initial=progress.epoch * steps, total=epochs * steps, leave=False, disable=hidden
        ) as bar:
            for epoch in range(progress.epoch, epochs):
                batches.set_epoch(epoch)
                samples = _samples(batches, distiller)
                tasks = _train_steps(
                    accelerator, model, optimizer, samples, task_loss, max_grad_norm
                )
                losses = _means(accelerator, tasks, distiller, bar)
                schedule.step()
                validation = evaluate(accelerator, model, validation_batches).percent
                found = _transfer(accelerator, distiller)
                progress.record({**losses, **found, "validation": validation})
                accelerator.log(progress.history[-1], step=progress.epoch)
                _save(accelerator, model, schedule, progress, output)
    return progress


@contextmanager
def _forgetting(accelerator: Accelerator) -> Iterator[None]:
    """Lets the accelerator forget what it prepared: the next checkpoint would have it, too."""
    try:
        yield
    finally:
        accelerator.free_memory()


def _samples(loader: DataLoader[Any], distiller: Distiller | None) -> Iterator[_Sample]:
    """Tells inputs, labels and, for a cache, the samples' index apart."""
    for batch in loader:
        if distiller is None or distiller.cache is None:
            *inputs, labels = batch
            yield inputs, labels, {}
        else:
            (*inputs, labels), index = batch
            yield inputs, labels, {"sample_index": index}


def _train_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    samples: Iterable[_Sample],
    task_loss: TaskLoss,
    max_grad_norm: float | None,
) -> Iterator[Tensor]:
    """Trains for one epoch; yields each batch's task loss."""
    model.train()
    for inputs, labels, keywords in samples:
        with accelerator.accumulate(model):
            output, transfer = model(*inputs, **keywords)
            task = task_loss(output, labels)
            accelerator.backward(task + transfer)
            if accelerator.sync_gradients and max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        yield task.detach()


def _means(
    accelerator: Accelerator, tasks: Iterable[Tensor], distiller: Distiller | None, bar: Any
) -> dict[str, float]:
    """Goes through an epoch's steps; returns the means of their losses over all processes."""
    means = LossMeans()
    for task in tasks:
        means.add({"task": task, **(distiller.terms if distiller else {})})
        bar.update()
        if not bar.disable and bar.n % _STEPS_BETWEEN_DISPLAYS == 0:  # hidden, n stays 0
            bar.set_postfix(means.last())
    return means.over_processes(accelerator)


def _transfer(accelerator: Accelerator, distiller: Distiller | None) -> dict[str, float]:
    found = {} if distiller is None else distiller.metrics()
    if not found:
        return {}
    values = torch.tensor(list(found.values()), device=accelerator.device)
    return dict(zip(found, accelerator.reduce(values, "mean").tolist(), strict=True))


def _resume(accelerator: Accelerator, schedule: LRScheduler, output: Path) -> Progress:
    if (state := load_checkpoint(accelerator, output / "checkpoints")) is None:
        return Progress()
    schedule.load_state_dict(state["schedule"])
    return Progress(**state["progress"])


def _save(
    accelerator: Accelerator,
    model: nn.Module,
    schedule: LRScheduler,
    progress: Progress,
    output: Path,
) -> None:
    # The exports first: killed between the two, the run does this epoch again and both with it.
    names = ["last"] + ["best"] * (progress.best_epoch == progress.epoch)
    export_student(accelerator, model, [output / f"{name}.safetensors" for name in names])
    state = {"progress": asdict(progress), "schedule": schedule.state_dict()}
    save_checkpoint(accelerator, output / "checkpoints", progress.epoch, state)
