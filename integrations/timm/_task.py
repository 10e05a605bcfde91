"""A training task for timm."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vid_loss import Distiller, Pair
from vid_loss.cache import FeatureCache

try:
    import timm
    from timm.task import TrainingTask
    from timm.utils import unwrap_model
except ImportError as error:
    raise ImportError(
        "VIDTask needs timm >= 1.0.27, with its training tasks. Run: pip install 'vid-loss[timm]'"
    ) from error

if not hasattr(TrainingTask, "get_task_state"):
    raise ImportError(
        f"VIDTask needs timm >= 1.0.27, whose tasks have a state; got {timm.__version__}. "
        "Run: pip install 'vid-loss[timm]'"
    )

# After the check, because they use timm themselves.
from ._checks import check_arguments, refuse_names_of_result, task_and_distill_weight
from ._inputs import default_data_config, example_image, renormalized
from ._layers import resolve_pairs
from ._module import VIDTrainableModule
from ._teacher import resolved_teacher

_logger = logging.getLogger(__name__)


class VIDTask(TrainingTask):  # type: ignore[misc]  # timm is not typed
    r"""Variational Information Distillation as a timm training task.

    A sibling of timm's ``FeatureDistillationTask``: the same constructor, one trainable module,
    the student's checkpoint free of heads. The loss is :math:`w_{task} L_S + w_{distill} \sum_k
    \lambda_k (-\log q(t_k|s_k))`, equation (2) of the paper with timm's two weights around it.

    Both weights are 1 if None, but ``task_loss_weight`` alone, up to 1, gives the rest, ``1 -
    task_loss_weight``, to the distillation.

    Args:
        student_model: the timm model that is trained.
        teacher_model: a model, a ``DistillationTeacher``, or a name, whose weights timm asks the
            hub for unless there is a ``teacher_pretrained_path``.
        criterion: the task loss; cross-entropy if None.
        teacher_pretrained_path: a local checkpoint for the teacher that is named.
        pairs: a dict of student layer to teacher layer, or a list of :class:`~vid_loss.Pair`.
            None pairs the layers of equal reduction, from timm's ``feature_info``.
        vid_weight: lambda of every pair that has none of its own; the loss's default if None.
        distill_loss_weight: weight of the sum over pairs.
        task_loss_weight: weight of the task loss.
        data_config: what the student is fed, as timm's ``resolve_data_config`` says it:
            ``input_size``, ``mean``, ``std``. The student's own if None.
        device: device of the task.
        dtype: dtype of the task.
        verbose: log the pairs and weights.
        teacher_dtype: as in :class:`~vid_loss.Distiller`.
        stop_teacher: as in :class:`~vid_loss.Distiller`.
        cache: as in :class:`~vid_loss.Distiller`; each call in training has ``sample_index``.

    Raises:
        TypeError, ValueError: if an argument, a pair or a feature does not fit; the message names
            it.

    Example:
        >>> student, teacher = timm.create_model("test_resnet"), timm.create_model("resnet10t")
        >>> task = VIDTask(student, teacher, pairs={"layer4": "layer4"}, verbose=False)
        >>> sorted(task(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])))
        ['layer4->layer4', 'loss', 'output', 'task_loss', 'vid_loss']
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        teacher_pretrained_path: str | None = None,
        pairs: Mapping[str, str] | Sequence[Pair] | None = None,
        vid_weight: float | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        data_config: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        teacher_dtype: torch.dtype | None = None,
        stop_teacher: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        check_arguments(student_model, teacher_model, criterion, data_config)
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        student: Any = unwrap_model(student_model)
        self.task_loss_weight, self.distill_loss_weight = task_and_distill_weight(
            task_loss_weight, distill_loss_weight
        )
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.teacher = resolved_teacher(
            teacher_model, teacher_pretrained_path, student, self.device, self.dtype
        )
        data_config = default_data_config(student) if data_config is None else data_config
        example = example_image(student, data_config["input_size"])
        # What teaches is not put into self.teacher, which may be the user's own.
        model, self.renormalize = renormalized(self.teacher, data_config, example)
        distiller = Distiller(
            student_model,
            model,
            resolve_pairs(pairs, student, unwrap_model(model), example=example, weight=vid_weight),
            example=example,
            teacher_inputs=self.renormalize,
            teacher_dtype=teacher_dtype,
            stop_teacher=stop_teacher,
            cache=cache,
        )
        refuse_names_of_result(distiller.pairs)
        # Later it may be compiled and wrapped.
        self.trainable_module: Any = VIDTrainableModule(student_model, distiller)
        if self.verbose:
            both = self.task_loss_weight, self.distill_loss_weight
            terms = ", ".join(f"{k} * {x}" for k, x in distiller.weights.items())
            _logger.info("VIDTask: task_weight=%s, distill_weight=%s, pairs: %s", *both, terms)

    @property
    def distiller(self) -> Distiller:
        """The transfer terms, with ``weights``, ``set_weight``, ``terms`` and ``metrics``."""
        found: Distiller = unwrap_model(self.trainable_module).distiller
        return found

    def train(self, mode: bool = True) -> "VIDTask":
        """Sets the mode of the task, while the teacher stays in evaluation."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> "VIDTask":
        """Wraps student and heads in DistributedDataParallel; the teacher stays as it is.

        Args:
            device_ids: as train.py gives them; DDP wants none on the CPU.
            **ddp_kwargs: what else DistributedDataParallel takes.
        """
        if next(self.trainable_module.parameters()).device.type == "cpu":
            device_ids = None
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> Any:
        """Compiles the training step's module, teacher included, and the student for evaluation.

        Returns:
            The compiled student.
        """
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model: Any = torch.compile(self.trainable_module.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        return self.eval_model

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> nn.Module | None:
        """Returns the student without heads, of ``module`` or of what is trained or averaged."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(resolved)
        return inner.student if isinstance(inner, VIDTrainableModule) else resolved

    def get_task_state(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """Returns the heads and variances, which are not in the student's ``state_dict``."""
        trainable = self._trainable(module, ema)
        return {} if trainable is None else {"vid": trainable.distiller.losses.state_dict()}

    def load_task_state(
        self,
        state: Mapping[str, Mapping[str, Tensor]] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads what :meth:`get_task_state` returned; without a state the heads stay as they are.

        Raises:
            RuntimeError: if there is no EMA to load into, or the state is of other pairs.
        """
        if not state or "vid" not in state:
            _logger.warning("VIDTask: the checkpoint holds no heads, so they start afresh.")
            return
        trainable = self._trainable(module, ema)
        if trainable is None:
            raise RuntimeError("VIDTask: expected an EMA to load into. Call setup_ema() first.")
        trainable.load_heads(state["vid"], strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Returns the student's parameters, all or all but its last layer's, and the heads'."""
        trainable = unwrap_model(self.trainable_module)
        of_student = list(trainable.student.parameters())[: -2 if exclude_head else None]
        return of_student + list(trainable.distiller.parameters())

    def _trainable(self, module: nn.Module | None, ema: bool) -> VIDTrainableModule | None:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module)

    def forward(self, input: Tensor, target: Tensor, sample_index: Any = None) -> dict[str, Tensor]:
        """Runs student and teacher and computes the loss.

        Args:
            input: images ``(N, C, H, W)``, normalised for the student.
            target: labels ``(N,)``, or what else the criterion takes.
            sample_index: ``(N,)``, each sample's place in its data set, for the cache.

        Returns:
            ``loss``, ``output`` (the student's logits), ``task_loss``, ``vid_loss`` (the weighted
            sum over pairs, before ``distill_loss_weight``; 0 in evaluation) and, while training,
            each pair's value under its name.
        """
        trainable = unwrap_model(self.trainable_module)
        output = self.trainable_module(input, sample_index=sample_index)
        output, vid_loss = output if trainable.training else (output, input.new_zeros(()))
        task_loss = self.criterion(output, target)
        # In evaluation nothing is transferred, and the terms are those of an earlier batch.
        terms = trainable.distiller.terms if vid_loss.requires_grad else {}
        return {
            **terms,
            "loss": self.task_loss_weight * task_loss + self.distill_loss_weight * vid_loss,
            "output": output,
            "task_loss": task_loss,
            "vid_loss": vid_loss,
        }
