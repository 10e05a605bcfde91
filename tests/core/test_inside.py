"""A distiller that was made a part of its student, and one that stands beside it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from _models import cnn_pair, images
from _three_lines import LABELS, PAIRS
from torch import nn

from vid_loss import DistillationModel, Distiller


class Engine(nn.Module):
    """Has a student and a distiller, side by side."""

    def __init__(self, student, distiller):
        super().__init__()
        self.student, self.distiller = student, distiller


def set_on(place):
    def put(student, distiller):
        owner, _, name = place.rpartition(".")
        student.get_submodule(owner).add_module(name, distiller)
        return student

    return put


def said(put, *, add):
    torch.manual_seed(0)
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    if add:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        distiller.add_to(optimizer)
    holder = put(student, distiller)
    if not add:
        optimizer = torch.optim.AdamW(holder.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            (F.cross_entropy(student(images()), LABELS) + distiller(images())).backward()
            optimizer.step()
    return [str(x.message) for x in caught]


@pytest.mark.parametrize("add", [True, False], ids=["add_to", "student.parameters()"])
@pytest.mark.parametrize("place", ["distiller", "fc.vid"])
def test_a_part_of_the_student_is_told_of_once_by_its_name(place, add):
    (message,) = said(set_on(place), add=add)
    assert "expected to stand beside the student" in message
    assert f"as the student's {place!r}" in message
    assert "distiller.add_to(optimizer)" in message


@pytest.mark.parametrize("holder", [Engine, DistillationModel])
@pytest.mark.parametrize("add", [True, False], ids=["add_to", "parameters()"])
def test_nothing_is_said_where_one_module_has_both_side_by_side(holder, add):
    assert said(holder, add=add) == []


def test_a_copy_of_the_student_made_before_is_no_part_of_it():
    def average(student, distiller):
        student.__dict__["average"] = copy.deepcopy(student)
        student.__dict__["distiller"] = distiller  # an attribute that torch does not register
        return nn.ModuleList([student, distiller])

    assert said(average, add=False) == []
