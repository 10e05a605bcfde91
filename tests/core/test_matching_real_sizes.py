"""What match_layers says to models as they are used, with random weights, and a step with it."""

import pytest
import torch
from paper.models import VGG9, WideResNet

from vid_loss import Distiller, match_layers
from vid_loss.matching import TokensToGrid

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")
from _real_models import bert, distilbert, gpt2, llama, roberta, timm_model, torchvision_model

SMALL = (1, 3, 32, 32)
LARGE = (1, 3, 224, 224)
STAGES = [f"layer{i}" for i in range(1, 5)]
QUARTERS = (2, 5, 8, 11)  # of 12 blocks, counted from 0


def named(pattern, numbers):
    return [pattern.format(number) for number in numbers]


def case(name, student, teacher, shape, student_layers, teacher_layers, **options):
    options = {"channel_dim": None, "grids": (None, None), **options}
    pairs = dict(zip(student_layers, teacher_layers, strict=True))
    return pytest.param(student, teacher, shape, pairs, *options.values(), id=name)


GRID = TokensToGrid(1, 14, 14)
RESNET18 = timm_model("resnet18")
BERT_LAYER = "bert.encoder.layer.{}"
TEXT = (1, 16)
CASES = [
    # The paper's: ends of groups of residual blocks, max-poolings of a VGG.
    case(
        "resnet34 -> resnet18",
        torchvision_model("resnet18"),
        torchvision_model("resnet34"),
        LARGE,
        STAGES,
        STAGES,
    ),
    case(
        "resnet34 -> vgg9",
        lambda: VGG9(10),
        torchvision_model("resnet34"),
        LARGE,
        named("stage{}", range(2, 6)),
        STAGES,
    ),
    case(
        "wrn-40-2 -> wrn-16-1",
        lambda: WideResNet(16, 1, 10),
        lambda: WideResNet(40, 2, 10),
        SMALL,
        named("group{}", range(1, 4)),
        named("group{}", range(1, 4)),
    ),
    case(
        "resnet50 -> mobilenetv3",
        torchvision_model("mobilenet_v3_small"),
        torchvision_model("resnet50"),
        LARGE,
        named("features.{}", (1, 3, 8, 12)),
        STAGES,
    ),
    case(
        "efficientnet -> resnet18",
        RESNET18,
        timm_model("efficientnet_b0"),
        LARGE,
        STAGES,
        named("blocks.{}", (1, 2, 4, 6)),
    ),
    case(
        "convnext -> resnet18",
        RESNET18,
        timm_model("convnext_tiny"),
        LARGE,
        STAGES,
        named("stages.{}", range(4)),
    ),
    case(
        "swin -> resnet18",
        RESNET18,
        timm_model("swin_tiny_patch4_window7_224"),
        LARGE,
        STAGES,
        named("layers.{}", range(4)),
        channel_dim=(None, -1),
    ),
    # The table of its window's positions, 15 x 15, is larger than its last stage, 8 x 8.
    case(
        "swin 2 -> resnet18",
        RESNET18,
        timm_model("swinv2_tiny_window8_256"),
        (1, 3, 256, 256),
        STAGES,
        named("layers.{}", range(4)),
        channel_dim=(None, -1),
    ),
    # Its attention looks at a reduced map inside a stage.
    case(
        "pvt -> resnet18",
        RESNET18,
        timm_model("pvt_v2_b0"),
        LARGE,
        STAGES,
        named("stages.{}", range(4)),
    ),
    case(
        "vit_base -> vit_tiny",
        timm_model("vit_tiny_patch16_224"),
        timm_model("vit_base_patch16_224"),
        LARGE,
        named("blocks.{}", QUARTERS),
        named("blocks.{}", QUARTERS),
    ),
    case(
        "deit, one token more -> vit",
        timm_model("vit_tiny_patch16_224"),
        timm_model("deit_small_distilled_patch16_224"),
        LARGE,
        named("blocks.{}", QUARTERS),
        named("blocks.{}", QUARTERS),
        grids=(GRID, TokensToGrid(2, 14, 14)),
    ),
    case(
        "resnet50 -> vit",
        timm_model("vit_tiny_patch16_224"),
        timm_model("resnet50"),
        LARGE,
        named("blocks.{}", QUARTERS),
        STAGES,
        grids=(GRID, None),
    ),
    case(
        "bert-base -> 4 layers",
        bert(4, 768),
        bert(12, 768),
        TEXT,
        named(BERT_LAYER, range(4)),
        named(BERT_LAYER, QUARTERS),
    ),
    # The words of these students outweigh their blocks.
    case(
        "bert-base -> bert-tiny",
        bert(2, 128),
        bert(12, 768),
        TEXT,
        named(BERT_LAYER, range(2)),
        named(BERT_LAYER, (5, 11)),
    ),
    case(
        "roberta-base -> 4 layers",
        roberta(4),
        roberta(12),
        TEXT,
        named("roberta.encoder.layer.{}", range(4)),
        named("roberta.encoder.layer.{}", QUARTERS),
    ),
    case(
        "bert-base -> distilbert",
        distilbert(6),
        bert(12, 768),
        TEXT,
        named("distilbert.transformer.layer.{}", (1, 2, 4, 5)),
        named(BERT_LAYER, (3, 5, 9, 11)),
    ),
    case(
        "gpt2 -> 3 layers",
        gpt2(3),
        gpt2(12),
        TEXT,
        named("transformer.h.{}", range(3)),
        named("transformer.h.{}", (3, 7, 11)),
    ),
    case(
        "llama -> 4 layers",
        llama(4, 128),
        llama(16, 256),
        TEXT,
        named("model.layers.{}", range(4)),
        named("model.layers.{}", (3, 7, 11, 15)),
    ),
]


@pytest.mark.parametrize(("student", "teacher", "shape", "expected", "channel_dim", "grids"), CASES)
def test_the_pairs_are_the_expected_ones_and_train(
    student, teacher, shape, expected, channel_dim, grids
):
    torch.manual_seed(0)
    student, teacher = student(), teacher()
    if len(shape) == 2:
        example = {
            "input_ids": torch.randint(5, 900, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    else:
        example = {"x": torch.randn(shape)}
    args = tuple(example.values()) if len(shape) == 4 else ()
    kwargs = example if len(shape) == 2 else {}

    pairs = match_layers(student, teacher, kwargs or args)
    assert {pair.student: pair.teacher for pair in pairs} == expected
    assert {pair.channel_dim for pair in pairs} == {channel_dim}
    assert {(pair.student_transform, pair.teacher_transform) for pair in pairs} == {grids}

    distiller = Distiller(student, teacher, pairs, example=kwargs or args)
    student.train()
    student(*args, **kwargs)
    loss = distiller(*args, **kwargs)
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def test_a_model_of_one_block_and_many_words_is_paired_by_its_block():
    tiny, base = bert(1, 128)().bert, bert(3, 128)().bert
    pairs = match_layers(tiny, base, torch.arange(6)[None])
    assert [(pair.student, pair.teacher) for pair in pairs] == [("encoder", "encoder.layer.2")]
