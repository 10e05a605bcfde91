"""Loss and heads alone: against other implementations, and how they grow."""

import pytest
import torch
from _tasks import NETWORKS, Heads, Task, pairs
from torch import nn
from torchdistill.losses.mid_level import VIDLoss as TorchdistillLoss
from torchdistill.models.wrapper import Regressor4VID

from vid_loss import VIDLoss
from vid_loss.losses.gaussian import gaussian_nll


def _plain(mean, target, var):
    """The formula as it is usually written: a map for each operation."""
    var = var.view(1, -1, 1, 1)
    return 0.5 * ((mean - target) ** 2 / var + torch.log(var)).mean()


@pytest.fixture(scope="module", params=NETWORKS)
def heads(request):
    return _heads(request.param, "all-stages")


def _heads(network, which):
    return Heads(Task(network, pairs(network, which), batch={"wrn": 128, "resnet": 16}[network]))


def bench_plain_formula_alone_over_ours_alone(compare, heads):
    """On predictions that are there already."""
    made = []
    for name, pair in heads.distiller.pairs.items():
        student, teacher = heads.features(pair)
        loss = heads.distiller.vid_losses()[name]
        made.append((loss.head(student).detach().requires_grad_(), teacher, loss.variance))

    def plain():
        sum(_plain(mean, target, variance()) for mean, target, variance in made).backward()

    def ours():
        sum(gaussian_nll(mean, target, variance()) for mean, target, variance in made).backward()

    compare(plain, ours, rounds=60)


def bench_plain_formula_over_ours(compare, heads):
    """The same heads, with the plain formula."""
    losses = heads.distiller.vid_losses()

    def plain():
        total = 0
        for name, pair in heads.distiller.pairs.items():
            student, teacher = heads.features(pair)
            loss = losses[name]
            total = total + _plain(loss.head(student), teacher, loss.variance())
        total.backward()

    compare(plain, heads.ours, rounds=60)


@pytest.mark.parametrize("which", ["all-stages", "quarter"])
@pytest.mark.parametrize("network", NETWORKS)
def bench_torchdistill_over_ours(compare, network, which):
    """Its regressor of three convolutions and its loss, on all positions."""
    heads = _heads(network, which)
    device = next(heads.distiller.parameters()).device
    regressors = nn.ModuleDict()
    config = {}
    for i, pair in enumerate(heads.distiller.pairs.values()):
        student, teacher = (x.shape[1] for x in heads.features(pair))
        regressors[str(i)] = Regressor4VID(student, teacher, teacher, 1e-5, 5.0).to(device)
        config[str(i)] = {
            "student": {"io": "output", "path": str(i)},
            "teacher": {"io": "output", "path": str(i)},
        }
    loss = TorchdistillLoss(config)

    def theirs():
        student, teacher = {}, {}
        for i, pair in enumerate(heads.distiller.pairs.values()):
            mine, other = heads.features(pair)
            student[str(i)] = {"output": regressors[str(i)](mine)}
            teacher[str(i)] = {"output": other}
        loss(student, teacher).backward()

    compare(theirs, heads.ours, rounds=60)


def bench_maps_kept_for_backward(count):
    """In maps of the teacher's size, counted: what the head and the loss keep of one pair."""
    student = torch.randn(8, 16, 32, 32, requires_grad=True)
    teacher = torch.randn(8, 32, 32, 32)
    ours = VIDLoss(student.shape, teacher.shape)
    theirs = Regressor4VID(16, 32, 32, 1e-5, 5.0)
    count(
        ours=_maps_kept(lambda: ours(student, teacher), student, teacher),
        plain_formula=_maps_kept(
            lambda: _plain(ours.head(student), teacher, ours.variance()), student, teacher
        ),
        torchdistill=_maps_kept(lambda: _plain(*_swap(theirs(student), teacher)), student, teacher),
    )


def _swap(prediction, teacher):
    mean, var = prediction
    return mean, teacher, var.flatten()


def _maps_kept(forward, student, teacher) -> float:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = forward()
    kept.pop(student.untyped_storage().data_ptr(), None)
    kept.pop(teacher.untyped_storage().data_ptr(), None)
    assert value.requires_grad
    return sum(kept.values()) / teacher.nbytes


BASE = {"batch": 16, "student": 32, "teacher": 64, "size": 16, "pairs": 1}


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("what", ["batch", "channels", "resolution", "pairs"])
def bench_growth(compare, what, factor):
    """How many times as long for a feature that has so many times the elements."""
    grown = dict(BASE)
    for name in {"channels": ("student", "teacher"), "resolution": ("size",)}.get(what, (what,)):
        grown[name] *= factor
    # The convolutions' multiplications grow with the square of the channels.
    elements = factor**2 if what == "resolution" else factor
    compare(_run(**grown), _run(**BASE), rounds=40, elements=elements, what=what)


def _run(batch, student, teacher, size, pairs):
    torch.manual_seed(0)
    made = []
    for _ in range(pairs):
        ours = torch.randn(batch, student, size, size, requires_grad=True)
        other = torch.randn(batch, teacher, size, size)
        made.append((VIDLoss(ours.shape, other.shape), ours, other))

    def run():
        sum(loss(ours, other) for loss, ours, other in made).backward()

    return run
