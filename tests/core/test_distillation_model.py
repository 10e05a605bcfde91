"""DistillationModel: output and loss of one call."""

import pytest
import torch
from _distillers import make
from _models import TinyCNN, images

from vid_loss import DistillationModel


def test_distillation_model_gives_output_and_loss():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    names = {name for name, _ in model.named_parameters()}
    assert names == {f"student.{n}" for n, _ in student.named_parameters()} | {
        f"distiller.{n}" for n, _ in distiller.named_parameters()
    }
    output, transfer = model(images())
    assert output.shape == (8, 3)
    student(images())
    torch.testing.assert_close(transfer, distiller(images()))
    with torch.no_grad():
        assert model(images())[1] == 0
    torch.testing.assert_close(model.eval()(images()), student(images()))


def test_distillation_model_runs_the_teacher_before_the_students_activations_pile_up():
    student, teacher, distiller = make()
    model = DistillationModel(student, distiller)
    ran = []
    student.register_forward_hook(lambda *_: ran.append("student"))
    teacher.register_forward_hook(lambda *_: ran.append("teacher"))
    model(images())
    model.eval()(images())
    assert ran == ["teacher", "student", "student"]


def test_distillation_model_refuses_another_student():
    _, _, distiller = make()
    with pytest.raises(ValueError, match="student: expected the model that the distiller was"):
        DistillationModel(TinyCNN(4), distiller)
