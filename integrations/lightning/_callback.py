"""A Lightning callback that adds the transfer terms of a teacher to any module's training."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vid_loss import Distiller, Pair, match_layers
from vid_loss.cache import FeatureCache
from vid_loss.teacher import Inputs

from ._checks import check_arguments, example_of, places_in, refuse_sharded_and_manual, student_of
from ._finetuning import keep_heads_from_finetuning
from ._heads import heads_in_optimizers

_WRAPPED = ("configure_optimizers", "training_step")


class VIDCallback(Callback):
    """Adds the transfer terms of a teacher to what a module's ``training_step`` returns.

    The module stays as it is: its parameters, its ``state_dict`` and its checkpoints have no heads.
    Those are built when the optimizer is, into which they go in groups of their own, and lie in a
    checkpoint under the callback's name. The teacher runs on what the student is called with.

    Args:
        teacher: the model that is learnt from; cast to the module's dtype under ``bf16-true`` and
            the like, as Lightning casts the module. In no checkpoint.
        pairs: as in :class:`~vid_loss.Distiller`, with names inside the student. None takes
            :func:`~vid_loss.match_layers`.
        student: attribute of the module that is the student, such as ``"model"`` or ``"net"``.
        example: a batch of the student's inputs, to size the heads; the module's
            ``example_input_array`` if None.
        head_learning_rate: of the heads, which start at random; a scheduler treats them as the
            other groups. None is the optimizer's, but at least 5e-3; 0.3 with SGD.
        teacher_inputs: as in :class:`~vid_loss.Distiller`.
        teacher_dtype: as in :class:`~vid_loss.Distiller`; Lightning's autocast holds for the
            teacher anyway.
        stop_teacher: as in :class:`~vid_loss.Distiller`.
        cache: keeps the teacher's features; a batch is a dict with ``"sample_index"``.

    Raises:
        TypeError, ValueError: if an argument cannot be meant.

    Attributes:
        distiller: the transfer terms; None before ``fit`` has come to the optimizers. It stays to
            be read after ``fit``, without hooks; another fit of the module goes on with its heads.
    """

    def __init__(
        self,
        teacher: nn.Module,
        pairs: Mapping[str, str] | Sequence[Pair] | None = None,
        *,
        student: str = "model",
        example: Inputs | None = None,
        head_learning_rate: float | None = None,
        teacher_inputs: Callable[..., Inputs] | None = None,
        teacher_dtype: torch.dtype | None = None,
        stop_teacher: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        check_arguments(teacher, student, head_learning_rate, teacher_inputs)
        self.teacher = teacher
        self.distiller: Distiller | None = None
        self._pairs = pairs
        self._student = student
        self._example = example
        self._head_learning_rate = head_learning_rate
        self._options: dict[str, Any] = {
            "teacher_inputs": teacher_inputs,
            "teacher_dtype": teacher_dtype,
            "stop_teacher": stop_teacher,
            "cache": cache,
        }
        self._loaded: dict[str, Any] | None = None
        self._transfer: nn.Module | None = None  # the distiller, in DDP where the module is
        self._of_cache: dict[str, Tensor] = {}
        self._terms: list[Tensor] | None = None  # of each forward; None outside training_step
        self._undo: list[Callable[[], None]] = []

    # ---- Lightning's hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts itself around the module's ``configure_optimizers`` and ``training_step``.

        Raises:
            ValueError: if the strategy or the module does its own backward pass or sharding.
        """
        if stage != "fit":
            return
        refuse_sharded_and_manual(trainer, pl_module)
        earlier, self.distiller = self.distiller, None
        if earlier is not None and earlier.student is getattr(pl_module, self._student, None):
            self._loaded = earlier.state_dict()  # they go on, as the module does
        attributes = vars(pl_module)
        before = {name: attributes[name] for name in _WRAPPED if name in attributes}

        def restore() -> None:
            for name in _WRAPPED:
                attributes.pop(name, None)
            attributes.update(before)

        self._undo.append(restore)
        configure, step = pl_module.configure_optimizers, pl_module.training_step

        @wraps(configure)
        def configure_optimizers() -> Any:
            self._build(trainer, pl_module)
            with heads_in_optimizers(self._built, pl_module, self._head_learning_rate):
                return configure()

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, step, *args, **kwargs)

        attributes.update(configure_optimizers=configure_optimizers, training_step=training_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes hooks and wrappers off again."""
        while self._undo:
            self._undo.pop()()
        self._transfer = self._terms = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes hooks and wrappers off, where Lightning tears nothing down."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Returns the heads and estimates of q, for the checkpoint."""
        return {} if self.distiller is None else {"distiller": self.distiller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the heads of a checkpoint, which may come before there are any here."""
        self._loaded = state_dict["distiller"]
        if self.distiller is not None:
            self.distiller.load_state_dict(self._loaded)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to resume a run that had no heads, whose optimizer state would not fit.

        Raises:
            ValueError: if the checkpoint is of such a run.
        """
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                "VIDCallback: expected a checkpoint of a run with VIDCallback; got one without. To "
                "start from its weights, load them into the module (load_state_dict) and fit "
                "without ckpt_path."
            )

    # ---- The transfer terms ----

    @property
    def _built(self) -> Distiller:
        assert self.distiller is not None
        return self.distiller

    def _build(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the heads: late, when the module is on its device, cast, and its BN synchronized.

        Raises:
            ValueError: if there is no such student or no example, or a pair does not fit.
        """
        student = student_of(pl_module, self._student)
        example = example_of(pl_module, self._example)
        precision = trainer.precision_plugin
        teacher = precision.convert_module(self.teacher.to(pl_module.device))
        example = precision.convert_input(move_data_to_device(example, pl_module.device))
        pairs = self._pairs
        if pairs is None:
            inputs = self._options["teacher_inputs"]
            pairs = match_layers(student, teacher, example, teacher_inputs=inputs)
        distiller = Distiller(student, teacher, pairs, example=example, **self._options)
        self._undo += [distiller.close, keep_heads_from_finetuning(trainer, distiller)]
        self.distiller = distiller
        if self._loaded is not None:
            distiller.load_state_dict(self._loaded)
            self._loaded = None
        wraps_it = isinstance(trainer.strategy, DDPStrategy) and any(
            True for _ in distiller.parameters()
        )
        self._transfer = DistributedDataParallel(distiller) if wraps_it else distiller
        hook = student.register_forward_hook(self._after_forward, with_kwargs=True)
        self._undo.append(hook.remove)

    def _after_forward(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Compares with the teacher after each forward of the student that is trained on."""
        if self._terms is not None and student.training and torch.is_grad_enabled():
            assert self._transfer is not None
            self._terms.append(self._transfer(*args, **(kwargs | self._of_cache)))

    def _step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Returns what ``training_step`` does, with the mean of the transfer terms in its loss."""
        if isinstance(self._transfer, DistributedDataParallel):  # gradients are accumulated alike
            model: Any = trainer.strategy.model
            self._transfer.require_backward_grad_sync = model.require_backward_grad_sync
        terms: list[Tensor] = []
        self._of_cache = places_in(args[0]) if self._built.cache else {}
        self._terms = terms
        try:
            output = step(*args, **kwargs)
        finally:
            self._terms = None
        if output is None:  # Lightning skips the batch
            return None
        if not terms:
            raise RuntimeError(
                f"VIDCallback, student: expected training_step to run self.{self._student}(...) in "
                "train mode; it did not. Name the attribute that it calls."
            )
        loss = output["loss"] if isinstance(output, Mapping) else output
        transfer = torch.stack(terms).mean() if len(terms) > 1 else terms[0]
        self._log(trainer, pl_module, loss, transfer)
        loss = loss + transfer
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, task: Tensor, transfer: Tensor
    ) -> None:
        distiller = self._built
        pl_module.log_dict(
            {
                "task_loss": task.detach(),
                "transfer_loss": transfer.detach(),
                **{f"transfer/{name}": term for name, term in distiller.terms.items()},
            }
        )
        every: int = vars(trainer)["log_every_n_steps"]  # which a connector of Lightning's sets
        if every and (trainer.global_step + 1) % every == 0:  # here alone it waits for a GPU
            pl_module.log_dict(distiller.metrics())
