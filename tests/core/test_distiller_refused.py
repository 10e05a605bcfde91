"""What a distiller cannot be built of or called with."""

import pytest
import torch
from _asserts import hook_count
from _distillers import PAIRS, make
from _models import cnn_pair, images

from vid_loss import Distiller, Pair, VIDLoss


def test_call_without_the_students_forward_says_so():
    student, _, distiller = make()
    with pytest.raises(RuntimeError, match="student has not run forward in train mode"):
        distiller(images())
    student.eval()(images())
    with pytest.raises(RuntimeError, match="in evaluation use the task loss"):
        distiller(images())


def test_another_batch_than_the_students_is_refused():
    student, _, distiller = make()
    student(images(8))
    with pytest.raises(ValueError, match=r"Pair 'stage1' -> 'stage1', VIDLoss: expected one batch"):
        distiller(images(4))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ({}, ValueError, "pairs: expected at least one pair; got none"),
        ([], ValueError, "pairs: expected at least one pair; got none"),
        ("stage1", TypeError, "pairs: expected a dict .* got 'stage1'"),
        (None, TypeError, "pairs: expected a dict .* got None"),
        (
            [Pair("fc", "fc", name="a.b"), Pair("stage1", "stage1", name="a/b")],
            ValueError,
            "a name of its own; got 'a/b' twice",
        ),
        (["stage1"], TypeError, "pairs: expected a dict"),
        (Pair("stage1", "stage1"), TypeError, "or a list of Pair; got Pair"),
        ([Pair("fc", "fc"), Pair("fc", "fc")], ValueError, "a name of its own; got 'fc->fc' twice"),
        ({"stage3": "stage1"}, ValueError, "Layer 'stage3' of the student: .*closest are"),
        ({"stage1": "stage3"}, ValueError, "Layer 'stage3' of the teacher: .*closest are"),
        (
            {"stage1": "fc"},
            ValueError,
            "Pair 'stage1' -> 'fc', VIDLoss: expected two features of one",
        ),
        ({"stage1[0]": "stage1"}, TypeError, r"Layer 'stage1\[0\]': .* Drop the index"),
        (
            [Pair("fc", "fc", loss=lambda s, t: VIDLoss(s, t, reduction="none"))],
            ValueError,
            r"Pair 'fc' -> 'fc': expected the loss to be a scalar; got \(8,\)",
        ),
    ],
)
def test_bad_pairs_are_refused_before_anything_is_hooked(pairs, error, message):
    student, teacher = cnn_pair()
    with pytest.raises(error, match=message) as caught:
        Distiller(student, teacher, pairs, example=images())
    # Also while the traceback keeps what was built alive, as it does in a notebook.
    assert hook_count(student) == hook_count(teacher) == 0
    del caught
    assert student.training
    assert teacher.training


def test_a_teacher_that_is_the_student_is_refused():
    student, _ = cnn_pair()
    for teacher in (student, torch.compile(student, backend="eager")):
        with pytest.raises(ValueError, match="expected another model than the student"):
            Distiller(student, teacher, PAIRS, example=images())


def test_an_example_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"example: expected a tensor, a tuple .* got list"):
        Distiller(*cnn_pair(), PAIRS, example=[images()])


def test_teacher_inputs_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"teacher_inputs: expected a tensor, .* got int"):
        make(teacher_inputs=lambda x: 3)


@pytest.mark.parametrize("features", [{}, {"stage1": torch.zeros(8, 4, 8, 8)}])
def test_features_of_other_layers_are_refused(features):
    student, _, distiller = make()
    student(images())
    with pytest.raises(ValueError, match=r"teacher_features: expected also \[.*'stage2'\]; got \["):
        distiller(teacher_features=features)
    assert torch.isfinite(distiller(images()))  # nothing was lost
