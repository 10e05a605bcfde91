"""The paper's tables, on its data sets or on others, as one command.

::

    python examples/tables.py --table 1a --download
    python examples/tables.py --table 1a --preset small --data /usr/share/datasets/fashion-mnist
    python examples/tables.py report runs/tables/*.jsonl --output runs/tables

For every method and regime, the hyper-parameters of ``paper/tables/grids.py`` are chosen on the
20 % of the student's images that are held out; then the choice is run with other seeds, and each
of these runs sees the test data once. Any number of workers run the same command with the same
``--output`` and share the work: one per GPU (``CUDA_VISIBLE_DEVICES``) or per core
(``OMP_NUM_THREADS=1``). A killed worker's run is taken up again, from its last epoch, by another
worker or by the same command given again; what is finished is never done again. On many machines
the folder must be on a file system whose ``flock`` holds across them, which was not tried.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from paper.program import start_accelerator
from paper.tables import report
from paper.tables.cells import Cell, Record, Run, cells_of, models_of
from paper.tables.estimate import dry_run
from paper.tables.plans import Plan, plan_of
from paper.tables.runner import Runner, TooFewImagesError, check_data_set
from paper.tables.workers import FinishedRuns, MixedRunsError, left, work
from tqdm.auto import tqdm

TABLES = ("1a", "1b", "2a", "2b", "2c", "2d")
_PRESETS = "small: for two CPU cores; gpu: 2a and 2b on clip art, for one GPU"


def main() -> None:
    """Runs what the command line says."""
    if sys.argv[1:2] == ["report"]:
        report.main(sys.argv[2:])
        return
    arguments = _parse()
    plan = _plan(arguments)
    if arguments.dry_run:
        print(dry_run(plan))
        return
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        sys.exit("tables.py: expected one process; got several. Start it several times instead.")
    runner = Runner(accelerator, arguments.data, arguments.output, download=arguments.download)
    try:
        _fill(plan, runner)
    except (FileNotFoundError, ConnectionError, MixedRunsError, TooFewImagesError) as error:
        sys.exit(str(error))


def _fill(plan: Plan, runner: Runner) -> None:
    """Trains what is needed beforehand, then fills the table's cells."""
    runner.check_regimes(plan)
    path = runner.output / f"{plan.table}-{plan.dataset}.jsonl"
    finished = FinishedRuns(path, runner.made_with(plan))
    if notice := finished.others("revision", runner.origin["revision"]):
        print(notice, file=sys.stderr)
    for cells in (models_of(plan), cells_of(plan)):
        total = sum(len(cell.searches()) + len(cell.tests({})) for cell in cells)
        with tqdm(total=total, disable=not sys.stderr.isatty()) as bar:

            def done(run: Run, record: Record, cells: list[Cell] = cells, bar: tqdm = bar) -> None:
                count = bar.total - _left(cells, finished)
                bar.update(count - bar.n)
                bar.write(f"{count}/{bar.total} {_line(run, record)}", sys.stdout)
                sys.stdout.flush()

            work(cells, finished, runner.output / "locks", runner.execute, done)


def _left(cells: list[Cell], finished: FinishedRuns) -> int:
    """Counts the runs that are left, those included whose choice is not known yet."""
    records = finished.by_name()
    unknown = [cell for cell in cells if cell.chosen(records) is None]
    return len(left(cells, records)) + sum(len(cell.tests({})) for cell in unknown)


def _line(run: Run, record: Record) -> str:
    test = "" if record["test"] is None else f", test {record['test']:.2f} %"
    return f"{run.name}: validation {record['validation']:.2f} %{test} ({record['seconds']:.0f} s)"


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.table == "1b" and None in (arguments.regimes or ()):
        sys.exit("--regimes: expected numbers of labels in table 1b; got all. Choose table 1a.")
    if arguments.dataset is not None:
        check_data_set(arguments.dataset, arguments.table, arguments.preset)
    plan = plan_of(arguments.table, arguments.preset, arguments.dataset)
    given = {"epochs": arguments.epochs, "steps_per_epoch": arguments.steps_per_epoch}
    recipe = {name: value for name, value in given.items() if value is not None}
    plan = replace(
        plan,
        recipe={**plan.recipe, **recipe},
        teacher_recipe={**plan.teacher_recipe, **recipe},
        methods=tuple(arguments.methods or plan.methods),
        regimes=tuple(arguments.regimes or plan.regimes),
    )
    if arguments.student is not None:
        plan = replace(plan, student=arguments.student)
    if arguments.images_per_class is not None:
        plan = replace(plan, images_per_class=arguments.images_per_class)
    if arguments.seeds is not None:
        plan = replace(plan, test_seeds=tuple(range(arguments.seeds)))
    return plan


def _regime(text: str) -> int | None:
    return None if text == "all" else int(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=TABLES, required=True)
    add("--dataset", help="another than the paper's")
    add("--data", type=Path, default=Path("data"), help="folder of the data set (%(default)s)")
    add("--download", action="store_true", help="fetch small images that are missing")
    add("--preset", choices=("paper", "small", "gpu"), default="paper", help=_PRESETS)
    add("--student", help="another than the table's; in a folder (--output) of its own")
    add("--epochs", type=int, help="in place of the recipe's, and the teacher's; schedules scale")
    add("--steps-per-epoch", type=int, help="in place of the recipe's, and the teacher's")
    add("--methods", nargs="+", help="some of the rows")
    add("--regimes", nargs="+", type=_regime, help="images, in 1b labels, per class, or 'all'")
    add("--images-per-class", type=int, help="in 1b, with labels and without together")
    add("--seeds", type=int, help="how many, of the runs that are tested")
    add("--output", type=Path, default=Path("runs/tables"), help="folder (%(default)s)")
    add("--dry-run", action="store_true", help="print every run and the hours they may take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
