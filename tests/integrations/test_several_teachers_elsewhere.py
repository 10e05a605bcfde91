"""Two teachers as one in timm's task and in Lightning; test_several_teachers.py has the others."""

import pytest
import torch
from torch.testing import assert_close

from vid_loss import Distiller, Pair
from vid_loss.teachers import Teachers


@pytest.mark.parametrize("stop", [False, True])
def test_timm_feeds_each_teacher_in_its_own_normalization(stop):
    pytest.importorskip("timm")
    pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")
    from _timm import _batch, _model, _task

    def teachers():
        """Of other normalizations than the student's, and than each other's."""
        models = {"a": _model("resnet10t", seed=9), "b": _model("test_resnet", seed=8)}
        for model, mean in zip(models.values(), (0.1, 0.4), strict=True):
            model.pretrained_cfg = {**model.pretrained_cfg, "mean": (mean,) * 3, "std": (0.5,) * 3}
        return models

    layers = {"a": ("layer4", "layer4"), "b": ("layer3", "layer3")}
    given = Teachers(teachers())
    both = _task(
        teacher=given,
        pairs=[Pair(of_student, f"{name}.{layer}") for name, (of_student, layer) in layers.items()],
        stop_teacher=stop,
    )
    assert not given.inputs  # nothing is left in it
    found = both(*_batch())
    both.get_trainable_module().distiller.close()
    for name, (of_student, layer) in layers.items():
        alone = _task(teacher=teachers()[name], pairs=[Pair(of_student, layer)])
        heads = alone.get_trainable_module().distiller.losses
        of_both = both.get_trainable_module().distiller.losses[f"{of_student}->{name}/{layer}"]
        heads.load_state_dict({f"{of_student}->{layer}.{k}": x for k, x in start(of_both).items()})
        expected = alone(*_batch())
        assert_close(found[f"{of_student}->{name}.{layer}"], expected[f"{of_student}->{layer}"])


def start(loss):
    """The state of a loss as it was built: its head, and estimates of nothing."""
    fresh = type(loss)((1, loss.student_channels, 1, 1), (1, loss.teacher_channels, 1, 1))
    estimates = {k: x for k, x in fresh.state_dict().items() if not k.startswith("head.")}
    norms = {k: x for k, x in fresh.state_dict().items() if "running" in k or "num_batches" in k}
    return {**loss.state_dict(), **estimates, **norms}


def test_timm_s_own_inputs_of_a_teacher_come_before_its_normalization():
    pytest.importorskip("timm")
    pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")
    from _timm import _batch, _model, _task

    seen = []

    def mine(images):
        seen.append(images)
        return images

    model = _model("resnet10t", seed=9)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1,) * 3}
    teachers = Teachers({"a": model}, inputs={"a": mine})
    task = _task(teacher=teachers, pairs={"layer4": "a.layer4"})
    images, labels = _batch()
    task(images, labels)
    assert_close(seen[-1], images, rtol=0, atol=0)


def test_timm_leaves_a_wrapped_one_as_it_was_for_another_task_and_its_owner():
    pytest.importorskip("timm")
    pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")
    from _timm import _batch, _model, _task
    from timm.task import DistillationTeacher

    def wrapped():
        return DistillationTeacher(Teachers({"a": _model("resnet10t", seed=9)}))

    def task(teacher, mean):
        config = {"input_size": (3, 32, 32), "mean": (mean,) * 3, "std": (0.5,) * 3}
        return _task(teacher=teacher, pairs={"layer4": "a.layer4"}, data_config=config)

    teacher = wrapped()
    images, labels = _batch()
    before, model = teacher(images)["a"], teacher.model
    first, second = task(teacher, 0.1), task(teacher, 0.9)
    for one, mean in ((first, 0.1), (second, 0.9)):
        found = one(images, labels)["vid_loss"]
        assert torch.equal(found, task(wrapped(), mean)(images, labels)["vid_loss"])
    assert teacher.model is model
    assert torch.equal(teacher(images)["a"], before)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # advice on workers and the like
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")  # torch's own
def test_lightning_trains_with_two_as_a_plain_loop_does(monkeypatch):
    pytest.importorskip("lightning")
    import _lightning
    from _scripts import models, net

    def both(seed=0):
        torch.manual_seed(6)
        return models(seed)[0], Teachers({"a": models()[1], "b": net(6)})

    pairs = [Pair("3", "a.3"), Pair("0", "b.0", weight=0.5)]
    monkeypatch.setattr(_lightning, "models", both)
    monkeypatch.setattr(_lightning, "PAIRS", pairs)
    task, one = _lightning.Task(), _lightning.callback()
    _lightning.fit(task, one)
    student, distiller, _ = _lightning.plain_loop(list(_lightning.loader()) * 2)
    assert isinstance(one.distiller, Distiller)
    assert list(one.distiller.pairs) == ["3->a.3", "0->b.0"]
    _lightning.assert_equal(
        _lightning.states(task.model, one.distiller), _lightning.states(student, distiller)
    )
