import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, hook_count, state_of
from _models import TinyCNN, TokenNet, cnn_pair, images
from torch import nn

from vid_loss import ATLoss, DistillationModel, Distiller, FitNetLoss, KDLoss, Pair, VIDLoss
from vid_loss.rates import HEAD_LEARNING_RATE

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def make(pairs=None, **options):
    student, teacher = cnn_pair()
    return (
        student,
        teacher,
        Distiller(student, teacher, pairs or PAIRS, example=images(), **options),
    )


def train(student, distiller, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(student(images()), LABELS) + distiller(images())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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


def test_weights_default_to_the_losses_own():
    _, _, distiller = make(
        [Pair("stage1", "stage1"), Pair("stage1", "stage1", loss=ATLoss()), Pair("fc", "fc", 3.0)]
    )
    assert distiller.weights == {
        "stage1->stage1": VIDLoss.default_weight,
        "stage1->stage1 ATLoss": ATLoss.default_weight,
        "fc->fc": 3.0,
    }


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
    assert DistillationModel(student, distiller)(images())[1] == 0


@pytest.mark.parametrize("others", [[], [Pair("stage2", "stage2")]])
@pytest.mark.parametrize("spoilt", ["nothing", "teacher", "head"])
def test_weight_zero_gives_every_head_a_gradient_where_engines_wait_for_it(
    monkeypatch, others, spoilt
):
    """Among several processes, DDP waits for the gradient of each parameter: 0, even beside NaN."""
    student, teacher, distiller = make([Pair("stage1", "stage1", 0.0), *others])
    monkeypatch.setattr("vid_loss.terms.several_processes", lambda: True)
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


def test_state_resumes_bit_for_bit():
    def fresh():
        student, _, distiller = make()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        optimizer.add_param_group({"params": distiller.parameters()})
        return student, distiller, optimizer

    parts = fresh()
    train(*parts, steps=3)
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    straight = train(*parts, steps=3)
    resumed = fresh()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert train(*resumed, steps=3) == straight
    assert_same_state(resumed[0], state_of(parts[0]))
    assert_same_state(resumed[1], state_of(parts[1]))


def test_a_state_of_other_pairs_is_refused():
    _, _, distiller = make({"stage1": "stage1"})
    _, _, other = make({"stage2": "stage2"})
    with pytest.raises(RuntimeError, match="stage1->stage1"):
        other.load_state_dict(distiller.state_dict())


def test_moving_and_casting_takes_the_teacher_along_and_leaves_the_student():
    student, teacher, distiller = make()
    assert distiller.to(torch.float64) is distiller
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_parameter_groups_keep_variances_norms_and_biases_from_decay():
    loss = partial(VIDLoss, variance="trained")
    _, _, distiller = make([Pair(f"stage{i}", f"stage{i}", loss=loss) for i in (1, 2)])
    decayed, free = distiller.parameter_groups(weight_decay=0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in distiller.named_parameters()}
    free_names = {names.pop(id(p)) for p in free["params"]}
    assert {name for name in free_names if name.endswith("raw_var")}
    assert all("head.1" in n or n.endswith(("bias", "raw_var")) for n in free_names)
    assert sorted(names.values()) == sorted(
        f"losses.{pair}.head.{layer}.weight"
        for pair in ("stage1->stage1", "stage2->stage2")
        for layer in (0, 3)
    )
    assert len(decayed["params"]) == len(names)


def test_weight_decay_leaves_the_variance_alone():
    pair = Pair("stage1", "stage1", 0.0, loss=partial(VIDLoss, variance="trained"))
    _, _, distiller = make([pair])
    loss = distiller.losses["stage1->stage1"]
    before = loss.variance().clone(), loss.head[0].weight.clone()
    optimizer = torch.optim.SGD(distiller.parameter_groups(weight_decay=0.5), lr=0.1)
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(loss.variance(), before[0])
    assert not torch.equal(loss.head[0].weight, before[1])


def test_parameter_groups_have_a_rate_of_their_own():
    _, _, distiller = make()
    student = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=0.1)
    for group in distiller.parameter_groups():
        optimizer.add_param_group(group)
    first, heads = optimizer.param_groups
    assert (first["lr"], heads["lr"]) == (5e-5, HEAD_LEARNING_RATE)
    assert (first["weight_decay"], heads["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in heads["params"]} == {id(p) for p in distiller.parameters()}
    assert [g["lr"] for g in distiller.parameter_groups(lr=0.3, weight_decay=0.1)] == [0.3, 0.3]
    assert all("lr" not in g for g in distiller.parameter_groups(lr=None, weight_decay=0.1))


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [
        (torch.optim.AdamW, 5e-5, HEAD_LEARNING_RATE),
        (torch.optim.NAdam, 5e-5, HEAD_LEARNING_RATE),
        (torch.optim.Adam, 0.5, 0.5),
        (torch.optim.SGD, 0.1, 0.1),
        (torch.optim.SGD, 1e-3, 1e-3),
    ],
)
def test_beside_adam_heads_are_fitted_at_a_rate_that_fits_them(kind, rate, expected):
    _, _, distiller = make()
    optimizer = kind(nn.Linear(1, 1).parameters(), lr=rate)
    assert [g["lr"] for g in distiller.parameter_groups(optimizer)] == [expected]
    assert [g["lr"] for g in distiller.parameter_groups(optimizer, lr=0.3)] == [0.3]


def test_a_pair_without_parameters_gives_no_empty_group():
    _, _, distiller = make([Pair("fc", "fc", loss=KDLoss())])
    assert distiller.parameter_groups(weight_decay=0.1) == []


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_heads_that_are_in_no_optimizer_are_noticed(options):
    student, _, distiller = make()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01, **options)
    with pytest.warns(UserWarning, match=r"add_param_group\(\{'params': distiller.parameters"):
        train(student, distiller, optimizer, steps=8)


def test_heads_in_an_optimizer_raise_no_alarm():
    """Not with accumulation, nor with weights loaded between two steps."""
    student, _, distiller = make()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    for _ in range(3):
        student(images())
        distiller(images()).backward()
    student.load_state_dict(student.state_dict())
    train(student, distiller, optimizer, steps=8)


def test_heads_with_an_optimizer_of_their_own_raise_no_alarm():
    student, _, distiller = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    heads_optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)
    for _ in range(3):
        train(student, distiller, optimizer, steps=3)
        heads_optimizer.step()


def test_heads_that_nothing_weighs_raise_no_alarm():
    student, _, distiller = make([Pair("stage1", "stage1", 0.0)])
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    train(student, distiller, optimizer, steps=9)


def test_frozen_heads_raise_no_alarm():
    student, _, distiller = make()
    distiller.requires_grad_(False)
    train(student, distiller, torch.optim.SGD(student.parameters(), lr=0.05), steps=8)


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


def test_call_without_the_students_forward_says_so():
    student, _, distiller = make()
    with pytest.raises(RuntimeError, match="student has not run forward in train mode"):
        distiller(images())
    student.eval()(images())
    with pytest.raises(RuntimeError, match="in evaluation use the task loss"):
        distiller(images())


def test_another_batch_than_the_students_is_refused():
    student, _, distiller = make()
    student(images(8))
    with pytest.raises(ValueError, match=r"Pair 'stage1' -> 'stage1', VIDLoss: expected one batch"):
        distiller(images(4))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ({}, ValueError, "pairs: expected at least one pair; got none"),
        ([], ValueError, "pairs: expected at least one pair; got none"),
        ("stage1", TypeError, "pairs: expected a dict .* got 'stage1'"),
        (None, TypeError, "pairs: expected a dict .* got None"),
        (
            [Pair("fc", "fc", name="a.b"), Pair("stage1", "stage1", name="a/b")],
            ValueError,
            "a name of its own; got 'a/b' twice",
        ),
        (["stage1"], TypeError, "pairs: expected a dict"),
        (Pair("stage1", "stage1"), TypeError, "or a list of Pair; got Pair"),
        ([Pair("fc", "fc"), Pair("fc", "fc")], ValueError, "a name of its own; got 'fc->fc' twice"),
        ({"stage3": "stage1"}, ValueError, "Layer 'stage3' of the student: .*closest are"),
        ({"stage1": "stage3"}, ValueError, "Layer 'stage3' of the teacher: .*closest are"),
        (
            {"stage1": "fc"},
            ValueError,
            "Pair 'stage1' -> 'fc', VIDLoss: expected two features of one",
        ),
        ({"stage1[0]": "stage1"}, TypeError, r"Layer 'stage1\[0\]': .* Drop the index"),
        (
            [Pair("fc", "fc", loss=lambda s, t: VIDLoss(s, t, reduction="none"))],
            ValueError,
            r"Pair 'fc' -> 'fc': expected the loss to be a scalar; got \(8,\)",
        ),
    ],
)
def test_bad_pairs_are_refused_before_anything_is_hooked(pairs, error, message):
    student, teacher = cnn_pair()
    with pytest.raises(error, match=message) as caught:
        Distiller(student, teacher, pairs, example=images())
    # Also while the traceback keeps what was built alive, as it does in a notebook.
    assert hook_count(student) == hook_count(teacher) == 0
    del caught
    assert student.training
    assert teacher.training


def test_a_teacher_that_is_the_student_is_refused():
    student, _ = cnn_pair()
    for teacher in (student, torch.compile(student, backend="eager")):
        with pytest.raises(ValueError, match="expected another model than the student"):
            Distiller(student, teacher, PAIRS, example=images())


def test_an_example_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"example: expected a tensor, a tuple .* got list"):
        Distiller(*cnn_pair(), PAIRS, example=[images()])


def test_teacher_inputs_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"teacher_inputs: expected a tensor, .* got int"):
        make(teacher_inputs=lambda x: 3)


def test_a_feature_that_is_not_floating_point_is_refused():
    student, teacher = TokenNet(4), TokenNet(6)
    with pytest.raises(
        TypeError, match="Pair 'embed:input' -> 'layer': expected a floating-point student"
    ):
        Distiller(student, teacher, {"embed:input": "layer"}, example=tokens())


def test_a_custom_loss_needs_nothing_but_the_call():
    class Cosine(nn.Module):
        def forward(self, student_feature, teacher_feature):
            return 1 - F.cosine_similarity(student_feature, teacher_feature).mean()

    student, _, distiller = make([Pair("fc", "fc", loss=Cosine())])
    student(images())
    assert 0 <= distiller(images()) <= 2
    assert distiller.weights == {"fc->fc Cosine": 1.0}


def test_distillation_model_gives_output_and_loss():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    names = {name for name, _ in model.named_parameters()}
    assert names == {f"student.{n}" for n, _ in student.named_parameters()} | {
        f"distiller.{n}" for n, _ in distiller.named_parameters()
    }
    output, transfer = model(images())
    assert output.shape == (8, 3)
    student(images())
    torch.testing.assert_close(transfer, distiller(images()))
    with torch.no_grad():
        assert model(images())[1] == 0
    torch.testing.assert_close(model.eval()(images()), student(images()))


def test_distillation_model_runs_the_teacher_before_the_students_activations_pile_up():
    student, teacher, distiller = make()
    model = DistillationModel(student, distiller)
    ran = []
    student.register_forward_hook(lambda *_: ran.append("student"))
    teacher.register_forward_hook(lambda *_: ran.append("teacher"))
    model(images())
    model.eval()(images())
    assert ran == ["teacher", "student", "student"]


def test_features_that_the_teacher_gave_before_are_used_and_it_is_not_run_again():
    student, teacher, distiller = make()
    student(images())
    expected = distiller(images())
    features = distiller.teacher_features(images())
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    student(images())
    torch.testing.assert_close(distiller(teacher_features=features), expected)


@pytest.mark.parametrize("features", [{}, {"stage1": torch.zeros(8, 4, 8, 8)}])
def test_features_of_other_layers_are_refused(features):
    student, _, distiller = make()
    student(images())
    with pytest.raises(ValueError, match=r"teacher_features: expected also \[.*'stage2'\]; got \["):
        distiller(teacher_features=features)
    assert torch.isfinite(distiller(images()))  # nothing was lost


def test_distillation_model_refuses_another_student():
    _, _, distiller = make()
    with pytest.raises(ValueError, match="student: expected the model that the distiller was"):
        DistillationModel(TinyCNN(4), distiller)


def test_a_copied_model_trains_on_its_own():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    twin = copy.deepcopy(model)
    assert twin.student is not student
    assert twin.distiller.student is twin.student
    # Shared: an EMA need not double it.
    assert twin.distiller._teacher.tap.model is distiller._teacher.tap.model
    before = state_of(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(images())[1].backward()
    optimizer.step()
    assert_same_state(model, before)
    with pytest.raises(RuntimeError, match="has not run forward"):
        distiller(images())


def test_closing_a_copy_leaves_the_original_open():
    student, teacher, distiller = make()
    model = DistillationModel(student, distiller)
    copy.deepcopy(model).distiller.close()
    assert torch.isfinite(model(images())[1])
    distiller.close()
    assert hook_count(teacher) == 0
    closed = copy.deepcopy(model)
    assert closed.distiller._tap.closed
    assert hook_count(teacher) == 0


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


def test_data_parallel_is_looked_through_on_one_device_and_refused_on_several():
    student, teacher = cnn_pair()
    parallel = nn.DataParallel(student)
    distiller = Distiller(parallel, teacher, PAIRS, example=images())
    parallel(images())
    assert torch.isfinite(distiller(images()))
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel on 2 devices. Start a process per device"):
        Distiller(parallel, teacher, PAIRS, example=images())
