"""Properties that every transfer loss must have, whatever it computes."""

import torch
from torch import Tensor, nn


def assert_is_transfer_loss(loss: nn.Module, student: Tensor, teacher: Tensor, **options) -> None:
    """A finite scalar whose gradient reaches the student and every parameter, not the teacher."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    with torch.no_grad():
        frozen = teacher.clone()
    value = loss(student, frozen, **options)
    assert value.shape == ()
    assert torch.isfinite(value)
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"


def hook_count(model: nn.Module) -> int:
    """How many hooks of any kind sit on a model's modules."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._backward_hooks,
        )
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Equal keys, bit-identical values."""
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
