"""Weights of pairs: their defaults, changes, and zero."""

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, state_of
from _distillers import LABELS, make, train
from _models import cnn_pair, images

from vid_loss import ATLoss, DistillationModel, Pair, VIDLoss


def test_weights_default_to_the_losses_own():
    _, _, distiller = make(
        [Pair("stage1", "stage1"), Pair("stage1", "stage1", loss=ATLoss()), Pair("fc", "fc", 3.0)]
    )
    assert distiller.weights == {
        "stage1->stage1": VIDLoss.default_weight,
        "stage1->stage1 ATLoss": ATLoss.default_weight,
        "fc->fc": 3.0,
    }


def test_a_weight_may_change_while_training():
    student, _, distiller = make({"stage1": "stage1"})
    values = []
    for weight in (1.0, 4.0, 0.0):
        distiller.set_weight("stage1->stage1", weight)
        student(images())
        values.append(distiller(images()))
    # Up to what the estimates took from the same batch once more.
    torch.testing.assert_close(values[1], 4 * values[0], rtol=1e-4, atol=1e-4)
    assert values[2] == 0
    with pytest.raises(ValueError, match=r"Pair 'stage1' -> 'stage1', weight: .* got -1"):
        distiller.set_weight("stage1->stage1", -1)
    with pytest.raises(KeyError, match=r"expected one of \['stage1->stage1'\]; got 'stage1'"):
        distiller.set_weight("stage1", 1)


def test_pairs_of_weight_zero_are_not_computed_in_one_process():
    pairs = [Pair("stage1", "stage1", 0.0), Pair("stage2", "stage2")]
    student, teacher, distiller = make(pairs)
    student(images())
    distiller(images()).backward()
    assert list(distiller.terms) == ["stage2->stage2"]
    off, on = (distiller.losses[name] for name in distiller.pairs)
    assert all(p.grad is None for p in off.parameters())
    assert off.scale.positions.unique().tolist() == [0]
    assert on.scale.positions.unique().tolist() == [8 * 4 * 4]
    distiller.set_weight("stage2->stage2", 0.0)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    student(images())
    assert distiller(images()) == 0
    assert distiller.terms == {}
    assert DistillationModel(student, distiller)(images())[1] == 0


@pytest.mark.parametrize("others", [[], [Pair("stage2", "stage2")]])
@pytest.mark.parametrize("spoilt", ["nothing", "teacher", "head"])
def test_weight_zero_gives_every_head_a_gradient_where_engines_wait_for_it(
    monkeypatch, others, spoilt
):
    """Among several processes, DDP waits for the gradient of each parameter: 0, even beside NaN."""
    student, teacher, distiller = make([Pair("stage1", "stage1", 0.0), *others])
    monkeypatch.setattr("vid_loss.terms._pair_terms.several_processes", lambda: True)
    if spoilt == "teacher":
        teacher.stage1[2].register_forward_hook(lambda *x: torch.full_like(x[2], torch.nan))
        teacher.stage2[2].register_forward_hook(lambda *x: torch.ones_like(x[2]))
    off = distiller.losses["stage1->stage1"]
    if spoilt == "head":
        torch.nn.init.constant_(next(off.parameters()), torch.nan)
    if not others:
        teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    student(images())
    value = distiller(images())
    value.backward()
    assert value.isfinite()
    assert all(p.grad is not None and not p.grad.any() for p in off.parameters())
    assert list(distiller.terms) == [pair.label for pair in others]


def test_weight_zero_trains_the_plain_student_bit_for_bit():
    plain, _ = cnn_pair()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(images()), LABELS).backward()
        optimizer.step()
    student, _, distiller = make([Pair("stage1", "stage1", 0.0)])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer.add_param_group({"params": distiller.parameters()})
    train(student, distiller, optimizer, steps=3)
    assert_same_state(student, state_of(plain))
