"""Attention masks that come by position, and torch's own masks, which are set at the padding."""

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair


class Encoder(nn.Module):
    """Tokens that do not see each other; each of its masks is for the loss alone."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, width), nn.Linear(width, width)

    def forward(self, ids, attention_mask=None, src_key_padding_mask=None):
        return self.out(self.embed(ids))


def batch():
    torch.manual_seed(1)
    lengths = torch.tensor([6, 2, 4, 1])
    ids = torch.randint(20, (4, 6))
    return ids, (torch.arange(6) < lengths.unsqueeze(1)).long()


def build(pair=None, **options):
    torch.manual_seed(0)
    student, teacher = Encoder(4), Encoder(8)
    return student, Distiller(student, teacher, [pair or Pair("out", "out")], **options)


def value(pair=None, example=None, *args, **kwargs):
    student, distiller = build(pair, example=example)
    student(*args, **kwargs)
    return distiller(*args, **kwargs).item()


def test_an_attention_mask_by_position_is_that_by_name():
    ids, mask = batch()
    expected = value(None, {"ids": ids, "attention_mask": mask}, ids=ids, attention_mask=mask)
    assert value(None, (ids, mask), ids, mask) == expected
    assert value(None, (ids, mask), ids, attention_mask=mask) == expected
    assert value(None, ids, ids, mask) == expected  # the example may do without
    assert value(None, ids, ids) != expected


def test_padding_that_torch_s_mask_leaves_out_counts_and_is_told():
    ids, mask = batch()
    padding = {"ids": ids, "src_key_padding_mask": ~mask.bool()}
    with pytest.warns(UserWarning, match=r"'src_key_padding_mask'.*padding counts.*lambda"):
        build(example=padding)


def test_torch_s_mask_by_its_name_would_be_taken_inverted_and_is_refused():
    ids, mask = batch()
    padding = {"ids": ids, "src_key_padding_mask": ~mask.bool()}
    with pytest.raises(ValueError, match=r"set at the others\. Write mask=lambda"):
        build(Pair("out", "out", mask="src_key_padding_mask"), example=padding)


def test_the_line_that_both_messages_say_is_right():
    ids, mask = batch()
    padding = {"ids": ids, "src_key_padding_mask": ~mask.bool()}
    pair = Pair("out", "out", mask=lambda *_, src_key_padding_mask, **__: ~src_key_padding_mask)
    expected = value(None, {"ids": ids, "attention_mask": mask}, ids=ids, attention_mask=mask)
    assert value(pair, padding, **padding) == expected
