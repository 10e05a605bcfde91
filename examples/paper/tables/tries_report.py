"""Tries as a page's table: a line per variant, a column per method."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from paper.lines import read_lines

from .cells import Record
from .results import NAMES

AS_IT_IS = "as-it-is"  # the variant without a change
_RIVALS = ("finetuned", "fitnet")  # whom MI-I is to be ahead of where pictures are few


def main(arguments: Sequence[str]) -> None:
    """Prints the table of a file of JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m paper.tables.tries report")
    parser.add_argument("lines", type=Path, help="file of JSON lines")
    print(markdown(read_lines(parser.parse_args(arguments).lines)))


def markdown(records: Sequence[Record]) -> str:
    """Returns validation accuracy in percent: mean, standard deviation and number of seeds.

    Beside it what MI-I's pairs explain of the teacher's variance, and how far MI-I is ahead: mean
    and standard error of the differences per seed, whose pictures are the same. Where a variant
    changes MI-I alone, the others are those of the variant without a change.
    """
    variants = dict.fromkeys(record["variant"] for record in records)
    found = {record["method"] for record in records}
    methods = [name.lower() for name in NAMES if name.lower() in found]
    names = [name for name in NAMES if name.lower() in found]
    rivals = [f"MI-I over {name}" for name in _RIVALS]
    rows = [["variant", *names, "MI-I explains", *rivals]]
    rows.append(["---"] * len(rows[0]))
    for variant in variants:
        of = {x: _of(records, variant, x) for x in (*methods, "mi-i")}
        rows.append([variant, *(_accuracy(of[x]) for x in methods), _explained(of["mi-i"])])
        others = [of.get(x) or _of(records, AS_IT_IS, x) for x in _RIVALS]
        rows[-1] += [_ahead(of["mi-i"], runs) for runs in others]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of(records: Sequence[Record], variant: str, method: str) -> dict[int, Record]:
    chosen = [x for x in records if (x["variant"], x["method"]) == (variant, method)]
    return {record["seed"]: record for record in chosen}


def _accuracy(runs: dict[int, Record]) -> str:
    if not runs:
        return "-"
    found = [record["validation"] for record in runs.values()]
    spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
    return f"{mean(found):.1f}{spread} ({len(found)})"


def _explained(runs: dict[int, Record]) -> str:
    found = [
        value
        for record in runs.values()
        for name, value in record["transfer"].items()
        if name.startswith("explained_variance/")
    ]
    return f"{mean(found):.2f}" if found else "-"


def _ahead(runs: dict[int, Record], others: dict[int, Record]) -> str:
    both = sorted(runs.keys() & others.keys())
    found = [runs[seed]["validation"] - others[seed]["validation"] for seed in both]
    if not found:
        return "-"
    error = f" ± {stdev(found) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
    return f"{mean(found):+.1f}{error}"
