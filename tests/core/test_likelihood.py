import pytest
import torch
from _models import TokenNet, cnn_pair, images

from vid_loss import Distiller, FeatureTap, KDLoss, Pair, VIDLoss
from vid_loss.cache import FeatureCache
from vid_loss.diagnostics import log_likelihood

PAIRS = [Pair("stage1", "stage2"), Pair("fc:input", "fc"), Pair("fc", "fc", loss=KDLoss())]


def test_each_position_has_a_value_and_their_mean_is_the_loss():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    maps = log_likelihood(distiller, images())
    shapes = {name: tuple(x.shape) for name, x in maps.items()}
    assert shapes == {"stage1->stage2": (8, 4, 4), "fc:input->fc": (8,)}
    student.eval()
    distiller.eval()
    student.training = True  # of the root alone: for the taps, and not for batch norms
    student(images())
    distiller(images())
    for name, values in maps.items():
        torch.testing.assert_close(-values.mean(), distiller.terms[name])


def test_tokens_have_a_value_each():
    torch.manual_seed(0)
    student, teacher = TokenNet(4), TokenNet(8)
    text = {"input_ids": torch.arange(12).view(2, 6)}
    distiller = Distiller(student, teacher, {"layer": "layer"}, example=text)
    assert log_likelihood(distiller, **text)["layer->layer"].shape == (2, 6)


def test_a_better_predicted_position_is_more_likely():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, [Pair("stage1", "stage1")], example=images())
    loss = distiller.losses["stage1->stage1"].eval()
    feature = torch.randn(2, 4, 8, 8)
    target = loss.head(feature).detach()
    target[:, :, 3, 5] += 2
    assert (loss.log_likelihood(feature, target).flatten(1).argmin(1) == 3 * 8 + 5).all()


def test_modes_and_statistics_stay_as_they_were():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    before = {key: x.clone() for key, x in student.state_dict().items()}
    heads = {key: x.clone() for key, x in distiller.state_dict().items()}
    log_likelihood(distiller, images())
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(distiller.state_dict(), heads, rtol=0, atol=0)
    assert student.training
    assert distiller.losses.training


def test_the_features_of_the_next_step_are_its_own():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    log_likelihood(distiller, images())
    with pytest.raises(RuntimeError, match="has not run forward in train mode"):
        distiller(images())


def test_features_from_elsewhere_give_what_the_teacher_gives():
    student, teacher = cnn_pair()
    with FeatureTap(teacher, ["stage2", "fc"]) as tap, torch.no_grad():
        features = dict(tap.read(images()))  # in train mode, so that they are others
    torch.manual_seed(1)
    online = Distiller(student, teacher, PAIRS, example=images())
    expected = log_likelihood(online, images(), teacher_features=online.teacher_features(images()))
    torch.testing.assert_close(log_likelihood(online, images()), expected, rtol=0, atol=0)
    given = log_likelihood(online, images(), teacher_features=features)
    assert not torch.equal(given["fc:input->fc"], expected["fc:input->fc"])
    torch.manual_seed(1)
    offline = Distiller(student, None, PAIRS, example=images(), teacher_features=features)
    offline.load_state_dict(online.state_dict())
    del features["fc"]
    with pytest.raises(ValueError, match=r"expected also \['fc'\]; got \['stage2'\]"):
        log_likelihood(offline, images(), teacher_features=features)
    with pytest.raises(TypeError, match=r"^log_likelihood, teacher_features: .*no teacher; got no"):
        log_likelihood(offline, images())
    features = online.teacher_features(images())
    found = log_likelihood(offline, images(), teacher_features=features)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"^Pair .stage1. -> .stage2., VIDLoss: expected one batch"
    ):
        log_likelihood(offline, images()[:2], teacher_features=features)


def test_only_the_layers_of_vid_losses_are_asked_for():
    student, teacher = cnn_pair()
    pairs = [Pair("stage1", "stage2"), Pair("fc", "fc", loss=KDLoss())]
    distiller = Distiller(student, teacher, pairs, example=images())
    features = {"stage2": distiller.teacher_features(images())["stage2"]}
    assert log_likelihood(distiller, images(), teacher_features=features).keys() == {
        "stage1->stage2"
    }


def test_a_cache_is_neither_read_nor_written(tmp_path):
    student, teacher = cnn_pair()
    plain = Distiller(student, teacher, PAIRS, example=images())
    cached = Distiller(student, teacher, PAIRS, example=images(), cache=FeatureCache(tmp_path))
    cached.load_state_dict(plain.state_dict())
    found = log_likelihood(cached, images())
    torch.testing.assert_close(found, log_likelihood(plain, images()), rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert cached.cache is not None


@pytest.mark.parametrize("shape", [(8, 3), (8, 5, 3), (8, 3, 2, 2)])
def test_a_channel_that_never_changes_counts_as_in_the_loss(shape):
    torch.manual_seed(0)
    loss = VIDLoss(shape, shape)
    student, teacher = torch.randn(shape), torch.randn(shape)
    teacher.select(1 if len(shape) == 4 else -1, 1).fill_(7.0)
    loss(student, teacher)
    loss.eval()
    likelihood = loss.log_likelihood(student, teacher)
    torch.testing.assert_close(-likelihood.mean(), loss(student, teacher).detach())
