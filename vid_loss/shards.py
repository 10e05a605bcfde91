"""Rows of tensors by sample, in a folder of safetensors files."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_INDEX = "sample_index"


class _Place(NamedTuple):
    shard: int
    row: int


class Shards:
    """A folder of files, each with some rows of the same tensors; files never change.

    A file is written beside its place and renamed, so that a process which is killed leaves it
    whole or not at all. Processes may share a folder: a file's name is its own.

    Args:
        folder: where the files are; made when the first is written.
        fingerprint: what the rows were made with; files with another are refused.

    Raises:
        ValueError: if a file cannot be read or has another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.bytes = 0
        self._opened: set[str] = set()
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[int, _Place] = {}
        self.scan()

    def __len__(self) -> int:
        """Returns how many samples there are."""
        return len(self._places)

    def __contains__(self, sample: int) -> bool:
        """Whether there is a row of this sample."""
        return sample in self._places

    def scan(self) -> None:
        """Opens the files that came into the folder since."""
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("*.safetensors")):
                if path.name not in self._opened:
                    self._open(path)

    def row_shape(self, name: str) -> torch.Size | None:
        """Returns the shape of one sample's row, if there is any."""
        return self._shards[0][name].shape[1:] if self._shards else None

    def read(self, name: str, samples: Sequence[int], *, pinned: bool = False) -> Tensor:
        """Returns one tensor's rows of some samples, ``(len(samples), ...)``, on the CPU."""
        places = [self._places[sample] for sample in samples]
        rows = [self._shards[place.shard][name][place.row] for place in places]
        batch = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=pinned)
        return torch.stack(rows, out=batch)

    def write(self, samples: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Adds the rows of some samples, in a file of their own."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        shard = {name: x.cpu().contiguous() for name, x in tensors.items()}
        shard[_INDEX] = torch.tensor(samples)
        save_file(shard, partial, metadata={"fingerprint": self.fingerprint})
        os.replace(partial, path)
        self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("fingerprint")
                names = list(file.keys())
                shard = {name: file.get_tensor(name) for name in names}  # mapped, not read
        except SafetensorError as error:
            raise ValueError(
                f"FeatureCache, {path}: expected a whole safetensors file; got {error}. Delete it."
            ) from error
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"FeatureCache, {self.folder}: expected features of this teacher, these layers and "
                "this dtype; got others. Choose another folder, or delete this one."
            )
        self._opened.add(path.name)
        self.bytes += path.stat().st_size
        for row, sample in enumerate(shard[_INDEX].tolist()):
            self._places.setdefault(sample, _Place(len(self._shards), row))
        self._shards.append(shard)
