"""Whether several processes average the gradients of the heads."""

import weakref

import torch
from torch import Tensor, nn

from vid_loss.guards import inside_ddp, several_processes

from ._watched import Watched

_MOST_CALLS = 128  # who hides the heads' steps from us is not asked for ever
_SAME = 1e-3  # relative; what processes have not averaged differs by percents
_NOT_AVERAGED = (
    "Distiller: expected the processes to average the gradients of its heads, as the student's; "
    "got other ones in each, so that the heads drift apart. Wrap it as the student: loss_fn = "
    "DistributedDataParallel(distiller), and call that; or prepare both: student, distiller, "
    "optimizer = accelerator.prepare(student, distiller, optimizer)."
)


class Averaged:
    """Compares the heads' gradients of the processes once, after a step that each has taken.

    In a call of the distiller, which every process makes: in the step itself one that skips it
    could leave the others waiting.

    Attributes:
        settled: whether there is nothing to compare, or no longer.
    """

    def __init__(self, distiller: weakref.ref[Watched]) -> None:
        self.settled = False
        self._distiller = distiller
        self._shapes: list[torch.Size] = []
        self._norms: Tensor | None = None  # of the heads' gradients, at the first step
        self._calls = 0

    @property
    def waits(self) -> bool:
        """Whether a step is waited for."""
        return bool(self._calls) and not self.settled

    def begin(self) -> None:
        """Notes the heads' shapes, before an engine has sharded them."""
        if (distiller := self._distiller()) is not None:
            self._shapes = [p.shape for p in distiller.losses.parameters()]
            # KD has nothing to be averaged. And never again: in one process an optimizer may be
            # gone before it is in the others, which would not answer.
            self.settled = self.settled or not self._shapes

    def look(self, heads: nn.Module) -> None:
        """Settles what an engine has sharded, which reduces gradients itself; before any step.

        On every process: of one that has no part of them the others would wait for an answer.
        """
        parameters = list(heads.parameters())
        if [p.shape for p in parameters] != self._shapes or any(map(_is_sharded, parameters)):
            self.settled = True

    def note(self, heads: nn.Module) -> None:
        """Notes the norm of each gradient, before a step on them."""
        parameters = list(heads.parameters())
        if self.settled:
            return
        zero = torch.zeros((), device=parameters[0].device)
        norms = [zero if p.grad is None else p.grad.detach().float().norm() for p in parameters]
        self._norms = torch.stack([norm.to(zero.device) for norm in norms])

    def on_call(self) -> None:
        """Called with the distiller; from the second call on it compares.

        Raises:
            RuntimeError: if the gradients were not the same in each process.
        """
        if self.settled:
            return
        self._calls += 1
        if not several_processes() or inside_ddp() or self._calls > _MOST_CALLS:
            self.settled = True
        elif self._calls > 1 and not (self._calls - 1) & (self._calls - 2):
            # In calls 2, 3, 5, 9, 17, ...: a step may take many, when gradients are accumulated.
            self._compare()

    def _compare(self) -> None:
        distiller = self._distiller()
        own = self._norms
        if own is None and distiller is not None:
            own = torch.zeros(len(self._shapes), device=next(distiller.parameters()).device)
        if own is None:
            return
        taken = (own > 0).any().to(own)
        values = torch.cat([taken[None], own])
        both = torch.cat([values, -values])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        most, least = both[: len(values)], -both[len(values) :]
        if not least[0]:
            return
        self.settled = True
        if bool(((most - least) > _SAME * most).any()):
            raise RuntimeError(_NOT_AVERAGED)


def _is_sharded(parameter: Tensor) -> bool:
    # A DTensor, or a part of what FSDP 1 has flattened: a whole one, even, beside others' none.
    return hasattr(parameter, "placements") or hasattr(parameter, "_fsdp_flattened")
