"""Models as they are used, with random weights."""

import pytest

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")


def timm_model(name):
    return lambda: timm.create_model(name, num_classes=10)


def torchvision_model(name):
    return lambda: torchvision.models.get_model(name, weights=None)


def bert(layers, width):
    def build():
        config = transformers.BertConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        return transformers.BertForSequenceClassification(config)

    return build


def roberta(layers):
    config = transformers.RobertaConfig(num_hidden_layers=layers, pad_token_id=1)
    return lambda: transformers.RobertaForSequenceClassification(config)


def distilbert(layers):
    config = transformers.DistilBertConfig(n_layers=layers)
    return lambda: transformers.DistilBertForSequenceClassification(config)


def gpt2(layers):
    return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))


def llama(layers, width):
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return lambda: transformers.LlamaForCausalLM(config)
