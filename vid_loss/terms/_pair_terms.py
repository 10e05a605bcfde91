"""The losses and lambdas of the pairs: equation (2) of the paper without its models."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss.checks import refuse_shared
from vid_loss.guards import several_processes, undisturbed
from vid_loss.losses import VIDLoss
from vid_loss.losses.stats import PairDiagnostics, by_metric
from vid_loss.losses.together import Together
from vid_loss.losses.vid import joins
from vid_loss.names import module_key
from vid_loss.optimizer import TrainedHeads
from vid_loss.pairs import Pair, check_weight
from vid_loss.taps import Given

from ._features import Features, of_pair
from ._finite import FiniteTeacher, refuse_infinite, refuse_infinite_state, sum_of_counted
from ._idle import idle_term
from ._notice import AT_CALL, Notice
from ._thinning import Thinning, takes_parts


class PairTerms(TrainedHeads):
    """A loss and a weight for each pair; what they came to in the last step.

    Args:
        pairs: by name.
        student_features: of an example, by layer, to size the heads with.
        teacher_features: the same of the teacher.
        masks: of the example, by pair.

    Attributes:
        pairs: as given.
        weights: lambda of each pair by name; see :meth:`set_weight`.
        losses: the loss module of each pair.
        terms: the last value of each pair's loss by name: unweighted, detached, on the device.
    """

    def __init__(
        self,
        pairs: Mapping[str, Pair],
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.pairs = dict(pairs)
        self._finite = FiniteTeacher(self.pairs)
        self.weights: dict[str, float] = {}
        self.losses = nn.ModuleDict()
        for name, pair in self.pairs.items():
            loss = pair.build_loss(student_features[pair.student], teacher_features[pair.teacher])
            refuse_shared(pair, loss, self.losses)
            default = getattr(loss, "default_weight", 1.0)
            self.weights[name] = default if pair.weight is None else pair.weight
            self.losses[module_key(name)] = loss
        self.losses.register_load_state_dict_pre_hook(refuse_infinite_state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # The whole sum once, so that what does not fit is heard of here and not in the first step.
        with undisturbed(self.losses):
            for (name, pair), loss in zip(self.pairs.items(), self.losses.values(), strict=True):
                student, teacher = student_features[pair.student], teacher_features[pair.teacher]
                student, teacher = pair.prepare(student, teacher)
                value = pair.term(loss, student, teacher, masks.get(name))
                if not (value.is_meta or bool(value.isfinite())):
                    self._finite.refuse(name, teacher, masks.get(name))
                    refuse_infinite(pair, student)
        self.terms: dict[str, Tensor] = {}
        self._thinning = Thinning() if takes_parts(self.losses.values()) else None
        self._notice = Notice()
        self._places: dict[str, torch.device] = {}  # of each loss, in the last step

    def weighted(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns each pair's loss times its weight.

        Those of weight 0 are not computed. Several processes reduce the gradients of all heads
        together, and would wait for those that have none: there, such a pair is a 0 that gives
        gradients of 0.
        """
        compiling = torch.compiler.is_compiling()
        if self._finite.infinite and not compiling:
            self._finite.look()
        if self._thinning is not None and type(teacher_features) is Features:
            self._thinning.learn(student_features, teacher_features, self.in_use())
        terms = self._terms_of(student_features, teacher_features, masks)
        weighted, values = {}, {}
        for (name, pair), loss in zip(self.pairs.items(), self.losses.values(), strict=True):
            if name in terms:
                weighted[name] = self.weights[name] * terms[name]
                values[name] = terms[name].detach()
            elif several_processes():
                weighted[name] = idle_term(loss, student_features[pair.student])
        self.terms = values
        if self.training and not compiling and torch.is_grad_enabled():
            self._notice.calls += 1
            if self._notice.calls == 1:
                self._notice.first(self.pairs, student_features, self.weights)
            if self._notice.calls >= AT_CALL and self._notice.is_open:
                self._notice.look(self.vid_losses(), self.weights)
        return weighted

    def _terms_of(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns the loss of each pair that has a weight; those of VIDLoss are computed together.

        One whose teacher's feature is not finite is an error on the CPU, and 0 elsewhere.
        """
        compiling = torch.compiler.is_compiling()
        together = Together()
        others: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        sums: dict[str, Tensor] = {}
        for (name, pair), loss in zip(self.pairs.items(), self.losses.values(), strict=True):
            if not self.weights[name]:
                continue
            features = of_pair(pair, student_features, teacher_features, masks.get(name))
            student, teacher, mask, whole = features
            if not compiling and self._places.get(name) != student.device:
                self._move(name, loss, student.device)
            if compiling or not teacher.is_cpu:
                sums[name] = sum_of_counted(teacher, mask)
            if joins(loss):
                select = loss.select if whole is None else partial(loss.select, whole=whole)
                selected = pair.call(select, student, teacher, mask)
                together.add(name, loss, selected, flagged=name in sums, named=pair.named)
            else:
                others[name] = student, teacher, mask
        infinite = self._finite.note(sums) if sums else {}
        terms = together.nll(infinite)
        for name, (student, teacher, mask) in others.items():
            known = teacher.masked_fill(infinite[name], 0) if name in infinite else teacher
            loss = self.losses[module_key(name)]
            terms[name] = self.pairs[name].term(loss, student, known, mask)
        for name in list(terms):
            if name in infinite:
                terms[name] = terms[name].masked_fill(infinite[name], 0)
            elif not math.isfinite(terms[name].item()):
                pair, mask = self.pairs[name], masks.get(name)
                _, teacher, mask, _ = of_pair(pair, student_features, teacher_features, mask)
                self._finite.refuse(name, teacher, mask)
        return terms

    def idle(self) -> Tensor:
        """Returns the sum where no pair has a weight: 0; among several processes, of all heads."""
        self.terms = {}
        first = next(chain(self.parameters(), self.buffers()), torch.zeros(()))
        zero = torch.zeros((), device=first.device)
        for loss in self.losses if several_processes() else ():
            zero = zero + idle_term(self.losses[loss], zero).to(zero.device)
        return zero

    def _move(self, name: str, loss: nn.Module, device: torch.device) -> None:
        """Moves a loss to where the student is by now; its parameters stay the optimizer's."""
        first = next(chain(loss.parameters(), loss.buffers()), None)
        if first is not None and first.device != device:
            loss.to(device)
        self._places[name] = device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PairTerms":
        self._places.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def set_weight(self, name: str, weight: float) -> None:
        """Changes a pair's weight, also in the middle of training. It is not in the state dict.

        Raises:
            KeyError: if no pair has that name.
            ValueError: if the weight is negative or not finite.
        """
        if name not in self.pairs:
            raise KeyError(f"Distiller: expected one of {list(self.pairs)}; got {name!r}.")
        self.weights[name] = check_weight(weight, str(self.pairs[name]))

    def thin(
        self,
        teacher_features: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Drops of the teacher's maps what no loss will take, so that it does not wait.

        Args:
            teacher_features: what ``teacher_features()`` returned; for this object's next call, and
                good for nothing else then.
            args: positional inputs of the student.
            kwargs: keyword inputs of the student.
        """
        if self._thinning is not None and type(teacher_features) is Features:
            self._thinning.thin(teacher_features, Given(args, kwargs).tensors, self.in_use())

    def in_use(self) -> list[tuple[Pair, nn.Module]]:
        """Returns the pairs that have a weight, with their losses."""
        pairs = zip(self.pairs.items(), self.losses.values(), strict=True)
        return [(pair, loss) for (name, pair), loss in pairs if self.weights[name]]

    def vid_losses(self) -> dict[str, VIDLoss]:
        """Returns the losses that have a q(t|s) to look into, by pair."""
        losses = {name: self.losses[module_key(name)] for name in self.pairs}
        return {name: loss for name, loss in losses.items() if isinstance(loss, VIDLoss)}

    def diagnostics(self) -> dict[str, PairDiagnostics]:
        """Returns what each VIDLoss pair transfers, by running means over the last batches.

        They are those of all processes together. The host waits for the device here, and in no
        step.

        Raises:
            RuntimeError: if there was no step yet, or the teacher's feature was not finite.
        """
        self._finite.wait()
        stats = {name: loss.stats() for name, loss in self.vid_losses().items()}
        found = {name: PairDiagnostics.of(x) for name, x in stats.items() if x is not None}
        if stats and not found:
            raise RuntimeError(
                "Distiller, diagnostics: expected a training step before; got none. Call it after "
                "the loss of a batch."
            )
        return found

    def metrics(self) -> dict[str, float]:
        """Returns the diagnostics for a logger, as ``"explained_variance/<pair>"`` and so on.

        Empty if there is no VIDLoss or was no step yet.
        """
        seen = any(loss.stats() for loss in self.vid_losses().values())
        return by_metric(self.diagnostics()) if seen else {}
