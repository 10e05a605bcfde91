"""VID's command line for timm's train script: what the patch adds to it."""

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.task import TrainingTask

from vid_loss.optimizer import HEAD_LEARNING_RATE, SGD_HEAD_STEP

from ._groups import param_groups_vid
from ._task import VIDTask


def add_vid_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--vid-...`` to the parser of timm's train script, and ``vid`` to its distill types."""
    for action in parser._actions:
        if action.dest == "kd_distill_type":
            action.choices = [*(action.choices or ()), "vid"]
    group = parser.add_argument_group(
        "Variational Information Distillation (--kd-distill-type vid)"
    )
    group.add_argument(
        "--vid-pair",
        action="append",
        metavar="STUDENT=TEACHER",
        help="a student layer and the teacher layer that it learns from; repeatable "
        "(default: layers of equal reduction)",
    )
    group.add_argument(
        "--vid-weight",
        type=float,
        metavar="LAMBDA",
        help="weight of each pair (default: the loss's own); --distill-loss-weight is their sum's",
    )
    group.add_argument(
        "--vid-teacher-checkpoint",
        metavar="PATH",
        help="local file with the weights of --kd-model-name, instead of the hub's",
    )
    group.add_argument(
        "--vid-head-lr",
        type=float,
        metavar="LR",
        help="learning rate of the heads, which the schedule scales like --lr "
        f"(default: that of --lr; at least {HEAD_LEARNING_RATE}, "
        f"with SGD 0.3, {SGD_HEAD_STEP} / lambda above lambda 3)",
    )
    group.add_argument(
        "--vid-stop-teacher",
        action="store_true",
        help="end the teacher's forward at the last layer that a pair reads",
    )
    _refuse_elsewhere(parser, group)


def _refuse_elsewhere(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> None:
    """Has the parser refuse the group's arguments without ``--kd-distill-type vid``.

    timm would distil logits then, or nothing, and not say so.
    """
    parse = parser.parse_args
    absent = {action: action.default for action in group._group_actions}  # before any --config

    def parse_args(*given: Any, **options: Any) -> Any:
        args = parse(*given, **options)
        if args.kd_distill_type != "vid":
            for action, default in absent.items():
                if getattr(args, action.dest) != default:
                    parser.error(
                        f"{action.option_strings[0]}: expected --kd-distill-type vid; got "
                        f"{args.kd_distill_type}. Add it, or drop this argument."
                    )
        return args

    vars(parser)["parse_args"] = parse_args


def vid_task(args: argparse.Namespace, plain: TrainingTask) -> VIDTask:
    """Builds the task of ``--kd-distill-type vid``.

    Args:
        args: the train script's arguments.
        plain: the task that the script has without distillation: its model, its criterion.

    Raises:
        ValueError: if an argument is missing, cannot be read, or does not go with VID.
    """
    student = plain.trainable_module
    if args.kd_model_name is None:
        raise ValueError(
            "--kd-distill-type vid: expected a teacher; got none. Add --kd-model-name."
        )
    if isinstance(student, torch.jit.ScriptModule):
        raise ValueError("--kd-distill-type vid: expected no --torchscript. Use --torchcompile.")
    if getattr(args, "naflex_loader", False):
        raise ValueError("--kd-distill-type vid: expected images; got --naflex-loader. Drop it.")
    task = VIDTask(
        student,
        args.kd_model_name,
        criterion=plain.criterion,
        teacher_pretrained_path=args.vid_teacher_checkpoint,
        pairs=None if args.vid_pair is None else _pairs(args.vid_pair),
        vid_weight=args.vid_weight,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        data_config=resolve_data_config(vars(args), model=student),
        stop_teacher=args.vid_stop_teacher,
        device=plain.device,
        dtype=plain.dtype,
        verbose=plain.verbose,
    )
    # What train.py creates its optimizer with comes from the arguments.
    groups = partial(
        param_groups_vid,
        lr=args.lr,
        opt=args.opt,
        head_lr=args.vid_head_lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        layer_decay_min_scale=getattr(args, "layer_decay_min_scale", 0.0),
        layer_decay_no_opt_scale=getattr(args, "layer_decay_no_opt_scale", None),
    )
    args.opt_kwargs = _OptimizerArguments({"param_group_fn": groups, **args.opt_kwargs})
    if hasattr(plain, "create_evaluator"):
        # Multi-label targets are evaluated in their own way.
        task.create_evaluator = plain.create_evaluator
    return task


class _OptimizerArguments(dict[str, Any]):
    """Keyword arguments of an optimizer, in a checkpoint without its function."""

    def __reduce__(self) -> tuple[type, tuple[list[tuple[str, Any]]]]:
        # Not a dict, which torch.load(weights_only=True) would not build from a call.
        return OrderedDict, ([(k, x) for k, x in self.items() if k != "param_group_fn"],)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        student, separator, teacher = text.partition("=")
        if not separator or not student or not teacher:
            raise ValueError(f"--vid-pair: expected student_layer=teacher_layer; got {text!r}.")
        pairs[student] = teacher
    return pairs
