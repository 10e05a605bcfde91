"""A teacher that is not there: its features come from elsewhere, with each batch."""

import copy
import pickle
import warnings

import pytest
import torch
from _models import TinyCNN, cnn_pair, images
from torch import nn

from vid_loss import DistillationModel, Distiller, FeatureTap, KDLoss, Pair
from vid_loss.teachers import Teachers

PAIRS = [Pair("stage2", "stage2"), Pair("fc", "fc", loss=KDLoss())]


def computed_before(teacher, x):
    with FeatureTap(teacher, ["stage2", "fc"]) as tap, torch.no_grad():
        teacher.eval()
        return dict(tap.read(x))


def test_features_from_elsewhere_are_those_of_the_teacher_that_made_them():
    student, teacher = cnn_pair()
    features = computed_before(teacher, images())
    values = []
    for offline in (False, True):
        torch.manual_seed(1)
        source = (None, {"teacher_features": features}) if offline else (teacher, {})
        distiller = Distiller(student, source[0], PAIRS, example=images(), **source[1])
        for _ in range(2):
            student(images())
            values.append(distiller(images(), teacher_features=features if offline else None))
        student(images())
        values.append(distiller(teacher_features=features))  # the inputs are not needed
        twin = copy.deepcopy(distiller)
        distiller.close()
        assert twin.state_dict().keys() == distiller.state_dict().keys()
    torch.testing.assert_close(values[:3], values[3:], rtol=0, atol=0)


def test_a_distillation_model_is_given_them_too():
    student, teacher = cnn_pair()
    features = computed_before(teacher, images())
    distiller = Distiller(student, None, PAIRS, example=images(), teacher_features=features)
    model = DistillationModel(student, distiller)
    logits, transfer = model(images(), teacher_features=features)
    (logits.sum() + transfer).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.to(torch.float64).eval()(images().double()).dtype == torch.float64
    assert pickle.loads(pickle.dumps(distiller)).state_dict()


def test_whoever_made_them_learns_nothing():
    student, teacher = cnn_pair()
    features = computed_before(teacher, images())
    distiller = Distiller(student, None, PAIRS, example=images(), teacher_features=features)
    source = {name: x.requires_grad_() for name, x in features.items()}
    student(images())
    distiller(teacher_features=source).backward()
    assert all(x.grad is None for x in source.values())


BAD = [
    ({}, TypeError, r"teacher: expected an nn.Module; got None.*teacher_features=\{'fc': tensor\}"),
    ({"teacher_features": {}}, ValueError, r"teacher_features: expected also \['fc', 'stage2'\]"),
    ({"teacher_features": torch.zeros(8, 3)}, TypeError, r"a dict of \['fc', 'stage2'\] .*Tensor"),
    ({"teacher_features": {"fc": 1, "stage2": None}}, TypeError, "'fc': 'int', 'stage2': 'NoneT"),
    ({"features": True, "stop_teacher": True}, ValueError, "stop_teacher: expected none of them"),
    ({"features": True, "teacher_dtype": torch.float16}, ValueError, "teacher_dtype: expected non"),
    ({"features": True, "teacher_inputs": len}, ValueError, "teacher_inputs: expected none of th"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_what_is_missing_is_named(options, error, message):
    student, teacher = cnn_pair()
    if options.get("features"):
        features = computed_before(teacher, images())
        options = {**options, "teacher_features": features}
        del options["features"]
    with pytest.raises(error, match=f"Distiller, .*{message}"):
        Distiller(student, None, PAIRS, example=images(), **options)


def test_a_call_without_them_says_what_to_give():
    student, teacher = cnn_pair()
    features = computed_before(teacher, images())
    distiller = Distiller(student, None, PAIRS, example=images(), teacher_features=features)
    student(images())
    with pytest.raises(RuntimeError, match=r"no teacher; got none. Call distiller\(teacher_featur"):
        distiller(images())
    with pytest.raises(ValueError, match=r"expected also \['fc'\]; got \['stage2'\]"):
        distiller(teacher_features={"stage2": features["stage2"]})
    with pytest.raises(ValueError, match="expected one batch size"):
        distiller(teacher_features={name: x[:4] for name, x in features.items()})
    with pytest.raises(ValueError, match="teacher_features: expected none beside a teacher"):
        Distiller(student, teacher, PAIRS, example=images(), teacher_features=features)


# ---- Several teachers ----


class Shifted(nn.Module):
    """A teacher with inputs of its own, by name."""

    def __init__(self):
        super().__init__()
        self.net = TinyCNN(6)

    def forward(self, x, shift=0.0):
        return self.net(x + shift)


def two_teachers():
    torch.manual_seed(3)
    return TinyCNN(8), Shifted()


OF_TWO = [
    Pair("stage2", "a.stage2"),
    Pair("stage2", "b.net.stage2"),
    Pair("fc", "a.fc", loss=KDLoss()),
]


@pytest.mark.parametrize("stop", [False, True])
def test_several_teachers_give_what_each_gives_alone(stop):
    student, _ = cnn_pair()
    a, b = two_teachers()
    shifted = {"b": lambda x: {"x": x, "shift": 1.0}}
    teachers = Teachers({"a": a, "b": b}, inputs=shifted)
    distiller = Distiller(student, teachers, OF_TWO, example=images(), stop_teacher=stop)
    features = distiller.teacher_features(images())
    assert torch.equal(features["a.stage2"], computed_before(a, images())["stage2"])
    expected = computed_before(b.net, images() + 1.0)["stage2"]
    assert torch.equal(features["b.net.stage2"], expected)
    student(images())
    distiller(images()).backward()
    logits, transfer = DistillationModel(student, distiller)(images())
    (logits.sum() + transfer).backward()
    assert len(distiller.terms) == 3
    assert all(p.grad is None for p in teachers.parameters())


def test_each_teacher_gets_the_keywords_that_it_names():
    student = Shifted()
    _, b = two_teachers()
    pairs = [Pair("net.stage2", "b.net.stage2"), Pair("net.stage2", "c.net.stage2")]
    teachers = Teachers({"b": b, "c": Shifted()})
    batch = {"x": images(), "shift": 1.0}
    distiller = Distiller(student, teachers, pairs, example=batch)
    student(**batch)
    assert distiller(**batch).isfinite()
    assert Teachers({"b": b})(**batch, labels=1)["b"].isfinite().all()  # it does not name those


def test_two_distillers_are_another_way_in_a_loop():
    student, _ = cnn_pair()
    a, b = two_teachers()
    distillers = [
        Distiller(student, a, {"stage2": "stage2"}, example=images()),
        Distiller(student, b.net, {"stage2": "stage2"}, example=images()),
    ]
    student(images())
    sum(distiller(images()) for distiller in distillers).backward()
    assert all(p.grad is not None for x in distillers for p in x.parameters())


@pytest.mark.parametrize(
    ("models", "inputs", "error", "message"),
    [
        ({}, None, ValueError, "expected at least one"),
        ([nn.Linear(1, 1)], None, TypeError, "expected a dict of names to modules; got list"),
        ({"a": "b"}, None, TypeError, "expected a dict of names to modules; got {'a': 'str'}"),
        ({"a.b": nn.Linear(1, 1)}, None, ValueError, "a name without a dot"),
        ({"a": nn.Linear(1, 1)}, {"b": len}, ValueError, r"inputs: expected names among \['a'\]"),
    ],
)
def test_what_are_no_teachers_is_named(models, inputs, error, message):
    with pytest.raises(error, match=f"Teachers.*{message}"):
        Teachers(models, inputs=inputs)


def test_nothing_is_said_of_models_that_are_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distiller(*cnn_pair(), PAIRS, example=images())
