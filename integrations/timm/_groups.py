"""Parameter groups for timm's optimizers: the heads at a rate of their own."""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import unwrap_model
from torch import nn

from vid_loss.checks import check_number
from vid_loss.optimizer import head_learning_rate

from ._module import VIDTrainableModule


def param_groups_vid(
    model: nn.Module,
    *,
    lr: float,
    opt: str | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
) -> list[dict[str, Any]]:
    """Groups the parameters of a :class:`VIDTask`, as ``param_group_fn`` of timm's optimizers.

    The groups are timm's own for weight decay and layer decay; those of the heads have an
    ``lr_scale``, which timm's schedulers multiply the rate with. Without one of them they stay at
    ``lr``: ``task.distiller.add_to(optimizer)`` needs none::

        groups = partial(param_groups_vid, lr=1e-3, opt="adamw")
        optimizer = create_optimizer_v2(module, "adamw", lr=1e-3, param_group_fn=groups)

    Args:
        model: what ``VIDTask.get_trainable_module()`` returns.
        lr: the optimizer's learning rate, above 0.
        opt: the optimizer's name, which timm does not tell its ``param_group_fn``.
        head_lr: the heads'. None is :func:`~vid_loss.optimizer.head_learning_rate` of ``opt``.
        weight_decay: of weight matrices.
        layer_decay: as timm's ``--layer-decay``.
        layer_decay_min_scale: as timm's.
        layer_decay_no_opt_scale: as timm's.

    Raises:
        TypeError: if it is no module of a task, or the optimizer's name none.
        ValueError: if a rate or a decay is no number or below 0, ``lr`` is 0, or there is nothing
            to choose the heads' rate by.
    """
    module: Any = unwrap_model(model)
    if not isinstance(module, VIDTrainableModule):
        raise TypeError(
            "param_groups_vid, model: expected a task's task.get_trainable_module(); got "
            f"{type(module).__name__}."
        )
    for name, number in (("lr", lr), ("weight_decay", weight_decay)):
        check_number(f"param_groups_vid, {name}", number, "Give the optimizer's.")
    if not lr:
        raise ValueError(
            f"param_groups_vid, lr: expected a rate above 0, which lr_scale is of; got {lr}."
        )
    head_lr = _rate(module, opt, lr) if head_lr is None else head_lr
    check_number("param_groups_vid, head_lr", head_lr, "For example 5e-3; None chooses one.")
    if layer_decay is None:
        groups = param_groups_weight_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=module.no_weight_decay()
        )
    else:
        groups = param_groups_layer_decay(
            model,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            no_weight_decay_list=module.no_weight_decay(),
            min_scale=layer_decay_min_scale,
            no_opt_scale=layer_decay_no_opt_scale,
        )
    heads = {id(parameter) for parameter in module.distiller.parameters()}
    split = []
    for group in groups:
        of_student = [x for x in group["params"] if id(x) not in heads]
        of_heads = [x for x in group["params"] if id(x) in heads]
        if of_student:
            split.append({**group, "params": of_student})
        if of_heads:
            split.append({**group, "params": of_heads, "lr_scale": head_lr / lr})
    return split


def _rate(module: VIDTrainableModule, opt: Any, lr: float) -> float:
    """Returns the heads' rate beside an optimizer that is named."""
    if opt is None:
        raise ValueError(
            "param_groups_vid, opt: expected the optimizer's name, to choose the heads' rate by; "
            "got none. Write opt='sgd', say, or head_lr=0.3."
        )
    if not isinstance(opt, str):
        raise TypeError(
            f"param_groups_vid, opt: expected the optimizer's name; got {opt!r}. For example 'sgd'."
        )
    return head_learning_rate(opt, lr, weight=module.distiller.largest_weight)
