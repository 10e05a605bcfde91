"""What a train.py that vid-loss 0.1.0 patched still imports."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("add_vid_arguments", "vid_task"):
        raise ImportError(
            "This train.py was patched by vid-loss 0.1.0, whose module this was. Run once: "
            "python -m vid_loss.integrations.timm patch train.py"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
