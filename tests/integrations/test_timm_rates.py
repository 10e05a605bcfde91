"""Parameter groups of a task: decay, rates, clipping."""

from functools import partial

import pytest

from vid_loss import Pair, VIDLoss

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


@pytest.mark.parametrize("rates", [{"lr": 0.0}, {"lr": 0.1, "head_lr": -1.0}])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ValueError, match="expected a rate above 0; got"):
        param_groups_vid(_task().get_trainable_module(), **rates)
