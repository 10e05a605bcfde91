"""What keeps the user's models as they were, and the user's loop honest."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes and random states are put back as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


class HeadCheck:
    """Notices, in a plain loop, that the student is stepped and the heads are in no optimizer.

    A tensor's version counts its changes in place. Two steps of the student without one of the
    heads are no accident; a first one may be (weights loaded, a step without this loss).
    """

    def __init__(self) -> None:
        self.passed = False
        self.versions: tuple[int, int] | None = None
        self.missed = 0

    def __call__(self, student: nn.Module, heads: nn.Module) -> None:
        """Looks at the parameters before a step's loss.

        Raises:
            RuntimeError: if only the student's have changed, twice.
        """
        if self.passed or torch.compiler.is_compiling():
            return
        before, now = self.versions, (_version(student), _version(heads))
        self.versions = now
        if before is None:
            return
        self.passed = now[1] != before[1] or not any(p.requires_grad for p in heads.parameters())
        self.missed += now[0] != before[0]
        if self.missed > 1 and not self.passed:
            raise RuntimeError(
                "Distiller: expected its heads to be trained with the student; got an optimizer "
                "without them. Add: optimizer.add_param_group({'params': distiller.parameters()})"
            )


def _version(model: nn.Module) -> int:
    return sum(p._version for p in model.parameters() if p.requires_grad)
