"""Heads inside a Hugging Face student, so that whatever wraps or shards it sees them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss.distiller import Distiller
from vid_loss.guards import several_processes
from vid_loss.taps import UncopiedHook

from ._inputs import arguments_of, forward_of

HEADS = "vid_heads"


class StudentHeads(UncopiedHook):
    """Makes a distiller's heads a child of its student, and their loss a part of its output.

    Under DDP and FSDP the heads must be parameters of the wrapped model, run in its forward and
    return their loss as an output of it. This is the hook that does so, in the forwards that a
    :class:`Transfer` prepares: the student returns ``(output, transfer terms)`` to its wrapper,
    and :class:`Transfer` hands the output alone to whoever called the wrapper.

    Args:
        distiller: the transfer terms; heads of an earlier one on this student are taken off.
        mask_of: returns the padding mask of a batch.
        autocast: makes the context that the heads and the teacher run in.
    """

    def __init__(
        self,
        distiller: Distiller,
        mask_of: Callable[[Mapping[str, Any]], Tensor | None],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.distiller = distiller
        self.student = distiller.student
        self.mask_of = mask_of
        self.autocast = autocast
        # The teacher's features, none if no pair has a weight, and what masks are made of.
        self.prepared: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
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

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Adds the transfer terms to a prepared forward; a replica of the student has none."""
        if self.prepared is None or module is not self.student:
            return None
        features, inputs = self.prepared
        with self.autocast():
            return output, self.distiller(teacher_features=features, **inputs)

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


class Transfer:
    """The transfer terms of one ``compute_loss``, whatever it does with the model.

    In a ``with`` block every forward of the model in train mode with gradients is preceded by the
    teacher's on the same batch, and followed by the taking of its transfer terms. The hooks are
    on the outermost wrapper: DDP and FSDP have seen the terms as an output by then, and the
    caller sees the student's own output.

    Args:
        model: the student as the Trainer calls it, in all its wrappers.
        heads: the student's.
        batch: the whole batch, the teacher's columns included.

    Attributes:
        losses: the weighted sum over pairs, of each forward.
        terms: the terms by pair, of each forward: unweighted and detached.
    """

    def __init__(self, model: nn.Module, heads: StudentHeads, batch: Mapping[str, Any]) -> None:
        self.model = model
        self.heads = heads
        self.batch = batch
        self.losses: list[Tensor] = []
        self.terms: list[dict[str, Tensor]] = []

    def __enter__(self) -> "Transfer":
        """Watches the model's forwards."""
        # First of its hooks: FSDP's own gathers the root's weights, which can wait.
        before = self.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, always_call=True)
        self._handles = before, after
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the model alone."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heads = self.heads
        if not (heads.student.training and torch.is_grad_enabled()):
            return
        # A compute_loss may call the model on something else than the batch: another view of the
        # images, one half of the texts.
        batch = {**self.batch, **kwargs}
        if args:
            batch.update(zip(arguments_of(forward_of(heads.student)), args, strict=False))
        batch.pop("num_items_in_batch", None)
        mask = heads.mask_of(batch)
        features: dict[str, Tensor] = {}
        if any(heads.distiller.weights.values()) or several_processes():
            # The student's forward has the autocast that Accelerate gives it; the teacher's none.
            with heads.autocast():
                features = heads.distiller.teacher_features(batch=batch)
        heads.prepared = features, {"batch": batch, "attention_mask": mask}

    def _after(self, _: nn.Module, args: Any, output: Any) -> Any:
        if self.heads.prepared is None:
            return None
        features = self.heads.prepared[0]
        self.heads.prepared = None
        if output is None:  # the forward has raised
            return None
        output, transfer = output
        self.losses.append(transfer)
        self.terms.append(self.heads.distiller.terms if features else {})
        return output

    def loss(self) -> Tensor:
        """Returns the mean over the forwards, each an estimate of the same terms; a scalar.

        Raises:
            RuntimeError: if there was none.
        """
        if not self.losses:
            raise RuntimeError(
                "VIDTrainer, compute_loss: expected it to call the model that it is given, in "
                "train mode with gradients; got no such forward. Call model(**inputs) in it, not "
                "trainer.model or a copy."
            )
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).mean()

    def mean_terms(self) -> dict[str, Tensor]:
        """Returns the terms by pair, in the mean over the forwards."""
        first, *more = self.terms
        return {k: torch.stack([x, *(y[k] for y in more)]).mean() for k, x in first.items()}
