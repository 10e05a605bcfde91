"""A student and a teacher of which a quarter of the positions is taken."""

from functools import partial

from _models import cnn_pair, images

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss

QUARTER = partial(VIDLoss, positions=0.25)


def pairs(loss=QUARTER, **options):
    return [Pair(layer, layer, loss=loss, **options) for layer in ("stage1", "stage2")]


def make(chosen, **options):
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, chosen, example=images(), **options)
    return DistillationModel(student, distiller)
