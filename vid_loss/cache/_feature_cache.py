"""The teacher's features on disk, for inputs that do not change between epochs."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vid_loss.taps import Given
from vid_loss.teacher import Teacher

from ._checks import DIGEST, Checks, Places, Rows
from ._fingerprint import fingerprint_of, state_of
from ._rounding import Rounding
from ._samples import Batch, Index, batch_of
from ._shards import Shards

_FEATURE = "feature:"
_Features = Callable[[Teacher, tuple[Any, ...], Mapping[str, Any], Index], dict[str, Tensor]]


class FeatureCache:
    """Keeps what the teacher said of each sample, and saves its forward from then on.

    With few images and hundreds of epochs the teacher is most of the work, and says the same each
    time. That holds only where a sample's inputs are always the same: without random
    augmentation. In every batch some samples' inputs are compared with those of before, to the
    bit. Of each file that is read one sample is given to the teacher again, and one every 64
    calls: it must say what is kept, up to its own precision.

    Files are safetensors of up to 64 MB, memory-mapped, each written whole or not at all: a
    process that is killed loses the features of its last samples, and the rest can be used.
    Several processes may share a folder; each finds what the others have written. Where the disk
    is full or a file damaged, a warning says so and the teacher runs instead. Not for a teacher
    that FSDP shards, whose forward all processes must run.

    Args:
        folder: where the files are, and nothing else. One folder is for one teacher and one choice
            of its layers.
        dtype: ``torch.float16`` or ``torch.float32``, what features are kept in. The loss is given
            them in this precision also when they are new.
        max_bytes: how much this process may let the folder grow to. The teacher goes on to run for
            the samples that did not fit.

    Attributes:
        features: what :class:`~vid_loss.Distiller` calls in the teacher's place.

    Raises:
        ImportError: if safetensors is missing.
        TypeError: if an argument has the wrong type.
        ValueError: if the folder is a file, or the dtype or the bound cannot be used.

    Example:
        >>> cache = FeatureCache("features", max_bytes=10 * 2**30)  # doctest: +SKIP
        >>> distiller = Distiller(student, teacher, pairs, example=x, cache=cache)  # doctest: +SKIP
        >>> loss = task + distiller(x, sample_index=index)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float16,
        max_bytes: int | None = None,
    ) -> None:
        _require_safetensors()
        _check(folder, dtype, max_bytes)
        self.folder = Path(folder)
        self.dtype = dtype
        self.max_bytes = max_bytes
        self._shards: Shards | None = None
        self._teacher_state: Any = None
        self._rounding = Rounding(dtype)
        self._checks = Checks(self.folder)
        self._lock = threading.RLock()
        # Files are no part of a graph. A decorator would import the compiler with this library.
        disable: Callable[[_Features], _Features] = torch.compiler.disable
        self.features = disable(self._features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureCache":
        """Copies of a distiller share the files, and so this."""
        return self

    def flush(self) -> None:
        """Writes what is not written yet: as happens after the first epoch, and at the end."""
        with self._lock:
            if self._shards is not None:
                self._shards.flush()

    @torch.no_grad()
    def _features(
        self,
        teacher: Teacher,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sample_index: Index,
    ) -> dict[str, Tensor]:
        """Returns the teacher's features, and runs it for the samples that are new.

        Args:
            teacher: the same at every call.
            args: the student's positional arguments; tensors have the batch first.
            kwargs: the student's keyword arguments.
            sample_index: ``(N,)`` integers, each sample's place in its data set. On the CPU: from
                a GPU they would have to be waited for.

        Returns:
            The features by layer, ``(N, ...)``, on the device of the inputs.

        Raises:
            ValueError: if the index is none or not of this batch, the folder has another teacher's
                features, a sample came back with other inputs, or features differ in shape or
                do not fit the dtype.
        """
        samples, batch = batch_of(sample_index, args, kwargs)
        with self._lock:
            shards = self._shards_of(teacher)
            places = shards.places(samples)
            if None in places:
                shards.scan()  # another process may have them by now
                places = shards.places(samples)
            batch = self._checks.as_before(batch)
            old = {row: place for row, place in enumerate(places) if place is not None}
            found = self._read(shards, teacher, old, batch) if old else {}
            if old:
                batch = self._checks.of_read(shards, teacher, batch, old, found)
            new = [row for row in range(len(samples)) if row not in old]
            if not new:
                shards.flush()  # the first epoch is over
                return found
            fresh, batch = self._fresh(shards, teacher, batch, new)
            rows = {_FEATURE + layer: x for layer, x in fresh.items()}
            rows[DIGEST] = batch.digests(new, batch.common())
            shards.add([samples[row] for row in new], rows, max_bytes=self.max_bytes)
        if not old:
            return fresh
        order = torch.tensor([*old, *new], device="cpu").argsort()
        return {
            layer: torch.cat([found[layer].to(x.device), x])[order.to(x.device)]
            for layer, x in fresh.items()
        }

    def _shards_of(self, teacher: Teacher) -> Shards:
        """Opens the folder; again when the teacher may have changed since."""
        state = state_of(teacher)
        if self._shards is None or state != self._teacher_state:
            self.flush()
            self._shards = Shards(self.folder, fingerprint_of(teacher, self.dtype))
            self._teacher_state = state
            self._checks.begin(teacher)
            weakref.finalize(self, self._shards.flush_at_end)  # also the interpreter's
        return self._shards

    def _read(self, shards: Shards, teacher: Teacher, places: Places, batch: Batch) -> Rows:
        device = batch.device
        pinned = device.type == "cuda"
        return {
            layer: shards.read(_FEATURE + layer, list(places.values()), pinned=pinned).to(
                device, non_blocking=True
            )
            for layer in teacher.tap.specs
        }

    def _fresh(
        self, shards: Shards, teacher: Teacher, batch: Batch, new: list[int]
    ) -> tuple[Rows, Batch]:
        """Runs the teacher on the rows of a batch that are new."""
        features = teacher.features(Given(*batch.rows(new)))
        kept = {
            layer: self._rounding.rounded(layer, x, len(new), shards.row_shape(_FEATURE + layer))
            for layer, x in features.items()
        }
        return kept, self._checks.of_new(teacher, batch, kept)


def checked_cache(cache: Any) -> FeatureCache | None:
    """Returns a cache or None.

    Raises:
        TypeError: if it is anything else.
    """
    if cache is not None and not isinstance(cache, FeatureCache):
        example = repr(cache) if isinstance(cache, str) else '"features"'
        raise TypeError(
            f"Distiller, cache: expected a FeatureCache or None; got {cache!r}. Write "
            f"cache=FeatureCache({example})."
        )
    return cache


def _check(folder: Any, dtype: Any, max_bytes: Any) -> None:
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise TypeError(
            f"FeatureCache, folder: expected the name of a folder; got {folder!r}. Write "
            'FeatureCache("features").'
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(
            f"FeatureCache, folder: expected a folder, or a name for one; got the file {folder}. "
            "Choose another name."
        )
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(
            "FeatureCache, dtype: expected torch.float16 or torch.float32; got "
            f"{dtype!r}. Write dtype=torch.float16."
        )
    whole = isinstance(max_bytes, int) and not isinstance(max_bytes, bool)
    if max_bytes is not None and not (whole and max_bytes >= 0):
        kind = ValueError if whole else TypeError
        raise kind(
            f"FeatureCache, max_bytes: expected a number of bytes or None; got {max_bytes!r}. For "
            "10 GB write max_bytes=10 * 2**30."
        )


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401  # to fail here, and not in the first step
    except ImportError as error:
        raise ImportError(
            'FeatureCache needs safetensors. Run: pip install "vid-loss[cache]"'
        ) from error
