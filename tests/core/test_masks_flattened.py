"""Tokens of all samples in a row, (N * L, C): their padding is warned of, with what helps."""

import re
import warnings

import pytest
import torch
from _masks import EncoderDecoder, Towers, batch_of, mask_of
from _models import TokenNet
from torch import nn

from vid_loss import Distiller, FitNetLoss, KDLoss, Pair, VIDLoss

pytestmark = pytest.mark.usefixtures("seed")


class Rows(TokenNet):
    """A layer of rows, as the heads of many language models are."""

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids).flatten(0, 1))


class Router(nn.Module):
    """The gate of a mixture of experts sees rows; all else is tokens."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layer = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        gates = self.layer(x.view(-1, x.shape[-1])).softmax(1).view(*x.shape[:2], 1, 4)
        return (torch.stack([expert(x) for expert in self.experts], -1) * gates).sum(-1)


class SequenceFirst(TokenNet):
    """Its rows are all first tokens, then all second ones."""

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids.T).flatten(0, 1))


class Embedded(nn.Module):
    """Mixes tokens, and is given embeddings in the place of ids."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.GRU(3, width, batch_first=True)
        self.layer = nn.Linear(width, width)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.layer(self.mix(inputs_embeds)[0].reshape(-1, self.mix.hidden_size))


class OfLabels(EncoderDecoder):
    """T5's: the labels are the decoder's inputs, and its last layer sees rows."""

    def __init__(self, width):
        super().__init__(width)
        self.layer = nn.Linear(width, 20)

    def forward(self, input_ids, labels, attention_mask=None):
        ids = labels.roll(1, 1).clamp(min=0)
        return self.layer(super().forward(input_ids, ids, attention_mask).flatten(0, 1))


class OfDecoder(OfLabels):
    def forward(self, input_ids, decoder_input_ids, attention_mask, decoder_attention_mask=None):
        return super().forward(input_ids, decoder_input_ids, attention_mask)


class Torch(Rows):
    """Takes a mask of what does not count, as torch's own layers do."""

    def forward(self, input_ids, src_key_padding_mask=None):
        return super().forward(input_ids)


MASK = mask_of(8, 3, most=8)


def example_of(cls):
    batch = batch_of(TokenNet)
    batch["attention_mask"] = MASK
    if cls is Embedded:
        batch["inputs_embeds"] = torch.randn(*batch.pop("input_ids").shape, 3)
    if cls is OfLabels:
        batch["labels"] = torch.arange(16).view(2, 8).masked_fill(MASK == 0, -100)
    if cls is OfDecoder:
        batch["attention_mask"] = mask_of(6, 8, most=8)
        batch["decoder_input_ids"] = torch.arange(16).view(2, 8)
        batch["decoder_attention_mask"] = MASK
    if cls is Torch:
        batch["src_key_padding_mask"] = batch.pop("attention_mask") == 0
    return batch


def build(cls, pair, example):
    torch.manual_seed(0)
    student, teacher = cls(4), cls(4)
    return student, Distiller(student, teacher, [pair], example=example)


def term(cls, pair, batch):
    student, distiller = build(cls, pair, batch)
    student(**batch)
    return next(iter(distiller.weighted_terms(**batch).values()))


def as_told(message, transposed=False):
    """What a message says to write, as it stands there."""
    told = re.search(r"Write Pair\(\.\.\., (.*)\), which", message)[1]
    if transposed:
        other = re.search(r"come first, (.*)\. If", message)[1]
        told = f"{told[: told.index('__: ')]}__: {other}"
    return eval(f"dict({told})")


def warned(*args):
    with pytest.warns(UserWarning, match=r"padding counts. Write Pair\(") as caught:
        build(*args)
    (found,) = [str(x.message) for x in caught if "in a row" in str(x.message)]
    return found


MODELS = [Rows, Router, SequenceFirst, Embedded, OfLabels, OfDecoder, Torch]


@pytest.mark.parametrize("loss", [VIDLoss, FitNetLoss, KDLoss()])
@pytest.mark.parametrize("cls", MODELS)
def test_the_line_that_is_told_counts_what_the_mask_says(cls, loss):
    batch = example_of(cls)
    message = warned(cls, Pair("layer", "layer", loss=loss), batch)
    assert "Pair 'layer' -> 'layer', mask: expected tokens (N, L, C)" in message
    assert "got shape (16, " in message
    pair = Pair("layer", "layer", loss=loss, **as_told(message, cls is SequenceFirst))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = term(cls, pair, batch)
    torch.manual_seed(0)
    student, teacher = cls(4), cls(4)
    rows, features = (MASK.T if cls is SequenceFirst else MASK).flatten() == 1, []
    for model in (student, teacher):
        model.layer.register_forward_hook(lambda *x: features.append(x[2]))
        model(**batch)
    alone = [x[rows].unsqueeze(1) for x in features]
    by_hand = loss if isinstance(loss, nn.Module) else loss(*(x.shape for x in alone))
    weight = getattr(by_hand, "default_weight", 1.0)
    torch.testing.assert_close(found, weight * by_hand(*alone))


def test_a_decoders_rows_are_told_by_its_own_arguments():
    pair = Pair("layer", "layer")
    labels = warned(OfLabels, pair, example_of(OfLabels))
    assert "mask=lambda *_, labels, **__: (labels != -100).reshape(-1, 1)" in labels
    shorter = {**example_of(OfLabels), "labels": torch.arange(10).view(2, 5)}
    assert "(labels != -100)" in warned(OfLabels, pair, shorter)
    decoder = warned(OfDecoder, pair, example_of(OfDecoder))
    assert "decoder_attention_mask, **__: decoder_attention_mask.reshape(-1, 1)" in decoder


@pytest.mark.parametrize("given", ["by name", "by position", "as token_mask"])
def test_a_mask_that_the_example_did_not_have_is_noticed_once(given):
    batch = example_of(Rows)
    ids, mask = batch.values()
    pairs = [Pair("layer", "layer"), Pair("embed", "embed")]
    student = Rows(4)
    distiller = Distiller(student, Rows(4), pairs, example={"input_ids": ids})
    calls = {
        "by name": ((), batch),
        "by position": ((ids, mask), {}),
        "as token_mask": ((ids,), {"token_mask": mask}),
    }
    args, kwargs = calls[given]
    student(ids)
    with pytest.warns(UserWarning, match=r"'layer' -> 'layer', mask: .*\(16, 4\), the tokens of"):
        distiller(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(ids)
        distiller(*args, **kwargs)


def test_a_mask_that_a_pair_of_rows_is_given_as_it_is_is_refused_with_the_line():
    batch = example_of(Rows)
    with pytest.raises(ValueError, match="expected none for a vector; got shape") as caught:
        build(Rows, Pair("layer", "layer", mask="attention_mask"), batch)
    pair = Pair("layer", "layer", **as_told(str(caught.value)))
    assert term(Rows, pair, batch).isfinite()


class Pooled(TokenNet):
    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids).mean(1))


class ImageRows(Towers):
    """The rows are those of the image, of which there are as many."""

    def forward(self, input_ids, pixel_values, attention_mask=None):
        self.text(self.embed(input_ids))
        return self.image(self.patch(pixel_values).flatten(2).mT.flatten(0, 1))


def test_nothing_is_said_of_vectors_that_the_mask_is_not_of():
    batch = example_of(Rows)
    square = {"input_ids": torch.arange(9).view(3, 3), "attention_mask": mask_of(3, 2, 1, most=3)}
    one = {"input_ids": torch.arange(4).view(4, 1), "attention_mask": mask_of(1, 1, 1, 0, most=1)}
    cases = [
        (Pooled, Pair("layer", "layer"), batch),
        (Pooled, Pair("layer", "layer"), square),
        (Rows, Pair("layer", "layer"), one),
        (Rows, Pair("layer", "layer", mask=False), batch),
        (Rows, Pair("layer", "layer"), {"input_ids": batch["input_ids"]}),
        (ImageRows, Pair("image", "image"), batch_of(Towers)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in cases:
            build(*case)
