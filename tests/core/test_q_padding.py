"""What stands in the teacher's padding changes nothing, not even where it is NaN."""

import copy
import math

import pytest
import torch

from vid_loss import Distiller, FitNetLoss, KDLoss, LwFLoss, Pair, VIDLoss

CASES = {
    "VID": (lambda s, t: VIDLoss(s, t), 4),
    "VID, batch norm": (lambda s, t: VIDLoss(s, t, norm="batch"), 4),
    "VID, trained variance": (lambda s, t: VIDLoss(s, t, variance="trained"), 4),
    "VID, as the paper": (lambda s, t: VIDLoss(s, t, variance="trained", standardize=False), 4),
    "KD": (lambda s, t: KDLoss(), 6),
    "LwF": (LwFLoss, 4),
    "FitNet": (FitNetLoss, 4),
}


def batches(width, filling):
    """Three batches, the first with a sample that is all padding."""
    generator = torch.Generator().manual_seed(0)
    for empty in (0, 2, None):
        student, teacher = (torch.randn(5, 7, n, generator=generator) for n in (width, 6))
        mask = torch.rand(5, 7, generator=generator) < 0.5
        if empty is not None:
            mask[empty] = False
        yield student, teacher.masked_fill(~mask.unsqueeze(-1), filling), mask


@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("build", "width"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_without(build, width, filling):
    torch.manual_seed(0)
    filled = build((5, 7, width), (5, 7, 6))
    clean = copy.deepcopy(filled)
    for batch, twin in zip(batches(width, filling), batches(width, 0.0), strict=True):
        results = []
        for loss, (student, teacher, mask) in ((filled, batch), (clean, twin)):
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
    class Net(torch.nn.Module):
        def __init__(self, filling=None):
            super().__init__()
            self.h = torch.nn.Linear(3, 4)
            self.out = torch.nn.Identity()
            self.filling = filling

        def forward(self, x, attention_mask):
            h = self.h(x)
            if self.filling is not None:
                h = h.masked_fill(~attention_mask.unsqueeze(-1), self.filling)
            return self.out(h)

    values = []
    for fill in (filling, 0.0):
        torch.manual_seed(0)
        student, teacher = Net(), Net(fill)
        inputs = {"x": torch.randn(5, 7, 3), "attention_mask": torch.rand(5, 7) < 0.5}
        pairs = [Pair("h", "out", name=name, loss=build) for name, (build, _) in CASES.items()]
        pairs = [pair for pair in pairs if pair.name != "KD"]  # of unequal widths
        distiller = Distiller(student, teacher, pairs, example=inputs)
        for _ in range(2):
            student(**inputs)
            values.append(distiller(**inputs))
    torch.testing.assert_close(values[:2], values[2:], rtol=0, atol=0)
