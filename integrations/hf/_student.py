"""Heads inside a Hugging Face student, so that whatever wraps or shards it sees them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import make_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from vid_loss.distiller import Distiller
from vid_loss.guards import holds_all
from vid_loss.taps import UncopiedHook
from vid_loss.terms import total

HEADS = "vid_heads"
FIELD = "transfer_loss"


class StudentHeads(UncopiedHook):
    """Makes a distiller's heads a child of its student, and their loss a field of its output.

    Under DDP and FSDP the heads must be parameters of the wrapped model, run in its forward and
    return their loss as an output of it. This is the hook that does so: after a forward of the
    student in train mode, while :meth:`serving` holds the teacher's features.

    Args:
        distiller: the transfer terms; heads of an earlier one on this student are taken off.
        autocast: makes the context that the heads run in.
    """

    def __init__(
        self, distiller: Distiller, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.distiller = distiller
        self.student = distiller.student
        self.autocast = autocast
        self.teacher_features: Mapping[str, Tensor] | None = None
        self.mask: Tensor | None = None
        for hook in list(self.student._forward_hooks.values()):
            if isinstance(hook, StudentHeads):
                hook.detach()
        self.student.add_module(HEADS, distiller.losses)
        # After the tap's own hook, which ends the recording that this one reads.
        self._handle = self.student.register_forward_hook(self)
        # A direct student.save_pretrained() leaves these out.
        self._ignored = getattr(self.student, "_keys_to_ignore_on_save", None)
        keys = {f"{HEADS}.{key}" for key in distiller.losses.state_dict()}
        self.student._keys_to_ignore_on_save = keys | set(self._ignored or ())  # type: ignore[assignment]  # a class attribute of transformers, not a tensor

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        """Adds the transfer terms to the student's output; a replica of it is left alone."""
        if (
            self.teacher_features is None
            or module is not self.student
            or not (module.training and torch.is_grad_enabled())
        ):
            return None
        with self.autocast():
            # Not its forward, which looks whether the heads are trained: the Trainer's has been.
            terms = self.distiller.weighted_terms(
                teacher_features=self.teacher_features, token_mask=self.mask
            )
        return with_transfer(output, total(terms))

    @contextmanager
    def serving(self, features: Mapping[str, Tensor], mask: Tensor | None) -> Iterator[None]:
        """Holds the teacher's features and the padding mask for the student's next forward."""
        self.teacher_features, self.mask = features, mask
        try:
            yield
        finally:
            self.teacher_features, self.mask = None, None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the heads off for the length of a block: the student has its own keys alone."""
        heads = self.student._modules.pop(HEADS)
        try:
            yield
        finally:
            self.student.add_module(HEADS, heads)

    def detach(self) -> None:
        """Takes the heads and every hook off. The student is then what it was."""
        self._handle.remove()
        self.student._modules.pop(HEADS, None)
        self.student._keys_to_ignore_on_save = self._ignored  # type: ignore[assignment]  # as above
        self.distiller.close()


def with_transfer(output: Any, transfer: Tensor) -> Any:
    """Returns a model's output with the transfer terms as one more entry.

    A ModelOutput gets a declared field: an undeclared key is a TypeError in DDP, and FSDP drops it.

    Raises:
        TypeError: if the output is neither a mapping nor a tuple.
    """
    if isinstance(output, ModelOutput):
        return _output_class(type(output))(**output, **{FIELD: transfer})
    if isinstance(output, dict):
        return {**output, FIELD: transfer}
    if isinstance(output, tuple):
        return (*output, transfer)
    raise TypeError(
        "VIDTrainer, model: expected its forward to return a ModelOutput, a dict or a tuple; got "
        f"{type(output).__name__}. Return {{'loss': ..., 'logits': ...}}."
    )


def transfer_of(output: Any) -> Tensor:
    """Returns the transfer terms that :func:`with_transfer` put into an output.

    Raises:
        RuntimeError: if they are not there.
    """
    transfer = output.get(FIELD) if isinstance(output, dict) else None
    if isinstance(output, tuple) and output:
        transfer = output[-1]
    if isinstance(transfer, Tensor) and transfer.ndim == 0:
        return transfer
    raise RuntimeError(
        "VIDTrainer, compute_loss: expected it to run the model on the batch and, with "
        f"return_outputs=True, to return (loss, the model's own output); got "
        f"{type(output).__name__} without {FIELD!r}. Return what model(**inputs) returned."
    )


def refuse_optimizer_without_heads(optimizer: Any, distiller: Distiller) -> None:
    """Raises the RuntimeError that says which line an optimizer of the user's lacks."""
    if not holds_all(optimizer, distiller):
        raise RuntimeError(
            "VIDTrainer, optimizers: expected the heads in the optimizer; got one without them. "
            "Before train() add: optimizer.add_param_group({'params': "
            "trainer.distiller.parameters()}), and build your scheduler, if any, after that."
        )


# Dynamo cannot trace the making of a class.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    return _make_output_class(base)


@cache
def _make_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
    return make_dataclass(
        base.__name__, [(FIELD, Tensor | None, None)], bases=(base,), namespace=namespace
    )
