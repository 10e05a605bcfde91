"""Which layer of the student learns from which layer of the teacher, and how."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .advice import advice, told
from .checks import check_callable, check_names, check_transform
from .losses import VIDLoss
from .losses.layouts import to_layout

LossFactory = Callable[[torch.Size, torch.Size], nn.Module]
Transform = Callable[[Tensor], Tensor]
MaskSource = str | Callable[..., Tensor | None] | Literal[False]


@dataclass(frozen=True)
class Pair:
    """One term of the paper's equation (2): a student layer, a teacher layer, a weight, a loss.

    Args:
        student: layer of the student, as :class:`~vid_loss.FeatureTap` names them:
            ``"layer4"``, ``"fc:input"``, ``"encoder[0]"``.
        teacher: layer of the teacher.
        weight: lambda, finite and not negative. None is the loss's own ``default_weight``.
        loss: what builds the loss from the shapes of the two features, such as
            :class:`~vid_loss.VIDLoss` or ``functools.partial(VIDLoss, norm="group")``; or a
            module, used as it is. It is called with the two features, and for tokens with
            ``mask=``, and returns a scalar.
        name: name in logs and checkpoints, if :attr:`label` is not to be made of the layers.
        channel_dim: where the channels are, or a tuple for (student, teacher). None is the second
            dimension of a map and the last of tokens; -1 for NHWC maps and series of several
            variables, (N, T, V, C); 1 for signals (N, C, L).
        student_transform: applied to the student's feature first, for what shapes cannot say:
            drop a class token, tokens to a grid.
        teacher_transform: the same for the teacher's.
        mask: which positions count: the name of one of the batch's keyword arguments, a function
            of the student's arguments, or False for all. ``(N, L)`` for tokens; ``(N, H, W)`` or
            ``(N, 1, H, W)`` of any size for maps, where a position counts if half of its area
            does; nonzero where it counts. None is the call's ``token_mask``, else the batch's
            ``attention_mask`` if it is of the student feature's positions.

    Raises:
        TypeError: if the loss or the mask is none of these.
        ValueError: if the weight is negative or not finite, or the name cannot be used.

    Example:
        >>> Pair("layer4", "layer4", weight=10.0).label
        'layer4->layer4'
    """

    student: str
    teacher: str
    weight: float | None = None
    loss: LossFactory | nn.Module = VIDLoss
    _: KW_ONLY
    name: str | None = None
    channel_dim: int | tuple[int | None, int | None] | None = None
    student_transform: Transform | None = None
    teacher_transform: Transform | None = None
    mask: MaskSource | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:
            object.__setattr__(self, "weight", check_weight(self.weight, str(self)))  # frozen
        if not callable(self.loss):
            raise TypeError(
                f"{self}, loss: expected a loss module or what builds one; got {self.loss!r}. "
                "For example loss=VIDLoss."
            )
        check_callable(self, "student_transform", self.student_transform)
        check_callable(self, "teacher_transform", self.teacher_transform)
        check_names(self.student, self.teacher, self.name)
        if not (self.mask is None or self.mask is False or callable(self.mask)) and not (
            isinstance(self.mask, str) and self.mask
        ):
            raise TypeError(
                f"{self}, mask: expected the name of an argument, a function or False; got "
                f'{self.mask!r}. For example mask="pixel_mask".'
            )
        dims = self._channel_dims
        if len(dims) != 2 or not all(dim is None or type(dim) is int for dim in dims):
            raise TypeError(
                f"{self}, channel_dim: expected an int, None or a tuple of two, (student, "
                f"teacher); got {self.channel_dim!r}."
            )

    def __str__(self) -> str:
        return f"Pair {self.student!r} -> {self.teacher!r}"

    @property
    def label(self) -> str:
        """The name, or ``"student->teacher"`` and, unless it is VIDLoss, the loss's name."""
        if self.name is not None:
            return self.name
        layers = f"{self.student}->{self.teacher}"
        if self.loss is VIDLoss or isinstance(self.loss, VIDLoss):
            return layers
        factory = getattr(self.loss, "func", self.loss)
        loss_name = getattr(factory, "__name__", type(factory).__name__)
        return layers if loss_name == "VIDLoss" else f"{layers} {loss_name}"

    def build_loss(self, student_feature: Tensor, teacher_feature: Tensor) -> nn.Module:
        """Builds this pair's loss for two captured features, on the student's device.

        Raises:
            TypeError: if what is built is not a module.
            ValueError: if the features do not fit together.
        """
        student, teacher = self.prepare(student_feature, teacher_feature, first=True)
        loss = self.loss
        if not isinstance(loss, nn.Module):
            try:
                loss = _build(loss, student.shape, teacher.shape)
            except (TypeError, ValueError) as error:
                raise self.named(error, student, teacher) from error
        # Half precision is for activations: heads are trained in float32 at least.
        dtype = torch.promote_types(student.dtype, torch.float32)
        return loss.to(device=student.device, dtype=dtype)

    def term(
        self, loss: Callable[..., Any], student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Returns the loss of two features, unweighted.

        Args:
            loss: what :meth:`build_loss` built.
            student: the student's feature, as :meth:`prepare` returns it.
            teacher: the teacher's.
            mask: ``(N, L)`` for tokens, ``(N, H, W)`` for maps.

        Returns:
            A scalar.

        Raises:
            TypeError: if a feature is not floating point.
            ValueError: if the features do not fit together or the loss is not a scalar.
        """
        value = self.call(loss, student, teacher, mask)
        if not isinstance(value, Tensor) or value.ndim:
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"{self}: expected the loss to be a scalar; got {got}. Return loss.mean()."
            )
        return value

    def call(
        self, function: Callable[..., Any], student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> Any:
        """Calls the loss or a part of it on what :meth:`term` takes; its errors name the pair."""
        try:
            if mask is not None:
                return function(student, teacher, mask=mask.to(student.device))
            return function(student, teacher)
        except (TypeError, ValueError, RuntimeError) as error:
            found = self.named(error, student, teacher, mask)
            if found is error:
                raise
            raise found from error

    def prepare(
        self, student: Tensor, teacher: Tensor, *, first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the two features as the loss takes them: transformed, channels in place.

        Args:
            student: as captured.
            teacher: as captured.
            first: look at the types of features and transforms, before the first step.
        """
        transforms = self.student_transform, self.teacher_transform
        if first or self.channel_dim is not None or any(transforms):
            dims = self._channel_dims
            student = self._prepared("student", student, transforms[0], dims[0], first)
            teacher = self._prepared("teacher", teacher, transforms[1], dims[1], first)
        return student, teacher.to(student.device)

    def _prepared(
        self, owner: str, feature: Tensor, transform: Transform | None, dim: int | None, first: bool
    ) -> Tensor:
        if transform is not None:
            if first:
                check_transform(str(self), owner, transform, feature)
            feature = transform(feature)
            if not isinstance(feature, Tensor):
                raise TypeError(
                    f"{self}, {owner}_transform: expected it to return a tensor; got "
                    f"{type(feature).__name__}."
                )
        if first and not feature.is_floating_point():
            raise TypeError(
                f"{self}: expected a floating-point {owner} feature; got {feature.dtype}. "
                "Tap a layer after the embedding or the quantization."
            )
        try:
            return to_layout(feature, dim)
        except ValueError as error:
            advice = f" Use {owner}_transform." if dim is None else ""
            raise ValueError(f"{self}, {owner} feature: {error}{advice}") from error

    @property
    def _channel_dims(self) -> tuple[int | None, int | None]:
        dims = self.channel_dim
        return dims if isinstance(dims, tuple) else (dims, dims)

    def named(
        self, error: Exception, student: Tensor, teacher: Tensor, mask: Tensor | None = None
    ) -> Exception:
        """Returns the error with the pair's name before it, and behind it what a pair can do.

        One that is not of the features, or takes other things than a message, is returned as it is.
        """
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            return error
        message = told(error, student, teacher)
        separator = ": " if message.startswith("expected") else ", "
        try:
            return type(error)(f"{self}{separator}{message}{advice(student, teacher, mask)}")
        except Exception:  # any that a class of another library has
            return error


def check_weight(weight: float, pair: str) -> float:
    """Returns the weight as a float, or raises the ValueError that names the pair."""
    try:
        value = math.nan if isinstance(weight, str) else float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{pair}, weight: expected a finite number, 0 or more; got {weight!r}.")
    return value


def _build(factory: LossFactory, student_shape: torch.Size, teacher_shape: torch.Size) -> nn.Module:
    try:
        loss = factory(student_shape, teacher_shape)
    except (AttributeError, TypeError) as error:
        name = getattr(factory, "__name__", repr(factory))
        module = f"{name}()" if isinstance(factory, type) else "nn.MSELoss(), say"
        raise TypeError(
            f"expected loss to be built from the two features' shapes; got {name}: {error}. If it "
            f"needs no shapes, pass a module: loss={module}."
        ) from error
    if not isinstance(loss, nn.Module):
        raise TypeError(f"expected loss to build a module; got {loss!r}. Return an nn.Module.")
    return loss
