"""One run of q_fit: a student taught with VID, and how well q(t|s) was fitted meanwhile."""

import inspect
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop

import vid_loss
from vid_loss import Distiller, Pair, VIDLoss
from vid_loss.cache import FeatureCache, FixedAugmentations
from vid_loss.subsets import images_per_class

from .tasks import Places
from .training import (
    AugmentedSamples,
    accuracy,
    inputs_of,
    load_task,
    train,
    trained_teacher,
    training_labels,
)

Record = dict[str, Any]  # a line
HeadRate = float | Literal["student"] | None
Observed = dict[str, list[float]]  # by pair, one number per step
_FROM = 50  # the step from which nats should be above 0
_AT = (_FROM, 100, 300)  # what is reported beside the end
_OF_MAPS_AND_TOKENS = ("hidden_channels", "norm")  # of their heads; a vector's is linear
_WINDOW = 10  # steps whose mean is reported


@dataclass(frozen=True)
class Setting:
    """An optimizer and a precision. Learning rates fall to 0, linearly."""

    optimizer: Callable[..., Optimizer]
    dtype: torch.dtype = torch.float32


SETTINGS = {
    "sgd-0.1": Setting(partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "adamw-1e-3": Setting(partial(AdamW, lr=1e-3)),
    "adamw-5e-5": Setting(partial(AdamW, lr=5e-5)),
    "bfloat16": Setting(partial(AdamW, lr=1e-3), torch.bfloat16),
}
_OF_TIMM = ("lamb", "novograd", "laprop", "mars", "lars")
# Beside which the heads have another rate than the student: at one for fine-tuning, and at the
# usual one of three.
OTHER_OPTIMIZERS = {
    f"{name}-{lr}": Setting(partial(optimizer, lr=float(lr)))
    for name, optimizer, rates in (
        ("rmsprop", RMSprop, ("5e-5", "1e-3")),
        ("lion", partial(create_optimizer_v2, opt="lion"), ("5e-5", "3e-4")),
        ("madgrad", partial(create_optimizer_v2, opt="madgrad"), ("5e-5", "1e-3")),
        ("adagrad", Adagrad, ("5e-5",)),
        ("adafactor", Adafactor, ("5e-5",)),
        *((x, partial(create_optimizer_v2, opt=x), ("5e-5",)) for x in _OF_TIMM),
    )
    for lr in rates
}


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        task: one of :data:`~paper.q_fit.tasks.TASKS`.
        setting: one of :data:`SETTINGS` or :data:`OTHER_OPTIMIZERS`.
        seed: of the samples drawn, the student, the heads and the order.
        head_lr: learning rate of heads and variances; ``"student"`` is the student's, None what
            this version of the library documents.
        weight: lambda; None is the library's default.
        options: of ``VIDLoss``.
        steps: in place of the task's.
        teacher_steps: in place of the task's.
        views: how many augmentations there are of each sample, the teacher's features of which
            are cached; None augments each time anew.
    """

    task: str
    setting: str
    seed: int
    head_lr: HeadRate = None
    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    teacher_steps: int | None = None
    views: int | None = None

    def identity(self) -> Record:
        """Returns what tells the line of this run from all others."""
        return {
            "version": vid_loss.__version__,
            "revision": revision(),
            "task": self.task,
            "setting": self.setting,
            "seed": self.seed,
            "head_lr": self.head_lr,
            "lambda": self.weight,
            "options": dict(self.options),
            "steps": self.steps,
            "views": self.views,
        }

    def is_of(self, line: Record) -> bool:
        """Whether a line is this run's."""
        return all(line.get(key) == value for key, value in self.identity().items())


@cache
def revision() -> str:
    """Returns the last commit that changed the library, marked if its files have changed since."""
    folder = Path(vid_loss.__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%H", "--", ".")
    return commit + "-dirty" * bool(git("status", "--porcelain", "--", ".")) or "unknown"


def do(run: Run, places: Places) -> Record:
    """Trains a student; returns the line of this run."""
    with tempfile.TemporaryDirectory() as folder:
        return _do(run, places, None if run.views is None else FeatureCache(folder))


def _do(run: Run, places: Places, cache: FeatureCache | None) -> Record:
    start = time.perf_counter()
    task, setting = load_task(run.task, places), (SETTINGS | OTHER_OPTIMIZERS)[run.setting]
    teacher = trained_teacher(run.task, places, run.teacher_steps).to(setting.dtype)
    torch.manual_seed(run.seed)
    student = task.student().to(setting.dtype)
    samples = torch.tensor(images_per_class(training_labels(task), task.per_class, seed=run.seed))
    loss = partial(_loss, run.options)
    pairs = [Pair(*x, run.weight, loss, name="->".join(x)) for x in task.pairs]
    example = inputs_of(task, samples[: task.batch_size], setting.dtype)
    distiller = Distiller(student, teacher, pairs, example=example, cache=cache)
    distiller.to(setting.dtype)
    views = None
    if run.views is not None:
        augmented = AugmentedSamples(task, samples, setting.dtype)
        views = FixedAugmentations(augmented, views=run.views, seed=run.seed)
    optimizer = setting.optimizer(student.parameters())
    for group in head_groups(distiller, optimizer, run.head_lr):
        optimizer.add_param_group(group)
    steps = run.steps or task.steps
    seen = [
        distiller.diagnostics()
        for _ in train(student, task, samples, optimizer, steps, task.batch_size, distiller, views)
    ]
    nats = {pair: [x[pair].nats_per_element for x in seen] for pair in seen[0]}
    explained = {pair: [x[pair].explained_variance for x in seen] for pair in seen[0]}
    return {
        **run.identity(),
        "accuracy": accuracy(student, task, setting.dtype),
        "explained_variance": milestones(explained),
        "nats": milestones(nats),
        "least_nats": {pair: least_from_50(values) for pair, values in nats.items()},
        "variance": {pair: _mean_variance(x) for pair, x in distiller.vid_losses().items()},
        "weights": distiller.weights,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
    }


def head_groups(distiller: Distiller, optimizer: Optimizer, lr: HeadRate) -> list[dict[str, Any]]:
    """Returns the optimizer's groups of heads and variances.

    Args:
        distiller: whose heads.
        optimizer: the student's.
        lr: as in :class:`Run`; in 0.1.0 the documented rate is the student's.
    """
    if "lr" not in inspect.signature(distiller.parameter_groups).parameters:  # 0.1.0
        return [{"params": distiller.parameters(), **({"lr": lr} if isinstance(lr, float) else {})}]
    rate = optimizer.defaults["lr"] if lr == "student" else lr
    return distiller.parameter_groups(optimizer, lr=rate)


def _loss(
    options: Mapping[str, Any], student_shape: Sequence[int], teacher_shape: Sequence[int]
) -> VIDLoss:
    """Builds a pair's loss; without those options that a vector's linear head refuses."""
    refused = _OF_MAPS_AND_TOKENS if len(student_shape) == 2 else ()
    given = {name: value for name, value in options.items() if name not in refused}
    return VIDLoss(student_shape, teacher_shape, **given)


def milestones(observed: Observed) -> dict[str, dict[str, float]]:
    """Returns, by step and pair, the mean over the steps that end there."""
    steps = len(next(iter(observed.values())))
    ends = {str(step): step for step in _AT if step <= steps} | {"end": steps}
    return {
        key: {name: mean(x[max(end - _WINDOW, 0) : end]) for name, x in observed.items()}
        for key, end in ends.items()
    }


def least_from_50(values: Sequence[float]) -> float:
    """Returns the least from step 50 on, by when q should be fitted; NaN if one is, or none is."""
    seen = values[_FROM - 1 :]
    return min(seen) if seen and all(map(math.isfinite, seen)) else math.nan


def _mean_variance(loss: VIDLoss) -> float:
    """Returns the mean over channels, in the units in which this version keeps it."""
    return float(loss.variance().detach().float().mean())
