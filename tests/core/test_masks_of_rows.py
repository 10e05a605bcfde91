"""Rows (N, C) of which some count, such as the training nodes of a graph."""

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair


class Graph(nn.Module):
    """A graph convolution: nodes are rows, and each is mixed with its neighbours."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, nodes, edges):
        mixed = self.conv(nodes).index_add(0, edges[1], self.conv(nodes)[edges[0]])
        return self.last(mixed.tanh())


TRAIN = torch.arange(12) < 5
EXAMPLE = torch.arange(36.0).reshape(12, 3).sin(), torch.tensor([[0, 1, 2, 7], [1, 2, 3, 8]])
ROWS = {
    "student_transform": lambda x: x.unsqueeze(1),
    "teacher_transform": lambda x: x.unsqueeze(1),
}


def build(**options):
    torch.manual_seed(0)
    pair = Pair("last:input", "last:input", **options)
    return Distiller(Graph(4), Graph(6), [pair], example=EXAMPLE)


def gradient(distiller, **options):
    """Returns where the student's feature has a gradient, by node."""
    features = []
    hook = distiller.student.last.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    distiller.student(*EXAMPLE)
    hook.remove()
    (found,) = torch.autograd.grad(distiller(*EXAMPLE, **options), features[-1])
    return found.abs().sum(1) > 0


@pytest.mark.parametrize("mask", [lambda *_: TRAIN, lambda nodes, edges: TRAIN.float()])
def test_a_pairs_mask_of_rows_says_what_to_write(mask):
    with pytest.raises(ValueError, match="expected none for a vector") as caught:
        build(mask=mask)
    assert "x.unsqueeze(1)), and a mask (N, 1), mask.unsqueeze(1)" in str(caught.value)
    assert "attention_mask" not in str(caught.value)


def test_a_calls_mask_of_rows_says_what_to_write():
    distiller = build()
    distiller.student(*EXAMPLE)
    with pytest.raises(
        ValueError, match=r"expected a mask \(N, L\) .* got shape \(12,\)"
    ) as caught:
        distiller(*EXAMPLE, token_mask=TRAIN)
    assert "x.unsqueeze(1)), and a mask (N, 1), mask.unsqueeze(1)" in str(caught.value)


def test_what_is_to_be_written_has_the_rows_that_count_alone():
    distiller = build(**ROWS)
    assert torch.equal(gradient(distiller, token_mask=TRAIN.unsqueeze(1)), TRAIN)
    own = build(**ROWS, mask=lambda nodes, edges: TRAIN.unsqueeze(1))
    assert torch.equal(gradient(own), TRAIN)


def test_without_a_mask_all_rows_count():
    assert gradient(build()).all()
