"""What stands in the padding of a feature changes nothing, not even where it is NaN."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from vid_loss import Distiller, FitNetLoss, KDLoss, LwFLoss, Pair, VIDLoss

OWNERS = [("teacher",), ("student",), ("student", "teacher")]


class Mixing(nn.Module):
    """A head of one's own that looks at the neighbors, padded ones too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, tokens):
        return self.layer(tokens.mT).mT


CASES = {
    "VID": (lambda s, t: VIDLoss(s, t), 4),
    "VID, batch norm": (lambda s, t: VIDLoss(s, t, norm="batch"), 4),
    "VID, trained variance": (lambda s, t: VIDLoss(s, t, variance="trained"), 4),
    "VID, as the paper": (lambda s, t: VIDLoss(s, t, variance="trained", standardize=False), 4),
    "VID, no norm": (lambda s, t: VIDLoss(s, t, norm="none"), 4),
    "VID, a head that mixes": (lambda s, t: VIDLoss(s, t, head=Mixing()), 4),
    "VID, half of the positions": (lambda s, t: VIDLoss(s, t, positions=0.5), 4),
    "FitNet, half of the positions": (partial(FitNetLoss, positions=0.5), 4),
    "KD": (lambda s, t: KDLoss(), 6),
    "LwF": (LwFLoss, 4),
    "FitNet": (FitNetLoss, 4),
}


def batches(width, filling, owners):
    """Three batches, the first with a sample that is all padding."""
    generator = torch.Generator().manual_seed(0)
    for empty in (0, 2, None):
        student, teacher = (torch.randn(5, 7, n, generator=generator) for n in (width, 6))
        mask = torch.rand(5, 7, generator=generator) < 0.5
        if empty is not None:
            mask[empty] = False
        padded = ~mask.unsqueeze(-1)
        student = student.masked_fill(padded, filling) if "student" in owners else student
        teacher = teacher.masked_fill(padded, filling) if "teacher" in owners else teacher
        yield student, teacher, mask


@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("owners", OWNERS, ids="+".join)
@pytest.mark.parametrize(("build", "width"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_without(build, width, owners, filling):
    torch.manual_seed(0)
    filled = build((5, 7, width), (5, 7, 6))
    clean = copy.deepcopy(filled)
    both = batches(width, filling, owners), batches(width, 0.0, owners)
    for number, (batch, twin) in enumerate(zip(*both, strict=True)):
        results = []
        for loss, (student, teacher, mask) in ((filled, batch), (clean, twin)):
            torch.manual_seed(number)  # the same positions
            loss.zero_grad()
            student = student.requires_grad_()
            value = loss(student, teacher, mask)
            value.backward()
            assert value.isfinite()
            results.append([value, student.grad, *(p.grad for p in loss.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(filled.state_dict(), clean.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_nor_in_a_distiller(filling):
    class Net(nn.Module):
        def __init__(self, filling=None):
            super().__init__()
            self.h = nn.Linear(3, 4)
            self.out = nn.Identity()
            self.filling = filling

        def forward(self, x, attention_mask):
            h = self.h(x)
            if self.filling is not None:
                h = h.masked_fill(~attention_mask.unsqueeze(-1), self.filling)
            return self.out(h)

    values = []
    for fill in (filling, 0.0):
        torch.manual_seed(0)
        student, teacher = Net(fill), Net(fill)
        inputs = {"x": torch.randn(5, 7, 3), "attention_mask": torch.rand(5, 7) < 0.5}
        pairs = [Pair("out", "out", name=name, loss=build) for name, (build, _) in CASES.items()]
        pairs = [pair for pair in pairs if "mixes" not in pair.name]  # for another width
        distiller = Distiller(student, teacher, pairs, example=inputs)
        for _ in range(2):
            student(**inputs)
            distiller.zero_grad()
            value = distiller(**inputs)
            value.backward()
            values.append([value, *(p.grad for p in [*distiller.parameters(), student.h.weight])])
    torch.testing.assert_close(values[:2], values[2:], rtol=0, atol=0)
    assert all(x.isfinite().all() for x in values[0])
