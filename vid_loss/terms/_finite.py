"""Keeps what a teacher overflowed to out of every weight."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss.guards import is_captured
from vid_loss.losses.layouts import resized
from vid_loss.pairs import Pair


class FiniteTeacher:
    """Looks whether the teacher's features are finite, without making the host wait for a GPU.

    On the CPU, where the loss can be read, it raises at once. Elsewhere such a batch counts for
    nothing in the pair's loss, and a later call, by which the answer has arrived, raises.

    Args:
        pairs: by name.

    Attributes:
        infinite: what was noted and not yet sent to the host, by pair.
    """

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs = pairs
        self.infinite: dict[str, Tensor] = {}
        self._arriving: Callable[[], list[str] | None] = list

    def refuse(self, name: str, teacher: Tensor, mask: Tensor | None) -> None:
        """Says which feature has made a loss what it is, if it was the teacher's.

        Args:
            name: the pair's.
            teacher: the teacher's feature, as the loss takes it.
            mask: ``(N, L)`` or ``(N, H, W)``; padding may be anything.

        Raises:
            RuntimeError: if the feature is not finite.
        """
        self._raise([] if sum_of_counted(teacher, mask).isfinite() else [name])

    def note(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remembers, without reading it, which features were not finite.

        Args:
            sums: of what counts of the features, by pair.

        Returns:
            The same as flags, ``()``, boolean.
        """
        flags = _not_finite(sums)
        for name, flag in flags.items():
            # Compiled, nothing of an earlier step may be an input of this one.
            before = None if torch.compiler.is_compiling() else self.infinite.get(name)
            self.infinite[name] = flag if before is None else before | flag
        return flags

    def look(self) -> None:
        """Takes an answer that has arrived, and asks for the next.

        A CUDA graph that is being made neither asks nor waits: :meth:`wait` tells.

        Raises:
            RuntimeError: if a teacher's feature was not finite; it names pair and layer.
        """
        if any(map(is_captured, self.infinite.values())):
            return
        infinite = self._arriving()
        if infinite is None:
            return
        self._arriving = _copy_to_host(self.infinite)
        self.infinite = {}
        self._raise(infinite)

    def wait(self) -> None:
        """As :meth:`look`, for a caller that waits for the device in any case."""
        found, self.infinite = self.infinite, {}
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


def refuse_infinite(pair: Pair, student: Tensor) -> None:
    """Raises a ValueError if the student's feature of the example is not finite."""
    if not student.isfinite().all():
        raise ValueError(
            f"{pair}: expected finite features of the student; got inf or NaN in its layer "
            f"{pair.student!r}. Look at its weights, of which some may be NaN, and at the example."
        )


def refuse_infinite_state(
    module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Raises a ValueError, before anything is loaded, if heads in a state are not finite."""
    for name, value in state.items():
        if not name.startswith(prefix) or not isinstance(value, Tensor):
            continue
        elsewhere = value.is_meta or hasattr(value, "placements")  # sharded, and read by nobody yet
        if not elsewhere and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"Distiller, load_state_dict: expected finite heads; got inf or NaN in {name!r}, "
                "of a run that had diverged. Load an earlier checkpoint, or let the heads start "
                "anew."
            )


def sum_of_counted(feature: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the sum of all that counts, ``()``: finite if all is, and no map is written."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    if mask is None or not _fits(mask, feature):
        return feature.sum(dtype=dtype)
    mask = mask.to(feature.device)
    if feature.ndim > 3:
        sums, mask = feature.sum(1, dtype=dtype), resized(mask, feature.shape[2:])
    else:
        sums, mask = feature.sum(-1, dtype=dtype), mask.bool()
    return sums.masked_fill(~mask, 0).sum()


def _not_finite(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a flag for each of some numbers; together, if they are on one device."""
    names, values = list(sums), list(sums.values())
    if len({value.device for value in values}) > 1:
        return {name: value * 0 != 0 for name, value in sums.items()}
    # inf and NaN times 0 are NaN: two operations, where isfinite() is four.
    return dict(zip(names, torch.stack(values) * 0 != 0, strict=True)) if names else {}


def _fits(mask: Tensor, feature: Tensor) -> bool:
    """Whether a mask can be one of a feature's. What to do about another, the loss says."""
    if len(mask) != len(feature) or mask.ndim != feature.ndim - 1:
        return False
    return feature.ndim > 3 or mask.shape == feature.shape[:-1]


def _copy_to_host(flags: Mapping[str, Tensor]) -> Callable[[], list[str] | None]:
    """Starts a copy; returns what gives the names whose flag is set, or None while it is under way.

    Flags on a device that has no asynchronous copy are not read.
    """
    names = [name for name, flag in flags.items() if flag.is_cuda]
    if not names:
        return list
    device = flags[names[0]].device
    stacked = torch.stack([flags[name].to(device, non_blocking=True) for name in names])
    host = torch.empty(len(names), dtype=torch.bool, device="cpu", pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    arrived.record(torch.cuda.current_stream(device))

    def answer() -> list[str] | None:
        if not arrived.query():
            return None
        return [name for name, flag in zip(names, host.tolist(), strict=True) if flag]

    return answer
