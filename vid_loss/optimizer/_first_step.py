"""One look at how the heads are trained, when an optimizer first steps on their gradients."""

import gc
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ._anew import warn_if_again
from ._averaged import Averaged
from ._in_loss import InLoss
from ._inside import warn_if_inside
from ._loaded import NOT_LOADED, Loaded, has_history
from ._own_rate import OwnRate
from ._schedulers import heads_came_late, in_doubt, schedulers_of, will_fail
from ._uncalled import Uncalled
from ._watched import Watched
from ._zeroing import Zeroing

_MOST_LOOKS = 128  # engines that hide their parameters from us are not asked for ever

_NOT_TRAINED = (
    "Distiller: expected its heads to be trained with the student; they are in no optimizer. Add: "
    "distiller.add_to(optimizer)"
)
_SCHEDULER_FIRST = (
    "Distiller: expected its heads in the optimizer before a scheduler is built on it; {got}. "
    "Build the scheduler after distiller.add_to(optimizer)."
)


class FirstStep:
    """Looks once whether the heads are trained, and trained rightly; says which line is missing.

    A hook that torch calls before each step of any optimizer sees what matters, whatever loop or
    wrapper there is. It reads no value of a tensor but in the step that it decides at. A distiller
    that is called after its heads' optimizer is gone has another one, which is looked at as well.
    In several processes the heads' gradients are compared too: in the distiller's next call, which
    every process makes, where a step that one of them skips could leave the others waiting.

    Args:
        distiller: what is looked at. A copy of it is looked at from its first call on.
        teacher: its teacher, if it has one.
        loaded: where it is noted whether the heads were loaded; None if they come trained.

    Attributes:
        settled: whether there is nothing more to look at.
        gone: whether the optimizer that was looked at is.
    """

    def __init__(
        self, distiller: Watched, teacher: nn.Module | None, loaded: Loaded | None
    ) -> None:
        self.settled = False
        self._distiller = weakref.ref(distiller)
        self._teacher = None if teacher is None else weakref.ref(teacher)
        self._loaded = loaded
        self._stop: weakref.finalize[Any, Any] | None = None
        self._averaged = Averaged(self._distiller)
        self._begin()

    def _begin(self) -> None:
        """Begins to look, or begins anew, at another optimizer."""
        self._decided = self.gone = False
        self._looks = 0
        self._steps: dict[int, int] = {}  # of each optimizer that has the student or the heads
        self._optimizer: weakref.ref[Optimizer] | None = None  # that was found to have the heads
        self._own_rate = OwnRate(self._distiller)
        self._zeroing = Zeroing(self._distiller)
        self._in_loss = InLoss()
        self._uncalled = Uncalled()

    def watch(self) -> None:
        """Looks at optimizers from now on."""
        self._averaged.begin()
        hook = register_optimizer_step_pre_hook(_Hook(self))
        self._stop = weakref.finalize(self, hook.remove)

    def on_call(self) -> None:
        """Called with the distiller; from the second call on, several processes compare.

        Raises:
            RuntimeError: if the heads' gradients were not the same in each.
        """
        if self.gone and self._stop is not None:
            self._stop()
            self._stop = None
            self._loaded = None  # a new optimizer may have loaded the state of the old one
            self._begin()
        if self._stop is None:
            self.watch()
        elif self._decided and self._averaged.settled:
            # Not in the hook itself: torch is going through its hooks then.
            self._stop()
            self.settled = self._own_rate.look() and self._zeroing.look()
        if self._weighs():
            self._averaged.on_call()

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before each step of any optimizer.

        Raises:
            RuntimeError: if the optimizer has a state of heads that were not loaded, or a scheduler
                that was built before it had the heads and is known to fail with them.
        """
        distiller = self._distiller()
        compares = self._averaged.waits
        if distiller is None or (self._decided and not compares):
            return
        if compares:
            self._averaged.look(distiller.losses)
        heads = {id(p): p for p in distiller.losses.parameters() if p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        in_use = bool(distiller.terms) and self._weighs()
        with_gradients = in_use and any(p.grad is not None for p in heads.values())
        if in_use and not (with_gradients or self._decided):
            self._in_loss.look(optimizer, distiller)
        elif not distiller.terms and self._weighs():
            self._uncalled.count(optimizer, distiller)
        if heads.keys() & held:
            self._own_rate.note(optimizer)
            self._zeroing.note(optimizer)
            self._look_at_heads(optimizer, heads, with_gradients)
        elif with_gradients and any(id(p) in held for p in distiller.student.parameters()):
            self._look_at_student(optimizer, heads)
        else:
            return
        self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if with_gradients and compares:
            self._averaged.note(distiller.losses)

    def _weighs(self) -> bool:
        distiller = self._distiller()
        return distiller is not None and any(distiller.weights.values())

    def _look_at_heads(
        self, optimizer: Optimizer, heads: Mapping[int, Tensor], with_gradients: bool
    ) -> None:
        if self._decided:
            return
        earlier = self._steps.get(id(optimizer), 0)
        if not earlier and heads_came_late(optimizer, heads):
            _refuse_early_scheduler(optimizer)
        self._decided = with_gradients
        if (
            self._loaded is not None
            and not self._loaded.happened
            and any(has_history(optimizer.state.get(p, {}), earlier) for p in heads.values())
        ):
            self._decided = False
            raise RuntimeError(NOT_LOADED)
        distiller = self._distiller()
        if not self._decided or distiller is None:
            return
        warn_if_inside(distiller)
        if self._loaded and not self._loaded.happened:
            warn_if_again(optimizer, distiller, self._taught_by())
        own = weakref.ref(self)
        self._optimizer = weakref.ref(optimizer, lambda _: _note_gone(own()))

    def _look_at_student(self, optimizer: Optimizer, heads: Mapping[int, Tensor]) -> None:
        self._looks += 1
        if self._decided or self._looks > _MOST_LOOKS:
            self._decided = True
        elif id(optimizer) in self._steps and not _held_by_any_optimizer(heads):
            # One of their own would have stepped in between; if it steps rarely, there is one.
            self._decided = True
            warnings.warn(_NOT_TRAINED, stacklevel=5)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FirstStep":
        """A copy of a distiller has what the heads have learnt, and perhaps the optimizer's."""
        return FirstStep(memo[id(self._distiller())], self._taught_by(), None)

    def _taught_by(self) -> nn.Module | None:
        return None if self._teacher is None else self._teacher()


def _note_gone(first_step: FirstStep | None) -> None:
    # Nothing else here: torch may be going through its hooks while an optimizer is collected.
    if first_step is not None:
        first_step.settled, first_step.gone = False, True


class _Hook:
    """Keeps what it calls no longer alive than its distiller does."""

    def __init__(self, first_step: FirstStep) -> None:
        self.first_step = weakref.ref(first_step)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        first_step = self.first_step()
        if first_step is not None and not torch.compiler.is_compiling():
            first_step.before_step(optimizer)


def _refuse_early_scheduler(optimizer: Optimizer) -> None:
    """Raises if a scheduler will fail with the heads' group; warns where that cannot be told."""
    schedulers = schedulers_of(optimizer)
    names = will_fail(schedulers)
    if names:
        got = f"got {' and '.join(names)}, built before they came, with no rate for them"
        raise RuntimeError(_SCHEDULER_FIRST.format(got=got))
    doubts = in_doubt(schedulers)
    if not schedulers:  # of another library, or a state that was loaded is of a run with one
        doubts = ["a scheduler has set up the other groups and not theirs"]
    for got in doubts:
        warnings.warn(_SCHEDULER_FIRST.format(got=got), stacklevel=6)


def _held_by_any_optimizer(heads: Mapping[int, Tensor]) -> bool:
    # type(), because isinstance asks an object for its class, which makes a lazy one load.
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
    groups = [group for x in optimizers for group in getattr(x, "param_groups", ())]
    return any(id(p) in heads for group in groups for p in group["params"])
