"""What timm's engine trains: student and heads as one module."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.models import group_parameters
from torch import Tensor

from vid_loss import DistillationModel


class VIDTrainableModule(DistillationModel):
    """Student and heads in one module, with what timm's optimizers ask a model for."""

    def no_weight_decay(self) -> set[str]:
        """The student's names, and trained variances: decay would pull them towards 0.69."""
        of_student: Callable[[], Iterable[str]] = getattr(self.student, "no_weight_decay", set)
        return {f"student.{name}" for name in of_student()} | {"distiller.*.raw_var"}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Groups for layer decay: the student's, and the heads with the student's last."""
        student: Any = self.student
        if not hasattr(student, "group_matcher"):
            return {}
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student."), last)

    def load_heads(self, state: Mapping[str, Tensor], *, strict: bool) -> None:
        """Loads the ``state_dict`` of another run's heads and variances.

        Raises:
            RuntimeError: if it is of other pairs, or of other features.
        """
        try:
            self.distiller.losses.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            saved = sorted({key.split(".")[0].replace("/", ".") for key in state})
            raise RuntimeError(
                f"VIDTask: expected a checkpoint of pairs {list(self.distiller.pairs)}; got one "
                f"of {saved}. Resume with the pairs and the teacher of that run. ({error})"
            ) from error
