"""What a forward of an example leaves behind: nothing, whatever the model counts or observes."""

import copy
import warnings

import pytest
import torch
from _asserts import assert_same_state, state_of
from _models import TinyCNN, cnn_pair, images
from torch import nn

from vid_loss import Distiller, list_layers
from vid_loss.guards import undisturbed


class Counter(nn.Module):
    """Changes its buffers and attributes in each way there is, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("sizes", torch.zeros(0))
        self.register_buffer("seen", None)
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.longest, self.cached, self.ready = 0, None, False
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        self.steps += 1  # in place
        self.sizes.resize_(len(x)).fill_(1)  # in place and of another size
        self.seen = x.mean(0)  # anew
        self.hidden = self.hidden * 2
        self.register_buffer("late", torch.ones(1))
        self.longest, self.cached, self.ready = len(x), x, True
        self.later = 3
        return self.layer(x)


@pytest.mark.parametrize("raises", [False, True])
def test_buffers_and_plain_attributes_are_put_back(raises):
    model = Counter()
    state, buffers = copy.deepcopy(dict(model.named_buffers())), dict(model.named_buffers())
    attributes = {key: vars(model)[key] for key in ("longest", "cached", "ready", "training")}
    try:
        with undisturbed(model):
            model(torch.ones(3, 2))
            assert model.steps == 1
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert list(dict(model.named_buffers())) == list(state)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]  # an optimizer or DDP may hold it
        assert torch.equal(buffer, state[name])
    assert model.seen is None
    assert {key: vars(model)[key] for key in attributes} == attributes
    assert not hasattr(model, "later")


def test_a_lazy_module_stays_initialized():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False))
    with undisturbed(model):
        model(torch.ones(4, 2))
    assert model[0].in_features == 2
    assert model[1].num_features == 3
    model(torch.randn(4, 2))


@pytest.mark.parametrize("build", ["Distiller", "list_layers"])
def test_the_observers_of_a_quantization_aware_student_see_no_example(build):
    quantization = pytest.importorskip("torch.ao.quantization")
    student, teacher = cnn_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        student.qconfig = quantization.get_default_qat_qconfig("x86")
        student = quantization.prepare_qat(student)
        student(images())
        state = state_of(student)
        if build == "Distiller":
            Distiller(student, teacher, {"stage1": "stage1"}, example=images() * 100)
        else:
            list_layers(student, images() * 100)
    assert_same_state(student, state)


def test_a_batch_norm_that_never_ran_counts_nothing():
    model = TinyCNN(4)
    state = state_of(model)
    with undisturbed(model):
        model.stage1[1].train()  # some models have a part that stays in train mode
        model(images())
    assert_same_state(model, state)
