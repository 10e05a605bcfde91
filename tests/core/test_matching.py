import dataclasses
import logging

import pytest
import torch
from _architectures import VGG9, WRN
from torch import nn

from vid_loss import Distiller, Pair, match_layers
from vid_loss.matching import TokensToGrid

pytestmark = pytest.mark.usefixtures("seed")


def names(pairs):
    return {pair.student: pair.teacher for pair in pairs}


def train_two_steps(student, teacher, pairs, example, **options):
    """Trains on the pairs alone; every parameter of a head must have moved."""
    distiller = Distiller(student, teacher, pairs, example=example, **options)
    heads = [parameter.detach().clone() for parameter in distiller.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=1e-3)
    call = example if isinstance(example, dict) else {}
    args = () if call else (example,)
    for _ in range(2):
        student.train()
        student(*args, **call)
        loss = distiller(*args, **call)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(heads, distiller.parameters(), strict=True))


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
STAGES = {f"layer{i}": f"layer{i}" for i in range(1, 5)}


def resnet(depth):
    timm = pytest.importorskip("timm")
    size = {"channels": (4, 4, 8, 8), "stem_width": 4}
    return timm.create_model(f"resnet{depth}", num_classes=10, **size)


def vit(depth, embed_dim, image=64, **options):
    timm = pytest.importorskip("timm")
    name, size = "vit_tiny_patch16_224", {"embed_dim": embed_dim, "depth": depth, "num_heads": 2}
    return timm.create_model(name, img_size=image, num_classes=10, **size, **options)


def swin():
    timm = pytest.importorskip("timm")
    size = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 2, "img_size": 64}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **size)


def bert(depth, width):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=width,
        vocab_size=30,
    )
    return transformers.BertForSequenceClassification(config)


def test_resnet34_to_resnet18_pairs_the_four_stages():
    student, teacher = resnet(18), resnet(34)
    pairs = match_layers(student, teacher, IMAGES)
    assert names(pairs) == STAGES
    train_two_steps(student, teacher, pairs, IMAGES)


def test_resnet34_to_vgg9_pairs_stages_with_the_pooling_of_their_size():
    student, teacher = VGG9(), resnet(34)
    pairs = match_layers(student, teacher, IMAGES)
    # Pooling to 32 x 32 (features.2) has no stage of its size in the teacher, whose stem has it.
    pools = [f"features.{i}" for i, m in enumerate(student.features) if type(m) is nn.MaxPool2d]
    assert names(pairs) == dict(zip(pools[1:], STAGES, strict=True))
    train_two_steps(student, teacher, pairs, IMAGES)


def test_wrn_40_2_to_wrn_16_1_pairs_the_ends_of_the_groups():
    student, teacher = WRN(16, 1), WRN(40, 2)
    images = IMAGES[..., :32, :32]
    pairs = match_layers(student, teacher, images)
    assert names(pairs) == {f"group{i}": f"group{i}" for i in (1, 2, 3)}
    train_two_steps(student, teacher, pairs, images)


def test_vits_are_paired_at_equal_relative_depth():
    student, teacher = vit(6, 8), vit(12, 16)
    pairs = match_layers(student, teacher, IMAGES, max_pairs=3)
    assert names(pairs) == {"blocks.1": "blocks.3", "blocks.3": "blocks.7", "blocks.5": "blocks.11"}
    assert all(pair.student_transform is pair.teacher_transform is None for pair in pairs)
    train_two_steps(student, teacher, pairs, IMAGES)


def test_swin_to_resnet_says_where_the_channels_are():
    student, teacher = resnet(18), swin()
    pairs = match_layers(student, teacher, IMAGES)
    assert names(pairs) == {f"layer{i + 1}": f"layers.{i}" for i in range(4)}
    assert {pair.channel_dim for pair in pairs} == {(None, -1)}
    train_two_steps(student, teacher, pairs, IMAGES)


def test_bert_is_paired_at_equal_relative_depth():
    student, teacher = bert(4, 8), bert(12, 16)
    text = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}
    pairs = match_layers(student, teacher, text)
    layer = "bert.encoder.layer.{}".format
    assert names(pairs) == {layer(i): layer(3 * i + 2) for i in range(4)}
    train_two_steps(student, teacher, pairs, text)


@pytest.mark.parametrize("cnn_is_student", [True, False])
def test_a_cnn_and_a_vit_meet_as_maps(cnn_is_student):
    models = [resnet(18), vit(12, 8, reg_tokens=4)]
    student, teacher = models if cnn_is_student else models[::-1]
    pairs = match_layers(student, teacher, IMAGES)
    blocks = ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    layers = list(STAGES)
    ends = (layers, blocks) if cnn_is_student else (blocks, layers)
    assert names(pairs) == dict(zip(*ends, strict=True))
    transforms = [(pair.student_transform, pair.teacher_transform) for pair in pairs]
    grid = TokensToGrid(leading=5, height=4, width=4)  # a class token and four registers
    assert set(transforms) == {(None, grid) if cnn_is_student else (grid, None)}
    train_two_steps(student, teacher, pairs, IMAGES)


def test_vits_of_other_patch_sizes_meet_as_maps():
    student, teacher = vit(2, 8), vit(2, 16, patch_size=8)
    pairs = match_layers(student, teacher, IMAGES)
    assert pairs[0].student_transform == TokensToGrid(1, 4, 4)
    assert pairs[0].teacher_transform == TokensToGrid(1, 8, 8)
    train_two_steps(student, teacher, pairs, IMAGES)


def test_a_grid_has_the_aspect_ratio_of_the_image():
    wide = vit(2, 8, image=(16, 64))
    pairs = match_layers(vit(2, 8), wide, IMAGES, teacher_inputs=lambda x: x[:, :, :16])
    assert pairs[0].teacher_transform == TokensToGrid(1, 1, 4)


def test_stages_without_a_common_resolution_are_paired_by_depth():
    student, teacher = WRN(16, 1), resnet(34)

    def enlarge(images):
        return nn.functional.interpolate(images, scale_factor=3.0)

    images = IMAGES[..., :32, :32]
    pairs = match_layers(student, teacher, images, teacher_inputs=enlarge)
    assert names(pairs) == {"group1": "layer1", "group2": "layer3", "group3": "layer4"}
    train_two_steps(student, teacher, pairs, images, teacher_inputs=enlarge)


def test_one_resolution_in_common_is_too_little():
    # 32, 16, 8 and 8, 4, 2: the student's last stage is not the teacher's first.
    pairs = match_layers(WRN(16, 1), resnet(34), IMAGES[..., :32, :32])
    assert names(pairs) == {"group1": "layer1", "group2": "layer2", "group3": "layer3"}


def test_resolutions_that_rounded_differently_still_meet():
    # Pooling rounds 75 down, 37, 18, ...; strided convolutions round it up, 38, 19, ...
    images = torch.randn(2, 3, 75, 100)
    pairs = match_layers(VGG9(), resnet(34), images)
    assert [pair.teacher for pair in pairs] == list(STAGES)
    assert "stages end at 18 x 25 and 19 x 25" in repr(pairs)


def test_models_without_stages_learn_the_logits():
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    teacher = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7))
    pairs = match_layers(student, teacher, torch.zeros(2, 4))
    assert pairs == [Pair("2:input", "2")]
    train_two_steps(student, teacher, pairs, torch.randn(8, 4))


def test_the_deepest_stages_are_taken_of_more():
    student, teacher = resnet(18), resnet(34)
    pairs = match_layers(student, teacher, IMAGES, max_pairs=2)
    assert names(pairs) == {"layer3": "layer3", "layer4": "layer4"}


class ChangesInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(nn.functional.relu_(self.bn(self.conv(x))).mean((2, 3)))


def test_a_layer_that_is_changed_in_place_is_not_chosen():
    student, teacher = ChangesInPlace(), ChangesInPlace()
    pairs = match_layers(student, teacher, IMAGES)
    assert names(pairs) == {"conv": "conv"}
    train_two_steps(student, teacher, pairs, IMAGES)


def test_a_stem_is_no_stage_where_there_are_blocks():
    def model():
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()) for _ in range(2)]
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *blocks)

    assert names(match_layers(model(), model(), IMAGES)) == {"1": "1", "2": "2"}


def test_each_choice_is_explained_in_one_line_and_logged(caplog):
    with caplog.at_level(logging.INFO, logger="vid_loss"):
        pairs = match_layers(WRN(16, 1), WRN(40, 2), IMAGES)
    assert repr(pairs).splitlines() == [
        "group1->group1: stages end at 64 x 64",
        "group2->group2: stages end at 32 x 32",
        "group3->group3: stages end at 16 x 16",
    ]
    assert caplog.messages == repr(pairs).splitlines()


def test_the_list_prints_what_it_holds_after_it_was_changed():
    pairs = match_layers(WRN(16, 1), WRN(40, 2), IMAGES)
    pairs[0] = dataclasses.replace(pairs[0], weight=10.0, name="first")
    del pairs[1]
    pairs.insert(0, Pair("conv", "conv"))
    assert repr(pairs).splitlines() == [
        "conv->conv: added by hand",
        "first: stages end at 64 x 64",
        "group3->group3: stages end at 16 x 16",
    ]


def test_models_that_have_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match=r"got none\. Choose the pairs yourself"):
        match_layers(nn.ReLU(), nn.Tanh(), torch.zeros(2, 4))


def test_fewer_than_one_pair_is_refused():
    with pytest.raises(ValueError, match="max_pairs: expected 1 or more; got 0"):
        match_layers(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(1, 2), max_pairs=0)


def faster_rcnn(backbone):
    detection = pytest.importorskip("torchvision").models.detection
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name=backbone, weights=None)
    return detection.FasterRCNN(body, num_classes=3, min_size=64, max_size=96)


def test_the_backbones_of_two_detectors_are_paired():
    student, teacher = faster_rcnn("resnet18"), faster_rcnn("resnet34")
    pictures = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    pairs = match_layers(student, teacher, (pictures,))
    body = [f"backbone.body.{layer}" for layer in STAGES]
    assert names(pairs) == dict(zip(body, body, strict=True))
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
    transformers = pytest.importorskip("transformers")

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


class SignalNet(nn.Module):
    """Convolutions over time; the features are (N, C, L)."""

    def __init__(self, width, blocks):
        super().__init__()
        self.stem = nn.Conv1d(2, width, 5, 2, 2)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(width, width, 3, stride, 1), nn.BatchNorm1d(width))
                for stride in (1, 2, 2)
                for _ in range(blocks)
            )
        )
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.stages(self.stem(x).relu()).mean(2))


@pytest.mark.parametrize("widths", [(8, 16), (16, 16), (20, 20)])  # at 20, C is also a length
def test_signals_are_paired_with_their_channels_second(widths):
    student, teacher = SignalNet(widths[0], 1), SignalNet(widths[1], 2)
    signals = torch.randn(4, 2, 40)
    pairs = match_layers(student, teacher, signals)
    assert len(pairs) > 1
    assert {pair.channel_dim for pair in pairs} == {(1, 1)}
    distiller = Distiller(student, teacher, pairs, example=signals)
    assert all(loss.teacher_channels == widths[1] for loss in distiller.losses.values())
    train_two_steps(student, teacher, pairs, signals)


class Recurrent(nn.Module):
    """Two layers over (L, N, C); its last state is (2, N, C)."""

    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(2, width, num_layers=2)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.rnn(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_state_of_a_recurrent_layer_is_not_taken_for_tokens(batch):
    student, teacher, x = Recurrent(4), Recurrent(8), torch.randn(batch, 5, 2)
    pairs = match_layers(student, teacher, x)
    assert names(pairs) == {"fc:input": "fc"}
    Distiller(student, teacher, pairs, example=x)


class SequenceFirst(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(5, width)
        layer = nn.TransformerEncoderLayer(width, 2, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.encoder(self.project(x).transpose(0, 1)).mean(0))


def test_tokens_whose_batch_is_not_first_are_not_chosen():
    x = torch.randn(1, 9, 5)
    pairs = match_layers(SequenceFirst(4), SequenceFirst(8), x)
    assert not any("encoder" in pair.student for pair in pairs)
    Distiller(SequenceFirst(4), SequenceFirst(8), pairs, example=x)


def test_tokens_of_other_lengths_do_not_fit_and_are_not_chosen():
    student, teacher = bert(2, 8), bert(3, 16)
    text = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}

    def shorter(input_ids, attention_mask):
        return {"input_ids": input_ids[:, :4], "attention_mask": attention_mask[:, :4]}

    pairs = match_layers(student, teacher, text, teacher_inputs=shorter)
    assert [pair.student for pair in pairs] == ["classifier:input"]
    Distiller(student, teacher, pairs, example=text, teacher_inputs=shorter)


def test_stages_of_another_batch_do_not_fit_and_are_not_chosen():
    def two_views(images):
        return torch.cat([images, images.flip(3)])

    with pytest.raises(ValueError, match="fit together; got none"):
        match_layers(resnet(18), resnet(34), IMAGES, teacher_inputs=two_views)
