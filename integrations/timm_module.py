"""What timm's engine trains: student and heads as one module."""

from collections.abc import Callable, Iterable
from typing import Any

from timm.models import group_parameters

from vid_loss import DistillationModel


class VIDTrainableModule(DistillationModel):
    """Student and heads in one module, with what timm's optimizers ask a model for."""

    def no_weight_decay(self) -> set[str]:
        """The student's names, and the variances: decay would pull them towards 0.69."""
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
