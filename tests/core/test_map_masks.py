"""Masks of maps: which positions of (N, C, H, W) count, at whatever size the mask is given."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from vid_loss import ATLoss, FitNetLoss, VIDLoss
from vid_loss.losses.layouts import valid_positions

LOSSES = {
    "VID": VIDLoss,
    "VID, group norm": partial(VIDLoss, norm="group", hidden_channels=64),
    "VID, layer norm": partial(VIDLoss, norm="layer"),
    "VID, no norm": partial(VIDLoss, norm="none"),
    "VID, as the paper": partial(VIDLoss, variance="trained", standardize=False),
    "VID, summed": partial(VIDLoss, reduction="sum"),
    "FitNet": FitNetLoss,
    "AT": lambda *_: ATLoss(),
}
RANDOM = {"VID, a quarter of the positions": partial(VIDLoss, positions=0.25)}
losses = pytest.mark.parametrize("build", LOSSES.values(), ids=LOSSES)


def maps(student=(6, 8), teacher=(6, 8), batch=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, c, *s, generator=generator) for c, s in ((4, student), (5, teacher))]


def steps(loss, batches):
    """Values and gradients of some batches, and what the loss is afterwards."""
    found = []
    for student, teacher, mask in batches:
        loss.zero_grad()
        torch.manual_seed(0)  # the same positions
        student = student.clone().requires_grad_()
        value = loss(student, teacher) if mask is None else loss(student, teacher, mask=mask)
        value.backward()
        grads = [p.grad.clone() for p in loss.parameters()]
        found.append([value.detach(), student.grad, *grads])
    return found, [x.double() for x in loss.state_dict().values()]


def padded(map, mask, filling):
    """A map with something else where less than half of its positions' area counts."""
    own = nn.functional.interpolate(mask[:, None].float(), map.shape[2:], mode="area") >= 0.5
    return map.masked_fill(~own, filling)


@losses
def test_a_mask_that_leaves_a_rectangle_is_the_loss_of_the_rectangle(build):
    torch.manual_seed(0)
    masked = build((3, 4, 6, 8), (3, 5, 6, 8))
    plain = copy.deepcopy(masked)
    batches, cropped = [], []
    for _ in range(2):
        student, teacher = maps()
        mask = torch.zeros(3, 6, 8, dtype=torch.bool)
        mask[:, 1:4, 2:7] = True
        batches.append((student, teacher, mask))
        cropped.append((student[..., 1:4, 2:7], teacher[..., 1:4, 2:7], None))
    (found, state), (expected, expected_state) = steps(masked, batches), steps(plain, cropped)
    for got, wanted in zip(found, expected, strict=True):
        assert not got[1][..., 4:, :].any()
        got[1] = got[1][..., 1:4, 2:7]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("sizes", [((6, 8), (6, 8)), ((12, 8), (6, 16)), ((3, 4), (12, 8))])
@pytest.mark.parametrize("owners", ["teacher", "student", "student and teacher"])
@pytest.mark.parametrize("build", [*LOSSES.values(), *RANDOM.values()], ids=[*LOSSES, *RANDOM])
def test_what_the_mask_leaves_out_changes_nothing(build, owners, sizes, filling):
    torch.manual_seed(0)
    filled = build((3, 4, *sizes[0]), (3, 5, *sizes[1]))
    clean = copy.deepcopy(filled)
    student, teacher = maps(*sizes)
    mask = torch.zeros(3, 12, 16, dtype=torch.long)
    mask[0], mask[1, :6, :12] = 1, 1  # and of the last sample nothing counts
    batches = []
    for f in (filling, 0.0):
        filled_maps = [
            padded(x, mask, f) if owner in owners else x
            for owner, x in (("student", student), ("teacher", teacher))
        ]
        batches.append([(*filled_maps, mask)])
    results = [steps(loss, x) for loss, x in zip((filled, clean), batches, strict=True)]
    assert all(x.isfinite().all() for x in results[0][0][0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_position_counts_if_half_of_its_area_does():
    student, teacher = maps((2, 2), (4, 4), batch=1)
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2], mask[0, :2, 2], mask[0, 2, 0] = 1, 1, 1  # 4, 2, 1 and 0 of 4
    assert valid_positions(mask, student, teacher).tolist() == [[[True, True], [False, False]]]
    coarse = torch.tensor([[[1, 0]]])  # and one that is smaller than the maps
    assert valid_positions(coarse, student, teacher).tolist() == [[[True, False], [True, False]]]


def test_of_a_larger_map_only_what_counts_is_averaged():
    loss = FitNetLoss((1, 1, 1, 1), (1, 1, 2, 2))
    nn.init.ones_(loss.regressor.weight)
    nn.init.zeros_(loss.regressor.bias)
    teacher = torch.tensor([[[[1.0, 3.0], [100.0, 100.0]]]])
    mask = torch.tensor([[[1, 1], [0, 0]]])
    assert loss(torch.zeros(1, 1, 1, 1), teacher, mask) == 4  # of the mean of 1 and 3


def test_volumes_have_masks_too():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 4, 6, 6), torch.randn(2, 5, 2, 6, 3)
    mask = torch.ones(2, 4, 6, 6, dtype=torch.bool)
    mask[:, 2:] = False
    loss = VIDLoss(student.shape, teacher.shape)
    filled = teacher.clone()
    filled[:, :, 1:] = math.nan
    values = [copy.deepcopy(loss)(student, x, mask) for x in (teacher, filled)]
    assert values[0].isfinite()
    torch.testing.assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 8), (3, 1, 6, 8)])
@losses
def test_a_mask_of_another_rank_or_batch_is_refused(build, shape):
    loss = build((3, 4, 6, 8), (3, 5, 6, 8))
    with pytest.raises(ValueError, match=r"mask: expected a mask of shape \(3, H, W\); got shape"):
        loss(*maps(), mask=torch.ones(shape))


@pytest.mark.parametrize("kind", ["tokens", "map"])
@pytest.mark.parametrize("less", [-math.inf, -1e4])
def test_a_mask_to_be_added_to_logits_is_refused(kind, less):
    student, teacher = maps() if kind == "map" else (torch.randn(3, 6, 4), torch.randn(3, 6, 5))
    mask = torch.zeros(3, 6, 8) if kind == "map" else torch.zeros(3, 6)
    mask[1, 2:] = less
    for build in (VIDLoss, FitNetLoss):
        with pytest.raises(ValueError, match=r"mask: expected it to be nonzero .* mask == 0"):
            build(student.shape, teacher.shape)(student, teacher, mask)
