"""Forwards of a student before the call: which batch is compared, and which is refused."""

import copy

import pytest
import torch
from _distillers import make
from _models import images

from vid_loss import DistillationModel

A, B = images(), images() * 3


def crossed(student, distiller):
    student(A)
    student(B)
    return distiller(A)


def crossed_slices(student, distiller):
    student(A[:4])
    student(A[4:])
    return distiller(A[:4])


def crossed_teacher_first(student, distiller):
    features = distiller.teacher_features(A)
    student(A)
    student(B)
    return distiller(teacher_features=features)


def crossed_by_an_adversarial_batch(student, distiller):
    student(A)
    student((A + 0.5).requires_grad_())
    return distiller(A)


def crossed_with_the_last_step(student, distiller):
    student(A)
    distiller(A)
    student(B)
    return distiller(A)


def crossed_and_changed(student, distiller):
    batch = A.clone()
    student(batch)
    student(B)
    return distiller(batch.mul_(2))


def crossed_at_another_size(student, distiller):
    student(A[:4])
    student(B)
    return distiller(A[:4])


@pytest.mark.parametrize(
    "step",
    [
        crossed,
        crossed_slices,
        crossed_teacher_first,
        crossed_by_an_adversarial_batch,
        crossed_and_changed,
        crossed_at_another_size,
        crossed_with_the_last_step,
    ],
)
def test_the_batch_of_a_forward_before_the_last_is_refused(step):
    student, _, distiller = make()
    with pytest.raises(RuntimeError, match=r"student has run forward on another batch since it"):
        step(student, distiller)
    student(A)  # and what is right goes on
    assert torch.isfinite(distiller(A))


def test_what_is_refused_takes_no_features_from_the_batch_that_they_are_of():
    student, _, distiller = make()
    student(A)
    student(B)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="student has run forward on another batch"):
            distiller(A)
    assert torch.isfinite(distiller(B))


def other_batch_first(student, distiller):
    student(B)
    student(A)
    return distiller(A)


def same_batch_twice(student, distiller):
    student(A)
    student(A)
    return distiller(A)


def in_turn(student, distiller):
    student(B)
    distiller(B)
    student(A)
    return distiller(A)


def a_clone_on_purpose(student, distiller):
    student(A.clone())
    student(B)
    student(A)
    return distiller(A.clone())


def unrecorded_between(student, distiller):
    student(A)
    with torch.no_grad():
        student(B)
    student.eval()(B)
    student.train()
    return distiller(A)


def teacher_on_both_first(student, distiller):
    of_a, _ = distiller.teacher_features(A), distiller.teacher_features(B)
    student(B)
    student(A)
    return distiller(teacher_features=of_a)


@pytest.mark.parametrize(
    "step",
    [
        a_clone_on_purpose,
        other_batch_first,
        same_batch_twice,
        in_turn,
        unrecorded_between,
        teacher_on_both_first,
    ],
)
def test_several_forwards_whose_last_is_the_one_that_is_meant(step):
    student, _, distiller = make()
    student(A)
    expected = copy.deepcopy(DistillationModel(student, distiller))(A)[1]
    # Its estimates are those of the first batch that it sees.
    if step is in_turn:
        assert torch.isfinite(step(student, distiller))
    else:
        torch.testing.assert_close(step(student, distiller), expected)


def test_remembering_batches_keeps_none_of_them():
    student, _, _distiller = make()
    batch = images().clone()
    alive = torch.multiprocessing.reductions.StorageWeakRef(batch.untyped_storage())
    student(batch)
    student(images())
    del batch
    assert alive.expired()
