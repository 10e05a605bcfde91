"""Tiny models of timm, a task of them, and a step with it."""

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from timm.optim import create_optimizer_v2  # noqa: E402  # after the skip
from vid_loss.integrations.timm import VIDTask  # noqa: E402  # after the skip

PAIRS = {"layer3": "layer3", "layer4": "layer4"}


def _model(name="test_resnet", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 3, **options})


def _task(*, seed=0, pairs=PAIRS, teacher=None, **options):
    teacher = teacher if teacher is not None else _model("resnet10t", seed=9)
    torch.manual_seed(seed)
    return VIDTask(_model(seed=seed), teacher, pairs=pairs, verbose=False, **options)


def _batch(size=4, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator, **options)
    return images, torch.arange(size) % 3


def _stepped(task, **options):
    """Takes one training step, so that nothing is at its start any more."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1, **options)
    task.get_trainable_module().train()
    task(*_batch())["loss"].backward()
    optimizer.step()
    task.update_ema()
    return optimizer


def _heads(task, ema=False):
    return task.get_task_state(ema=ema)["vid"]


def _state(task):
    return {key: task.get_checkpoint_state()[key] for key in ("state_dict", "task_state")}
