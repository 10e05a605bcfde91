"""Features in the dtype that they are kept in, or why they do not fit."""

import torch
from torch import Tensor


class Rounding:
    """Rounds features, and knows how large each channel has been.

    Args:
        dtype: what features are kept in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._largest: dict[tuple[str, int], Tensor] = {}

    def rounded(self, layer: str, feature: Tensor, count: int, shape: torch.Size | None) -> Tensor:
        """Returns a layer's feature in the dtype.

        Args:
            layer: its spec.
            feature: ``(count, ...)``.
            count: how many samples it is of.
            shape: of each sample before; None before any.

        Raises:
            ValueError: if it has another shape, or overflows or underflows the dtype.
        """
        name = f"FeatureCache, layer {layer!r} of the teacher"
        if feature.ndim < 2 or len(feature) != count:
            raise ValueError(
                f"{name}: expected a feature of {count} samples; got shape "
                f"{tuple(feature.shape)}. Tap a layer whose output has the batch first."
            )
        if shape is not None and shape != feature.shape[1:]:
            raise ValueError(
                f"{name}: expected the shape {tuple(shape)} of the samples before; got "
                f"{tuple(feature.shape[1:])}. Bring all inputs to one size, texts by "
                "padding='max_length', or train without a cache."
            )
        kept = feature.to(self.dtype)
        too_large = not bool((kept.isfinite() == feature.isfinite()).all())
        if too_large or self._is_too_small(layer, feature):
            largest = float(feature.nan_to_num(0, 0, 0).abs().max())
            raise ValueError(
                f"{name}: expected values that {self.dtype} can hold; got "
                f"{f'{largest:.3g}' if too_large else 'a channel below its smallest numbers'}. "
                "Use FeatureCache(..., dtype=torch.float32)."
            )
        return kept

    def _is_too_small(self, layer: str, feature: Tensor) -> bool:
        """Whether a channel has only had values that round to zero, or nearly.

        Of all batches so far: one that is hardly ever active may be so in one of them. Channels
        are the second dimension or the last.
        """
        tiny = 4 * torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        found = False
        for dim in {1, feature.ndim - 1}:
            others = [i for i in range(feature.ndim) if i != dim]
            largest = feature.detach().abs().nan_to_num(0, 0, 0).amax(others)
            before = self._largest.get((layer, dim))
            largest = largest if before is None else largest.maximum(before.to(largest))
            self._largest[layer, dim] = largest
            found = found or bool(((largest > 0) & (largest < tiny)).any())
        return found
