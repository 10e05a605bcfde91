"""What is no mask, or a mask for no pair, is said; what fits is not."""

import warnings

import pytest
import torch
from _masks import Towers, batch_of, build
from _models import TokenNet

from vid_loss import KDLoss, Pair


def test_nothing_is_warned_of_where_every_mask_fits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls, layers in ((Towers, ("text", "image")), (TokenNet, ("embed", "layer"))):
            build(cls, {layer: layer for layer in layers}, **batch_of(cls))


def number(**_):
    return 3


def names_nothing():
    return None


BAD = [
    ({"mask": True}, TypeError, "mask: expected the name of an argument, a function or False"),
    ({"mask": ""}, TypeError, "mask: expected the name of an argument, a function or False"),
    ({"mask": torch.ones(2, 8)}, TypeError, "mask: expected the name of an argument, a function"),
    ({"mask": "pixel_mask"}, ValueError, r"mask: expected 'pixel_mask' among .* distiller\(\*\*"),
    ({"mask": number}, TypeError, r"mask: expected a tensor, .* got int"),
    ({"mask": names_nothing}, TypeError, r"mask: expected a function of .* end with \*_, \*\*__"),
    ({"mask": lambda **_: torch.ones(2, 5)}, ValueError, r"mask of shape \(2, 8\); got .*\(2, 5\)"),
    ({"mask": lambda **_: torch.full((2, 8), -1e9)}, ValueError, "Pass mask == 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_what_is_no_mask_is_named_when_the_distiller_is_built(options, error, message):
    with pytest.raises(error, match=rf"Pair 'layer' -> 'layer'.*{message}"):
        build(TokenNet, [Pair("layer", "layer", **options)], **batch_of(TokenNet))


NOT_OF_TOKENS = Pair("fc", "fc", loss=KDLoss()), Pair("layer", "layer", mask=False)


@pytest.mark.parametrize("pair", NOT_OF_TOKENS)
def test_a_mask_for_no_pair_is_refused(pair):
    batch = batch_of(TokenNet)
    student, distiller = build(TokenNet, [pair], **batch)
    student(**batch)
    with pytest.raises(ValueError, match=r"token_mask: expected a mask of some pair's positions"):
        distiller(**batch, token_mask=batch["attention_mask"])


def test_a_function_that_fails_by_itself_is_not_called_a_misfit():
    def fails(**_):
        return 1 + "a"

    with pytest.raises(TypeError, match="unsupported operand"):
        build(TokenNet, [Pair("layer", "layer", mask=fails)], **batch_of(TokenNet))
