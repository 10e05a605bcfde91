"""Teachers whose weights are of another type than their inputs."""

import pytest
import torch
from _models import cnn_pair, images

from vid_loss import Distiller


@pytest.mark.parametrize(
    ("weights", "inputs", "ends"),
    [
        ("float64", "float32", "give teacher.to(torch.float32)."),
        ("float32", "float64", "give teacher.to(torch.float64)."),
        ("bfloat16", "float32", "To run it in less, add teacher_dtype=torch.bfloat16."),
        ("float16", "float32", "To run it in less, add teacher_dtype=torch.float16."),
    ],
)
def test_a_teacher_of_another_type_than_its_inputs_is_told_what_to_become(weights, inputs, ends):
    weights, inputs = getattr(torch, weights), getattr(torch, inputs)
    student, teacher = cnn_pair()
    with pytest.raises(RuntimeError, match="expected inputs that the teacher runs on") as caught:
        Distiller(
            student.to(inputs),
            teacher.to(weights),
            {"stage2": "stage2"},
            example=images().to(inputs),
        )
    assert f"Its weights are {weights}, these {inputs}: give teacher.to({inputs})" in str(
        caught.value
    )
    assert str(caught.value).endswith(ends)


@pytest.mark.parametrize("autocast", [True, False])
def test_one_that_autocast_runs_is_not_told_to_become_what_it_need_not(autocast):
    student, teacher = cnn_pair()
    options = {} if autocast else {"teacher_dtype": torch.bfloat16}
    wrong = {"teacher_inputs": lambda x: x.expand(-1, 3, -1, -1)}
    with (
        pytest.raises(RuntimeError, match=r"got 3 channels.*Map the student's with teacher_inputs"),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        Distiller(
            student,
            teacher.bfloat16(),
            {"stage2": "stage2"},
            example=images(),
            **options,
            **wrong,
        )
