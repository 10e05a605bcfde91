"""Which positions of a pair count: of texts and images, encoders and decoders, samples, frames."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _masks import EncoderDecoder, Frames, Padded, Towers, batch_of, build, mask_of
from _models import TokenNet, cnn_pair, images

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss


def terms(cls, pairs, example, batch=None):
    """Terms of a distiller whose estimates start at this batch."""
    student, distiller = build(cls, pairs, **example)
    student(**(batch or example))
    return distiller.weighted_terms(**(batch or example))


def by_hand(cls, layer, mask, batch):
    """The term of a pair of one layer, from the loss itself."""
    torch.manual_seed(0)
    student, teacher = cls(4), cls(6)
    features = []
    for model in (student, teacher):
        hook = model.get_submodule(layer).register_forward_hook(lambda *x: features.append(x[2]))
        model.eval()(**batch)
        hook.remove()
    features = [x[0] if isinstance(x, tuple) else x for x in features]
    loss = VIDLoss(*(x.shape for x in features))
    return 3.0 * loss(*features, mask=mask)


@pytest.mark.parametrize("length", [6, 8])
def test_the_mask_of_a_text_is_not_that_of_an_image_whatever_their_lengths(length):
    """The image has 8 tokens."""
    batch = batch_of(Towers, length)
    found = [terms(Towers, {"image": "image"}, batch)["image->image"]]
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    found.append(terms(Towers, {"image": "image"}, batch)["image->image"])
    assert torch.equal(*found)


def test_and_that_of_the_text_is_used():
    batch = batch_of(Towers)
    expected = by_hand(Towers, "text", batch["attention_mask"], batch)
    assert torch.equal(terms(Towers, {"text": "text"}, batch)["text->text"], expected)


def test_an_embedding_has_the_positions_of_what_it_embeds():
    batch = batch_of(TokenNet)
    expected = by_hand(TokenNet, "embed", batch["attention_mask"], batch)
    assert torch.equal(terms(TokenNet, {"embed": "embed"}, batch)["embed->embed"], expected)


def test_where_nothing_moves_the_length_decides():
    batch = {**batch_of(TokenNet), "input_ids": torch.ones(2, 8, dtype=torch.long)}
    expected = by_hand(TokenNet, "layer", batch["attention_mask"], batch)
    assert torch.equal(terms(TokenNet, {"layer": "layer"}, batch)["layer->layer"], expected)


def test_each_pair_has_the_mask_that_it_names():
    batch = {**batch_of(Towers), "pixel_mask": mask_of(8, 3, most=8)}
    pairs = [Pair("text", "text"), Pair("image", "image", mask="pixel_mask")]
    found = terms(Towers, pairs, batch)
    expected = by_hand(Towers, "text", batch["attention_mask"], batch)
    assert torch.equal(found["text->text"], expected)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1, :, 2:] = 7.0  # of patches that do not count
    assert torch.equal(terms(Towers, pairs, batch, changed)["image->image"], found["image->image"])
    changed["pixel_values"][1, :, :2] = 7.0
    assert found["image->image"] != terms(Towers, pairs, batch, changed)["image->image"]


def test_a_mask_of_false_counts_everything():
    batch = batch_of(TokenNet)
    expected = by_hand(TokenNet, "layer", None, batch)
    found = terms(TokenNet, [Pair("layer", "layer", mask=False)], batch)
    assert torch.equal(found["layer->layer"], expected)


@pytest.mark.parametrize("length", [8, 5])
def test_a_decoder_does_not_have_its_encoders_mask(length):
    batch = batch_of(EncoderDecoder)
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :length]
    pairs = [Pair("decoder[0]", "decoder[0]", name="d"), Pair("encoder", "encoder", name="e")]
    with pytest.warns(UserWarning, match=r"'decoder\[0\]', mask: .* padding counts. Say which"):
        found = terms(EncoderDecoder, pairs, batch)
    assert torch.equal(found["d"], by_hand(EncoderDecoder, "decoder", None, batch))
    batch["decoder_attention_mask"] = mask_of(length, 3, most=length)
    own = [Pair("decoder[0]", "decoder[0]", name="d", mask="decoder_attention_mask")]
    expected = by_hand(EncoderDecoder, "decoder", batch["decoder_attention_mask"], batch)
    assert torch.equal(terms(EncoderDecoder, own, batch)["d"], expected)


def of_frames(attention_mask, **_):
    return attention_mask[:, ::4]


def test_a_mask_of_samples_is_not_that_of_frames():
    batch = batch_of(Frames, 32)
    with pytest.warns(UserWarning, match=r"shape \(2, 32\), of other ones, .*\(2, 8, 4\)"):
        found = terms(Frames, {"layer": "layer"}, batch)
    assert torch.equal(found["layer->layer"], by_hand(Frames, "layer", None, batch))
    found = terms(Frames, [Pair("layer", "layer", mask=of_frames)], batch)
    expected = by_hand(Frames, "layer", of_frames(batch["attention_mask"]), batch)
    assert torch.equal(found["layer->layer"], expected)


def test_a_signal_has_a_mask_of_its_samples_at_its_own_length():
    batch = batch_of(Frames, 32)
    pair = Pair("conv", "conv", channel_dim=1, mask="attention_mask")
    found = terms(Frames, [pair], batch)["conv->conv"]
    changed = {**batch, "input_values": batch["input_values"].clone()}
    changed["input_values"][1, 16:] = 5.0
    assert torch.equal(terms(Frames, [pair], batch, changed)["conv->conv"], found)
    assert terms(Frames, [Pair("conv", "conv", channel_dim=1)], batch)["conv->conv"] != found


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_model_that_pads_for_itself_is_told_of_by_its_first_shorter_batch(device, request):
    if device == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    student, distiller = build(Padded, {"layer": "layer"}, **batch_of(Padded))
    batch = batch_of(Padded, 6)
    student(**batch)
    message = r"mask of shape \(2, 8\); got shape \(2, 6\).*Give the pair a mask of its own"
    with pytest.raises(ValueError, match=message):
        distiller(**batch)

    def padded(attention_mask, **_):
        return F.pad(attention_mask, (0, -attention_mask.shape[1] % 4))

    pairs = [Pair("layer", "layer", mask=padded)]
    found = terms(Padded, pairs, batch_of(Padded), batch)["layer->layer"]
    assert torch.equal(found, by_hand(Padded, "layer", padded(batch["attention_mask"]), batch))


class FromLabels(EncoderDecoder):
    """Makes its decoder's inputs of the labels, as T5 and BART do."""

    def forward(self, input_ids, labels, attention_mask=None):
        return super().forward(input_ids, labels.roll(1, 1).clamp(min=0), attention_mask)


def test_a_decoder_whose_inputs_are_the_labels_does_not_have_its_encoders_mask():
    batch = batch_of(EncoderDecoder)
    batch["labels"] = batch.pop("decoder_input_ids")
    pairs = [Pair("decoder[0]", "decoder[0]", name="d"), Pair("encoder", "encoder", name="e")]
    with pytest.warns(UserWarning, match=r"'decoder\[0\]', mask: .* padding counts. Say which"):
        _, distiller = build(FromLabels, pairs, **batch)
    assert set(distiller._masks.of(None, (), batch)) == {"e"}


@pytest.mark.parametrize("shape", [(8, 8, 8), (8, 1, 8, 8)])
@pytest.mark.parametrize("how", ["token_mask", "function"])
def test_maps_have_masks(how, shape):
    student, teacher = cnn_pair()
    mask = torch.ones(shape)
    mask[..., :4] = 0
    pair = Pair("stage2", "stage2", mask=(lambda x: mask) if how == "function" else None)
    given = {} if how == "function" else {"token_mask": mask}
    torch.manual_seed(1)
    distiller = Distiller(student, teacher, [pair], example=images())
    loss = copy.deepcopy(distiller.losses["stage2->stage2"])
    features = [x.stage2(x.stage1(images())) for x in (student, teacher.eval())]
    expected = 3.0 * loss(*(x[..., 2:] for x in features))  # of the valid columns
    student(images())
    torch.testing.assert_close(distiller(images(), **given), expected, rtol=1e-5, atol=1e-6)
    student(images())
    model = DistillationModel(student, distiller)
    assert model(images(), **given)[1].isfinite()


def test_a_distiller_with_masks_is_copied_and_pickled():
    batch = batch_of(TokenNet)
    student, distiller = build(TokenNet, [Pair("layer", "layer", mask="attention_mask")], **batch)
    model = DistillationModel(student, distiller)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch)[1], model(**batch)[1])
    assert pickle.loads(pickle.dumps(model)).eval()(**batch).isfinite().all()


@pytest.mark.parametrize("freely", [True, False])
def test_what_is_not_finite_outside_a_mask_is_no_news(freely, monkeypatch):
    """On a GPU nobody looks before the loss is computed."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", freely, raising=False)
    student, teacher = cnn_pair()
    teacher.stage2.register_forward_hook(lambda *x: x[2].index_fill(3, torch.tensor(0), torch.nan))
    mask = torch.ones(8, 8, 8)
    mask[..., :2] = 0
    pair = Pair("stage2", "stage2", mask=lambda x: mask)
    distiller = Distiller(student, teacher, [pair], example=images())
    student(images())
    value = distiller(images())
    assert value.isfinite()
    assert value != 0
