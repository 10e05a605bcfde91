"""A sharded checkpoint's metadata, which torch unpickles: looked at before it does."""

import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
}


def check_metadata(folder: Path) -> None:
    """Reads a sharded checkpoint's metadata without running what is in it.

    Raises:
        ValueError: if it names anything that torch itself does not write there, or is damaged.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _Unpickler(file).load()
    except Exception as error:  # a damaged pickle ends in any
        raise ValueError(
            f"export_student, checkpoint: expected metadata in {path} as torch writes it; got "
            f"{type(error).__name__}: {error}. Nothing of it was run. Take another checkpoint."
        ) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A name with dots would be looked up in what the module imports.
        if (module, name) in _NAMES:
            return getattr(import_module(module), name)
        found = (
            getattr(import_module(module), name, None) if module in ("torch", _METADATA) else None
        )
        of_metadata = isinstance(found, type) and found.__module__ == _METADATA
        if not (of_metadata or isinstance(found, torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found
