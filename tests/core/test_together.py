"""Several VID pairs computed at once come to what each comes to alone."""

import copy
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from vid_loss import Distiller, FitNetLoss, Pair, VIDLoss
from vid_loss.losses import together

PAPER = {"variance": "trained", "standardize": False, "init_var": 5.0}
KINDS = {
    "map": ((4, 3, 6, 5), {}),
    "larger map": ((4, 5, 9, 8), {}),
    "tokens": ((4, 7, 3), {}),
    "vector": ((4, 6), {}),
    "other momentum": ((4, 6), {"momentum": 0.3}),
    "other floor": ((4, 6), {"var_floor": 0.5}),
    "paper": ((4, 3, 6, 5), PAPER),
    "trained": ((4, 7, 3), {"variance": "trained"}),
    "own units": ((4, 7, 3), {"standardize": False}),
    "summed": ((4, 3, 6, 5), {"reduction": "batchmean"}),
}


class Layers(nn.Module):
    """A layer for each kind; what is made of the input by hand is the layers' output."""

    def __init__(self, seed, kinds=tuple(KINDS)):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleDict({k.replace(" ", "-"): nn.Identity() for k in kinds})
        self.scales = nn.Parameter(0.5 + torch.rand(len(kinds), generator=generator))
        self.kinds = kinds
        self.seed = seed

    def forward(self, x):
        for place, (kind, layer) in enumerate(zip(self.kinds, self.layers.values(), strict=True)):
            generator = torch.Generator().manual_seed(self.seed + int(x[0, 0]))
            feature = torch.randn(len(x), *KINDS[kind][0][1:], generator=generator)
            if self.seed and kind != "paper":
                feature[..., 0] = 7.0  # of vectors and tokens a channel that never changes
            layer(feature * self.scales[place])
        return x


def distiller_of(kinds):
    torch.manual_seed(0)
    names = {kind: f"layers.{kind.replace(' ', '-')}" for kind in kinds}
    pairs = [
        Pair(name, name, loss=partial(VIDLoss, **KINDS[kind][1]), name=kind)
        for kind, name in names.items()
    ]
    student, teacher = Layers(0, kinds), Layers(1000, kinds)
    return student, Distiller(student, teacher, pairs, example=torch.zeros(4, 1))


def estimates(distiller):
    """What q is, beside the heads."""
    parts = ("scale.", "running_var.")
    return {
        name: copy.deepcopy(buffer)
        for name, buffer in distiller.named_buffers()
        if any(part in name for part in parts)
    }


def steps(student, distiller, apart):
    """Terms and gradients of three steps, the pairs all at once or one after the other."""
    found = []
    weights = dict(distiller.weights)
    for step in range(3):
        batch = torch.full((4, 1), float(step))
        distiller.zero_grad()
        student.scales.grad = None
        for only in [{name} for name in weights] if apart else [set(weights)]:
            distiller.weights = {x: w if x in only else 0.0 for x, w in weights.items()}
            student(batch)
            distiller(batch).backward()
            found += distiller.terms.values()
        distiller.weights = weights
        found += [x.grad.clone() for x in (student.scales, *distiller.parameters())]
    return found


@pytest.mark.parametrize("training", [True, False])
def test_pairs_of_all_kinds_at_once_are_as_one_after_the_other(training):
    for kinds in (tuple(KINDS), ("map", "tokens"), ("tokens", "paper", "own units")):
        results = []
        for apart in (False, True):
            student, distiller = distiller_of(kinds)
            steps(student, distiller, apart)  # something to be estimated
            distiller.train(training)
            results.append((steps(student, distiller, apart), distiller.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_estimates_are_those_of_the_features_themselves():
    student, distiller = distiller_of(("map", "larger map", "vector"))
    rows = []
    for step in range(4):
        batch = torch.full((4, 1), float(step))
        student(batch)
        rows.append(distiller.teacher_features(batch)["layers.larger-map"].double())
        distiller(batch)
    rows = torch.cat(rows).movedim(1, -1).flatten(0, -2)
    scale = distiller.losses["larger map"].scale
    torch.testing.assert_close(scale.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale.var.double(), rows.var(0, correction=0), rtol=1e-5, atol=0)
    assert scale.positions.tolist() == [len(rows)] * 5


class Doubled(VIDLoss):
    """A user's own kind of VIDLoss."""

    def forward(self, student_feature, teacher_feature, mask=None):
        return 2 * super().forward(student_feature, teacher_feature, mask)


class Wrapped(nn.Module):
    """A VIDLoss inside of a loss."""

    def __init__(self, student_shape, teacher_shape):
        super().__init__()
        self.inner = VIDLoss(student_shape, teacher_shape)

    def forward(self, student, teacher):
        return 2 * self.inner(student, teacher)


def hooked(student_shape, teacher_shape):
    loss = VIDLoss(student_shape, teacher_shape)
    loss.register_forward_hook(lambda _, __, value: 2 * value)
    return loss


def replaced(student_shape, teacher_shape):
    loss = VIDLoss(student_shape, teacher_shape)
    forward = loss.forward
    loss.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    return loss


@pytest.mark.parametrize("make", [Doubled, Wrapped, hooked, replaced], ids=lambda f: f.__name__)
def test_what_somebody_made_of_a_loss_is_what_is_called(make):
    values = []
    for loss in (VIDLoss, make):
        torch.manual_seed(0)
        student, teacher = Layers(0, ("map", "vector")), Layers(1000, ("map", "vector"))
        pairs = [
            Pair("layers.map", "layers.map", loss=loss, name="map"),
            Pair("layers.vector", "layers.vector", name="vector"),
        ]
        distiller = Distiller(student, teacher, pairs, example=torch.zeros(4, 1))
        student(torch.ones(4, 1))
        distiller(torch.ones(4, 1))
        values.append(distiller.terms)
    torch.testing.assert_close(values[1]["map"], 2 * values[0]["map"])
    torch.testing.assert_close(values[1]["vector"], values[0]["vector"])


class OfSeven(nn.Module):
    """A head that works for tokens of the example's length alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 1))

    def forward(self, tokens):
        return tokens * self.weight


def test_an_error_in_a_head_names_its_pair():
    loss = VIDLoss((4, 7, 3), (4, 7, 3), head=OfSeven())
    models = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())
    pair = Pair("0", "0", loss=loss, name="tokens", channel_dim=-1)
    distiller = Distiller(*models, [pair], example=torch.randn(4, 7, 3))
    models[0](torch.randn(4, 6, 3))
    with pytest.raises(RuntimeError, match=r"Pair '0' -> '0': .*must match the size"):
        distiller(torch.randn(4, 6, 3))


def test_an_error_of_one_pair_names_it_and_changes_no_estimate():
    student, distiller = distiller_of(("map", "tokens", "vector"))
    batch = torch.zeros(4, 1)
    student(batch)
    distiller(batch)
    before = estimates(distiller)
    student(batch)
    features = dict(distiller.teacher_features(batch))
    features["layers.tokens"] = features["layers.tokens"][:, 1:]
    with pytest.raises(ValueError, match=r"'layers\.tokens' -> 'layers\.tokens'.*as many tokens"):
        distiller(teacher_features=features)
    torch.testing.assert_close(estimates(distiller), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, PAPER], ids=["default", "paper"])
def test_what_a_head_says_is_freed_before_the_next_one_speaks(options):
    """It is not kept beside all residuals: the memory is that of one pair after the other."""
    said, given = [], []

    class Head(nn.Conv2d):
        def forward(self, feature):
            assert [x for x in said if x() is not None] == []
            assert sum(x() is not None for x in given) == 3 - len(said)
            prediction = super().forward(feature)
            said.append(weakref.ref(prediction))
            return prediction

    step = together.Together()
    for name in "abc":
        loss = VIDLoss((4, 3, 6, 6), (4, 5, 6, 6), head=Head(3, 5, 1), **options)
        features = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
        step.add(name, loss, loss.select(*features))
        given.append(weakref.ref(features[1]))
    del features
    assert list(step.nll()) == ["a", "b", "c"]
    assert len(said) == 3


def test_other_losses_stand_beside_them_in_the_pairs_order():
    torch.manual_seed(0)
    student, teacher = Layers(0, ("map", "tokens")), Layers(1000, ("map", "tokens"))
    pairs = [
        Pair("layers.map", "layers.map", loss=FitNetLoss, name="hint"),
        Pair("layers.map", "layers.map", name="map"),
        Pair("layers.tokens", "layers.tokens", loss=nn.MSELoss(), name="mse"),
        Pair("layers.tokens", "layers.tokens", name="tokens"),
    ]
    distiller = Distiller(student, teacher, pairs, example=torch.zeros(4, 1))
    student(torch.ones(4, 1))
    assert list(distiller.weighted_terms(torch.ones(4, 1))) == ["hint", "map", "mse", "tokens"]
    assert list(distiller.terms) == ["hint", "map", "mse", "tokens"]
