"""Hugging Face training scripts distil by changing one class name."""

try:
    import accelerate as _  # asked for first, so that the extra is named
    from transformers import Trainer as _  # noqa: F401, F811  # likewise
except ImportError as error:
    raise ImportError(
        'VIDTrainer needs transformers and accelerate. Run: pip install "vid-loss[hf]"'
    ) from error

from ._checkpoint import export_student
from ._trainer import VIDTrainer, VIDTrainerMixin

__all__ = ["VIDTrainer", "VIDTrainerMixin", "export_student"]
