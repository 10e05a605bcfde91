"""The paper's tables, and smaller ones for two CPU cores or a GPU: data, models, rows, columns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paper.methods import TABLE_1, TABLE_2, Layers

from .grids import CLIP_ART, Choice


@dataclass(frozen=True)
class Plan:
    """A table on a data set.

    Args:
        table: its number in the paper.
        dataset: the students'.
        teacher_dataset: the teacher's; None is ImageNet, with published weights.
        student: a model's name.
        finetuned: which model is finetuned from published weights, if there are none of the
            student; None is the student.
        teacher: a model's name.
        methods: the rows.
        regimes: the columns, images (in 1b labels) per class; None is all.
        recipe: fields of the runs' Settings.
        teacher_recipe: the same for what is trained on the teacher's data set.
        images_per_class: in 1b, with and without labels; None is all.
        held_out_images: how many validate, of all classes together and with those that no student
            is given; None is a fifth of what a student is given, as in the paper.
        search_seeds: hyper-parameters are chosen on the mean validation accuracy of these.
        test_seeds: of the runs that are reported.
        grids: choices of some methods in place of :data:`~paper.tables.grids.GRIDS`.
        step_seconds: of a student alone, and with its teacher, for estimates.
        estimate: where those come from.
    """

    table: str
    dataset: str
    teacher_dataset: str | None
    student: str
    teacher: str
    methods: tuple[str, ...]
    regimes: tuple[int | None, ...]
    recipe: Mapping[str, Any]
    step_seconds: tuple[float, float]
    estimate: str
    teacher_recipe: Mapping[str, Any] = field(default_factory=dict)
    finetuned: str | None = None
    images_per_class: int | None = None
    held_out_images: int | None = None
    search_seeds: tuple[int, ...] = (100,)
    test_seeds: tuple[int, ...] = (0, 1, 2)
    grids: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)


_ASSUMED = "assumed for one current GPU, from the models' operations at 8 TFLOP/s; not measured"
_MEASURED = "about the processor time of a run of MI on one core; a shared machine takes longer"
_GPU_STUDENTS = {"2a": "resnet18", "2b": "vgg9"}
_METHODS_1B = ("kd", "fitnet", "at", "mi", "kd+at", "kd+mi")  # the paper has no others

PAPER_1 = Plan(
    table="1a",
    dataset="cifar10",
    teacher_dataset="cifar10",
    student="wrn-16-1",
    teacher="wrn-40-2",
    methods=TABLE_1,
    regimes=(100, 500, 1000, None),
    recipe={"epochs": 200, "batch_size": 128, "lr": 0.1},
    teacher_recipe={"epochs": 200, "batch_size": 128, "lr": 0.1},
    step_seconds=(0.012, 0.030),
    estimate=_ASSUMED,
)
PAPER_2 = Plan(
    table="2a",
    dataset="mit67",
    teacher_dataset=None,
    student="resnet18",
    teacher="resnet34",
    methods=TABLE_2,
    regimes=(10, 25, 50, None),
    recipe={"epochs": 100, "batch_size": 64, "lr": 0.05},
    step_seconds=(0.045, 0.075),
    estimate=_ASSUMED,
)
# For two CPU cores: a pair a tenth as large, whose stems have stride 2, and 500 steps of 32 images.
SMALL_1 = Plan(
    table="1a",
    dataset="fashion-mnist",
    teacher_dataset="fashion-mnist",
    student="wrn-10-1-s2",
    teacher="wrn-16-2-s2",
    methods=("student", "kd", "fitnet", "at", "mi", "kd+mi"),
    regimes=(10, 30, 100),
    recipe={"epochs": 10, "steps_per_epoch": 50, "batch_size": 32, "lr": 0.1},
    teacher_recipe={"epochs": 6, "steps_per_epoch": 250, "batch_size": 64, "lr": 0.1},
    held_out_images=1000,
    search_seeds=(100, 101),
    step_seconds=(0.016, 0.045),
    estimate=_MEASURED,
)
SMALL_2 = replace(
    SMALL_1,
    table="2a",
    dataset="digits",
    methods=TABLE_2,
    regimes=(5, 10, 25),
    recipe={**SMALL_1.recipe, "steps_per_epoch": 30},
    search_seeds=(100,),
)
# ImageNet's weights for coloured pictures; timm's test_resnet has 0.4 million parameters.
SMALL_2_IMAGENET = replace(
    SMALL_2,
    dataset="openclipart",
    teacher_dataset=None,
    student="test_resnet",
    teacher="tf_efficientnet_lite0",
    finetuned="tf_efficientnet_lite0",
    regimes=(5, 10),
    recipe={
        "epochs": 10,
        "steps_per_epoch": 60,
        "batch_size": 16,
        "lr": 0.05,
        "channels_last": True,
        # Stages whose maps have one size; of the teacher's seven, those that are halved next.
        "layers": Layers(
            (
                ("layer1", "blocks.1"),
                ("layer2", "blocks.2"),
                ("layer3", "blocks.4"),
                ("layer4", "blocks.6"),
            ),
            ("fc", "classifier"),
        ),
    },
    held_out_images=300,
    grids=CLIP_ART,
    step_seconds=(0.045, 0.09),
)
# For one GPU, the paper's students on the same pictures, twice as large; match_layers finds the
# teacher's same stages for each. What is finetuned is smaller than the teacher, as in the paper.
# The smallest class has 18 pictures for training, so that the last column is of all, as there.
GPU_2 = replace(
    SMALL_2_IMAGENET,
    dataset="openclipart-128",
    student="resnet18",
    teacher="tf_efficientnet_lite2",
    regimes=(5, 10, None),
    recipe={"epochs": 10, "steps_per_epoch": 100, "batch_size": 32, "lr": 0.05},
    step_seconds=(0.009, 0.02),
    estimate="assumed for one process alone on an H100; several beside each other share it",
)


def plan_of(table: str, preset: str, dataset: str | None = None) -> Plan:
    """Returns a table's plan.

    Args:
        table: 1a, 1b, 2a, 2b, 2c or 2d.
        preset: ``paper``, ``small`` for two CPU cores, or ``gpu`` for 2a and 2b on one GPU.
        dataset: another one than the table's.

    Raises:
        ValueError: if there is no such table for a preset.
    """
    if preset == "gpu":
        if table not in _GPU_STUDENTS:
            raise ValueError(
                f"--table: expected one of {', '.join(_GPU_STUDENTS)} with the preset 'gpu'; got "
                f"{table!r}. Choose --preset small."
            )
        student, dataset = _GPU_STUDENTS[table], dataset or GPU_2.dataset
        return replace(GPU_2, table=table, student=student, dataset=dataset)
    if table.startswith("1"):
        plan = replace(PAPER_1 if preset == "paper" else SMALL_1, table=table)
        if table == "1b":
            methods = tuple(x for x in _METHODS_1B if x in plan.methods)
            regimes = tuple(x for x in plan.regimes if x is not None)
            plan = replace(plan, methods=methods, regimes=regimes)
            if preset == "small":
                plan = replace(plan, images_per_class=500, search_seeds=(100,))
        return replace(plan, dataset=dataset, teacher_dataset=dataset) if dataset else plan
    if preset == "small" and dataset is not None and dataset.startswith("openclipart"):
        return replace(SMALL_2_IMAGENET, table=table, dataset=dataset)
    if preset == "small":
        return replace(SMALL_2, table=table, dataset=dataset or SMALL_2.dataset)
    plan = replace(PAPER_2, table=table)
    if table in ("2b", "2d"):
        plan = replace(plan, student="vgg9", step_seconds=(0.18, 0.21))
    if table in ("2c", "2d"):
        plan = replace(plan, dataset="cub200", regimes=(5, 10, 20, None))
    return replace(plan, dataset=dataset or plan.dataset)
