"""A training loop on Accelerate: one process or many, DDP or FSDP2, mixed precision."""

try:
    import accelerate as _  # asked for first, so that the extra is named
    import safetensors.torch as _  # noqa: F811  # likewise
    from tqdm.auto import tqdm as _  # noqa: F401, F811  # likewise
except ImportError as error:
    raise ImportError(
        "The Accelerate loop needs accelerate, safetensors and tqdm: "
        'pip install "vid-loss[accelerate]"'
    ) from error

from ._checkpoints import alone
from ._evaluation import Accuracy, evaluate
from ._loop import Progress, train

__all__ = ["Accuracy", "Progress", "alone", "evaluate", "train"]
