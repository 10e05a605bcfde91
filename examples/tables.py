"""The paper's tables, on its data sets or on others, as one command.

::

    python examples/tables.py --table 1a --download
    python examples/tables.py --table 1a --preset small --data /usr/share/datasets/fashion-mnist
    python examples/tables.py report runs/tables/*.jsonl --output runs/tables

For every method and regime, the hyper-parameters of ``table_cells.py``'s grid are chosen on the
20 % of the student's images that are held out; then the choice is run with other seeds, and each
of these runs sees the test data once. Any number of workers run the same command against one
``--storage`` and share the work: on one machine, a worker a GPU (``CUDA_VISIBLE_DEVICES``) or a
core (``OMP_NUM_THREADS=1``); on many, with ``--output`` on a folder that all see. A killed
worker's run is taken up again once its lease is over, and what is finished is never done again.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from paper.program import start_accelerator
from paper.tables import report as table_report
from paper.tables.cells import Plan, items_of, plan_of
from paper.tables.estimate import dry_run
from paper.tables.items import Item
from paper.tables.queue import Worker, open_storage
from paper.tables.runs import Runner, check_data_set
from tqdm.auto import tqdm

TABLES = ("1a", "1b", "2a", "2b", "2c", "2d")


def main() -> None:
    """Runs what the command line says."""
    if sys.argv[1:2] == ["report"]:
        table_report.main(sys.argv[2:])
        return
    arguments = _parse()
    plan = _plan(arguments)
    if arguments.dry_run:
        print(dry_run(plan))
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runner = Runner(
        start_accelerator(), arguments.data, arguments.output, download=arguments.download
    )
    if runner.accelerator.num_processes > 1:
        sys.exit(
            "tables.py: expected one process a worker; got several. Start it as often instead."
        )
    try:
        _work(arguments, plan, runner)
    except (FileNotFoundError, ConnectionError) as error:
        sys.exit(str(error))


def _work(arguments: argparse.Namespace, plan: Plan, runner: Runner) -> None:
    """Trains what is needed beforehand, then fills the table's cells."""
    address = arguments.storage or str(arguments.output / "journal.log")
    storage, lines = open_storage(address), arguments.output / f"{plan.table}-{plan.dataset}.jsonl"
    before, cells = items_of(plan)
    others = lines_of_others(lines, plan)
    models = _fill(Worker(storage, before, runner.execute, lease=arguments.lease), lines, others)
    _fill(Worker(storage, cells, runner.execute, lease=arguments.lease), lines, others + models)


def lines_of_others(path: Path, plan: Plan) -> list[dict[str, Any]]:
    """Returns the lines of cells that another command of this table has filled."""
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [
        record
        for record in records
        if not record["pretrained"]
        and (record["method"] not in plan.methods or record["n"] not in plan.regimes)
    ]


def _fill(worker: Worker, lines: Path, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Works until all is done; after every run, the file has a line for each that is complete."""
    total = sum(len(item.search()) + len(item.test_seeds) for item in worker.items)
    with tqdm(total=total, disable=not sys.stderr.isatty()) as bar:

        def finished(item: Item, record: Mapping[str, Any]) -> None:
            records = worker.records()
            write_lines(lines, before + records)
            bar.update(len(records) - bar.n)
            bar.write(f"{len(records)}/{total} {_line(item, record)}", sys.stdout)
            sys.stdout.flush()

        worker.work(finished)
    records = worker.records()
    write_lines(lines, before + records)
    return records


def _line(item: Item, record: Mapping[str, Any]) -> str:
    test = "" if record["test"] is None else f", test {record['test']:.2f} %"
    choice = ", ".join(f"{name} {value:g}" for name, value in record["choice"].items())
    return (
        f"{item.name}: {choice}{', ' * bool(choice)}seed {record['seed']}: validation "
        f"{record['validation']:.2f} %{test} ({record['seconds']:.0f} s)"
    )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.replace(path)


def _plan(arguments: argparse.Namespace) -> Plan:
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
    if arguments.images_per_class is not None:
        plan = replace(plan, images_per_class=arguments.images_per_class)
    if arguments.seeds is not None:
        plan = replace(plan, test_seeds=tuple(range(arguments.seeds)))
    return plan


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=TABLES, required=True)
    add("--dataset", help="another than the paper's")
    add("--data", type=Path, default=Path("data"), help="folder of the data set (%(default)s)")
    add("--download", action="store_true", help="fetch small images that are missing")
    add("--preset", choices=("paper", "small"), default="paper", help="small: for two CPU cores")
    add("--epochs", type=int, help="in place of the recipe's, and the teacher's; schedules scale")
    add("--steps-per-epoch", type=int, help="in place of the recipe's, and the teacher's")
    add("--methods", nargs="+", help="some of the rows")
    add("--regimes", nargs="+", type=int, help="images, in 1b labels, a class: other columns")
    add("--images-per-class", type=int, help="in 1b, with labels and without together")
    add("--seeds", type=int, help="how many, of the runs that are tested")
    add("--storage", help="Optuna's: a database's URL, or a journal's path (in --output)")
    add("--lease", type=float, default=120.0, help="seconds without a sign of life (%(default)s)")
    add("--output", type=Path, default=Path("runs/tables"), help="folder (%(default)s)")
    add("--dry-run", action="store_true", help="print every run and the hours they may take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
