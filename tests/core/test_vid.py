from functools import partial

import pytest
import torch
from _asserts import assert_is_transfer_loss
from _twin import Twin
from torch import nn

from vid_loss import VIDLoss

PAPER = {"variance": "trained", "standardize": False, "init_var": 5.0}

SHAPES = {
    "vector": ((6, 3), (6, 5)),
    "tokens": ((6, 7, 3), (6, 7, 5)),
    "map": ((6, 3, 4, 4), (6, 5, 4, 4)),
    "larger map": ((6, 3, 8, 6), (6, 5, 4, 6)),
    "smaller map": ((6, 3, 2, 6), (6, 5, 4, 6)),
    "volume": ((6, 3, 2, 4, 4), (6, 5, 2, 4, 4)),
}


@pytest.mark.parametrize("options", [{}, {"variance": "trained"}, PAPER], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_is_a_transfer_loss_on_every_kind_of_feature(shapes, options):
    torch.manual_seed(0)
    loss = VIDLoss(*shapes, **options)
    assert_is_transfer_loss(loss, *(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_one_setting_without_a_norm_serves_every_kind_of_feature(shapes):
    loss = partial(VIDLoss, norm="none")(*shapes)
    assert not any("Norm" in type(module).__name__ for module in loss.modules())
    assert_is_transfer_loss(loss, *(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(6, 3), (6, 7, 3), (6, 3, 4, 4)], ids=len)
def test_the_papers_form_is_equation_4_in_the_teachers_raw_units(shape, reduction):
    """log(sigma) + (t - mu)^2 / (2 sigma^2), element by element in float64."""
    torch.manual_seed(0)
    loss = VIDLoss(shape, shape, reduction=reduction, **PAPER)
    student, teacher = torch.randn(shape), 30 * torch.randn(shape) + 20
    sigma = torch.tensor(5.0, dtype=torch.float64).sqrt()
    for _ in range(2):  # nothing of it depends on the batches before
        mean = loss.head(student).double()
        expected = sigma.log() + (teacher.double() - mean).square() / (2 * sigma.square())
        divisor = {"mean": expected.numel(), "batchmean": 6, "sum": 1}[reduction]
        value = loss(student, teacher).double()
        torch.testing.assert_close(value, expected.sum() / divisor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 3), (6, 7, 3), (6, 3, 4, 4)], ids=len)
def test_the_default_form_is_equation_4_in_the_teachers_own_units(shape):
    torch.manual_seed(0)
    loss = VIDLoss(shape, shape)
    twin = Twin(loss.head)
    for _ in range(30):
        student, teacher = torch.randn(shape), 30 * torch.randn(shape) + 20
        value = loss(student, teacher)
        expected = twin(student, teacher)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"variance": "trained"}, PAPER], ids=str)
def test_every_parameter_moves_after_one_step(options):
    torch.manual_seed(0)
    loss = VIDLoss((6, 3, 4, 4), (6, 5, 4, 4), **options)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    assert ("trained_var.raw_var" in before) == bool(options)
    assert set(before) <= set(loss.state_dict())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(torch.randn(6, 3, 4, 4), torch.randn(6, 5, 4, 4)).backward()
    optimizer.step()
    for name, parameter in loss.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("options", [{}, {"variance": "trained"}, PAPER], ids=str)
def test_learns_a_linear_gaussian_teacher(options):
    """t = A s + noise: the head finds A, the variance finds the noise's."""
    torch.manual_seed(0)
    student = torch.randn(4096, 3)
    weight = torch.randn(2, 3)
    noise = torch.tensor([0.2, 0.7])
    teacher = student @ weight.T + noise * torch.randn(4096, 2)
    loss = VIDLoss(student.shape, teacher.shape, **options)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(600 if options else 200):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    unit = teacher.std(0, correction=0) if loss.standardize else torch.ones(2)
    found = loss.head.weight.detach() * unit.unsqueeze(1)
    torch.testing.assert_close(found, weight, rtol=0, atol=0.03)
    var = loss.variance().detach() * unit.square()
    torch.testing.assert_close(var, noise**2, rtol=0.08, atol=0)


def test_takes_a_head_of_ones_own():
    head = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 5))
    loss = VIDLoss((6, 3), (6, 5), head=head)
    assert loss.head is head
    assert_is_transfer_loss(loss, torch.randn(6, 3), torch.randn(6, 5))


def test_masked_tokens_change_neither_value_nor_gradient():
    torch.manual_seed(0)
    loss = VIDLoss((2, 3, 4), (2, 3, 5), norm="batch")
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5)
    value = loss(student, teacher, mask)
    value.backward()
    noise = torch.randn(2, 3, 5) * (1 - mask).unsqueeze(-1)
    torch.testing.assert_close(loss(student, teacher + noise, mask), value)
    assert student.grad[mask == 0].abs().sum() == 0
    assert (student.grad[mask == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_without_autocast(dtype):
    torch.manual_seed(0)
    loss = VIDLoss((6, 3, 4, 4), (6, 5, 4, 4))
    student = torch.randn(6, 3, 4, 4, dtype=dtype, requires_grad=True)
    value = loss(student, torch.randn(6, 5, 4, 4, dtype=dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_float32(dtype):
    torch.manual_seed(0)
    loss = VIDLoss((6, 3, 4, 4), (6, 5, 4, 4))
    student, teacher = torch.randn(6, 3, 4, 4), torch.randn(6, 5, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher), rtol=1e-2, atol=1e-3)


def test_large_float16_features_do_not_overflow():
    loss = VIDLoss((2, 3), (2, 5))
    value = loss(torch.ones(2, 3, dtype=torch.float16), torch.full((2, 5), 6e4).half())
    assert torch.isfinite(value)


@pytest.mark.parametrize("variance", ["running", "trained"])
def test_a_dead_teacher_channel_does_not_own_the_gradient(variance):
    """As it is, its variance stops at the floor, so the gradient through it stays bounded."""
    torch.manual_seed(0)
    loss = VIDLoss((64, 3), (64, 2), variance=variance, standardize=False)
    student = torch.randn(64, 3)
    teacher = torch.cat([torch.zeros(64, 1), student[:, :1] + torch.randn(64, 1)], dim=1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
    var = loss.variance().detach()
    assert torch.isfinite(value)
    assert 1e-4 <= var[0] < 1e-2 < 0.5 < var[1]


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        ((6, 4, 4, 4), (6, 5, 4, 4), ValueError, r"VIDLoss: expected 3 student channels, .*\(6, 4"),
        ((6, 3, 4, 4), (6, 1, 4, 4), ValueError, r"VIDLoss: expected 5 teacher channels, .*\(6, 1"),
        ((6, 3), (6, 5, 4, 4), ValueError, "VIDLoss: expected two features of one layout"),
        ((5, 3, 4, 4), (6, 5, 4, 4), ValueError, "one batch size"),
    ],
)
def test_shapes_are_checked_not_broadcast(student, teacher, error, message):
    loss = VIDLoss((6, 3, 4, 4), (6, 5, 4, 4))
    with pytest.raises(error, match=message):
        loss(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (2, 5, 4, 4)), {}, "VIDLoss: expected two features of one layout"),
        (((2, 3), (2, 5)), {"reduction": "avg"}, "reduction: expected one of"),
        (
            ((2, 3), (2, 5)),
            {"variance": "trained", "init_var": 0.0},
            "init_var: expected a number above",
        ),
        (((2, 3), (2, 5)), {"var_floor": -1.0}, "var_floor: expected a positive"),
        (((2, 3), (2, 5)), {"var_floor": float("nan")}, "var_floor: expected a positive"),
        (((2, 3), (2, 5)), {"variance": "fixed"}, "variance: expected one of .* got 'fixed'"),
        (((2, 3), (2, 5)), {"momentum": 0.0}, "momentum: expected a number above 0"),
        (((2, 3), (2, 5)), {"momentum": 1.5}, "momentum: .* at most 1; got 1.5"),
        (((2, 3), (2, 5)), {"head": nn.Linear(3, 5), "norm": "none"}, "beside a head of your own"),
    ],
)
def test_construction_refuses_what_does_not_fit(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        VIDLoss(*shapes, **options)


def test_keeps_three_maps_for_backward_beside_the_students_own_feature():
    """What goes into the norm, what comes out of the ReLU, and the residual."""
    student, teacher = torch.randn(8, 16, 16, 16, requires_grad=True), torch.randn(8, 32, 16, 16)
    loss = VIDLoss(student.shape, teacher.shape)
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(student, teacher)
    assert value.requires_grad
    saved.pop(student.untyped_storage().data_ptr())  # which the student keeps anyway
    assert sum(saved.values()) < 3.2 * teacher.nbytes
