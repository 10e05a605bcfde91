"""Few images or few labels a class, as in the paper's Tables 1 and 2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def images_per_class(labels: Sequence[int] | Tensor, n: int, *, seed: int) -> list[int]:
    """Draws the indices of n samples of every class.

    Args:
        labels: the class of each sample; negative ones are unlabeled and never drawn.
        n: how many of each class.
        seed: of the draw. With one seed, a smaller n draws a part of what a larger n draws.

    Returns:
        The indices in ascending order, n times the number of classes of them.

    Raises:
        TypeError: if the labels are no whole numbers.
        ValueError: if a class has fewer than n samples, or n is not positive.

    Example:
        >>> images_per_class([0, 1, 1, 0, 1], 2, seed=0)
        [0, 1, 3, 4]
    """
    labels = _whole(labels, "images_per_class").cpu()
    if not hasattr(n, "__index__") or n < 1:  # also NumPy's
        raise ValueError(f"images_per_class, n: expected 1 or more a class; got {n!r}.")
    if labels.ndim != 1:
        raise ValueError(
            f"images_per_class, labels: expected one class a sample; got shape "
            f"{tuple(labels.shape)}."
        )
    counts = torch.bincount(labels[labels >= 0])
    classes = counts.nonzero().flatten().tolist()
    for label in classes:
        if counts[label] < n:
            raise ValueError(
                f"images_per_class, n: expected {n} samples of class {label}; got "
                f"{counts[label]}. Ask for fewer, or leave the class out."
            )
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    drawn = [order[labels[order] == label][:n] for label in classes]
    return sorted(torch.cat(drawn).tolist()) if drawn else []


def labels_per_class(
    labels: Sequence[int] | Tensor, n: int, *, seed: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Keeps the labels of n samples of every class and hides the others (Table 1b).

    Args:
        labels: the class of each sample.
        n: how many labels of each class to keep.
        seed: of the draw, as in :func:`images_per_class`.
        ignore_index: what a hidden label becomes; negative, as 0 and above are classes.

    Returns:
        A copy of the labels, ``(samples,)``: int64, which ``ignore_index`` fits in and
        cross-entropy takes, whatever they were.

    Raises:
        TypeError: if the labels are no whole numbers.
        ValueError: if a class has fewer than n samples, n is not positive, or ``ignore_index``
            is not negative.

    Example:
        >>> labels_per_class([0, 1, 1, 0], 1, seed=0)
        tensor([   0,    1, -100, -100])
    """
    if not hasattr(ignore_index, "__index__") or ignore_index >= 0:
        raise ValueError(
            "labels_per_class, ignore_index: expected a negative whole number, which is no class; "
            f"got {ignore_index!r}. For example {IGNORE_INDEX}."
        )
    labels = _whole(labels, "labels_per_class")
    hidden = torch.full_like(labels, ignore_index)
    kept = images_per_class(labels, n, seed=seed)
    hidden[kept] = labels[kept]
    return hidden


def labeled_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy over the labeled samples of a batch; 0, not NaN, when there are none.

    The transfer terms need no labels: ``labeled_cross_entropy(...) + distiller(images)`` trains
    on all of a partly labeled batch.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)``; ``ignore_index`` where there is none.
        ignore_index: the label of unlabeled samples.

    Returns:
        A scalar in nats, the mean over labeled samples.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def _whole(labels: Sequence[int] | Tensor, source: str) -> Tensor:
    """Returns labels as int64."""
    try:
        found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
        got = str(found.dtype)
    except (TypeError, ValueError, RuntimeError):
        found, got = torch.zeros(1), repr(labels)
    if found.numel() and (found.is_floating_point() or found.is_complex()):
        raise TypeError(
            f"{source}, labels: expected the number of each sample's class; got {got}. Number the "
            "classes from 0, and write labels.long() if the numbers are floats."
        )
    return found.long()
