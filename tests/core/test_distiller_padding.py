"""Tokens and their masks, from the distiller's call to the pair."""

import pytest
import torch
from _models import TokenNet
from torch import nn

from vid_loss import DistillationModel, Distiller, KDLoss, Pair, VIDLoss


def tokens():
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4]),
    }


@pytest.mark.parametrize("given", ["as token_mask", "as attention_mask"])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_padding_changes_nothing(norm, given):
    torch.manual_seed(0)
    student, teacher, batch = TokenNet(4), TokenNet(6), tokens()
    pair = Pair("layer", "layer", loss=lambda s, t: VIDLoss(s, t, norm=norm))
    distiller = Distiller(student, teacher, [pair], example=batch)
    mask, values = batch["attention_mask"], []
    for padding in (0, 7):
        ids = batch["input_ids"].masked_fill(mask == 0, padding)
        student(ids)
        if given == "as token_mask":
            values.append(distiller(ids, token_mask=mask))
        else:
            values.append(distiller(input_ids=ids, attention_mask=mask))
    torch.testing.assert_close(*values)
    student(ids)
    assert not torch.isclose(distiller(ids), values[0])


def test_distillation_model_masks_as_the_distiller_does():
    student, teacher, batch = TokenNet(4), TokenNet(6), tokens()
    distiller = Distiller(student, teacher, {"layer": "layer"}, example=batch)
    student(**batch)
    expected = distiller(**batch)
    model, ids = DistillationModel(student, distiller), batch["input_ids"]
    torch.testing.assert_close(model(**batch)[1], expected)
    torch.testing.assert_close(model(ids, token_mask=batch["attention_mask"])[1], expected)
    assert not torch.isclose(model(ids)[1], expected)


def test_mask_reaches_pairs_of_tokens_only():
    student, teacher, batch = TokenNet(4), TokenNet(6), tokens()
    pairs = [Pair("layer", "layer"), Pair("fc", "fc", loss=KDLoss())]
    distiller = Distiller(student, teacher, pairs, example=batch)
    student(**batch)
    assert torch.isfinite(distiller(**batch))


def test_a_feature_that_is_not_floating_point_is_refused():
    student, teacher = TokenNet(4), TokenNet(6)
    with pytest.raises(
        TypeError, match="Pair 'embed:input' -> 'layer': expected a floating-point student"
    ):
        Distiller(student, teacher, {"embed:input": "layer"}, example=tokens())


def test_a_students_own_mask_reaches_it():
    """Ours has another name: theirs is none of our business."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, mask):
            return self.fc(x * mask)

    student, teacher, x, mask = Masked(), Masked(), torch.randn(4, 3), torch.tensor([1.0, 0, 1])
    distiller = Distiller(student, teacher, {"fc": "fc"}, example={"x": x, "mask": mask})
    output, _ = DistillationModel(student, distiller)(x, mask=mask)
    torch.testing.assert_close(output, student(x, mask=mask))
