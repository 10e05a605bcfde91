"""Batches of small images, made on the device, and who gets which images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from paper.settings import Settings
from paper.weights import published_statistics

from .augmentation import AUGMENTATIONS, shifts
from .loaders import Loaders, shuffled
from .small_images import Format, Images, SmallImages
from .splits import train_and_validation, with_undrawn, with_unlabeled


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Makes whole batches at once, on the device: augmented if asked to, then normalized.

    Grey images get three equal channels.

    Args:
        images: of which a batch is taken.
        data: the data set whose format and statistics apply: for transfer, the teacher's.
        augmented: whether to augment.
        device: where batches are made.
        augment: how, if so.
    """

    def __init__(
        self,
        images: Images,
        data: SmallImages,
        *,
        augmented: bool,
        device: torch.device,
        augment: Callable[[Tensor, Format], Tensor] = shifts,
    ) -> None:
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.mean = data.mean.to(device).view(-1, 1, 1)
        self.std = data.std.to(device).view(-1, 1, 1)
        self.augmented, self.augment, self.format = augmented, augment, data.format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns normalized images ``(len(indices), 3, H, W)`` and labels."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        pixels = self.pixels[chosen]
        if self.augmented:
            pixels = self.augment(pixels, self.format)
        normalized = (pixels.float() - self.mean) / self.std
        return normalized.expand(-1, 3, -1, -1), self.labels[chosen]


def small_image_loaders(
    settings: Settings,
    data: SmallImages,
    device: torch.device,
    *,
    normalized_as: SmallImages | None = None,
) -> Loaders:
    """Draws a student's images, and holds a part of those with labels out for validation.

    Args:
        settings: of the run.
        data: the student's data set.
        device: where batches are made.
        normalized_as: the data set whose statistics apply, the teacher's; None is the student's.
            A student that is finetuned from published weights gets the images of these.
    """
    labels, n = data.train.labels.tolist(), settings.images_per_class
    known = n if settings.labels_per_class is None else settings.labels_per_class
    train, held_out = train_and_validation(labels, known, seed=settings.seed)
    targets = data.train.labels
    if settings.labels_per_class is not None:
        train, targets = with_unlabeled(labels, train, held_out, n, seed=settings.seed)
    if (count := settings.held_out_images) is not None:
        held_out = with_undrawn(labels, held_out, train, count, seed=settings.seed)
    statistics = normalized_as or data
    mean, std = statistics.mean, statistics.std
    if settings.method == "finetuned" and settings.student_weights is None:
        mean, std = (255 * torch.tensor(x) for x in published_statistics(settings.student))
    like = SmallImages(data.train, data.test, data.format, mean, std)

    def batches(images: Images, augmented: bool) -> Batches:
        augment = AUGMENTATIONS[settings.augmentation]
        return Batches(images, like, augmented=augmented, device=device, augment=augment)

    def part(indices: list[int], labels: Tensor) -> Images:
        return Images(data.train.pixels[indices], labels[indices])

    options = {"batch_size": settings.batch_size, "collate_fn": _whole}
    return Loaders(
        shuffled(batches(part(train, targets), True), settings, options),
        DataLoader(batches(part(held_out, data.train.labels), False), **options),
        DataLoader(batches(data.test, False), **options),
        classes=data.format.classes,
    )


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
