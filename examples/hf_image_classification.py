"""A large ResNet teaches a small one with Hugging Face's Trainer, with and without VID.

    python examples/hf_image_classification.py
    python examples/hf_image_classification.py --teacher path/to/resnet --images_per_class 10

Fashion-MNIST from Debian's `dataset-fashion-mnist` if it is installed, else scikit-learn's digits:
nothing is downloaded. A teacher learns from all training images, unless you name one; the student
learns from a few of each class. The two runs of it differ in the class of the trainer.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from vid_loss.integrations.hf import VIDTrainer

from vid_loss.subsets import images_per_class

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass
class Options:
    """What can be changed on the command line."""

    teacher: str | None = None
    """A ResNet image classifier to load instead of training one; its stages are the pairs."""
    images_per_class: int = 20
    """How many images of each class the student learns from."""
    teacher_steps: int = 200
    student_steps: int = 500
    output_dir: str = "hf-image-classification"
    seed: int = 0


class Images(Dataset[dict[str, Tensor]]):
    """Images (1, H, W) and their labels, as the Trainer takes them."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        scaled = torch.tensor(pixels).float().unsqueeze(1) / pixels.max()
        # The stem and the second stage make images eight times smaller: 24 leaves 3.
        self.pixels = F.interpolate(scaled, size=(24, 24), mode="bilinear") - 0.5
        self.labels = torch.tensor(labels).long()

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns the arguments of the model for one image."""
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def load_images() -> tuple[str, Images, Images]:
    """Returns the name of the data, a train set and a test set."""
    if FASHION.is_dir():
        # The first thousand test images were looked at when the settings were chosen.
        return "Fashion-MNIST", _fashion("train", 0, 6_000), _fashion("t10k", 1_000, 2_000)
    digits = load_digits()
    split = train_test_split(
        digits.images, digits.target, test_size=0.3, random_state=0, stratify=digits.target
    )
    return "digits", Images(split[0], split[2]), Images(split[1], split[3])


def _fashion(part: str, start: int, stop: int) -> Images:
    def read(name: str, header: int) -> np.ndarray:
        path = next(FASHION.glob(f"{part}-{name}*"))
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            return np.frombuffer(file.read()[header:], dtype=np.uint8)

    pixels = read("images", 16).reshape(-1, 28, 28)[start:stop]
    return Images(pixels, read("labels", 8)[start:stop])


def resnet(width: int, depth: int) -> PreTrainedModel:
    """Builds a ResNet of two stages for small grey images."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=width,
        hidden_sizes=[width, 2 * width],
        depths=[depth, depth],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def settings(options: Options, name: str, steps: int) -> TrainingArguments:
    """Returns the arguments of one of the three runs."""
    return TrainingArguments(
        output_dir=f"{options.output_dir}/{name}",
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=5e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=options.seed,
    )


def accuracy(trainer: Trainer) -> float:
    """Returns the percentage of the test set that is classified right."""
    prediction = trainer.predict(trainer.eval_dataset)
    return 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def main(options: Options) -> None:
    """Trains a teacher and a student twice, and prints the three accuracies."""
    name, train_set, test_set = load_images()
    set_seed(options.seed)
    if options.teacher:
        teacher = AutoModelForImageClassification.from_pretrained(options.teacher)
    else:
        teacher = resnet(width=24, depth=2)
        args = settings(options, "teacher", options.teacher_steps)
        trainer = Trainer(teacher, args, train_dataset=train_set, eval_dataset=test_set)
        trainer.train()
        print(f"teacher {accuracy(trainer):.1f} %, {name}, {len(train_set)} images")

    labels, count = train_set.labels, options.images_per_class
    few = Subset(train_set, images_per_class(labels, count, seed=options.seed))
    results = {}
    for method in ("student", "VID"):
        set_seed(options.seed)
        student = resnet(width=8, depth=1)
        args = settings(options, method, options.student_steps)
        if method == "student":
            trainer = Trainer(student, args, train_dataset=few, eval_dataset=test_set)
        else:
            stages = [f"resnet.encoder.stages.{stage}" for stage in (0, 1)]
            trainer = VIDTrainer(
                student,
                args,
                train_dataset=few,
                eval_dataset=test_set,
                teacher=teacher,
                pairs=dict(zip(stages, stages, strict=True)),
            )
        trainer.train()
        results[method] = accuracy(trainer)
    print(f"{name}, {options.images_per_class} images per class, {len(test_set)} test images")
    for method, percent in results.items():
        print(f"{method:8} {percent:.1f} %")


if __name__ == "__main__":
    main(HfArgumentParser(Options).parse_args_into_dataclasses()[0])
