import dataclasses
import logging

import pytest
import torch
from _architectures import VGG9, WRN
from _matching import IMAGES, STAGES, bert, names, resnet, swin, train_two_steps, vit
from torch import nn

from vid_loss import Pair, match_layers
from vid_loss.matching import TokensToGrid

pytestmark = pytest.mark.usefixtures("seed")


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
