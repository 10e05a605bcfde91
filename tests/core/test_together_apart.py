"""What goes wrong in one of several pairs stays there, though they are computed at once."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from vid_loss import Distiller, Pair, VIDLoss


class Two(nn.Module):
    """Two layers side by side."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)

    def forward(self, x):
        return self.a(x), self.b(x)


class Fails(nn.Conv2d):
    """A head that raises what it is told to, or says another size."""

    error = None
    pools = False

    def forward(self, feature):
        if self.error:
            raise self.error
        said = super().forward(feature)
        return nn.functional.adaptive_avg_pool2d(said, 3) if self.pools else said


def images(seed=0, size=6):
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(**options):
    torch.manual_seed(0)
    student, teacher = Two(), Two(5)
    head = Fails(4, 5, 1)
    pairs = [
        Pair("a", "a", name="a", **options),
        Pair("b", "b", name="b", loss=lambda s, t: VIDLoss(s, t, head=head), **options),
    ]
    return student, Distiller(student, teacher, pairs, example=images()), head


def estimates(distiller, name=""):
    parts = ("scale.", "running_var.")
    found = distiller.losses[name] if name else distiller
    return {
        key: x.clone() for key, x in found.named_buffers() if any(part in key for part in parts)
    }


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_teacher_that_overflows_changes_no_estimate_of_its_pair_and_all_of_others(value, first):
    student, distiller, _ = build()
    good = images(1)
    if not first:
        student(good)
        distiller(good)
    before = estimates(distiller, "a"), estimates(distiller, "b")
    bad = images(2)
    student(bad)
    features = dict(distiller.teacher_features(bad))
    features["a"] = features["a"].clone()
    features["a"][0, 0, 0, 0] = value
    distiller(teacher_features=features).backward()
    torch.testing.assert_close(estimates(distiller, "a"), before[0], rtol=0, atol=0)
    assert all((x != before[1][key]).any() for key, x in estimates(distiller, "b").items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


ERRORS = {
    "memory": torch.OutOfMemoryError("out of memory"),
    "runtime": RuntimeError("something"),
    "value": type("Mine", (ValueError,), {})("something"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_an_error_in_a_head_changes_no_estimate_and_names_the_pair_if_it_is_of_its_features(error):
    student, distiller, head = build()
    student(images())
    distiller(images())
    before = estimates(distiller)
    head.error = copy.copy(error)
    student(images(1))
    named = "out of memory" if "memory" in str(error) else r"Pair 'b' -> 'b'.*something"
    with pytest.raises(type(error), match=named):
        distiller(images(1))
    torch.testing.assert_close(estimates(distiller), before, rtol=0, atol=0)


def test_a_head_that_says_another_size_is_told_with_its_pair():
    student, distiller, head = build()
    head.pools = True
    student(images())
    with pytest.raises(RuntimeError, match=r"Pair 'b' -> 'b': expected a loss that works on"):
        distiller(images())


def test_nan_in_one_term_does_not_reach_what_the_others_are_of():
    student, distiller, _ = build()
    with torch.no_grad():
        student.b.bias[0] = math.nan
    student(images())
    terms = distiller.weighted_terms(images())
    assert not terms["b"].isfinite()
    terms["a"].backward()
    for part, expected in (("a", True), ("b", False)):
        for module in (student.get_submodule(part), distiller.losses[part]):
            assert {p.grad is not None for p in module.parameters()} == {expected}
    assert all(p.grad.isfinite().all() for p in distiller.losses["a"].parameters())


def test_terms_of_separate_parts_go_backward_one_after_the_other():
    student, distiller, _ = build()
    student(images())
    for term in distiller.weighted_terms(images()).values():
        term.backward()
    assert all(p.grad is not None for p in (*student.parameters(), *distiller.parameters()))


def test_inf_of_the_teacher_where_it_never_changed_is_an_error():
    student, distiller, _ = build()
    features = {key: x.clone() for key, x in distiller.teacher_features(images()).items()}
    features["a"][:, 0] = 2.0
    for _ in range(2):
        student(images())
        distiller(teacher_features=features)
    features["a"][0, 0, 0, 0] = math.inf
    student(images())
    with pytest.raises(RuntimeError, match=r"Pair 'a' -> 'a': expected finite features of the tea"):
        distiller(teacher_features=features)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_pair_in_double_leaves_the_others_as_they_are(side):
    plain = {}
    for wide in (False, True):
        torch.manual_seed(0)
        student, teacher = Two(), Two(5)
        options = {f"{side}_transform": torch.Tensor.double} if wide else {}
        pairs = [Pair("a", "a", name="a"), Pair("b", "b", name="b", **options)]
        distiller = Distiller(student, teacher, pairs, example=images())
        for _ in range(3):
            student(images())
            distiller(images())
        plain[wide] = dict(distiller.terms), estimates(distiller, "a")
    assert plain[True][0]["a"].dtype == torch.float32
    assert plain[True][0]["b"].dtype == torch.float64
    torch.testing.assert_close(plain[True][0]["b"].float(), plain[False][0]["b"])
    torch.testing.assert_close(plain[True][0]["a"], plain[False][0]["a"])
    torch.testing.assert_close(plain[True][1], plain[False][1])


def test_a_loss_in_eval_mode_is_mapped_over_samples():
    torch.manual_seed(0)
    loss = VIDLoss((16, 6), (16, 5))
    student, teacher = torch.randn(16, 6), torch.randn(16, 5)
    loss(student, teacher)
    loss.eval()

    def of_one(s, t):
        return loss(s[None], t[None])

    expected = torch.stack([of_one(*x) for x in zip(student, teacher, strict=True)])
    torch.testing.assert_close(vmap(of_one)(student, teacher), expected)
    assert vmap(grad(of_one))(student, teacher).shape == (16, 6)
