"""The Trainer's training loss, with the transfer terms of a teacher."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from vid_loss.guards import undisturbed

from ._heads import StudentHeads, Transfer
from ._inputs import Columns
from ._log import LossMeans
from ._optimizer import refuse_optimizer_without_heads
from ._zero import whole


class TransferLoss:
    """What ``compute_loss`` is during training: the task's and the transfer terms.

    The latter are at the scale that the Trainer will give to the former.

    Args:
        trainer: whose loss it is; only what it says of itself in public is read.
        columns: tell the student's part of a batch from the teacher's.

    Attributes:
        heads: those of the student; None before there are any.
        means: the parts of the loss since the last log.
    """

    def __init__(self, trainer: Trainer, columns: Columns) -> None:
        self.trainer = trainer
        self.columns = columns
        self.heads: StudentHeads | None = None
        self.means = LossMeans()
        self._task_loss: Callable[..., Any] = trainer.compute_loss
        self._ignores_count = False
        self._optimizer_checked = False

    @contextmanager
    def installed(self, example: Mapping[str, Any]) -> Iterator[None]:
        """Is the trainer's ``compute_loss`` for the length of a block.

        Around whichever there is: the Trainer's, a subclass's, or one that was set on the object.

        Args:
            example: a collated batch to try the task loss with.
        """
        attributes = vars(self.trainer)
        own = {name: value for name, value in attributes.items() if name == "compute_loss"}
        self._task_loss = self.trainer.compute_loss
        self._ignores_count = self._probe_item_count(self.columns.for_student(example))
        self._optimizer_checked = False
        attributes["compute_loss"] = self
        try:
            yield
        finally:
            del attributes["compute_loss"]
            attributes.update(own)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what the task's ``compute_loss`` does, in training with transfer terms."""
        trainer, heads = self.trainer, self.heads
        if heads is None or not (model.training and torch.is_grad_enabled()):
            return self._task_loss(model, self.columns.for_student(inputs), *args, **kwargs)
        if not self._optimizer_checked:
            refuse_optimizer_without_heads(trainer, heads.distiller)
            self._optimizer_checked = True
        scaled = self._is_scaled(kwargs.get("num_items_in_batch"))
        if self._ignores_count:
            kwargs["num_items_in_batch"] = None
        batch = {**inputs}
        for name in self.columns.teacher_only:
            batch.pop(name, None)
        with Transfer(model, heads, inputs) as transfer:
            result = self._task_loss(model, batch, *args, **kwargs)
        task, *outputs = result if isinstance(result, tuple) else (result,)
        share = 1 / trainer.current_gradient_accumulation_steps
        if scaled and self._ignores_count:
            task = share * task
        loss = task + (share if scaled else 1.0) * transfer.loss().to(task.device)
        weights, terms = heads.distiller.weights, transfer.mean_terms()
        since = None
        if trainer.args.logging_nan_inf_filter:
            since = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        self.means.add(task if scaled else share * task, terms, weights, share, since)
        return (loss, *outputs) if outputs else loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` takes the loss as a part of the step's, or divides it first."""
        said_by_user = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        if said_by_user is not None:
            return bool(said_by_user)
        by_model = self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.trainer.compute_loss_func is not None)

    def _probe_item_count(self, batch: Mapping[str, Any]) -> bool:
        """Whether the task loss is a mean, however many items it is told that the step has.

        The forward of BERT, say, takes ``num_items_in_batch`` and ignores it: over n micro-batches
        the Trainer then sums n means, and the task loss outgrows the transfer terms n times. With
        one micro-batch in one process there is nothing to tell apart, and nothing is run.
        """
        trainer = self.trainer
        batches = trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
        said_by_user = getattr(trainer, "loss_is_scaled_for_ga", None) is not None
        if self.heads is None or said_by_user or "labels" not in batch or batches == 1:
            return False
        student = self.heads.student
        device = next(student.parameters()).device
        with whole(student), undisturbed(student), _same_records(trainer):
            one, two = (
                self._task_loss(
                    student, dict(send_to_device(batch, device)), num_items_in_batch=count
                )
                for count in torch.tensor([1, 2], device=device)
            )
        # 0 of any count of items is 0, which tells nothing.
        return bool((one == two) & (one != 0))


@contextmanager
def _same_records(trainer: Trainer) -> Iterator[None]:
    """Puts back what a ``compute_loss`` notes for the log: numbers, and lists and dicts of them."""
    attributes = vars(trainer)
    before = {name: copy.deepcopy(x) for name, x in attributes.items() if _is_record(x)}
    try:
        yield
    finally:
        attributes.update(before)


def _is_record(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_record, value.values()))
    if isinstance(value, list):
        return all(map(_is_record, value))
    return isinstance(value, int | float | Tensor) and not getattr(value, "requires_grad", False)
