"""A table's results as a page and a picture: mean and spread of each cell, the paper's beside."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from paper.lines import read_lines

from .cells import Record
from .results import NAMES, Key, Table, of_cells, read_tables


def main(arguments: Sequence[str]) -> None:
    """Reads JSON lines; writes a page and a picture of each table."""
    parser = argparse.ArgumentParser(prog="tables.py report", description=__doc__)
    parser.add_argument("lines", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--output", type=Path, default=Path("runs/tables"), help="folder")
    options = parser.parse_args(arguments)
    records = [record for file in options.lines for record in read_lines(file)]
    options.output.mkdir(parents=True, exist_ok=True)
    for table in read_tables(records):
        name = f"{table.number}-{table.dataset}"
        (options.output / f"{name}.md").write_text(markdown(table, f"{name}.png"))
        draw(table, options.output / f"{name}.png")
        print(markdown(table, f"{name}.png"))


def markdown(table: Table, picture: str) -> str:
    """Returns the table as a page."""
    columns = [f"{n or 'all'} {_unit(table)}" for n in table.regimes]
    papers = [f"*{table.paper_regimes.get(n, '-')}*" for n in table.regimes]
    rows = [["method", *columns], ["---"] * (1 + len(columns)), ["*the paper's column*", *papers]]
    for method in table.methods:
        rows.append([_name(method), *(_cell(table, (method, n)) for n in table.regimes)])
    lines = [
        f"# Table {table.number}'s form on {table.dataset}",
        "",
        f"Test accuracy in percent, mean ± standard deviation over {_seeds(table)}. In brackets "
        "the paper's figure, from its own data and models: that of its regime of the same rank, "
        "where the data set is another. Of VID's pairs, what part of the teacher's variance "
        "they explain and the nats per element, at the end, averaged over pairs and seeds.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"![accuracy against {_unit(table)}]({picture})",
        "",
        *_notes(table),
    ]
    return "\n".join(lines) + "\n"


def _notes(table: Table) -> list[str]:
    """Returns what the table was made with, a line each."""
    lines = [
        f"- Trained beforehand on {record['dataset']}: {record['student']}, "
        f"{record['test']:.2f} % of its test images."
        for record in table.teachers
    ]
    some = next(iter(table.runs.values()))[0]
    if some["teacher_dataset"] == "imagenet":
        lines.append(f"- Teacher: {some['teacher']} with its ImageNet weights.")
    steps = f"{some['epochs']} x {some['steps_per_epoch'] or 'all images /'} steps"
    students = ", ".join(dict.fromkeys(_students(table)))
    lines.append(f"- Students: {students}, {steps} of {some['batch_size']} images.")
    if counts := sorted({x.get("validation_images", 0) for x in of_cells(table.runs)} - {0}):
        lines.append(f"- Validation images: {', '.join(map(str, counts))}.")
    if table.number == "1b":
        count = some["images_per_class"] or "all"
        lines.append(f"- Images per class, with labels and without: {count}.")
    lines.append(f"- Chosen on validation data: {_choices(table)}.")
    if table.untested:
        names = [f"{_name(method)} at {n or 'all'}" for method, n in table.untested]
        lines.append(f"- Begun, and not tested yet: {', '.join(names)}.")
    revisions = sorted({record["revision"] for record in of_cells(table.runs)})
    commands = sorted({record["command"] for record in of_cells(table.runs)})
    lines.append(f"- Revision {', '.join(revisions)}: `{'`, `'.join(commands)}`")
    return lines


def _students(table: Table) -> list[str]:
    """Returns the student of each row; the finetuned one may be another."""
    return [
        f"{runs[0]['student']}{' (finetuned)' * (method == 'finetuned')}"
        for (method, _), runs in table.runs.items()
    ]


def _cell(table: Table, key: Key) -> str:
    ours = [record["test"] for record in table.runs.get(key, [])]
    text = f"{mean(ours):.2f}" if ours else "-"
    if len(ours) > 1:
        text += f" ± {stdev(ours):.2f}"
    text += f" ({table.paper[key]:.2f})" if key in table.paper else ""
    return text + _transfer(table.runs.get(key, []))


def _transfer(runs: Sequence[Record]) -> str:
    """Returns what VID's diagnostics were, the mean over its pairs and the seeds."""
    found = [{**record.get("transfer", {})} for record in runs]
    texts = []
    for metric, name in (("explained_variance", "explained"), ("nats_per_element", "nats")):
        values = [x for one in found for key, x in one.items() if key.startswith(f"{metric}/")]
        texts += [f"{name} {mean(values):.2f}"] if values else []
    return f"; {', '.join(texts)}" if texts else ""


def _seeds(table: Table) -> str:
    """Returns how many seeds the cells have; of each column, if they differ."""
    columns: dict[str, list[str]] = {}
    for n in table.regimes:
        counts = sorted({len(runs) for (_, column), runs in table.runs.items() if column == n})
        text = f"{' or '.join(map(str, counts))} seeds"
        text += " (unfinished cells included)" * (len(counts) > 1)
        columns.setdefault(text, []).append(str(n or "all"))
    if len(columns) == 1:
        return next(iter(columns))
    return ", ".join(f"{text} at {' and '.join(names)}" for text, names in columns.items())


def _choices(table: Table) -> str:
    texts = []
    for (method, n), runs in table.runs.items():
        if chosen := runs[0]["choice"]:
            choice = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
            texts.append(f"{_name(method)} at {n or 'all'}: {choice}")
    return "; ".join(texts) or "nothing"


def draw(table: Table, path: Path) -> None:
    """Draws accuracy against images per class, a line for each method, with the spread of seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
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
    axes.set_xlabel(_unit(table))
    axes.set_ylabel("test accuracy, percent")
    axes.set_title(f"Table {table.number}'s form on {table.dataset}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def _unit(table: Table) -> str:
    return f"{'labels' if table.number == '1b' else 'images'} per class"


def _name(method: str) -> str:
    return next((name for name in NAMES if name.lower() == method), method)
