"""The sum over pairs in the paper's equation (2), for any training loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import FeatureCache
from .guards import HeadCheck, refuse_data_parallel, undisturbed
from .losses import VIDLoss
from .losses.stats import PairDiagnostics, report
from .pairs import Pair, check_weight, module_key, pairs_by_name
from .taps import FeatureTap, unwrap
from .teacher import Inputs, Teacher, as_call, mask_in


class Distiller(nn.Module):
    r"""The transfer terms :math:`-\sum_k \lambda_k \log q(t_k | s_k)` of a student and a teacher.

    Equation (2) of the paper without the task loss, in three lines of an existing script::

        distiller = Distiller(student, teacher, {"layer4": "layer4"}, example=images)
        optimizer.add_param_group({"params": distiller.parameters()})
        ...
        loss = criterion(student(images), labels) + distiller(images)

    It owns the heads and the variances, and nothing else: student and teacher are held but not
    registered, so that they are in neither ``parameters()`` nor ``state_dict()``. ``to()`` moves
    the teacher along. All parameters exist after construction.

    Args:
        student: the model that is trained.
        teacher: the model that is learnt from; put into eval mode at every call.
        pairs: a dict of student layer to teacher layer, or a list of :class:`Pair`.
        example: a batch of the student's inputs, to size the heads: a tensor, a tuple of
            positional or a dict of keyword arguments. One sample is enough. Both models run on it
            once, in eval mode; their modes, buffers and the random state stay as they were.
        teacher_inputs: called with the student's arguments, returns the teacher's in one of the
            three forms: another normalisation, resolution or tokenisation.
        teacher_dtype: runs the teacher under autocast in this dtype, such as ``torch.bfloat16``;
            its weights stay as they are.
        stop_teacher: end the teacher's forward at its last tapped layer, with an exception that
            its callers do not see. Not for a teacher that FSDP shards.
        cache: keeps the teacher's features of each sample, for inputs that do not change between
            epochs; calls then need ``sample_index``. Not for a teacher that FSDP shards.
        diagnose: keep in every step what :meth:`diagnostics` needs.

    Attributes:
        cache: as given.
        pairs: the pairs by name.
        weights: lambda of each pair by name; see :meth:`set_weight`.
        losses: the loss module of each pair.
        terms: the last value of each pair's loss by name: unweighted, detached, on the device.

    Raises:
        TypeError: if pairs, example, a feature or a loss has the wrong type.
        ValueError: if there is no pair, the teacher is the student, the student is wrapped in DDP
            or DataParallel, a layer is unknown, or two features do not fit together. No hook is
            left then.
        RuntimeError: if a layer is not reached by the example, or is changed in place.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[str, str] | Sequence[Pair],
        *,
        example: Inputs,
        teacher_inputs: Callable[..., Inputs] | None = None,
        teacher_dtype: torch.dtype | None = None,
        stop_teacher: bool = False,
        cache: FeatureCache | None = None,
        diagnose: bool = True,
    ) -> None:
        super().__init__()
        refuse_data_parallel(student)
        if unwrap(teacher) is unwrap(student):
            raise ValueError(
                "Distiller, teacher: expected another model than the student; got the same. "
                "For self-distillation pass copy.deepcopy(student)."
            )
        self.pairs = pairs_by_name(pairs)
        self.weights: dict[str, float] = {}
        self.losses = nn.ModuleDict()
        self.terms: dict[str, Tensor] = {}
        self._diagnose = diagnose
        self.cache = cache
        self._head_check = HeadCheck()
        student_layers = [pair.student for pair in self.pairs.values()]
        teacher_layers = [pair.teacher for pair in self.pairs.values()]
        args, kwargs = as_call(example, "Distiller, example")
        self._teacher = Teacher(teacher, teacher_layers, teacher_inputs, teacher_dtype)
        try:
            with undisturbed(unwrap(student), unwrap(teacher)):
                with FeatureTap(student, student_layers, owner="student") as tap:
                    tap.model(*args, **kwargs)
                    student_features = tap.collect()
                self._build_losses(
                    student_features, self._teacher.features(args, kwargs), mask_in(kwargs)
                )
            if stop_teacher:  # not before the example has run to its end, with all checks
                self._teacher.stop_early()
            self._tap = FeatureTap(student, student_layers, train_only=True, owner="student")
        except BaseException:
            self._teacher.tap.close()
            raise

    def _build_losses(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> None:
        for name, pair in self.pairs.items():
            loss = pair.build_loss(student_features[pair.student], teacher_features[pair.teacher])
            default = getattr(loss, "default_weight", 1.0)
            self.weights[name] = default if pair.weight is None else pair.weight
            self.losses[module_key(name)] = loss
        # The whole sum once, so that what does not fit is heard of here and not in the first step.
        with undisturbed(self.losses):
            total(self._weighted(student_features, teacher_features, mask))
        self.terms = {}
        for loss in self.vid_losses().values():
            loss.observes = self._diagnose

    @property
    def student(self) -> nn.Module:
        """The student, without any wrapper."""
        return self._tap.model

    def forward(
        self,
        *args: Any,
        teacher_features: Mapping[str, Tensor] | None = None,
        token_mask: Tensor | None = None,
        sample_index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the weighted transfer terms of the batch that the student has just seen.

        Args:
            *args: positional inputs of the student, for the teacher.
            teacher_features: what :meth:`teacher_features` returned for this batch. The teacher
                is not run again then and needs no inputs; a mask is still to be given.
            token_mask: ``(N, L)``, nonzero at the tokens that count, for every pair of tokens.
                None takes an ``attention_mask`` of that rank from the keyword arguments.
            sample_index: ``(N,)``, each sample's place in its data set, for the cache.
            **kwargs: keyword inputs of the student, for the teacher.

        Returns:
            A scalar, in nats per element for the default losses.

        Raises:
            RuntimeError: if the student has not run forward in train mode since the last call, or
                a layer's feature cannot be used.
            TypeError: if a feature is not one floating-point tensor.
            ValueError: if shapes do not fit; the message names the pair.
        """
        if any(self.weights.values()):
            self._head_check(self.student, self.losses)
        terms = self.weighted_terms(
            *args,
            teacher_features=teacher_features,
            token_mask=token_mask,
            sample_index=sample_index,
            **kwargs,
        )
        return total(terms)

    def weighted_terms(
        self,
        *args: Any,
        teacher_features: Mapping[str, Tensor] | None = None,
        token_mask: Tensor | None = None,
        sample_index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """:meth:`forward` before the sum, by pair: for :func:`~vid_loss.gradient_shares`."""
        if teacher_features is None:
            teacher_features = self.teacher_features(*args, sample_index=sample_index, **kwargs)
        missing = {pair.teacher for pair in self.pairs.values()} - set(teacher_features)
        if missing:
            raise ValueError(
                f"Distiller, teacher_features: expected also {sorted(missing)}; got "
                f"{sorted(teacher_features)}. Give it what distiller.teacher_features() returned."
            )
        token_mask = mask_in(kwargs) if token_mask is None else token_mask
        return self._weighted(self._tap.collect(), teacher_features, token_mask)

    def teacher_features(
        self, *args: Any, sample_index: Tensor | Sequence[int] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Runs the teacher on the student's inputs, or reads what the cache has of them.

        Before the student's forward, it takes the least memory: what the teacher needs for a
        moment is free again when the student's activations, which wait for backward, pile up.

        Args:
            *args: positional inputs of the student.
            sample_index: ``(N,)``, each sample's place in its data set, for the cache.
            **kwargs: keyword inputs of the student.

        Returns:
            The teacher's features by layer, for ``distiller(teacher_features=...)``.

        Raises:
            RuntimeError: if the teacher changes its inputs, or a layer's feature cannot be used.
            TypeError, ValueError: as in :meth:`forward`, and from the cache.
        """
        if self.cache is None:
            return self._teacher.features(args, kwargs)
        return self.cache.features(self._teacher, args, kwargs, sample_index)

    def _weighted(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        terms = {
            name: pair.term(
                self.losses[module_key(name)],
                student_features[pair.student],
                teacher_features[pair.teacher],
                mask,
            )
            for name, pair in self.pairs.items()
        }
        self.terms = {name: term.detach() for name, term in terms.items()}
        return {name: self.weights[name] * term for name, term in terms.items()}

    def vid_losses(self) -> dict[str, VIDLoss]:
        """Returns the losses that have a q(t|s) to look into, by pair."""
        losses = {name: self.losses[module_key(name)] for name in self.pairs}
        return {name: loss for name, loss in losses.items() if isinstance(loss, VIDLoss)}

    def diagnostics(self) -> dict[str, PairDiagnostics]:
        """Returns what each VIDLoss pair transferred, in the last batch of this process.

        Of maps and tokens, the first 32 samples are looked at. The host waits for the device
        here, and in no step.

        Raises:
            RuntimeError: if there was no batch yet, or they were turned off.
        """
        return report({name: loss.observation for name, loss in self.vid_losses().items()})

    def set_weight(self, name: str, weight: float) -> None:
        """Changes a pair's weight, also in the middle of training. It is not in the state dict.

        Raises:
            KeyError: if no pair has that name.
            ValueError: if the weight is negative or not finite.
        """
        if name not in self.pairs:
            raise KeyError(f"Distiller: expected one of {list(self.pairs)}; got {name!r}.")
        self.weights[name] = check_weight(weight, str(self.pairs[name]))

    def parameter_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Returns the parameters in groups for an optimizer, most of them without weight decay.

        Decay would pull a variance towards ``softplus(0)`` = 0.69, and norms and biases are
        customarily free of it: only weight matrices are decayed.

        Args:
            weight_decay: the decay of weight matrices.

        Returns:
            One group with that decay and one without; a group that would be empty is left out.
        """
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def close(self) -> None:
        """Removes every hook from student and teacher. Closing twice is fine."""
        self._tap.close()
        self._teacher.tap.close()

    def __enter__(self) -> "Distiller":
        """Returns the distiller, to be closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the distiller."""
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # What to(), cuda() and half() are made of. The teacher is no submodule, so it is told.
        self._teacher.move(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sums the terms of the pairs, which may be on several devices."""
    first, *more = terms.values()
    for term in more:
        # A model that is split over devices has its layers, and so its heads, on several.
        first = first + term.to(first.device)
    return first
