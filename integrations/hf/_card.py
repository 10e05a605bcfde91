"""What a distilled student's model card says of its distillation."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from vid_loss.distiller import Distiller
from vid_loss.losses.stats import METRICS
from vid_loss.names import module_key

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # it is given its Trainer where it is mixed in

_HOME = "https://github.com/vid-loss/vid-loss"
_PAPER = "https://arxiv.org/abs/1904.05835"


class ModelCardMixin(_Base):
    """Has the Trainer's model card, which ``push_to_hub`` sends, say what was distilled."""

    teacher: nn.Module

    @property
    def distiller(self) -> Distiller | None:
        """The transfer terms, if there are any."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the Trainer's model card, with teacher, pairs and diagnostics in it."""
        super().create_model_card(*args, **kwargs)
        if self.distiller is None or not self.is_world_process_zero():
            return
        card = Path(str(self.args.output_dir), "README.md")
        before, title, after = card.read_text(encoding="utf-8").partition("\n## Training procedure")
        section = "\n".join(_section(self.distiller, self.teacher))
        card.write_text(f"{before}\n{section}\n{title}{after}", encoding="utf-8")


def _section(distiller: Distiller, teacher: nn.Module) -> list[str]:
    found = distiller.metrics()
    titles = ["student layer", "teacher layer", "loss", "lambda", "last value"]
    titles += [metric.replace("_", " ") for metric in METRICS]
    rows = []
    for name, pair in distiller.pairs.items():
        loss = type(distiller.losses[module_key(name)]).__name__
        term = distiller.terms.get(name)
        values = ["" if term is None else f"{float(term):.4g}"]
        values += [f"{found[key]:.4g}" if (key := f"{x}/{name}") in found else "" for x in METRICS]
        layers = [f"`{pair.student}`", f"`{pair.teacher}`"]
        rows.append([*layers, loss, f"{distiller.weights[name]:g}", *values])
    return [
        "## Distillation",
        "",
        f"Trained with [vid-loss]({_HOME}) {metadata.version('vid-loss')}, by [Variational "
        f"Information Distillation]({_PAPER}): to the task loss, each pair of layers adds lambda "
        f"times its loss. The teacher is {_name(teacher)}.",
        "",
        *(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows]),
        "",
        "The last three are means over the last batches of training: the part of the teacher's "
        "feature that is predicted from the student's, the information transferred, and channels "
        "that are predicted exactly.",
        "",
    ]


def _name(teacher: nn.Module) -> str:
    """What it was loaded as, unless that is a folder of somebody's, its class and its size."""
    config: Any = getattr(teacher, "config", None)
    given = getattr(config, "_name_or_path", None)
    size = sum(parameter.numel() for parameter in teacher.parameters())
    described = f"a {type(teacher).__name__} of {size:,} parameters"
    public = isinstance(given, str) and given and not Path(given).exists()
    return f"`{given}`, {described}" if public else described
