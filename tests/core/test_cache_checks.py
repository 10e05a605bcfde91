from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _cache import Plain, ask, ask_often, build, fill, loss, tokens
from _models import images
from torch import nn

from vid_loss.cache import FeatureCache
from vid_loss.teacher import Teacher


def spoil_weights(teacher):
    with torch.no_grad():
        teacher.body.fc.weight[0, 0] += 1


def spoil_buffers(teacher):
    teacher.body.stage1[1].running_mean += 1


def spoil_eps(teacher):
    teacher.body.stage1[1].eps = 0.1


@pytest.mark.parametrize("change", [spoil_weights, spoil_buffers, spoil_eps])
def test_features_of_another_teacher_are_refused(tmp_path, change):
    fill(FeatureCache(tmp_path))
    student, teacher, distiller = build(FeatureCache(tmp_path))
    change(teacher)
    student(images())
    with pytest.raises(ValueError, match=r"expected features of this teacher, these layers"):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize("change", ["layers", "dtype", "teacher_dtype", "autocast"])
def test_features_of_other_layers_or_precision_are_refused(tmp_path, change):
    fill(FeatureCache(tmp_path))
    student, _, distiller = build(
        FeatureCache(tmp_path, dtype=torch.float32 if change == "dtype" else torch.float16),
        pairs={"stage2": "body.stage2"} if change == "layers" else None,
        teacher_dtype=torch.bfloat16 if change == "teacher_dtype" else None,
    )
    student(images())
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        pytest.raises(ValueError, match=r"these layers and this precision; got others"),
    ):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize("change", [lambda p: p.mul_(2), lambda p: p.data.mul_(2)])
def test_a_teacher_that_changes_during_the_run_is_refused(tmp_path, change):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    with torch.no_grad():
        change(teacher.body.fc.weight)
    student(images())
    with pytest.raises(ValueError, match=r"expected (features of this|the) teacher"):
        distiller(images(), sample_index=torch.arange(8))


def test_an_ema_teacher_is_noticed_before_it_differs_by_much(tmp_path):
    cache, teacher = FeatureCache(tmp_path), Plain()
    for _ in range(2):
        ask(cache, teacher, tokens(), range(4))
    teacher.out.weight.data.mul_(1 + 1e-6)  # which torch does not count as a change
    with pytest.raises(ValueError, match=r"expected the teacher .* it has changed since"):
        ask_often(64, cache, teacher, tokens(), range(4))


def test_a_teacher_that_counts_its_forwards_or_was_loaded_in_inference_mode_is_served(
    uncounted, tmp_path
):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    teacher.register_buffer("count", torch.tensor(0))
    teacher.register_forward_hook(lambda module, *_: module.count.add_(1))
    with torch.inference_mode():
        teacher.body.fc.weight = nn.Parameter(teacher.body.fc.weight.clone(), requires_grad=False)
    for _ in range(3):
        loss(student, distiller, images(), range(8))
    assert teacher.samples == 8


ANOTHER = r"expected the teacher that the features are of.* choose another folder"


def test_other_teacher_inputs_are_noticed(tmp_path):
    fill(FeatureCache(tmp_path))
    student, _, distiller = build(FeatureCache(tmp_path), teacher_inputs=lambda x: x / 2)
    student(images())
    with pytest.raises(ValueError, match=ANOTHER):
        distiller(images(), sample_index=torch.arange(8))


def another_forward(teacher):
    teacher.forward = lambda x: teacher.body(teacher.out(teacher.embed(x)).flip(-1))


@pytest.mark.parametrize("when", ["another run", "the same run"])
@pytest.mark.parametrize(
    "change",
    [
        lambda teacher: setattr(teacher, "act", torch.tanh),
        lambda teacher: setattr(teacher, "heads", 4),
        lambda teacher: setattr(teacher, "scale", 1.1),
        another_forward,
    ],
    ids=["activation", "heads", "scale", "code"],
)
def test_a_teacher_that_only_behaves_otherwise_is_noticed(tmp_path, change, when):
    cache, teacher = FeatureCache(tmp_path), Plain()
    for _ in range(2):
        ask(cache, teacher, tokens(), range(4))
    change(teacher)
    if when == "another run":
        cache = FeatureCache(tmp_path)
    with pytest.raises(ValueError, match=ANOTHER):
        ask_often(64, cache, teacher, tokens(), range(4))


def test_a_teacher_that_draws_is_not_cached(tmp_path):
    teacher, cache = Plain(), FeatureCache(tmp_path)
    teacher.act = lambda x: x + torch.randn_like(x)
    with pytest.raises(ValueError, match="says the same of a sample each time and in any batch"):
        ask(cache, teacher, tokens(), range(4))


def test_a_teacher_whose_samples_depend_on_each_other_is_not_cached(tmp_path):
    teacher, cache = Plain(), FeatureCache(tmp_path)
    teacher.act = lambda x: x - x.mean(0)
    with pytest.raises(ValueError, match="says the same of a sample each time and in any batch"):
        ask(cache, teacher, tokens(), range(4))


def test_a_teacher_that_runs_in_other_kernels_is_believed(tmp_path):
    """A rounding of TF32 is what they may differ by."""
    teacher = Plain()
    teacher.body = Scaled(1.0)
    cache = FeatureCache(tmp_path)
    ask(cache, teacher, tokens(), range(4))
    cache.flush()
    teacher.body.scale = 1 + 2**-11
    ask(FeatureCache(tmp_path), teacher, tokens(), range(4))
    teacher.body.scale = 1 + 2**-7
    with pytest.raises(ValueError, match=r"differs by 0.7. % in layer 'body'"):
        ask(FeatureCache(tmp_path), teacher, tokens(), range(4))


class Scaled(nn.Identity):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


def test_the_teacher_runs_on_one_sample_in_64_batches(tmp_path):
    cache, teacher = FeatureCache(tmp_path), Plain()
    for _ in range(3):
        ask(cache, teacher, tokens(), range(4))
    teacher.runs = 0
    for _ in range(640):
        ask(cache, teacher, tokens(), range(4))
    assert teacher.runs == 10


def test_weights_that_are_not_in_memory_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"weights in memory; got 'embed.weight' on the meta"):
        ask(FeatureCache(tmp_path), Plain().to("meta"), tokens(), range(4))


@pytest.mark.parametrize("shared", ["cache", "folder"])
def test_two_threads_get_their_own_features(tmp_path, shared):
    x, expected = tokens(64), Plain()(tokens(64)).detach()
    ours = FeatureCache(tmp_path, dtype=torch.float32), Teacher(Plain(), ["body"], None)
    theirs = FeatureCache(tmp_path, dtype=torch.float32), Teacher(Plain(), ["body"], None)

    def run(number):
        cache, teacher = ours if shared == "cache" or number else theirs
        generator = torch.Generator().manual_seed(number)
        for _ in range(50):
            rows = torch.randperm(64, generator=generator)[:8]
            got = cache.features(teacher, (x[rows],), {}, rows)["body"]
            torch.testing.assert_close(got, expected[rows])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
