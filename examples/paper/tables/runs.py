"""One run of a table: which data and settings a cell has, and what is remembered of it."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from cifar import recipe
from paper.image_folders import ImageList, read_cub, read_mit67
from paper.image_runs import file_loaders
from paper.small_batches import small_loaders
from paper.small_images import FORMATS, SmallImages, read_small_images
from paper.transfer import Loaders, Settings, test_best, train_method

from .cells import Cell, Plan
from .items import Item, Run

READERS = {"cub200": read_cub, "mit67": read_mit67}
_PACKAGES = ("vid-loss", "torch", "torchvision", "accelerate", "optuna")


class Runner:
    """Does the runs of a table, one after the other.

    Args:
        accelerator: as for :func:`train_method`.
        data: folder of the data set; of the teacher's too, if that is another.
        output: folder of runs and of what is trained beforehand. Workers that share it go on with
            a killed worker's run where it was.
        download: whether to fetch small images that are missing.
    """

    def __init__(
        self, accelerator: Accelerator, data: Path, output: Path, *, download: bool = False
    ) -> None:
        self.accelerator, self.data, self.output = accelerator, data, output
        self.download = download
        self._common = {
            "command": " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "revision": _revision(),
            "versions": {"python": sys.version.split()[0]}
            | {package: version(package) for package in _PACKAGES},
            "device": _device(accelerator),
        }
        self._read = cache(self._read_data)  # once for all runs

    def execute(self, item: Item, run: Run) -> dict[str, Any]:
        """Trains; tests what was best on validation data if this is the run for that."""
        cell: Cell = item.work
        settings, loaders = self._prepare(cell, run)
        folder = self._folder(cell, item, run)
        start = time.perf_counter()
        validation = train_method(
            self.accelerator, settings, loaders, folder, show_progress=sys.stderr.isatty()
        )
        test = None
        if run["stage"] == "test":
            test = test_best(self.accelerator, settings, loaders, folder).percent
        seconds = time.perf_counter() - start
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if cell.pretrained is None:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "table": cell.plan.table,
            "dataset": cell.plan.teacher_dataset if cell.pretrained else cell.plan.dataset,
            "teacher": None if cell.pretrained else cell.plan.teacher,
            "teacher_dataset": None if cell.pretrained else cell.plan.teacher_dataset or "imagenet",
            "student": settings.student,
            "method": settings.method,
            "pretrained": cell.pretrained is not None,
            "n": cell.n,
            "images_per_class": settings.images_per_class,
            "labels_per_class": settings.labels_per_class,
            "stage": run["stage"],
            "seed": run["seed"],
            "choice": {name: x for name, x in run.items() if name not in ("stage", "seed")},
            "epochs": settings.epochs,
            "steps_per_epoch": settings.steps_per_epoch,
            "batch_size": settings.batch_size,
            "lr": settings.lr,
            "validation": validation,
            "validation_images": len(loaders.validation.dataset),
            "test": test,
            "seconds": round(seconds, 2),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._common,
        }

    def pretrained(self, plan: Plan, model: str) -> Path:
        """Returns where a model's weights are that was trained beforehand."""
        recipe = "-".join(f"{value}" for value in plan.teacher_recipe.values())
        return self.output / "pretrained" / f"{plan.teacher_dataset}-{model}-{recipe}"

    def _folder(self, cell: Cell, item: Item, run: Run) -> Path:
        if cell.pretrained is not None:
            return self.pretrained(cell.plan, cell.pretrained)
        parts = "-".join(f"{name}={value}" for name, value in run.items())
        return self.output / "runs" / f"{item.name} {parts}".replace(" ", "-")

    def _prepare(self, cell: Cell, run: Run) -> tuple[Settings, Loaders]:
        data = self._read(cell.plan.teacher_dataset if cell.pretrained else cell.plan.dataset)
        given = {
            "method": cell.method,
            "seed": run["seed"],
            "weights_of": {x: run[x] for x in cell.method.split("+") if x in run},
            "hint": run.get("hint"),
            "temperature": run.get("temperature", 4.0),
            "images_per_class": cell.n,
        }
        if cell.pretrained is not None:
            given |= {"student": cell.pretrained, **cell.plan.teacher_recipe}
        else:
            given |= {"student": cell.plan.student, "teacher": cell.plan.teacher}
            given |= {**self._weights(cell), **cell.plan.recipe}
        if cell.plan.table == "1b" and cell.pretrained is None:
            labels, images = cell.n, cell.plan.images_per_class
            given |= {"labels_per_class": labels, "images_per_class": images}
        if not isinstance(data, SmallImages):
            settings = Settings(**given)
            return settings, file_loaders(settings, *data)
        settings, like = recipe(data, **given), None
        if cell.plan.teacher_dataset is not None and cell.pretrained is None:
            like = self._read(cell.plan.teacher_dataset)  # the teacher's normalisation
            settings = replace(settings, teacher_classes=like.format.classes)
        return settings, small_loaders(settings, data, self.accelerator.device, normalised_as=like)

    def _weights(self, cell: Cell) -> dict[str, Path]:
        if cell.plan.teacher_dataset is None:
            return {}  # the published ones
        files = {"teacher_weights": self.pretrained(cell.plan, cell.plan.teacher)}
        if cell.method == "finetuned":
            files["student_weights"] = self.pretrained(cell.plan, cell.plan.student)
        return {name: folder / "best.safetensors" for name, folder in files.items()}

    def _read_data(self, name: str) -> SmallImages | Sequence[ImageList]:
        if name in READERS:
            return READERS[name](self.data)
        return read_small_images(name, self.data, download=self.download)


def check_data_set(name: str, table: str, preset: str) -> None:
    """Raises ValueError if a table cannot be made of a data set of this name.

    Table 1 and the small preset train teachers of their own on small images; the paper's Table 2
    has a teacher of ImageNet, for images in files.
    """
    known = [*READERS] if table.startswith("2") and preset == "paper" else [*FORMATS]
    if name not in known:
        raise ValueError(
            f"--dataset: expected one of {', '.join(known)} for table {table} with the preset "
            f"{preset!r}; got {name!r}."
        )


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{accelerator.device.type}, {torch.get_num_threads()} threads"


def _revision() -> str:
    """Returns the git revision of this file's clone, marked if it has changes."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
