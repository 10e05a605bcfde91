"""The heads in the optimizer that ``configure_optimizers`` builds, before a scheduler sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vid_loss import Distiller


@contextmanager
def heads_in_optimizers(
    distiller: Distiller, module: nn.Module, learning_rate: float | None
) -> Iterator[None]:
    """Gives the heads to every optimizer of the student's that is built in a block.

    A scheduler that is built in the same block counts the groups, so that adding them after the
    block would be too late; torch tells of an optimizer's construction by no hook.

    Args:
        distiller: has the heads and the student.
        module: the module that has the student. If that is frozen and joins an optimizer later,
            the heads come into the first one of the module's.
        learning_rate: of the heads; :func:`~vid_loss.optimizer.head_learning_rate` if None.

    Raises:
        ValueError: if none was built.
    """
    student = list(distiller.student.parameters())
    trained = any(p.requires_grad for p in student)
    of_these = {id(p) for p in (student if trained else module.parameters())}
    of_heads = {id(p) for p in distiller.parameters()}
    build = Optimizer.__init__
    built: list[type[Optimizer]] = []

    @wraps(build)
    def with_heads(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        # A wrapper of another has that one's groups.
        if held & of_these and not held & of_heads and (trained or not built):
            distiller.add_to(self, lr=learning_rate)
            built.append(type(self))

    Optimizer.__init__ = with_heads  # type: ignore[method-assign]  # for the block alone
    try:
        yield
    finally:
        Optimizer.__init__ = build  # type: ignore[method-assign]  # as above
    if of_heads and not built:
        raise ValueError(
            "VIDCallback: expected configure_optimizers to build an optimizer of the module's "
            "parameters; got none, or one that was built before. Build it there."
        )
