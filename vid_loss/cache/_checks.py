"""What is looked at again of the features that are read, and how often."""

import random
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vid_loss.teacher import Teacher

from ._fingerprint import sums_of
from ._proof import proven
from ._samples import Batch, Key
from ._shards import Place, Shards

DIGEST = "input_digest"
Places = dict[int, Place]  # by row of the batch
Rows = dict[str, Tensor]  # by layer

# How much is looked at: steadily, and little enough not to be felt in a step.
_ONE_ROW_IN = 16  # of each batch, on the CPU
_ONE_CALL_IN = 16  # on a GPU, where looking at inputs means to wait for it
_CALLS_BETWEEN_PROOFS = 64  # each runs the teacher on one sample


class Checks:
    """Compares what is read with its inputs and with the teacher, some of it in each batch.

    Args:
        folder: what messages call the cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sums: list[int] = []
        self._believed: set[int] = set()  # shards of which the teacher said the same
        self._settled: frozenset[Key] = frozenset()  # arguments known to hold samples
        self._shared: frozenset[Key] = frozenset()  # and those known not to
        self._common: dict[Key, bytes] | None = None
        self._calls = 0  # that read something
        self._random = random.Random(0)

    def begin(self, teacher: Teacher) -> None:
        """Forgets the files that were believed: they are opened again, for this teacher."""
        self._sums = sums_of(teacher)
        self._believed = set()

    def as_before(self, batch: Batch) -> Batch:
        """Reads the arguments as in the calls before: one row per sample, or shared by all.

        Raises:
            ValueError: if none is left that can hold samples.
        """
        shared = self._shared | {key for key, _ in batch.items() if key not in batch.by_sample}
        batch = replace(batch, shared=shared)
        if not batch.by_sample:
            raise ValueError(
                f"FeatureCache, sample_index: expected inputs of {batch.count} samples; got "
                "arguments that had other lengths in the batches before. Train without a cache."
            )
        self._shared = shared
        return batch

    def of_read(
        self, shards: Shards, teacher: Teacher, batch: Batch, places: Places, found: Rows
    ) -> Batch:
        """Compares some of what was read with the teacher and the inputs.

        Args:
            shards: that it was read from.
            teacher: the teacher.
            batch: the student's arguments.
            places: where the samples that were read are, by their row in the batch.
            found: their features by layer.

        Returns:
            The batch as it is to be read.

        Raises:
            ValueError: if one of them has changed.
        """
        doubted = {
            place.shard: row
            for row, place in places.items()
            if shards.is_written(place) and place.shard not in self._believed
        }
        rows = list(doubted.values())
        if self._calls % _CALLS_BETWEEN_PROOFS == 0:
            self._check_weights(teacher)
            rows += [self._random.choice(list(places))]
        if self._is_open(batch):
            rows += [max(places)]
        if rows:
            # Not all: what arguments hold samples is seen from what they are without some.
            rows = list(dict.fromkeys(rows))[: max(1, batch.count - 1)]
            order = list(places)
            kept = {layer: x[[order.index(row) for row in rows]] for layer, x in found.items()}
            batch = self._proven(teacher, batch, rows, kept)
            self._believed |= {places[row].shard for row in rows}
        self._check_inputs(shards, batch, places)
        self._calls += 1
        return batch

    def of_new(self, teacher: Teacher, batch: Batch, kept: Rows) -> Batch:
        """Compares the last of a batch's new samples with what the teacher says of it alone.

        Args:
            teacher: the teacher.
            batch: the student's arguments.
            kept: the features of its new samples by layer.

        Returns:
            The batch as it is to be read.

        Raises:
            ValueError: if it says something else.
        """
        # Where some samples were read, that has settled it.
        if not self._is_open(batch):
            return batch
        return self._proven(teacher, batch, [batch.count - 1], {k: x[-1:] for k, x in kept.items()})

    def _is_open(self, batch: Batch) -> bool:
        """Whether an argument of as many rows as samples may still be something else."""
        return batch.count > 1 and bool(set(batch.by_sample) - self._settled)

    def _proven(self, teacher: Teacher, batch: Batch, rows: list[int], kept: Rows) -> Batch:
        batch = proven(teacher, batch, rows, kept, self._settled)
        self._shared |= batch.shared
        if len(rows) < batch.count:
            self._settled |= set(batch.by_sample)
        return batch

    def _check_weights(self, teacher: Teacher) -> None:
        if sums_of(teacher) != self._sums:
            raise ValueError(
                f"FeatureCache, {self._folder}: expected the teacher that the features are of; it "
                "has changed since. Choose another folder, or delete these features."
            )

    def _check_inputs(self, shards: Shards, batch: Batch, places: Places) -> None:
        common = batch.common()
        rows = list(places)
        if common == self._common and batch.device.type == "cpu":
            rows = self._random.sample(rows, -(-len(rows) // _ONE_ROW_IN))
        elif common == self._common and self._calls % _ONE_CALL_IN:
            return
        before = shards.read(DIGEST, [places[row] for row in rows])
        differs = batch.digests(rows, common) != before
        if bool(differs.any()):
            row = rows[int(differs.nonzero()[0])]
            raise ValueError(
                f"FeatureCache, sample {shards.sample_at(places[row])}: expected the inputs that "
                "its features were computed from, and the same values beside them; got others. "
                "Take random augmentation out or wrap the data set in FixedAugmentations, and pad "
                "texts to one length (padding='max_length'); for another data set choose another "
                "folder."
            )
        self._common = common
