"""The Trainer's training loss, with the transfer terms of a teacher."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from vid_loss.guards import hook_guards, undisturbed

from ._inputs import Columns
from ._log import LossMeans, transferred
from ._student import StudentHeads, refuse_optimizer_without_heads, transfer_of

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # it is given its Trainer where it is mixed in


class TransferLossMixin(_Base):
    """What VIDTrainer adds to the loss, at the scale that the Trainer will give to its own."""

    _heads: StudentHeads | None
    _columns: Columns
    _means: LossMeans
    _example: Mapping[str, Any] | None
    _ignores_item_count: bool | None
    _optimizer_checked: bool

    def padding_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Returns ``(N, L)``, nonzero at tokens that count, or None. Override it for a decoder."""
        mask = inputs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, as the Trainer does, on the sum of the task loss and the transfer terms."""
        if self._heads is None:
            raise ValueError(
                "VIDTrainer, example: expected a collated batch, as there is no train_dataset to "
                "size the heads with; got None. Pass one of the two."
            )
        if self._ignores_item_count is None:
            self._ignores_item_count = self._probe_item_count(self._heads.student)
        self._optimizer_checked = False
        with hook_guards() if self.args.torch_compile else nullcontext():
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step's gradients; heads that nothing weighs get none."""
        loss = super().training_step(*args, **kwargs)
        if self._heads is not None and not any(self._heads.distiller.weights.values()):
            # Their zeros would change the last bit of the norm that gradients are clipped by.
            for parameter in self._heads.distiller.parameters():
                parameter.grad = None
        return loss

    def _probe_item_count(self, student: nn.Module) -> bool:
        """Whether the task loss is a mean, however many items it is told that the step has.

        The forward of BERT, say, takes ``num_items_in_batch`` and ignores it: over n micro-batches
        the Trainer then sums n means, and the task loss outgrows the transfer terms n times.
        """
        device = next(student.parameters()).device
        batch = send_to_device(self._columns.for_student(self._example or {}), device)
        said_by_user = getattr(self, "loss_is_scaled_for_ga", None) is not None
        if said_by_user or "labels" not in batch:
            return False
        with undisturbed(student):
            one, two = (
                self._task_loss(student, dict(batch), num_items_in_batch=count)
                for count in torch.tensor([1, 2], device=device)
            )
        # 0 of any count of items is 0, which tells nothing.
        return bool((one == two) & (one != 0))

    def _task_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The compute_loss of the class, which that of the instance hides."""
        return type(self).compute_loss(self, *args, **kwargs)

    def _loss_with_transfer(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """What ``compute_loss`` is from outside: in training the task's and the transfer terms."""
        heads = self._heads
        count = {}
        if num_items_in_batch is not None and not self._ignores_item_count:
            count = {"num_items_in_batch": num_items_in_batch}
        batch = self._columns.for_student(inputs)
        if heads is None or not (model.training and torch.is_grad_enabled()):
            return self._task_loss(model, batch, return_outputs=return_outputs, **count)
        self._check_optimizer(heads)
        features = self._teacher_features(heads, inputs)
        with heads.serving(features, self.padding_mask(inputs)):
            task, outputs = self._task_loss(model, batch, return_outputs=True, **count)
        share = 1 / self.current_gradient_accumulation_steps
        scaled = self._is_scaled(num_items_in_batch)
        if scaled and self._ignores_item_count:
            task = share * task
        loss = task + (share if scaled else 1.0) * transfer_of(outputs)
        self._means.add(task if scaled else share * task, heads.distiller, share)
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` takes the loss as a part of the step's, or divides it first."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def _teacher_features(
        self, heads: StudentHeads, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        self._columns.batch = inputs
        try:
            # The student's forward has the autocast that Accelerate gives it; the teacher's none.
            with self.accelerator.autocast():
                return heads.distiller.teacher_features()
        finally:
            self._columns.batch = {}

    def _check_optimizer(self, heads: StudentHeads) -> None:
        # DeepSpeed and FSDP 1 flatten the parameters that their optimizers hold.
        flattened = self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1
        )
        if not (self._optimizer_checked or flattened or self.optimizer is None):
            refuse_optimizer_without_heads(self.optimizer, heads.distiller)
        self._optimizer_checked = True

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluates the student on its own columns."""
        batch = self._columns.for_student(inputs)
        return super().prediction_step(model, batch, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training loss its parts by name, and what was transferred in this process."""
        if "loss" in logs:
            logs.update(self._means.take(self.accelerator))
            if self._heads is not None:
                logs.update(transferred(self._heads.distiller))
        super().log(logs, *args, **kwargs)
