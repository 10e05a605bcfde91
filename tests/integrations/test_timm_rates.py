"""Parameter groups of a task: decay, rates, clipping."""

import math
from functools import partial

import pytest
import torch

from vid_loss import Pair, VIDLoss
from vid_loss.optimizer import HEAD_LEARNING_RATE, SGD_HEAD_STEP

pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from _timm import _model, _task
from timm.optim import create_optimizer_v2  # after the skip
from vid_loss.integrations.timm import VIDTask, param_groups_vid  # after the skip


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


@pytest.mark.parametrize(
    ("opt", "lr", "weight", "expected"),
    [
        ("sgd", 0.1, 3.0, SGD_HEAD_STEP / 3),
        ("nesterov", 0.1, 9.0, 0.1),
        ("momentum", 0.02, 9.0, SGD_HEAD_STEP / 9),
        ("sgd", 0.7, 3.0, 0.7),
        ("adamw", 1e-2, 3.0, 1e-2),
        ("adamw", 1e-4, 9.0, HEAD_LEARNING_RATE),
        ("lamb", 1e-3, 3.0, HEAD_LEARNING_RATE),
    ],
)
def test_heads_have_the_rate_that_goes_with_the_optimizer(opt, lr, weight, expected):
    module = _task(pairs=[Pair("layer4", "layer4", weight=weight)]).get_trainable_module()
    heads = set(module.distiller.parameters())
    for group in param_groups_vid(module, lr=lr, opt=opt):
        assert lr * group.get("lr_scale", 1) == pytest.approx(
            expected if group["params"][0] in heads else lr
        )


def test_without_a_name_or_a_rate_there_is_nothing_to_choose_by():
    module = _task().get_trainable_module()
    with pytest.raises(ValueError, match=r"param_groups_vid, opt: .*opt='sgd', say, or head_lr="):
        param_groups_vid(module, lr=0.1)
    groups = param_groups_vid(module, lr=0.1, head_lr=0)
    assert {group["lr_scale"] for group in groups if "lr_scale" in group} == {0}


@pytest.mark.parametrize(
    ("given", "error", "name"),
    [
        *(({"lr": x}, ValueError, "lr") for x in (0.0, -1.0, math.nan, None, "0.1", [1])),
        *(({"head_lr": x}, ValueError, "head_lr") for x in (-1.0, math.nan, "0.1", torch.ones(2))),
        *(({"weight_decay": x}, ValueError, "weight_decay") for x in (-1.0, math.nan, None, "0")),
        *(({"opt": x}, TypeError, "opt") for x in (torch.optim.SGD, 3, [1])),
        *(({"model": x}, TypeError, "model") for x in (None, "a", torch.nn.Linear(1, 1))),
    ],
)
def test_what_is_no_rate_is_refused(given, error, name):
    module = _task().get_trainable_module()
    with pytest.raises(error, match=f"^param_groups_vid, {name}: expected "):
        param_groups_vid(**{"model": module, "lr": 0.1, "opt": "sgd", **given})
