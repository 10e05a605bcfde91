"""Students and teachers that are moved, pickled, or run twice; teachers that overflow."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, state_of
from _models import TokenNet, cnn_pair, images
from torch import nn

import vid_loss
from vid_loss import DistillationModel, Distiller, FitNetLoss, KDLoss, Pair, _finite

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def make(pairs=PAIRS, **options):
    student, teacher = cnn_pair()
    return student, teacher, Distiller(student, teacher, pairs, example=images(), **options)


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


A, B = images(), images() * 3


def crossed(student, distiller):
    student(A)
    student(B)
    return distiller(A)


def crossed_slices(student, distiller):
    student(A[:4])
    student(A[4:])
    return distiller(A[:4])


def crossed_teacher_first(student, distiller):
    features = distiller.teacher_features(A)
    student(A)
    student(B)
    return distiller(teacher_features=features)


def crossed_by_an_adversarial_batch(student, distiller):
    student(A)
    student((A + 0.5).requires_grad_())
    return distiller(A)


def crossed_with_the_last_step(student, distiller):
    student(A)
    distiller(A)
    student(B)
    return distiller(A)


def crossed_at_another_size(student, distiller):
    student(A[:4])
    student(B)
    return distiller(A[:4])


@pytest.mark.parametrize(
    "step",
    [
        crossed,
        crossed_slices,
        crossed_teacher_first,
        crossed_by_an_adversarial_batch,
        crossed_at_another_size,
        crossed_with_the_last_step,
    ],
)
def test_the_batch_of_a_forward_before_the_last_is_refused(step):
    student, _, distiller = make()
    with pytest.raises(RuntimeError, match=r"student has run forward on another batch since it"):
        step(student, distiller)
    student(A)  # and what is right goes on
    assert torch.isfinite(distiller(A))


def other_batch_first(student, distiller):
    student(B)
    student(A)
    return distiller(A)


def same_batch_twice(student, distiller):
    student(A)
    student(A)
    return distiller(A)


def in_turn(student, distiller):
    student(B)
    distiller(B)
    student(A)
    return distiller(A)


def a_clone_on_purpose(student, distiller):
    student(A.clone())
    student(B)
    student(A)
    return distiller(A.clone())


def unrecorded_between(student, distiller):
    student(A)
    with torch.no_grad():
        student(B)
    student.eval()(B)
    student.train()
    return distiller(A)


def teacher_on_both_first(student, distiller):
    of_a, _ = distiller.teacher_features(A), distiller.teacher_features(B)
    student(B)
    student(A)
    return distiller(teacher_features=of_a)


@pytest.mark.parametrize(
    "step",
    [
        a_clone_on_purpose,
        other_batch_first,
        same_batch_twice,
        in_turn,
        unrecorded_between,
        teacher_on_both_first,
    ],
)
def test_several_forwards_whose_last_is_the_one_that_is_meant(step):
    student, _, distiller = make()
    student(A)
    expected = copy.deepcopy(DistillationModel(student, distiller))(A)[1]
    # Its estimates are those of the first batch that it sees.
    if step is in_turn:
        assert torch.isfinite(step(student, distiller))
    else:
        torch.testing.assert_close(step(student, distiller), expected)


def test_remembering_batches_keeps_none_of_them():
    student, _, _distiller = make()
    batch = images().clone()
    alive = torch.multiprocessing.reductions.StorageWeakRef(batch.untyped_storage())
    student(batch)
    student(images())
    del batch
    assert alive.expired()


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


def overflow(teacher, layer, where=(0, 0), value=torch.inf):
    """From now on that layer has such a value; returns what makes it stop."""

    def hook(module, args, output):
        output = output.clone()
        output[where] = value
        return output

    return teacher.get_submodule(layer).register_forward_hook(hook, prepend=True).remove


LOSSES = {
    "vid": Pair("stage2", "stage2"),
    "fitnet": Pair("stage2", "stage2", loss=FitNetLoss),
    "kd": Pair("fc", "fc", loss=KDLoss()),
}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("pair", LOSSES.values(), ids=LOSSES)
def test_a_teacher_that_overflows_is_named_at_once_on_the_cpu(pair, value):
    student, teacher, distiller = make([Pair("stage1", "stage1"), pair])
    overflow(teacher, pair.teacher, value=value)
    student(images())
    message = rf"{pair}: expected finite features .* its layer '{pair.teacher}'"
    with pytest.raises(RuntimeError, match=message):
        distiller(images())


@pytest.fixture
def pending(monkeypatch):
    """The CPU as a device whose answers arrive when the test says so."""
    arrived = []

    def copy_to_host(flags):
        return lambda: [n for n, flag in flags.items() if flag] if arrived else None

    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(_finite, "_copy_to_host", copy_to_host)
    return arrived


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("pair", LOSSES.values(), ids=LOSSES)
def test_on_a_gpu_such_a_batch_counts_for_nothing_and_a_later_call_says_so(pending, pair, value):
    student, teacher, distiller = make([Pair("stage1", "stage1"), pair])
    stop = overflow(teacher, pair.teacher, value=value)
    student(images())
    terms = distiller.weighted_terms(images())
    assert terms[pair.label] == 0
    assert terms["stage1->stage1"] > 0
    sum(terms.values()).backward()
    for model in (student, distiller):
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for loss in distiller.vid_losses().values():
        assert all(buffer.isfinite().all() for buffer in loss.buffers())
    stop()
    for _ in range(2):  # the answer is under way, and nobody waits
        student(images())
        assert distiller(images()) > 0
    pending.append(True)
    student(images())
    with pytest.raises(RuntimeError, match=rf"{pair}: expected finite features of the teacher"):
        distiller(images())


def test_diagnostics_wait_and_say_so_too(pending):
    student, teacher, distiller = make()
    student(images())
    distiller(images())
    distiller.diagnostics()
    overflow(teacher, "stage2")
    student(images())
    distiller(images())
    with pytest.raises(RuntimeError, match="Pair 'stage2' -> 'stage2': expected finite features"):
        distiller.diagnostics()


def test_a_compiled_model_has_no_gradient_of_such_a_batch():
    torch.compiler.reset()
    student, teacher, distiller = make()
    model = torch.compile(DistillationModel(student, distiller), backend="aot_eager")
    value = torch.zeros(())
    teacher.stage2[1].bias.data[0] = torch.inf
    output, transfer = model(images())
    value = F.cross_entropy(output, LABELS) + transfer
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match="Pair 'stage2' -> 'stage2': expected finite"):
        distiller.diagnostics()


@pytest.mark.parametrize("waits", [True, False])
def test_padding_may_be_anything(waits, request):
    if waits:
        request.getfixturevalue("pending").append(True)
    student, teacher = TokenNet(4), TokenNet(6)
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = {"input_ids": ids, "attention_mask": mask}
    distiller = Distiller(student, teacher, {"layer": "layer"}, example=batch)
    stop = overflow(teacher, "layer", where=(1, 5))
    for _ in range(3):
        student(**batch)
        assert distiller(**batch).isfinite()
    stop()
    overflow(teacher, "layer", where=(1, 3))
    with pytest.raises(RuntimeError, match="its layer 'layer'"):  # noqa: PT012  # a step or two later
        for _ in range(3):
            student(**batch)
            distiller(**batch)


def test_a_student_that_overflows_is_left_to_the_script():
    student, _, distiller = make()
    student.stage2[1].bias.data[0] = torch.inf
    student(images())
    assert not distiller(images()).isfinite()
