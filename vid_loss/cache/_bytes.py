"""A tensor's bytes, for checksums and digests."""

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns a tensor's values as they are in memory, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
