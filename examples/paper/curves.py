"""A picture of some runs of one student: how well it did, and what it learned of the teacher."""

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from .training import HISTORY

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_EXPLAINED = "explained_variance"


def draw_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draws validation accuracy and explained variance over epochs.

    Args:
        runs: the folder of each finished run, by its method.
        path: where the picture goes.
    """
    histories = {method: json.loads((x / HISTORY).read_text()) for method, x in runs.items()}
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, explained = figure.subplots(1, 2)
    colors = cycle(_COLORS)
    for method, epochs in histories.items():
        accuracy.plot([x["validation"] for x in epochs], label=method, color=next(colors))
        for key in (x for x in epochs[0] if _EXPLAINED in x):
            label = f"{method} {key.replace(_EXPLAINED, '').strip('/_ ')}"
            explained.plot([x[key] for x in epochs], label=label, color=next(colors))
    accuracy.set_ylabel("accuracy on validation images (%)")
    explained.set_ylabel("explained variance of the teacher (share)")
    for axes in (accuracy, explained):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
