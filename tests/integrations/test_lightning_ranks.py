"""Lightning with two processes: DDP and FSDP2."""

import pytest
import torch

pytest.importorskip("lightning")

from _lightning import assert_equal, run  # after the skip
from _scripts import models  # after the skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and the like
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch's own, by its use
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("lightning"))


def trained(state):
    """All but batch norm's statistics, which are each process's own."""
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state.items() if not name.endswith(ends)}


@pytest.mark.parametrize("label", ["spawned", "whole", "half", "resumed", "accumulated", "sharded"])
def test_ranks_are_equal_to_the_last_bit(ranks, label):
    zero, one = (trained(results[label]["states"]) for results in ranks)
    assert any(name.endswith("running_var.var") or label == "sharded" for name in zero)
    assert_equal(zero, one)


def test_ddp_spawn_trains_as_ddp_does(ranks):
    assert_equal(ranks[0]["spawned"]["states"], ranks[0]["half"]["states"])


@pytest.mark.parametrize(
    ("label", "other"),
    [("whole", "plain"), ("whole", "resumed"), ("accumulated", "plain, accumulated")],
)
def test_ddp_is_the_plain_ddp_loop_and_resumes_bit_for_bit(ranks, label, other):
    assert_equal(ranks[0][label]["states"], ranks[0][other]["states"])


def test_fsdp2_is_refused_by_the_callback_and_trains_a_distillation_model(ranks):
    assert "DistillationModel in the module's configure_model" in ranks[0]["refused"]["message"]
    sharded = ranks[0]["sharded"]["states"]
    start = models()[0].state_dict()
    assert not torch.equal(sharded["student.0.weight"], start["0.weight"])
    assert any(name.startswith("distiller.losses") for name in sharded)
