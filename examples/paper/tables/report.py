"""The report: mean and spread of each cell, and the paper's figure beside it."""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PAPER = Path(__file__).with_name("published.csv")
# As the paper spells them, in its order.
NAMES = ("Student", "Finetuned", "KD", "LwF", "FitNet", "AT", "MI", "MI-L", "MI-I")
NAMES += ("KD+AT", "KD+MI", "LwF+FitNet", "MI-L+MI-I")
_ROLES = ("teacher", "student")  # whose weights are trained beforehand: 'finetuned' is a student
Key = tuple[str, int | None]  # method, and images or labels a class; None is all


@dataclass(frozen=True)
class Table:
    """A table of results.

    Args:
        number: the paper's table that it has the form of.
        dataset: the students'.
        runs: of each cell, the records of its tested runs.
        teachers: the records of what was trained beforehand.
        paper: of each cell, the paper's figure that is to be beside it, in percent.
        paper_regimes: for each regime, the paper's, as text.
    """

    number: str
    dataset: str
    runs: Mapping[Key, Sequence[Mapping[str, Any]]]
    teachers: Sequence[Mapping[str, Any]]
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


def main(arguments: Sequence[str]) -> None:
    """Reads JSON lines; writes a page and a picture of each table."""
    parser = argparse.ArgumentParser(prog="tables.py report", description=__doc__)
    parser.add_argument("lines", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--output", type=Path, default=Path("runs/tables"), help="folder")
    options = parser.parse_args(arguments)
    records = [json.loads(line) for file in options.lines for line in file.read_text().splitlines()]
    options.output.mkdir(parents=True, exist_ok=True)
    for table in read_tables(records):
        name = f"{table.number}-{table.dataset}"
        (options.output / f"{name}.md").write_text(markdown(table, f"{name}.png"))
        draw(table, options.output / f"{name}.png")
        print(markdown(table, f"{name}.png"))


def read_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Sorts records into tables.

    Raises:
        ValueError: if one cell has runs of different recipes.
    """
    tables = []
    tested = [r for r in records if r["stage"] == "test" and not r["pretrained"]]
    for number, dataset in sorted({(r["table"], r["dataset"]) for r in tested}):
        runs: dict[Key, list[Mapping[str, Any]]] = {}
        for record in tested:
            if (record["table"], record["dataset"]) == (number, dataset):
                runs.setdefault((record["method"], record["n"]), []).append(record)
        models = {(r["teacher_dataset"], r[role]) for r in of_cells(runs) for role in _ROLES}
        teachers = {
            (r["dataset"], r["student"]): r
            for r in records
            if r["pretrained"] and (r["dataset"], r["student"]) in models
        }
        _check(runs)
        paper, regimes = _paper(number, dataset, {n for _, n in runs})
        tables.append(Table(number, dataset, runs, list(teachers.values()), paper, regimes))
    return tables


def of_cells(runs: Mapping[Key, Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Returns the records of all cells."""
    return [record for of_cell in runs.values() for record in of_cell]


def _check(runs: Mapping[Key, Sequence[Mapping[str, Any]]]) -> None:
    fields = ("student", "teacher", "epochs", "steps_per_epoch", "batch_size", "lr")
    fields += ("images_per_class",)
    for (method, n), of_cell in runs.items():
        recipes = {tuple(record[name] for name in fields) for record in of_cell}
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


def markdown(table: Table, picture: str) -> str:
    """Returns the table as a page."""
    unit = "labels" if table.number == "1b" else "images"
    some = next(iter(table.runs.values()))[0]
    lines = [
        f"# Table {table.number}'s form on {table.dataset}",
        "",
        f"Test accuracy in percent, mean ± standard deviation over {_seeds(table)}. In brackets "
        "the paper's figure, from its own data and models: that of its regime of the same rank, "
        "where the data set is another.",
        "",
        "| method | " + " | ".join(f"{n or 'all'} {unit} a class" for n in table.regimes) + " |",
        "|---|" + "---|" * len(table.regimes),
        "| *the paper's column* | "
        + " | ".join(f"*{table.paper_regimes.get(n, '-')}*" for n in table.regimes)
        + " |",
    ]
    for method in table.methods:
        cells = [_cell(table, (method, n)) for n in table.regimes]
        lines.append(f"| {_name(method)} | " + " | ".join(cells) + " |")
    lines += ["", f"![accuracy against {unit} a class]({picture})", ""]
    for record in table.teachers:
        lines.append(
            f"- Trained beforehand on {record['dataset']}: {record['student']}, "
            f"{record['test']:.2f} % of its test images."
        )
    steps = f"{some['epochs']} x {some['steps_per_epoch'] or 'all images /'} steps"
    lines.append(f"- Students: {some['student']}, {steps} of {some['batch_size']} images.")
    if table.number == "1b":
        lines.append(f"- Images a class, with and without: {some['images_per_class'] or 'all'}.")
    lines.append(f"- Chosen on validation data: {_choices(table)}.")
    revisions = sorted({record["revision"] for record in of_cells(table.runs)})
    commands = sorted({record["command"] for record in of_cells(table.runs)})
    lines.append(f"- Revision {', '.join(revisions)}: `{'`, `'.join(commands)}`")
    return "\n".join(lines) + "\n"


def _cell(table: Table, key: Key) -> str:
    ours = [record["test"] for record in table.runs.get(key, [])]
    text = f"{mean(ours):.2f}" if ours else "-"
    if len(ours) > 1:
        text += f" ± {stdev(ours):.2f}"
    return f"{text} ({table.paper[key]:.2f})" if key in table.paper else text


def _seeds(table: Table) -> str:
    counts = sorted({len(runs) for runs in table.runs.values()})
    return (
        " or ".join(map(str, counts)) + " seeds" + ", unfinished cells included" * (len(counts) > 1)
    )


def _choices(table: Table) -> str:
    texts = []
    for (method, n), runs in table.runs.items():
        if chosen := runs[0]["choice"]:
            choice = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
            texts.append(f"{_name(method)} at {n or 'all'}: {choice}")
    return "; ".join(texts) or "nothing"


def draw(table: Table, path: Path) -> None:
    """Draws accuracy against images a class, a line a method, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for index, method in enumerate(table.methods):
        regimes = [n for n in table.regimes if (method, n) in table.runs]
        tests = [[record["test"] for record in table.runs[method, n]] for n in regimes]
        shift = 0.02 * (index - len(table.methods) / 2)  # error bars beside each other
        axes.errorbar(
            [table.regimes.index(n) + shift for n in regimes],
            [mean(values) for values in tests],
            [stdev(values) if len(values) > 1 else 0 for values in tests],
            label=_name(method),
            marker="osD^vP*Xdph<>"[index % 13],
            linestyle="-" if "mi" in method else "--",
            capsize=3,
        )
    axes.set_xticks(range(len(table.regimes)), [str(n or "all") for n in table.regimes])
    axes.set_xlabel(("labels" if table.number == "1b" else "images") + " a class")
    axes.set_ylabel("test accuracy, percent")
    axes.set_title(f"Table {table.number}'s form on {table.dataset}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _name(method: str) -> str:
    return next((name for name in NAMES if name.lower() == method), method)


def _order(n: int | None) -> float:
    return float("inf") if n is None else n
