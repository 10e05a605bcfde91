"""The tasks of q_fit: who teaches whom from which few samples. No test data are read.

Each has a validation set that neither the teacher nor a student is trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paper.datasets.package_texts import SECTIONS, packaged_minilm, read_texts
from paper.datasets.small_image_loaders import Batches
from paper.datasets.small_images import read_small_images
from paper.models import build_model

Inputs = Mapping[str, Tensor]  # keyword arguments of the student and of the teacher
_VALIDATION_IMAGES = 2000
_VALIDATION_TEXTS = 1000
_LENGTH = 24  # in tokens; 99 % of the one-line descriptions are shorter


class Recipe(NamedTuple):
    """How a teacher is trained: AdamW, whose rate falls from lr to 0."""

    steps: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class Task:
    """A student, a teacher and their data.

    Args:
        student: makes a student that has not learnt the task.
        teacher: makes a teacher that has not learnt it either.
        pairs: (student, teacher) layers.
        inputs: makes the models' inputs of some samples; True augments them.
        augmented: whether it does that; if not, a teacher's features are computed once.
        labels: the class of each sample ``(N,)``, those for validation among them.
        validation: the indices of the samples for validation.
        per_class: how many samples of each class a student learns from.
        batch_size: of the student.
        steps: of the student.
        teaching: how the teacher is trained.
        max_grad_norm: where gradients are clipped; None is nowhere.
    """

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    pairs: tuple[tuple[str, str], ...]
    inputs: Callable[[Tensor, bool], Inputs]
    augmented: bool
    labels: Tensor
    validation: Tensor
    per_class: int
    batch_size: int
    steps: int
    teaching: Recipe
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class Places:
    """Where things are.

    Args:
        fashion: folder of Fashion-MNIST's idx files.
        minilm: folder of MiniLM's weights and tokenizer; None asks for its Python package.
        packages: output of ``apt-cache dumpavail``; None runs it.
        work: folder of what is kept: teachers and the texts.
    """

    fashion: Path
    minilm: Path | None
    packages: Path | None
    work: Path


def fashion_task(places: Places) -> Task:
    """WRN-16-2 teaches WRN-10-1 by three stages; 10 images per class, crops and flips."""
    data = read_small_images("fashion-mnist", places.fashion)
    cpu = torch.device("cpu")
    made = {x: Batches(data.train, data, augmented=x, device=cpu) for x in (False, True)}

    def inputs(chosen: Tensor, augmented: bool) -> Inputs:
        images, _ = made[augmented].__getitems__(chosen.tolist())
        return {"images": images}

    return Task(
        student=lambda: build_model("wrn-10-1-s2", 10),
        teacher=lambda: build_model("wrn-16-2-s2", 10),
        pairs=tuple((group, group) for group in ("group1", "group2", "group3")),
        inputs=inputs,
        augmented=True,
        labels=data.train.labels,
        validation=_some(len(data.train.labels), _VALIDATION_IMAGES),
        per_class=10,
        batch_size=50,
        steps=400,
        teaching=Recipe(steps=1000, batch_size=100, lr=3e-3),
    )


def digits_task(places: Places) -> Task:
    """The quickstart's networks, layers and augmentation; 5 images per class."""
    from quickstart import VID, DigitNet, augment, load

    train, validation, _ = load()
    images, labels = (torch.cat(x) for x in zip(train.tensors, validation.tensors, strict=True))

    def inputs(chosen: Tensor, augmented: bool) -> Inputs:
        return {"images": augment(images[chosen]) if augmented else images[chosen]}

    return Task(
        student=lambda: DigitNet(width=12, depth=2),
        teacher=lambda: DigitNet(width=32, depth=2),
        pairs=tuple((pair.student, pair.teacher) for pair in VID),
        inputs=inputs,
        augmented=True,
        labels=labels,
        validation=torch.arange(len(train), len(labels)),
        per_class=5,
        batch_size=50,
        steps=600,
        teaching=Recipe(steps=400, batch_size=50, lr=3e-3),
    )


def text_task(places: Places) -> Task:
    """MiniLM, fine-tuned, teaches its own first two layers the sections of Debian's packages.

    30 descriptions per class. The student's embeddings stay as they are: three quarters of its
    weights, and most of the optimizer's time. Gradients are clipped as by the Trainer.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new classifier, and layers that two do not need, are meant
    minilm = places.minilm or packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts, sections = zip(*read_texts(places.work / "packages.json", places.packages), strict=True)

    def model(**changes: int) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            minilm, num_labels=len(SECTIONS), **changes
        )

    def student() -> nn.Module:
        first_layers = model(num_hidden_layers=2)
        first_layers.bert.embeddings.requires_grad_(False)
        return first_layers

    def inputs(chosen: Tensor, augmented: bool) -> Inputs:
        some = [texts[i] for i in chosen.tolist()]
        options = {"padding": "max_length", "truncation": True, "max_length": _LENGTH}
        encoded: Inputs = tokenizer(some, **options, return_tensors="pt").data
        return encoded

    layer = "bert.encoder.layer."
    return Task(
        student=student,
        teacher=model,
        pairs=((layer + "0", layer + "2"), (layer + "1", layer + "5")),
        inputs=inputs,
        augmented=False,
        labels=torch.tensor([SECTIONS.index(section) for section in sections]),
        validation=_some(len(texts), _VALIDATION_TEXTS),
        per_class=30,
        batch_size=8,
        steps=300,
        teaching=Recipe(steps=100, batch_size=16, lr=5e-5),
        max_grad_norm=1.0,
    )


TASKS: dict[str, Callable[[Places], Task]] = {
    "fashion-mnist": fashion_task,
    "digits": digits_task,
    "minilm": text_task,
}


def _some(total: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[:count].sort().values
