import copy
import importlib
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vid_loss import KDLoss, Pair, VIDLoss

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from timm.optim import create_optimizer_v2  # noqa: E402  # after the skip
from timm.task import (  # noqa: E402  # after the skip
    DistillationTeacher,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver  # noqa: E402  # after the skip
from vid_loss.integrations.timm import VIDTask, param_groups_vid  # noqa: E402  # after the skip

PAIRS = {"layer3": "layer3", "layer4": "layer4"}


def _model(name="test_resnet", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 3, **options})


def _task(*, seed=0, pairs=PAIRS, teacher=None, **options):
    teacher = teacher if teacher is not None else _model("resnet10t", seed=9)
    torch.manual_seed(seed)
    return VIDTask(_model(seed=seed), teacher, pairs=pairs, verbose=False, **options)


def _batch(size=4, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator, **options)
    return images, torch.arange(size) % 3


def _stepped(task, **options):
    """Takes one training step, so that nothing is at its start any more."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1, **options)
    task.get_trainable_module().train()
    task(*_batch())["loss"].backward()
    optimizer.step()
    task.update_ema()
    return optimizer


def _heads(task, ema=False):
    return task.get_task_state(ema=ema)["vid"]


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


def test_checkpoint_keeps_heads_beside_the_student_and_round_trips(tmp_path):
    task = _task()
    task.setup_ema(decay=0.5)
    optimizer = _stepped(task, momentum=0.9)
    path = tmp_path / "checkpoint.pth.tar"
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task
    )
    saver._save(path, epoch=1)

    checkpoint = torch.load(path, weights_only=True)
    plain = list(_model().state_dict())
    assert list(checkpoint["state_dict"]) == list(checkpoint["state_dict_ema"]) == plain

    fresh = _task(seed=5)
    fresh_optimizer = create_optimizer_v2(fresh.get_trainable_module(), "sgd", lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(fresh, path, fresh_optimizer, log_info=False) == 2
    fresh.setup_ema(decay=0.5)
    load_task_ema_checkpoint(fresh, path)
    for ema in (False, True):
        assert_close(_heads(fresh, ema), _heads(task, ema), rtol=0, atol=0)
        assert_close(
            fresh.get_eval_model(ema=ema).state_dict(),
            task.get_eval_model(ema=ema).state_dict(),
            rtol=0,
            atol=0,
        )
    assert_close(fresh_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_checkpoint_loads_into_a_plain_model(tmp_path):
    task = _task()
    optimizer = _stepped(task)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task
    )
    saver._save(tmp_path / "checkpoint.pth.tar", epoch=0)
    plain = _model(seed=7, checkpoint_path=str(tmp_path / "checkpoint.pth.tar"))
    assert_close(plain.state_dict(), task.get_eval_model().state_dict(), rtol=0, atol=0)


def test_checkpoint_of_other_pairs_names_both():
    state = _task(pairs={"layer2": "layer2"}).get_task_state()
    with pytest.raises(RuntimeError, match=r"'layer3->layer3'.*got one of \['layer2->layer2'\]"):
        _task().load_task_state(state)


def test_checkpoint_without_heads_leaves_them_and_warns(caplog):
    task = _task()
    before = copy.deepcopy(_heads(task))
    task.load_checkpoint_state(_model(seed=5).state_dict())
    assert_close(_heads(task), before, rtol=0, atol=0)
    assert "no heads" in caplog.text


def test_ema_state_needs_an_ema():
    task = _task()
    assert task.get_task_state(ema=True) == {}
    with pytest.raises(RuntimeError, match="setup_ema"):
        task.load_task_state(task.get_task_state(), ema=True)


def test_ema_averages_student_and_heads():
    task = _task()
    task.setup_ema(decay=0.5)
    before = copy.deepcopy(_heads(task))
    _stepped(task)
    for key, value in _heads(task).items():
        if value.is_floating_point():
            assert_close(_heads(task, ema=True)[key], (before[key] + value) / 2)


def test_ema_taps_its_own_student_and_shares_the_teacher():
    task = _task()
    task.setup_ema()
    averaged = task.get_trainable_module(ema=True).module
    task.get_trainable_module().student(_batch()[0])
    with pytest.raises(RuntimeError, match="has not run forward"):
        averaged.distiller(_batch()[0])
    expected = task(*_batch())["vid_loss"]
    _, transfer = averaged.train()(_batch()[0])
    assert_close(transfer, expected)
    assert not any(key.startswith("teacher") for key in averaged.state_dict())


def test_ema_elsewhere_leaves_the_teacher_in_place():
    task = _task()
    task.setup_ema()
    averaged = task.get_trainable_module(ema=True).module.to("meta")
    assert all(p.is_meta for p in averaged.parameters())
    assert not any(p.is_meta for p in task.teacher.parameters())
    task(*_batch())


def test_clip_parameters_cover_the_heads():
    task = _task()
    trainable = task.get_trainable_module()
    assert set(task.get_clip_parameters()) == set(trainable.parameters())
    left = set(task.get_clip_parameters(exclude_head=True))
    assert set(trainable.parameters()) - left == set(trainable.student.fc.parameters())


def _decay_of(optimizer):
    return {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_trained_variances_and_the_students_exceptions_are_not_decayed():
    student = _model("test_vit", img_size=32)
    pair = Pair("blocks.0", "blocks.0", loss=partial(VIDLoss, variance="trained"))
    teacher = _model("test_vit", seed=1, img_size=32)
    task = VIDTask(student, teacher, pairs=[pair], verbose=False)
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(
        trainable, "adamw", lr=0.1, weight_decay=0.2, filter_bias_and_bn=False
    )
    decay = _decay_of(optimizer)
    assert set(decay) == set(trainable.parameters())
    assert decay[student.pos_embed] == 0
    variances = [p for n, p in trainable.named_parameters() if n.endswith("raw_var")]
    assert variances
    assert {decay[p] for p in variances} == {0}
    head = next(iter(trainable.distiller.losses.values())).head
    assert decay[head.project.weight] == 0.2


def test_layer_decay_scales_heads_like_the_last_layer():
    task = _task()
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, "sgd", lr=0.1, layer_decay=0.5)
    scale = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert {scale[p] for p in trainable.distiller.parameters()} == {1.0}
    assert scale[trainable.student.fc.weight] == 1.0
    assert scale[trainable.student.conv1[0].weight] < 0.1


def test_compiled_task_computes_the_same_in_one_graph():
    expected, task = _task(), _task()
    compiled = task.compile(backend="eager", fullgraph=True)
    assert task.get_eval_model() is compiled
    reference, result = (t(*_batch()) for t in (expected, task))
    assert_close(dict(result), dict(reference))
    for t, r in ((expected, reference), (task, result)):
        r["loss"].backward()
        assert all(p.grad is not None for p in t.get_clip_parameters())
    for ours, theirs in zip(
        task.get_clip_parameters(), expected.get_clip_parameters(), strict=True
    ):
        assert_close(ours.grad, theirs.grad)
    assert_close(task.get_task_state(), expected.get_task_state())


def test_compiled_ema_follows_and_compiled_task_loads():
    task = _task()
    task.setup_ema(decay=0.0)
    task.compile(backend="eager")
    task.compile_ema(backend="eager")
    task.load_checkpoint_state(**_state(_task(seed=5)))
    task.update_ema()
    model, averaged = task.get_eval_model().eval(), task.get_eval_model(ema=True)
    with torch.no_grad():
        expected = _model(seed=5).eval()(_batch()[0])
        assert_close(model(_batch()[0]), expected)
        assert_close(averaged(_batch()[0]), expected)
    assert_close(_heads(task, ema=True), _heads(_task(seed=5)))


def _state(task):
    return {key: task.get_checkpoint_state()[key] for key in ("state_dict", "task_state")}


def _ddp_task():
    # Without batch norm and running means, so that two halves of a batch are the whole.
    loss = partial(VIDLoss, norm="group", variance="trained", standardize=False, init_var=5.0)
    pairs = [Pair("stages.2", "stages.2", loss=loss)]
    student = _model("test_convnext")
    return VIDTask(student, _model("test_convnext", seed=1), pairs=pairs, verbose=False)


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    task = _ddp_task()
    task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=True)
    images, target = _batch(8)
    images, target = images[rank::2], target[rank::2]
    with task.no_sync():
        task(images[:2], target[:2])["loss"].backward()
    task(images[2:], target[2:])["loss"].backward()
    state = task.get_checkpoint_state()
    gradients = [p.grad for p in task.get_clip_parameters()]
    torch.save((gradients, list(state["state_dict"]), list(state)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_match_one_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    (first, keys, entries), (second, _, _) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert_close(first, second, rtol=0, atol=0)
    assert keys == list(_model("test_convnext").state_dict())
    assert entries == ["state_dict", "task_state"]
    task = _ddp_task()
    task(*_batch(8))["loss"].backward()
    for gradient, parameter in zip(first, task.get_clip_parameters(), strict=True):
        # Two accumulated halves add up to twice the mean.
        assert_close(gradient / 2, parameter.grad, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_heads_have_a_rate_of_their_own_that_timms_schedule_scales(layer_decay):
    from timm.scheduler import CosineLRScheduler

    task = _task(pairs={"layer4": "layer4"})
    module = task.get_trainable_module()
    options = {"lr": 0.1, "head_lr": 0.02, "weight_decay": 0.3, "layer_decay": layer_decay}
    optimizer = create_optimizer_v2(
        module, "sgd", lr=0.1, param_group_fn=partial(param_groups_vid, **options)
    )
    plain = create_optimizer_v2(
        module, "sgd", lr=0.1, weight_decay=0.3, layer_decay=layer_decay, momentum=0.9
    )
    heads = set(module.distiller.parameters())
    assert _decay_of(optimizer) == _decay_of(plain)
    for scheduler in (CosineLRScheduler(x, t_initial=10) for x in (plain, optimizer)):
        scheduler.step(4)
    rates, plain_rates = (
        {p: group["lr"] for group in x.param_groups for p in group["params"]}
        for x in (optimizer, plain)
    )
    assert rates.keys() == plain_rates.keys() == set(module.parameters())
    share = max(plain_rates.values()) / 0.1
    for parameter, rate in rates.items():
        expected = 0.02 * share if parameter in heads else plain_rates[parameter]
        assert rate == pytest.approx(expected)


@pytest.mark.parametrize("rates", [{"lr": 0.0}, {"lr": 0.1, "head_lr": -1.0}])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ValueError, match="expected a rate above 0; got"):
        param_groups_vid(_task().get_trainable_module(), **rates)
