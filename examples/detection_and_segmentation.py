"""A detector's FPN and a segmenter's stages, distilled: a few steps on random images, offline.

What to look at are the pairs, and where the three lines stand. The weights are random, so that
nothing is downloaded and nothing is learnt; the pages say which layers to pair, and why.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50

from vid_loss import Distiller, Pair, match_layers

CLASSES = 3
SIZE = 64


def detector(backbone: str) -> nn.Module:
    """Returns a Faster R-CNN with a feature pyramid, without pretrained weights."""
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    # One size, the same for student and teacher: each model resizes its images itself.
    return FasterRCNN(body, num_classes=CLASSES, min_size=SIZE, max_size=SIZE)


def boxed_images(steps: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yields batches of two images of different size, each with a box."""
    box = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    for _ in range(steps):
        yield [torch.rand(3, SIZE, SIZE), torch.rand(3, SIZE - 8, SIZE)], [box, box]


def train_detector(steps: int) -> None:
    """Pairs the levels of two feature pyramids, which have the same channels and sizes."""
    student, teacher = detector("resnet18"), detector("resnet34")
    levels = [f'backbone["{level}"]' for level in range(4)]
    pairs = [Pair(level, level, name=f"FPN level {i}") for i, level in enumerate(levels)]
    (images, _), *_ = boxed_images(1)
    # A list of images is one argument. Proposals and boxes of the teacher are of no use here.
    distiller = Distiller(student, teacher, pairs, example=(images,), stop_teacher=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    distiller.add_to(optimizer)
    for images, targets in boxed_images(steps):
        losses = student(images, targets)
        loss = sum(losses.values()) + distiller(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report("detection", loss, distiller)


def train_segmenter(steps: int) -> None:
    """Pairs the stages that matching finds, and the maps of logits."""
    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    student, teacher = deeplabv3_mobilenet_v3_large(**options), fcn_resnet50(**options)
    images, masks = torch.rand(2, 3, SIZE, SIZE), torch.randint(CLASSES, (2, SIZE, SIZE))
    matched = match_layers(student, teacher, images)
    print(matched)
    pairs = [*matched, Pair("classifier", "classifier", name="logits")]
    distiller = Distiller(student, teacher, pairs, example=images, stop_teacher=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    distiller.add_to(optimizer)
    for _ in range(steps):
        loss = F.cross_entropy(student(images)["out"], masks) + distiller(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report("segmentation", loss, distiller)


def report(task: str, loss: Tensor, distiller: Distiller) -> None:
    """Prints a step's loss and each pair's part of it."""
    terms = ", ".join(f"{name} {float(term):.3f}" for name, term in distiller.terms.items())
    print(f"{task}: loss {loss.item():.3f}; {terms}")


def main() -> None:
    """Trains both for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="steps of each (default: 2)")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_detector(args.steps)
    train_segmenter(args.steps)


if __name__ == "__main__":
    main()
