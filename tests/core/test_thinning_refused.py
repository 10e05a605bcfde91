"""What does not fit a part of the teacher's maps is refused in words."""

import pytest
import torch
from _models import images
from _thinning import make, pairs

from vid_loss import FitNetLoss, Pair


def test_a_student_that_changes_its_size_is_told_of():
    model = make(pairs())
    model(images())
    model.student.stage1[0].stride = (2, 2)
    message = r"Pair 'stage1' -> 'stage1': expected a student's map of the teacher's size \(8, 8\)"
    with pytest.raises(ValueError, match=message):
        model(images())


def test_parts_that_an_engine_has_lost_are_no_whole_maps():
    model = make(pairs())
    model(images())
    features = model.distiller.teacher_features(images())
    model.distiller.thin(features, (images(),), {})
    moved = type(features)({name: x.clone() for name, x in features.items()})
    model.student(images())
    with pytest.raises(ValueError, match="stage1"):
        model.distiller(teacher_features=moved)


BAD_MASKS = {
    "added to logits": (torch.zeros(8, 8, 8) - 1e9, "stage1', mask: expected it to be nonzero"),
    "of other dimensions": (torch.ones(8, 1, 1, 8, 8), r"got shape \(8, 1, 1, 8, 8\) for features"),
    "of fewer samples": (torch.ones(7, 8, 8), r"stage1', VIDLoss, mask: expected .* \(8, H, W\)"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
@pytest.mark.parametrize("known", [False, True])
def test_a_mask_that_does_not_fit_is_refused_in_every_step(mask, message, known):
    model = make(pairs())
    if known:
        model(images(), token_mask=torch.ones(8, 8, 8))
    with pytest.raises(ValueError, match=message):
        model(images(), token_mask=mask)


def test_a_pair_that_is_switched_on_while_the_student_runs_is_refused():
    model = make([*pairs(), Pair("stage1", "stage1", loss=FitNetLoss, weight=0.0)])
    model(images())
    name = "stage1->stage1 FitNetLoss"
    model.student.register_forward_hook(lambda *_: model.distiller.set_weight(name, 1.0))
    message = "Pair 'stage1' -> 'stage1': expected the pairs and weights that there were"
    with pytest.raises(RuntimeError, match=message):
        model(images())
