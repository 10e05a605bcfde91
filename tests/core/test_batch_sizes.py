"""Batch sizes of features: the student's and the teacher's are compared in each call.

They are not compared with the inputs': models fold other dimensions into the batch, or take a part
of it, and not always as in the example.
"""

import pytest
import torch
from torch import nn

from vid_loss import ATLoss, Distiller, FitNetLoss, KDLoss, LwFLoss, Pair


class Net(nn.Module):
    """Maps, then a vector, of whatever a subclass makes of its inputs."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.fc = nn.Linear(width, 5)

    def folded(self, x):
        return x

    def forward(self, x):
        return self.fc(self.conv(self.folded(x)).mean((2, 3)))


class Frames(Net):
    """Videos (N, T, 1, H, W)."""

    def folded(self, x):
        return x.flatten(0, 1)


class Twice(Net):
    """R-Drop: two passes of dropout in one, while training."""

    def folded(self, x):
        return torch.cat([x, x]) if self.training else x


class Crops(Net):
    """A list of views of one size, as many as there are."""

    def folded(self, x):
        return torch.cat(x)


class Kept(Net):
    """Samples that are all 0 are padding, and left out."""

    def folded(self, x):
        return x[x.flatten(1).any(1)]


def some(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


PAIRS = [
    Pair("conv", "conv"),
    Pair("conv", "conv", loss=FitNetLoss),
    Pair("conv", "conv", loss=ATLoss()),
    Pair("fc", "fc", loss=KDLoss()),
    Pair("fc:input", "fc", loss=LwFLoss),
]
CASES = {
    "frames, more of them": (Frames, Frames, some(2, 3, 1, 4, 4), some(2, 5, 1, 4, 4), None),
    "twice in training": (Twice, Net, some(2, 1, 4, 4), some(3, 1, 4, 4), "twice"),
    "more views": (Crops, Crops, ([some(2, 1, 4, 4)],), ([some(2, 1, 4, 4)] * 3,), None),
    "a part": (
        Kept,
        Kept,
        some(3, 1, 4, 4),
        torch.cat([some(3, 1, 4, 4), torch.zeros(2, 1, 4, 4)]),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_batch_may_be_another_multiple_of_the_inputs_than_in_the_example(case):
    student_kind, teacher_kind, example, batch, maps_inputs = case
    torch.manual_seed(0)
    student, teacher = student_kind(4), teacher_kind(6)

    def as_the_student(x):
        return torch.cat([x, x]) if student.training else x

    inputs = {"teacher_inputs": as_the_student} if maps_inputs else {}
    distiller = Distiller(student, teacher, PAIRS, example=example, **inputs)
    args = batch if isinstance(batch, tuple) else (batch,)
    student(*args)
    assert distiller(*args).isfinite()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_student_s_batch_that_is_not_the_teacher_s_is_refused_in_its_call(pair):
    torch.manual_seed(0)
    student, x = Twice(4), some(3, 1, 4, 4)
    distiller = Distiller(student, Net(6), [pair], example=x)
    student(x)
    message = (
        r"^Pair .*: expected one batch size; got \(6, .* and \(3, .*the batch that the student"
    )
    with pytest.raises(ValueError, match=message):
        distiller(x)
