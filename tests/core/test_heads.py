import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vid_loss.losses.heads import PointwiseConv2d, TokenHead, mean_head


def kinds(head):
    return [type(module) for module in head.modules() if not list(module.children())]


def test_map_head_is_the_papers():
    head = mean_head((2, 3, 4, 4), (2, 6, 4, 4))
    assert kinds(head) == [PointwiseConv2d, nn.BatchNorm2d, nn.ReLU, PointwiseConv2d]
    assert head(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)


@pytest.mark.parametrize("norm", [None, "none"])
def test_vector_head_is_one_linear_layer(norm):
    assert kinds(mean_head((2, 3), (2, 6), norm=norm)) == [nn.Linear]


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        (None, nn.LayerNorm),
        ("layer", nn.LayerNorm),
        ("batch", nn.BatchNorm1d),
        ("none", nn.Identity),
    ],
)
def test_token_head_has_the_norm_asked_for(norm, layer):
    head = mean_head((2, 7, 3), (2, 7, 6), norm=norm)
    assert kinds(head) == [nn.Linear, layer, nn.ReLU, nn.Linear]
    assert head(torch.randn(2, 7, 3)).shape == (2, 7, 6)


@pytest.mark.parametrize(
    ("norm", "layers", "groups"),
    [
        ("batch", [nn.BatchNorm2d], None),
        ("layer", [nn.GroupNorm], 1),
        ("group", [nn.GroupNorm], 3),
        ("none", [], None),
    ],
)
def test_map_head_has_the_norm_and_width_asked_for(norm, layers, groups):
    head = mean_head((2, 3, 4, 4), (2, 6, 4, 4), hidden_channels=48, norm=norm)
    assert kinds(head) == [PointwiseConv2d, *layers, nn.ReLU, PointwiseConv2d]
    assert head[0].out_channels == 48
    assert (head[0].bias is None) == bool(layers)
    if groups:
        assert head[1].num_groups == groups


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_padding_changes_nothing_about_valid_tokens(norm):
    """Neither their prediction nor the running statistics, whatever the padding holds."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    tokens = torch.randn(2, 3, 4)
    outputs, buffers = [], []
    for padding in (0.0, 1e3):
        torch.manual_seed(0)
        head = TokenHead(4, 8, 5, norm)
        outputs.append(head(tokens.masked_fill(mask.unsqueeze(-1) == 0, padding), mask)[mask == 1])
        buffers.append([buffer.clone() for buffer in head.buffers()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*buffers)


def test_masked_batch_norm_equals_batch_norm_of_the_valid_rows():
    head = TokenHead(4, 8, 5, "batch")
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    tokens = torch.randn(2, 3, 4)
    rows = head(tokens[mask == 1].unsqueeze(0))[0]
    torch.testing.assert_close(head(tokens, mask)[mask == 1], rows)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_map_head_keeps_the_memory_format(memory_format):
    head = mean_head((2, 3, 4, 4), (2, 6, 4, 4)).to(memory_format=memory_format)
    feature = torch.randn(2, 3, 4, 4).to(memory_format=memory_format)
    assert head(feature).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            ((2, 3), (2, 6)),
            {"norm": "batch"},
            "or norm='none', for vectors, .*got None and 'batch'",
        ),
        (
            ((2, 3), (2, 6)),
            {"norm": "layer"},
            "or norm='none', for vectors, .*got None and 'layer'",
        ),
        (
            ((2, 3), (2, 6)),
            {"norm": "group"},
            "or norm='none', for vectors, .*got None and 'group'",
        ),
        (
            ((2, 3), (2, 6)),
            {"hidden_channels": 4},
            "expected None, or .*for vectors, .*got 4 and None",
        ),
        (((2, 3), (2, 6)), {"hidden_channels": 4, "norm": "none"}, "got 4 and 'none'. Pass head="),
        (((2, 7, 3), (2, 7, 6)), {"norm": "group"}, "for tokens; got 'group'"),
        (((2, 3, 4, 4), (2, 6, 4, 4)), {"norm": "instance"}, "norm: expected one of"),
        (((2, 3, 4, 4), (2, 6, 4, 4)), {"hidden_channels": 0}, "expected a positive width; got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        mean_head(*shapes, **options)


LAYOUTS = {"rows": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "products"),
    [((3, 5, 4, 6), True), ((3, 24, 4, 6), False), ((2, 7, 1, 1), False)],
)
def test_pointwise_convolution_is_a_convolution(shape, products, layout, bias):
    torch.manual_seed(0)
    layer = PointwiseConv2d(shape[1], 8, bias=bias).double()
    maps = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    maps.requires_grad_()
    inputs = [maps, *layer.parameters()]
    with _Operations() as operations:
        output = layer(maps)
    expected = F.conv2d(maps, layer.weight, layer.bias)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )
    by_products = products and maps.is_contiguous()
    assert any("bmm" in name for name in operations.names) == by_products
    assert output.is_contiguous(memory_format=LAYOUTS[layout])


def test_pointwise_convolution_takes_one_map_or_none_as_any_convolution_does():
    layer = PointwiseConv2d(5, 8)
    maps = torch.randn(5, 4, 6)
    torch.testing.assert_close(layer(maps), layer(maps.unsqueeze(0)).squeeze(0))
    assert layer(torch.randn(0, 5, 4, 6)).shape == (0, 8, 4, 6)


def test_pointwise_convolution_is_compiled_as_a_convolution():
    called = []

    def backend(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    layer = PointwiseConv2d(5, 8)
    maps = torch.randn(3, 5, 4, 6)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(maps), layer(maps))
    assert torch.conv2d in called
    assert torch.baddbmm not in called


def test_pointwise_convolution_keeps_no_weight_a_sample_under_autocast():
    layer = PointwiseConv2d(3, 8)
    maps = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), _Operations() as operations:
        output = layer(maps)
    assert output.dtype == torch.bfloat16
    assert not any("bmm" in name for name in operations.names)


class _Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 16, 31, 40, 64, 960])
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        ((8, 12, 1, 1), "group"),
        ((8, 12, 1, 2), "group"),
        ((8, 12, 1, 1), "layer"),
        ((8, 1, 12), "layer"),
    ],
)
def test_a_head_says_something_of_one_position(shape, norm, channels):
    torch.manual_seed(0)
    teacher = (8, 1, channels) if len(shape) == 3 else (8, channels, *shape[2:])
    head = mean_head(shape, teacher, norm=norm)
    feature = torch.randn(shape, requires_grad=True)
    predicted = head(feature)
    # Sums of a normed value are 0: not a sum, but each sample by itself.
    gradient = torch.autograd.grad(predicted.square().sum(), feature)[0].flatten(1)
    assert (gradient.norm(dim=1) > 1e-4).sum() >= 3  # a ReLU may be silent
    assert predicted.flatten(1).unique(dim=0).shape[0] >= 3


@pytest.mark.parametrize(("shape", "norm"), [((2, 3, 4, 4), "group"), ((2, 3, 4, 4), "layer")])
def test_a_norm_of_too_few_channels_is_refused(shape, norm):
    with pytest.raises(ValueError, match=rf"channels: expected 4 at least with norm='{norm}'"):
        mean_head(shape, shape, hidden_channels=3, norm=norm)
    mean_head(shape, shape, hidden_channels=3, norm="batch")
