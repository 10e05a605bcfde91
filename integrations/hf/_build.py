"""The heads of a Hugging Face student, sized from one batch."""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer

from vid_loss.distiller import Distiller
from vid_loss.guards import undisturbed
from vid_loss.matching import match_layers
from vid_loss.pairs import Pair

from ._cache import check_indexed
from ._checks import has_meta, refuse_meta
from ._heads import StudentHeads
from ._inputs import Columns, as_batch, padding_mask, with_decoder_masks
from ._names import named_in_wrapper
from ._sizing import FirstRows
from ._zero import refuse_partitioned_teacher, whole

logger = logging.getLogger(__name__)
_OURS = f"{__package__}._trainer"


class HeadsBuilder:
    """Builds the heads of each model that a Trainer trains.

    Args:
        trainer: whose models they are.
        columns: know the teacher, and what it is called with.
        pairs: as in :class:`~vid_loss.Distiller`; None matches layers.
        example: a collated batch; None takes the first rows of the train set.
        **options: those of :class:`~vid_loss.Distiller`.

    Attributes:
        example: as given, or taken.
    """

    def __init__(
        self,
        trainer: Trainer,
        columns: Columns,
        pairs: Mapping[str, str] | Sequence[Pair] | None,
        example: Mapping[str, Any] | None,
        **options: Any,
    ) -> None:
        self.trainer = trainer
        self.columns = columns
        self.pairs = pairs
        self.example = example
        self._first_rows: FirstRows | None = None
        self.options = options

    def build(self, student: nn.Module) -> StudentHeads | None:
        """Sizes heads with a batch of which either model is given its own columns.

        Args:
            student: the model that is trained.

        Returns:
            The heads, by now a part of the student; None if there is no batch.

        Raises:
            TypeError, ValueError, RuntimeError: as :class:`~vid_loss.Distiller`.
        """
        if self.example is None and self.trainer.train_dataset is not None:
            self._first_rows = _first_rows_of(self.trainer)
            self.example = self._first_rows.batch
        if self.example is None:
            return None
        refuse_partitioned_teacher(self.columns.teacher)
        with whole(student):
            return self._sized(student, self.example)

    def replacement(self, heads: StudentHeads | None) -> nn.Module | None:
        """Returns the model that was set on the trainer since the heads were built, if any.

        Args:
            heads: those that there are.

        Raises:
            ValueError: if it was set in one of two places.
        """
        trainer = self.trainer
        unwrap = partial(trainer.accelerator.unwrap_model, keep_torch_compile=False)
        model, runs = unwrap(trainer.model), unwrap(trainer.model_wrapped)
        if getattr(heads, "student", None) is model:
            return None
        if runs is not model:
            raise ValueError(
                "VIDTrainer, model: expected trainer.model_wrapped, which runs, to have it inside; "
                "got another. Set both: trainer.model_wrapped = trainer.model = model."
            )
        return cast(nn.Module, model)

    def put_back(self, dataset: Any) -> Any:
        """Returns the train set with the rows that were taken from it, for its loader."""
        return dataset if self._first_rows is None else self._first_rows.put_back(dataset)

    def _sized(self, student: nn.Module, batch: Mapping[str, Any]) -> StudentHeads:
        trainer, columns, teacher = self.trainer, self.columns, self.columns.teacher
        for owner, model in (("model", student), ("teacher", teacher)):
            refuse_meta(owner, model)
        if columns.indexed:
            check_indexed(batch)
        device = next(student.parameters()).device
        batch = send_to_device(dict(batch), device)
        move_teacher(teacher, device)
        if columns.missing_for(student, batch):
            call = _first_call(trainer.compute_loss, student, columns.for_student(batch))
            batch = as_batch(student, batch, *call)
        pairs = self._matched(student, batch) if self.pairs is None else self.pairs
        pairs = named_in_wrapper(pairs, student, teacher)
        if getattr(getattr(student, "config", None), "is_encoder_decoder", False):
            pairs = with_decoder_masks(pairs)
        # The heads take their mask from the keyword that a Distiller knows, whatever made it.
        example = {"batch": batch, "attention_mask": padding_mask(batch)}
        with _called_on_batches(student, columns):
            distiller = Distiller(
                student,
                teacher,
                pairs,
                example=example,
                teacher_inputs=columns.for_teacher,
                **self.options,
            )
        move_teacher(teacher, trainer.args.device)
        in_state = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        return StudentHeads(distiller, trainer.accelerator.autocast, columns, in_state=in_state)

    def _matched(self, student: nn.Module, batch: Mapping[str, Any]) -> Sequence[Pair]:
        pairs = match_layers(
            student,
            self.columns.teacher,
            self.columns.for_sizing(student, batch),
            teacher_inputs=lambda **_: self.columns.for_teacher(batch=batch),
        )
        if self.trainer.is_world_process_zero():
            # What nobody chose should be seen: transformers hides INFO by default.
            logger.warning("VIDTrainer, pairs: none were given; matched:\n%s", pairs)
        return pairs


def _first_rows_of(trainer: Trainer) -> FirstRows:
    loaders = [vars(cls).get("get_train_dataloader") for cls in type(trainer).__mro__]
    theirs = next(x for x in loaders if x is not None and x.__module__ != _OURS)
    collate = trainer.data_collator
    if theirs is Trainer.get_train_dataloader:  # others drop no columns, or in their own way
        collate = trainer._get_collator_with_removed_columns(collate, "training")
    count = min(2, trainer.args.per_device_train_batch_size)
    return FirstRows(trainer.train_dataset, count, collate)


@contextmanager
def _called_on_batches(student: nn.Module, columns: Columns) -> Iterator[None]:
    """Has the student pick its columns from a whole batch, for the length of a block.

    Raises:
        ValueError: if it does not run on them.
    """
    names: list[str] = []

    def pick(
        _: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if kwargs.keys() != {"batch", "attention_mask"}:  # its adapters off, it is the teacher
            return None
        inputs = columns.for_sizing(student, kwargs["batch"])
        names[:] = inputs
        return args, inputs

    begin = student.register_forward_pre_hook(pick, prepend=True, with_kwargs=True)
    end = student.register_forward_hook(lambda *_: names.clear())
    try:
        yield
    except Exception as error:
        found = error
        if _is_ours(error) and isinstance(error.__cause__, Exception):
            found = error.__cause__  # what the student itself has raised, in a distiller's words
        if not names or _is_ours(found):
            raise
        raise ValueError(
            f"VIDTrainer, example: expected a batch that the student runs on; got {names} of the "
            f"first rows, and {type(found).__name__}: {found}. Pass example=, a collated batch; to "
            "evaluate alone, leave train_dataset out."
        ) from found
    finally:
        begin.remove()
        end.remove()


def _is_ours(error: Exception) -> bool:
    """Whether this package has raised an error, and not the model that it runs."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(f"{__name__.partition('.')[0]}.")


def move_teacher(teacher: nn.Module, device: torch.device) -> None:
    """Moves a teacher; what is offloaded, spread over devices or quantised stays where it is."""
    placed = getattr(teacher, "hf_device_map", None) is not None or hasattr(teacher, "hf_quantizer")
    if not (placed or has_meta(teacher)):
        teacher.to(device)


def _first_call(
    task_loss: Callable[..., Any], model: nn.Module, batch: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns what a ``compute_loss`` calls the model with; the model itself is not run.

    Raises:
        RuntimeError: if it does not call it.
    """

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Called(args, kwargs)

    handle = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with undisturbed(model):
            task_loss(model, dict(batch))
    except _Called as call:
        return call.given
    finally:
        handle.remove()
    raise RuntimeError(
        "VIDTrainer, compute_loss: expected it to call the model that it is given; got no call on "
        f"a batch with {list(batch)}. Pass example=, what the model is called with."
    )


class _Called(Exception):
    """Ends a ``compute_loss`` where it calls the model."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given = args, kwargs
