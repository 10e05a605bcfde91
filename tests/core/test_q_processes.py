"""Two processes on CPU: estimates and heads are one, and those of the joined batch."""

import multiprocessing

import _q_ranks
import pytest
import torch
from _versions import needs_gloo_that_averages

CONTEXT = multiprocessing.get_context("forkserver")
# What is slow to import. Not _q_ranks: the server does not know pytest's path.
CONTEXT.set_forkserver_preload(
    ["vid_loss", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
)
NORMS = {"norms": ("group", "layer"), "no norms": ("none", "none")}
WAYS = [
    "beside",
    "model",
    pytest.param("fsdp", marks=needs_gloo_that_averages),
    "beside, sharded teacher",  # nothing of a teacher is averaged, so any gloo will do
    pytest.param("fsdp, sharded teacher", marks=needs_gloo_that_averages),
]


def run(folder, processes, how, norms):
    """Trains in that many processes and returns what each rank has seen."""
    workers = [
        CONTEXT.Process(target=_q_ranks.main, args=(rank, processes, folder, how, norms))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)
        worker.kill()
    errors = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert [worker.exitcode for worker in workers] == [0] * processes, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """One process with the joined batch, for each of the norms."""
    results = {}
    for norms in NORMS.values():
        (results[norms],) = run(tmp_path_factory.mktemp("joined"), 1, "alone", norms)
    return results


@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("how", WAYS)
def test_ranks_agree_to_the_bit_and_with_the_joined_batch(tmp_path, joined, how, norms):
    first, second = run(tmp_path, 2, how, norms)
    expected = joined[norms]
    assert first["state"].keys() == second["state"].keys() == expected["state"].keys()
    assert sum(name.endswith(_q_ranks.ESTIMATES) for name in expected["state"]) == 16
    for name, value in expected["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        off = "losses.off." in name  # one process does not compute it
        if not (off and name.endswith(_q_ranks.ESTIMATES)):
            torch.testing.assert_close(first["state"][name], value, rtol=2e-5, atol=1e-6)
    assert first["diagnostics"].keys() - {"off"} == expected["diagnostics"].keys()
    for name, report in expected["diagnostics"].items():
        for rank in (first, second):
            found = rank["diagnostics"][name]
            assert found.explained_variance == pytest.approx(report.explained_variance, rel=1e-4)
            assert found.nats_per_feature == pytest.approx(
                report.nats_per_feature, rel=1e-4, abs=1e-4
            )
    reloaded = first.get("reloaded", {})
    assert len(reloaded) == (16 if how == "fsdp" else 0)
    for name, value in reloaded.items():
        assert torch.equal(value, first["state"][name.removeprefix("distiller.")]), name
