import math

import numpy as np
import pytest
import torch
from _asserts import assert_is_transfer_loss

from vid_loss import ATLoss, Distiller, FitNetLoss, KDLoss, LwFLoss, Pair


def draw(*shape):
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def kd_reference(student, teacher, temperature):
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)], ids=["vector", "tokens"])
def test_kd_equals_the_formula(shape, temperature):
    student, teacher = draw(*shape)
    value = KDLoss(temperature)(student, teacher)
    torch.testing.assert_close(value.item(), kd_reference(student, teacher, temperature))


def test_kd_matches_timms_logit_distillation():
    task = pytest.importorskip("timm.task")
    student_logits, teacher_logits = (x.float() for x in draw(6, 5))

    class Fixed(torch.nn.Module):
        pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}  # noqa: RUF012  # timm reads it so
        num_classes, in_chans = 5, 1

        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, images):
            return self.logits

    distillation = task.LogitDistillationTask(
        Fixed(student_logits),
        Fixed(teacher_logits),
        temperature=3.0,
        distill_loss_weight=1.0,
        verbose=False,
    )
    expected = distillation(torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.long))["kd_loss"]
    torch.testing.assert_close(KDLoss(3.0)(student_logits, teacher_logits), expected)


def test_kd_counts_valid_tokens_only():
    student, teacher = draw(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = kd_reference(student[mask == 1], teacher[mask == 1], 4.0)
    torch.testing.assert_close(KDLoss(4.0)(student, teacher, mask).item(), expected)
    assert KDLoss(4.0)(student, teacher, torch.zeros(2, 3)) == 0


def test_lwf_is_kd_on_an_extra_output_at_temperature_two():
    student, teacher = torch.randn(6, 7).double(), draw(6, 5)[1]
    loss = LwFLoss((6, 7), (6, 5)).double()
    expected = kd_reference(loss.output(student).detach(), teacher, 2.0)
    torch.testing.assert_close(loss(student, teacher).item(), expected)


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 4, 2, 2)], ids=len)
def test_fitnet_is_the_mean_squared_error_of_the_regressor(shape):
    student, teacher = draw(*shape)
    loss = FitNetLoss(shape, shape).double()
    hint = loss.regressor(student).detach().numpy()
    expected = np.mean((hint - teacher.numpy()) ** 2)
    torch.testing.assert_close(loss(student, teacher).item(), float(expected))


def test_fitnet_counts_valid_tokens_only():
    student, teacher = draw(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = FitNetLoss(student.shape, teacher.shape).double()
    expected = np.mean(
        (loss.regressor(student).detach().numpy() - teacher.numpy())[mask.numpy() == 1] ** 2
    )
    torch.testing.assert_close(loss(student, teacher, mask).item(), float(expected))


def at_reference(student, teacher):
    maps = []
    for feature in (student.numpy(), teacher.numpy()):
        flat = (feature**2).mean(1).reshape(len(feature), -1)
        maps.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    return float(((maps[0] - maps[1]) ** 2).mean())


def test_at_equals_the_formula():
    student, teacher = draw(6, 4, 3, 5)
    value = ATLoss()(student[:, :2], teacher).item()
    torch.testing.assert_close(value, at_reference(student[:, :2], teacher))


def test_at_of_a_two_by_two_map_worked_out_by_hand():
    """Channel means of squares: student (9, 0, 0, 16) / 1, teacher (1, 1, 1, 1).

    Normalised: (9, 0, 0, 16) / sqrt(337) and (1, 1, 1, 1) / 2. Squared distance of unit vectors:
    2 - 2 * cosine, the cosine being (9 + 16) / (2 * sqrt(337)); averaged over four positions.
    """
    student = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    teacher = torch.ones(1, 2, 2, 2)
    expected = (2 - 25 / math.sqrt(337)) / 4
    torch.testing.assert_close(ATLoss()(student, teacher).item(), expected)


def test_at_ignores_the_scale_and_pools_the_larger_map():
    student, teacher = draw(2, 3, 4, 6)
    pooled = torch.nn.functional.avg_pool2d(teacher, 2)
    value = ATLoss()(torch.nn.functional.avg_pool2d(student, 2), teacher)
    torch.testing.assert_close(value, ATLoss()(student, 10 * pooled))


def test_at_of_a_dead_layer_is_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    ATLoss()(student, torch.randn(2, 3, 4, 4)).backward()
    assert torch.isfinite(student.grad).all()


LOSSES = {
    "KD": (lambda s, t: KDLoss(), (6, 5), (6, 5)),
    "KD tokens": (lambda s, t: KDLoss(), (6, 3, 5), (6, 3, 5)),
    "LwF": (LwFLoss, (6, 7), (6, 5)),
    "LwF tokens": (LwFLoss, (6, 3, 7), (6, 3, 5)),
    "FitNet vector": (FitNetLoss, (6, 7), (6, 5)),
    "FitNet tokens": (FitNetLoss, (6, 3, 7), (6, 3, 5)),
    "FitNet map": (FitNetLoss, (6, 7, 4, 4), (6, 5, 2, 2)),
    "AT": (lambda s, t: ATLoss(), (6, 7, 4, 4), (6, 5, 2, 2)),
}


@pytest.mark.parametrize(("build", "student", "teacher"), LOSSES.values(), ids=LOSSES)
def test_each_is_a_transfer_loss(build, student, teacher):
    torch.manual_seed(0)
    loss = build(student, teacher)
    assert_is_transfer_loss(loss, torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(("build", "student", "teacher"), LOSSES.values(), ids=LOSSES)
def test_an_empty_batch_counts_0_and_gives_every_parameter_its_gradient(build, student, teacher):
    loss = build(student, teacher)
    feature = torch.randn(0, *student[1:], requires_grad=True)
    value = loss(feature, torch.randn(0, *teacher[1:]))
    assert value.item() == 0.0
    value.backward()
    assert feature.grad.shape == feature.shape
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())
    loss(torch.randn(student), torch.randn(teacher))


def test_kd_still_looks_for_probabilities_after_an_empty_batch():
    loss = KDLoss()
    loss(torch.randn(0, 5), torch.randn(0, 5))
    with pytest.raises(ValueError, match="got rows that are positive and sum to 1"):
        loss(torch.randn(6, 5), torch.randn(6, 5).softmax(-1))


@pytest.mark.parametrize(("build", "student", "teacher"), LOSSES.values(), ids=LOSSES)
def test_each_passes_gradcheck(build, student, teacher):
    torch.manual_seed(0)
    loss = build(student, teacher).double()
    inputs = torch.randn(student, dtype=torch.float64, requires_grad=True)
    target = torch.randn(teacher, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), [inputs])


@pytest.mark.parametrize(("build", "student", "teacher"), LOSSES.values(), ids=LOSSES)
def test_each_is_computed_in_float32_under_autocast(build, student, teacher):
    torch.manual_seed(0)
    loss = build(student, teacher)
    features = torch.randn(student), torch.randn(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*(feature.bfloat16() for feature in features))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(*features), rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("build", [KDLoss, lambda t: LwFLoss((2, 3), (2, 3), temperature=t)])
def test_temperature_must_be_positive(build, temperature):
    with pytest.raises(ValueError, match="temperature: expected a positive number; got"):
        build(temperature)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_probabilities_are_refused(owner):
    logits = {"student": draw(6, 5)[0], "teacher": draw(6, 5)[1]}
    logits[owner] = logits[owner].softmax(-1)
    loss = KDLoss()
    for _ in range(2):  # as where a Distiller is built of it once more
        with pytest.raises(ValueError, match=f"KDLoss: expected {owner} logits; .* sum to 1"):
            loss(logits["student"], logits["teacher"])


def test_different_classes_lead_to_lwf():
    with pytest.raises(ValueError, match=r"student's 5 classes .* got 4. .* use LwFLoss"):
        KDLoss()(torch.randn(6, 5), torch.randn(6, 4))


@pytest.mark.parametrize(
    ("build", "student", "teacher", "message"),
    [
        (
            lambda s, t: KDLoss(),
            (2, 3, 4, 4),
            (2, 3, 4, 4),
            r"KDLoss: expected a vector \(N, C\) or tokens .*; got a map",
        ),
        (
            LwFLoss,
            (2, 3, 4, 4),
            (2, 3, 4, 4),
            r"LwFLoss: expected a vector \(N, C\) or tokens .*; got a map",
        ),
        (lambda s, t: ATLoss(), (2, 3), (2, 3), r"ATLoss: expected a map .*; got a vector"),
        (lambda s, t: ATLoss(), (2, 3, 4, 4), (2, 3), "ATLoss: expected two features of one"),
        (FitNetLoss, (2, 3), (2, 3, 4, 4), "FitNetLoss: expected two features of one layout"),
    ],
)
def test_kinds_that_a_method_cannot_use_are_refused(build, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        build(student, teacher)(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize("build", [FitNetLoss, LwFLoss])
def test_channels_are_checked(build):
    loss = build((2, 3), (2, 5))
    with pytest.raises(ValueError, match=f"{build.__name__}: expected 3 student channels, .*got"):
        loss(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(ValueError, match=f"{build.__name__}: expected 5 teacher channels, .*got"):
        loss(torch.randn(2, 3), torch.randn(2, 1))


def test_messages_from_a_distiller_name_the_pair():
    student, teacher = torch.nn.Linear(3, 5), torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"Pair '' -> '', KDLoss: .* use LwFLoss"):
        Distiller(student, teacher, [Pair("", "", loss=KDLoss())], example=torch.zeros(1, 3))
