"""One cell of the paper's Table 1: a wide residual network taught from few images or labels.

The teacher first, then any method::

    python examples/cifar.py --dataset cifar10 --download --train-teacher
    python examples/cifar.py --dataset cifar10 --method mi --images-per-class 100 --seed 0

The recipe is that of the wide residual networks: SGD with Nesterov momentum, crops and flips, 200
epochs with the learning rate times 0.2 after 60, 120 and 160. ``--epochs`` scales these. An epoch
is as many steps as a pass over *all* images for training would take, however few a student sees:
it sees them more often, and every regime is trained for as long. ``--steps-per-epoch`` changes it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from paper.command_line import name_and_value
from paper.datasets.small_image_loaders import small_image_loaders
from paper.datasets.small_images import FORMATS, SmallImages, read_small_images
from paper.methods import TABLE_1
from paper.program import start_accelerator
from paper.settings import Settings, small_image_settings
from paper.training import train_and_test


def main() -> None:
    """Trains what the command line says, and prints accuracies."""
    arguments = _parse()
    accelerator = start_accelerator()
    try:
        with accelerator.main_process_first():
            data = read_small_images(
                arguments.dataset,
                arguments.data,
                download=arguments.download and accelerator.is_main_process,
            )
        settings = _settings(arguments, data)
        loaders = small_image_loaders(settings, data, accelerator.device)
        result = train_and_test(accelerator, settings, loaders, arguments.output)
    except FileNotFoundError as error:
        sys.exit(str(error))
    accelerator.print(
        f"{settings.method}, {settings.student}, seed {settings.seed}: "
        f"{result.validation:.2f} % of the validation images, "
        f"{result.test.percent:.2f} % of {result.test.total} test images"
    )


def _settings(arguments: argparse.Namespace, data: SmallImages) -> Settings:
    given = {k: v for k, v in vars(arguments).items() if k in Settings.__dataclass_fields__}
    given["weights_of"] = {name: float(weight) for name, weight in arguments.weights_of}
    settings = small_image_settings(data, **given)
    if not arguments.train_teacher:
        return settings
    return replace(settings, method="student", student=settings.teacher, images_per_class=None)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=FORMATS, default="cifar10")
    add("--data", type=Path, default=Path("data"), help="folder of the data set (%(default)s)")
    add("--download", action="store_true", help="fetch the data set into --data first")
    add("--train-teacher", action="store_true", help="train --teacher on all images, by itself")
    add("--teacher", default="wrn-40-2", help="wrn-DEPTH-WIDTH, with -s2 for a stem of stride 2")
    add("--teacher-weights", type=Path, help="if not where --train-teacher leaves them")
    add("--student", default="wrn-16-1")
    add("--method", default="mi", help=f"one of {', '.join(TABLE_1)}, or another sum of these")
    add("--weights-of", type=name_and_value, nargs="*", default=[], metavar="METHOD=LAMBDA")
    add("--temperature", type=float, default=4.0, help="of KD (%(default)s)")
    add("--hint", type=int, help="FitNet's stage, counted from 0; the middle one if not given")
    add("--images-per-class", type=int, help="all if not given")
    add("--labels-per-class", type=int, help="the other images have none (Table 1b)")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=200, help="(%(default)s)")
    add("--steps-per-epoch", type=int, help="those of a pass over all images if not given")
    add("--batch-size", type=int, default=128, help="of all processes together (%(default)s)")
    add("--lr", type=float, default=0.1, help="(%(default)s)")
    add("--output", type=Path, help="folder of the run; named for it if not given")
    arguments = parser.parse_args()
    runs = Path("runs", arguments.dataset)
    teacher = runs / f"{arguments.teacher}-teacher"
    if arguments.teacher_weights is None:
        arguments.teacher_weights = teacher / "best.safetensors"
    if arguments.output is None:
        images = arguments.images_per_class or "all"
        labels = f"-{arguments.labels_per_class}-labels" if arguments.labels_per_class else ""
        run = f"{arguments.student}-{arguments.method}-{images}{labels}-seed{arguments.seed}"
        arguments.output = teacher if arguments.train_teacher else runs / run
    return arguments


if __name__ == "__main__":
    main()
