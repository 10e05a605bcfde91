import math
import re
import sys

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the examples extra")

import detection_and_segmentation as program
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from vid_loss import Distiller, Pair, match_layers


def test_the_program_takes_two_steps_of_each(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    program.main()
    losses = re.findall(r"^(\w+): loss (\S+); (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [task for task, *_ in losses] == ["detection"] * 2 + ["segmentation"] * 2
    assert all(math.isfinite(float(loss)) for _, loss, _ in losses)
    assert [terms.count(", ") + 1 for *_, terms in losses] == [4, 4, 3, 3]


def test_the_levels_of_two_pyramids_are_learnt_and_the_teacher_ends_with_them():
    torch.manual_seed(0)
    student, teacher = program.detector("resnet18"), program.detector("resnet34")
    (images, targets), *_ = program.boxed_images(1)
    levels = [f'backbone["{level}"]' for level in range(4)]
    pairs = [Pair(level, level) for level in levels]
    distiller = Distiller(student, teacher, pairs, example=(images,), stop_teacher=True)
    ran = []
    teacher.rpn.register_forward_hook(lambda *_: ran.append("rpn"))
    optimizer = torch.optim.Adam([*student.backbone.parameters(), *distiller.parameters()], 5e-3)
    for _ in range(8):
        student(images, targets)
        loss = distiller(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not ran
    assert all(p.grad is None for p in teacher.parameters())
    explained = [x.explained_variance for x in distiller.diagnostics().values()]
    assert min(explained) > 0


def test_matching_names_the_body_of_a_detector():
    student, teacher = program.detector("resnet18"), program.detector("resnet34")
    (images, _), *_ = program.boxed_images(1)
    pairs = match_layers(student, teacher, (images,), max_pairs=2)
    names = [f"backbone.body.layer{i}" for i in (3, 4)]
    assert [(pair.student, pair.teacher) for pair in pairs] == [(name, name) for name in names]


@pytest.mark.parametrize("kind", [RetinaNet, FCOS])
def test_one_stage_detectors_have_the_levels_that_the_page_names(kind):
    def build(name):
        last = LastLevelP6P7(256, 256)
        options = {"returned_layers": [2, 3, 4], "extra_blocks": last, "trainable_layers": 5}
        body = resnet_fpn_backbone(backbone_name=name, weights=None, **options)
        return kind(body, num_classes=3, min_size=64, max_size=64)

    student, teacher = build("resnet18"), build("resnet34")
    (images, targets), *_ = program.boxed_images(1)
    pairs = [Pair(f'backbone["{x}"]', f'backbone["{x}"]') for x in ("0", "1", "2", "p6")]
    distiller = Distiller(student, teacher, pairs, example=(images,), stop_teacher=True)
    loss = sum(student(images, targets).values()) + distiller(images)
    loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())
