import pytest
import torch

from vid_loss import Distiller, Pair

timm = pytest.importorskip("timm")

from vid_loss.integrations.timm._layers import (  # noqa: E402  # after the skip
    channel_dim,
    match_by_reduction,
    resolve_pairs,
)


def _layers(pairs):
    return [(pair.student, pair.teacher) for pair in pairs]


def _swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        window_size=7,
        embed_dim=8,
        depths=(1, 1, 1),
        num_heads=(1, 1, 2),
        num_classes=3,
    )


def test_stages_of_equal_reduction_are_paired():
    pairs = match_by_reduction(timm.create_model("test_resnet"), timm.create_model("test_convnext"))
    assert _layers(pairs) == [(f"layer{i + 1}", f"stages.{i}") for i in range(4)]


def test_blocks_of_one_reduction_are_spread_over_the_depth():
    pairs = match_by_reduction(timm.create_model("test_vit"), timm.create_model("test_vit2"))
    students, teachers = zip(*_layers(pairs), strict=True)
    assert students == ("blocks.0", "blocks.2", "blocks.3", "blocks.5")  # of 6
    assert teachers == ("blocks.1", "blocks.3", "blocks.5", "blocks.7")  # of 8


def test_models_without_a_common_reduction_are_refused():
    student, teacher = timm.create_model("test_resnet"), timm.create_model("test_vit")
    teacher.feature_info = [{"module": "blocks.0", "reduction": 14, "num_chs": 64}]
    with pytest.raises(ValueError, match=r"layers of one reduction; got .*Name the pairs"):
        match_by_reduction(student, teacher)
    with pytest.raises(ValueError, match="a student with timm's feature_info; got Linear"):
        match_by_reduction(torch.nn.Linear(1, 1), teacher)


@pytest.mark.parametrize(
    ("name", "layer", "shape", "expected"),
    [
        ("test_resnet", "layer2", (1, 48, 4, 4), 1),
        ("test_convnext", "stages.1", (1, 32, 8, 8), 1),
        ("test_convnext", "stages.1.blocks.0.mlp", (1, 8, 8, 32), -1),
        ("test_convnext", "stages.1", (1, 32, 32, 32), None),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", (1, 8, 8, 128), None),
        ("test_vit", "blocks.1", (1, 5, 64), None),
        ("test_resnet", "fc:input", (1, 96), None),
    ],
)
def test_channel_dim_follows_feature_info(name, layer, shape, expected):
    assert channel_dim(timm.create_model(name), layer, torch.Size(shape)) == expected


def test_nhwc_models_are_read_as_such():
    swin = _swin()
    pairs = resolve_pairs(
        None, swin, timm.create_model("test_resnet"), example=torch.zeros(1, 3, 56, 56), weight=None
    )
    assert _layers(pairs) == [(f"layers.{i}", f"layer{i + 1}") for i in range(3)]
    assert [pair.channel_dim for pair in pairs] == [(-1, 1)] * 3
    # Not listed, and as wide as high: only the model's own format says it.
    assert channel_dim(swin, "patch_embed", torch.Size((1, 14, 14, 14))) == -1


def test_what_a_pair_says_itself_is_kept():
    model = timm.create_model("test_resnet")
    given = [
        Pair("layer1", "layer1", weight=3.0, channel_dim=1, name="mine"),
        Pair("layer2", "layer2", student_transform=lambda x: x.movedim(1, -1)),
    ]
    first, second = resolve_pairs(
        given, model, model, example=torch.zeros(1, 3, 32, 32), weight=2.0
    )
    assert (first.weight, first.channel_dim, first.name) == (3.0, 1, "mine")
    assert (second.weight, second.channel_dim) == (2.0, (None, 1))


def test_example_leaves_the_models_as_they_were():
    student, teacher = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    before = {key: value.clone() for key, value in student.state_dict().items()}
    resolve_pairs(None, student, teacher, example=torch.ones(1, 3, 32, 32), weight=None)
    assert student.training
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (("test_resnet", "test_vit"), 160),
        (("test_vit", "test_resnet"), 160),
        (("resnet10t", "mixer_s32_224"), 224),  # no class token
        (("test_resnet", "patches of 14"), 70),  # no reduction in common; registers
    ],
)
def test_a_vit_and_a_cnn_are_paired_by_depth_and_as_grids(names, size):
    if names[1] == "patches of 14":
        teacher = timm.create_model(
            "vit_tiny_patch16_224", patch_size=14, img_size=70, reg_tokens=4
        )
    else:
        teacher = timm.create_model(names[1])
    student = timm.create_model(names[0])
    example = torch.zeros(1, 3, size, size)
    pairs = resolve_pairs(None, student, teacher, example=example, weight=2.0)
    assert len(pairs) >= 2
    assert [pair.weight for pair in pairs] == [2.0] * len(pairs)
    transforms = [(pair.student_transform, pair.teacher_transform) for pair in pairs]
    assert all((one is None) != (other is None) for one, other in transforms)
    terms = Distiller(student, teacher, pairs, example=example)
    student(example.expand(2, -1, -1, -1))
    assert torch.isfinite(terms(example.expand(2, -1, -1, -1)))


def test_named_layers_of_a_vit_and_a_cnn_meet_as_maps_with_each_patch_in_its_place():
    student, teacher = timm.create_model("test_resnet"), timm.create_model("test_vit")
    (pair,) = resolve_pairs(
        {"layer3": "blocks.3"}, student, teacher, example=torch.zeros(1, 3, 160, 160), weight=None
    )
    assert pair.student_transform is None
    tokens = torch.arange(101.0).view(1, 101, 1)  # a class token, then ten rows of ten
    expected = torch.arange(1.0, 101.0).view(1, 1, 10, 10)
    torch.testing.assert_close(pair.teacher_transform(tokens), expected)
    (wide,) = resolve_pairs(
        {"layer3": "blocks.3"},
        student,
        timm.create_model("test_vit", img_size=(64, 128)),
        example=torch.zeros(1, 3, 64, 128),
        weight=None,
    )
    assert wide.teacher_transform(torch.zeros(2, 33, 64)).shape == (2, 64, 4, 8)
