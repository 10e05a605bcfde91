"""Loops that zero the student's gradients, and those of the heads or not."""

import warnings

import pytest
import torch
from _distillers import images, make

ZEROED = {
    "optimizer": lambda student, distiller, optimizer: optimizer.zero_grad(),
    "both": lambda student, distiller, optimizer: (student.zero_grad(), distiller.zero_grad()),
    "values": lambda student, distiller, optimizer: optimizer.zero_grad(set_to_none=False),
    "student": lambda student, distiller, optimizer: student.zero_grad(),
}


def said(zero, *, first=False, accumulated=1, steps=6):
    torch.manual_seed(0)
    student, _, distiller = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    distiller.add_to(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if first and not step % accumulated:
                zero(student, distiller, optimizer)
            loss = student(images()).square().mean() + distiller(images())
            if not first and not step % accumulated:
                zero(student, distiller, optimizer)
            loss.backward()
            if not (step + 1) % accumulated:
                optimizer.step()
    return [str(x.message) for x in caught]


@pytest.mark.parametrize("first", [True, False], ids=["before the forward", "after it"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_of_the_heads_that_pile_up_are_noticed_once(first, accumulated):
    (message,) = said(ZEROED["student"], first=first, accumulated=accumulated, steps=8)
    assert "pile up" in message
    assert "optimizer.zero_grad()" in message


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("first", [True, False], ids=["before the forward", "after it"])
@pytest.mark.parametrize("zero", ["optimizer", "both", "values"])
def test_nothing_is_said_where_they_are_zeroed_or_accumulated_together(zero, first, accumulated):
    assert said(ZEROED[zero], first=first, accumulated=accumulated, steps=9) == []
