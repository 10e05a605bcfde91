"""Command line of ``cub.py`` and ``mit67.py``, the programs of the paper's Table 2."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from .datasets.photograph_loaders import photograph_loaders
from .datasets.photographs import ImageList
from .demo import Digits, run_demo, table
from .methods import TABLE_2, Layers
from .settings import Settings
from .training import train_and_test

TORCHRUN = "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2"


@dataclass(frozen=True)
class DataSet:
    """A data set of Table 2.

    Args:
        name: of the folder that runs go to.
        folder: where it is, if no other is named.
        read: its lists of training and of test images, from its folder.
        download: fetches it into a folder.
        instructions: what to fetch by hand, and how to lay it out.
        write: writes digits in its format, for ``--demo``.
    """

    name: str
    folder: Path
    read: Callable[[Path], tuple[ImageList, ImageList]]
    download: Callable[[Path], None]
    instructions: str
    write: Callable[[Path, Digits], None]


def main(data_set: DataSet) -> None:
    """Runs what the command line says, and prints accuracies."""
    arguments = _parse(data_set)
    accelerator = start_accelerator(arguments.accumulation, arguments.log_with, arguments.output)
    if not arguments.demo:  # many runs, whose epochs a tracker would mix
        accelerator.init_trackers(data_set.name)
    try:
        if arguments.demo:
            results = run_demo(
                accelerator, data_set.read, data_set.write, arguments.seed, arguments.output
            )
            accelerator.print(table(results))
        else:
            _run(accelerator, data_set, arguments)
    finally:
        accelerator.end_training()


def start_accelerator(
    accumulation: int = 1, log_with: str | None = None, folder: Path | None = None
) -> Accelerator:
    """Returns the accelerator that runs need, and says so where processes are missing."""
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, split_batches=True),
        gradient_accumulation_steps=accumulation,
        log_with=log_with,
        project_dir=folder,
    )
    # accelerate launch sets an address where several are asked for; on CPU it starts one of them.
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        print(f"One process runs. Several on CPU: {TORCHRUN} {' '.join(sys.argv)}", file=sys.stderr)
    return accelerator


def _run(accelerator: Accelerator, data_set: DataSet, arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    try:
        if arguments.download:
            with accelerator.main_process_first():
                data_set.download(arguments.data)
        data = data_set.read(arguments.data)
    except (FileNotFoundError, ConnectionError) as error:
        sys.exit(f"{error}\n\n{data_set.instructions}\nA run that needs no data: --demo")
    try:
        loaders = photograph_loaders(settings, *data)
        result = train_and_test(accelerator, settings, loaders, arguments.output)
    except (FileNotFoundError, ConnectionError) as error:  # of weights: it says what to do
        sys.exit(str(error))
    accelerator.print(
        f"{settings.method}, {settings.student}, seed {settings.seed}: "
        f"{result.validation:.2f} % of the validation images, "
        f"{result.test.percent:.2f} % of {result.test.total} test images"
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    layers = None
    if arguments.stages or arguments.classifiers:
        layers = Layers(tuple(arguments.stages), arguments.classifiers or ("fc", "fc"))
    given = {k: v for k, v in vars(arguments).items() if k in Settings.__dataclass_fields__}
    given["weights_of"] = {name: float(weight) for name, weight in arguments.weights_of}
    return Settings(layers=layers, **given)


def name_and_value(text: str) -> tuple[str, str]:
    """Reads NAME=VALUE from the command line."""
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    return left, right


def _parse(data_set: DataSet) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Transfer to {data_set.name}, as in Table 2 of the paper.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"With several processes on CPU: {TORCHRUN} {sys.argv[0]} ...",
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="run on digits, without a download; settings are fixed")
    add("--data", type=Path, default=data_set.folder, help="folder of the data set")
    add("--download", action="store_true", help="fetch the data set into --data first")
    add("--method", default="mi-i", help=f"one of {', '.join(TABLE_2)}, or another sum of these")
    add("--weights-of", type=name_and_value, nargs="*", default=[], metavar="METHOD=LAMBDA")
    add("--hint", type=int, help="FitNet's stage, counted from 0; the middle one if not given")
    add("--student", default="resnet18", help="resnet18, vgg9, or torchvision's or timm's name")
    add("--student-weights", type=Path, help="what 'finetuned' starts from, if not ImageNet's")
    add("--teacher", default="resnet34", help="torchvision's or timm's name")
    add("--teacher-weights", type=Path, help="a state_dict, instead of the published weights")
    add("--teacher-classes", type=int, default=1000)
    layers = "layers of models that are not of the paper's families"
    pair: dict[str, Any] = {"type": name_and_value, "metavar": "STUDENT=TEACHER"}
    add("--stages", **pair, nargs="*", default=[], help=layers)
    add("--classifiers", **pair, help="as --stages; fc=fc if not given")
    add("--images-per-class", type=int, help="all if not given; a fifth is for validation")
    add("--image-size", type=int, default=224)
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--accumulation", type=int, default=1, help="batches per step")
    add("--lr", type=float, default=0.05)
    add("--weight-decay", type=float, default=5e-4)
    add("--max-grad-norm", type=float)
    add("--workers", type=int, default=4, help="processes that read images, for each process")
    add("--log-with", choices=("tensorboard", "wandb"))
    add("--output", type=Path, default=None, help="folder of the run; named for it if not given")
    arguments = parser.parse_args()
    if arguments.output is None:
        count = arguments.images_per_class or "all"
        run = f"{arguments.student}-{arguments.method}-{count}-seed{arguments.seed}"
        arguments.output = Path("runs", data_set.name, "demo" if arguments.demo else run)
    return arguments
