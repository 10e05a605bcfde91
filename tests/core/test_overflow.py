"""Teachers and students whose features are not finite."""

import pytest
import torch
import torch.nn.functional as F
from _distillers import LABELS, make
from _models import TokenNet, images

from vid_loss import DistillationModel, Distiller, FitNetLoss, KDLoss, Pair
from vid_loss.terms import _finite


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
