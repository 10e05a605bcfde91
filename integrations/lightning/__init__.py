"""Lightning modules distil by a callback."""

try:
    import lightning.pytorch as _  # asked for first, so that the extra is named  # noqa: F401
except ImportError as error:
    raise ImportError(
        'VIDCallback needs lightning. Run: pip install "vid-loss[lightning]"'
    ) from error

from ._callback import VIDCallback

__all__ = ["VIDCallback"]
