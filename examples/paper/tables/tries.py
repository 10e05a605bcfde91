"""What moves Table 2a's form on clip art: one thing at a time is changed.

    cd examples
    python -m paper.tables.tries --data FOLDER  # and the same line again for more workers
    python -m paper.tables.tries --data FOLDER --preset small  # for two CPU cores
    python -m paper.tables.tries report runs/tries/tries.jsonl

Of five pictures per class, a student alone, one finetuned, and three transfers. All accuracies are
of validation pictures, by which nothing is chosen here but a run's epoch: the test pictures are not
read. A line per run; workers with one ``--output`` share what is left.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paper.methods import Layers
from paper.program import start_accelerator

from .cells import Cell, Record, Run
from .grids import Choice
from .plans import plan_of
from .runner import Runner
from .tries_report import AS_IT_IS
from .tries_report import main as report
from .workers import FinishedRuns, work

_N = 5
# The middle of each grid, and what the earlier form at 64 x 64 had chosen.
_CHOICES: dict[str, Choice] = {
    "student": {},
    "finetuned": {"lr": 0.01},
    "fitnet": {"fitnet": 1.0, "hint": 1},
    "mi-i": {"mi-i": 30.0},
    "mi-l+mi-i": {"mi-l": 3.0, "mi-i": 10.0},
}
_STAGES = (
    ("layer1", "blocks.1"),
    ("layer2", "blocks.2"),
    ("layer3", "blocks.4"),
    ("layer4", "blocks.6"),
)
_CLASSIFIERS = ("fc", "classifier")
_POOLED = ("fc:input", "classifier:input")  # the last feature, averaged over positions


@dataclass(frozen=True)
class Variant:
    """What is changed, and for which methods.

    Args:
        recipe: fields of the runs' Settings.
        dataset: the pictures' size; None is the table's.
        choices: in place of the table's middle ones; the methods that are tried.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    choices: Mapping[str, Choice] = field(default_factory=lambda: _CHOICES)


def _mi_i(weight: float, layers: Sequence[tuple[str, str]] | None = None) -> Variant:
    recipe = {} if layers is None else {"layers": Layers(tuple(layers), _CLASSIFIERS)}
    return Variant(recipe, choices={"mi-i": {"mi-i": weight}})


# From what says most to what may be left out.
VARIANTS: dict[str, Variant] = {
    AS_IT_IS: Variant(),
    "64px": Variant(dataset="openclipart"),
    "96px": Variant(dataset="openclipart-96"),
    "stronger-augmentation": Variant({"augmentation": "cuts"}),
    **{f"lambda-{weight}": _mi_i(weight) for weight in (3, 10, 100, 300)},
    "without-last-stage": _mi_i(30, _STAGES[:3]),
    "last-two-stages": _mi_i(30, _STAGES[2:]),
    "last-stage": _mi_i(30, _STAGES[3:]),
    "last-feature-too": _mi_i(30, (*_STAGES, _POOLED)),
    "last-feature-alone": _mi_i(30, (_POOLED,)),
    "500-steps": Variant({"steps_per_epoch": 50}),
    "cosine": Variant({"schedule": "cosine"}),
    "2000-steps": Variant({"steps_per_epoch": 200}),
}


@dataclass(frozen=True)
class Try(Cell):
    """A method with a variant: it has runs that choose, and chooses nothing.

    Args:
        variant: its name.
        choice: the hyper-parameters.
    """

    variant: str = ""
    choice: Choice = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the cell: one that no other has."""
        return f"{self.variant}-{self.method}"

    def wanted(self, finished: Mapping[str, Record]) -> list[Run]:
        """Returns the runs, of the seeds that choose in a table."""
        return [Run(self, "search", seed, self.choice) for seed in self.plan.search_seeds]


def tries(
    names: Sequence[str],
    seeds: Sequence[int],
    recipe: Mapping[str, Any],
    preset: str = "gpu",
    methods: Sequence[str] = tuple(_CHOICES),
) -> list[Try]:
    """Returns the cells of variants.

    Args:
        names: of the variants.
        seeds: of the runs.
        recipe: fields of Settings, in place of the table's and of the variants'.
        preset: of the table, ``gpu`` or ``small``.
        methods: those that are tried.
    """
    dataset = "openclipart" if preset == "small" else None
    base = replace(plan_of("2a", preset, dataset), search_seeds=tuple(seeds))
    cells = []
    for name in names:
        variant = VARIANTS[name]
        changed = {**base.recipe, **variant.recipe, **recipe}
        plan = replace(base, recipe=changed, dataset=variant.dataset or base.dataset)
        cells += [
            Try(plan, method, _N, variant=name, choice=choice)
            for method, choice in variant.choices.items()
            if method in methods
        ]
    return cells


def main(arguments: Sequence[str]) -> None:
    """Makes the runs that are left, or reports."""
    if arguments[:1] == ["report"]:
        report(arguments[1:])
        return
    options = _parse(arguments)
    given = {"epochs": options.epochs, "steps_per_epoch": options.steps_per_epoch}
    recipe = {name: value for name, value in given.items() if value is not None}
    runner = Runner(start_accelerator(), options.data, options.output)

    def execute(run: Run) -> Record:
        assert isinstance(run.cell, Try)
        return {"variant": run.cell.variant, **runner.execute(run)}

    work(
        tries(options.variants, options.seeds, recipe, options.preset, options.methods),
        FinishedRuns(options.output / "tries.jsonl", {}),
        options.output / "locks",
        execute,
        lambda run, record: print(f"{run.name}: {record['validation']:.2f} %", flush=True),
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paper.tables.tries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of the clip art (%(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME")
    add("--preset", choices=("gpu", "small"), default="gpu", help="of the table (%(default)s)")
    add("--methods", nargs="+", choices=_CHOICES, default=[*_CHOICES], metavar="NAME")
    add("--seeds", type=int, nargs="+", default=[100, 101])
    add("--epochs", type=int, help="in place of every variant's")
    add("--steps-per-epoch", type=int, help="in place of every variant's")
    add("--output", type=Path, default=Path("runs/tries"), help="folder (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
