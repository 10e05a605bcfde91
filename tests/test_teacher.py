import pytest
import torch
from _asserts import assert_same_state, state_of
from _models import cnn_pair, images

from vid_loss import DistillationModel, Distiller


def transfer(distiller):
    _, value = DistillationModel(distiller.student, distiller)(images())
    value.backward()
    return value.detach()


@pytest.mark.parametrize("compiled", ["nothing", "teacher", "model"])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # two models of one class
def test_a_stopped_teacher_gives_the_same_loss_and_runs_no_layer_more(compiled):
    torch._dynamo.reset()
    values, later = [], []
    for stop in (False, True):
        student, teacher = cnn_pair()
        teacher.stage2.register_forward_hook(lambda *_, stop=stop: later.append(stop))
        wrapped = torch.compile(teacher) if compiled == "teacher" else teacher
        pairs = {"stage1": "stage1"}
        distiller = Distiller(student, wrapped, pairs, example=images(), stop_teacher=stop)
        model = DistillationModel(student, distiller)
        if compiled == "model":
            model = torch.compile(model)
        later.clear()
        _, value = model(images())
        value.backward()
        values.append((value.detach(), student.stage1[0].weight.grad))
        assert later == ([] if stop else [False])
    torch.testing.assert_close(values[0], values[1])


def test_a_stopped_teacher_is_read_at_its_last_layer_whatever_the_pairs_order():
    student, teacher = cnn_pair()
    pairs = {"fc:input": "fc:input", "stage1": "stage1"}
    stopped = Distiller(student, teacher, pairs, example=images(), stop_teacher=True)
    whole = Distiller(student, teacher, pairs, example=images())
    for layer, feature in whole.teacher_features(images()).items():
        torch.testing.assert_close(stopped.teacher_features(images())[layer], feature)


def test_a_stopped_teacher_still_serves_others_to_its_end():
    student, teacher = cnn_pair()
    expected = teacher.eval()(images())
    Distiller(student, teacher, {"stage1": "stage1"}, example=images(), stop_teacher=True)
    torch.testing.assert_close(teacher(images()), expected)


def test_an_error_of_the_teacher_is_not_taken_for_its_end():
    student, teacher = cnn_pair()
    pairs = {"stage2": "stage2"}
    distiller = Distiller(student, teacher, pairs, example=images(), stop_teacher=True)

    def fail(*_):
        raise ZeroDivisionError("of the user's")

    teacher.stage1.register_forward_hook(fail)
    student(images())
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        distiller(images())


def test_a_teacher_in_bfloat16_keeps_its_weights_and_comes_close():
    student, teacher = cnn_pair()
    state = state_of(teacher)
    pairs = {"stage2": "stage2"}
    low = Distiller(student, teacher, pairs, example=images(), teacher_dtype=torch.bfloat16)
    plain = Distiller(student, teacher, pairs, example=images())
    plain.load_state_dict(low.state_dict())
    assert low.teacher_features(images())["stage2"].dtype == torch.bfloat16
    torch.testing.assert_close(transfer(low), transfer(plain), rtol=1e-2, atol=0)
    assert_same_state(teacher, state)
