"""What a training step waits for, counted where torch does it: values read, and other processes."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from _masks import Towers, batch_of, build, mask_of
from _models import TokenNet, cnn_pair, images
from torch.utils._python_dispatch import TorchDispatchMode

from vid_loss import (
    ATLoss,
    DistillationModel,
    Distiller,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    Pair,
    VIDLoss,
)
from vid_loss.losses import together
from vid_loss.optimizer import _averaged
from vid_loss.terms import _pair_terms

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
METHODS = ("tolist", "cpu", "numpy")  # which read the memory of a CPU themselves

MAPS = [
    Pair("stage1", "stage1"),
    Pair("stage2", "stage2", loss=FitNetLoss),
    Pair("stage2", "stage2", loss=ATLoss()),
    Pair("fc", "fc", loss=KDLoss()),
    Pair("fc:input", "fc", loss=LwFLoss),
    Pair("fc:input", "fc:input"),
    Pair("stage1", "stage1", loss=partial(VIDLoss, variance="trained"), name="paper"),
]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device, or a process for others."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if func.namespace == "c10d":
            self.seen["collective"] += 1
        elif name in READS or (name in ("index", "index_put", "index_put_") and _is_mask(args[1])):
            self.seen["value"] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(indices):
    return any(x is not None and x.dtype == torch.bool for x in indices)


def waits(student, distiller, batch, steps=4, monkeypatch=None):
    """What each training step waited for."""
    parameters = [*student.parameters(), *distiller.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    found = []
    for _ in range(steps):
        with monkeypatch.context() as patch, Waits() as mode:
            for name in METHODS:
                read = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, _counted(read, mode.seen))
            optimizer.zero_grad()
            student(**batch)
            distiller(**batch).backward()
            optimizer.step()
        found.append(mode.seen)
    return found


def _counted(read, seen):
    def method(*args, **kwargs):
        seen["value"] += 1
        return read(*args, **kwargs)

    return method


def maps(pairs=MAPS):
    student, teacher = cnn_pair()
    batch = {"images": images()}
    return student, Distiller(student, teacher, pairs, example=batch), batch


def masked(**options):
    batch = {**batch_of(Towers), "pixel_mask": mask_of(8, 3, most=8)}
    loss = partial(VIDLoss, **options)
    pairs = [Pair("text", "text", loss=loss), Pair("image", "image", mask="pixel_mask")]
    return *build(Towers, pairs, **batch), batch


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("script", [maps, masked])
def test_no_step_after_the_second_waits_for_a_device(script, monkeypatch):
    found = waits(*script(), monkeypatch=monkeypatch)
    assert found[2:] == [Counter()] * 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_batch_norm_that_picks_valid_tokens_waits_in_each_step(monkeypatch):
    """The page's caveat on norm="batch" and masks."""
    assert all(x["value"] for x in waits(*masked(norm="batch"), monkeypatch=monkeypatch))


def test_on_the_cpu_each_pair_s_loss_is_read_and_nothing_else(monkeypatch):
    """There it costs nothing, and what is not finite is an error at once."""
    found = waits(*maps(), monkeypatch=monkeypatch)
    assert found[2:] == [Counter(value=len(MAPS))] * 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_other_processes_are_waited_for_by_running_estimates_alone(monkeypatch, tmp_path):
    for module in (_averaged, _pair_terms, together):
        monkeypatch.setattr(module, "several_processes", lambda: True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        student, distiller, batch = maps()
        found = waits(student, distiller, batch, monkeypatch=monkeypatch)
    finally:
        torch.distributed.destroy_process_group()
    assert len(distiller.vid_losses()) == 3
    # The scales' moments and the squared residuals, of those with one kind of variance together.
    assert [x["collective"] for x in found[2:]] == [2 * len(("running", "trained"))] * 2
    assert [x["value"] for x in found[2:]] == [0, 0]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_whole_model_s_steps_wait_for_nothing_either(monkeypatch):
    batch = batch_of(TokenNet)
    student, distiller = build(TokenNet, {"layer": "layer"}, **batch)
    model = DistillationModel(student, distiller)
    model(**batch)[1].backward()
    model(**batch)[1].backward()
    with Waits() as mode:
        model(**batch)[1].backward()
    assert mode.seen == Counter()


@pytest.mark.parametrize("masked", [(True, False), (False, True), (False, False)])
def test_processes_meet_twice_a_step_whatever_has_a_mask(monkeypatch, masked):
    """One process may have a mask where another has none: the sums must be of the same channels."""
    torch.manual_seed(0)
    shapes = (4, 7, 3), (4, 7, 5)
    losses = [VIDLoss(shape, shape) for shape in shapes]
    alone = copy.deepcopy(losses)
    mask = torch.arange(7) < torch.tensor([[3], [7], [1], [0]])
    inputs = [
        (torch.randn(shape), torch.randn(shape), mask if with_mask else None)
        for shape, with_mask in zip(shapes, masked, strict=True)
    ]
    expected = [loss(*x) for loss, x in zip(alone, inputs, strict=True)]
    sizes = []
    monkeypatch.setattr(together, "several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sizes.append(x.shape[-1]))
    step = together.Together()
    for name, loss, x in zip("ab", losses, inputs, strict=True):
        step.add(name, loss, loss.select(*x))
    torch.testing.assert_close(list(step.nll().values()), expected)
    for loss, other in zip(losses, alone, strict=True):
        torch.testing.assert_close(loss.state_dict(), other.state_dict())
    assert sizes == [3 + 5, 3 + 5]


def test_among_processes_a_pair_without_a_weight_keeps_its_place(monkeypatch):
    student, distiller, batch = maps()
    distiller.set_weight("stage1->stage1", 0.0)
    monkeypatch.setattr(_pair_terms, "several_processes", lambda: True)
    student(**batch)
    assert list(distiller.weighted_terms(**batch)) == list(distiller.pairs)
