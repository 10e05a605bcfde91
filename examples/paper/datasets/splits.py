"""N images per class, and what is held out for validation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vid_loss.subsets import IGNORE_INDEX, images_per_class


def train_and_validation(
    labels: Sequence[int], n: int | None, *, seed: int, held_out: float = 0.2
) -> tuple[list[int], list[int]]:
    """Draws what a student is trained on, and holds a part of it out.

    The paper's N images per class are what is provided for training, and 20 % of that is for
    validation: of 5 images per class, 4 are trained on and 1 chooses the epoch.

    Args:
        labels: the class of each image.
        n: how many images per class; None is all.
        seed: of the draw.
        held_out: the part of each class for validation; one image at least.

    Returns:
        The indices for training and those for validation, both in ascending order.

    Raises:
        ValueError: if a class has fewer than n images, or only one.
    """
    drawn = range(len(labels)) if n is None else images_per_class(labels, n, seed=seed)
    by_class: dict[int, list[int]] = {}
    for index in drawn:
        by_class.setdefault(labels[index], []).append(index)
    generator = torch.Generator().manual_seed(seed)
    train: list[int] = []
    validation: list[int] = []
    for label, indices in sorted(by_class.items()):
        count = max(1, round(held_out * len(indices)))
        if count == len(indices):
            raise ValueError(
                f"train_and_validation, n: expected two images of class {label}, one of them for "
                "validation; got one. Ask for more images per class."
            )
        order = torch.randperm(len(indices), generator=generator).tolist()
        validation += [indices[i] for i in order[:count]]
        train += [indices[i] for i in order[count:]]
    return sorted(train), sorted(validation)


def with_undrawn(
    labels: Sequence[int], held_out: Sequence[int], given: Sequence[int], count: int, *, seed: int
) -> list[int]:
    """Adds images that no student is given to those that are held out for validation.

    With ten images per class a fifth are twenty in all, of which one is 5 %: hyper-parameters
    that are chosen on them are chosen by chance.

    Args:
        labels: the class of each image.
        held_out: the indices of what is held out already.
        given: those of what the student is trained on, with labels and without.
        count: how many images are to be held out in all, as many of each class as there are.
        seed: of the draw.

    Returns:
        The indices for validation in ascending order.
    """
    used, kept = {*given, *held_out}, list(held_out)
    each = count // len(set(labels))
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(labels)):
        of_class = [index for index, x in enumerate(labels) if x == label]
        free = [index for index in of_class if index not in used]
        wanted = max(0, each - len({*of_class}.intersection(held_out)))
        order = torch.randperm(len(free), generator=generator).tolist()
        kept += [free[i] for i in order[:wanted]]
    return sorted(kept)


def with_unlabeled(
    labels: Sequence[int],
    labeled: Sequence[int],
    held_out: Sequence[int],
    images: int | None,
    *,
    seed: int,
) -> tuple[list[int], Tensor]:
    """Adds images without their labels to what a student is trained on (Table 1b).

    Those with labels are named as often as makes them half of all, so that in a batch drawn from
    these there are as many of each. Named once, 100 of 5000 would leave most batches with one or
    none, and the task loss without a say.

    Args:
        labels: the class of each image.
        labeled: the indices of the images for training whose labels are known.
        held_out: those for validation; a student sees neither their images nor their labels.
        images: how many images per class there are in all; None is all.
        seed: of the draw, that of :func:`train_and_validation`.

    Returns:
        The indices for training, and all labels with -100 for those that are not known.
    """
    drawn = range(len(labels)) if images is None else images_per_class(labels, images, seed=seed)
    unlabeled = set(drawn) - set(labeled) - set(held_out)
    train = sorted(unlabeled) + [*labeled] * max(1, round(len(unlabeled) / len(labeled)))
    known = torch.full((len(labels),), IGNORE_INDEX)
    known[list(labeled)] = torch.as_tensor(labels)[list(labeled)]
    return train, known
