"""Lightning modules distil by a callback."""

try:
    import lightning.pytorch as _  # noqa: F401  # asked for first, so that the extra is named
except ImportError as error:
    raise ImportError(
        'VIDCallback needs lightning. Run: pip install "vid-loss[lightning]"'
    ) from error

from ._callback import VIDCallback

__all__ = ["VIDCallback"]
