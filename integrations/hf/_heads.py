"""Heads inside a Hugging Face student, so that whatever wraps or shards it sees them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vid_loss.distiller import Distiller
from vid_loss.taps import UncopiedHook

from ._cache import cached_call
from ._inputs import Columns, as_batch, padding_mask

HEADS = "vid_heads"


class Prepared(NamedTuple):
    """What a forward of the student needs for its transfer terms."""

    features: Mapping[str, Tensor] | None  # the teacher's; None if no pair has a weight
    inputs: Mapping[str, Any]  # what masks are made of
    later: bool  # one before it in the same compute_loss had terms


class StudentHeads(UncopiedHook):
    """Makes a distiller's heads a child of its student, and their loss a part of its output.

    Under DDP and FSDP the heads must be parameters of the wrapped model, run in its forward and
    return their loss as an output of it. This is the hook that does so, in the forwards that a
    :class:`Transfer` prepares: the student returns ``(output, transfer terms)`` to its wrapper,
    and :class:`Transfer` hands the output alone to whoever called the wrapper.

    Args:
        distiller: the transfer terms; heads of an earlier one on this student are taken off.
        autocast: makes the context that the heads and the teacher run in.
        columns: know what the teacher reads of a batch.
        in_state: whether the student's state dict has them too, for an engine that saves and
            shards what is in it.
    """

    def __init__(
        self,
        distiller: Distiller,
        autocast: Callable[[], AbstractContextManager[Any]],
        columns: Columns,
        *,
        in_state: bool = False,
    ) -> None:
        self.distiller = distiller
        self.student = distiller.student
        self.autocast = autocast
        self.columns = columns
        self.prepared: Prepared | None = None
        for hook in list(self.student._forward_hooks.values()):
            if isinstance(hook, StudentHeads):
                hook.detach()
        self._holder = _holder_of(self.student)
        self._holder.add_module(HEADS, distiller.losses)
        # After the tap's own hook, which ends the recording that this one reads.
        self._handles = [self.student.register_forward_hook(self)]
        self.in_state = in_state
        if not in_state:
            leave_out = self._holder.register_state_dict_post_hook(_leave_out_heads)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            not_missed = self._holder.register_load_state_dict_post_hook(_not_missed)  # type: ignore[no-untyped-call]  # as above
            self._handles += [leave_out, not_missed]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Adds the transfer terms to a prepared forward; a replica of the student has none."""
        if self.prepared is None or module is not self.student:
            return None
        features, inputs, later = self.prepared
        if later and features is not None and not self.distiller.reached:
            return output, None  # a loss returns what it kept of an earlier forward
        with self.autocast():
            return output, self.distiller(teacher_features=features, **inputs)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the heads off for the length of a block: the student has its own keys alone."""
        heads = self._holder._modules.pop(HEADS)
        try:
            yield
        finally:
            self._holder.add_module(HEADS, heads)

    def detach(self) -> None:
        """Takes the heads and every hook off. The student is then what it was."""
        for handle in self._handles:
            handle.remove()
        self._holder._modules.pop(HEADS, None)
        self.distiller.close()


def _holder_of(student: nn.Module) -> nn.Module:
    """Returns the student, or its first part that does not run all its children in their order."""
    lists = nn.Sequential, nn.ModuleList, nn.ModuleDict
    return next((x for x in student.modules() if not isinstance(x, lists)), student)


# Functions, not hooks of the heads: a copy of the student has heads too, and is to save without.
def _leave_out_heads(_: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    for keys in (state, getattr(state, "_metadata", {})):
        for key in [key for key in keys if f"{key}.".startswith(f"{prefix}{HEADS}.")]:
            del keys[key]


def _not_missed(_: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if HEADS not in key.split(".")]


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
        self._teacher_saw: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []

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
        batch.pop("num_items_in_batch", None)
        if args:
            batch = as_batch(heads.student, batch, args, kwargs)
        mask = padding_mask(batch)
        features: Mapping[str, Tensor] | None = None
        if any(heads.distiller.weights.values()):
            for seen, known in self._teacher_saw:  # a loss may call the model on one many times
                if all(batch.get(name) is value for name, value in seen.items()):
                    features = known
                    break
            else:
                given: Mapping[str, Any] = {"batch": batch}
                if heads.columns.indexed:
                    given = cached_call(batch, heads.columns, first=not self._teacher_saw)
                # The student's forward has Accelerate's autocast; the teacher's has none.
                with heads.autocast():
                    features = heads.distiller.teacher_features(**given)
                    heads.distiller.thin(features, (), given)
                self._teacher_saw.append((batch, features))
        inputs = {"batch": batch, "attention_mask": mask}
        heads.prepared = Prepared(features, inputs, later=bool(self.losses))

    def _after(self, _: nn.Module, args: Any, output: Any) -> Any:
        if self.heads.prepared is None:
            return None
        features = self.heads.prepared.features
        self.heads.prepared = None
        if output is None:  # the forward has raised
            return None
        output, transfer = output
        if transfer is not None:
            self.losses.append(transfer)
            self.terms.append({} if features is None else self.heads.distiller.terms)
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
                "trainer.model or a copy. A loss that runs the model in backward, as those with "
                "Cached in their names do, cannot be used: take the one without."
            )
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).mean()

    def mean_terms(self) -> dict[str, Tensor]:
        """Returns the terms by pair, in the mean over the forwards."""
        first, *more = self.terms
        return {k: torch.stack([x, *(y[k] for y in more)]).mean() for k, x in first.items()}
