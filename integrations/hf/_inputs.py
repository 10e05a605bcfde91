"""Which part of a Hugging Face batch each of the two models is called with."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn

from vid_loss.cache import SAMPLE_INDEX
from vid_loss.pairs import MaskSource, Pair
from vid_loss.taps import unwrap
from vid_loss.teacher import Inputs

# The parts of a model that the tokens to come go through, as transformers names them.
_DECODER = re.compile(r"(^|\.)(decoder|lm_head)[.:\[]")
_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def arguments_of(function: Callable[..., Any]) -> dict[str, bool]:
    """Returns the named arguments of a function, and whether each has to be given."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind in _BY_NAME}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def forward_of(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward that names a model's arguments; that of a PEFT model names none."""
    model = unwrap(model)
    base = getattr(model, "get_base_model", None)
    model = model if base is None else base()
    # The class's: what a loss or an engine puts over it, on the object, has other names.
    own = type(model).forward
    return model.forward if own is nn.Module.forward else MethodType(own, model)


def as_batch(
    model: nn.Module, batch: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a batch with what a forward is given in place of its own columns, by name.

    A forward that is given one dict, of one text of several, has that one's entries as columns.
    """
    given = dict(zip(arguments_of(forward_of(model)), args, strict=False)) | dict(kwargs)
    if len(args) == 1 and isinstance(args[0], Mapping):
        return {**args[0], **given}
    return {**batch, **given}


def padding_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Returns ``(N, L)``, nonzero at tokens that count, if the batch says which do."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass(frozen=True)
class _MaskOfColumns:
    """A pair's mask from the batch that a Distiller here is called with."""

    source: MaskSource

    def __call__(self, batch: Mapping[str, Any], **_: Any) -> Tensor | None:
        """Returns the column, or what the function makes of the columns that it names."""
        if callable(self.source):
            function, columns = self.source, dict(batch)
            if not takes_any(function):
                named = arguments_of(function)
                columns = {name: value for name, value in batch.items() if name in named}
            return function(**columns)
        if self.source not in batch:
            raise ValueError(
                f"VIDTrainer, pairs: expected a column {self.source!r} for a pair's mask; got "
                f"{list(batch)}. Let the data set and the collator make one."
            )
        mask: Tensor | None = batch[str(self.source)]
        return mask


def with_decoder_masks(pairs: Iterable[Pair]) -> list[Pair]:
    """Returns the pairs of an encoder-decoder; those of the decoder without a mask have its."""
    of_labels = _MaskOfColumns(_where_labels_count)
    return [
        replace(pair, mask=of_labels)
        if pair.mask is None and _DECODER.search(f"{pair.student}.")
        else pair
        for pair in pairs
    ]


def _where_labels_count(
    labels: Any = None, decoder_attention_mask: Any = None, **_: Any
) -> Tensor | None:
    if isinstance(decoder_attention_mask, Tensor):
        return decoder_attention_mask
    return labels != -100 if isinstance(labels, Tensor) and labels.ndim == 2 else None


def _is_in_one_place(teacher: nn.Module) -> bool:
    """Whether a ``device_map`` has put a teacher on one device, and no hook moves its inputs."""
    # Accelerate's does for a teacher that is spread or offloaded.
    places = {*(getattr(teacher, "hf_device_map", None) or {}).values()}
    return len(places) == 1 and not hasattr(teacher, "_hf_hook")


class Columns:
    """Which columns of a batch go to which model.

    Args:
        teacher: without ``teacher_inputs`` it gets the columns that its forward names, but for
            labels.
        teacher_inputs: called with the columns that it names; returns the teacher's inputs.
        indexed: whether a column says which samples a batch has, for a cache.

    Attributes:
        label_names: the columns that are labels.
        teacher_only: columns that the student is not given: the teacher's, those of masks and of
            a cache.
    """

    def __init__(
        self,
        teacher: nn.Module,
        teacher_inputs: Callable[..., Inputs] | None,
        *,
        indexed: bool = False,
    ) -> None:
        self.teacher = teacher
        self.indexed = indexed
        self._index_columns = {SAMPLE_INDEX} if indexed else set()
        self.teacher_inputs = teacher_inputs
        self.label_names = {"labels", "label", "label_ids"}
        self.teacher_only: set[str] = set()
        # Looked up once, not in every step.
        self._unwrapped = unwrap(teacher)
        function = teacher_inputs or forward_of(teacher)
        self._named = arguments_of(function)
        self._all = takes_any(function) if teacher_inputs else not self._named
        self._in_one_place = _is_in_one_place(teacher)
        self._of_masks: set[str] = set()

    def with_masks(self, pairs: Any) -> Any:
        """Returns the pairs with masks of their own taken from a batch's columns; notes which."""
        if isinstance(pairs, Mapping) or not isinstance(pairs, list | tuple):
            return pairs
        masked = [pair for pair in pairs if isinstance(pair, Pair) and pair.mask]
        for pair in masked:
            names = arguments_of(pair.mask) if callable(pair.mask) else [str(pair.mask)]
            self._of_masks.update(names)
        return [replace(x, mask=_MaskOfColumns(x.mask)) if x in masked else x for x in pairs]

    def keep_for_teacher(
        self, student: nn.Module, kept: Collection[str], drops_others: bool
    ) -> list[str]:
        """Decides which columns are the teacher's alone, and returns them.

        Args:
            student: gets every column that its forward names, whoever makes it.
            kept: the columns that the Trainer keeps for the student.
            drops_others: whether it drops the others. If not, a student that takes anything is
                given everything.
        """
        forward = forward_of(student)
        if drops_others or not takes_any(forward):
            of_student = {*kept, *arguments_of(forward), *self.label_names}
            self.teacher_only = {*self._named, *self._of_masks} - of_student
        # However many columns a student takes.
        self.teacher_only |= self._index_columns - arguments_of(forward).keys()
        return sorted(self.teacher_only)

    def for_student(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the plain Trainer would give the student of the batch."""
        return {name: value for name, value in batch.items() if name not in self.teacher_only}

    def missing_for(self, student: nn.Module, batch: Mapping[str, Any]) -> list[str]:
        """Returns what the student's forward has to be given, and a batch has not."""
        named = arguments_of(forward_of(student))
        return [name for name, needed in named.items() if needed and name not in batch]

    def for_sizing(self, student: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the student's columns for a forward that is not asked for its loss."""
        student = unwrap(student)
        named = arguments_of(forward_of(student))
        columns = self.for_student(batch)
        if any(isinstance(batch.get(name), Mapping) for name in named):
            columns = {name: value for name, value in columns.items() if name in named}
        return self._without_labels(student, named, columns)

    def read_for_teacher(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns of a batch that the teacher's inputs are made of."""
        read = {
            name: value
            for name, value in batch.items()
            if name not in self._index_columns and (self._all or name in self._named)
        }
        if self.teacher_inputs or hasattr(self._unwrapped, "prepare_decoder_input_ids_from_labels"):
            return read
        return {k: x for k, x in read.items() if k not in self.label_names or self._named.get(k)}

    def for_teacher(self, **given: Any) -> Inputs:
        """Returns the teacher's inputs of a batch, whatever of it the student is given.

        Args:
            **given: the batch, as ``batch``; or its columns, as a cache knows them.

        Raises:
            ValueError: if an argument that the teacher needs is missing.
        """
        batch = given["batch"] if isinstance(given.get("batch"), Mapping) else given
        inputs = {name: value for name, value in batch.items() if name not in self._index_columns}
        if self.teacher_inputs is None:
            inputs = self._without_labels(self._unwrapped, self._named, inputs)
        if not self._all:
            inputs = {name: value for name, value in inputs.items() if name in self._named}
        if self.teacher_inputs is not None:
            return self._placed(self.teacher_inputs(**inputs))
        missing = [name for name, needed in self._named.items() if needed and name not in inputs]
        if missing or not inputs:
            raise ValueError(
                f"VIDTrainer, teacher: expected a batch with {missing or [*self._named]}, which "
                f"its forward takes; got {list(batch)}. Pass teacher_inputs=, for example "
                "teacher_inputs=lambda pixel_values, **_: (pixel_values,)."
            )
        return self._placed(inputs)

    def _placed(self, inputs: Inputs) -> Inputs:
        # Where it is now: the map stays as it was when a teacher is moved.
        first = next(self.teacher.parameters(), None) if self._in_one_place else None
        return inputs if first is None else send_to_device(inputs, first.device)

    def _without_labels(
        self, model: nn.Module, named: Mapping[str, bool], batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        # Labels stay if the forward demands them. A decoder's input is made of them, as the
        # forward itself would do it.
        inputs = {k: x for k, x in batch.items() if k not in self.label_names or named.get(k)}
        # Models of sentence-transformers write to the dict that they are given.
        inputs = {k: dict(x) if type(x) is dict else x for k, x in inputs.items()}
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift and "labels" in batch and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        return inputs
