import warnings
from functools import partial

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair, VIDLoss


def net(width):
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width))


def train(
    steps,
    *,
    head_lr=None,
    optimized=True,
    teacher_inputs=None,
    weight=None,
    layer="2",
    frozen=(),
    spoilt=1.0,
    **options,
):
    """Trains a toy pair at 5e-5 and returns what was warned of."""
    torch.manual_seed(0)
    student, teacher = net(16), net(32)
    for name in frozen:
        student.get_submodule(name).requires_grad_(False)
    pair = Pair(layer, layer, weight, loss=partial(VIDLoss, **options))
    batch = torch.randn(4, 8)
    distiller = Distiller(student, teacher, [pair], example=batch, teacher_inputs=teacher_inputs)
    with torch.no_grad():  # as at the end of a learning rate finder
        torch._foreach_mul_(list(distiller.parameters()), spoilt)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    if optimized:
        distiller.add_to(optimizer, lr=5e-5 if head_lr is None else head_lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            batch = torch.randn(32, 8)
            loss = student(batch).square().mean() + distiller(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [str(x.message) for x in caught if str(x.message).startswith("Distiller: expected")]


def test_heads_at_a_fine_tuning_rate_are_noticed_once_with_the_line_to_write():
    (message,) = train(320)
    assert "learning rate is 5.0e-05" in message
    assert "distiller.add_to(optimizer, lr=5e-3)" in message
    assert "2->2 0.0" in message


def test_heads_in_no_optimizer_are_noticed():
    *_, message = train(320, optimized=False)  # after what the first step has to say
    assert "next to nothing" in message
    assert "in no optimizer" in message


def test_a_teacher_that_sees_other_samples_is_noticed():
    (message,) = train(320, head_lr=5e-3, teacher_inputs=lambda x: x.flip(0))
    assert "teacher_inputs=" in message


@pytest.mark.parametrize("optimized", [True, False])
def test_heads_that_have_run_away_are_to_be_given_back(optimized):
    *_, message = train(320, head_lr=5e-3, spoilt=1000.0, optimized=optimized)
    assert "worse than the teacher's mean" in message
    assert "learning rate finder" in message
    assert "distiller.load_state_dict(earlier)" in message


def test_trained_variances_that_contradict_the_residuals_are_named():
    (message,) = train(320, head_lr=1e-3, variance="trained", init_var=100.0)
    assert 'variance="running"' in message
    assert "2->2" in message


@pytest.mark.parametrize("options", [{"head_lr": 5e-3}, {"weight": 0.0}])
def test_nothing_is_said_of_a_transfer_that_works_or_is_off(options):
    assert train(320, **options) == []


def test_nothing_is_said_while_a_schedule_may_still_warm_up():
    assert train(290) == []


@pytest.mark.parametrize(
    ("layer", "frozen"), [("2", ("",)), ("2", ("0", "2")), ("0", ("0",)), ("0:input", ())]
)
def test_a_layer_that_nothing_trained_comes_before_is_named_in_the_first_step(layer, frozen):
    (message,) = train(3, layer=layer, frozen=frozen)
    assert f"got frozen ones for {layer}->{layer}," in message
    assert "student.requires_grad_(True)" in message


@pytest.mark.parametrize(
    "options", [{"frozen": ("0",)}, {"layer": "0", "frozen": ("0",), "weight": 0.0}]
)
def test_nothing_is_said_of_a_layer_that_is_trained_or_off(options):
    assert train(3, **options) == []


def test_while_a_cuda_graph_is_made_nothing_is_sent(monkeypatch):
    captured = True
    monkeypatch.setattr("vid_loss.terms._notice.is_captured", lambda _: captured)
    assert train(320) == []
    captured = False
    assert len(train(320)) == 1


def test_a_loss_that_has_not_run_says_nothing_wherever_tensors_are_made():
    torch.manual_seed(0)
    student, teacher, batch = net(16), net(32), torch.randn(8, 8)
    pairs = [Pair("0", "0", loss=VIDLoss), Pair("2", "2")]
    distiller = Distiller(student, teacher, pairs, example=batch)
    distiller.losses["0->0"].eval()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        for _ in range(302):
            student(batch)
            distiller(batch)
    assert not distiller._notice.is_open
