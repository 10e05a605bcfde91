"""What a cache is asked for of a Hugging Face batch."""

from collections.abc import Mapping
from typing import Any

from vid_loss.cache import SAMPLE_INDEX

from ._inputs import Columns


def check_indexed(batch: Mapping[str, Any]) -> None:
    """Checks that a batch says which samples are in it.

    Raises:
        ValueError: if it does not.
    """
    if SAMPLE_INDEX not in batch:
        raise ValueError(
            f"VIDTrainer, cache: expected a column {SAMPLE_INDEX!r} in each batch, the rows' "
            f"places in the train set; got {list(batch)}. Write train_set = train_set.map(lambda "
            f"row, i: {{{SAMPLE_INDEX!r}: i}}, with_indices=True), or put it into the rows of "
            "another data set; a collator of yours has to keep it."
        )


def cached_call(batch: Mapping[str, Any], columns: Columns, *, first: bool) -> dict[str, Any]:
    """Returns what the ``teacher_features`` of a distiller with a cache is called with.

    A cache compares what the teacher reads, and no more: the student may be given other pictures
    each time.

    Args:
        batch: the whole batch.
        columns: know what the teacher reads.
        first: whether the batch is that of the first forward in its ``compute_loss``.

    Raises:
        ValueError: if the samples' places are missing or of another forward.
    """
    if not first:
        raise ValueError(
            "VIDTrainer, cache: expected a compute_loss that runs the model on one batch; got a "
            "second one, of which the cache would need to know its own samples. Train without a "
            "cache."
        )
    check_indexed(batch)
    return {**columns.read_for_teacher(batch), SAMPLE_INDEX: batch[SAMPLE_INDEX]}
