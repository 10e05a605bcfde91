"""What match_layers does not pair although it could: frozen layers and other parts, and says so."""

import logging
import warnings

import pytest
import torch
from _architectures import WRN
from _matching import IMAGES, STAGES, bert, names, resnet, swin, train_two_steps, vit
from torch import nn

from vid_loss import Distiller, match_layers

pytestmark = pytest.mark.usefixtures("seed")
TEXT = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}
BERT_LAYER = "bert.encoder.layer.{}".format


def freeze(model, *layers):
    for layer in layers:
        model.get_submodule(layer).requires_grad_(False)
    return model


def frozen(*pairs):
    return [
        f"{pair}, as nothing in or before the student's {pair.split('->')[0]} is trained"
        for pair in pairs
    ]


# A student and its frozen layers, a teacher, an example, and the student's layers that are left.
FROZEN = {
    "a stem and two stages": (
        lambda: freeze(resnet(18), "conv1", "bn1", "layer1", "layer2"),
        lambda: resnet(34),
        IMAGES,
        ["layer3", "layer4"],
        frozen("layer1->layer1", "layer2->layer2"),
    ),
    "half of the blocks of a ViT": (
        lambda: freeze(vit(4, 8), "patch_embed", "blocks.0", "blocks.1"),
        lambda: vit(4, 16),
        IMAGES,
        ["blocks.2", "blocks.3"],
        frozen("blocks.0->blocks.0", "blocks.1->blocks.1"),
    ),
    "words and a block of BERT": (
        lambda: freeze(bert(3, 8), "bert.embeddings", BERT_LAYER(0)),
        lambda: bert(3, 16),
        TEXT,
        [BERT_LAYER(1), BERT_LAYER(2)],
        frozen(f"{BERT_LAYER(0)}->{BERT_LAYER(0)}"),
    ),
}


@pytest.mark.parametrize(
    ("student", "teacher", "example", "left", "said"), FROZEN.values(), ids=FROZEN
)
def test_frozen_first_layers_are_left_out_and_said(student, teacher, example, left, said, caplog):
    student, teacher = student(), teacher()
    if hasattr(student, "cls_token"):
        student.cls_token.requires_grad_(False)
        student.pos_embed.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="vid_loss"):
        pairs = match_layers(student, teacher, example)
    assert [pair.student for pair in pairs] == left
    assert pairs.left_out == said
    assert repr(pairs).splitlines()[len(left) :] == [f"left out: {what}" for what in said]
    assert caplog.messages == repr(pairs).splitlines()
    train_two_steps(student, teacher, pairs, example)  # in which nothing is warned of


@pytest.mark.parametrize(
    "layers", [["conv1", "bn1"], ["layer2"], ["layer3", "layer4", "fc"]], ids=str
)
def test_a_frozen_layer_with_something_trained_in_or_before_it_is_paired(layers):
    student = freeze(resnet(18), *layers)
    pairs = match_layers(student, resnet(34), IMAGES)
    assert names(pairs) == STAGES
    assert pairs.left_out == []
    train_two_steps(student, resnet(34), pairs, IMAGES)


@pytest.mark.parametrize("trained", ["fc", None])
def test_where_nothing_else_is_left_frozen_layers_are_paired(trained):
    """A classifier that is trained alone, or a student that is to be unfrozen later."""
    student = resnet(18).requires_grad_(False)
    if trained:
        student.get_submodule(trained).requires_grad_(True)
    pairs = match_layers(student, resnet(34), IMAGES)
    assert names(pairs) == STAGES
    assert pairs.left_out == []


def test_looking_for_what_is_frozen_leaves_no_traces():
    student = freeze(resnet(18), "conv1", "bn1", "layer1")
    before = {name: x.clone() for name, x in student.state_dict().items()}
    match_layers(student, resnet(34), IMAGES)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert all(module.training and not module._forward_hooks for module in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())


class Two(nn.Module):
    """Two parts, called one after the other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, first, second):
        return self.first(first).mean(), self.second(second).mean()


class Captioner(nn.Module):
    """Blocks of words after the stages of an image."""

    def __init__(self, width, depth):
        super().__init__()
        self.cnn, self.embed = WRN(10, 1), nn.Embedding(9, width)
        blocks = [nn.TransformerEncoderLayer(width, 2, width) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images, words):
        return self.cnn(images), self.blocks(self.embed(words))


def transformers_model(name, config, **options):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def clip(width, depth):
    size = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": depth}
    size["num_attention_heads"] = 2
    words = {"vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2}
    return transformers_model(
        "CLIPModel",
        "CLIPConfig",
        text_config={**size, **words},
        vision_config={**size, "image_size": 64, "patch_size": 16},
        projection_dim=4,
    )


def t5(width, depth):
    size = {"d_model": width, "d_kv": 4, "d_ff": width, "num_heads": 2, "vocab_size": 30}
    return transformers_model("T5Model", "T5Config", num_layers=depth, **size)


WORDS = torch.arange(12).view(2, 6) % 9
# What builds a model of a width and a depth, an example, what is paired, and what is left out.
PARTS = {
    "words beside images": (
        clip,
        {"input_ids": WORDS + 3, "pixel_values": IMAGES, "attention_mask": torch.ones(2, 6)},
        "vision_model.encoder.layers.",
        "text_model.encoder.layers.0 to text_model.encoder.layers.{}",
    ),
    "an encoder beside its decoder": (
        t5,
        {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :5]},
        "decoder.block.",
        "encoder.block.0[0] to encoder.block.{}[0]",
    ),
    "two towers of stages": (
        lambda width, depth: Two(resnet(18), resnet(18)),
        (IMAGES, IMAGES),
        "second.layer",
        "first.layer1 to first.layer4",
    ),
    "stages beside blocks": (
        lambda width, depth: Two(resnet(18), vit(depth + 2, 16)),
        (IMAGES, IMAGES),
        "second.blocks.",
        "first.layer1 to first.layer4",
    ),
    "blocks behind stages": (
        lambda width, depth: Captioner(width, depth),
        (IMAGES[..., :32, :32], WORDS),
        "cnn.group",
        "blocks.0 to blocks.{}",
    ),
}


@pytest.mark.parametrize(("build", "example", "paired", "left"), PARTS.values(), ids=PARTS)
def test_another_part_is_left_out_and_said(build, example, paired, left):
    student, teacher = build(8, 2), build(16, 4)
    pairs = match_layers(student, teacher, example)
    assert all(pair.student.startswith(paired) for pair in pairs)
    assert pairs.left_out == [
        f"{left.format(1)} of the student, another part",
        f"{left.format(3)} of the teacher, another part",
    ]
    Distiller(student, teacher, pairs, example=example)


def test_nothing_is_said_of_a_model_of_one_part():
    cases = [
        (resnet(18), resnet(34), IMAGES),
        (resnet(18), swin(), IMAGES),
        (vit(2, 8), vit(4, 16), IMAGES),
        (bert(2, 8), bert(4, 16), TEXT),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for student, teacher, example in cases:
            assert match_layers(student, teacher, example).left_out == []
