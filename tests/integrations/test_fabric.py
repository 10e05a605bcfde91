import pytest
import torch
import torch.nn.functional as F
from _scripts import PAIRS, batches, models

from vid_loss import Distiller

pytest.importorskip("lightning")

from lightning.fabric import Fabric  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")  # torch's own


def train(order, precision="32-true"):
    """Returns student and heads after a few steps; None is a loop without Fabric."""
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = student
    if order == "after":
        model, optimizer = fabric.setup(student, optimizer)
    torch.manual_seed(11)  # for the heads
    distiller = Distiller(model, teacher, PAIRS, example=torch.zeros(1, 3, 8, 8))
    optimizer.add_param_group({"params": distiller.parameters()})
    if order == "before":
        model, optimizer = fabric.setup(student, optimizer)
    transfer = fabric.setup_module(distiller) if order else distiller
    for images, labels in batches(0, 0, 4):
        loss = F.cross_entropy(model(images), labels) + transfer(images)
        optimizer.zero_grad()
        fabric.backward(loss, model=model) if order else loss.backward()
        optimizer.step()
    assert distiller.student is student
    return [*student.parameters(), *distiller.parameters()]


@pytest.mark.parametrize("order", ["before", "after"])
def test_under_fabric_training_is_the_plain_loops_bit_for_bit(order):
    for one, other in zip(train(order), train(None), strict=True):
        assert torch.equal(one, other)
