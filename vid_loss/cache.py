"""The teacher's features on disk, for inputs that do not change between epochs."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shards import Shards
from .teacher import Teacher

_Features = Callable[
    [Teacher, tuple[Any, ...], Mapping[str, Any], Tensor | None], dict[str, Tensor]
]
_CHECKSUM, _FEATURE = "input_checksum", "feature:"


class FeatureCache:
    """Keeps what the teacher said of each sample, and saves its forward from then on.

    With few images and hundreds of epochs the teacher is most of the work, and says the same each
    time. That holds only where a sample's inputs are always the same: without random
    augmentation. A sample that comes back with other inputs is noticed in the first epochs.

    Every batch with new samples adds one safetensors file, whole or not at all, so a process
    that is killed leaves a cache that can be used. Files are memory-mapped. Several processes may
    share a folder; each finds what the others have added.

    Args:
        folder: where the files are. One folder is for one teacher and one choice of its layers.
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
        self._teacher_state: list[tuple[int, int]] = []
        self._full_hits = 0
        # Files are no part of a graph. A decorator would import the compiler with this library.
        disable: Callable[[_Features], _Features] = torch.compiler.disable
        self.features = disable(self._features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureCache":
        """Copies of a distiller share the files, and so this."""
        return self

    @torch.no_grad()
    def _features(
        self,
        teacher: Teacher,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sample_index: Tensor | None,
    ) -> dict[str, Tensor]:
        """Returns the teacher's features, and runs it for the samples that are new.

        Args:
            teacher: the same at every call.
            args: the student's positional arguments; tensors have the batch first.
            kwargs: the student's keyword arguments.
            sample_index: ``(N,)`` integers, each sample's place in its data set. On the CPU: from
                a GPU they would have to be waited for.

        Returns:
            The features by layer, ``(N, ...)``, on the device of the teacher.

        Raises:
            ValueError: if the index is none, the folder has another teacher's features, a sample
                came back with other inputs, or features differ in shape or overflow the dtype.
        """
        samples = _checked_index(sample_index)
        shards = self._shards_of(teacher)
        if not all(sample in shards for sample in samples):
            shards.scan()  # another process may have them by now
        new = [row for row, sample in enumerate(samples) if sample not in shards]
        old = [row for row, sample in enumerate(samples) if sample in shards]
        if self._is_time_to_check(bool(new)):
            _check_inputs(shards, samples, old, args, kwargs)
        device = next(teacher.tap.model.parameters()).device
        found = {
            layer: shards.read(
                _FEATURE + layer, [samples[row] for row in old], pinned=device.type == "cuda"
            ).to(device, non_blocking=True)
            for layer in (teacher.tap.specs if old else ())
        }
        if not new:
            return found
        fresh = self._fresh(teacher, args, kwargs, samples, new)
        if not old:
            return fresh
        order = torch.tensor([*old, *new], device=device).argsort()
        return {layer: torch.cat([found[layer], fresh[layer]])[order] for layer in fresh}

    def _shards_of(self, teacher: Teacher) -> Shards:
        """Opens the folder; again when the teacher's weights may have changed since."""
        model = teacher.tap.model
        state = [(x.data_ptr(), x._version) for x in (*model.parameters(), *model.buffers())]
        if self._shards is None or state != self._teacher_state:
            self._shards = Shards(self.folder, _fingerprint(teacher, self.dtype))
            self._teacher_state = state
        return self._shards

    def _fresh(
        self,
        teacher: Teacher,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        samples: Sequence[int],
        new: Sequence[int],
    ) -> dict[str, Tensor]:
        """Runs the teacher on the rows of a batch that are new, and keeps what fits."""
        shards, count = self._shards_of(teacher), len(samples)
        features = teacher.features(
            tuple(_rows(x, new, count) for x in args),
            {name: _rows(x, new, count) for name, x in kwargs.items()},
        )
        kept = {layer: self._checked(layer, x, len(new)) for layer, x in features.items()}
        size = sum(x.nbytes for x in kept.values())
        if self.max_bytes is None or shards.bytes + size <= self.max_bytes:
            rows = {_FEATURE + layer: x for layer, x in kept.items()}
            rows[_CHECKSUM] = _checksums(args, kwargs, count)[list(new)]
            shards.write([samples[row] for row in new], rows)
        return kept

    def _checked(self, layer: str, feature: Tensor, count: int) -> Tensor:
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

    def _is_time_to_check(self, some_are_new: bool) -> bool:
        """Often at first and ever more rarely then: it reads the inputs of the whole batch."""
        if some_are_new:
            return True
        self._full_hits += 1
        return self._full_hits & (self._full_hits - 1) == 0  # a power of two


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401  # to fail here, and not in the first step
    except ImportError as error:
        raise ImportError(
            'FeatureCache needs safetensors. Run: pip install "vid-loss[cache]"'
        ) from error


def _checked_index(sample_index: Tensor | None) -> list[int]:
    if (
        not isinstance(sample_index, Tensor)
        or sample_index.ndim != 1
        or sample_index.is_floating_point()
    ):
        got = tuple(sample_index.shape) if isinstance(sample_index, Tensor) else sample_index
        raise ValueError(
            "FeatureCache, sample_index: expected a tensor (N,) of integers, each sample's place "
            f"in its data set; got {got}. Call distiller(images, sample_index=index)."
        )
    samples: list[int] = sample_index.tolist()
    return samples


def _rows(value: Any, rows: Sequence[int], count: int) -> Any:
    if len(rows) < count and isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[list(rows)]
    return value


def _check_inputs(
    shards: Shards,
    samples: Sequence[int],
    rows: Sequence[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    if not rows:
        return
    before = shards.read(_CHECKSUM, [samples[row] for row in rows])
    now = _checksums(args, kwargs, len(samples))[list(rows)]
    differs = (now - before).abs() > 1e-4 * (1 + before.abs())
    if bool(differs.any()):
        sample = samples[rows[int(differs.nonzero()[0])]]
        raise ValueError(
            f"FeatureCache, sample {sample}: expected the inputs that its features were computed "
            "from; got others. Take random augmentation out, or train without a cache; for "
            "another data set choose another folder."
        )


def _checksums(args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> Tensor:
    """A number for each sample's inputs, ``(N,)`` in float64, which a flip or a crop changes."""
    total = torch.zeros(count, dtype=torch.float64)
    for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            flat = value.detach().cpu().reshape(count, -1).double()
            total += flat @ torch.arange(flat.shape[1], dtype=torch.float64).cos()
    return total


def _fingerprint(teacher: Teacher, dtype: torch.dtype) -> str:
    """A digest of all that decides about the features but the inputs and ``teacher_inputs``."""
    from safetensors.torch import save

    model = teacher.tap.model
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    facts = modules, sorted(teacher.tap.specs), teacher.dtype, dtype
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(save({name: tensor.detach().cpu().contiguous()}))
    return digest.hexdigest()
