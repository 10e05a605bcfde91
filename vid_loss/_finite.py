"""Keeps what a teacher overflowed to out of every weight."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .pairs import Pair


class FiniteTeacher:
    """Looks whether the teacher's features are finite, without making the host wait for a GPU.

    On the CPU it raises at once. Elsewhere such a batch counts for nothing in the pair's loss, and
    a later call, by which the answer has arrived, raises.

    Args:
        pairs: by name.
    """

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs = pairs
        self._infinite: dict[str, Tensor] = {}  # since the last copy, by pair
        self._arriving: Callable[[], list[str] | None] = list

    def term(
        self, name: str, loss: Any, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> Any:
        """Returns a pair's loss; 0 with gradients of 0 if the teacher's feature is not finite.

        Args:
            name: the pair's.
            loss: called with the two features, and the mask unless it is None.
            student: the student's feature, as the loss takes it.
            teacher: the teacher's.
            mask: ``(N, L)``; padding may be anything.

        Raises:
            RuntimeError: on the CPU, if the feature is not finite and the loss neither.
        """
        options = {} if mask is None else {"mask": mask}
        if _read_freely(teacher):
            value = loss(student, teacher, **options)
            # The loss first: it is one number.
            if isinstance(value, Tensor) and not value.isfinite().all():
                self._raise([] if _is_finite(teacher, mask) else [name])
            return value
        finite = _is_finite(teacher, mask)
        value = loss(student, torch.where(finite, teacher, 0), **options)
        # Compiled, nothing of an earlier step may be an input of this one.
        before = None if torch.compiler.is_compiling() else self._infinite.get(name)
        self._infinite[name] = ~finite if before is None else before | ~finite
        return torch.where(finite, value, 0) if isinstance(value, Tensor) else value

    def look(self) -> None:
        """Takes an answer that has arrived, and asks for the next.

        Raises:
            RuntimeError: if a teacher's feature was not finite; it names pair and layer.
        """
        infinite = self._arriving()
        if infinite is None:
            return
        self._arriving = _copy_to_host(self._infinite)
        self._infinite = {}
        self._raise(infinite)

    def wait(self) -> None:
        """As :meth:`look`, for a caller that waits for the device in any case."""
        found, self._infinite = self._infinite, {}
        self._raise([name for name, flag in found.items() if not flag.is_meta and bool(flag)])

    def _raise(self, names: list[str]) -> None:
        if names:
            pair = self.pairs[names[0]]
            raise RuntimeError(
                f"{pair}: expected finite features of the teacher; got inf or NaN in its layer "
                f"{pair.teacher!r}. No weight has seen them. Run the teacher in a wider precision "
                "(teacher_dtype=torch.bfloat16, teacher.float()), or look at that batch's inputs."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle waits for nothing."""
        return {"pairs": self.pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts anew."""
        self.__init__(state["pairs"])  # type: ignore[misc]  # the only state


def _read_freely(feature: Tensor) -> bool:
    """Whether reading a value costs nothing."""
    return feature.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_finite(feature: Tensor, mask: Tensor | None) -> Tensor:
    """Returns whether all that counts is finite, ``()``, by sums: no map is written."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    if mask is None:
        return feature.sum(dtype=dtype).isfinite()
    return feature.sum(-1, dtype=dtype).masked_fill(~mask.bool(), 0).sum().isfinite()


def _copy_to_host(flags: Mapping[str, Tensor]) -> Callable[[], list[str] | None]:
    """Starts a copy; returns what gives the names whose flag is set, or None while it is under way.

    Flags on a device that has no asynchronous copy are not read.
    """
    names = [name for name, flag in flags.items() if flag.is_cuda]
    if not names:
        return list
    device = flags[names[0]].device
    stacked = torch.stack([flags[name].to(device, non_blocking=True) for name in names])
    host = torch.empty(len(names), dtype=torch.bool, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    arrived.record(torch.cuda.current_stream(device))

    def answer() -> list[str] | None:
        if not arrived.query():
            return None
        return [name for name, flag in zip(names, host.tolist(), strict=True) if flag]

    return answer
