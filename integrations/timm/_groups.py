"""Parameter groups for timm's optimizers: the heads at a rate of their own."""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import unwrap_model
from torch import nn

from vid_loss.optimizer import HEAD_LEARNING_RATE


def param_groups_vid(
    model: nn.Module,
    *,
    lr: float,
    head_lr: float = HEAD_LEARNING_RATE,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
) -> list[dict[str, Any]]:
    """Groups the parameters of a :class:`VIDTask`, as ``param_group_fn`` of timm's optimizers.

    The groups are timm's own for weight decay and layer decay; those of the heads have an
    ``lr_scale``, which timm's schedulers multiply the rate with::

        create_optimizer_v2(module, "adamw", lr=lr, param_group_fn=partial(param_groups_vid, lr=lr))

    Args:
        model: what ``VIDTask.get_trainable_module()`` returns.
        lr: the optimizer's learning rate, above 0.
        head_lr: the heads'.
        weight_decay: of weight matrices.
        layer_decay: as timm's ``--layer-decay``.
        layer_decay_min_scale: as timm's.
        layer_decay_no_opt_scale: as timm's.

    Raises:
        ValueError: if a rate is not above 0.
    """
    for name, rate in (("lr", lr), ("head_lr", head_lr)):
        if not rate > 0:
            raise ValueError(f"param_groups_vid, {name}: expected a rate above 0; got {rate}.")
    module: Any = unwrap_model(model)
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
