"""Whether the heads keep the learning rate of their own that they were given."""

import warnings
import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ._watched import Watched

_MOST_LOOKS = 128  # a schedule may begin at 0, where every rate is the same
_OVERWRITTEN = (
    "Distiller: expected its heads at the learning rate of their own that they were given, "
    "{given:.1e}; got {rate:.1e}, as another group. Where the loop sets the rate of every group, "
    "let it leave theirs: for group in optimizer.param_groups[{others}]."
)
_NOT_SCALED = (
    "Distiller: expected the rate of each of the optimizer's groups to be multiplied by its "
    "lr_scale, as timm's schedulers and the loops that know it do; got groups of other scales at "
    "one rate, {rate:.1e}, which is the heads' now, too. Before distiller.add_to(optimizer) take "
    "the scales out: for group in optimizer.param_groups: group.pop('lr_scale', None)."
)
_ONE_PEAK = (
    "Distiller: expected its heads at the learning rate of their own that they were given, "
    "{given:.1e}; got a scheduler with one max_lr for every group, {peak:.1e}. Give it a rate for "
    "each: max_lr={peaks}."
)


class OwnRate:
    """Looks at the rates after the first step, and on while they are 0.

    A loop that writes one rate into every group overwrites the heads', and so does OneCycleLR with
    one ``max_lr``. Other schedulers keep each group's own, in ``initial_lr``.
    """

    def __init__(self, distiller: weakref.ref[Watched]) -> None:
        self._distiller = distiller
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._looks = 0
        self._settled = False

    def note(self, optimizer: Optimizer) -> None:
        """Notes an optimizer that steps on heads."""
        self._optimizer = weakref.ref(optimizer)

    def look(self) -> bool:
        """Returns whether there is nothing more to look at; warns if theirs is another group's."""
        self._settled = self._settled or self._compare()
        return self._settled

    def _compare(self) -> bool:
        distiller = self._distiller()
        optimizer = None if self._optimizer is None else self._optimizer()
        if distiller is None or optimizer is None:
            return True
        given, groups = distiller.own_rate, optimizer.param_groups
        if given is None or given == optimizer.defaults.get("lr"):
            return True
        heads = {id(p) for p in distiller.parameters()}
        theirs = [any(id(p) in heads for p in group["params"]) for group in groups]
        if not any(theirs) or all(theirs):
            return True
        _warn_of_one_peak(given, groups, theirs)
        first = theirs.index(True)
        on_host = all(_is_on_host(group) for group in groups)
        if not on_host or ("lr_scale" not in groups[first] and not _are_set_by_hand(groups)):
            return True
        rate = float(groups[first]["lr"])
        self._looks += 1
        if not rate:
            return self._looks > _MOST_LOOKS
        if "lr_scale" in groups[first]:
            _warn_of_scales(groups[first], groups)
            return True
        others = [float(x["lr"]) for x, own in zip(groups, theirs, strict=True) if not own]
        if rate != given and rate in others:
            slice_ = f":{first}" if first else f"{theirs.index(False)}:"
            message = _OVERWRITTEN.format(given=given, rate=rate, others=slice_)
            warnings.warn(message, stacklevel=7)
        return True


def _warn_of_one_peak(given: float, groups: list[dict[str, Any]], theirs: list[bool]) -> None:
    peaks = [group.get("max_lr") for group in groups]
    if peaks[0] is not None and len(set(peaks)) == 1 and peaks[0] < given:
        own = [given if own else peak for peak, own in zip(peaks, theirs, strict=True)]
        message = _ONE_PEAK.format(given=given, peak=peaks[0], peaks=own)
        warnings.warn(message, stacklevel=8)


def _warn_of_scales(heads: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    scale, rate = heads["lr_scale"], float(heads["lr"])
    others = [float(x["lr"]) for x in groups if x.get("lr_scale", 1.0) != scale]
    if rate in others:
        warnings.warn(_NOT_SCALED.format(rate=rate), stacklevel=8)


def _is_on_host(group: dict[str, Any]) -> bool:
    rate = group.get("lr")
    return not rate.is_cuda if isinstance(rate, Tensor) else rate is not None


def _are_set_by_hand(groups: list[dict[str, Any]]) -> bool:
    """Whether no scheduler has set the groups up."""
    return not any("initial_lr" in group for group in groups)
