"""The program of ``folder.py``, ``cub.py`` and ``mit67.py``: students, one with a teacher."""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration

from .command_line import TORCHRUN, read_command_line
from .curves import draw_curves
from .datasets.loaders import Loaders
from .datasets.photograph_loaders import photograph_loaders
from .datasets.photographs import ImageList
from .demo import Digits, run_demo, table
from .methods import Layers
from .settings import Settings
from .training import Result, train_and_test

_TOLD = re.compile(r": expected .*; got ", re.DOTALL)  # how the messages are built that say it all


@dataclass(frozen=True)
class DataSet:
    """A data set of photographs.

    Args:
        description: what it is, for ``--help``.
        folder: where it is, if no other is named; None asks for one.
        read: its lists of training and of test images, from its folder and a run's settings.
        instructions: how to lay it out by hand.
        write: writes digits in its format, for ``--demo``.
        name: of the folder that runs go to; None is that of ``--data``.
        fetch: brings what is missing of it into a folder; None if nobody publishes it.
    """

    description: str
    folder: Path | None
    read: Callable[[Path, Settings], tuple[ImageList, ImageList]]
    instructions: str
    write: Callable[[Path, Digits], None]
    name: str | None = None
    fetch: Callable[[Path], None] | None = None


def main(data_set: DataSet) -> None:
    """Runs what the command line says, and prints accuracies."""
    arguments = read_command_line(data_set.description, data_set.folder)
    if arguments.output is None:
        count = arguments.images_per_class or "all"
        run = f"{arguments.student}-{arguments.teacher}-{count}-seed{arguments.seed}"
        arguments.output = Path("runs", _name(data_set, arguments), "demo" * arguments.demo or run)
    accelerator = start_accelerator(arguments.accumulation, arguments.log_with, arguments.output)
    try:
        if arguments.demo:
            results = run_demo(
                accelerator, data_set.read, data_set.write, arguments.seed, arguments.output
            )
            accelerator.print(table(results))
        else:
            _run(accelerator, data_set, arguments)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        if not _TOLD.search(str(error)):
            raise
        _stop(str(error))
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


def _name(data_set: DataSet, arguments: Namespace) -> str:
    if data_set.name is not None:
        return data_set.name
    return "folder" if arguments.data is None else str(arguments.data.resolve().name)


def _stop(message: str) -> NoReturn:
    """Ends the program with a message.

    The status is 0 under accelerate launch, which answers any other with a traceback of its own,
    below the message that is to be read.
    """
    message = message if PartialState().is_main_process else ""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # set by accelerate launch, always
        sys.exit(message or 1)
    print(message, end="\n" * bool(message), file=sys.stderr)
    sys.exit(0)


def _run(accelerator: Accelerator, data_set: DataSet, arguments: Namespace) -> None:
    runs = {method: _settings(arguments, method) for method in arguments.method}
    data = _read(accelerator, data_set, arguments.data, next(iter(runs.values())))
    results: dict[str, Result] = {}
    for method, settings in runs.items():
        accelerator.print(f"{method}: {arguments.output / method}")
        if arguments.log_with:
            _finish_trackers(accelerator)  # those of the run before
            accelerator.init_trackers(f"{_name(data_set, arguments)}-{method}")
        loaders = photograph_loaders(settings, *data)
        results[method] = train_and_test(accelerator, settings, loaders, arguments.output / method)
    if accelerator.is_main_process:
        _report(results, loaders, arguments)


def _finish_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def _read(
    accelerator: Accelerator, data_set: DataSet, folder: Path, settings: Settings
) -> tuple[ImageList, ImageList]:
    """Fetches what is missing and reads the lists, the main process first."""
    told = None
    with accelerator.main_process_first():  # which others wait for, whatever becomes of it
        try:
            if data_set.fetch is not None:
                data_set.fetch(folder)
            return data_set.read(folder, settings)
        except (FileNotFoundError, ConnectionError) as error:
            told = str(error)
    _stop(f"{told}\n\n{data_set.instructions}\nA run that needs no data: --demo")


def _report(results: Mapping[str, Result], loaders: Loaders, arguments: Namespace) -> None:
    counts = len(loaders.train.dataset), len(loaders.validation.dataset)
    print(
        f"\n{arguments.student}, {loaders.classes} classes, {counts[0]} images for training and "
        f"{counts[1]} for validation, seed {arguments.seed}; accuracy in percent\n"
        f"{'method':<14}{'validation':>12}{'test':>8}   student"
    )
    for method, (validation, test) in results.items():
        file = arguments.output / method / "best.safetensors"
        print(f"{method:<14}{validation:>12.1f}{test.percent:>8.1f}   {file}")
    picture = arguments.output / "curves.png"
    draw_curves({method: arguments.output / method for method in results}, picture)
    print(f"of {test.total} test images; curves: {picture}")


def _settings(arguments: Namespace, method: str) -> Settings:
    layers = None
    if arguments.stages or arguments.classifiers:
        layers = Layers(tuple(arguments.stages), arguments.classifiers or ("fc", "fc"))
    given = {k: v for k, v in vars(arguments).items() if k in Settings.__dataclass_fields__}
    weights = {name: float(weight) for name, weight in arguments.weights_of}
    if len(arguments.method) > 1:  # the others' are no mistake
        weights = {name: x for name, x in weights.items() if name in method.split("+")}
    given |= {"method": method, "weights_of": weights, "folder": arguments.data.resolve()}
    return Settings(layers=layers, **given)
