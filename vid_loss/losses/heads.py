"""Mean networks mu(s): what predicts the teacher's feature from the student's."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vid_loss.guards import no_autocast

from .layouts import channels_of, kind_of

Norm = Literal["batch", "layer", "group", "none"]

_LEAST = 4  # channels whose norm leaves something: of one it leaves 0, of two their order
_WIDTH = 8  # of a head for a teacher with fewer channels, if their norm is by position
_GROUP = 16  # channels in a group at least: a map may have one position


def mean_head(
    student_shape: Sequence[int],
    teacher_shape: Sequence[int],
    *,
    hidden_channels: int | None = None,
    norm: Norm | None = None,
) -> nn.Module:
    """Builds the paper's mean network for a pair of features.

    Maps (MI-I): conv1x1 - norm - ReLU - conv1x1. Vectors (MI-L): one linear layer. Tokens, which
    the paper does not have: the map's head with linear layers, shared by all tokens.

    Args:
        student_shape: shape of the student's feature, the batch first.
        teacher_shape: shape of the teacher's feature, the batch first.
        hidden_channels: width between the two layers. None is the teacher's channels, with a layer
            or group norm 8 at least.
        norm: between them. None is batch norm for maps, as in the paper, and layer norm for
            tokens, which a padded batch cannot disturb. ``'group'`` is for maps, in up to 32
            groups of 16 channels at least; ``'layer'`` on maps is one group. ``'none'`` is for all.

    Returns:
        A module that maps ``student_shape`` to the teacher's number of channels.

    Raises:
        ValueError: if an option does not fit the kind of feature.
    """
    student_channels, teacher_channels = channels_of(student_shape), channels_of(teacher_shape)
    kind = kind_of(student_shape)
    if norm is not None and norm not in get_args(Norm):
        raise ValueError(f"VIDLoss, norm: expected one of {get_args(Norm)} or None; got {norm!r}.")
    if hidden_channels is not None and (type(hidden_channels) is not int or hidden_channels < 1):
        raise ValueError(
            f"VIDLoss, hidden_channels: expected a positive width; got {hidden_channels!r}."
        )
    if kind == "vector":
        if hidden_channels is not None or norm not in (None, "none"):
            raise ValueError(
                "VIDLoss, hidden_channels and norm: expected None, or norm='none', for vectors, "
                f"whose head is one linear layer; got {hidden_channels} and {norm!r}. Pass head= "
                "for another network."
            )
        return _small(nn.Linear(student_channels, teacher_channels))
    norm = norm or ("layer" if kind == "tokens" else "batch")
    by_position = norm in ("layer", "group")
    if hidden_channels is not None and by_position and hidden_channels < _LEAST:
        raise ValueError(
            f"VIDLoss, hidden_channels: expected {_LEAST} at least with norm={norm!r}, which of "
            f"fewer leaves nothing; got {hidden_channels}. Leave it out, or use norm='none'."
        )
    hidden_channels = hidden_channels or max(teacher_channels, _WIDTH if by_position else 1)
    if kind == "tokens":
        return TokenHead(student_channels, hidden_channels, teacher_channels, norm)
    return _map_head(student_channels, hidden_channels, teacher_channels, norm)


def own_head(
    head: nn.Module | None, hidden_channels: int | None, norm: Norm | None
) -> nn.Module | None:
    """Returns a head of the user's own, None if there is none.

    Raises:
        ValueError: if it is no module, or options of the built-in head are given beside it.
    """
    if head is not None and not isinstance(head, nn.Module):
        raise ValueError(
            f"VIDLoss, head: expected a module; got {head!r}. Build it: head=nn.Conv2d(...)."
        )
    if head is not None and (hidden_channels is not None or norm is not None):
        raise ValueError(
            "VIDLoss, hidden_channels and norm: expected None beside a head of your own; got "
            f"{hidden_channels} and {norm!r}."
        )
    return head


def _map_head(student: int, hidden: int, teacher: int, norm: Norm) -> nn.Module:
    norms: dict[Norm, list[nn.Module]] = {
        "batch": [nn.BatchNorm2d(hidden)],
        "layer": [nn.GroupNorm(1, hidden)],
        "group": [nn.GroupNorm(_groups(hidden), hidden)],
        "none": [],
    }
    # A bias before a norm would be subtracted again. The ReLU works in place: nothing else needs
    # what comes out of the norm, and that is a whole map saved.
    return MapHead(
        PointwiseConv2d(student, hidden, bias=norm == "none"),
        *norms[norm],
        nn.ReLU(inplace=True),
        _small(PointwiseConv2d(hidden, teacher)),
    )


def _groups(channels: int) -> int:
    """Returns the most groups, 32 at most, that divide the channels and are not too small."""
    fits = [n for n in range(1, 33) if not channels % n and channels // n >= _GROUP]
    return max(fits, default=1)


def _small(last: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Starts near the mean that a standardized feature has: a random guess is worse than none."""
    with torch.no_grad():
        last.weight.mul_(0.1)
        if last.bias is not None:
            last.bias.zero_()
    return last


class PointwiseConv2d(nn.Conv2d):
    """A convolution of kernel size 1; in eager mode on a CPU, a batch of matrix products.

    oneDNN's convolution of ``(N, C, H, W)`` with few channels takes up to three times as long,
    mostly in backward. But the products have a weight gradient for each sample, which outgrows
    the map itself where there are more channels than positions; autocast would keep a copy of
    the weight for each sample; and compiled, they are slower.

    Args:
        in_channels: channels of the map.
        out_channels: channels of what comes out.
        bias: whether one number per channel is added.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to the new number of channels."""
        if (
            torch.compiler.is_compiling()
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or input.ndim != 4
            or not input.is_contiguous()
            or input.shape[1] >= input.shape[2:].numel()
        ):
            return super().forward(input)
        weight = self.weight.flatten(1).expand(len(input), -1, -1)
        if self.bias is None:
            output = torch.bmm(weight, input.flatten(2))
        else:
            output = torch.baddbmm(self.bias.unsqueeze(1), weight, input.flatten(2))
        return output.view(len(input), self.out_channels, *input.shape[2:])


class MapHead(nn.Sequential):
    """conv1x1 - norm - ReLU - conv1x1; with a mask, the norm's statistics are of what counts."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps ``(N, C_s, H, W)`` to ``(N, C_t, H, W)``.

        Args:
            input: the student's map.
            mask: ``(N, H, W)``, boolean. What is said elsewhere means nothing. Batch norm picks the
                positions, which makes the host wait for a GPU.
        """
        for module in self:
            if mask is None:
                input = module(input)
            elif isinstance(module, nn.GroupNorm):
                input = _masked_group_norm(module, input, mask)
            elif hasattr(module, "running_mean"):  # whatever batch norm it has become
                # Contiguous: torch 2.14 takes it for channels last else, and its gradient is wrong.
                valid = input.movedim(1, -1)[mask].T.contiguous()
                columns = module(valid[None, :, :, None])
                normed = columns.new_zeros(input.movedim(1, -1).shape)
                input = normed.index_put((mask,), columns[0, :, :, 0].T).movedim(-1, 1)
            else:
                input = module(input)
        return input


def _masked_group_norm(norm: nn.GroupNorm, map: Tensor, mask: Tensor) -> Tensor:
    groups = map.flatten(2).view(len(map), norm.num_groups, -1, map.shape[2:].numel())
    padded = ~mask.flatten(1)[:, None, None]
    count = (~padded).sum(-1, keepdim=True).clamp(min=1) * groups.shape[2]
    with no_autocast(map):
        values = groups.to(torch.promote_types(groups.dtype, torch.float32))
        mean = values.masked_fill(padded, 0).sum((2, 3), keepdim=True) / count
        centered = (values - mean).masked_fill(padded, 0)
        var = centered.square().sum((2, 3), keepdim=True) / count
        normed = (centered * (var + norm.eps).rsqrt()).to(map.dtype).view_as(map)
    return torch.addcmul(norm.bias.view(-1, 1, 1), normed, norm.weight.view(-1, 1, 1))


class TokenHead(nn.Module):
    """linear - norm - ReLU - linear on every token of ``(N, L, C)``.

    Args:
        student_channels: width of the student's tokens.
        hidden_channels: width between the layers.
        teacher_channels: width of the teacher's tokens.
        norm: ``'layer'``, ``'batch'`` or ``'none'``. Batch norm takes its statistics from valid
            tokens alone; picking them makes the host wait for a GPU once a step.

    Raises:
        ValueError: for ``'group'``.
    """

    def __init__(
        self, student_channels: int, hidden_channels: int, teacher_channels: int, norm: Norm
    ) -> None:
        super().__init__()
        if norm == "group":
            raise ValueError(
                "VIDLoss, norm: expected 'layer', 'batch' or 'none' for tokens; got 'group'."
            )
        self.expand = nn.Linear(student_channels, hidden_channels, bias=norm == "none")
        self.norm: nn.Module
        if norm == "layer":
            self.norm = nn.LayerNorm(hidden_channels)
        else:
            self.norm = nn.BatchNorm1d(hidden_channels) if norm == "batch" else nn.Identity()
        self._by_token = norm != "batch"  # not by its class: SyncBatchNorm may take its place
        self.activation = nn.ReLU(inplace=True)
        self.project = _small(nn.Linear(hidden_channels, teacher_channels))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps ``(N, L, C_s)`` to ``(N, L, C_t)``; what it says of masked tokens means nothing."""
        hidden = self.expand(tokens)
        if self._by_token:
            hidden = self.norm(hidden)
        elif mask is None:
            hidden = self.norm(hidden.flatten(0, 1)).view_as(hidden)
        else:
            valid = mask.bool()
            normed = self.norm(hidden[valid])
            hidden = normed.new_zeros(hidden.shape).index_put((valid,), normed)
        projected: Tensor = self.project(self.activation(hidden))
        return projected
