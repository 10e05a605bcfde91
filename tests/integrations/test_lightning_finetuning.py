import pytest
import torch

pytest.importorskip("lightning")

from _lightning import RATE, Task, assert_equal, callback, fit, states  # after the skip
from lightning.pytorch.callbacks import BaseFinetuning  # after the skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and the like
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch's own, by its use
    pytest.mark.filterwarnings("ignore:Distiller. expected student features"),  # the first test's
]


class Head(Task):
    """Optimizes what is not frozen, as Lightning's examples do."""

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])]


class AllFrozen(Head):
    """Has its last layer outside the student, all of which is frozen at first."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.last = torch.nn.Linear(10, 10)

    def forward(self, images):
        return self.last(self.model(images))


class Unfreezing(BaseFinetuning):
    """Trains all but the last layer from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def freeze_before_training(self, pl_module):
        whole = isinstance(pl_module, AllFrozen)
        self.freeze(pl_module.model if whole else pl_module.model[:6], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        own = {id(p) for p in pl_module.parameters()}
        if epoch > 1:  # a run that resumes begins with what is frozen at first
            self.make_trainable(pl_module.model[:6])
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[:6], optimizer)
        last = optimizer.param_groups[-1]["params"]
        self.seen.append((len(optimizer.param_groups), all(id(p) in own for p in last)))


@pytest.mark.parametrize("module", [Head, AllFrozen])
def test_a_student_that_is_unfrozen_later_is_distilled_from_then_on(module):
    task, vid, finetuning = module(), callback(), Unfreezing()
    before = task.model[3].weight.clone()
    with pytest.warns(UserWarning, match=r"got frozen ones for 3->3.*unless that comes later"):
        fit(task, vid, finetuning, epochs=1)
    assert torch.equal(task.model[3].weight, before)
    heads = [p.clone() for p in vid.distiller.parameters()]

    trainer = fit(task := module(), vid := callback(), finetuning := Unfreezing(), epochs=3)
    assert not torch.equal(task.model[3].weight, before)
    assert not any(map(torch.equal, heads, vid.distiller.parameters()))
    assert finetuning.seen == [(1, True), (2, True), (2, True)]
    rates = [group["initial_lr"] for group in trainer.optimizers[0].param_groups[:2]]
    assert rates == [RATE, 5e-3]
    assert trainer.optimizers[0].param_groups[2]["params"][0] is task.model[0].weight
    assert not {"on_fit_start", "on_train_epoch_start"} & vars(finetuning).keys()


@pytest.mark.parametrize("epochs", [1, 2])
def test_such_a_run_resumes_bit_for_bit(tmp_path, epochs):
    whole, half, resumed = callback(), callback(), callback()
    task, first, second = Head(), Head(), Head(seed=7)
    fit(task, whole, Unfreezing(), epochs=3)
    path = tmp_path / "half.ckpt"
    fit(first, half, Unfreezing(), epochs=epochs).save_checkpoint(path)
    fit(second, resumed, Unfreezing(), ckpt_path=path, epochs=3)
    assert_equal(states(second.model, resumed.distiller), states(task.model, whole.distiller))
