"""The teacher's features on disk, for inputs that do not change between epochs."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vid_loss.teacher import Teacher

from ._fingerprint import fingerprint_of, state_of
from ._samples import Index, checked_index, checksums, rows_of
from ._shards import Shards

_CHECKSUM, _FEATURE = "input_checksum", "feature:"
_Features = Callable[[Teacher, tuple[Any, ...], Mapping[str, Any], Index], dict[str, Tensor]]


class FeatureCache:
    """Keeps what the teacher said of each sample, and saves its forward from then on.

    With few images and hundreds of epochs the teacher is most of the work, and says the same each
    time. That holds only where a sample's inputs are always the same: without random
    augmentation. A sample that comes back with other inputs is noticed in the first epochs.

    Files are safetensors of up to 64 MB, memory-mapped, each written whole or not at all: a
    process that is killed loses the features of its last samples, and the rest can be used.
    Several processes may share a folder; each finds what the others have written. Not for a
    teacher that FSDP shards, whose forward all processes must run.

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
        ValueError: if the dtype or the bound cannot be used.

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
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(
                f"FeatureCache, dtype: expected torch.float16 or torch.float32; got {dtype}."
            )
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(
                f"FeatureCache, max_bytes: expected a number of bytes or None; got {max_bytes}."
            )
        self.folder = Path(folder)
        self.dtype = dtype
        self.max_bytes = max_bytes
        self._shards: Shards | None = None
        self._teacher_state: Any = None
        self._hits = 0
        # Files are no part of a graph. A decorator would import the compiler with this library.
        disable: Callable[[_Features], _Features] = torch.compiler.disable
        self.features = disable(self._features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureCache":
        """Copies of a distiller share the files, and so this."""
        return self

    def flush(self) -> None:
        """Writes what is not written yet: as happens after the first epoch, and at the end."""
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
                overflow the dtype.
        """
        samples, device = checked_index(sample_index, args, kwargs)
        shards = self._shards_of(teacher)
        if not all(sample in shards for sample in samples):
            shards.scan()  # another process may have them by now
        new = [row for row, sample in enumerate(samples) if sample not in shards]
        old = [row for row, sample in enumerate(samples) if sample in shards]
        found = {
            layer: shards.read(
                _FEATURE + layer, [samples[row] for row in old], pinned=device.type == "cuda"
            ).to(device, non_blocking=True)
            for layer in (teacher.tap.specs if old else ())
        }
        check = bool(old) and self._is_time_to_check()
        if not new and not check:
            return found
        # What the teacher is given, not the student: teacher_inputs may have changed, or be random.
        args, kwargs = teacher.arguments(args, kwargs)
        inputs = checksums(args, kwargs, len(samples))
        if check:
            self._check(teacher, shards, [samples[row] for row in old], inputs[old])
        if not new:
            shards.flush()  # the first epoch is over
            return found
        fresh = self._fresh(teacher, args, kwargs, samples, new)
        rows = {_FEATURE + layer: x for layer, x in fresh.items()} | {_CHECKSUM: inputs[new]}
        shards.add([samples[row] for row in new], rows, max_bytes=self.max_bytes)
        if not old:
            return fresh
        order = torch.tensor([*old, *new]).argsort()
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
            weakref.finalize(self, self._shards.flush)  # also when the interpreter ends
        return self._shards

    def _fresh(
        self,
        teacher: Teacher,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: Sequence[int],
        new: Sequence[int],
    ) -> dict[str, Tensor]:
        """Runs the teacher on the rows of a batch that are new."""
        features = teacher.run(
            tuple(rows_of(x, new, len(samples)) for x in args),
            {name: rows_of(x, new, len(samples)) for name, x in kwargs.items()},
        )
        return {layer: self._kept(layer, x, len(new)) for layer, x in features.items()}

    def _kept(self, layer: str, feature: Tensor, count: int) -> Tensor:
        """Returns a new feature in the cache's dtype, or says why it cannot be kept."""
        kept = feature.to(self.dtype)
        name = f"FeatureCache, layer {layer!r} of the teacher"
        if kept.ndim < 2 or len(kept) != count:
            raise ValueError(
                f"{name}: expected a feature of {count} samples; got shape {tuple(kept.shape)}. "
                "Tap a layer whose output has the batch first."
            )
        shape = self._shards.row_shape(_FEATURE + layer) if self._shards else None
        if shape is not None and shape != kept.shape[1:]:
            raise ValueError(
                f"{name}: expected the shape {tuple(shape)} of the samples before; got "
                f"{tuple(kept.shape[1:])}. Bring all inputs to one size, or train without a cache."
            )
        if not bool((kept.isfinite() == feature.isfinite()).all()):
            raise ValueError(
                f"{name}: expected values that {self.dtype} can hold; got "
                f"{float(feature.abs().max())}. Use FeatureCache(..., dtype=torch.float32)."
            )
        return kept

    def _is_time_to_check(self) -> bool:
        """Often at first and ever more rarely then: it reads the inputs, and the weights."""
        self._hits += 1
        return self._hits & (self._hits - 1) == 0  # a power of two

    def _check(
        self, teacher: Teacher, shards: Shards, samples: Sequence[int], inputs: Tensor
    ) -> None:
        # Again, because writing to a parameter's .data leaves no trace but the values.
        if fingerprint_of(teacher, self.dtype) != shards.fingerprint:
            raise ValueError(
                f"FeatureCache, {self.folder}: expected the teacher that the features are of; it "
                "has changed since. Choose another folder, or delete these features."
            )
        before = shards.read(_CHECKSUM, samples)
        differs = (inputs - before).abs() > 1e-4 * (1 + before.abs())
        if bool(differs.any()):
            raise ValueError(
                f"FeatureCache, sample {samples[int(differs.nonzero()[0])]}: expected the inputs "
                "that its features were computed from; got others. Take random augmentation out, "
                "or train without a cache; for another data set or other teacher_inputs choose "
                "another folder."
            )


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401  # to fail here, and not in the first step
    except ImportError as error:
        raise ImportError(
            'FeatureCache needs safetensors. Run: pip install "vid-loss[cache]"'
        ) from error
