import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vid_loss import KDLoss, Pair, VIDLoss
from vid_loss.cache import FeatureCache

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from _timm import _batch, _model, _task  # noqa: E402  # after the skip
from timm.task import DistillationTeacher  # noqa: E402  # after the skip
from vid_loss.integrations.timm import VIDTask  # noqa: E402  # after the skip


def test_result_has_loss_output_and_each_pair():
    task = _task(vid_weight=2.0)
    result = task(*_batch())
    assert result["output"].shape == (4, 3)
    assert_close(result["vid_loss"], 2 * (result["layer3->layer3"] + result["layer4->layer4"]))
    assert_close(result["loss"], result["task_loss"] + result["vid_loss"])
    assert result["loss"].requires_grad
    assert not result["layer3->layer3"].requires_grad


@pytest.mark.parametrize("stop", [False, True])
def test_teacher_can_stop_after_its_last_pair(stop):
    teacher, later = _model("resnet10t", seed=9), []
    task = _task(teacher=teacher, pairs={"layer3": "layer3"}, stop_teacher=stop)
    teacher.layer4.register_forward_hook(lambda *_: later.append(stop))
    result = task(*_batch())
    assert later == ([] if stop else [False])
    assert_close(result["loss"], _task(pairs={"layer3": "layer3"})(*_batch())["loss"])


def test_teacher_can_run_in_lower_precision():
    teacher, seen = _model("resnet10t", seed=9), []
    teacher.layer4.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    task = _task(teacher=teacher, teacher_dtype=torch.bfloat16)
    result = task(*_batch())
    assert seen[-1] == torch.bfloat16
    assert_close(result["loss"], _task()(*_batch())["loss"], rtol=1e-2, atol=0)


def test_evaluation_has_the_task_loss_alone():
    task = _task()
    task(*_batch())
    result = task.eval()(*_batch())
    assert sorted(result) == ["loss", "output", "task_loss", "vid_loss"]
    assert_close(result["loss"], result["task_loss"])


def test_gradient_reaches_student_and_heads_and_never_the_teacher():
    task = _task()
    task(*_batch())["loss"].backward()
    trainable = task.get_trainable_module()
    assert all(p.grad is not None for p in trainable.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1.0, 1.0)),
        ({"task_loss_weight": 0.25}, (0.25, 0.75)),
        ({"distill_loss_weight": 3.0}, (1.0, 3.0)),
        ({"distill_loss_weight": 3.0, "task_loss_weight": 0.5}, (0.5, 3.0)),
    ],
)
def test_weights_follow_timm(given, expected):
    task = _task(**given)
    result = task(*_batch())
    assert_close(
        result["loss"], expected[0] * result["task_loss"] + expected[1] * result["vid_loss"]
    )


def test_vid_weight_is_for_pairs_without_one():
    pairs = [Pair("layer3", "layer3", weight=7.0), Pair("layer4", "layer4")]
    weights = _task(pairs=pairs, vid_weight=2.0).get_trainable_module().distiller.weights
    assert weights == {"layer3->layer3": 7.0, "layer4->layer4": 2.0}
    weights = _task(pairs=pairs).get_trainable_module().distiller.weights
    assert weights["layer4->layer4"] == VIDLoss.default_weight


def test_any_pair_of_the_core_works():
    task = _task(pairs=[Pair("layer4", "layer4"), Pair("fc", "fc", loss=KDLoss())])
    assert "fc->fc KDLoss" in task(*_batch())


def test_nhwc_student_learns_from_an_nchw_teacher():
    options = {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 1, 2), "img_size": 56}
    student = _model("swin_tiny_patch4_window7_224", **options)
    task = VIDTask(student, _model(seed=9), verbose=False)
    images = torch.randn(2, 3, 56, 56)
    task(images, torch.tensor([0, 1]))["loss"].backward()
    losses = task.get_trainable_module().distiller.losses
    assert [loss.student_channels for loss in losses.values()] == [8, 16, 32]


def test_teacher_stays_in_eval_and_unchanged():
    task = _task()
    before = copy.deepcopy(task.teacher.state_dict())
    for mode in (True, False, True):
        assert task.train(mode) is task
        assert not any(module.training for module in task.teacher.modules())
    task.teacher.model.train()  # a caller that sets every module's mode
    task(*_batch())
    assert_close(task.teacher.state_dict(), before, rtol=0, atol=0)


def test_eval_model_is_the_student_without_heads():
    task = _task()
    model = task.get_eval_model().eval()
    assert list(model.state_dict()) == list(_model().state_dict())
    assert model(_batch()[0]).shape == (4, 3)
    wrapped = nn.Module()
    wrapped.module = task.get_trainable_module()
    assert task.get_eval_model(module=wrapped) is model
    assert task.get_eval_model(ema=True) is None


def test_teacher_sees_its_own_normalization():
    config = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}
    task = _task(data_config=config)
    seen = []
    task.teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images, target = _batch()
    task(images, target)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    cfg = task.teacher.model.pretrained_cfg
    teacher_mean, teacher_std = (torch.tensor(cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    assert_close(seen[-1], (images * std + mean - teacher_mean) / teacher_std)


def test_equal_normalizations_are_left_alone():
    assert _task(teacher=_model(seed=2)).renormalize is None
    assert _task().renormalize is not None  # 0.5 for the student, ImageNet's for the teacher


def test_normalizations_of_other_channels_are_refused():
    config = {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.5,)}
    with pytest.raises(ValueError, match="a mean for each of 3 channels; got 1"):
        _task(data_config=config)


@pytest.mark.parametrize("wrapped", [False, True])
def test_teacher_may_be_wrapped(wrapped):
    teacher = _model("resnet10t", seed=9)
    task = _task(teacher=DistillationTeacher(teacher) if wrapped else teacher)
    assert task.teacher.model is teacher


def test_named_teacher_loads_a_local_file_with_its_own_classes(tmp_path):
    source = _model("resnet10t", seed=4, num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "teacher.pth")
    task = _task(teacher="resnet10t", teacher_pretrained_path=str(tmp_path / "teacher.pth"))
    assert_close(task.teacher.model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_wrong_teacher_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        _task(teacher="resnet10t", teacher_pretrained_path=str(tmp_path / "missing.pth"))
    path = tmp_path / "other.pth"
    torch.save(_model("test_vit").state_dict(), path)
    with pytest.raises(ValueError, match="'resnet10t': expected its weights"):
        _task(teacher="resnet10t", teacher_pretrained_path=str(path))
    with pytest.raises(TypeError, match="expected teacher_model to be a name"):
        _task(teacher_pretrained_path=str(path))


def test_unknown_layer_lists_the_closest():
    with pytest.raises(ValueError, match=r"'layer5' of the student.*'layer4'"):
        _task(pairs={"layer5": "layer4"})
    with pytest.raises(ValueError, match=r"'layer9' of the teacher"):
        _task(pairs={"layer4": "layer9"})


def test_pairs_of_another_type_are_refused():
    with pytest.raises(
        TypeError, match="a dict of student layer to teacher layer or a list of Pair"
    ):
        _task(pairs=["layer4"])


def test_old_timm_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "vid_loss.integrations.timm._task")
    monkeypatch.delattr(timm.task.TrainingTask, "get_task_state")
    with pytest.raises(ImportError, match=r"timm >= 1\.0\.27.*pip install 'vid-loss\[timm\]'"):
        importlib.import_module("vid_loss.integrations.timm._task")


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "vid_loss.integrations.timm._task")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'vid-loss\[timm\]'"):
        importlib.import_module("vid_loss.integrations.timm._task")


def test_a_cache_serves_the_teachers_features_by_the_index_of_a_call(tmp_path):
    pytest.importorskip("safetensors")
    teacher, samples = _model("resnet10t", seed=9), []
    cache = FeatureCache(tmp_path, dtype=torch.float32)
    task = _task(teacher=teacher, cache=cache)
    teacher.register_forward_hook(lambda _, args, output: samples.append(len(args[0])))
    without = _task()
    for _ in range(3):
        cached = task(*_batch(), sample_index=torch.arange(4))["loss"]
        assert torch.equal(cached, without(*_batch())["loss"])
    assert samples.count(4) == 1
    assert max(samples[1:]) == 1  # one is looked at again
    assert task.eval()(*_batch())["vid_loss"] == 0
    with pytest.raises(ValueError, match="FeatureCache, sample_index: expected integers"):
        task.train()(*_batch())
