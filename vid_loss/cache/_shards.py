"""Rows of tensors by sample, in a folder of safetensors files."""

import uuid
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vid_loss.durable import remove_abandoned, write_whole

from ._bytes import bytes_of

_INDEX, _CHECKSUM = "sample_index", "checksum"
_FILE_BYTES = 64 * 2**20  # a file for each batch would be too many to map
_HEADER_BYTES = 4096  # more than a file needs for its header


class Place(NamedTuple):
    """Where a sample's row is."""

    shard: int
    row: int


@dataclass
class _Shard:
    """Some rows, in memory or mapped from a file."""

    tensors: dict[str, Tensor]
    path: Path | None = None
    verified: set[int] = field(default_factory=set)


class Shards:
    """A folder of files, each with some rows of the same tensors; files never change.

    Rows are gathered in memory until they fill a file, which is whole or absent. Each row has a
    checksum, compared when the row is first read. Processes may share a folder: a file's name is
    its own.

    Args:
        folder: where the files are; made when the first is written.
        fingerprint: what the rows were made with; files with another are refused.

    Raises:
        ValueError: if a file has another fingerprint, or was not written by a cache.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._disk_bytes = 0
        self._opened: set[str] = set()
        self._scanned = -1
        self._shards: list[_Shard] = []
        self._pending: list[int] = []
        self._pending_bytes = 0
        self._places: dict[int, Place] = {}
        self._stopped = False
        remove_abandoned(folder)
        self.scan()

    @property
    def bytes(self) -> int:
        """The size of all that is in the folder, and of what is not written yet."""
        return self._disk_bytes + self._pending_bytes

    def scan(self) -> None:
        """Opens the files that came into the folder since."""
        if not self.folder.is_dir() or (now := self.folder.stat().st_mtime_ns) == self._scanned:
            return
        self._scanned = now
        self._disk_bytes = 0
        for path in sorted(self.folder.iterdir()):
            try:
                self._disk_bytes += path.stat().st_size  # also of what another process is writing
                if path.suffix == ".safetensors" and path.name not in self._opened:
                    self._open(path)
            except FileNotFoundError:  # renamed or removed since it was listed
                continue

    def places(self, samples: Sequence[int]) -> list[Place | None]:
        """Returns where the samples' rows are; None of those that there is no whole row of."""
        places = [self._places.get(sample) for sample in samples]
        for sample, place in zip(samples, places, strict=True):
            if place is not None and not self._is_whole(sample, place):
                self._leave_out(self._shards[place.shard])
                return self.places(samples)
        return places

    def row_shape(self, name: str) -> torch.Size | None:
        """Returns the shape of one sample's row, if there is any."""
        place = next(iter(self._places.values()), None)
        return None if place is None else self._shards[place.shard].tensors[name].shape[1:]

    def read(self, name: str, places: Sequence[Place], *, pinned: bool = False) -> Tensor:
        """Returns one tensor's rows, ``(len(places), ...)``, on the CPU."""
        rows = [self._shards[place.shard].tensors[name][place.row] for place in places]
        shape = (len(rows), *rows[0].shape)
        batch = torch.empty(shape, dtype=rows[0].dtype, device="cpu", pin_memory=pinned)
        return torch.stack(rows, out=batch)

    def sample_at(self, place: Place) -> int:
        """Returns the sample that a row is of."""
        return int(self._shards[place.shard].tensors[_INDEX][place.row])

    def is_written(self, place: Place) -> bool:
        """Whether a row is in a file, and not in memory alone."""
        return self._shards[place.shard].path is not None

    def add(
        self, samples: Sequence[int], tensors: Mapping[str, Tensor], *, max_bytes: int | None
    ) -> None:
        """Adds the rows of some samples, unless the folder would grow past ``max_bytes``."""
        # Eight bytes each of its index and its checksum.
        size = sum(x.nbytes for x in tensors.values()) + 16 * len(samples)
        full = max_bytes is not None and self.bytes + size + _HEADER_BYTES > max_bytes
        if full or self._stopped:
            return
        # Clones: safetensors refuses tensors that share memory.
        rows = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        rows[_INDEX] = torch.tensor(samples, device="cpu")
        self._pending.append(len(self._shards))
        self._append(_Shard(rows))
        self._pending_bytes += size
        if self._pending_bytes >= _FILE_BYTES:
            self.flush()

    def flush_at_end(self) -> None:
        """Flushes wherever the collector runs: while torch compiles, tensors are fake."""
        with _disable_current_modes():
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet, if there is anything; warns if it cannot be."""
        if not self._pending or self._stopped:
            return
        from safetensors.torch import save

        parts = [self._shards[number].tensors for number in self._pending]
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        sums = [_checksum(merged, row) for row in range(len(merged[_INDEX]))]
        merged[_CHECKSUM] = torch.tensor(sums, device="cpu")
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        data = save(merged, metadata={"fingerprint": self.fingerprint})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        except OSError as error:
            self._stopped = True
            warnings.warn(
                f"FeatureCache, {self.folder}: expected to write there; got {error}. Training "
                "goes on, with the teacher for each sample that is not kept. Free some space, or "
                "set max_bytes, before the next run.",
                stacklevel=2,
            )
            return
        self._disk_bytes += len(data)
        in_memory, self._pending, self._pending_bytes = self._pending, [], 0
        try:
            opened = self._open(path)
        except FileNotFoundError:
            opened = False
            _warn_of_damage(path, "none")
        for number in in_memory if opened else ():
            self._shards[number] = _Shard({})

    def _append(self, shard: _Shard) -> None:
        samples = shard.tensors[_INDEX].tolist() if shard.tensors else []
        for row, sample in enumerate(samples):
            self._places[sample] = Place(len(self._shards), row)
        self._shards.append(shard)

    def _is_whole(self, sample: int, place: Place) -> bool:
        shard = self._shards[place.shard]
        if shard.path is None or place.row in shard.verified:
            return True
        tensors, row = shard.tensors, place.row
        if tensors[_INDEX][row] != sample or tensors[_CHECKSUM][row] != _checksum(tensors, row):
            return False
        shard.verified.add(row)
        return True

    def _leave_out(self, damaged: _Shard) -> None:
        """Forgets a file. Its samples may be in another one by now, which a run before wrote."""
        _warn_of_damage(damaged.path, "other bytes")
        shards = [_Shard({}) if shard is damaged else shard for shard in self._shards]
        self._shards, self._places = [], {}
        for shard in shards:
            self._append(shard)

    def _open(self, path: Path) -> bool:
        from safetensors import SafetensorError, safe_open

        self._opened.add(path.name)
        try:
            with torch.device("cpu"), safe_open(path, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("fingerprint")
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}  # mapped, not read
        except SafetensorError as error:
            _warn_of_damage(path, str(error))
            return False
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
        if (
            not {_INDEX, _CHECKSUM} <= set(names)
            or len({x.shape[:1] for x in tensors.values()}) > 1
        ):
            shapes = {name: tuple(x.shape) for name, x in tensors.items()}
            _warn_of_damage(path, f"tensors of the shapes {shapes}")
            return False
        self._append(_Shard(tensors, path))
        return True


def _checksum(tensors: Mapping[str, Tensor], row: int) -> int:
    """A number for all that there is of a sample, the names and shapes included."""
    total = 0
    for name in sorted(tensors.keys() - {_CHECKSUM}):
        value = tensors[name][row]
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = zlib.crc32(bytes_of(value), total)
    return total


def _warn_of_damage(path: Path | None, got: str) -> None:
    warnings.warn(
        f"FeatureCache, {path}: expected the file that was written; got {got}. The teacher runs "
        "for its samples again. Delete it.",
        stacklevel=2,
    )
