import gc

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks


@pytest.fixture
def seed():
    torch.manual_seed(0)


@pytest.fixture
def no_hooks_of_other_tests():
    gc.collect()
    assert not _global_optimizer_pre_hooks


@pytest.fixture
def uncounted(monkeypatch):
    """Leaves out what is run to prove what is kept, where the teacher's samples are counted."""
    monkeypatch.setattr("vid_loss.cache._checks.proven", lambda teacher, batch, *_: batch)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Everything takes the way of tensors whose values are far away."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
