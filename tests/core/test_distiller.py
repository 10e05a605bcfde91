import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, hook_count, state_of
from _distillers import PAIRS, make, train
from _models import TinyCNN, cnn_pair, images
from torch import nn

from vid_loss import Distiller, FitNetLoss, KDLoss, Pair, VIDLoss


def test_three_lines_train_student_and_heads_and_nothing_else():
    student, teacher, distiller = make()
    teacher_state, student_state = state_of(teacher), state_of(student)
    head_state = state_of(distiller)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    optimizer.add_param_group({"params": distiller.parameters()})
    losses = train(student, distiller, optimizer, steps=10)
    assert losses[-1] < losses[0]
    assert_same_state(teacher, teacher_state)
    assert all(p.grad is None for p in teacher.parameters())
    for model, before in ((student, student_state), (distiller, head_state)):
        for name, parameter in model.named_parameters():
            assert not torch.equal(parameter, before[name]), name


def test_construction_leaves_both_models_and_the_random_state_as_they_were():
    student, teacher = cnn_pair()
    student.stage1.eval()
    states = state_of(student), state_of(teacher)
    modes = [[m.training for m in model.modules()] for model in (student, teacher)]
    random_state = torch.get_rng_state()
    Distiller(student, teacher, PAIRS, example=images())
    for model, state, mode in zip((student, teacher), states, modes, strict=True):
        assert_same_state(model, state)
        assert [m.training for m in model.modules()] == mode
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_owns_heads_and_variances_only():
    student, teacher, distiller = make()
    held = {id(p) for model in (student, teacher) for p in model.parameters()}
    assert not held & {id(p) for p in distiller.parameters()}
    state = distiller.state_dict()
    assert all(name.startswith("losses.stage") for name in state)
    estimates = {"scale.mean", "scale.var", "scale.positions", "running_var.var"}
    for pair in distiller.pairs:
        assert estimates <= {name.removeprefix(f"losses.{pair}.") for name in state}
    assert all(".head." in name for name, _ in distiller.named_parameters())


def test_a_trained_variance_is_a_parameter_of_the_pair():
    pairs = [Pair("stage1", "stage1", loss=partial(VIDLoss, variance="trained"))]
    _, _, distiller = make(pairs)
    names = [name for name, _ in distiller.named_parameters() if ".head." not in name]
    assert names == ["losses.stage1->stage1.trained_var.raw_var"]


def test_students_state_dict_has_the_plain_keys_throughout():
    student, _, distiller = make()
    plain = list(TinyCNN(4).state_dict())
    assert list(student.state_dict()) == plain
    student(images())
    distiller(images())
    assert list(student.state_dict()) == plain
    distiller.close()
    assert list(student.state_dict()) == plain


def test_the_sum_is_that_of_the_weighted_terms():
    pairs = [Pair("stage1", "stage1", 2.0), Pair("fc", "fc", 0.5, loss=KDLoss())]
    student, _, distiller = make(pairs)
    student(images())
    total = distiller(images())
    terms = distiller.terms
    assert set(terms) == {"stage1->stage1", "fc->fc KDLoss"}
    torch.testing.assert_close(
        total.detach(), 2.0 * terms["stage1->stage1"] + 0.5 * terms["fc->fc KDLoss"]
    )
    assert not any(value.requires_grad for value in terms.values())


def test_equals_the_losses_on_features_taken_by_hand():
    student, teacher, distiller = make({"stage2": "stage1"})
    student(images())
    value = distiller(images())
    loss = distiller.losses["stage2->stage1"]
    teacher.eval()
    expected = loss(student.stage2(student.stage1(images())), teacher.stage1(images()))
    torch.testing.assert_close(value, distiller.weights["stage2->stage1"] * expected)


def test_several_pairs_share_a_layer_and_one_teacher_forward():
    pairs = [
        Pair("stage2", "stage1"),
        Pair("stage2", "stage2"),
        Pair("stage2", "stage2", loss=FitNetLoss),
    ]
    student, teacher, distiller = make(pairs)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student(images())
    distiller(images())
    assert len(calls) == 1
    assert len(student.stage2._forward_hooks) == 1


def test_the_teacher_runs_in_eval_mode_at_every_call():
    """Whatever its owner does to it, a part that was added later included."""
    student, teacher, distiller = make()
    teacher.fc = nn.Sequential(nn.Dropout(0.5), teacher.fc)
    before = state_of(teacher)
    modes = []
    for module in teacher.modules():
        module.register_forward_hook(lambda module, *_: modes.append(module.training))
    for _ in range(2):
        teacher.train()
        student(images())
        distiller(images())
    assert modes
    assert not any(modes)
    assert_same_state(teacher, before)


def test_a_part_that_student_and_teacher_share_keeps_its_mode():
    student, teacher = cnn_pair()
    shared = student.pool = teacher.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5))
    distiller = Distiller(student, teacher, PAIRS, example=images())
    student(images())
    distiller(images())
    assert shared[1].training


def test_the_teacher_may_be_used_for_other_ends():
    student, teacher, distiller = make()
    for _ in range(2):
        student(images())
        teacher(images(2))
        assert torch.isfinite(distiller(images()))
    teacher(images(2))
    assert not distiller._teacher.tap._recorder.last.captures


def test_teacher_inputs_maps_what_the_student_sees():
    seen = []
    student, teacher, distiller = make(teacher_inputs=lambda x: seen.append(x) or ((x - 1) / 2,))
    student(images())
    value = distiller(images())
    assert all(torch.equal(x, images()) for x in seen)
    other = Distiller(student, teacher, PAIRS, example=images())
    other.load_state_dict(distiller.state_dict())
    student(images())
    torch.testing.assert_close(value, other((images() - 1) / 2))


@pytest.mark.parametrize("example", [images(), (images(),), {"images": images()}], ids=type)
def test_example_in_any_of_its_forms(example):
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=example)
    student(images())
    assert torch.isfinite(distiller(images()))


def test_close_and_with_leave_no_hook():
    student, teacher, distiller = make()
    assert hook_count(student) > 0
    assert hook_count(teacher) > 0
    with distiller:
        student(images())
        distiller(images())
    distiller.close()
    assert hook_count(student) == hook_count(teacher) == 0
    student(images())
    with pytest.raises(RuntimeError, match="tap is closed"):
        distiller(images())


def test_a_dropped_distiller_leaves_no_hook():
    student, teacher, distiller = make()
    del distiller
    gc.collect()
    assert hook_count(student) == hook_count(teacher) == 0


def test_a_custom_loss_needs_nothing_but_the_call():
    class Cosine(nn.Module):
        def forward(self, student_feature, teacher_feature):
            return 1 - F.cosine_similarity(student_feature, teacher_feature).mean()

    student, _, distiller = make([Pair("fc", "fc", loss=Cosine())])
    student(images())
    assert 0 <= distiller(images()) <= 2
    assert distiller.weights == {"fc->fc Cosine": 1.0}


def test_features_that_the_teacher_gave_before_are_used_and_it_is_not_run_again():
    student, teacher, distiller = make()
    student(images())
    expected = distiller(images())
    features = distiller.teacher_features(images())
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    student(images())
    torch.testing.assert_close(distiller(teacher_features=features), expected)
