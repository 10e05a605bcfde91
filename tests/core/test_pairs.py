from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from vid_loss import ATLoss, FitNetLoss, KDLoss, Pair, VIDLoss


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        (Pair("a", "b"), "a->b"),
        (Pair("a", "b", loss=partial(VIDLoss, norm="group")), "a->b"),
        (Pair("a", "b", loss=KDLoss()), "a->b KDLoss"),
        (Pair("a", "b", loss=FitNetLoss), "a->b FitNetLoss"),
        (Pair("a", "b", loss=partial(FitNetLoss)), "a->b FitNetLoss"),
        (Pair("a", "b", name="mine"), "mine"),
    ],
)
def test_names_tell_layers_and_loss(pair, name):
    assert pair.label == name


@pytest.mark.parametrize("weight", [torch.tensor(2.5), np.float32(2.5), Fraction(5, 2), 2.5])
def test_a_weight_is_kept_as_a_float(weight):
    pair = Pair("a", "b", weight)
    assert type(pair.weight) is float
    assert pair.weight == 2.5
    assert pair == Pair("a", "b", 2.5)
    assert type(replace(pair, teacher="c").weight) is float


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "much"])
def test_weight_must_be_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="Pair 'a' -> 'b', weight: expected a finite number, 0 or"):
        Pair("a", "b", weight)


def test_loss_must_be_callable():
    with pytest.raises(TypeError, match=r"Pair 'a' -> 'b', loss: .* got 'VIDLoss'. For example"):
        Pair("a", "b", loss="VIDLoss")


@pytest.mark.parametrize("name", ["", "values", "training"])
def test_name_must_be_usable_as_a_modules(name):
    with pytest.raises(ValueError, match=r"name: expected a name"):
        Pair("a", "b", name=name)


@pytest.mark.parametrize(
    ("loss", "module"),
    [
        (KDLoss, r"KDLoss\(\)"),
        (ATLoss, r"ATLoss\(\)"),
        (torch.nn.functional.mse_loss, r"nn.MSELoss\(\)"),
    ],
)
def test_what_takes_no_shapes_is_refused_with_what_to_write(loss, module):
    feature = torch.randn(2, 3)
    advice = rf"Pair 'a' -> 'b': .*pass a module: loss={module}"
    with pytest.raises(TypeError, match=advice):
        Pair("a", "b", loss=loss).build_loss(feature, feature)


def test_what_builds_no_module_is_refused():
    feature = torch.randn(2, 3)
    with pytest.raises(TypeError, match="Pair 'a' -> 'b': expected loss to build a module; got 3"):
        Pair("a", "b", loss=lambda student, teacher: 3).build_loss(feature, feature)


def test_a_loss_without_a_mask_is_told_of_the_batch_s():
    loss, tokens = torch.nn.MSELoss(), torch.randn(2, 4, 3)
    pair = Pair("a", "b", loss=loss)
    with pytest.raises(TypeError, match=r"'a' -> 'b': .* mask=None, or give the pair mask=False"):
        pair.term(loss, tokens, tokens, torch.ones(2, 4, dtype=torch.bool))


class Refused(ValueError):
    """An error that is built from other things than a message."""

    def __init__(self, shape, wanted):
        super().__init__(f"{shape} is not {wanted}")
        self.shape = shape


class Refusing(nn.Module):
    def forward(self, student, teacher):
        raise Refused(student.shape, "(1, 1)")


def test_an_error_of_a_class_of_its_own_comes_as_it_is():
    tokens = torch.randn(2, 4, 3)
    with pytest.raises(Refused, match=r"is not \(1, 1\)") as caught:
        Pair("a", "b", loss=Refusing()).term(Refusing(), tokens, tokens, None)
    assert caught.value.shape == tokens.shape


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_heads_are_float32_at_least(dtype, expected):
    feature = torch.randn(2, 3).to(dtype)
    loss = Pair("a", "b").build_loss(feature, feature)
    assert {p.dtype for p in loss.parameters()} == {expected}


def test_transforms_come_before_the_layout():
    """A ViT teacher with a class token for a CNN student."""
    pair = Pair(
        "a", "b", teacher_transform=lambda x: x[:, 1:].mT.unflatten(2, (4, 4)), loss=ATLoss()
    )
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 17, 6)
    loss = pair.build_loss(student, teacher)
    expected = ATLoss()(student, teacher[:, 1:].mT.reshape(2, 6, 4, 4))
    torch.testing.assert_close(pair.term(loss, *pair.prepare(student, teacher), None), expected)


@pytest.mark.parametrize("channel_dim", [(-1,), True, "last", (1, 2, 3), (1, "a")])
def test_channel_dim_must_be_one_or_two_dimensions(channel_dim):
    with pytest.raises(TypeError, match=r"channel_dim: expected an int, None or a tuple of two"):
        Pair("a", "b", channel_dim=channel_dim)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_transform_must_return_a_tensor(side):
    pair = Pair("a", "b", **{f"{side}_transform": lambda x: None})
    with pytest.raises(TypeError, match=f"'b', {side}_transform: .*a tensor; got NoneType"):
        pair.build_loss(torch.randn(2, 3), torch.randn(2, 3))


def test_a_replaced_pair_gets_a_label_of_its_own():
    pair = replace(Pair("a", "b"), student="c", loss=KDLoss())
    assert pair.label == "c->b KDLoss"


def test_channel_dim_may_differ_between_student_and_teacher():
    pair = Pair("a", "b", channel_dim=(1, -1))
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 6)
    loss = pair.build_loss(student, teacher)
    assert (loss.student_channels, loss.teacher_channels) == (3, 6)
    assert pair.term(loss, *pair.prepare(student, teacher), None).shape == ()


@pytest.mark.parametrize("value", [torch.zeros(3), 3.0])
def test_a_loss_must_return_a_scalar_tensor(value):
    class Odd(nn.Module):
        def forward(self, student, teacher):
            return value

    feature = torch.randn(2, 3)
    with pytest.raises(ValueError, match="Pair 'a' -> 'b': expected the loss to be a scalar; got"):
        Pair("a", "b", loss=Odd()).term(Odd(), feature, feature, None)
