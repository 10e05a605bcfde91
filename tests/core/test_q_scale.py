"""The teacher's own units: mean and variance of each channel, estimated from batches."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from vid_loss import VIDLoss


def loss_of(shape):
    """A VIDLoss for a teacher's feature of a shape."""
    return VIDLoss(shape, shape)


def update(loss, feature, mask=None):
    """Has a loss see a batch of the teacher."""
    loss(torch.zeros_like(feature), feature, mask)


def estimates(loss):
    """A copy of what a loss knows of the teacher and of its residuals."""
    return copy.deepcopy({**loss.scale.state_dict(), "of q": loss.running_var.var})


def reference(batches, masks=None):
    """Mean and variance over all positions of all batches, in float64."""
    rows = []
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        last = batch.double().movedim(1, -1) if batch.ndim == 4 else batch.double()
        rows.append(last.flatten(0, -2) if mask is None else last[mask.bool()])
    rows = torch.cat(rows)
    return rows.mean(0), rows.var(0, correction=0)


def assert_equals(scale, batches, masks=None, rtol=1e-5):
    mean, var = reference(batches, masks)
    torch.testing.assert_close(scale.var.double(), var, rtol=rtol, atol=0)
    # A mean is as exact as float32 and the spread of its features let it be.
    distance = (scale.mean.double() - mean).abs() / (var.sqrt() + 1e-2 * mean.abs())
    assert distance.max() < rtol


OFFSETS = {"mean 0": 0.0, "mean 1000 x std": 1000.0}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("kind", ["vector", "tokens", "map"])
def test_it_is_mean_and_variance_of_all_positions_of_all_batches(kind, offset):
    torch.manual_seed(0)
    shapes = {"vector": (3,), "tokens": (5, 3), "map": (3, 4, 2)}
    units = torch.tensor([1e-2, 1.0, 50.0])
    loss, batches = loss_of((8, *shapes[kind])), []
    scale = loss.scale
    for size in (8, 1, 32, 3):
        batch = torch.randn(size, *shapes[kind])
        factor = units.view(3, 1, 1) if kind == "map" else units
        batches.append(factor * (batch + offset))
        update(loss, batches[-1])
        if size > 1 or kind != "vector":  # one vector has no spread of its own
            assert_equals(scale, batches, rtol=1e-4 if offset else 1e-5)
    assert scale.positions.tolist() == [sum(x.numel() // 3 for x in batches)] * 3


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_masked_tokens_count_in_nothing_whatever_is_there(offset):
    torch.manual_seed(0)
    loss, batches, masks = loss_of((6, 5, 3)), [], []
    for i in range(4):
        mask = torch.rand(6, 5) < 0.5
        mask[0] = i > 1  # the first sample may be all padding
        batch = (torch.randn(6, 5, 3) + offset).masked_fill(~mask.unsqueeze(-1), math.nan)
        update(loss, batch, mask)
        batches.append(batch)
        masks.append(mask)
        assert loss.scale.positions.tolist() == [sum(x.sum() for x in masks)] * 3
        assert_equals(loss.scale, batches, masks, rtol=1e-4 if offset else 1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_valid_tokens_leaves_it(first):
    torch.manual_seed(0)
    loss, batches = loss_of((6, 5, 3)), []
    for empty in (first, not first, False):
        batch = torch.randn(6, 5, 3) + 2
        mask = torch.full((6, 5), not empty)
        before = estimates(loss)
        update(loss, batch, mask)
        if empty:
            torch.testing.assert_close(estimates(loss), before, rtol=0, atol=0)
        else:
            batches.append(batch)
    assert_equals(loss.scale, batches)


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (0, 3, 2, 2)], ids=len)
def test_an_empty_batch_leaves_it(shape):
    loss = loss_of((4, *shape[1:]))
    for feature in (torch.randn(shape), torch.randn(4, *shape[1:]), torch.randn(shape)):
        before = estimates(loss)
        update(loss, feature)
        if not len(feature):
            torch.testing.assert_close(estimates(loss), before, rtol=0, atol=0)
    assert (loss.scale.positions > 0).all()


@pytest.mark.parametrize("value", [0.0, 1000.3, -3e-5])
def test_a_channel_that_never_changes_is_dead_in_any_unit(value):
    torch.manual_seed(0)
    loss = loss_of((7, 2, 3, 3))
    scale = loss.scale
    for _ in range(20):
        feature = torch.randn(7, 2, 3, 3)
        feature[:, 0] = value
        update(loss, feature)
    assert scale.constant().tolist() == [True, False]
    torch.testing.assert_close(scale.mean[0], torch.tensor(value))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_it(value, first):
    """A float16 teacher may overflow in one batch, the first included."""
    torch.manual_seed(0)
    loss, batches = loss_of((16, 3)), []
    for bad in (first, not first, False):
        batch = torch.randn(16, 3) + 20
        if bad:
            batch[3, 1] = value
        update(loss, batch)
        batches.append(batch)
    assert_equals_but_for(loss.scale, batches, channel=1)


def test_a_batch_whose_variance_overflows_leaves_it():
    torch.manual_seed(0)
    loss, batches = loss_of((16, 3)), []
    for bad in (False, True, False):
        batch = torch.randn(16, 3) + 20
        update(loss, batch * (1e30 if bad else 1))
        batches += [] if bad else [batch]
    assert_equals(loss.scale, batches)


def assert_equals_but_for(scale, batches, channel):
    """One channel has seen the finite batches alone, the others all."""
    whole, finite = reference(batches), reference([x for x in batches if x.isfinite().all()])
    for estimate, of_all, of_finite in zip((scale.mean, scale.var), whole, finite, strict=True):
        of_all[channel] = of_finite[channel]
        torch.testing.assert_close(estimate.double(), of_all, rtol=1e-5, atol=0)


def test_after_many_batches_the_newest_counts_for_a_thousandth():
    loss = loss_of((2, 1))
    update(loss, torch.tensor([[-1.0], [1.0]]).repeat(5000, 1))
    before = loss.scale.mean.clone()
    update(loss, torch.full((2, 1), 10.0))
    assert loss.scale.mean - before == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16], ids=lambda f: f.__name__)
def test_buffers_stay_float32_in_a_model_that_is_cast(cast):
    loss = VIDLoss((8, 3), (8, 3))
    loss(torch.randn(8, 3), torch.randn(8, 3) * 1e6)  # whose variance float16 does not hold
    before = copy.deepcopy(dict(loss.named_buffers()))
    model = cast(nn.Sequential(loss))
    assert {p.dtype for p in model.parameters()} <= {torch.float16, torch.bfloat16}
    assert len(before) == 4
    torch.testing.assert_close(dict(loss.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("variance", ["running", "trained"])
def test_state_round_trip_is_bit_exact(variance):
    torch.manual_seed(0)
    loss, other = (VIDLoss((8, 3), (8, 3), variance=variance) for _ in range(2))
    for _ in range(5):
        loss(torch.randn(8, 3), torch.randn(8, 3) + 7)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert dict(other.named_buffers()).keys() == dict(loss.named_buffers()).keys()
    for name, buffer in loss.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name
    batch = torch.randn(8, 3), torch.randn(8, 3)
    assert torch.equal(loss(*batch), other(*batch))


def test_a_state_without_estimates_is_refused():
    loss = VIDLoss((8, 3), (8, 3))
    state = {name: x for name, x in loss.state_dict().items() if "scale" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*scale"):
        loss.load_state_dict(state)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (0, 3, 2, 2)])
def test_a_process_without_samples_takes_those_of_the_others(monkeypatch, shape):
    whole, empty, sent = loss_of((6, *shape[1:])), loss_of((6, *shape[1:])), []
    monkeypatch.setattr("vid_loss.losses.together.several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sent.append(x.clone()))
    update(whole, 5 + torch.randn(6, *shape[1:]))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(sent.pop(0)))
    update(empty, torch.empty(shape))
    assert not sent
    assert whole.scale.positions.min() > 0
    for name, estimate in estimates(whole).items():
        assert torch.equal(estimates(empty)[name], estimate), name


def test_estimates_of_a_wider_teacher_stay_in_their_dtype():
    """A float64 teacher beside heads in float32: the loss widens the features, not the buffers."""
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 3), 3 * torch.randn(8, 3, dtype=torch.float64)
    wide, narrow = VIDLoss((8, 3), (8, 3)), VIDLoss((8, 3), (8, 3))
    narrow.load_state_dict(wide.state_dict())
    values = wide(student, teacher), narrow(student, teacher.float())
    torch.testing.assert_close(values[0].float(), values[1])
    torch.testing.assert_close(wide.state_dict(), narrow.state_dict())
