"""Records of finished runs, sorted into tables with the paper's figures."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cells import Record

PAPER = Path(__file__).with_name("published.csv")
# As the paper spells them, in its order.
NAMES = ("Student", "Finetuned", "KD", "LwF", "FitNet", "AT", "MI", "MI-L", "MI-I")
NAMES += ("KD+AT", "KD+MI", "LwF+FitNet", "MI-L+MI-I")
_ROLES = ("teacher", "student")  # whose weights are trained beforehand: 'finetuned' is a student
Key = tuple[str, int | None]  # method, and images or labels per class; None is all


@dataclass(frozen=True)
class Table:
    """A table of results.

    Args:
        number: the paper's table that it has the form of.
        dataset: the students'.
        runs: of each cell, the records of its tested runs.
        untested: the cells that have runs which choose, and none that is tested.
        teachers: the records of what was trained beforehand; on two machines, one of each.
        paper: of each cell, the paper's figure that is to be beside it, in percent.
        paper_regimes: for each regime, the paper's, as text.
    """

    number: str
    dataset: str
    runs: Mapping[Key, Sequence[Record]]
    untested: Sequence[Key]
    teachers: Sequence[Record]
    paper: Mapping[Key, float]
    paper_regimes: Mapping[int | None, str]

    @property
    def methods(self) -> list[str]:
        """The rows, in the paper's order."""
        found = {method for method, _ in self.runs}
        return [x.lower() for x in NAMES if x.lower() in found] + sorted(
            found - {x.lower() for x in NAMES}
        )

    @property
    def regimes(self) -> list[int | None]:
        """The columns, from few to all."""
        return sorted({n for _, n in self.runs}, key=_order)


def read_tables(records: Sequence[Record]) -> list[Table]:
    """Sorts records into tables.

    Raises:
        ValueError: if one cell has runs of different recipes.
    """
    tables = []
    tested = [r for r in records if r["stage"] == "test" and not r["pretrained"]]
    for number, dataset in sorted({(r["table"], r["dataset"]) for r in tested}):
        runs: dict[Key, list[Record]] = {}
        for record in tested:
            if (record["table"], record["dataset"]) == (number, dataset):
                runs.setdefault((record["method"], record["n"]), []).append(record)
        models = {(r["teacher_dataset"], r[role]) for r in of_cells(runs) for role in _ROLES}
        teachers = {
            (r["dataset"], r["student"], r["test"]): r
            for r in records
            if r["pretrained"] and (r["dataset"], r["student"]) in models
        }
        _check(runs)
        paper, regimes = _paper(number, dataset, {n for _, n in runs})
        untested = _untested(records, number, dataset, runs)
        trained = list(teachers.values())
        tables.append(Table(number, dataset, runs, untested, trained, paper, regimes))
    return tables


def _untested(
    records: Sequence[Record], number: str, dataset: str, runs: Mapping[Key, Sequence[Record]]
) -> list[Key]:
    of_table = [r for r in records if (r["table"], r["dataset"]) == (number, dataset)]
    begun = dict.fromkeys((r["method"], r["n"]) for r in of_table if not r["pretrained"])
    return [key for key in begun if key not in runs]


def of_cells(runs: Mapping[Key, Sequence[Record]]) -> list[Record]:
    """Returns the records of all cells."""
    return [record for of_cell in runs.values() for record in of_cell]


def _check(runs: Mapping[Key, Sequence[Record]]) -> None:
    fields = ("student", "teacher", "epochs", "steps_per_epoch", "batch_size", "lr")
    fields += ("images_per_class", "held_out_images", "data")
    for (method, n), of_cell in runs.items():
        recipes = {tuple(record.get(name) for name in fields) for record in of_cell}
        seeds = [record["seed"] for record in of_cell]
        if len(recipes) > 1 or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"Report, {method} with {n or 'all'}: expected runs of one recipe, a seed each; "
                f"got {len(recipes)} recipes and the seeds {sorted(seeds)}. Name the files of one "
                "table at a time."
            )


def _paper(
    number: str, dataset: str, regimes: set[int | None]
) -> tuple[dict[Key, float], dict[int | None, str]]:
    """Returns the paper's figures for a table's regimes, on another data set those of equal rank.

    The rank counts from the fewest images.
    """
    with PAPER.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == number]
    texts: dict[int | None, str] = {}
    for row in rows:
        text = row["n_per_class"]
        texts.setdefault(None if text.startswith("full") else int(text), text)
    theirs = sorted(texts, key=_order)
    if dataset == rows[0]["dataset"]:
        match = {n: n for n in regimes if n in texts}
    else:
        match = dict(zip(sorted(regimes, key=_order), theirs, strict=False))
    figures = {(r["method"].lower(), r["n_per_class"]): float(r["accuracy_percent"]) for r in rows}
    paper = {
        (method, n): figure
        for (method, text), figure in figures.items()
        for n, their_n in match.items()
        if texts[their_n] == text
    }
    source = {"cifar10": "CIFAR-10", "mit67": "MIT-67", "cub200": "CUB-200"}[rows[0]["dataset"]]
    return paper, {n: f"{source}, {texts[their_n]}" for n, their_n in match.items()}


def _order(n: int | None) -> float:
    return float("inf") if n is None else n
