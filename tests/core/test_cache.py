import sys
from copy import deepcopy

import pytest
import torch
from _cache import build, loss
from _models import images

from vid_loss import DistillationModel, Distiller
from vid_loss.cache import FeatureCache
from vid_loss.taps import Given


def test_the_teacher_sees_each_sample_once(uncounted, tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path, dtype=torch.float32))
    x = images()
    plain = Distiller(student, teacher, {"stage1": "body.stage1", "fc:input": "body.fc"}, example=x)
    plain.load_state_dict(distiller.state_dict())
    teacher.samples = 0
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [3, 5, 0, 6], [7, 7, 1, 2]):
        value = loss(student, distiller, x[rows], rows)
        seen, _ = teacher.samples, student(x[rows])
        torch.testing.assert_close(value, plain(x[rows]))
        teacher.samples = seen
    assert teacher.samples == 8


def test_a_batch_of_known_and_new_samples_is_put_together_in_order(uncounted, tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path, dtype=torch.float32))
    x = images()
    expected = distiller._teacher.features(Given((x,), {}))
    loss(student, distiller, x[[1, 4]], [1, 4])
    teacher.samples = 0
    got = distiller.teacher_features(x, sample_index=torch.arange(8))
    assert teacher.samples == 6
    for layer, feature in expected.items():
        torch.testing.assert_close(got[layer], feature)


def test_gradients_are_those_without_a_cache(tmp_path):
    grads = []
    for cache in (None, FeatureCache(tmp_path, dtype=torch.float32)):
        student, _, distiller = build(cache)
        for _ in range(2):
            student.zero_grad()
            loss(student, distiller, images(), range(8)).backward()
        grads.append([p.grad for p in student.stage1.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_new_feature_is_rounded_as_a_kept_one(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    student.eval()  # so that nothing but the cache differs
    first, second = (
        distiller.cache.features(distiller._teacher, (images(),), {}, torch.arange(8))
        for _ in range(2)
    )
    for layer, feature in first.items():
        assert feature.dtype == torch.float16
        assert torch.equal(feature, second[layer])


def test_another_process_goes_on_with_the_same_files(uncounted, tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    first = loss(student, distiller, images(), range(8))
    distiller.cache.flush()
    student, teacher, distiller = build(FeatureCache(tmp_path))
    assert torch.equal(loss(student, distiller, images(), range(8)), first)
    assert teacher.samples == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("abc", r"sample_index: expected integers \(N,\), .* got 'abc'"),
        ([[0], [1, 2]], r"sample_index: expected integers \(N,\), .* got \[\[0\], \[1, 2\]\]"),
        ([True] * 8, r"sample_index: expected integers .* got shape \(8,\) of torch.bool"),
        ([-1, *range(7)], r"sample_index: expected integers .* with -1"),
        (None, r"sample_index: expected integers \(N,\), .* got None"),
        (torch.zeros(8), r"sample_index: expected integers \(N,\), .* torch.float32"),
        (torch.zeros(8, 1, dtype=torch.int64), r"expected integers \(N,\), .* got shape \(8, 1\)"),
        (range(7), r"expected an index for each of 8 samples; got 7"),
    ],
)
def test_a_missing_or_wrong_index_is_named(tmp_path, index, message):
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=message):
        distiller(images(), sample_index=index)


@pytest.mark.parametrize(
    "args", [({"image": images()},), (images(), [1, 2]), (images(), object()), (1.0,)]
)
def test_inputs_that_cannot_be_told_apart_are_refused(tmp_path, args):
    cache = FeatureCache(tmp_path)
    _, _, distiller = build(cache)
    with pytest.raises(ValueError, match=r"expected tensors with the batch first, and plain value"):
        cache.features(distiller._teacher, args, {}, range(8))


def test_inputs_of_another_size_are_named(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images()[:4], range(4))
    larger = torch.randn(4, 1, 12, 12)
    student(larger)
    with pytest.raises(ValueError, match=r"expected the shape \(8, 8, 8\) .* got \(8, 12, 12\)"):
        distiller(larger, sample_index=torch.arange(4, 8))


FILE = __file__


@pytest.mark.parametrize(
    ("folder", "options", "kind", "message"),
    [
        ("x", {"dtype": torch.bfloat16}, ValueError, r"dtype: .* got torch.bfloat16. Write dtype="),
        ("x", {"dtype": "float16"}, ValueError, r"dtype: .* got 'float16'. Write dtype=torch."),
        ("x", {"max_bytes": -1}, ValueError, r"max_bytes: expected a number of bytes .* got -1"),
        ("x", {"max_bytes": "10GB"}, TypeError, r"got '10GB'. .* write max_bytes=10 \* 2\*\*30"),
        (
            "x",
            {"max_bytes": 1e9},
            TypeError,
            r"max_bytes: expected a number of bytes .* 1000000000",
        ),
        ("x", {"max_bytes": True}, TypeError, r"max_bytes: expected a number of bytes .* got True"),
        (None, {}, TypeError, r'folder: expected the name .* got None. Write FeatureCache\("feat'),
        (b"x", {}, TypeError, r"folder: expected the name of a folder; got b'x'"),
        ("", {}, TypeError, r"folder: expected the name of a folder; got ''"),
        (FILE, {}, ValueError, r"folder: expected a folder, .* got the file .*test_cache.py"),
    ],
)
def test_bad_arguments_are_named_at_construction(folder, options, kind, message):
    with pytest.raises(kind, match=message):
        FeatureCache(folder, **options)


@pytest.mark.parametrize("cache", ["features", True, FeatureCache])
def test_something_else_in_a_cache_s_place_is_named_at_construction(cache):
    with pytest.raises(TypeError, match=r"cache: .* got .* Write cache=FeatureCache\(.features.\)"):
        build(cache)


def test_a_distillation_model_hands_the_index_to_the_cache_alone(uncounted, tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    model = DistillationModel(student, distiller)
    for _ in range(2):
        model(images(), sample_index=torch.arange(8))
    assert teacher.samples == 8
    deepcopy(model)(images(), sample_index=torch.arange(8))
    assert teacher.samples == 8


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "vid-loss\[cache\]"'):
        FeatureCache(tmp_path)
