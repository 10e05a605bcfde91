"""Rows of tensors by sample, in a folder of safetensors files."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_INDEX = "sample_index"
_FILE_BYTES = 64 * 2**20  # a file for each batch would be too many to map
_HEADER_BYTES = 4096  # more than a file needs for its header


class _Place(NamedTuple):
    shard: int
    row: int


class Shards:
    """A folder of files, each with some rows of the same tensors; files never change.

    Rows are gathered in memory until they fill a file. It is written beside its place and renamed,
    so that a process which is killed leaves it whole or not at all. Processes may share a folder:
    a file's name is its own.

    Args:
        folder: where the files are; made when the first is written.
        fingerprint: what the rows were made with; files with another are refused.

    Attributes:
        bytes: of the files, and of what is not written yet.

    Raises:
        ValueError: if a file cannot be read or has another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.bytes = 0
        self._opened: set[str] = set()
        self._scanned = -1
        self._shards: list[dict[str, Tensor]] = []
        self._pending: list[int] = []
        self._pending_bytes = 0
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
        if not self.folder.is_dir() or (now := self.folder.stat().st_mtime_ns) == self._scanned:
            return
        self._scanned = now
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._opened:
                self._open(path)

    def row_shape(self, name: str) -> torch.Size | None:
        """Returns the shape of one sample's row, if there is any."""
        place = next(iter(self._places.values()), None)
        return None if place is None else self._shards[place.shard][name].shape[1:]

    def read(self, name: str, samples: Sequence[int], *, pinned: bool = False) -> Tensor:
        """Returns one tensor's rows of some samples, ``(len(samples), ...)``, on the CPU."""
        places = [self._places[sample] for sample in samples]
        rows = [self._shards[place.shard][name][place.row] for place in places]
        batch = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=pinned)
        return torch.stack(rows, out=batch)

    def add(
        self, samples: Sequence[int], tensors: Mapping[str, Tensor], *, max_bytes: int | None
    ) -> None:
        """Adds the rows of some samples, unless the files would grow past ``max_bytes``."""
        size = sum(x.nbytes for x in tensors.values()) + 8 * len(samples)
        if max_bytes is not None and self.bytes + size + _HEADER_BYTES > max_bytes:
            return
        # Clones: safetensors refuses tensors that share memory.
        shard = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        shard[_INDEX] = torch.tensor(samples)
        self._pending.append(len(self._shards))
        self._append(shard)
        self.bytes += size
        self._pending_bytes += size
        if self._pending_bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet, if there is anything."""
        if not self._pending:
            return
        from safetensors.torch import save_file

        parts = [self._shards[number] for number in self._pending]
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(merged, partial, metadata={"fingerprint": self.fingerprint})
        os.replace(partial, path)
        for number in self._pending:
            self._shards[number] = {}
        self.bytes -= self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        self._open(path)

    def _append(self, shard: dict[str, Tensor]) -> None:
        for row, sample in enumerate(shard[_INDEX].tolist()):
            self._places[sample] = _Place(len(self._shards), row)
        self._shards.append(shard)

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
        if fingerprint is None:
            raise ValueError(
                f"FeatureCache, {self.folder}: expected a folder of its own; got one with "
                f"{path.name}, which no cache has written. Choose another folder."
            )
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"FeatureCache, {self.folder}: expected features of this teacher, these layers and "
                "this precision; got others. Choose another folder, or delete these features."
            )
        self._opened.add(path.name)
        self.bytes += path.stat().st_size
        self._append(shard)
