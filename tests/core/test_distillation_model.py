"""DistillationModel: output and loss of one call."""

import pytest
import torch
from _distillers import make
from _models import TinyCNN, images
from torch.optim.swa_utils import AveragedModel

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


def test_averages_with_buffers_are_of_the_student_or_of_the_whole_model():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    whole, alone = (AveragedModel(x, use_buffers=True) for x in (model, model.student))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output, transfer = model(images())
        (output.square().mean() + transfer).backward()
        optimizer.step()
        whole.update_parameters(model)
        alone.update_parameters(model.student)
    plain = TinyCNN(4)
    plain.load_state_dict(model.student.state_dict())
    expected = model.eval()(images())
    torch.testing.assert_close(plain.eval()(images()), expected, rtol=0, atol=0)
    averaged = whole.eval()(images())
    torch.testing.assert_close(averaged, alone.eval()(images()), rtol=0, atol=0)
    assert not torch.equal(averaged, expected)
    plain.load_state_dict(whole.module.student.state_dict())
    torch.testing.assert_close(plain(images()), averaged, rtol=0, atol=0)
