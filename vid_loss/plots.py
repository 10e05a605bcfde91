"""Pictures of a distillation: curves, variances, and where on an image the teacher is understood.

Each function returns a matplotlib figure: ``figure.savefig("curves.png")``, or the last line of a
notebook's cell. Colours follow matplotlib's style; the background is opaque.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import PairDiagnostics
from .distiller import Distiller

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = {
    "explained_variance": "explained variance (share)",
    "nats_per_element": "information (nats per element)",
    "channels_on_floor": "channels on the floor (%)",
}


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
    figure = _figure(12, 3.6)
    for axes, (field, label) in zip(figure.subplots(1, 3), _CURVES.items(), strict=True):
        for name in dict.fromkeys(name for report in history.values() for name in report):
            steps = [step for step, report in history.items() if name in report]
            values = [_value(history[step][name], field) for step in steps]
            axes.plot(steps, values, marker=".", label=name)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_ylim(-2, 102)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _value(report: PairDiagnostics, field: str) -> float:
    value: float = getattr(report, field)
    return 100 * value / report.channels if field == "channels_on_floor" else value


def plot_variances(distiller: Distiller) -> Figure:
    """Draws each pair's trained variances, one bar a channel, in increasing order.

    The teacher's own variances of the last step lie behind them, if there was one: where a bar
    reaches as high, nothing of that channel is predicted.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no pair has a VIDLoss.
    """
    losses = distiller.vid_losses()
    if not losses:
        raise ValueError("plot_variances: expected a pair with VIDLoss; got none.")
    figure = _figure(12, 2.6 * len(losses))
    rows = figure.subplots(len(losses), squeeze=False)[:, 0]
    for axes, (name, loss) in zip(rows, losses.items(), strict=True):
        var = loss.variance().detach().cpu()
        order = var.argsort()
        places = range(1, len(var) + 1)
        if loss.observation is not None:
            target = loss.observation.target_var().cpu()[order].numpy()
            axes.bar(places, target, width=1.0, color="C7", alpha=0.5, label="teacher's feature")
        axes.bar(places, var[order].numpy(), width=0.4, color="C0", label="trained, of q(t|s)")
        axes.axhline(loss.variance.floor, color="C3", linestyle="--", label="floor")
        axes.set_yscale("log")
        axes.margins(x=0.01)
        axes.set_title(name)
        axes.set_ylabel("variance (feature units²)")
    rows[-1].set_xlabel("channels, in the order of their trained variance")
    labels = rows[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=3)
    return figure


def plot_log_likelihood(images: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """Draws where on each image the student knows what the teacher sees.

    Args:
        images: ``(N, C, H, W)`` with one or three channels; brightness is stretched to be seen.
        maps: what :func:`~vid_loss.likelihood.log_likelihood` returned for them; those that are no
            ``(N, H, W)`` are left out.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no layer has a map.
    """
    maps = {name: x for name, x in maps.items() if x.ndim == 3}
    if not maps:
        raise ValueError("plot_log_likelihood: expected a map (N, H, W); got none.")
    height, width = images.shape[2:]
    figure = _figure(1.5 * len(images) + 2, 1.5 * height / width * (len(maps) + 1) + 0.5)
    rows = figure.subplots(len(maps) + 1, len(images), squeeze=False)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    rows[0, 0].set_ylabel("image")
    for axes, image in zip(rows[0], images, strict=True):
        axes.imshow(_stretched(image), cmap="gray")
    for row, (name, values) in zip(rows[1:], maps.items(), strict=True):
        # One scale a layer, so that images can be compared; the extremes would hide the rest.
        values = values.float().cpu()
        low, high = torch.quantile(values.flatten(), torch.tensor([0.02, 0.98])).tolist()
        for axes, value in zip(row, values, strict=True):
            drawn = axes.imshow(value.numpy(), vmin=low, vmax=high, extent=(0, width, height, 0))
        row[0].set_ylabel(name.replace("->", "\n-> "))
        figure.colorbar(drawn, ax=row, label="log q(t|s)\n(nats per element)", extend="both")
    return figure


def _stretched(image: Tensor) -> Any:
    image = image.detach().float().cpu().movedim(0, -1)
    image = image - image.min()
    return (image / image.max().clamp(min=1e-8)).numpy()
