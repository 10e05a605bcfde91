"""Which layers of two models fit together."""

import logging
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss.losses import VIDLoss
from vid_loss.pairs import Pair
from vid_loss.teacher import Inputs, as_call, check_teacher_inputs

from ._grids import Grids, find_grids
from ._left_out import frozen_layers, other_parts
from ._matched import Choice, MatchedPairs
from ._stages import Size, Stages, find_stages, map_layout
from ._table import Layer, LayerTable, list_layers

_log = logging.getLogger(__name__)


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    example: Inputs,
    max_pairs: int = 4,
    *,
    teacher_inputs: Callable[..., Inputs] | None = None,
) -> MatchedPairs:
    """Chooses pairs of layers from what both models do with an example.

    Ends of stages that have a resolution are paired by it. Blocks of tokens are paired by
    relative depth, and so are stages whose resolutions do not agree; the tokens of an image meet
    a map as a grid. If nothing of this fits, the student's penultimate layer learns the teacher's
    logits. It is a start to reason from, not a search: print the result, which has a reason for
    each pair and what was left out (also logged, at level INFO), and change it as any list.
    Left out are frozen layers of the student and, of a model of several parts, all but one.

    Args:
        student: the model that is trained.
        teacher: the model that is learnt from.
        example: a batch of the student's inputs, as for :class:`~vid_loss.Distiller`; one sample
            is enough.
        max_pairs: the most pairs to choose; of more stages, the deepest are taken.
        teacher_inputs: as for :class:`~vid_loss.Distiller`.

    Returns:
        A list of :class:`~vid_loss.Pair`, from the input's side to the output's.

    Raises:
        TypeError: if the example is none of the three forms.
        ValueError: if ``max_pairs`` is below 1 or nothing fits.

    Example:
        >>> import torch
        >>> student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> match_layers(student, teacher, torch.zeros(1, 4))
        :input->1: no common stages; 4 penultimate channels learn 3 logits
    """
    if not isinstance(max_pairs, int) or max_pairs < 1:
        raise ValueError(
            f"match_layers, max_pairs: expected 1 or more; got {max_pairs!r}. Leave it out for 4."
        )
    check_teacher_inputs("match_layers", teacher_inputs)
    args, kwargs = as_call(example, "match_layers, example")
    inputs = example if teacher_inputs is None else teacher_inputs(*args, **kwargs)
    examples = _three_samples(example), _three_samples(inputs)
    tables = list_layers(student, examples[0]), list_layers(teacher, examples[1])
    stages = find_stages(tables[0]), find_stages(tables[1])
    choices = _by_size(*stages, max_pairs) or _by_depth(*stages, max_pairs)
    left_out = _parts_left_out(stages, tables) if choices else []
    choices = choices or _outputs(*tables)
    if not choices:
        raise ValueError(
            "match_layers: expected stages, blocks of tokens or output layers that fit together; "
            "got none. Choose the pairs yourself from list_layers(model, example)."
        )
    frozen = frozen_layers(student, examples[0], [pair.student for pair, _ in choices])
    left_out += [
        f"{pair.label}, as nothing in or before the student's {pair.student} is trained"
        for pair, _ in choices
        if pair.student in frozen
    ]
    matched = MatchedPairs((x for x in choices if x[0].student not in frozen), left_out)
    for line in repr(matched).splitlines():
        _log.info(line)
    return matched


def _parts_left_out(stages: Sequence[Stages], tables: Sequence[LayerTable]) -> list[str]:
    return [
        f"{part} of the {owner}, another part"
        for owner, own, table in zip(("student", "teacher"), stages, tables, strict=True)
        for part in other_parts(own, table)
    ]


def _three_samples(inputs: Inputs) -> Inputs:
    """At least three samples: they tell features from tables of positions and layers' states.

    A recurrent layer's ``h_n`` of one or two layers would pass for a feature of so many samples.
    """
    args, kwargs = as_call(inputs, "match_layers, teacher_inputs")
    batched = [x for x in (*args, *kwargs.values()) if _length(x)]
    missing = 3 - _length(batched[0]) if batched else 0

    def extend(value: Any) -> Any:
        if missing <= 0 or _length(value) + missing != 3:
            return value
        if isinstance(value, Tensor):
            return torch.cat([value, *[value[:1]] * missing])
        return value + value[:1] * missing

    return {key: extend(value) for key, value in kwargs.items()} or tuple(map(extend, args))


def _length(value: Any) -> int:
    is_batch = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
    return len(value) if is_batch else 0


def _by_size(student: Stages, teacher: Stages, max_pairs: int) -> list[Choice]:
    """Stages of one resolution, if at least half of the fewer stages have one."""
    if not student.kind == teacher.kind == "map":
        return []
    ends = student.by_size(), teacher.by_size()
    sizes = [(size, near) for size in ends[0] for near in ends[1] if _meet(size, near, ends[1])]
    if not sizes or 2 * len(sizes) < min(map(len, ends)):
        return []
    choices = []
    for size, near in sizes[-max_pairs:]:
        pair = _pair((student, ends[0][size]), (teacher, ends[1][near]), (None, None))
        where = " and ".join(f"{height} x {width}" for height, width in dict.fromkeys((size, near)))
        if pair is not None:
            choices.append((pair, f"stages end at {where}"))
    return choices


def _meet(size: Size, other: Size, others: Container[Size]) -> bool:
    """Whether two resolutions are the same, but for strides that round up or down."""
    if size in others:
        return size == other
    return max(abs(size[0] - other[0]), abs(size[1] - other[1])) == 1


def _by_depth(student: Stages, teacher: Stages, max_pairs: int) -> list[Choice]:
    """Stages and blocks of equal relative depth, counted in the model that has fewer."""
    grids = find_grids(student, teacher)
    depths = len(student.ends), len(teacher.ends)
    if grids is None:
        return []
    count = min(max_pairs, *depths)
    choices = []
    for step in range(1, count + 1):
        position = -(-step * min(depths) // count)
        # Half is rounded up: to the even one, two positions could meet.
        at = [math.floor(position * depth / min(depths) + 0.5) for depth in depths]
        ends = (student, student.ends[at[0] - 1]), (teacher, teacher.ends[at[1] - 1])
        where = f"{student.unit} {at[0]} of {depths[0]} and {teacher.unit} {at[1]} of {depths[1]}"
        reason = f"relative depth {position / min(depths):.2f}, {where}"
        grid = grids[0] or grids[1]
        reason += f"; tokens as a {grid.height} x {grid.width} grid" if grid else ""
        pair = _pair(*ends, grids)
        if pair is not None:
            choices.append((pair, reason))
    return choices


def _pair(
    student: tuple[Stages, Layer], teacher: tuple[Stages, Layer], grids: Grids
) -> Pair | None:
    """A pair of two ends, unless they do not fit together."""
    dims = [
        1 if end.is_signal else map_layout(end.shape, stages.image)[1]
        for stages, end in (student, teacher)
        if stages.kind == "map"
    ]
    if len(dims) == 1:
        dims = [*dims, None] if student[0].kind == "map" else [None, *dims]
    pair = Pair(
        student[1].name,
        teacher[1].name,
        channel_dim=(dims[0], dims[1]) if any(dims) else None,
        student_transform=grids[0],
        teacher_transform=grids[1],
    )
    return pair if _fits(pair, _shape(student[1]), _shape(teacher[1])) else None


def _shape(end: Layer) -> tuple[int, ...]:
    """The shape that the layer returns, of a signal as well."""
    is_map = end.is_signal and len(end.shape) == 4
    return (*end.shape[:2], end.shape[3]) if is_map else end.shape


def _fits(pair: Pair, student: tuple[int, ...], teacher: tuple[int, ...]) -> bool:
    """Whether a pair takes features of these shapes, tried without their values."""
    with torch.device("meta"):
        try:
            features = pair.prepare(torch.empty(student), torch.empty(teacher), first=True)
            VIDLoss(*(feature.shape for feature in features)).matched(*features)
        except ValueError:
            return False
    return True


def _outputs(student: LayerTable, teacher: LayerTable) -> list[Choice]:
    """The paper's MI-L, where there are no stages to pair."""
    ends = _output_layer(student), _output_layer(teacher)
    if ends[0] is None or ends[1] is None:
        return []
    pair = Pair(f"{ends[0].path}:input", ends[1].name)
    if not _fits(pair, ends[0].input_shape, ends[1].shape):
        return []
    widths = ends[0].input_shape[-1], ends[1].shape[-1]
    return [(pair, f"no common stages; {widths[0]} penultimate channels learn {widths[1]} logits")]


def _output_layer(table: LayerTable) -> Layer | None:
    """The last layer with weights of its own that maps vectors to vectors."""
    for layer in reversed(table):
        is_vector = len(layer.shape) == len(layer.input_shape) == 2
        is_vector = is_vector and layer.shape[:1] == table.input_shape[:1]
        if is_vector and layer.size and not layer.is_block and not layer.note:
            return layer
    return None
