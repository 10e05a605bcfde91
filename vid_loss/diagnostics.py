"""Numbers for people: what was transferred, its part in the gradient, and where on an image."""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._arguments import checked_features
from ._offline import Offline
from .calls import refuse_no_module
from .guards import undisturbed
from .losses.stats import METRICS, PairDiagnostics
from .names import module_key
from .pairs import Pair
from .taps import FeatureTap, Given

if TYPE_CHECKING:
    from .distiller import Distiller

__all__ = ["METRICS", "PairDiagnostics", "gradient_shares", "log_likelihood", "report"]

_BESIDE = ("transformers", "accelerate", "lightning", "timm", "torchvision")


def gradient_shares(losses: Mapping[str, Tensor], student: nn.Module) -> dict[str, float]:
    """Returns each loss's part in the gradient that reaches the student.

    To be called now and then, in the place of ``distiller(images)``; it costs a backward pass a
    loss::

        loss = criterion(student(images), labels)
        gradient_shares({"task": loss, **distiller.weighted_terms(images)}, student)

    Args:
        losses: scalars by name, weighted as they are added up. Their graphs are kept.
        student: the model whose parameters' gradients are compared; no ``grad`` is touched.

    Returns:
        The norm of each loss's gradient, divided by the sum of the norms; all 0 if no gradient
        reaches the student.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> output = student(torch.ones(1, 1)).sum()
        >>> gradient_shares({"task": output, "pair": 3 * output}, student)
        {'task': 0.25, 'pair': 0.75}
    """
    if not isinstance(losses, Mapping):
        raise TypeError(
            "gradient_shares, losses: expected a dict of names to losses; got "
            f"{type(losses).__name__}. For example {{'task': loss, **distiller.weighted_terms(x)}}."
        )
    refuse_no_module("gradient_shares, student", student)
    others = [name for name, x in losses.items() if not isinstance(x, Tensor) or x.numel() != 1]
    if others:
        name, got = others[0], losses[others[0]]
        shape = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise TypeError(
            f"gradient_shares, losses: expected tensors of one number each; got {shape} as "
            f"{name!r}. Give what backward() could be called on: loss, and not loss.item()."
        )
    if losses and not any(loss.requires_grad for loss in losses.values()):
        raise ValueError(
            f"gradient_shares, losses: expected losses with a gradient; got {list(losses)} without "
            "one. distiller.terms has none: take distiller.weighted_terms(...)."
        )
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, loss in losses.items():
        gradients: Sequence[Tensor | None] = []
        if loss.requires_grad and parameters:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        squares = [float(x.double().square().sum()) for x in gradients if x is not None]
        norms[name] = math.sqrt(sum(squares))
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


@torch.no_grad()
def log_likelihood(
    distiller: Distiller,
    *args: Any,
    teacher_features: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Returns log q(t|s) at each position of each VIDLoss pair.

    Student and heads run in eval mode, and are left as they were. A cache is neither read nor
    written: the inputs need not be samples of the data set.

    Args:
        distiller: the pairs.
        *args: positional inputs of the student.
        teacher_features: the teacher's of these inputs, by the layers' names in the pairs; needed
            without a teacher. The teacher is not run then.
        **kwargs: keyword inputs of the student.

    Returns:
        By pair, ``(N, H, W)`` for maps, ``(N, L)`` for tokens (padding included) and ``(N,)`` for
        vectors: nats per element, averaged over channels, without the constant, as in the loss.

    Raises:
        TypeError, ValueError: if the features are not those of the pairs, or are missing.
    """
    losses = distiller.vid_losses()
    pairs = {name: distiller.pairs[name] for name in losses}
    student = distiller.student
    if teacher_features is not None or isinstance(distiller._teacher, Offline):
        teacher_features = _given_features(teacher_features, pairs.values())
    with undisturbed(student, distiller):
        with FeatureTap(student, [x.student for x in pairs.values()], owner="student") as tap:
            student(*args, **kwargs)
            features = tap.collect()
        if teacher_features is None:
            given = Given(args, kwargs)
            distiller._teacher.follow(given, student)
            teacher_features = distiller._teacher.features(given)
        return {
            name: pair.call(
                losses[name].log_likelihood,
                *pair.prepare(features[pair.student], teacher_features[pair.teacher]),
                None,
            )
            for name, pair in pairs.items()
        }


def _given_features(
    features: Mapping[str, Tensor] | None, pairs: Collection[Pair]
) -> Mapping[str, Tensor]:
    if features is None:
        names = ", ".join(f"{name!r}: ..." for name in sorted({pair.teacher for pair in pairs}))
        raise TypeError(
            "log_likelihood, teacher_features: expected those of these inputs, as there is no "
            f"teacher; got none. Call log_likelihood(distiller, ..., teacher_features={{{names}}})."
        )
    return checked_features(features, pairs)


def report(distiller: Distiller | None = None) -> str:
    """Returns what a question about a run is to come with: versions, models, pairs, diagnostics.

    There are no paths, data or weights in it. The host waits for the device here.

    Args:
        distiller: that of the run; None gives the versions alone.

    Returns:
        Lines to be pasted.

    Example:
        >>> print(report())  # doctest: +ELLIPSIS
        vid-loss ..., torch ..., Python ...
    """
    versions = [f"vid-loss {_version('vid-loss')}, torch {torch.__version__}"]
    versions.append(f"Python {platform.python_version()} on {platform.system()}")
    versions += [f"{name} {_version(name)}" for name in _BESIDE if _version(name)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [", ".join(versions), f"GPU: {gpu}"]
    if distiller is None:
        return "\n".join(lines)
    taps = {"student": distiller._tap, "teacher": distiller._teacher.tap}
    for owner, tap in taps.items():
        model = tap.model if isinstance(tap, FeatureTap) else None
        lines.append(f"{owner}: {_described(model) if model else 'its features from elsewhere'}")
    lines.append(f"q: {_described(distiller)}")
    try:
        metrics = distiller.metrics()
    except RuntimeError as error:  # of a teacher that is not finite, which is worth a report
        metrics = {}
        lines.append(f"diagnostics: {error}")
    for name, pair in distiller.pairs.items():
        both = zip((pair.student, pair.teacher), taps.values(), strict=True)
        layers = [f"{layer}{_kind_of(layer, tap)}" for layer, tap in both]
        kind = type(distiller.losses[module_key(name)]).__name__
        lines.append(f"{name}: {' -> '.join(layers)}, {kind}, lambda {distiller.weights[name]:g}")
        values = {key: metrics[f"{key}/{name}"] for key in METRICS if f"{key}/{name}" in metrics}
        if name in distiller.terms:
            values["last term"] = float(distiller.terms[name])
        lines.append("    " + (", ".join(f"{k} {x:.4g}" for k, x in values.items()) or "no step"))
    return "\n".join(lines)


def _kind_of(layer: str, tap: object) -> str:
    if not isinstance(tap, FeatureTap):
        return ""
    return f" ({type(tap.model.get_submodule(tap.specs[layer].name)).__name__})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _described(model: nn.Module) -> str:
    parameters = list(model.parameters())
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in parameters})
    count = sum(p.numel() for p in parameters)
    return f"{type(model).__name__}, {count} parameters, {' and '.join(kinds)}"
