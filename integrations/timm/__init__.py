"""``VIDTask``, a training task for timm, and ``python -m vid_loss.integrations.timm``.

Nothing here imports timm before it is asked for: a clone's train.py goes with the timm that lies
beside it, which ``python -m vid_loss.integrations.timm run`` must find first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._arguments import add_vid_arguments, vid_task
    from ._groups import param_groups_vid
    from ._task import VIDTask

__all__ = ["VIDTask", "add_vid_arguments", "param_groups_vid", "vid_task"]

_HOMES = {
    "VIDTask": "._task",
    "add_vid_arguments": "._arguments",
    "param_groups_vid": "._groups",
    "vid_task": "._arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
