"""The table of q_fit: versions of the library side by side."""

import json
import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]
Cell = tuple[str, str, str]  # task, setting, heads
Cells = dict[Cell, dict[str, list[Record]]]  # and by version

_METRICS: dict[str, Callable[[Record], float]] = {
    "explained variance": lambda record: mean(record["explained_variance"]["end"].values()),
    "nats": lambda record: mean(record["nats"]["end"].values()),
    "least nats from step 50": lambda record: min(record["least_nats"].values(), key=_nan_first),
    "accuracy": lambda record: record["accuracy"],
}
_KIND = ("task", "setting", "lambda", "options", "views")
_OF_BEST = "explained variance / best head rate's"
_CAPTION = """\
Validation data; mean ± standard deviation over the seeds. Explained variance and nats per element
are means of the last 10 steps and of the pairs; the least nats are those of the worst pair in the
worst step, from step 50 on. They are what each version's own diagnostics say: 0.1.0's of one batch,
with explained variance weighted by the channels' variances; later ones' of the last batches, with
all channels equal. Made by `python -m paper.q_fit run` in `examples/`, with `--head-lr`, `--lambda`
and `--option` where the column 'heads' names them."""


def table(records: Sequence[Record]) -> str:
    """Formats mean and standard deviation over the seeds as a Markdown page.

    Of each version, the revision that comes last counts.

    Args:
        records: the lines.
    """
    last = {record["version"]: record["revision"] for record in records}
    cells: Cells = {}
    for record in records:
        if record["revision"] == last[record["version"]]:
            cell = (record["task"], record["setting"], _heads(record))
            cells.setdefault(cell, {}).setdefault(record["version"], []).append(record)
    swept = {version for version in last if _is_swept(cells, version)}
    columns = [(metric, version) for metric in _METRICS for version in last]
    columns += [(_OF_BEST, version) for version in last if version in swept]
    header = ["task", "setting", "heads", "seeds", *(f"{m}, {v}" for m, v in columns)]
    lines = [_line(header), _line(["---"] * len(header))]
    for cell, of_version in sorted(cells.items()):
        seeds = " / ".join(str(len(of_version.get(version, ()))) for version in last)
        values = [_value(metric, version, cell, cells) for metric, version in columns]
        lines.append(_line([*cell, seeds, *values]))
    revisions = "; ".join(f"{version}: {revision}" for version, revision in last.items())
    title = "# How well q(t|s) is fitted"
    return "\n".join(
        [title, "", *lines, "", _CAPTION, "", f"Revisions of the library: {revisions}."]
    )


def _value(metric: str, version: str, cell: Cell, cells: Cells) -> str:
    records = cells[cell].get(version)
    if not records:
        return "-"
    if metric == _OF_BEST:
        rivals = [
            of_version[version]
            for of_version in cells.values()
            if version in of_version and _same_but_rate(of_version[version][0], records[0])
        ]
        best = max(_mean("explained variance", rival) for rival in rivals)
        return f"{_mean('explained variance', records) / best:.2f}"
    values = [_METRICS[metric](record) for record in records]
    digits = 1 if metric == "accuracy" else 2
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _mean(metric: str, records: Sequence[Record]) -> float:
    return mean(_METRICS[metric](record) for record in records)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _heads(record: Record) -> str:
    lr = record["head_lr"]
    rate = "default" if lr is None else f"rate {lr:g}" if isinstance(lr, float) else f"{lr}'s rate"
    weight = [] if record["lambda"] is None else [f"lambda {record['lambda']:g}"]
    views = [f"views {record['views']}"] if record.get("views") else []
    return ", ".join(
        [rate, *weight, *views, *(f"{k}={v}" for k, v in sorted(record["options"].items()))]
    )


def _same_but_rate(one: Record, other: Record) -> bool:
    return all(one.get(key) == other.get(key) for key in _KIND)


def _is_swept(cells: Cells, version: str) -> bool:
    firsts = [of_version[version][0] for of_version in cells.values() if version in of_version]
    kinds = {json.dumps([x.get(key) for key in _KIND], sort_keys=True) for x in firsts}
    return len(firsts) > len(kinds)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
