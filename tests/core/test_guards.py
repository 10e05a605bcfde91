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
    """Changes its buffers and numbers in each way there is, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("sizes", torch.zeros(0))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("expanded", torch.zeros(1).expand(3))  # nothing can be written to it
        self.longest, self.share = 0, 0.5
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        self.steps += 1  # in place
        self.sizes.resize_(len(x)).fill_(1)  # in place and of another size
        self.seen = x.mean(0)  # anew
        self.hidden = self.hidden * 2
        self.longest, self.share = max(self.longest, len(x)), self.share / 2
        return self.layer(x)


@pytest.mark.parametrize("raises", [False, True])
def test_buffers_and_numbers_are_put_back(raises):
    model = Counter()
    state, buffers = copy.deepcopy(dict(model.named_buffers())), dict(model.named_buffers())
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
        assert buffer is buffers[name]  # DDP may hold it
        assert torch.equal(buffer, state[name])
    assert (model.longest, model.share) == (0, 0.5)


class BuildsOnce(nn.Module):
    """Builds what it needs in its first forward, and remembers that it did."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", None)
        self.built = False

    def forward(self, x):
        if not self.built:
            self.table = torch.ones(2)
            self.register_buffer("late", torch.ones(2))
            self.register_forward_hook(lambda module, args, output: output + 1)
            self.built = True
        return x * self.table * self.late


def test_what_a_module_builds_once_is_not_taken_back_in_part():
    model, x = BuildsOnce(), torch.ones(3, 2)
    with undisturbed(model):
        model(x)
    for _ in range(2):
        assert torch.equal(model(x), x + 1)


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
