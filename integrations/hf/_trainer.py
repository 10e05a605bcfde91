"""Hugging Face training scripts distil by changing one class name."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from vid_loss.distiller import Distiller
from vid_loss.matching import match_layers
from vid_loss.pairs import Pair
from vid_loss.taps import unwrap
from vid_loss.teacher import Inputs

from ._checkpoint import HeadsCheckpointMixin
from ._inputs import Columns, first_batch, takes_any, without_labels
from ._log import LossMeans
from ._loss import TransferLossMixin
from ._student import HEADS, StudentHeads

logger = logging.getLogger(__name__)


class VIDTrainerMixin(TransferLossMixin, HeadsCheckpointMixin):
    """What turns a Hugging Face Trainer into one that distils; it goes in front of the Trainer.

    ``class MyTrainer(VIDTrainerMixin, Seq2SeqTrainer)`` is that trainer plus the transfer terms
    of a teacher. Its own arguments stay what they are, and so do a ``compute_loss`` of yours,
    ``compute_loss_func``, label smoothing, ``model_init`` and callbacks. Evaluation and the saved
    model are those of the plain Trainer; heads are saved beside the model.

    Args:
        *args: the Trainer's positional arguments.
        teacher: the model that is learnt from. It gets those columns of the batch that its
            forward names, without the labels; they need not be the student's.
        pairs: as in :class:`~vid_loss.Distiller`. None matches layers and logs the choice.
        example: a collated batch to size the heads with; the first rows of the train set if None.
        teacher_inputs: called with the columns that it names (all, with ``**_``), returns the
            teacher's inputs: a tensor, a tuple or a dict.
        teacher_dtype: as in :class:`~vid_loss.Distiller`; the autocast of the Trainer's ``bf16``
            and ``fp16`` holds for the teacher anyway.
        stop_teacher: as in :class:`~vid_loss.Distiller`.
        **kwargs: the Trainer's keyword arguments.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a model is on the meta device, the train set is empty, ``nn.DataParallel``
            would be used, or a pair does not fit.
        RuntimeError: if the forward never reaches a layer.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        pairs: Mapping[str, str] | Sequence[Pair] | None = None,
        example: Mapping[str, Any] | None = None,
        teacher_inputs: Callable[..., Inputs] | None = None,
        teacher_dtype: torch.dtype | None = None,
        stop_teacher: bool = False,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self._teacher_dtype = teacher_dtype
        self._stop_teacher = stop_teacher
        self._pairs = pairs
        self._example = example
        self._columns = Columns(teacher, teacher_inputs)
        self._heads: StudentHeads | None = None
        self._means = LossMeans()
        self._ignores_item_count: bool | None = None
        self._optimizer_checked = False
        self._ready = False
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"VIDTrainer: expected one GPU a process; got {self.args.n_gpu}, which Trainer "
                "would use through nn.DataParallel. Start the script with torchrun or accelerate "
                "launch, or set CUDA_VISIBLE_DEVICES=0."
            )
        self._columns.label_names.update(self.label_names)
        # On the instance, so that it is around whichever compute_loss a subclass brings.
        self.compute_loss = self._loss_with_transfer  # type: ignore[method-assign]  # as said above
        self._ready = True
        self._attach(cast(nn.Module, self.model))

    @property
    def distiller(self) -> Distiller | None:
        """The transfer terms, with ``weights``, ``set_weight`` and ``terms``.

        None where there was nothing to size heads with, and after :meth:`close`.
        """
        return None if self._heads is None else self._heads.distiller

    def close(self) -> None:
        """Takes heads and hooks off the student. It is then what it was, its weights trained."""
        if self._heads is not None:
            self._heads.detach()
        self._heads = None

    def _attach(self, model: nn.Module) -> None:
        """Builds the heads, where there is a batch to size them with, as a child of the model."""
        self._set_signature_columns_if_needed()
        if self._example is None and self.train_dataset is not None:
            collate = self._get_collator_with_removed_columns(self.data_collator, "training")
            self._example = first_batch(self.train_dataset, collate)
        if self._example is None:
            return
        for owner, part in (("model", model), ("teacher", self.teacher)):
            _refuse_meta(owner, part)
        columns = self._columns
        device = next(model.parameters()).device
        columns.batch = send_to_device(dict(self._example), device)
        example = without_labels(model, columns.for_student(columns.batch), columns.label_names)
        if self.padding_mask(columns.batch) is not columns.batch.get("attention_mask"):
            # It is another mask that counts, and only the features' shapes matter here.
            example.pop("attention_mask", None)
        _move(self.teacher, device)
        distiller = Distiller(
            model,
            self.teacher,
            self._matched(model, example) if self._pairs is None else self._pairs,
            example=example,
            teacher_inputs=columns.for_teacher,
            teacher_dtype=self._teacher_dtype,
            stop_teacher=self._stop_teacher,
        )
        _move(self.teacher, self.args.device)
        self._heads = StudentHeads(distiller, self.accelerator.autocast)

    def _matched(self, model: nn.Module, example: Mapping[str, Any]) -> Sequence[Pair]:
        pairs = match_layers(model, self.teacher, example, teacher_inputs=self._columns.for_teacher)
        if self.is_world_process_zero():
            # What nobody chose should be seen: transformers hides INFO by default.
            logger.warning("VIDTrainer, pairs: none were given; matched:\n%s", pairs)
        return pairs

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Gives every model of ``model_init`` heads."""
        model: nn.Module = super().call_model_init(trial)
        if self._ready:  # Trainer.__init__ calls this before it has a data set
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._attach(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that only the teacher needs; the student does not get to see them."""
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        # A student that takes anything gets everything, unless the Trainer would drop it.
        student = unwrap(cast(nn.Module, self.model))
        if self.args.remove_unused_columns or not takes_any(student.forward):
            names = cast(list[str], self._signature_columns)
            names += self._columns.keep_for_teacher(names)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leaves the variances and norms of the heads without weight decay, and their biases."""
        free = {
            name
            for name, parameter in model.named_parameters()
            if HEADS in name.split(".") and parameter.ndim <= 1
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in free]


class VIDTrainer(VIDTrainerMixin, Trainer):
    """The Hugging Face Trainer with the transfer terms of a teacher.

    The arguments are those of ``Trainer`` and of :class:`VIDTrainerMixin`::

        trainer = VIDTrainer(
            model=student, args=args, train_dataset=train_set, eval_dataset=eval_set,
            teacher=teacher, pairs={"bert.encoder.layer.1": "bert.encoder.layer.3"},
        )
        trainer.train()
    """


def _refuse_meta(owner: str, model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"VIDTrainer, {owner}: expected weights in memory; got a model on the meta device. "
            "Load it with from_pretrained() and without device_map='meta' or init_empty_weights()."
        )


def _move(teacher: nn.Module, device: torch.device) -> None:
    # What is spread over devices or quantised stays where it is.
    if getattr(teacher, "hf_device_map", None) is None and not hasattr(teacher, "hf_quantizer"):
        teacher.to(device)
