"""Pictures of a distillation: curves, variances, and where on an image the teacher is understood.

Each function returns a matplotlib figure: ``figure.savefig("curves.png")``, or the last line of a
notebook's cell. The background is opaque, in the colour of matplotlib's style, so that text can be
read on a light page and on a dark one. Lines differ in colour, by a palette for the colour-blind
(Okabe and Ito), and in marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import PairDiagnostics
from .distiller import Distiller
from .losses import VIDLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = {
    "explained_variance": "explained variance\n(share)",
    "nats_per_element": "information\n(nats per element)",
    "channels_on_floor": "channels on the floor\n(%)",
}
_BLUE, _RED = "#0072B2", "#D55E00"
_COLORS = (_BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", _RED)
_MARKERS = "os^Dv"  # one less than colours, so that both come together again after thirty lines
_WIDTH = 10.0  # inches


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'vid_loss.plots: expected matplotlib. Run: pip install "vid-loss[plot]"'
        ) from error
    # Not pyplot, which would keep the figure and choose a window system.
    return Figure(figsize=(width, height), layout="constrained")


def plot_diagnostics(history: Mapping[int, Mapping[str, PairDiagnostics]]) -> Figure:
    """Draws explained variance, information and channels on the floor over training.

    Args:
        history: what ``distiller.diagnostics()`` returned, by step.

    Raises:
        ImportError: if matplotlib is missing.
    """
    figure = _figure(_WIDTH, 2.8)
    names = dict.fromkeys(name for report in history.values() for name in report)
    for axes, (field, label) in zip(figure.subplots(1, 3), _CURVES.items(), strict=True):
        # Below, wider lines show at the sides of those that run on top of them.
        for name, width, color, marker in zip(
            names, _widths(len(names)), cycle(_COLORS), cycle(_MARKERS), strict=False
        ):
            steps = [step for step, report in history.items() if name in report]
            values = [_value(history[step][name], field) for step in steps]
            axes.plot(
                steps, values, label=name, color=color, marker=marker, markersize=4, linewidth=width
            )
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_ylim(-2, 102)
    _legend_above(figure)
    return figure


def _widths(count: int) -> list[float]:
    return [1.5 + 2 * (count - 1 - i) / max(count - 1, 1) for i in range(count)]


def _legend_above(figure: Figure) -> None:
    """One legend for all axes, in as many columns as its longest name leaves room for."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, handles), default=0)
    columns = max(1, min(4, int(12 * _WIDTH) // (longest + 8)))  # 12 letters an inch
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
    # The axes keep their height.
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(handles) / columns) + 0.15)


def _value(report: PairDiagnostics, field: str) -> float:
    value: float = getattr(report, field)
    return 100 * value / report.channels if field == "channels_on_floor" else value


def plot_variances(distiller: Distiller) -> Figure:
    """Draws the variances of each pair's q(t|s), one bar per channel, in increasing order.

    They are shares of the teacher's own: where a bar reaches 1, nothing of that channel is
    predicted.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no pair has a VIDLoss.
    """
    losses = distiller.vid_losses()
    if not losses:
        raise ValueError("plot_variances: expected a pair with VIDLoss; got none.")
    figure = _figure(_WIDTH, 2.4 * len(losses))
    rows = figure.subplots(len(losses), squeeze=False)[:, 0]
    for axes, (name, loss) in zip(rows, losses.items(), strict=True):
        _draw_variances(axes, loss)
        axes.set_title(name)
        axes.set_ylabel("variance\n(share of the teacher's)")
    rows[-1].set_xlabel("channels, in the order of their variance")
    _legend_above(figure)
    return figure


def _draw_variances(axes: Axes, loss: VIDLoss) -> None:
    stats = loss.stats()
    var = (loss.variance().detach() if stats is None else stats.var).cpu().sort().values
    floor = loss.running_var.floor
    least = float(var.min())
    axes.axhline(1, color="gray", linestyle=":", label="teacher's feature")
    axes.bar(range(1, len(var) + 1), var.numpy(), width=0.6, color=_BLUE, label="of q(t|s)")
    axes.set_yscale("log")
    # Down to the floor if something is near it; else it would flatten all differences.
    near = least < 10 * floor
    if near:
        axes.axhline(floor, color=_RED, linestyle="--", label="floor")
    axes.set_ylim(bottom=floor / 2 if near else least / 2)
    axes.margins(x=0.01)


def plot_log_likelihood(images: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """Draws where on each image the student knows what the teacher sees.

    Args:
        images: ``(N, C, H, W)`` with one or three channels; brightness is stretched to be seen.
        maps: what :func:`~vid_loss.diagnostics.log_likelihood` returned for them; those that are no
            ``(N, H, W)`` are left out.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no layer has a map.
    """
    maps = {name: x for name, x in maps.items() if x.ndim == 3}
    if not maps:
        raise ValueError("plot_log_likelihood: expected a map (N, H, W); got none.")
    height, width = images.shape[2:]
    row_height = max(1.5 * height / width, 1.0) + 0.4
    figure = _figure(1.5 * max(len(images), 3) + 2, row_height * (len(maps) + 1))
    rows = figure.subplots(len(maps) + 1, len(images), squeeze=False)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    _name_row(rows[0], "image")
    for axes, image in zip(rows[0], images, strict=True):
        axes.imshow(_stretched(image), cmap="gray")
    for row, (name, values) in zip(rows[1:], maps.items(), strict=True):
        # One scale a layer, so that images can be compared; the extremes would hide the rest.
        values = values.float().cpu()
        low, high = torch.quantile(values.flatten(), values.new_tensor([0.02, 0.98])).tolist()
        for axes, value in zip(row, values, strict=True):
            drawn = axes.imshow(value.numpy(), vmin=low, vmax=high, extent=(0, width, height, 0))
        _name_row(row, f"log q(t|s), {name}")
        figure.colorbar(drawn, ax=row, label="nats per\nelement", extend="both")
    return figure


def _name_row(row: Sequence[Axes], name: str) -> None:
    """Writes above all of a row, in two lines if the row is too short for one."""
    if len(name) > 15 * len(row):  # letters
        name = name.replace("->", "\n-> ")
    first = row[0]
    # An empty title keeps the room; a long one would push its neighbour aside.
    first.set_title("\n".join(" " for _ in name.splitlines()), fontsize="medium")
    written = first.annotate(
        name, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points"
    )
    written.set_in_layout(False)


def _stretched(image: Tensor) -> Any:
    image = image.detach().float().cpu().movedim(0, -1)
    image = image - image.min()
    return (image / image.max().clamp(min=1e-8)).numpy()
