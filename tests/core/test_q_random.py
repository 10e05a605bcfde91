"""Random set-ups of the default form, by value and gradient, against the slow twin in float64."""

import math
import random

import pytest
import torch
from _twin import Twin

from vid_loss import VIDLoss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = 200


class SetUp:
    """One drawn case: sizes, kind, dtype and options."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.kind = draw.choice(["vector", "tokens", "map"])
        self.positions = {
            "vector": (),
            "tokens": (draw.choice([1, 2, 7]),),
            "map": draw.choice([(1, 1), (1, 5), (3, 2)]),
        }[self.kind]
        self.sizes = [draw.choice([1, 2, 3, 8]) for _ in range(3)]  # of the batches
        self.channels = draw.choice([1, 3, 8]), draw.choice([1, 2, 5])
        self.dtype = draw.choice(DTYPES)
        self.masked = self.kind != "vector" and draw.random() < 0.6
        self.options = {
            "reduction": draw.choice(["mean", "batchmean", "sum", "none"]),
            "momentum": draw.choice([0.01, 0.05, 0.5, 1.0]),
        }
        if self.kind != "vector":
            self.options["hidden_channels"] = draw.choice([None, 4])
            self.options["norm"] = draw.choice(self._norms())
        self.filling = draw.choice([None, math.nan, -math.inf, 1e30])  # of masked positions
        self.seed = seed

    def _norms(self):
        """Those that have two values at least to normalize: torch refuses one, or makes it 0."""
        hidden = self.options["hidden_channels"] or self.channels[1]
        one_position = self.kind == "tokens" or self.positions == (1, 1)
        norms = ["none"]
        if hidden > 1 or not one_position:
            norms.append("layer")
        if self.kind == "map" and not one_position:
            norms.append("group")
        if min(self.sizes) * torch.Size(self.positions).numel() > 1 and not self.masked:
            norms.append("batch")
        return norms

    def __str__(self):
        return ", ".join(f"{key}={value}" for key, value in vars(self).items())

    def message(self, found):
        return f"{self}\n{found}"

    def batches(self):
        generator = torch.Generator().manual_seed(self.seed)
        for size in self.sizes:
            shapes = [
                (size, *self.positions, c) if self.kind != "map" else (size, c, *self.positions)
                for c in self.channels
            ]
            student, teacher = (torch.randn(shape, generator=generator) for shape in shapes)
            mask = None
            if self.masked:
                mask = torch.rand(size, *self.positions, generator=generator) < 0.6
                # The twin's head is given it as it is, and a map's head takes it as booleans.
                whole = self.kind == "tokens" and self.seed % 2
                mask = mask.to(torch.long if whole else torch.bool)
            yield student.to(self.dtype), (3 * teacher + 2).to(self.dtype), mask

    def filled(self, teacher, mask):
        """The teacher's feature with anything where it is masked; the twin has it without."""
        if mask is None or self.filling is None:
            return teacher
        padding = ~mask.bool().unsqueeze(1 if self.kind == "map" else -1)
        return teacher.masked_fill(padding, torch.tensor(self.filling, dtype=self.dtype))

    def tolerance(self):
        """Float32's where the loss is computed in it; the head's, where features are half."""
        return 1e-7 if self.dtype == torch.float64 else 5e-4


def gradients(value, student, head):
    weight = torch.linspace(1, 2, value.numel(), dtype=value.dtype)
    inputs = [student, *head.parameters()]
    found = torch.autograd.grad((value.view(-1) * weight).sum(), inputs)
    return [x.double() for x in found]


@pytest.mark.parametrize("tens", range(CASES // 10))
def test_a_random_set_up_is_its_slow_twin(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        case = SetUp(seed)
        first, *_ = case.batches()
        torch.manual_seed(seed)
        loss = VIDLoss(first[0].shape, first[1].shape, **case.options)
        if case.dtype == torch.float64:
            loss = loss.double()
        twin = Twin(loss.head, case.options["momentum"])
        for student, teacher, mask in case.batches():
            student.requires_grad_()
            value = loss(student, case.filled(teacher, mask), mask)
            slow = student.detach().double().requires_grad_()
            expected = twin(slow, teacher, mask, case.options["reduction"])
            compared = {"rtol": case.tolerance(), "atol": case.tolerance()}
            torch.testing.assert_close(value.double(), expected, **compared, msg=case.message)
            found = gradients(value, student, loss.head)
            wanted = gradients(expected, slow, twin.head)
            if student.dtype.itemsize == 2:  # the student's own gradient is as short
                found[0], wanted[0] = found[0], wanted[0].to(student.dtype).double()
                compared["rtol"] = 2 * torch.finfo(student.dtype).eps
            torch.testing.assert_close(found[0], wanted[0], **compared, msg=case.message)
            compared["rtol"] = case.tolerance()
            torch.testing.assert_close(found[1:], wanted[1:], **compared, msg=case.message)
