"""A resume whose heads are missing, new, or loaded with what they are in."""

import copy

import pytest
from _models import cnn_pair, images
from _three_lines import Script
from torch.optim import SGD, Adagrad, Adam, AdamW

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss

pytestmark = pytest.mark.usefixtures("no_hooks_of_other_tests")


def checkpoint_of(script):
    script.steps(3)
    return copy.deepcopy(
        {
            "student": script.student.state_dict(),
            "optimizer": script.optimizer.state_dict(),
            "distiller": script.distiller.state_dict(),
        }
    )


@pytest.mark.parametrize(
    ("optimizer", "options"), [(SGD, {"momentum": 0.9}), (Adam, {}), (AdamW, {"fused": True})]
)
def test_a_resume_that_forgets_the_heads_is_refused_until_they_are_loaded(optimizer, options):
    saved = checkpoint_of(Script(optimizer, **options))
    resumed = Script(optimizer, seed=1, **options)
    resumed.student.load_state_dict(saved["student"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"distiller.load_state_dict\(checkpoint\["):
            resumed.steps(1)
    resumed.distiller.load_state_dict(saved["distiller"])
    resumed.steps(3)


def test_a_resume_with_heads_that_are_meant_to_be_new():
    saved = checkpoint_of(Script(Adam))
    resumed = Script(Adam, seed=1)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    for p in resumed.distiller.parameters():
        resumed.optimizer.state.pop(p, None)
    resumed.steps(2)


@pytest.mark.parametrize("way", ["model", "losses", "strict=False"])
def test_heads_loaded_with_what_they_are_in(way):
    script = Script(Adam)
    saved = checkpoint_of(script)
    resumed = Script(Adam, seed=1)
    model = DistillationModel(resumed.student, resumed.distiller)
    whole = DistillationModel(script.student, script.distiller).state_dict()
    if way == "strict=False":  # the student's alone: nothing of the heads
        model.load_state_dict({k: v for k, v in whole.items() if "student" in k}, strict=False)
        resumed.optimizer.load_state_dict(saved["optimizer"])
        with pytest.raises(RuntimeError, match="got new ones beside a state"):
            resumed.steps(1)
    if way == "losses":
        resumed.distiller.losses.load_state_dict(script.distiller.losses.state_dict())
    else:
        model.load_state_dict(whole)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.steps(2)


def test_a_state_that_is_not_of_a_checkpoint():
    script = Script(add=False)
    parameters = [*script.student.parameters(), *script.distiller.parameters()]
    script.optimizer = Adagrad(parameters, initial_accumulator_value=0.1)  # has one from the start
    script.steps(2)


def test_trained_losses_in_a_new_distiller():
    script = Script(Adam, pairs=[Pair("fc", "fc", loss=VIDLoss((8, 3), (8, 3)))])
    script.steps(2)
    loss = next(iter(script.distiller.losses.values()))
    script.distiller = Distiller(
        script.student, cnn_pair()[1], [Pair("fc", "fc", loss=loss)], example=images()
    )
    script.steps(2)
