"""One run of a table: its data and settings, its training, and what is remembered of it."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from paper.datasets.loaders import Loaders
from paper.datasets.photograph_loaders import photograph_loaders
from paper.datasets.photographs import ImageList, read_cub, read_mit67
from paper.datasets.small_image_loaders import small_image_loaders
from paper.datasets.small_images import FORMATS, SmallImages, read_small_images
from paper.settings import Settings, small_image_settings
from paper.training import test_best, train_student
from vid_loss.diagnostics import METRICS
from vid_loss.durable import write_whole

from .cells import Cell, Record, Run, models_of
from .origin import data_digest, origin
from .plans import Plan
from .workers import kind_of

READERS = {"cub200": read_cub, "mit67": read_mit67}


class TooFewImagesError(ValueError):
    """A class with fewer images than a column asks for."""


class Runner:
    """Makes the runs of a table, one after the other.

    Args:
        accelerator: as for :func:`train_student`.
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
        self.origin = origin(accelerator)
        self._read = cache(self._read_data)  # once for all runs
        self._digest = cache(lambda name: data_digest(self._read(name)))

    def check_regimes(self, plan: Plan) -> None:
        """Raises TooFewImagesError, before anything is trained, if a column cannot be had."""
        data = self._read(plan.dataset)
        labels = data.train.labels if isinstance(data, SmallImages) else data[0].labels
        least = min(Counter(map(int, labels)).values())
        asked = {"--regimes": [n for n in plan.regimes if n is not None]}
        if plan.table == "1b" and plan.images_per_class is not None:
            asked["--images-per-class"] = [plan.images_per_class]
        for option, counts in asked.items():
            if max(counts, default=0) > least:
                raise TooFewImagesError(
                    f"{option}: expected at most {least} images per class, as many as the "
                    f"smallest class of {plan.dataset} has for training; got {max(counts)}. Ask "
                    "for fewer; --regimes all takes what there is."
                )

    def made_with(self, plan: Plan) -> dict[str, Record]:
        """Returns what a table's runs have in common, as :class:`FinishedRuns` asks for it."""
        common = {}
        methods = ["student"] + ["finetuned"] * ("finetuned" in plan.methods)
        cells = [Cell(plan, method, plan.regimes[0]) for method in methods]
        for cell in (*models_of(plan), *cells):
            record = self._before(cell, self.settings(Run(cell, "test", 0, {})))
            fields = ["teacher", "teacher_dataset", "data", "student"]
            fields += ["epochs", "steps_per_epoch", "batch_size", "lr", "held_out_images"]
            if plan.table == "1b" and cell.pretrained is None:
                fields.append("images_per_class")
            common[kind_of(record)] = {field: record[field] for field in fields}
        return common

    def execute(self, run: Run) -> dict[str, Any]:
        """Trains; tests what was best on validation data if this is a run for that.

        A model that another table in the same folder has trained beforehand is not trained again.
        """
        if run.cell.pretrained is None:
            folder = self.output / "runs" / run.name
            record = self._train(run, folder)
            shutil.rmtree(folder)
            return record
        folder = self._folder(run.cell)
        kept = folder / "record.json"
        if not kept.exists():
            write_whole(kept, json.dumps(self._train(run, folder)).encode())
            shutil.rmtree(folder / "checkpoints")
        return json.loads(kept.read_text())

    def _train(self, run: Run, folder: Path) -> dict[str, Any]:
        settings = self.settings(run)
        loaders = self.loaders(run.cell, settings)
        start = time.perf_counter()
        progress = sys.stderr.isatty()
        trained = train_student(self.accelerator, settings, loaders, folder, show_progress=progress)
        test = None
        if run.stage == "test":
            test = test_best(self.accelerator, settings, loaders, folder).percent
        return {
            **self._before(run.cell, settings),
            "stage": run.stage,
            "seed": run.seed,
            "choice": dict(run.choice),
            "validation": trained.best_percent,
            "validation_images": len(loaders.validation.dataset),
            "test": test,
            "transfer": _transfer(trained.history[-1]),
            "seconds": round(time.perf_counter() - start, 2),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.origin,
        }

    def _before(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        """Returns what is known of a cell's runs before they are made."""
        plan, dataset = cell.plan, _dataset(cell)
        taught = cell.pretrained is None
        return {
            "table": plan.table,
            "dataset": dataset,
            "data": self._digest(dataset),
            "teacher": plan.teacher if taught else None,
            "teacher_dataset": (plan.teacher_dataset or "imagenet") if taught else None,
            "student": settings.student,
            "method": settings.method,
            "pretrained": not taught,
            "n": cell.n,
            "images_per_class": settings.images_per_class,
            "labels_per_class": settings.labels_per_class,
            "held_out_images": settings.held_out_images,
            "epochs": settings.epochs,
            "steps_per_epoch": settings.steps_per_epoch,
            "batch_size": settings.batch_size,
            "lr": (plan.recipe if taught else plan.teacher_recipe)["lr"],  # if no choice says it
        }

    def settings(self, run: Run) -> Settings:
        """Returns what a run is trained with."""
        cell, plan = run.cell, run.cell.plan
        given = {
            "method": cell.method,
            "seed": run.seed,
            "weights_of": {x: run.choice[x] for x in cell.method.split("+") if x in run.choice},
            "hint": run.choice.get("hint"),
            "temperature": run.choice.get("temperature", 4.0),
            "images_per_class": cell.n,
        }
        if cell.pretrained is not None:
            given |= {"student": cell.pretrained, **plan.teacher_recipe}
        else:
            student = plan.finetuned if cell.method == "finetuned" else None
            student = student or plan.student
            given |= {"student": student, "teacher": plan.teacher}
            given |= {**self._weights(cell), **plan.recipe}
            given |= {"held_out_images": plan.held_out_images}
            given["lr"] = run.choice.get("lr", plan.recipe["lr"])
            if plan.table == "1b":
                given |= {"labels_per_class": cell.n, "images_per_class": plan.images_per_class}
        data = self._read(_dataset(cell))
        if not isinstance(data, SmallImages):
            return Settings(**given)
        settings = small_image_settings(data, **given)
        if cell.pretrained is None:
            name = plan.teacher_dataset
            classes = 1000 if name is None else FORMATS[name].classes
            settings = replace(settings, teacher_classes=classes)
        return settings

    def loaders(self, cell: Cell, settings: Settings) -> Loaders:
        """Returns a run's images."""
        data, like = self._read(_dataset(cell)), None
        if not isinstance(data, SmallImages):
            return photograph_loaders(settings, *data)
        if cell.pretrained is None and cell.plan.teacher_dataset is not None:
            like = self._read(cell.plan.teacher_dataset)  # the teacher's normalization
        return small_image_loaders(settings, data, self.accelerator.device, normalized_as=like)

    def _weights(self, cell: Cell) -> Mapping[str, Path]:
        models = {model.pretrained: self._folder(model) for model in models_of(cell.plan)}
        if not models:
            return {}  # the published ones
        folders = {"teacher_weights": models[cell.plan.teacher]}
        if cell.method == "finetuned":
            folders["student_weights"] = models[cell.plan.student]
        return {name: folder / "best.safetensors" for name, folder in folders.items()}

    def _folder(self, model: Cell) -> Path:
        return self.output / "pretrained" / model.name.removeprefix("pretrained-")

    def _read_data(self, name: str) -> SmallImages | Sequence[ImageList]:
        if name in READERS:
            return READERS[name](self.data)
        pictures = self.output / "pictures"
        return read_small_images(name, self.data, download=self.download, work=pictures)


def _transfer(epoch: Mapping[str, float]) -> dict[str, float]:
    """Returns what the diagnostics of VID's pairs were in an epoch, by metric and pair."""
    metrics = tuple(f"{metric}/" for metric in METRICS)
    return {name: round(x, 4) for name, x in epoch.items() if name.startswith(metrics)}


def _dataset(cell: Cell) -> str:
    return str(cell.plan.dataset if cell.pretrained is None else cell.plan.teacher_dataset)


def check_data_set(name: str, table: str, preset: str) -> None:
    """Raises ValueError if a table cannot be made of a data set of this name.

    Table 1 and the small preset train teachers of their own on small images; the paper's Table 2
    has a teacher of ImageNet, for images in files, and the preset for a GPU for coloured pictures.
    """
    known = [*READERS] if table.startswith("2") and preset == "paper" else [*FORMATS]
    if preset == "gpu":
        known = [name for name, form in FORMATS.items() if form.statistics is not None]
    if name not in known:
        raise ValueError(
            f"--dataset: expected one of {', '.join(known)} for table {table} with the preset "
            f"{preset!r}; got {name!r}."
        )
