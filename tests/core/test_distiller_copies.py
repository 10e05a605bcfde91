"""States, moves, copies and wrappers of student and distiller."""

import copy

import pytest
import torch
from _asserts import assert_same_state, hook_count, state_of
from _distillers import PAIRS, make, train
from _models import cnn_pair, images
from torch import nn

from vid_loss import DistillationModel, Distiller


def test_state_resumes_bit_for_bit():
    def fresh():
        student, _, distiller = make()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        optimizer.add_param_group({"params": distiller.parameters()})
        return student, distiller, optimizer

    parts = fresh()
    train(*parts, steps=3)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    straight = train(*parts, steps=3)
    resumed = fresh()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert train(*resumed, steps=3) == straight
    assert_same_state(resumed[0], state_of(parts[0]))
    assert_same_state(resumed[1], state_of(parts[1]))


def test_a_state_of_other_pairs_is_refused():
    _, _, distiller = make({"stage1": "stage1"})
    _, _, other = make({"stage2": "stage2"})
    with pytest.raises(RuntimeError, match="stage1->stage1"):
        other.load_state_dict(distiller.state_dict())


def test_moving_and_casting_takes_the_teacher_along_and_leaves_the_student():
    student, teacher, distiller = make()
    assert distiller.to(torch.float64) is distiller
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_copied_model_trains_on_its_own():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    twin = copy.deepcopy(model)
    assert twin.student is not student
    assert twin.distiller.student is twin.student
    # Shared: an EMA need not double it.
    assert twin.distiller._teacher.tap.model is distiller._teacher.tap.model
    before = state_of(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(images())[1].backward()
    optimizer.step()
    assert_same_state(model, before)
    with pytest.raises(RuntimeError, match="has not run forward"):
        distiller(images())


def test_closing_a_copy_leaves_the_original_open():
    student, teacher, distiller = make()
    model = DistillationModel(student, distiller)
    copy.deepcopy(model).distiller.close()
    assert torch.isfinite(model(images())[1])
    distiller.close()
    assert hook_count(teacher) == 0
    closed = copy.deepcopy(model)
    assert closed.distiller._tap.closed
    assert hook_count(teacher) == 0


def test_data_parallel_is_looked_through_on_one_device_and_refused_on_several():
    student, teacher = cnn_pair()
    parallel = nn.DataParallel(student)
    distiller = Distiller(parallel, teacher, PAIRS, example=images())
    parallel(images())
    assert torch.isfinite(distiller(images()))
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel on 2 devices. Start a process per device"):
        Distiller(parallel, teacher, PAIRS, example=images())
