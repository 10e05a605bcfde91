"""A wider BERT teaches a narrow one with Hugging Face's Trainer, with and without VID.

    python examples/hf_text_classification.py
    python examples/hf_text_classification.py --teacher path/to/bert --texts_per_class 50

The texts are docstrings of installed libraries, and a text's label is the library it is from:
they are read off the source files, so nothing is downloaded, and no file is in both the train set
and the test set. A teacher learns from all training texts, unless you name one (of these labels);
the student learns from a few of each class. The two runs of it differ in the class of the trainer.
"""

import ast
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Subset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from vid_loss.integrations.hf import VIDTrainer

from vid_loss.subsets import images_per_class

LIBRARIES = ["matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers"]
LENGTH = 40
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@dataclass
class Options:
    """What can be changed on the command line."""

    teacher: str | None = None
    """A BERT classifier of the six libraries, with its tokenizer, instead of training one."""
    texts_per_class: int = 50
    """How many texts of each class the student learns from."""
    files_per_library: int = 200
    teacher_steps: int = 250
    student_steps: int = 200
    output_dir: str = "hf-text-classification"
    seed: int = 0


Text = tuple[str, int]


def docstrings(path: Path) -> list[str]:
    """Returns the first paragraphs of a source file's docstrings, without what is too short."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    paragraphs = [(ast.get_docstring(node) or "").split("\n\n")[0] for node in nodes]
    return sorted({text for text in paragraphs if len(text.split()) >= 6})


def load_texts(files_per_library: int) -> tuple[list[Text], list[Text]]:
    """Returns a train set and a test set of texts with the index of their library."""
    train_set: list[Text] = []
    test_set: list[Text] = []
    for label, library in enumerate(LIBRARIES):
        spec = importlib.util.find_spec(library)
        root = Path(spec.submodule_search_locations[0])
        paths = sorted(path for path in root.rglob("*.py") if "tests" not in path.parts)
        random.Random(0).shuffle(paths)
        for index, path in enumerate(paths[:files_per_library]):
            part = test_set if index % 4 == 0 else train_set
            part += [(text, label) for text in docstrings(path)[:20]]
    known = {text for text, _ in train_set}
    return train_set, [(text, label) for text, label in test_set if text not in known]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Learns the words of the train set."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=4000, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = ("[SEP]", SPECIAL.index("[SEP]")), ("[CLS]", SPECIAL.index("[CLS]"))
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def encode(texts: list[Text], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Turns texts into rows of the Trainer's data set; the collator pads them."""
    rows = tokenizer([text for text, _ in texts], truncation=True, max_length=LENGTH)
    keys = "input_ids", "attention_mask"
    return [
        {**{key: rows[key][i] for key in keys}, "labels": label}
        for i, (_, label) in enumerate(texts)
    ]


def bert(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> PreTrainedModel:
    """Builds a small BERT for the tokenizer's vocabulary."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        num_labels=len(LIBRARIES),
    )
    return BertForSequenceClassification(config)


def settings(options: Options, name: str, steps: int) -> TrainingArguments:
    """Returns the arguments of one of the three runs."""
    return TrainingArguments(
        output_dir=f"{options.output_dir}/{name}",
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=2e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=options.seed,
    )


def accuracy(trainer: Trainer) -> float:
    """Returns the percentage of the test set that is classified right."""
    prediction = trainer.predict(trainer.eval_dataset)
    return 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def main(options: Options) -> None:
    """Trains a teacher and a student twice, and prints the three accuracies."""
    train_texts, test_texts = load_texts(options.files_per_library)
    set_seed(options.seed)
    if options.teacher:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher)
    else:
        tokenizer = train_tokenizer([text for text, _ in train_texts])
        teacher = bert(tokenizer, width=64, layers=1)
    train_set, test_set = encode(train_texts, tokenizer), encode(test_texts, tokenizer)
    shared = {"eval_dataset": test_set, "data_collator": DataCollatorWithPadding(tokenizer)}
    if not options.teacher:
        args = settings(options, "teacher", options.teacher_steps)
        trainer = Trainer(teacher, args, train_dataset=train_set, **shared)
        trainer.train()
        print(f"teacher {accuracy(trainer):.1f} %, {len(train_set)} texts")

    labels = torch.tensor([label for _, label in train_texts])
    few = Subset(train_set, images_per_class(labels, options.texts_per_class, seed=options.seed))
    results = {}
    for method in ("student", "VID"):
        set_seed(options.seed)
        student = bert(tokenizer, width=24, layers=1)
        args = settings(options, method, options.student_steps)
        if method == "student":
            trainer = Trainer(student, args, train_dataset=few, **shared)
        else:
            last = teacher.config.num_hidden_layers - 1
            pairs = {"bert.encoder.layer.0": f"bert.encoder.layer.{last}"}
            trainer = VIDTrainer(
                student, args, train_dataset=few, **shared, teacher=teacher, pairs=pairs
            )
        trainer.train()
        results[method] = accuracy(trainer)
    print(f"{options.texts_per_class} texts per class, {len(test_set)} test texts")
    for method, percent in results.items():
        print(f"{method:8} {percent:.1f} %")


if __name__ == "__main__":
    main(HfArgumentParser(Options).parse_args_into_dataclasses()[0])
