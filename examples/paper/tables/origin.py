"""Origin of a run: the code, the data and the machine that it was made with."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from paper.datasets.photographs import ImageList
from paper.datasets.small_images import SmallImages

_PACKAGES = ("vid-loss", "torch", "torchvision", "accelerate")


def origin(accelerator: Accelerator) -> dict[str, str | dict[str, str]]:
    """Returns what every run of a worker has in its record."""
    packages = {package: version(package) for package in _PACKAGES}
    return {
        "command": " ".join(["python", _program(), *sys.argv[1:]]),
        "revision": _revision(),
        "versions": {"python": sys.version.split()[0], **packages},
        "device": _device(accelerator),
    }


def data_digest(data: SmallImages | Sequence[ImageList]) -> str:
    """Returns a digest of a data set, which is the same wherever the data lie.

    It is of small images' pixels and labels, and of image files' names and labels.
    """
    hashed = hashlib.sha256()
    if isinstance(data, SmallImages):
        for part in (data.train, data.test):
            hashed.update(part.pixels.numpy())
            hashed.update(part.labels.numpy())
    else:
        for part in data:
            names = ["/".join(path.parts[-2:]) for path in part.paths]
            hashed.update(repr((names, part.labels)).encode())
    return hashed.hexdigest()[:16]


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    if spec is not None and spec.name.startswith("paper."):
        return f"-m {spec.name}"
    return f"examples/{Path(sys.argv[0]).name}"


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{accelerator.device.type}, {torch.get_num_threads()} threads"


def _revision() -> str:
    """Returns the git revision of this file's clone, marked if it has changes.

    A copy of a clone without its history has none: there ``VID_LOSS_REVISION`` says it.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("VID_LOSS_REVISION", "unknown")
    return done.stdout.strip()
