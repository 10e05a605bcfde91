"""Features that are kept, against what the teacher says now."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vid_loss.taps import Given
from vid_loss.teacher import Teacher

from ._fingerprint import autocast_dtype
from ._samples import Batch, Key


def proven(
    teacher: Teacher,
    batch: Batch,
    rows: Sequence[int],
    kept: Mapping[str, Tensor],
    settled: frozenset[Key],
) -> Batch:
    """Runs the teacher on some samples of a batch alone, and compares.

    It stands for all that cannot be read off a teacher: what its code does, its attributes,
    ``teacher_inputs``, chance; and that a sample's features depend on no other sample. Which of
    the arguments hold samples is found by it too.

    Args:
        teacher: the teacher.
        batch: the student's arguments.
        rows: which of its samples.
        kept: their features by layer, ``(len(rows), ...)``.
        settled: arguments that are known to hold samples.

    Returns:
        The batch as it must be read for the teacher to say what is kept.

    Raises:
        ValueError: if it says something else whatever is tried.
    """
    tolerance, wrong = _tolerance(teacher), ""
    for reading in batch.readings(settled):
        try:
            features = teacher.features(Given(*reading.rows(rows)))
        except Exception as error:  # a wrong reading may end in any
            wrong = wrong or f"{type(error).__name__}: {error}"
            continue
        off = {layer: _difference(features[layer], x) for layer, x in kept.items()}
        layer = max(off, key=lambda layer: off[layer])
        if off[layer] <= tolerance:
            return reading
        wrong = wrong or f"one that differs by {100 * off[layer]:.2g} % in layer {layer!r}"
    raise ValueError(
        "FeatureCache, teacher: expected the teacher that the features are of, and that it says "
        f"the same of a sample each time and in any batch; got {wrong}. If its code, attributes "
        "or teacher_inputs have changed, choose another folder; if inputs come in several sizes, "
        "bring them to one, texts by padding='max_length'; else train without a cache."
    )


def _tolerance(teacher: Teacher) -> float:
    """Five roundings of what the teacher computes in, TF32 at the best.

    Its forward may take other kernels, for another batch size or on another device.
    """
    dtypes = {p.dtype for p in teacher.tap.model.parameters() if p.is_floating_point()}
    dtypes |= {autocast_dtype(teacher) or torch.float32}
    return 5 * max(2**-10, *(torch.finfo(dtype).eps for dtype in dtypes))


def _difference(now: Tensor, kept: Tensor) -> float:
    """The largest relative difference of a sample's feature, in the Euclidean norm."""
    if now.shape != kept.shape:
        return float("inf")
    now, kept = now.flatten(1).float(), kept.to(now.device).flatten(1).float()
    # Padding may hold anything, but each time the same.
    same = (now == kept) | (now.isnan() & kept.isnan())
    now, kept = now.masked_fill(same, 0), torch.where(same & ~kept.isfinite(), 0, kept)
    gap = torch.where(same, 0, now - kept).norm(dim=1)
    relative = torch.where(gap > 0, gap / kept.norm(dim=1), gap)
    return float(relative.nan_to_num(nan=torch.inf).max())
