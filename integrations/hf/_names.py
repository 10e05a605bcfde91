"""Layers of a PEFT model, by the names that they have in its base model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from vid_loss.names import pairs_by_name
from vid_loss.pairs import Pair
from vid_loss.taps import unwrap

_NAME = re.compile(r"[^:\[]*")  # of a module, at the start of a layer's spec


def named_in_wrapper(
    pairs: Mapping[str, str] | Sequence[Pair], student: nn.Module, teacher: nn.Module
) -> list[Pair]:
    """Returns the pairs with layers of the base model named as in the PEFT model around it.

    Each keeps the label that it was given with: logs and checkpoints of heads have the same names,
    whoever wraps the student.

    Args:
        pairs: as in :class:`~vid_loss.Distiller`.
        student: any model.
        teacher: any model.

    Raises:
        TypeError, ValueError: as :class:`~vid_loss.Distiller`, of pairs that cannot be read.
    """
    return [
        replace(
            pair,
            name=pair.label,
            student=_in_wrapper(pair.student, unwrap(student)),
            teacher=_in_wrapper(pair.teacher, unwrap(teacher)),
        )
        for pair in pairs_by_name(pairs).values()
    ]


def _in_wrapper(layer: str, model: nn.Module) -> str:
    find_base = getattr(model, "get_base_model", None)
    name = _NAME.match(layer) if isinstance(layer, str) else None
    if find_base is None or name is None:
        return layer
    base = find_base()
    modules = dict(model.named_modules())
    if name[0] in modules or name[0] not in dict(base.named_modules()):
        return layer
    prefix = next((key for key, module in modules.items() if module is base), None)
    return layer if prefix is None else f"{prefix}.{layer}"
