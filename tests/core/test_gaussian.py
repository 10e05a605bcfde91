import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.profiler import ProfilerActivity, profile

from vid_loss import VIDLoss
from vid_loss.losses.gaussian import gaussian_nll

SHAPES = [(3, 5), (3, 4, 5), (3, 5, 2, 4), (2, 5, 2, 3, 2)]
REDUCTIONS = ["mean", "batchmean", "sum", "none"]


def draw(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mean, target = torch.randn(2, *shape, dtype=dtype, generator=generator)
    return mean, target, torch.rand(5, dtype=dtype, generator=generator) + 0.1


def reference(mean, target, var, reduction, mask=None):
    """Equations (3) and (4), element by element in float64 Python."""
    samples = []
    for n in range(mean.shape[0]):
        total = 0.0
        for index in itertools.product(*map(range, mean.shape[1:])):
            if mask is not None and not mask[n, index[0]]:
                continue
            channel = index[-1] if mean.ndim <= 3 else index[0]
            sigma = math.sqrt(float(var[channel]))
            residual = float(target[n][index]) - float(mean[n][index])
            total += math.log(sigma) + residual**2 / (2 * sigma**2)
        samples.append(total)
    elements = mean.numel() if mask is None else int(mask.sum()) * mean.shape[-1]
    values = {
        "none": samples,
        "sum": sum(samples),
        "batchmean": sum(samples) / len(samples),
        "mean": sum(samples) / elements,
    }
    return torch.tensor(values[reduction], dtype=torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_equals_the_papers_formula_element_by_element(shape, reduction):
    mean, target, var = draw(shape)
    expected = reference(mean, target, var, reduction)
    torch.testing.assert_close(gaussian_nll(mean, target, var, reduction=reduction), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_low_precision_input_loses_only_its_own_rounding(shape, dtype):
    mean, target, var = (x.to(dtype) for x in draw(shape))
    expected = reference(mean.double(), target.double(), var.double(), "mean")
    value = gaussian_nll(mean, target, var)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


def test_channels_last_gives_the_same_value_and_gradient():
    mean, target, var = draw((3, 5, 2, 4))
    values, grads = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = mean.contiguous(memory_format=layout).requires_grad_()
        values.append(gaussian_nll(leaf, target.contiguous(memory_format=layout), var))
        grads.extend(torch.autograd.grad(values[-1], leaf))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_equals_torch_distributions_up_to_the_constant(shape):
    mean, target, var = draw(shape)
    wide = var if len(shape) <= 3 else var.view(-1, *[1] * (len(shape) - 2))
    normal = -Normal(mean, wide.sqrt().expand_as(mean)).log_prob(target).sum()
    constant = 0.5 * math.log(2 * math.pi) * mean.numel()
    torch.testing.assert_close(gaussian_nll(mean, target, var, reduction="sum"), normal - constant)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_gradcheck_and_gradgradcheck(shape, reduction):
    mean, target, var = draw(shape)
    inputs = mean.requires_grad_(), target.requires_grad_(), var.requires_grad_()

    def loss(*args):
        return gaussian_nll(*args, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_gradient_is_finite_where_the_residual_is_zero():
    mean = torch.ones(2, 5, 2, 2, requires_grad=True)
    gaussian_nll(mean, torch.ones(2, 5, 2, 2), torch.ones(5)).backward()
    torch.testing.assert_close(mean.grad, torch.zeros_like(mean))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_tokens_count_nowhere_even_as_nan(reduction):
    mean, target, var = draw((3, 4, 5))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    expected = reference(mean, target, var, reduction, mask)
    mean[mask == 0] = math.nan
    mean.requires_grad_()
    value = gaussian_nll(mean, target, var, mask=mask, reduction=reduction)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert torch.equal(mean.grad[mask == 0], torch.zeros(5, 5, dtype=torch.float64))
    assert (mean.grad[mask == 1] != 0).all()


def test_a_batch_without_a_valid_token_gives_zero():
    mean, target, var = draw((3, 4, 5))
    mean.requires_grad_()
    value = gaussian_nll(mean, target, var, mask=torch.zeros(3, 4))
    value.backward()
    assert value.item() == 0
    assert torch.equal(mean.grad, torch.zeros_like(mean))


def test_reductions_convert_as_documented():
    mean, target, var = draw((3, 5, 2, 4))
    value = {name: gaussian_nll(mean, target, var, reduction=name) for name in REDUCTIONS}
    torch.testing.assert_close(value["sum"], value["none"].sum())
    torch.testing.assert_close(value["sum"], 3 * value["batchmean"])
    torch.testing.assert_close(value["batchmean"], 5 * 2 * 4 * value["mean"])


def test_autocast_changes_nothing():
    mean, target, var = (x.float() for x in draw((3, 5, 2, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gaussian_nll(mean, target, var)
    assert torch.equal(inside, gaussian_nll(mean, target, var))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11's first use
def test_forms_one_map_and_keeps_one_map():
    mean, target = torch.randn(2, 8, 16, 32, 32)
    mean.requires_grad_()
    map_bytes = mean.numel() * mean.element_size()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.nbytes) or x, lambda x: x
        ),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        value = gaussian_nll(mean, target, torch.ones(16))
    allocated = sum(
        max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0)
        for event in prof.events()
    )
    assert value.requires_grad
    assert map_bytes <= allocated < 1.5 * map_bytes
    assert map_bytes <= sum(saved) < 1.5 * map_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "avg"}, r"reduction: expected one of .*got 'avg'"),
        ({"mean": torch.zeros(3, 1, 2, 4)}, r"one shape; got \(3, 1, 2, 4\) and \(3, 5, 2, 4\)"),
        ({"var": torch.ones(1)}, r"one variance per channel, shape \(5,\); got \(1,\)"),
        ({"mask": torch.ones(3, 4)}, r"mask: expected tokens \(N, L, C\) and a mask"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "mean": torch.zeros(3, 5, 2, 4),
        "target": torch.zeros(3, 5, 2, 4),
        "var": torch.ones(5),
    }
    gaussian_nll(**good)
    with pytest.raises(ValueError, match=message):
        gaussian_nll(**{**good, **arguments})


def trained(channels, **options):
    """The paper's variance, as a VIDLoss builds it."""
    shape = (2, channels)
    return VIDLoss(shape, shape, variance="trained", **options).trained_var


@pytest.mark.parametrize("init_var", [1e-3, 0.5, 5.0, 1e3])
def test_variance_starts_where_it_is_told(init_var):
    variance = trained(3, init_var=init_var)
    torch.testing.assert_close(variance(), torch.full((3,), init_var), rtol=1e-4, atol=0)


@pytest.mark.parametrize("raw", [-1e4, -100.0, 88.8, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_variance_is_positive_and_finite_at_any_parameter(raw, dtype):
    variance = trained(1).to(dtype)
    nn.init.constant_(variance.raw_var, raw)
    var = variance()
    var.sum().backward()
    assert var.dtype == torch.float32
    assert var >= variance.floor
    assert torch.isfinite(var.log())
    assert torch.isfinite(variance.raw_var.grad)


def test_variance_finds_the_residuals_own():
    """With a mean that is held, the best variance of a channel is its mean squared residual."""
    torch.manual_seed(0)
    target = torch.randn(256, 3) * torch.tensor([0.1, 1.0, 2.0])
    variance = trained(3, init_var=5.0, var_floor=1e-5)
    optimizer = torch.optim.Adam(variance.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        gaussian_nll(torch.zeros_like(target), target, variance()).backward()
        optimizer.step()
    torch.testing.assert_close(variance().detach(), target.square().mean(0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"var_floor": 0.0}, "var_floor: expected a positive number; got 0.0"),
        ({"var_floor": math.nan}, "var_floor: expected a positive"),
        ({"init_var": 1e-6}, "init_var: expected a number above the floor"),
        ({"init_var": math.inf}, "init_var: expected"),
    ],
)
def test_variance_refuses_what_is_no_variance(options, message):
    with pytest.raises(ValueError, match=message):
        trained(1, **options)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 3, 2, 2)])
def test_torch_func_differentiates_it(shape):
    mean, target, var = torch.randn(shape), torch.randn(shape), torch.rand(3) + 0.5
    gradient = torch.func.grad(lambda x: gaussian_nll(x, target, var))(mean)
    mean.requires_grad_()
    (expected,) = torch.autograd.grad(gaussian_nll(mean, target, var), mean)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_compiled_gradients_are_the_eager_ones(shape):
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in draw(shape)]
    compiled = torch.compile(gaussian_nll, backend="aot_eager", fullgraph=True)
    eager, found = (torch.autograd.grad(nll(*inputs), inputs) for nll in (gaussian_nll, compiled))
    torch.testing.assert_close(found, eager)
