"""The sum over pairs in the paper's equation (2), for any training loop."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ._absent import Absent
from ._arguments import check_models, check_options, checked_features
from ._example import read_example
from ._offline import Offline, source_of
from .cache import FeatureCache
from .guards import undisturbed, without_data_parallel
from .names import pairs_by_name
from .optimizer import FirstStep, Loaded
from .pairs import Pair
from .taps import FeatureTap, Given, unwrap
from .teacher import Inputs, as_call
from .terms import Features, PairTerms


class Distiller(PairTerms):
    r"""The transfer terms :math:`-\sum_k \lambda_k \log q(t_k | s_k)` of a student and a teacher.

    Equation (2) of the paper without the task loss, in three lines of an existing script::

        distiller = Distiller(student, teacher, {"layer4": "layer4"}, example=images)
        distiller.add_to(optimizer)
        ...
        loss = criterion(student(images), labels) + distiller(images)

    The heads get a learning rate of their own: :meth:`add_to`. It owns the heads and the variances
    alone: student and teacher are held but not registered, so that they are in neither
    ``parameters()`` nor ``state_dict()``. All parameters exist after construction. Heads and
    teacher follow a student that moves. In several processes it is wrapped as the student is:
    ``DistributedDataParallel(distiller)``.

    Args:
        student: the model that is trained.
        teacher: the model that is learnt from; put into eval mode at every call. Several are one
            :class:`~vid_loss.teachers.Teachers`. None if its features come from elsewhere.
        pairs: a dict of student layer to teacher layer, or a list of :class:`Pair`.
        example: a batch of the student's inputs, to size the heads: a tensor, a tuple of
            positional or a dict of keyword arguments. One sample is enough. Both models run on it
            once, in eval mode; their modes, buffers and the random state stay as they were.
        teacher_features: without a teacher, its features of the example, by the layers' names in
            the pairs. Each call is then given those of its batch.
        teacher_inputs: called with the student's arguments, returns the teacher's in one of the
            three forms: another normalization, resolution or tokenization.
        teacher_dtype: runs the teacher under autocast in this dtype, such as ``torch.bfloat16``;
            its weights stay as they are.
        stop_teacher: end the teacher's forward at its last tapped layer, with an exception that
            its callers do not see. Not for a teacher that FSDP shards.
        cache: keeps the teacher's features of each sample, for inputs that do not change between
            epochs; calls then need ``sample_index``. Not for a teacher that FSDP shards.

    Attributes:
        cache: as given.
        pairs: the pairs by name.
        weights: lambda of each pair by name; see :meth:`set_weight`.
        losses: the loss module of each pair.
        terms: the last value of each pair's loss by name: unweighted, detached, on the device.

    Raises:
        TypeError: if pairs, example, a feature or a loss has the wrong type.
        ValueError: if there is no pair, the teacher is the student, the student is in DataParallel
            on several devices, a layer is unknown, or features do not fit. No hook is left then.
        RuntimeError: if a layer is not reached by the example, or is changed in place.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        pairs: Mapping[str, str] | Sequence[Pair],
        *,
        example: Inputs,
        teacher_features: Mapping[str, Tensor] | None = None,
        teacher_inputs: Callable[..., Inputs] | None = None,
        teacher_dtype: torch.dtype | None = None,
        stop_teacher: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        student = without_data_parallel(student)
        given = Given(*as_call(example, "Distiller, example"))
        check_models(student, teacher, given)
        check_options(teacher_inputs, teacher_dtype, stop_teacher, cache, offline=teacher is None)
        by_name = pairs_by_name(pairs)
        with ExitStack() as undo:
            source = source_of(teacher, by_name, teacher_features, teacher_inputs, teacher_dtype)
            undo.callback(source.tap.close)
            layers = (pair.student for pair in by_name.values())
            tap = FeatureTap(student, layers, record="training", owner="student")
            undo.callback(tap.close)
            models = (unwrap(x) for x in (student, teacher) if x is not None)
            with source.lock, undisturbed(*models):
                seen = read_example(by_name, tap, source, given)
                super().__init__(by_name, seen.student, seen.teacher, seen.mask_of)
            undo.pop_all()
        if stop_teacher:  # not before the example has run to its end, with all checks
            source.stop_early()
        self._tap, self._teacher, self._masks, self.cache = tap, source, seen.masks, cache
        trained = any(isinstance(pair.loss, nn.Module) for pair in by_name.values())
        self._first_step = FirstStep(self, teacher, None if trained else Loaded(self.losses))
        self._first_step.watch()
        source.stay_beside(given)

    @property
    def student(self) -> nn.Module:
        """The student, without any wrapper."""
        return self._tap.model

    @property
    def reached(self) -> bool:
        """Whether the student's last forward in train mode has reached any of the layers."""
        return self._tap.reached

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
            teacher_features: what :meth:`teacher_features` returned for this batch, or features
                from elsewhere, by the layers' names in the pairs. The teacher is not run then and
                needs no inputs; a mask is still to be given.
            token_mask: nonzero at what counts, for every pair without a mask of its own: ``(N, L)``
                for those of tokens, ``(N, H, W)`` for those of maps. None takes an
                ``attention_mask`` ``(N, L)`` from the keyword arguments, for pairs of its tokens.
            sample_index: ``(N,)``, each sample's place in its data set, for the cache.
            **kwargs: keyword inputs of the student, for the teacher.

        Returns:
            A scalar, in nats per element for the default losses.

        Raises:
            RuntimeError: if the student has not run forward in train mode since the last call, or
                has run on another batch since, or a layer's feature cannot be used. In the second
                step, if the heads of several processes drift apart.
            TypeError: if a feature is not one floating-point tensor.
            ValueError: if shapes do not fit; the message names the pair.
        """
        if not any(self.weights.values()):
            self._tap.clear()
            return self.idle()
        if not (torch.compiler.is_compiling() or self._first_step.settled):
            self._first_step.on_call()
        terms = self.weighted_terms(
            *args,
            teacher_features=teacher_features,
            token_mask=token_mask,
            sample_index=sample_index,
            **kwargs,
        )
        loss, *others = terms.values()
        for term in others:
            loss = loss + term.to(loss.device)  # a model may be split over several devices
        return loss

    def weighted_terms(
        self,
        *args: Any,
        teacher_features: Mapping[str, Tensor] | None = None,
        token_mask: Tensor | None = None,
        sample_index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """:meth:`forward` before the sum, by pair: for :func:`~vid_loss.gradient_shares`."""
        layers = self._teacher.tap.specs.keys()
        if (features := teacher_features) is None:
            features = self.teacher_features(*args, sample_index=sample_index, **kwargs)
        elif type(features) is not Features or layers - features.keys() - features.parts.keys():
            features = checked_features(features, self.pairs.values())
        made_of = getattr(features, "batch", None)  # None of features from elsewhere
        masks: Mapping[str, Tensor] = {}
        given = token_mask is not None or kwargs.get("attention_mask") is not None
        if given or self._masks.own or len(args) > self._masks.place:
            masks = self._masks.of(token_mask, args, kwargs)
        batch = made_of or Given(args, kwargs).batch()
        student = self._tap.collect(batch, unchanged=bool(made_of))
        return self.weighted(student, features, masks)

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
        given = Given(args, kwargs)
        self._teacher.follow(given, self._tap.model)
        if self.cache is None or isinstance(self._teacher, Offline):
            features = self._teacher.features(given)
        else:
            features = self.cache.features(self._teacher, args, kwargs, sample_index)
        if torch.compiler.is_compiling():
            return features
        features = Features(features)
        features.batch = given.batch()
        return features

    def close(self) -> None:
        """Removes every hook from student and teacher. Closing twice is fine."""
        self._tap.close()
        self._teacher.tap.close()

    def __getstate__(self) -> dict[str, Any]:
        """Has the heads alone: no file gets the teacher, and no other process the hooks."""
        models = dict.fromkeys(("_tap", "_teacher", "_first_step"), Absent())
        return {**self.__dict__, **models, "cache": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        """A copy taps the copy of the student, and the same teacher."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # What to(), cuda() and half() are made of. The teacher is no submodule, so it is told.
        self._teacher.move(fn)
        super()._apply(fn, recurse)
        return self
