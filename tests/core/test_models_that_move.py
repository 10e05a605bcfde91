"""Students and teachers that are moved or pickled."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from _asserts import assert_same_state, state_of
from _distillers import PAIRS, make
from _models import cnn_pair, images
from torch import nn

import vid_loss
from vid_loss import DistillationModel, Distiller


def devices(model):
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


class TorchWithoutAutocast:
    """Autocast does not know the meta device. Not patched in torch itself: dynamo keeps lists."""

    is_autocast_enabled = staticmethod(lambda _: False)
    autocast = staticmethod(lambda *_, **__: nullcontext())

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def gpu(monkeypatch):
    """The meta device stands for one: nothing can be computed with a tensor of each."""
    for module in (vid_loss.teacher, vid_loss.losses._base, vid_loss.losses.vid):
        monkeypatch.setattr(module, "torch", TorchWithoutAutocast())


@pytest.mark.usefixtures("gpu")
def test_heads_and_teacher_follow_a_student_that_moves():
    student, teacher, distiller = make()
    student.to("meta")
    student(images().to("meta"))
    assert distiller(images().to("meta")).device.type == "meta"
    assert devices(distiller) == devices(teacher) == {"meta"}


@pytest.mark.usefixtures("gpu")
def test_a_teacher_that_was_elsewhere_stays_there():
    student, teacher, _ = make()
    student.to("meta")
    distiller = Distiller(
        student,
        teacher,
        PAIRS,
        example=images().to("meta"),
        teacher_inputs=lambda x: torch.zeros(x.shape),
    )
    student(images().to("meta"))
    assert distiller(images().to("meta")).device.type == "meta"
    assert devices(teacher) == {"cpu"}


def test_a_teacher_does_not_follow_inputs_that_leave_the_student_behind():
    _, teacher, distiller = make()
    with pytest.raises(RuntimeError, match="device"):
        distiller.teacher_features(images().to("meta"))
    assert devices(teacher) == {"cpu"}


@pytest.mark.parametrize(
    "give_away",
    [
        lambda model: model.to("meta"),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.to("meta").to_empty(device="cpu"),
        lambda model: model.apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None),
    ],
    ids=["meta", "empty", "meta, then empty", "reset"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["DistillationModel", "Distiller"])
def test_what_a_student_is_given_away_by_leaves_the_teacher_its_weights(give_away, whole):
    student, teacher, distiller = make()
    before = state_of(teacher)
    give_away(DistillationModel(student, distiller) if whole else distiller)
    assert_same_state(teacher, before)


@pytest.mark.parametrize("cast", [lambda x: x.double(), lambda x: x.to(torch.float64)])
def test_a_teacher_is_cast_with_the_heads(cast):
    student, teacher, distiller = make()
    cast(DistillationModel(student, distiller))
    student(images().double())
    assert distiller(images().double()).dtype == torch.float64
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}


class Bank(nn.Module):
    """A teacher with buffers alone, as a bank of filters is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.randn(8, 1, 3, 3))
        self.out = nn.Identity()

    def forward(self, x):
        return self.out(nn.functional.conv2d(x, self.filters, padding=1))


def test_a_teacher_without_parameters_moves_too():
    student = cnn_pair()[0]
    distiller = Distiller(student, Bank(), {"stage1": "out"}, example=images())
    DistillationModel(student, distiller).double()
    student(images().double())
    assert distiller(images().double()).dtype == torch.float64


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save({"model": model}, buffer)
    size = buffer.tell()
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["model"], size


@pytest.mark.parametrize("steps", [0, 1])
def test_a_whole_model_in_a_file_evaluates_and_has_no_teacher_in_it(steps):
    student = cnn_pair()[0]
    teacher = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Flatten(), nn.Linear(512, 2000))
    distiller = Distiller(student, teacher, {"stage1": "0"}, example=images())
    model = DistillationModel(student, distiller)
    for _ in range(steps):
        model(images())
    loaded, size = saved_and_loaded(model)
    assert size < 100_000  # the teacher has 4 MB
    assert_same_state(loaded, state_of(model))
    torch.testing.assert_close(loaded.eval()(images()), model.eval()(images()))
    loaded.to(torch.float64).distiller.close()
    copy.deepcopy(loaded).eval()(images().double())
    for call in (
        lambda: loaded.train()(images().double()),
        lambda: loaded.distiller(images()),
        lambda: loaded.distiller.teacher_features(images()),
        lambda: loaded.distiller.student,
    ):
        with pytest.raises(RuntimeError, match=r"ddp_spawn: inside the function that is spawned"):
            call()
    again = Distiller(loaded.student.float(), teacher, {"stage1": "0"}, example=images())
    again.load_state_dict(pickle.loads(pickle.dumps(distiller)).state_dict())
    assert_same_state(again, state_of(distiller))
