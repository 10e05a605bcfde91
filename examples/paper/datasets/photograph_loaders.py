"""Batches of images in files: cropped and flipped for training, normalized as ImageNet's."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from paper.settings import Settings
from paper.weights import IMAGENET_MEAN, IMAGENET_STD

from .loaders import Loaders, shuffled
from .photographs import ImageFiles, ImageList
from .splits import train_and_validation, with_undrawn

_NORMALIZE = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)


def photograph_loaders(
    settings: Settings, train_images: ImageList, test_images: ImageList
) -> Loaders:
    """Draws a student's images and holds a part of them out for validation."""
    augmented = ImageFiles(train_images, augmentation(settings.image_size))
    plain = ImageFiles(train_images, preparation(settings.image_size))
    test = ImageFiles(test_images, preparation(settings.image_size))
    chosen, held_out = train_and_validation(
        train_images.labels, settings.images_per_class, seed=settings.seed
    )
    if (count := settings.held_out_images) is not None:
        held_out = with_undrawn(train_images.labels, held_out, chosen, count, seed=settings.seed)
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "num_workers": settings.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    return Loaders(
        shuffled(Subset(augmented, chosen), settings, options),
        DataLoader(Subset(plain, held_out), **options),
        DataLoader(test, **options),
        classes=1 + max(train_images.labels),
    )


def augmentation(size: int) -> transforms.Compose:
    """Returns what is done to a training image: photographs are cropped and flipped.

    Small images, which may be digits, are shifted by up to an eighth.
    """
    if size < 64:
        random = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)]
    else:
        random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*random, transforms.ToTensor(), _NORMALIZE])


def preparation(size: int) -> transforms.Compose:
    """Returns what is done to an image of the validation or the test data."""
    if size < 64:
        resized = [transforms.Resize((size, size))]
    else:
        resized = [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    return transforms.Compose([*resized, transforms.ToTensor(), _NORMALIZE])
