"""Student and heads as one module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calls import refuse_no_module
from .distiller import Distiller
from .taps import unwrap


class DistillationModel(nn.Module):
    """Student and heads as one module, for engines that wrap or shard what they train.

    In DDP and FSDP the heads must run inside the forward of the wrapped root module. This is that
    module: give it to the engine in the student's place. The optimizer takes its parameters, or
    the student's and then the heads' at a rate of their own: ``distiller.add_to(optimizer)``. In
    eval mode it is the student. Its own state has the heads too, under other keys than a plain
    student's: what is to load or to average a plain one takes ``model.student``, as in
    ``plain.load_state_dict(model.student.state_dict())``.

    Args:
        student: the model that ``distiller`` was built with.
        distiller: the transfer terms.

    Raises:
        ValueError: if the distiller taps another student.
    """

    def __init__(self, student: nn.Module, distiller: Distiller) -> None:
        super().__init__()
        refuse_no_module("DistillationModel, student", student)
        if not isinstance(distiller, Distiller):
            raise TypeError(
                "DistillationModel, distiller: expected a Distiller; got "
                f"{type(distiller).__name__}. Build one: Distiller(student, teacher, pairs, "
                "example=...)."
            )
        if unwrap(student) is not distiller.student:
            raise ValueError(
                "DistillationModel, student: expected the model that the distiller was built "
                "with; got another. Build the distiller from this student."
            )
        self.student = student
        self.distiller = distiller
        # FSDP reads from the root which modules to wrap.
        self._no_split_modules = getattr(unwrap(student), "_no_split_modules", None)

    def forward(
        self,
        *args: Any,
        teacher_features: Mapping[str, Tensor] | None = None,
        token_mask: Tensor | None = None,
        sample_index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the student; in train mode, the teacher and the transfer terms too.

        Args:
            *args: positional inputs of the student.
            teacher_features: as in :meth:`Distiller.forward`; not given to the student.
            token_mask: likewise.
            sample_index: likewise.
            **kwargs: keyword inputs of the student.

        Returns:
            In train mode, the student's output and the weighted transfer terms, a scalar: 0 with
            gradients off. In eval mode, what the student returns.
        """
        if not self.training:
            return self.student(*args, **kwargs)
        if not torch.is_grad_enabled():
            output = self.student(*args, **kwargs)
            return output, torch.zeros((), device=next(self.parameters()).device)
        # The teacher first: its memory is given back before the student's activations pile up.
        features = teacher_features
        if features is None and any(self.distiller.weights.values()):
            features = self.distiller.teacher_features(*args, sample_index=sample_index, **kwargs)
            self.distiller.thin(features, args, kwargs)
        output = self.student(*args, **kwargs)
        transfer = self.distiller(*args, teacher_features=features, token_mask=token_mask, **kwargs)
        return output, transfer
