"""Detectors, segmenters and models of images and words: their backbones are paired."""

import pytest
import torch
from _matching import IMAGES, STAGES, names, resnet
from torch import nn

from vid_loss import Distiller, match_layers

pytestmark = pytest.mark.usefixtures("seed")


def faster_rcnn(backbone):
    detection = pytest.importorskip("torchvision").models.detection
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name=backbone, weights=None)
    return detection.FasterRCNN(body, num_classes=3, min_size=64, max_size=96)


def test_the_backbones_of_two_detectors_are_paired():
    student, teacher = faster_rcnn("resnet18"), faster_rcnn("resnet34")
    pictures = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    pairs = match_layers(student, teacher, (pictures,))
    body = [f"backbone.body.{layer}" for layer in STAGES]
    # torchvision freezes the stem and the first stage of a detector's backbone.
    assert names(pairs) == dict(zip(body[1:], body[1:], strict=True))
    assert pairs.left_out[0].startswith(f"{body[0]}->{body[0]}, as nothing in or before")
    # One picture is enough; and a plain student meets the backbone of a detector.
    assert names(match_layers(student, teacher, (pictures[:1],))) == names(pairs)
    plain = match_layers(
        resnet(18), teacher, IMAGES[:1], teacher_inputs=lambda images: (list(images),)
    )
    assert names(plain) == dict(zip(STAGES, body, strict=True))
    distiller = Distiller(student, teacher, pairs, example=(pictures,))
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = student(pictures, [target, target])
    (sum(losses.values()) + distiller(pictures)).backward()


def test_the_backbones_of_two_segmenters_are_paired():
    segmentation = pytest.importorskip("torchvision").models.segmentation

    def build(name):
        options = {"weights": None, "weights_backbone": None, "num_classes": 3, "aux_loss": True}
        return getattr(segmentation, name)(**options)

    pairs = match_layers(build("fcn_resnet50"), build("deeplabv3_resnet50"), IMAGES)
    # Dilated: the last three stages have one resolution.
    ends = ["backbone.layer1", "backbone.layer4"]
    assert names(pairs) == dict(zip(ends, ends, strict=True))


class ImagesAndWords(nn.Module):
    """Its images come in a dict, and its other part holds more weights."""

    def __init__(self, depth):
        super().__init__()
        self.image = resnet(depth)
        self.words = nn.Sequential(nn.Embedding(9, 64), *(nn.Linear(64, 64) for _ in range(5)))

    def forward(self, batch):
        return self.image(batch["images"]), self.words(batch["words"])


def test_a_backbone_is_found_by_what_it_does():
    batch = {"images": IMAGES, "words": torch.arange(6).view(2, 3)}
    pairs = match_layers(ImagesAndWords(18), ImagesAndWords(34), (batch,))
    assert names(pairs) == {f"image.{layer}": f"image.{layer}" for layer in STAGES}


def test_a_first_stage_that_takes_the_image_is_no_backbone():
    # Before, the stages' maps are made between modules, and only blocks of tokens can be paired.
    transformers = pytest.importorskip("transformers", minversion="5")

    def segformer(widths):
        config = transformers.SegformerConfig(
            hidden_sizes=widths, num_labels=3, decoder_hidden_size=8
        )
        return transformers.SegformerForSemanticSegmentation(config)

    student, teacher = segformer([8, 8, 10, 16]), segformer([16, 16, 20, 32])
    pairs = match_layers(student, teacher, {"pixel_values": IMAGES})
    stages = [pair.student.split("stages.")[1][0] for pair in pairs]
    assert stages == ["0", "1", "2", "3"]
    Distiller(student, teacher, pairs, example={"pixel_values": IMAGES})
