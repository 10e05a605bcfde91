"""Models whose one argument is no tensor: a list, a graph, packed sequences."""

import pytest
import torch
from _models import cnn_pair, images
from torch import nn
from torch.utils.data import DataLoader

from vid_loss import Distiller


class Graph:
    """What a library has in the place of tensors, as PyTorch Geometric its Data."""


PACKED = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])


@pytest.mark.parametrize(
    ("example", "advice"),
    [
        ([images()], r"list\. A loader's batch.*: give batch\[0\]\. A model that takes a list as"),
        (DataLoader([1]), r"DataLoader\. Give the inputs of a batch: .*next\(iter\(loader\)\)"),
        (images().numpy(), r"ndarray\. Make it a tensor: torch\.as_tensor\(batch\)\.$"),
        (Graph(), r"Graph\. A model that takes a Graph as its one argument: \(batch,\)\.$"),
        (
            PACKED,
            r"PackedSequence as its one .*: \(batch,\)\. One .* its entries: tuple\(batch\)\.$",
        ),
    ],
)
def test_one_argument_of_another_type_is_to_be_put_into_a_tuple(example, advice):
    with pytest.raises(TypeError, match=advice):
        Distiller(*cnn_pair(), {"stage1": "stage1"}, example=example)


def test_packed_sequences_are_taken_as_the_model_takes_them():
    class Speech(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.rnn, self.last = nn.GRU(2, width), nn.Linear(width, 2)

        def forward(self, packed):
            return self.last(self.rnn(packed)[1][-1])

    student = Speech(4)
    distiller = Distiller(student, Speech(8), {"last:input": "last:input"}, example=(PACKED,))
    student(PACKED)
    distiller(PACKED).backward()
    assert student.rnn.weight_hh_l0.grad.any()
