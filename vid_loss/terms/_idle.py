"""Pairs without a weight, for whose heads other processes may wait."""

import torch
from torch import Tensor, nn


def idle_term(loss: nn.Module, feature: Tensor) -> Tensor:
    """Returns 0 as a function of all parameters of a loss that is not computed."""
    zero = torch.zeros((), device=feature.device)
    for parameter in loss.parameters():
        # DeepSpeed's ZeRO 3 leaves nothing of it outside its module's forward, and waits for none.
        if parameter.requires_grad and parameter.numel():
            zero = zero + (parameter * 0).nan_to_num(0).sum().to(zero)
    return zero
