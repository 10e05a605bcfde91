"""Hugging Face training scripts distil by changing one class name."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from vid_loss import Distiller, Pair
from vid_loss.cache import FeatureCache, checked_cache
from vid_loss.guards import hook_guards
from vid_loss.teacher import Inputs

from ._build import HeadsBuilder
from ._card import ModelCardMixin
from ._checkpoint import plain_student, save_heads, split_heads, whole_checkpoint
from ._checks import check_arguments, refuse_closed, refuse_engine, refuse_nothing_to_size
from ._heads import HEADS
from ._inputs import Columns
from ._loss import TransferLoss
from ._optimizer import give_heads_groups, refuse_rate_beside

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # it is given its Trainer where it is mixed in


class VIDTrainerMixin(ModelCardMixin, _Base):
    """What turns a Hugging Face Trainer into one that distils; it goes in front of the Trainer.

    ``class MyTrainer(VIDTrainerMixin, Seq2SeqTrainer)`` is that trainer plus the transfer terms
    of a teacher. Its own arguments stay what they are, and so do a ``compute_loss`` of yours,
    ``compute_loss_func``, label smoothing, ``model_init`` and callbacks. Evaluation and the saved
    model are those of the plain Trainer; heads are saved beside the model.

    The terms are those of the student's forward in ``compute_loss``, whatever that returns. Before
    each of several with gradients the teacher runs on what it is given; they are averaged.

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
        cache: keeps the teacher's features; the train set has a column ``sample_index``.
        head_learning_rate: of the heads, which start at random; schedules scale it as they do the
            student's. None is ``args.learning_rate``, but at least 5e-3; 0.3 with SGD. Not
            beside an optimizer of yours: ``trainer.distiller.add_to(optimizer, lr=)``.
        **kwargs: the Trainer's keyword arguments.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a model is on the meta device, the train set is empty, ``nn.DataParallel``
            or FSDP 1 would be used, a pair does not fit, or the rate is none or has no effect.
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
        cache: FeatureCache | None = None,
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(teacher, example, teacher_inputs, head_learning_rate)
        self.teacher = teacher
        self._head_learning_rate = head_learning_rate
        columns = Columns(teacher, teacher_inputs, indexed=checked_cache(cache) is not None)
        self._transfer = TransferLoss(self, columns)
        self._builder = HeadsBuilder(
            self,
            columns,
            columns.with_masks(pairs),
            example,
            teacher_dtype=teacher_dtype,
            stop_teacher=stop_teacher,
            cache=cache,
        )
        self._ready = self._closed = self._made_optimizer = False
        super().__init__(*args, **kwargs)
        refuse_engine(self)
        refuse_rate_beside(self.optimizer, head_learning_rate)
        self._transfer.columns.label_names.update(self.label_names)
        self._ready = True
        self._attach(cast(nn.Module, self.model))

    @property
    def distiller(self) -> Distiller | None:
        """The transfer terms, with ``weights``, ``set_weight`` and ``terms``.

        None where there was nothing to size heads with, and after :meth:`close`.
        """
        return None if self._transfer.heads is None else self._transfer.heads.distiller

    def close(self) -> None:
        """Takes heads and hooks off the student. It is then what it was, its weights trained.

        That is the end of training here: the heads are gone.
        """
        self._closed = True
        heads, self._transfer.heads = self._transfer.heads, None
        if heads is not None:
            heads.detach()

    # ---- Building ----

    def _attach(self, model: nn.Module) -> None:
        """Builds the heads, where there is a batch to size them with, as a child of the model."""
        self._set_signature_columns_if_needed()
        self._transfer.heads = self._builder.build(model)

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
        names = cast(list[str], self._signature_columns)
        names += self._transfer.columns.keep_for_teacher(
            cast(nn.Module, self.model), names, self.args.remove_unused_columns
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leaves the variances and norms of the heads without weight decay, and their biases."""
        names = super().get_decay_parameter_names(model)
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
        return [name for name in names if not (HEADS in name.split(".") and name in vectors)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the Trainer's optimizer, with groups of the heads' own behind the student's."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.distiller is not None and made:
            self._made_optimizer = True
            give_heads_groups(optimizer, self.distiller, self._head_learning_rate)
        return optimizer

    # ---- Training ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, as the Trainer does, on the sum of the task loss and the transfer terms.

        Raises:
            RuntimeError: after :meth:`close`.
            ValueError: if there is nothing to size heads with, or a model, an optimizer or a rate
                does not go with the heads.
        """
        refuse_closed(self._closed)
        if not self._made_optimizer:  # it may have been set since
            refuse_rate_beside(self.optimizer, self._head_learning_rate)
        if self.model is not None:  # unlike in a search, which makes one for each trial
            model = self._builder.replacement(self._transfer.heads)
            if model is not None:
                self._attach(model)
        refuse_nothing_to_size(self._transfer.heads)
        guards = hook_guards() if self.args.torch_compile else nullcontext()
        with guards, self._transfer.installed(self._builder.example or {}):
            resume = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
            return super().train(resume, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Returns the Trainer's loader, of all rows, those that the heads were sized with too."""
        dataset = self.train_dataset
        self.train_dataset = self._builder.put_back(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step's gradients; heads that nothing weighs get none."""
        loss = super().training_step(*args, **kwargs)
        heads = self._transfer.heads
        if heads is not None and not any(heads.distiller.weights.values()):
            # Their zeros would change the last bit of the norm that gradients are clipped by.
            for parameter in heads.distiller.parameters():
                parameter.grad = None
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluates the student on its own columns."""
        batch = self._transfer.columns.for_student(inputs)
        return super().prediction_step(model, batch, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training loss its parts by name, and what was transferred."""
        if "loss" in logs:
            logs.update(self._transfer.means.take(self.accelerator))
            if self.distiller is not None:
                logs.update(self.distiller.metrics())
        super().log(logs, *args, **kwargs)

    # ---- Checkpoints: the plain student's model file, and the heads beside it ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._transfer.heads is None:
            super()._save(output_dir, state_dict=state_dict)
            return
        heads = self._transfer.heads.distiller.losses.state_dict()
        if state_dict is not None:
            state_dict, heads = split_heads(state_dict)
        with self._transfer.heads.hidden():
            super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and heads:
            save_heads(str(output_dir or self.args.output_dir), heads)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with plain_student(self._transfer.heads, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        with plain_student(self._transfer.heads, str(self.state.best_model_checkpoint)):
            super()._load_best_model()


class VIDTrainer(VIDTrainerMixin, Trainer):
    """The Hugging Face Trainer with the transfer terms of a teacher.

    The arguments are those of ``Trainer`` and of :class:`VIDTrainerMixin`::

        trainer = VIDTrainer(
            model=student, args=args, train_dataset=train_set, eval_dataset=eval_set,
            teacher=teacher, pairs={"encoder.layer.1": "encoder.layer.3"})
    """
