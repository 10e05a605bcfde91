"""The lines of the page in torchvision's order, in one process; test_script_orders.py has two."""

import pytest
import torch
from _torchvision import patched_torchvision
from torch.testing import assert_close

pytest.importorskip("torchvision")


@pytest.mark.parametrize("amp", [False, True])
def test_a_resumed_run_ends_where_the_whole_one_does_bit_for_bit(tmp_path, amp):
    whole = patched_torchvision(tmp_path / "whole", stop_epoch=3, amp=amp)
    patched_torchvision(tmp_path / "parts", stop_epoch=1, amp=amp)
    resumed = patched_torchvision(tmp_path / "parts", stop_epoch=3, amp=amp, resume=True)
    assert resumed.keys() == whole.keys()
    assert_close(resumed, whole, rtol=0, atol=0)


def test_average_and_checkpoint_are_the_plain_models_and_the_transfer_changes_what_is_learnt(
    tmp_path,
):
    distilled = patched_torchvision(tmp_path / "distilled", stop_epoch=2)
    plain = patched_torchvision(tmp_path / "plain", stop_epoch=2, patched=False)
    for part in ("model", "model_ema"):
        assert distilled[part].keys() == plain[part].keys()
    assert not torch.equal(distilled["model"]["conv1.weight"], plain["model"]["conv1.weight"])
    groups = [len(group["params"]) for group in distilled["optimizer"]["param_groups"]]
    assert len(groups) == len(plain["optimizer"]["param_groups"]) + 2  # with decay and without
    assert any(key.endswith("running_var.var") for key in distilled["distiller"])
