"""The teacher's features of a batch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Size, Tensor

from vid_loss.losses.layouts import valid_positions
from vid_loss.losses.positions import Lattice, Whole
from vid_loss.pairs import Pair
from vid_loss.taps import Batch


class Part(NamedTuple):
    """Some positions of a teacher's map."""

    lattice: Lattice
    feature: Tensor  # (N, C, H', W')

    @classmethod
    def of(cls, feature: Tensor, lattice: Lattice) -> "Part":
        """Takes a part of ``(N, C, H, W)``; it keeps nothing of the rest alive."""
        return cls(lattice, lattice.of(feature).contiguous())

    def beside(
        self, pair: Pair, student: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Whole]:
        """Returns the same part of the student's map, this one, that of the mask, and their whole.

        Args:
            pair: whose features these are.
            student: ``(N, C_s, H, W)``.
            mask: ``(N, H, W)`` of any size, or None.

        Raises:
            ValueError: if the student's map is of another size than the teacher's, or the mask one
                to be added to logits.
        """
        size = self.lattice.size
        if student.shape[2:] != size:
            raise ValueError(
                f"{pair}: expected a student's map of the teacher's size {tuple(size)}, as with "
                f"earlier inputs of these shapes; got {tuple(student.shape[2:])}. Build the loss "
                "with positions=1.0."
            )
        whole = Whole(size.numel(), size.numel())
        # What to do about a mask that fits no map, the loss says.
        if mask is not None and mask.ndim == 3:
            mask = pair.call(_valid, student, student, mask)
            whole = Whole(size.numel(), mask.sum() / max(len(mask), 1))
            mask = self.lattice.of(mask)
        return self.lattice.of(student), self.feature.to(student.device), mask, whole


def _valid(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return valid_positions(mask, student, teacher)


class Features(dict[str, Tensor]):
    """Features by layer.

    Attributes:
        batch: that they are of.
        parts: what is here of other layers' maps. Not in the dict: an engine that moves a dict to a
            device makes another of its items, and no part may be taken for a whole.
        lattices: which part is to be taken of a layer's map, if the student's has its size.
        inputs: the shapes of the batch's tensors, without its size.
    """

    # Not set in a constructor, which would be one more call in every step.
    batch: Batch | None = None
    parts: Mapping[str, Part] = MappingProxyType({})
    lattices: Mapping[str, Lattice] = MappingProxyType({})
    inputs: tuple[Size, ...] = ()


def of_pair(
    pair: Pair,
    students: Mapping[str, Tensor],
    teachers: Mapping[str, Tensor],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Whole | None]:
    """Returns a pair's features as its loss takes them, their mask, and what they are a part of.

    Args:
        pair: the pair.
        students: the student's features by layer.
        teachers: the teacher's, perhaps :class:`Features` with parts.
        mask: the pair's.
    """
    part: Part | None = getattr(teachers, "parts", {}).get(pair.teacher)
    if part is not None:
        return part.beside(pair, students[pair.student], mask)
    student, teacher = pair.prepare(students[pair.student], teachers[pair.teacher])
    return student, teacher, mask, None
