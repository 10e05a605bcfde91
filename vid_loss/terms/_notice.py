"""Warnings, once, that a transfer has no effect, with the reason that can be seen."""

import gc
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vid_loss.guards import is_captured
from vid_loss.losses import VIDLoss
from vid_loss.pairs import Pair

AT_CALL = 300
_INERT = 0.05  # explained variance below which next to nothing is transferred
_WORSE = -0.5  # explained variance of heads that have run away, and not only begun to learn
_CONTRADICTED = 1.0  # nats by which a variance may be away from its residuals
_LOW_RATE = 1e-3  # below it, Adam moves a head by less than its own size in hundreds of steps

_FROZEN = (
    "Distiller: expected student features that come from weights with requires_grad; got frozen "
    "ones for {}, so that the heads alone learn there. Pair a layer behind the first that is "
    "trained, or, unless that comes later, student.requires_grad_(True)."
)


class Notice:
    """Looks whether anything can reach the student, and after hundreds of steps whether it does.

    Not before: a schedule may warm up. The numbers are sent to the host at one step and looked at
    when they have arrived, so that no step waits for a GPU.

    Attributes:
        calls: how many training steps there have been.
        is_open: whether it has not looked yet.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.calls = 0
        self._sent: _Sent | None = None

    def first(
        self,
        pairs: Mapping[str, Pair],
        features: Mapping[str, Tensor],
        weights: Mapping[str, float],
    ) -> None:
        """Called in the first step: a feature without a gradient takes none to the student.

        Args:
            pairs: by name.
            features: the student's, by layer.
            weights: of the pairs.
        """
        cut = [x for x, pair in pairs.items() if weights[x] and not _is_trained(features, pair)]
        if cut:
            warnings.warn(_FROZEN.format(", ".join(cut)), stacklevel=5)

    def look(self, losses: Mapping[str, VIDLoss], weights: Mapping[str, float]) -> None:
        """Called from step ``AT_CALL`` on, for as long as it is open.

        A CUDA graph that is being made neither sends nor waits.

        Args:
            losses: those with a q(t|s), by pair.
            weights: of the pairs.
        """
        if any(is_captured(loss.scale.mean) for loss in losses.values()):
            return
        if self._sent is None:
            figures = {name: _figures(x) for name, x in losses.items() if weights[name]}
            self.is_open = bool(figures)
            if not figures:
                return
            first, *_ = figures.values()  # a model may be split over several devices
            values = [x.to(first.device, first.dtype) for x in figures.values()]
            self._sent = _Sent(list(figures), torch.stack(values))
        if self._sent.has_arrived():
            self.is_open = False
            explained, off = self._sent.values.unbind(1)
            found = dict(zip(self._sent.names, explained.tolist(), strict=True))
            if all(value < _INERT for value in found.values()):
                warnings.warn(_inert(found, losses.values()), stacklevel=5)
            elif far := [x for x, nats in zip(found, off, strict=True) if nats > _CONTRADICTED]:
                warnings.warn(_contradiction(far), stacklevel=5)


class _Sent:
    """Figures of some pairs, on their way to the host."""

    def __init__(self, names: list[str], values: Tensor) -> None:
        self.names = names
        self.values = values
        self._event: Any = None
        if values.is_cuda:
            self.values = torch.empty_like(values, device="cpu", pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._event.record()

    def has_arrived(self) -> bool:
        return self._event is None or bool(self._event.query())


def _is_trained(features: Mapping[str, Tensor], pair: Pair) -> bool:
    return features[pair.student].requires_grad


def _figures(loss: VIDLoss) -> Tensor:
    """Returns explained variance, and how far variances are from their residuals, ``(2,)``."""
    stats = loss.stats()
    if stats is None:
        return loss.scale.mean.new_zeros(2)
    alive = stats.alive.to(stats.var)
    count = alive.sum().clamp(min=1)
    explained = 1 - (stats.mean_square * alive).sum() / count
    off = 0.5 * ((stats.var / stats.mean_square).log().abs() * alive).sum() / count
    return torch.stack([explained, off])


def _contradiction(names: list[str]) -> str:
    return (
        f"Distiller: expected variances near the heads' squared residuals after {AT_CALL} steps; "
        f"got trained ones that are far from them in {', '.join(names)}, so that lambda is not "
        'what it says. Use VIDLoss\'s default, variance="running", or start them nearer: init_var=.'
    )


def _inert(found: Mapping[str, float], heads: Iterable[nn.Module]) -> str:
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    start = (
        f"Distiller: expected the heads to explain some of the teacher's variance after {AT_CALL} "
        f"steps; got {figures}, so next to nothing is transferred. "
    )
    if min(found.values()) < _WORSE:
        return start + (
            "They predict worse than the teacher's mean does: their weights have run away. A "
            "learning rate finder, or a loop that goes back to an earlier state, is to give back "
            "theirs with the student's: distiller.load_state_dict(earlier), of a copy.deepcopy("
            "distiller.state_dict()). Otherwise their rate is too high: add_to(optimizer, lr=...)."
        )
    rates = _learning_rates(heads)
    if not rates:
        return start + (
            "The heads are in no optimizer of torch's. Add: distiller.add_to(optimizer). If one of "
            "another library has them, see that the distiller's value is in the loss that "
            "backward() is called on."
        )
    if max(rates) < _LOW_RATE:
        return start + (
            f"The heads' learning rate is {max(rates):.1e}. Give them one of their own: "
            "distiller.add_to(optimizer, lr=5e-3), in place of distiller.parameters() in its "
            "groups; or VIDTrainer(head_learning_rate=5e-3). A loop that sets every group's rate "
            "is to leave theirs."
        )
    return start + (
        "The heads are in an optimizer, so the student's layer does not tell what the teacher's "
        "holds: see that both get the same samples (teacher_inputs=), or pair another layer; or "
        "the distiller's value is not in the loss that backward() is called on."
    )


def _learning_rates(heads: Iterable[nn.Module]) -> list[float]:
    """Returns the rates at which optimizers have the heads; the host searches them once."""
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    # type(), because isinstance asks an object for its class, which makes a lazy one load.
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
    return [
        float(group.get("initial_lr", group["lr"]))
        for optimizer in optimizers
        for group in getattr(optimizer, "param_groups", ())
        if any(id(parameter) in own for parameter in group["params"])
    ]
