"""Command line of ``folder.py``, ``cub.py`` and ``mit67.py``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .methods import TABLE_2

TORCHRUN = "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2"


def name_and_value(text: str) -> tuple[str, str]:
    """Reads NAME=VALUE from the command line."""
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    return left, right


def read_command_line(description: str, folder: Path | None) -> argparse.Namespace:
    """Returns what the command line says; ``output`` is None if it says nothing of it.

    Args:
        description: the first words of the help.
        folder: where the data set is, if ``--data`` is not given; None asks for it.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"With several processes on CPU: {TORCHRUN} {sys.argv[0]} ...",
    )
    _add_data(parser, folder)
    _add_models(parser)
    _add_training(parser)
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.demo:
        parser.error("--data FOLDER is missing: the folder with a folder of pictures per class")
    return arguments


def _add_data(parser: argparse.ArgumentParser, folder: Path | None) -> None:
    add = parser.add_argument
    add("--demo", action="store_true", help="run on digits, without a download; settings are fixed")
    add("--data", type=Path, default=folder, help="folder of the data set")
    add("--images-per-class", type=int, help="all if not given; a fifth is for validation")
    add("--image-size", type=int, default=224)
    add("--cache", type=Path, help="keep what the teacher says there; without augmentation")
    add("--workers", type=int, default=4, help="processes that read images, for each process")


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--method",
        nargs="+",
        default=["student", "mi-i"],
        help=f"some of {', '.join(TABLE_2)}, or other sums of these",
    )
    add("--weights-of", type=name_and_value, nargs="*", default=[], metavar="METHOD=LAMBDA")
    add("--hint", type=int, help="FitNet's stage, counted from 0; the middle one if not given")
    add("--student", default="resnet18", help="resnet18, vgg9, or torchvision's or timm's name")
    add("--student-weights", type=Path, help="what 'finetuned' starts from, if not ImageNet's")
    add("--teacher", default="resnet34", help="torchvision's or timm's name")
    add("--teacher-weights", type=Path, help="a state_dict, instead of the published weights")
    add("--teacher-classes", type=int, default=1000)
    layers = "layers, instead of the paper's, or of what fits in models of other families"
    pair: dict[str, Any] = {"type": name_and_value, "metavar": "STUDENT=TEACHER"}
    add("--stages", **pair, nargs="*", default=[], help=layers)
    add("--classifiers", **pair, help="as --stages; fc=fc if not given")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=100)
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--accumulation", type=int, default=1, help="batches per step")
    add("--lr", type=float, default=0.05)
    add("--weight-decay", type=float, default=5e-4)
    add("--max-grad-norm", type=float)
    add("--log-with", choices=("tensorboard", "wandb"))
    add("--output", type=Path, default=None, help="folder of the runs; named for them if not given")
