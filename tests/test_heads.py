import pytest
import torch
from torch import nn

from vid_loss.heads import TokenHead, mean_head


def kinds(head):
    return [type(module) for module in head.modules() if not list(module.children())]


def test_map_head_is_the_papers():
    head = mean_head((2, 3, 4, 4), (2, 6, 4, 4))
    assert kinds(head) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert head(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)


def test_vector_head_is_one_linear_layer():
    assert kinds(mean_head((2, 3), (2, 6))) == [nn.Linear]


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
        ("group", [nn.GroupNorm], 16),
        ("none", [], None),
    ],
)
def test_map_head_has_the_norm_and_width_asked_for(norm, layers, groups):
    head = mean_head((2, 3, 4, 4), (2, 6, 4, 4), hidden_channels=48, norm=norm)
    assert kinds(head) == [nn.Conv2d, *layers, nn.ReLU, nn.Conv2d]
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
        (((2, 3), (2, 6)), {"norm": "batch"}, "expected None for vectors"),
        (((2, 3), (2, 6)), {"hidden_channels": 4}, "expected None for vectors"),
        (((2, 7, 3), (2, 7, 6)), {"norm": "group"}, "for tokens; got 'group'"),
        (((2, 3, 4, 4), (2, 6, 4, 4)), {"norm": "instance"}, "norm: expected one of"),
        (((2, 3, 4, 4), (2, 6, 4, 4)), {"hidden_channels": 0}, "expected a positive width; got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        mean_head(*shapes, **options)
