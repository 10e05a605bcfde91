"""Lightning's fine-tuning callbacks, which know the parameters of the module and no others."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import Optimizer

_HOOKS = ("on_fit_start", "on_train_epoch_start")  # where they read and write groups


def keep_heads_from_finetuning(trainer: Trainer, heads: nn.Module) -> Callable[[], None]:
    """Has each ``BaseFinetuning`` see the optimizers without the heads' groups.

    It writes down by name in the module what every group holds, and some take the last group for
    the backbone's.

    Args:
        trainer: has the callbacks, and by the time that they run the optimizers.
        heads: what they are not to see.

    Returns:
        What undoes it.
    """
    changed: list[tuple[BaseFinetuning, str]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a connector sets it
        if isinstance(callback, BaseFinetuning):
            for name in _HOOKS:
                vars(callback)[name] = _without(heads, trainer, getattr(callback, name))
                changed.append((callback, name))

    def undo() -> None:
        for callback, name in changed:
            vars(callback).pop(name, None)

    return undo


def _without(heads: nn.Module, trainer: Trainer, hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _hidden(heads, trainer.optimizers):
            return hook(*args, **kwargs)

    return wrapped


@contextmanager
def _hidden(heads: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Takes the heads' groups out for a block; a schedule and a state go by their places."""
    own = {id(p) for p in heads.parameters()}
    taken = []
    for optimizer in optimizers:
        groups = list(enumerate(optimizer.param_groups))
        of_heads = [(i, g) for i, g in groups if any(id(p) in own for p in g["params"])]
        for place, _ in reversed(of_heads):
            del optimizer.param_groups[place]
        taken.append((optimizer, of_heads))
    try:
        yield
    finally:
        for optimizer, of_heads in taken:
            for place, group in of_heads:
                optimizer.param_groups.insert(place, group)
