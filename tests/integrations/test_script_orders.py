"""The three lines in scripts of several shapes, each in two processes."""

import pytest
import torch
import torch.multiprocessing as mp
from _scripts import net, run

pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

HALF, END = 3, 6
JOBS = [
    ("torchvision", "torchvision_order", {"steps": (0, END)}),
    ("torchvision, killed", "torchvision_order", {"steps": (0, HALF)}),
    ("torchvision, resumed", "torchvision_order", {"steps": (HALF, END), "resume": True}),
    ("torchvision's page", "torchvision_page", {"steps": (0, END)}),
    ("torchvision's page, killed", "torchvision_page", {"steps": (0, HALF)}),
    ("torchvision's page, resumed", "torchvision_page", {"steps": (HALF, END), "resume": True}),
    ("unwrapped", "torchvision_order", {"wrap": False, "clip": False}),
    ("unwrapped, clipped", "torchvision_order", {"wrap": False}),
    ("nanogpt", "nanogpt_order", {}),
    ("lightning", "lightning_order", {}),
    ("accelerate", "accelerate_order", {"steps": (0, END)}),
    ("accelerate, killed", "accelerate_order", {"steps": (0, HALF)}),
    ("accelerate, resumed", "accelerate_order", {"steps": (HALF, END), "resume": True}),
]
TRAINED = [label for label, _, _ in JOBS if "unwrapped" not in label]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have run all of them: to start one takes longer than a script."""
    folder = tmp_path_factory.mktemp("scripts")
    mp.spawn(run, (str(folder), JOBS), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def trained(state):
    """All but what DDP has batch norm take from the first process at the next forward."""
    ends = ("running_mean", "running_var", "evaluated")
    found = {name: value for name, value in state.items() if not name.endswith(ends)}
    assert any(name.endswith("running_var.var") for name in found)  # q's, which is ours
    return found


@pytest.mark.parametrize("label", TRAINED)
def test_ranks_are_equal_to_the_last_bit(ranks, label):
    (zero, seen), (one, _) = (results[label] for results in ranks)
    assert isinstance(zero, dict), seen
    assert_equal(trained(zero), trained(one))


@pytest.mark.parametrize("script", ["torchvision", "torchvision's page", "accelerate"])
def test_a_resumed_run_ends_where_the_whole_one_does_bit_for_bit(ranks, script):
    whole, resumed = (ranks[0][label][0] for label in (script, f"{script}, resumed"))
    assert_equal(whole, resumed)


def test_checkpoint_and_average_load_in_a_plain_model(folder, ranks):
    checkpoint = torch.load(folder / "torchvision_order" / "checkpoint.pt")
    plain = net(4)
    plain.load_state_dict(checkpoint["model"])
    average = {
        name.removeprefix("module."): value
        for name, value in checkpoint["ema"].items()
        if name != "n_averaged"
    }
    plain.load_state_dict(average)
    evaluated = ranks[0]["torchvision, resumed"][0]["evaluated"]
    torch.testing.assert_close(plain.eval()(torch.ones(2, 3, 8, 8)), evaluated)


@pytest.mark.parametrize("label", [label for label in TRAINED if "page" not in label])
def test_nothing_is_reduced_but_the_loss_and_its_gradients(ranks, label):
    """Two sums per step, of the teacher's scale and of the residuals, which are the loss's own."""
    steps = HALF if "killed" in label or "resumed" in label else END
    assert [results[label][1] for results in ranks] == [2 * steps] * 2


@pytest.mark.parametrize("label", ["unwrapped", "unwrapped, clipped"])
def test_heads_that_nothing_averages_are_refused_in_both_processes(ranks, label):
    for results in ranks:
        message, where = results[label]
        assert "DistributedDataParallel(distiller)" in message
        assert "accelerator.prepare(student, distiller, optimizer)" in message
        assert "on_call" in where
