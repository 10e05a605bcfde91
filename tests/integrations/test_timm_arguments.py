"""What a task is built with, be it bad: each is named."""

import math

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair
from vid_loss.teachers import Teachers

pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from _timm import PAIRS, _batch, _model, _task
from vid_loss.integrations.timm import VIDTask  # after the skip

NO_MODULES = [None, b"x", 3, math.nan, [1], {"a": 1}, torch.ones(2), nn.Linear]
OTHERS = ["0.5", *NO_MODULES]


def built(**given):
    models = {"student_model": _model(), "teacher_model": _model("resnet10t", seed=9)}
    return VIDTask(**{**models, "pairs": PAIRS, "verbose": False, **given})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        *(({"student_model": x}, TypeError) for x in (*OTHERS, nn.Linear(1, 1))),
        *(({"teacher_model": x}, TypeError) for x in NO_MODULES),
        *(({"criterion": x}, TypeError) for x in ("ce", 3, [1], nn.CrossEntropyLoss)),
        *(({"data_config": x}, TypeError) for x in ("", 3, [1], {"input_size": (3, 32, 32)})),
        *(({"task_loss_weight": x}, ValueError) for x in ("1", -1.0, math.nan, [1], torch.ones(2))),
        *(({"distill_loss_weight": x}, ValueError) for x in ("1", -1.0, math.inf, object())),
    ],
)
def test_what_cannot_be_meant_is_named(given, error):
    (name,) = given
    with pytest.raises(error, match=f"^VIDTask, {name}: expected "):
        built(**given)


@pytest.mark.parametrize("pairs", [3, True, object(), Pair("layer3", "layer3"), Pair, [], ["a"]])
def test_what_are_no_pairs_is_said_as_a_distiller_says_it(pairs):
    with pytest.raises((TypeError, ValueError), match=r"^Distiller, pairs: expected"):
        built(pairs=pairs)


def test_pairs_may_come_one_by_one():
    pairs = (Pair(*layers) for layers in PAIRS.items())
    assert list(built(pairs=pairs).distiller.pairs) == ["layer3->layer3", "layer4->layer4"]


def test_a_weight_of_the_task_above_one_needs_that_of_the_distillation():
    with pytest.raises(ValueError, match=r"task_loss_weight: expected 0 to 1 .*; got 2"):
        built(task_loss_weight=2)
    task = built(task_loss_weight=2, distill_loss_weight=0.5)
    assert (task.task_loss_weight, task.distill_loss_weight) == (2, 0.5)
    assert built(task_loss_weight=1.0).distill_loss_weight == 0


def test_a_pair_has_its_place_in_the_result():
    names = sorted(_task().eval()(*_batch()))
    assert names == ["loss", "output", "task_loss", "vid_loss"]
    for name in names:
        with pytest.raises(ValueError, match=f"^VIDTask, pairs: expected no pair named '{name}'"):
            built(pairs=[Pair("layer4", "layer4", name=name)])
    assert "mine" in built(pairs=[Pair("layer4", "layer4", name="mine")])(*_batch())


def test_the_distiller_is_there_whatever_wraps_it():
    task = built()
    distiller = task.distiller
    assert isinstance(distiller, Distiller)
    assert distiller is task.get_trainable_module().distiller
    assert not any(name.startswith("distiller") for name in task.state_dict())
    task.compile(backend="eager")
    assert task.distiller is distiller
    compiled, task.trainable_module = task.trainable_module, nn.Module()
    task.trainable_module.module = compiled  # as DistributedDataParallel has it
    assert task.distiller is distiller


def test_several_teachers_are_one():
    teachers = Teachers({"a": _model("resnet10t", seed=9), "b": _model(seed=8)})
    task = built(teacher_model=teachers, pairs={"layer4": "b.layer4"})
    assert task(*_batch())["loss"].requires_grad
